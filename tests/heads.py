"""A small head like DSpark's with its blocks, for the tests of the objective."""

from __future__ import annotations

import torch
from torch import nn

from specbench import fast
from specbench.blocks import Blocks
from specbench.models.embedding_head import Tables

B, N, K, D, R, V = 2, 5, 4, 6, 3, 17
IDS = [0, 2, 3, 5, 8, 9, 11, 16]


class Draft(nn.Module):
    """A head like DSpark's with a bias on top, so that autograd and the accumulators both have work."""

    def __init__(self, ids=None, train_head=False, soft_cap=None, dtype=torch.float64, size=V):
        super().__init__()
        head = torch.randn(size, D, dtype=dtype)
        ids = None if ids is None else torch.tensor(ids)
        rows = head if ids is None else head[ids]
        self.tables = Tables(torch.randn(size, D, dtype=dtype), rows, soft_cap=soft_cap, trainable=train_head, ids=ids)
        self.w1, self.w2 = nn.Embedding(size, R, dtype=dtype), nn.Linear(R, len(rows), dtype=dtype)
        self.own = nn.Linear(D + R, 1, dtype=dtype)
        self.heights = []

    @property
    def draft_vocabulary(self):
        return self.tables.ids

    def features(self, hidden, previous):
        return torch.cat([hidden, self.w1(previous)], -1)

    def project(self, features):
        self.heights.append(len(features))
        return self.tables.logits(features[:, :D]) + self.w2(features[:, D:])

    def project_base(self, features):
        return self.tables.logits(features[:, :D])

    def projection_parameters(self):
        return [*self.w2.parameters(), *([self.tables.head] if self.tables.trainable else [])]

    def confidence(self, hidden, previous):
        return self.own(self.features(hidden, previous)).squeeze(-1)


def make(seed=0, dtype=torch.float64, size=V, **settings):
    torch.manual_seed(seed)
    draft = Draft(dtype=dtype, size=size, **settings)
    cap = settings.get("soft_cap")
    tables = Tables(torch.randn(size, D, dtype=dtype), torch.randn(size, D, dtype=dtype), soft_cap=cap)
    hidden = torch.randn(B, N, K, D, dtype=dtype, requires_grad=True)
    mask = torch.arange(K) < torch.tensor([[4, 0, 2, 1, 4], [3, 4, 0, 0, 1]])[..., None]
    previous, labels = torch.randint(0, size, (2, B, N, K))
    return draft, tables, Blocks(hidden, torch.randn(B, N, K, D, dtype=dtype), previous, labels, mask)


def plainly(objective, draft, tables, blocks, **settings):
    """The loss by autograd on whole logits."""
    with fast.plain():
        return objective(draft, tables, blocks, **settings)


def gradients(loss, draft, blocks):
    leaves = [blocks.hidden, *(p for p in draft.parameters() if p.requires_grad)]
    found = torch.autograd.grad(1.3 * loss.value, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def assert_same(loss, expected, draft, blocks, tolerance):
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(loss.value, expected.value, **close)
    torch.testing.assert_close(loss.weight, expected.weight, **close)
    assert loss.terms.keys() == expected.terms.keys()
    for term in loss.terms:
        torch.testing.assert_close(loss.terms[term], expected.terms[term], **close)
    for name in vars(expected.slots):
        torch.testing.assert_close(getattr(loss.slots, name), getattr(expected.slots, name), **close)
    for a, b in zip(gradients(loss, draft, blocks), gradients(expected, draft, blocks), strict=True):
        torch.testing.assert_close(a, b, **close)


TERM_SETTINGS = {
    "ce": {"ce": 0.7},
    "soft_ce": {"soft_ce": 0.7},
    "kl": {"kl": 0.7},
    "softened kl": {"kl": 0.7, "kl_temperature": 2.5},
    "softened kl beside a blend": {"kl": 0.7, "kl_temperature": 2.5, "blend": {"decay": 2.0, "over": "row"}},
    "reverse_kl": {"reverse_kl": 0.7},
    "js": {"js": 0.7},
    "tv": {"tv": 0.7},
    "accept": {"accept": 0.7},
    "blend": {"blend": {"scale": 0.9, "decay": 2.0}},
    "blend by row": {"blend": {"decay": 2.0, "over": "row"}, "ce": 0.1},
    "dspark": {"ce": 0.1, "tv": 0.9, "confidence": 1.0},
    "detached": {"ce": 0.1, "confidence": 1.0, "detach_confidence": True},
    "confidence": {"confidence": 0.5},
    "further": {"further": {"skew_kl": 0.7, "top_ce": 0.4}},
    "feature": {"feature": 0.7, "tv": 0.2},
    "all": {
        "ce": 0.1,
        "soft_ce": 0.2,
        "kl": 0.3,
        "reverse_kl": 0.4,
        "js": 0.5,
        "tv": 0.6,
        "accept": 0.7,
        "further": {"skew_kl": 0.8},
    },
}
BASES = {
    "base of all": {**TERM_SETTINGS["all"], "base": {"add": 0.6}},
    "base of dspark": {**TERM_SETTINGS["dspark"], "base": {"start": 0.8, "share": 1.0}},
    "base of a blend": {"blend": {"scale": 0.9, "decay": 2.0}, "base": {"add": 0.6}},
    "base of softened kl": {"kl": 0.7, "kl_temperature": 2.5, "base": {"add": 0.6}},
}
WEIGHTS = ["uniform", {"exp": 4.0}, {"power": 0.8}, {"dpace": 0.5}, "first_failure"]
