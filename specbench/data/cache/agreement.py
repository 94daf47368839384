"""Check that stored final states give the log-probabilities of the target.

Axes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from specbench.data.cache.shards import EncodedConversation
from specbench.data.cache.storage import Storage, kept_rows

CHECKED_TOKENS = 128  # of the first conversation of every shard
CAPTURE_TOLERANCE = 0.05  # relative; bf16 arithmetic moves log-probabilities by about a hundredth
LEAST_RATE = 0.9


class WrongCapture(ValueError):
    """The captured final states do not give the log-probabilities of the target."""


@dataclass(frozen=True)
class Agreement:
    """Number of checked positions, of those whose captured or stored state agrees, and of those with the same
    argmax."""

    positions: int = 0
    captured: int = 0
    stored: int = 0
    first: int = 0

    def __add__(self, other: Agreement) -> Agreement:
        mine, theirs = vars(self), vars(other)
        return Agreement(**{name: mine[name] + theirs[name] for name in mine})

    def rates(self) -> dict[str, float | int]:
        """Shares of the checked positions, and their number."""
        count = max(1, self.positions)
        shares = {name: getattr(self, name) / count for name in ("captured", "stored", "first")}
        return {"positions": self.positions, **shares}


def relative_error(ours: Float[Tensor, "T V"], live: Float[Tensor, "T V"]) -> Float[Tensor, " T"]:
    """Distance of two log-probability vectors divided by the spread of the reference one; a flat distribution has 1."""
    ours, live = ours.float().log_softmax(-1), live.float().log_softmax(-1)
    spread = (live - live.mean(-1, keepdim=True)).norm(dim=-1)
    return (ours - live).norm(dim=-1) / spread.clamp_min(1e-6)


def check(
    target: Any,
    conversation: EncodedConversation,
    captured: Float[Tensor, "T D"],
    stored: Float[Tensor, "T D"],
    loss_mask: Bool[Tensor, " T"],
    storage: Storage,
) -> Agreement:
    """Compute log-probabilities of the first tokens from `last`, as captured and as stored; compare with the reference.

    The reference comes from the head of the model in transformers on the same tokens. Rows that are not stored are not
    compared.
    """
    count = min(CHECKED_TOKENS, len(loss_mask))
    tokens = torch.as_tensor(conversation.tokens, dtype=torch.long)[None, :count]
    live = target.live_logits(tokens, torch.tensor([count]))[0]
    rows = torch.arange(count)
    if storage.last_rows == "supervised":
        rows = rows[kept_rows(loss_mask)[:count]]
    rows = rows.to(live.device)
    live = live[rows]
    before = relative_error(target.logits(captured[:count].to(live.device))[rows], live)
    logits = target.logits(stored[:count].to(live.device, captured.dtype))[rows]
    after = relative_error(logits, live)
    return Agreement(
        positions=len(rows),
        captured=int((before <= CAPTURE_TOLERANCE).sum()),
        stored=int((after <= CAPTURE_TOLERANCE + storage.last.tolerance).sum()),
        first=int((logits.argmax(-1) == live.argmax(-1)).sum()),
    )


def require(agreement: Agreement, storage: Storage) -> None:
    """Raise WrongCapture when too many positions disagree."""
    rates = agreement.rates()
    for what, cause in (
        ("captured", "`last` is not what the target's head reads, or `logits` differs from the target's own head"),
        ("stored", f"codec {storage.last.name} does not suit these states: choose another for last"),
    ):
        if agreement.positions and rates[what] < LEAST_RATE:
            raise WrongCapture(
                f"log-probabilities from the {what} final states agree with the target's own at {rates[what]:.1%} of "
                f"{agreement.positions} positions, at least {LEAST_RATE:.0%} are needed: {cause}"
            )
