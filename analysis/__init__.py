"""From run folders to tables, figures and a report. Reads records and never imports torch.

In the order in which data flows:

    read/        wandb_runs (W&B projects as run folders), folders, records (records.parquet, checked for consistency),
                 details (its optional columns), configurations (what decides a run), runs (one frame of many runs)
    statistics/  histograms -> sums -> metrics, intervals (cluster bootstrap, pairs, seeds, Holm), acceptance_gap,
                 headline (the main metrics of one evaluation)
    tables/      groups (which numbers belong to one table), frames, protocols, costs, positions, gap, published,
                 sheets (tables arranged for printing), writers (Markdown, LaTeX, HTML, terminal, CSV)
    figures/     style, acceptance, curves, overlay (the paper's numbers)
    html/        content of the report, page
    compare.py   all of it in one call
    paper/       published numbers
"""
