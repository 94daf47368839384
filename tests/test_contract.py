"""The contract of drafts/draft.py, for every committed method and family."""

import copy
import dataclasses

import pytest
import torch

from specbench.blocks import Context, take, with_anchors
from specbench.decoding.loop import Limits, decode, speculative_decode
from specbench.decoding.sampling import Sampling
from specbench.drafts.parallel import ParallelDraft
from specbench.losses.objective import Objective
from tests import tiny

# Blocks hold 4 slots and up to 5 inputs: windows below, at and beyond the block, two of them in a default run.
WINDOWS = range(1, 7)


def some(window):
    return () if window in (2, 5) else pytest.mark.long


every = pytest.mark.parametrize(("method", "family"), tiny.across())
variants = pytest.mark.parametrize(
    ("method", "family", "settings"),
    [
        *tiny.across(tiny.METHODS, {}),
        *(("dspark", "qwen3", {"markov_head": kind}) for kind in ("gated", "rnn")),
        ("dspark", "gemma4", {"markov_head": "rnn", "confidence_with_markov": False}),
        ("dflash", "qwen3", {"sample_from_anchor": False}),
        ("dflash", "qwen3", {"causal_block": True}),
        ("dflash", "qwen3", {"causal_block": True, "window": 5, "sample_from_anchor": False}),
        ("dspark", "gemma4", {"causal_block": True}),
        ("dflash", "qwen3", {"causal_block": True, "window": 5, "full_layers": [1]}),
        ("dspark", "qwen3", {"window": 5, "full_layers": [0]}),
        ("jetspec", "qwen3", {"block_input": "tokens"}),
        ("dflash2", "qwen3", {"sample_from_anchor": False, "candidates": 3}),
        ("domino", "qwen3", {"sample_from_anchor": False, "prefix": 0}),
        ("jetspec", "qwen3", {"block_input": "tokens", "window": 3}),
        ("eagle3", "qwen3", {"fc_norm": True, "norm_output": True}),
        ("eagle3", "gemma4", {"norm_output": True, "layers": 1}),
        ("eagle3", "qwen3", {"norm_before_fc": True, "backbone": "llama"}),
        *(pytest.param(m, "qwen3", {"window": w}, marks=some(w)) for m in tiny.LAYERED for w in WINDOWS),
        *(("dflash", "qwen3", {"sample_from_anchor": False, "window": w}) for w in WINDOWS),
        ("dspark", "qwen3", {"backbone": "gemma4"}),
        ("eagle3", "gemma4", {"backbone": "qwen3"}),
    ],
)


def context(sample, start, end):
    states = slice(start, end)
    length = torch.tensor([end - start])
    return Context(sample.taps[None, states], sample.last[None, states], length), sample.tokens[None, states]


def precise(draft, samples):
    """Both in double precision. Norms and rotations stay in single, so views differ by up to 6e-6 for logits of size
    10; in single precision alone they differ by up to 3e-5, depending on the processor."""
    wide = [dataclasses.replace(s, taps=s.taps.double(), last=s.last.double()) for s in samples]
    return copy.deepcopy(draft).double(), wide  # the tables are those of the target, which other tests share


class Forced:
    """A sampler that proposes the true tokens and keeps the logits it was shown."""

    def __init__(self, tokens):
        self.tokens, self.seen = tokens, []

    def __call__(self, logits):
        at = sum(x.shape[1] for x in self.seen)
        self.seen.append(logits)
        return self.tokens[:, at : at + logits.shape[1]], None


@variants
def test_proposing_the_true_tokens_gives_the_training_logits(method, family, settings):
    draft, (sample, *_) = precise(tiny.draft(method, family, **settings), tiny.samples(family))
    batch = with_anchors(tiny.pack([sample]), None)
    with torch.no_grad():
        blocks = draft(batch)
        logits = draft.logits(blocks.hidden, blocks.previous)
        for n in (0, 5, 11):
            anchor, K = int(batch.anchors[0, n]), draft.block_size
            state = draft.begin(*context(sample, 0, anchor))
            forced = Forced(sample.tokens[None, anchor + 1 : anchor + 1 + K])
            proposal = draft.propose(state, sample.tokens[anchor : anchor + 1], forced)
            torch.testing.assert_close(torch.cat(forced.seen, 1)[0], logits[0, n], atol=5e-5, rtol=1e-4)
            confidence = draft.confidence(blocks.hidden, blocks.previous)
            assert (confidence is None) == (proposal.confidence is None)
            if confidence is not None:
                torch.testing.assert_close(proposal.confidence[0], confidence[0, n], atol=2e-5, rtol=1e-4)


@variants
def test_commits_in_pieces_equal_one_begin(method, family, settings):
    draft, (sample, *_) = precise(tiny.draft(method, family, **settings), tiny.samples(family))
    with torch.no_grad():
        whole = draft.begin(*context(sample, 0, 15))
        pieces = draft.begin(*context(sample, 0, 6))
        for start, end in ((6, 7), (7, 11), (11, 15)):
            pieces = draft.commit(pieces, *context(sample, start, end))
        seen = []
        for state in (whole, pieces):
            forced = Forced(sample.tokens[None, 16:24])
            draft.propose(state, sample.tokens[15:16], forced)
            seen.append(torch.cat(forced.seen, 1))
    torch.testing.assert_close(seen[0], seen[1], atol=2e-5, rtol=1e-4)


@every
def test_states_at_or_after_an_anchor_do_not_reach_its_block(method, family):
    draft = tiny.draft(method, family)
    batch = with_anchors(tiny.batch(family), None)
    with torch.no_grad():
        before = draft(batch).hidden
        for n in (0, 3):
            anchors = batch.anchors[:, n]
            late = torch.arange(batch.tokens.shape[1]) >= anchors.clamp_min(0)[:, None]
            noise = torch.randn(batch.taps.shape, generator=torch.Generator().manual_seed(1))
            taps = torch.where(late[..., None, None], noise, batch.taps)
            last = torch.where(late[..., None], noise[:, :, 0], batch.last)
            after = draft(dataclasses.replace(batch, taps=taps, last=last)).hidden
            torch.testing.assert_close(after[:, n], before[:, n], atol=1e-6, rtol=1e-6)
            # The states before the anchor do reach it: the check above could not fail otherwise.
            early = dataclasses.replace(
                batch,
                taps=torch.where(late[..., None, None], batch.taps, noise),
                last=torch.where(late[..., None], batch.last, noise[:, :, 0]),
            )
            assert (draft(early).hidden[:, n] - before[:, n]).abs().max() > 1e-3


@every
def test_greedy_output_is_the_targets_own_and_the_batch_changes_nothing(method, family):
    target, draft = tiny.target(family), tiny.draft(method, family)
    requests, new = (8, 10) if family in ("qwen3", "gemma4") else (3, 6)
    samples = tiny.samples(family, lengths=(20,) * requests, seed=4)
    prompts = [s.tokens[: 3 + 2 * i].tolist() for i, s in enumerate(samples)]
    limits = Limits(max_new_tokens=new)
    own = {d.index: d.output_ids for d in decode(target, prompts, Sampling(), limits)}
    alone = {d.index: d for d in speculative_decode(target, draft, prompts, Sampling(), limits)}
    together = speculative_decode(target, draft, prompts, Sampling(), dataclasses.replace(limits, batch_size=8))
    assert {i: d.output_ids for i, d in alone.items()} == own
    rounds = {d.index: [(r.proposed, r.accepted) for r in d.rounds] for d in together}
    assert rounds == {i: [(r.proposed, r.accepted) for r in d.rounds] for i, d in alone.items()}


@pytest.mark.parametrize("window", [None, 5, 2])
@pytest.mark.parametrize("length", [None, 40])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("dspark", {}), ("dflash", {"sample_from_anchor": False}), ("dflash", {"causal_block": True, "full_layers": [1]})],
)
def test_conversation_by_conversation_is_the_dense_computation(method, settings, length, window):
    """Hidden states of every real block and all gradients, in padded rows and in packed ones."""
    draft = tiny.draft(method, "qwen3", window=window, **settings)
    conversations = tiny.samples("qwen3", lengths=(12, 25, 9, 17))
    batch = with_anchors(tiny.pack(conversations, length=length), 12, (7,))
    real = batch.anchors >= 0
    assert real.any() and not real.all()
    found = {}
    for draft.by_span in (True, False):
        draft.zero_grad()
        hidden = draft(batch).hidden[real]
        hidden.pow(2).mean().backward()
        found[draft.by_span] = hidden.detach(), [p.grad for p in draft.parameters() if p.grad is not None]
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [pytest.param(w, marks=some(w)) for w in WINDOWS])
@pytest.mark.parametrize("method", tiny.LAYERED)
def test_a_window_shows_the_positions_inside_it_and_no_others(method, window):
    """Of one layer, so that nothing is passed on: the states before a position are replaced, and slots must notice
    exactly where their window reaches them. A chain carries on what its first step saw, so only that step is asked."""
    draft = tiny.draft(method, "qwen3", window=window, layers=1)
    batch = with_anchors(tiny.pack([tiny.samples("qwen3")[0]]), None)
    n, parallel = 8, isinstance(draft, ParallelDraft)
    anchor = int(batch.anchors[0, n])
    noise = torch.randn(batch.taps.shape, generator=torch.Generator().manual_seed(1))

    def hidden(replaced: int) -> torch.Tensor:
        early = torch.arange(batch.tokens.shape[1]) < replaced
        taps = torch.where(early[:, None, None], noise, batch.taps)
        last = torch.where(early[:, None], noise[:, :, 0], batch.last)
        with torch.no_grad():
            return draft(dataclasses.replace(batch, taps=taps, last=last)).hidden[0, n]

    asked = range(draft.block_size) if parallel else range(1)
    changes = [(hidden(replaced) - hidden(0)).abs().amax(-1) for replaced in range(anchor + 1)]
    for slot in asked:
        position = anchor + slot if parallel else anchor - 1
        for replaced, change in enumerate(changes):
            seen = replaced - 1 > position - window  # the last replaced position is the nearest one
            assert (change[slot] > 1e-5) == (seen and replaced > 0), (slot, replaced)


@every
def test_packed_rows_give_the_blocks_of_padded_ones(method, family):
    draft, conversations = precise(tiny.draft(method, family), tiny.samples(family, lengths=(24, 17, 9, 12)))
    padded = with_anchors(tiny.pack(conversations), 3, (7,))
    packed = with_anchors(tiny.pack(conversations, length=40), 3, (7,))
    assert len(packed.tokens) < len(padded.tokens)
    gathered = []
    with torch.no_grad():
        for batch in (padded, packed):
            blocks, found = draft(batch), {}
            logits = draft.logits(blocks.hidden, blocks.previous)
            for b, n in (batch.anchors >= 0).nonzero().tolist():
                anchor = batch.anchors[b, n]
                key = (int(batch.document[b, anchor]), int(batch.position[b, anchor]))
                found[key] = (logits[b, n], blocks.mask[b, n], blocks.target[b, n], blocks.labels[b, n])
            gathered.append(found)
    assert gathered[0].keys() == gathered[1].keys()
    for key, (logits, mask, states, labels) in gathered[0].items():
        other = gathered[1][key]
        assert torch.equal(mask, other[1])
        assert torch.equal(labels[mask], other[3][mask])
        torch.testing.assert_close(states[mask], other[2][mask])
        torch.testing.assert_close(logits[mask], other[0][mask], atol=2e-5, rtol=1e-4)


@every
def test_every_parameter_gets_a_gradient_and_the_tables_none(method, family):
    draft = tiny.draft(method, family).train()
    batch = with_anchors(tiny.batch(family), None)
    blocks = draft(batch)
    sure = draft.confidence(blocks.hidden, blocks.previous) is not None
    objective = Objective(ce=1.0, tv=0.5, confidence=float(sure), slot_weight="uniform")
    objective(draft, tiny.target(family).tables, blocks).value.backward()
    without = [n for n, p in draft.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert without == []
    assert not draft.tables.embedding.requires_grad
    assert not [k for k in draft.state_dict() if k.startswith("tables.")]


@every
def test_the_mask_is_a_prefix_that_ends_with_the_supervised_text(method, family):
    draft = tiny.draft(method, family)
    batch = tiny.batch(family)
    batch.loss_mask[0, 10:12] = False
    batch = with_anchors(batch, None)
    with torch.no_grad():
        blocks = draft(batch)
    mask = blocks.mask
    assert torch.equal(mask, mask.cumprod(-1).bool())
    assert mask[batch.anchors >= 0][:, 0].all()
    assert not mask[batch.anchors < 0].any()
    for b, n in (batch.anchors >= 0).nonzero().tolist():
        a = int(batch.anchors[b, n])
        reach = [bool(batch.loss_mask[b, a + k]) if a + k < batch.tokens.shape[1] else False for k in range(1, 5)]
        expected = sum(1 for k in range(4) if all(reach[: k + 1]))
        assert int(mask[b, n].sum()) == expected
    labels = take(batch.tokens, batch.anchors.clamp_min(0)[..., None].expand(-1, -1, 1) + 1)
    assert torch.equal(blocks.labels[..., :1][mask[..., :1]], labels[mask[..., :1]])
