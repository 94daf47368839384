"""SpecBench: the laboratory for speculative-decoding draft models.

Read the package in the order in which data flows through it; a folder imports only from those before it:

    blocks.py      the layout of samples, batches and blocks, and the index law
    files/         files on disk: written whole or not at all, lines of JSON, hub datasets
    runs/          run folders, provenance, Weights & Biases
    metrics/       every formula once, and the torchmetrics classes over it
    models/        the target, the layers of drafts, attention, key-value cache, embedding and head; fast/: faster paths
    drafts/        the contract (draft.py), parallel.py, recurrent.py, one file a method, baselines
    checkpoints/   published formats in and out, draft folders, model cards
    losses/        terms, slot weights, the chunked objective and its reference
    decoding/      the loop, sampling, verification, scheduling, calibration of confidence
    data/          prompts/, answers/, cache/, loading/
    training/      the LightningModule, callbacks, initialisation, pretraining of small targets
    evaluation/    decoding of benchmarks into records, teacher-forced acceptance, audits
    profiling/     measured cost of decoding, training steps and reading
    serving/       simulation of an engine under load
    cli/           the command line's machinery: overrides, help, errors, stages, progress
"""
