"""From run folders to tables, figures and a report. Reads records and never imports torch.

In the order in which data flows:

    remote      W&B projects as run folders                 folders     run folders: where they lie, what they say
    records     records.parquet, checked for consistency    runs        one frame of many runs; filters and groups
    histograms  histograms -> sums -> quantities            statistics  cluster bootstrap, pairs, seeds, Holm
    groups      which numbers belong to one table           tables      every table as a frame
    costs       what a method costs                         published   the paper's numbers (paper/*.csv) and the gap
    sheets      tables arranged for printing                writers     Markdown, LaTeX, HTML, terminal, CSV
    style       colours and lines (specbench.mplstyle)      figures     slots, decay, axes
    curves      thresholds, reliability, serving, training  report      the content of a report; W&B blocks
    page        the HTML page                               compare     all of it in one call
"""
