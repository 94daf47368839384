"""Verification by rejection sampling, without models (Leviathan et al. 2023; Chen et al. 2023).

Accept x_k with probability min(1, q_k(x_k) / p_k(x_k)), left to right; at the first rejection draw from
norm(max(q_k - p_k, 0)); if all are accepted draw from q_{l+1}. The committed tokens then have the distribution of the
target, for any draft.

Axes: B rows, K proposed slots, V vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from specbench.decoding.sampling import draw


def verify_greedy(
    proposed: Int[Tensor, "B K"], target: Int[Tensor, "B L"], lengths: Int[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """Temperature 0: accept while the proposal equals the target's most likely token (B, K+1); returns (accepted,
    next)."""
    slots = torch.arange(proposed.shape[1], device=proposed.device)
    agree = (proposed == target[:, :-1]) & (slots < lengths[:, None])
    accepted = agree.cumprod(-1).sum(-1)
    return accepted, target.gather(1, accepted[:, None])[:, 0]


def verify(
    proposed: Int[Tensor, "B K"],
    draft: Float[Tensor, "B K V"] | None,
    target: Float[Tensor, "B L V"],
    lengths: Int[Tensor, " B"],
    uniforms: Float[Tensor, "B L"],
) -> tuple[Int[Tensor, " B"], Int[Tensor, " B"]]:
    """Accepted counts and next tokens of a round.

    `draft`: the probabilities from which the proposal was drawn (None: the draft was deterministic, a one-hot
    distribution). `target`: those of K+1 positions with the same temperature and filters. `lengths`: number of slots of
    each row that count. `uniforms`: K acceptance draws and one for the next token.
    """
    rows = torch.arange(len(proposed), device=proposed.device)
    K = proposed.shape[1]
    q = target[:, :K].gather(-1, proposed[..., None])[..., 0].double()
    p = torch.ones_like(q) if draft is None else draft.gather(-1, proposed[..., None])[..., 0].double()
    inside = torch.arange(K, device=proposed.device) < lengths[:, None]
    accepted = ((uniforms[:, :K] * p < q) & inside).cumprod(-1).sum(-1)
    following = target[rows, accepted].double()
    rejected = accepted < lengths
    at = accepted.clamp_max(max(K - 1, 0))
    if K and draft is None:
        struck = torch.zeros_like(following).scatter_(-1, proposed[rows, at][:, None], 1.0)
        residual = following * (1 - struck)
    elif K:
        residual = (following - draft[rows, at].double()).clamp_min(0)
    else:
        residual = following
    # Rounding can give an empty residual only if draft and target are equal; a rejection then has probability zero.
    usable = rejected[:, None] & (residual.sum(-1, keepdim=True) > 0)
    return accepted, draw(torch.where(usable, residual, following), uniforms[:, K])
