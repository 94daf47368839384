"""Seconds of an optimiser step of a training that has not begun, to know what a budget of hours comes to.

The steps are real ones on the training data, with forward pass, loss, backward pass and optimiser, at a learning rate
of 0, so that the draft keeps its weights. One device takes all micro-batches of a step in turn; with several devices a
training divides them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import count

import torch

from specbench.data.loading.step_data import StepData
from specbench.data.loading.steps import TrainingStep
from specbench.decoding.loop import clock
from specbench.training.draft_training import DraftTraining

STEPS, UNTIMED = 5, 2


def step_seconds(
    module: DraftTraining, data: StepData, precision: str, devices: int = 1, steps: int = STEPS, untimed: int = UNTIMED
) -> float:
    """Median seconds of `steps` optimiser steps of `module`, after some that are not timed, divided by `devices`.

    Args:
        module: on the device that is to train; its weights are the same afterwards.
        precision: of Lightning; the mixed ones compute under autocast.
    """
    optimizer = torch.optim.AdamW([p for p in module.draft.parameters() if p.requires_grad], lr=0.0)
    module.train()
    taken: list[float] = []
    with torch.random.fork_rng():
        for number, step in enumerate(_endless(data)):
            if number == untimed + steps:
                break
            began = clock(module.device)
            for batch in step.micro:
                with _cast(module.device, precision):
                    loss = module.loss(module.draft, batch, step.epoch)
                loss.value.backward()
            optimizer.step()
            optimizer.zero_grad()
            if number >= untimed:
                taken.append(clock(module.device) - began)
    return statistics.median(taken) / devices


def _endless(data: StepData) -> Iterator[TrainingStep]:
    for epoch in count():
        yield from data.steps(epoch * data.steps_per_epoch)


def _cast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    return torch.autocast(device.type, torch.bfloat16) if precision.startswith("bf16") else nullcontext()
