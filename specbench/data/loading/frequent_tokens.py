"""The most frequent supervised tokens of training data: the vocabulary of a draft that does not keep the whole one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from specbench.data.loading.step_data import StepData
from specbench.data.loading.target_cache import TargetCache

ROWS = 64  # conversations read at once


def frequent_tokens(data: StepData, size: int, always: Sequence[int]) -> tuple[Int[Tensor, " W"], float]:
    """Ids of the `size` most frequent supervised tokens, ascending, and the share of the supervised text they cover.

    Of equally frequent ones, those that are more frequent in the whole conversations come first: answers repeat names
    and numbers of their questions. `always` (stop tokens) belong to them whatever their count. Errors: ValueError for a
    size that cannot be.
    """
    whole = len(data.tables.embedding)
    if not len(always) < size <= whole:
        raise ValueError(f"method.vocabulary={size}: choose more than {len(always)} and at most {whole} tokens")
    counts, everywhere = torch.zeros(whole, dtype=torch.long), torch.zeros(whole, dtype=torch.long)
    rows = data.rows[0]
    # Tokens and masks alone, where the states lie on disk.
    source = data.of_tokens() if isinstance(data, TargetCache) else data
    for start in range(0, len(rows), ROWS):
        for sample in source.samples(rows[start : start + ROWS]):
            counts += torch.bincount(sample.tokens[sample.loss_mask].long(), minlength=whole)
            everywhere += torch.bincount(sample.tokens.long(), minlength=whole)
    total = int(counts.sum())
    rank = counts.clone()
    rank[list(always)] = total + 1
    order = everywhere.argsort(descending=True, stable=True)
    ids = order[rank[order].argsort(descending=True, stable=True)][:size].sort().values
    return ids, int(counts[ids].sum()) / total
