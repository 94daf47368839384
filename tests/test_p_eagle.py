"""P-EAGLE: which depths training computes, and that leaving some out changes nothing else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from specbench.blocks import generator, with_anchors
from specbench.drafts.p_eagle import nested_depths
from specbench.losses.objective import Objective
from tests import tiny


@pytest.mark.parametrize(("ratio", "least"), [(0.7, 0.2), (0.8, 0.0), (0.5, 0.3), (1.0, 0.0)])
def test_the_depths_are_nested_subsets_of_the_sizes_of_the_formula(ratio: float, least: float) -> None:
    """Where no text ends, depth d holds floor((n - d) max(r^d, r_min)) of n rollouts; a depth that holds all of its
    pool loses those whose text ends."""
    n, slots = 60, 6
    long = nested_depths(np.full(n, slots), slots, ratio, least, generator((3,), 1))
    sizes = [n]
    for d in range(1, slots):
        sizes.append(min(sizes[-1], int((n - d) * max(ratio**d, least))))
    assert [int((long > d).sum()) for d in range(slots)] == sizes
    reach = np.minimum(np.arange(n, 0, -1), slots)
    ends = nested_depths(reach, slots, 1.0, 0.0, generator((3,), 1))
    # The last rollouts have fewer supervised slots: n - d of them reach depth d, and n - d are wanted.
    assert np.array_equal(ends, reach)
    assert (nested_depths(reach, slots, ratio, least, generator((3,), 1)) <= reach).all()


def test_every_rollout_is_as_likely_as_another_at_every_depth() -> None:
    """3,000 draws of 10 rollouts: a share of r^d within five standard deviations, for 30 counts (false alarm 2e-5)."""
    draws, n = 3000, 10
    found = np.stack([nested_depths(np.full(n, 4), 4, 0.7, 0.0, generator((seed,), 0)) for seed in range(draws)])
    for d in range(1, 4):
        share = int((n - d) * 0.7**d) / n
        counts = (found > d).sum(0)
        assert (abs(counts - draws * share) < 5 * (draws * share * (1 - share)) ** 0.5).all()


@pytest.mark.parametrize("window", [None, 3])
def test_depths_that_are_left_out_change_no_other_and_are_not_supervised(window: int | None) -> None:
    draft = tiny.draft("p_eagle", "qwen3", block_size=6, layers=3, window=window)
    batch = with_anchors(tiny.batch("qwen3"), None, (5,))
    with torch.no_grad():
        whole, kept = draft(batch), draft.train()(batch)
    computed = kept.hidden.abs().sum(-1) > 0
    depths = computed.sum(-1)
    assert torch.equal(computed, torch.arange(6) < depths[..., None])
    assert torch.equal(kept.mask, whole.mask & computed)
    assert 0.2 < kept.mask.sum() / whole.mask.sum() < 0.8 and kept.mask[:, :, 0].equal(whole.mask[:, :, 0])
    torch.testing.assert_close(kept.hidden[computed], whole.hidden[computed], atol=1e-5, rtol=1e-5)
    # The formula of the sizes, conversation by conversation.
    for row in range(3):
        reach = whole.mask[row].sum(-1)
        n = int((reach > 0).sum())
        for d in range(1, 6):
            wanted = int(max(0, n - d) * max(0.7**d, 0.2))
            pool = int(((depths[row] >= d) & (reach > d)).sum())
            assert int((depths[row] > d).sum()) == min(wanted, pool)


def test_the_choice_depends_on_the_seed_and_the_conversation_alone() -> None:
    draft = tiny.draft("p_eagle", "qwen3").train()
    conversations = tiny.samples("qwen3", lengths=(24, 17, 9, 12))

    def chosen(length: int | None, seed: int) -> dict[tuple[int, int], int]:
        batch = with_anchors(tiny.pack(conversations, length=length), None, (seed,))
        depths = draft.depths(batch)
        found = {}
        for b, n in (batch.anchors >= 0).nonzero().tolist():
            anchor = batch.anchors[b, n]
            found[int(batch.document[b, anchor]), int(batch.position[b, anchor])] = int(depths[b, n])
        return found

    assert chosen(None, 1) == chosen(40, 1) == chosen(None, 1)
    assert chosen(None, 1) != chosen(None, 2)


def test_one_normaliser_serves_all_depths() -> None:
    """The loss is the mean of KL(q || p) over all kept slots: a depth with fewer of them weighs less."""
    draft, owner = tiny.draft("p_eagle", "qwen3").train(), tiny.target("qwen3")
    with torch.no_grad():
        blocks = draft(with_anchors(tiny.batch("qwen3"), None))
        loss = Objective(kl=1.0, slot_weight="uniform")(draft, owner.tables, blocks)
        total, count = 0.0, 0
        for b, n, k in blocks.mask.nonzero().tolist():
            log_p = torch.log_softmax(owner.tables.head @ blocks.hidden[b, n, k], 0)
            log_q = torch.log_softmax(owner.tables.head @ blocks.target[b, n, k], 0)
            total, count = total + float((log_q.exp() * (log_q - log_p)).sum()), count + 1
    assert int(loss.weight) == count == int(blocks.mask.sum())
    assert float(loss.value / loss.weight) == pytest.approx(total / count, rel=1e-5)


def test_a_round_asks_for_as_many_slots_as_are_wanted() -> None:
    """Fewer slots are the first ones of the whole pass."""
    from tests.test_contract import Forced, context

    draft, sample = tiny.draft("p_eagle", "qwen3"), tiny.samples("qwen3")[0]
    seen = {}
    with torch.no_grad():
        for slots in (None, 2):
            forced = Forced(sample.tokens[None, 11:20])
            draft.propose(draft.begin(*context(sample, 0, 10)), sample.tokens[10:11], forced, slots)
            seen[slots] = torch.cat(forced.seen, 1)
    assert seen[2].shape[1] == 2
    torch.testing.assert_close(seen[2], seen[None][:, :2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"down_sample_ratio": 0.0}, {"down_sample_ratio_min": 1.5}])
def test_a_ratio_that_is_no_share_is_refused(settings: dict) -> None:
    draft = tiny.draft("p_eagle", "qwen3")
    known = {"target_layer_ids": tiny.TAPS, "mask_token_id": tiny.MASK, "layers": 1}
    with pytest.raises(ValueError, match=next(iter(settings))):
        type(draft)(dataclasses.replace(draft.backbone), draft.tables, **known, **settings)
