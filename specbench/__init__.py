"""SpecBench: the laboratory for speculative-decoding draft models.

Read the package in the order in which data flows through it:

    blocks        the layout and the index law
    data/         prompts, answers, chat, codecs, shards, cache, datamodule, online, benchmarks
    targets       the language models that drafts are trained for
    backbone, attention, kvcache, tables
    methods/      draft (the contract), parallel, recurrent; dflash, dspark, eagle3, mtp
    losses, objective
    training, callbacks, initialisation
    sampling, verification, scheduling, decoding
    metrics, evaluation, calibration, serving
    tracking, runfolder, interchange
"""
