"""On-policy training: the tokens between the slots are those that decoding would have drawn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from specbench.blocks import Batch, assemble, with_anchors
from specbench.drafts.draft import Draft
from specbench.drafts.on_policy import OnPolicy
from specbench.losses.objective import Objective
from specbench.training.draft_training import DraftTraining
from tests import tiny
from tests.test_contract import context


class Counter(Draft):
    """After token x it proposes (x + 1) mod 96, or x with probability 1/4: previous tokens are all that it reads."""

    def __init__(self, backbone, tables, target_layer_ids, mask_token_id=None, *, block_size=4, anchors=None):
        super().__init__(backbone, tables, target_layer_ids, mask_token_id, block_size=block_size, anchors=anchors)
        self.anything = nn.Linear(1, 1)

    def forward(self, batch: Batch):
        shape = (*batch.anchors.shape, self.block_size, self.backbone.hidden_size)
        return assemble(batch, torch.zeros(shape) + self.anything.weight)

    def features(self, hidden, previous):
        return previous[..., None].float() + 0 * hidden[..., :1]

    def project(self, features):
        token = features[:, 0].round().long()
        logits = torch.full((len(token), tiny.VOCABULARY), -torch.inf)
        rows = torch.arange(len(token))
        logits[rows, token] = torch.tensor(0.25).log()
        logits[rows, (token + 1) % tiny.VOCABULARY] = torch.tensor(0.75).log()
        return logits


def made(share: float, temperature: float, seed: int = 0, length: int | None = None) -> tuple[Draft, Batch, object]:
    """A Counter, its batch and its blocks."""
    owner = tiny.target("qwen3")
    draft = Counter(tiny.draft("dflash", "qwen3").backbone, owner.tables, tiny.TAPS, anchors=None)
    batch = with_anchors(tiny.pack(tiny.samples("qwen3", lengths=(24, 17, 9, 12)), length=length), None, (seed,))
    policy = OnPolicy.of(batch, draft.block_size, share, temperature)
    return draft, batch, policy.forward(draft, batch)


def test_a_draft_that_counts_is_fed_its_own_counting() -> None:
    """Share 1 at temperature 0: anchor, anchor + 1, anchor + 2, ...; labels, targets and supervision are the text's."""
    draft, batch, blocks = made(1.0, 0.0)
    real = batch.anchors >= 0
    anchor = batch.tokens.gather(1, batch.anchors.clamp_min(0))[..., None]
    assert torch.equal(blocks.previous[real], ((anchor + torch.arange(4)) % tiny.VOCABULARY)[real])
    plain = draft(batch)
    for name in ("labels", "mask", "target", "hidden"):
        assert torch.equal(getattr(blocks, name), getattr(plain, name)), name
    assert (blocks.previous != plain.previous)[plain.mask].any()


def test_the_share_of_draws_and_their_law() -> None:
    """Independent coins: with share 0.4 a token is the text's or the Counter's step from the token before. Bounds of
    five standard deviations over about 900 slots (false alarm 1e-6)."""
    moves, kept, slots = 0, 0, 0
    for seed in range(6):
        draft, batch, blocks = made(0.4, 1.0, seed)
        own = OnPolicy.of(batch, 4, 0.4, 1.0).own
        plain = draft(batch)
        for b, n in (batch.anchors >= 0).nonzero().tolist():
            for k in range(1, 4):
                token, before = int(blocks.previous[b, n, k]), int(blocks.previous[b, n, k - 1])
                if own[b, n, k - 1]:
                    step = (token - before) % tiny.VOCABULARY
                    assert step in (0, 1)
                    moves += step
                    kept += 1
                else:
                    assert token == int(plain.previous[b, n, k])
                slots += 1
    assert abs(kept / slots - 0.4) < 5 * (0.24 / slots) ** 0.5
    assert abs(moves / kept - 0.75) < 5 * (0.1875 / kept) ** 0.5


def test_draws_depend_on_the_seed_and_the_conversation_alone() -> None:
    def chosen(seed: int, length: int | None) -> dict:
        _, batch, blocks = made(0.5, 1.0, seed, length)
        # Beyond the text the unused slots hold whatever stands there in the row.
        previous = torch.where(blocks.mask, blocks.previous, -1)
        places = (batch.anchors >= 0).nonzero().tolist()
        at = {(b, n): int(batch.anchors[b, n]) for b, n in places}
        return {
            (int(batch.document[b, a]), int(batch.position[b, a])): previous[b, n].tolist() for (b, n), a in at.items()
        }

    assert chosen(1, None) == chosen(1, 40)
    assert chosen(1, None) != chosen(2, None)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("eagle3", {}),
        ("eagle3_1", {}),
        ("mtp", {}),
        ("dspark", {}),
        ("dspark", {"markov_head": "rnn"}),
        ("dflash", {}),
        ("p_eagle", {}),
        ("medusa", {}),
        ("hydra", {}),
        ("jetspec", {"block_input": "tokens"}),
        ("jetspec", {}),
    ],
)
def test_training_on_policy_sees_the_logits_of_a_round(method: str, settings: dict) -> None:
    """Share 1 at temperature 0: from every anchor, the tokens and logits of the draft's own greedy proposal."""
    draft, sample = tiny.draft(method, "qwen3", **settings), tiny.samples("qwen3")[0]
    batch = with_anchors(tiny.pack([sample]), None)
    with torch.no_grad():
        policy = OnPolicy.of(batch, draft.block_size, 1.0, 0.0)
        blocks = policy.forward(draft, batch)
        logits = draft.logits(blocks.hidden, blocks.previous)
        different = 0
        for n in (0, 5, 11):
            anchor, seen = int(batch.anchors[0, n]), []
            proposal = draft.propose(
                draft.begin(*context(sample, 0, anchor)),
                sample.tokens[anchor : anchor + 1],
                lambda x, seen=seen: seen.append(x) or (x.argmax(-1), None),
            )
            assert blocks.previous[0, n, 1:].tolist() == proposal.tokens[0, :-1].tolist()
            torch.testing.assert_close(torch.cat(seen, 1)[0], logits[0, n], atol=5e-5, rtol=1e-4)
            different += int((proposal.tokens[0] != sample.tokens[anchor + 1 :][: draft.block_size]).sum())
        assert different > 3, "a draft that guesses the text proves nothing"


def test_the_share_rises_over_the_steps_and_zero_is_teacher_forcing() -> None:
    draft, owner = tiny.draft("eagle3", "qwen3", anchors=6), tiny.target("qwen3")
    module = DraftTraining(draft, Objective(kl=1.0), max_steps=100, on_policy=0.8, on_policy_ramp=0.25)
    module.steps_in_all = 100
    assert [module.share_on_policy(step) for step in (0, 5, 25, 99)] == pytest.approx([0.0, 0.16, 0.8, 0.8])
    module._target_tables = (owner.tables,)
    losses = [float(module.loss(draft, tiny.batch("qwen3"), 0, share).value) for share in (0.0, 0.0, 1.0)]
    plain = DraftTraining(draft, Objective(kl=1.0), max_steps=100)
    plain._target_tables = (owner.tables,)
    assert losses[0] == losses[1] == float(plain.loss(draft, tiny.batch("qwen3"), 0).value) != losses[2]
    # The settings are in a checkpoint where they do something, and only there.
    assert module.hparams["training"]["on_policy"] == 0.8 and "on_policy" not in plain.hparams["training"]
