"""The indexing of anchors and slots by hand, and anchors that depend on nothing but their conversation."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from specbench.blocks import (
    PADDING,
    Batch,
    Sample,
    assemble,
    pack,
    slot_positions,
    unshifted_mask,
    valid_anchors,
    with_anchors,
)


def sample(length: int, ordinal: int = 0, mask: str | None = None) -> Sample:
    """Token t is 100 * ordinal + t, its state too, so that every gathered value says where it came from."""
    tokens = torch.arange(length) + 100 * ordinal
    loss_mask = torch.tensor([c == "x" for c in mask]) if mask else torch.ones(length, dtype=torch.bool)
    last = tokens[:, None].float()
    return Sample(tokens, loss_mask, last[:, None].clone(), last, ordinal)


def at(batch: Batch, *anchors: int) -> Batch:
    return replace(batch, anchors=torch.tensor([anchors]))


def test_the_index_distribution():
    """Anchor a: slot k predicts a+k, is preceded by a+k-1, and judged by the target state at a+k-1."""
    batch = at(pack([sample(12, mask="...xxxxxxxxx")]), 3, 6, PADDING)
    blocks = assemble(batch, torch.zeros(1, 3, 4, 1))
    assert blocks.labels[0, 0].tolist() == [4, 5, 6, 7]
    assert blocks.previous[0, 0].tolist() == [3, 4, 5, 6]
    assert blocks.target[0, 0, :, 0].tolist() == [3, 4, 5, 6]
    assert blocks.labels[0, 1].tolist() == [7, 8, 9, 10]
    assert blocks.mask[0].tolist() == [[True] * 4, [True] * 4, [False] * 4]


@pytest.mark.parametrize(
    ("mask", "anchor", "supervised"),
    [
        ("..xxxxxx", 3, 4),
        ("..xxxxxx", 5, 2),  # the conversation ends
        ("..xxxxxx", 7, 0),
        ("..xxx.xx", 2, 2),  # a gap ends the block, whatever comes after it
        ("..xxx.xx", 4, 0),
    ],
)
def test_supervision_is_a_prefix(mask, anchor, supervised):
    assert slot_positions(at(pack([sample(8, mask=mask)]), anchor), 4)[2][0, 0].tolist() == [
        k < supervised for k in range(4)
    ]


def test_a_block_stays_in_its_conversation():
    batch = pack([sample(5, 1), sample(6, 2)], length=11)
    assert len(batch.tokens) == 1
    mask = slot_positions(at(batch, 3, 4, 9), 3)[2][0]
    assert mask.sum(-1).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("mask", "valid"), [("xxxx", [0, 1, 2]), (".xxx", [1, 2]), ("x.x.", []), ("xx.xx", [0, 3]), ("....", [])]
)
def test_an_anchor_and_the_token_after_it_are_supervised(mask, valid):
    assert valid_anchors(pack([sample(len(mask), mask=mask)]))[0].nonzero().flatten().tolist() == valid


def test_anchors_do_not_reach_over_the_seam_of_two_conversations():
    batch = pack([sample(3, 1), sample(3, 2)], length=8)
    assert valid_anchors(batch)[0].nonzero().flatten().tolist() == [0, 1, 3, 4]
    assert batch.document[0].tolist() == [1, 1, 1, 2, 2, 2]
    assert batch.position[0].tolist() == [0, 1, 2, 0, 1, 2]


def test_released_supervision_of_eagle3_by_hand():
    """Slot k of anchor a looks at token a+k-2, as long as the state at a+k-1 exists."""
    batch = at(pack([sample(7, mask="..x.xxx")]), 1, 3, 5, 6)
    # Tokens looked at: 0 1 2 3, then 2 3 4 5, then 4 5, then 5; token 6 has no state behind it.
    supervised = [[False, False, True, False], [True, False, True, True], [True, True, False, False]]
    assert unshifted_mask(batch, 4)[0].tolist() == [*supervised, [True, False, False, False]]
    everywhere = with_anchors(replace(batch, anchors=None), None, supervision="unshifted")
    assert everywhere.anchors.tolist() == [[1, 2, 3, 4, 5, 6]]


def chosen(batch: Batch) -> dict[int, list[int]]:
    """Anchors of every conversation, as positions inside it."""
    found: dict[int, list[int]] = {}
    for b, n in (batch.anchors != PADDING).nonzero().tolist():
        a = batch.anchors[b, n]
        found.setdefault(int(batch.document[b, a]), []).append(int(batch.position[b, a]))
    return found


def test_anchors_depend_on_the_conversation_and_the_seed_alone():
    samples = [sample(20, 3), sample(9, 7), sample(14, 1), sample(30, 12)]
    alone = {s.ordinal: chosen(with_anchors(pack([s]), 5, (1, 2)))[s.ordinal] for s in samples}
    for batch in (pack(samples), pack(samples[::-1]), pack(samples, 40), pack(samples, 80), pack(samples[1:3])):
        found = chosen(with_anchors(batch, 5, (1, 2)))
        assert found == {ordinal: alone[ordinal] for ordinal in found}
    assert all(len(a) == 5 and a == sorted(set(a)) for a in alone.values())
    other = chosen(with_anchors(pack(samples), 5, (1, 3)))
    assert other != {s.ordinal: alone[s.ordinal] for s in samples}


def test_fewer_candidates_than_anchors_are_all_taken():
    batch = with_anchors(pack([sample(4, 1), sample(9, 2)]), 5)
    assert chosen(batch)[1] == [0, 1, 2] and len(chosen(batch)[2]) == 5
    assert batch.anchors.shape == (2, 5)
    none = with_anchors(pack([sample(3, mask="...")]), 5)
    assert none.anchors.tolist() == [[PADDING]]


def test_every_candidate_is_as_likely():
    """300 draws of 3 of 10: each is expected 90 times with a deviation of 8; five deviations are allowed."""
    batch = pack([sample(11)])
    counts = Counter(a for seed in range(300) for a in with_anchors(batch, 3, (seed,)).anchors[0].tolist())
    assert set(counts) == set(range(10)) and sum(counts.values()) == 900
    assert all(abs(count - 90) < 40 for count in counts.values())


def test_packing_keeps_everything_and_wastes_nothing_it_could_use():
    samples = [sample(n, i) for i, n in enumerate((6, 5, 4, 3, 2))]
    batch = pack(samples, length=10)
    assert batch.document.tolist() == [[0] * 6 + [2] * 4, [1] * 5 + [3] * 3 + [4] * 2]
    assert batch.tokens[0].tolist() == [*range(6), *range(200, 204)]
    torch.testing.assert_close(batch.last[..., 0], batch.tokens.float())
    padded = pack(samples)
    assert padded.tokens.shape == (5, 6) and (padded.document == PADDING).sum() == 10
    assert not padded.loss_mask[padded.document == PADDING].any()


def test_a_conversation_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="sample 9 holds 12 tokens"):
        pack([sample(3, 1), sample(12, 9)], length=10)
