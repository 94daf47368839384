"""Loss terms that are one function each; autograd takes their gradient.

`objective: {further: {NAME: coefficient}}` adds a term by its name in `FURTHER_TERMS`. A function receives

    log_p    (R, W)  log-probabilities of the draft, with gradient
    log_q    (R, W)  log-probabilities of the target at the draft's tokens, not renormalised
    outside  (R,)    probability of the target outside of the draft's vocabulary (0 unless it is reduced)

and returns (R,), the term of every slot in nats. Both computations of the objective call it: `reference.py` on whole
logits, `fused.py` on a few rows at a time, so that no term needs its gradient in closed form. The terms of `terms.py`
have one, and are therefore faster and need less memory.

Axes: R rows (supervised slots), W draft vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, logaddexp

# Share of the target in the mixture of `skew_kl`; 0.1 as in DistiLLM.
SKEW = 0.1
# Tokens of `top_ce`; 10 as in HASS.
TOP = 10


def top_ce(log_p: Float[Tensor, "R W"], log_q: Float[Tensor, "R W"], outside: Float[Tensor, " R"]) -> Tensor:
    """-sum q log p over the 10 tokens that the target finds most likely: the top-k loss of HASS (arXiv 2408.15766)."""
    likely, tokens = log_q.topk(min(TOP, log_q.shape[-1]))
    return -(likely.exp() * log_p.gather(-1, tokens)).sum(-1)


def skew_kl(log_p: Float[Tensor, "R W"], log_q: Float[Tensor, "R W"], outside: Float[Tensor, " R"]) -> Tensor:
    """KL(q | 0.1 q + 0.9 p), the skew divergence of DistiLLM (arXiv 2402.03898); finite also where p is 0."""
    log_mixture = logaddexp(log_q + math.log(SKEW), log_p + math.log1p(-SKEW))
    return (log_q.exp() * (log_q - log_mixture)).sum(-1) - outside * math.log(SKEW)


FURTHER_TERMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "top_ce": top_ce,
    "skew_kl": skew_kl,
}
