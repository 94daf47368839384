"""Answers that keep the target's states: the cache made from them is the one that runs the target again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from specbench.data.answers import generation
from specbench.data.answers.kept_states import KeptStates
from specbench.data.cache.cache_source import CacheSource
from specbench.data.cache.storage import storage
from specbench.data.loading.target_cache import TargetCache
from specbench.library.answers import answer
from specbench.models.target import Target

TALKS = [f"What is {n} + {n + 4}?" for n in (11, 345, 67)]
TALKS += [[f"What is {n} + 9?", "Now double it.", "Thank you."] for n in (21, 32)]


@pytest.fixture(scope="module")
def target():
    return Target.load("specbench/data/embedded", [0, 2, 4])


@pytest.fixture(scope="module")
def folder(target, tmp_path_factory):
    """Answers with states: some end at a stop token, some at the limit; not all join the batch at once."""
    made = tmp_path_factory.mktemp("answers")
    answer(target, TALKS, made, temperature=0.8, max_new_tokens=40, batch_size=2, keep_states=True)
    cut = [row["truncated"][-1] for row in generation.read(made)]
    assert any(cut) and not all(cut)
    return made


def cache(target, folder, place, codec="fp32", kept=True, max_length=200):
    source = CacheSource.read(target, folder, storage(codec), max_length, kept_states=kept)
    source.build(place)
    return source, TargetCache(place, samples_per_micro=1)


def states(data):
    batches = [data.batch(np.array([row])) for row in range(len(data.ids))]
    return [(batch.tokens[0], batch.taps[0].float(), batch.last[0].float()) for batch in batches]


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize(("codec", "most"), [("fp32", 1e-5), ("bf16", 1e-3), ("int8", 3e-3)])
def test_one_pass_gives_the_cache_of_two(target, folder, tmp_path, codec, most, monkeypatch):
    """The same tokens and, within rounding, the same states of every token; codecs round nearly equal values apart."""
    again, two = cache(target, folder, tmp_path / "two", codec, kept=False)
    assert again.counts["states_kept"] == 0 and again.counts["states_computed"] == len(TALKS)
    monkeypatch.setattr(Target, "states", lambda *_: pytest.fail("the target ran over the conversations again"))
    source, one = cache(target, folder, tmp_path / "one", codec)
    assert source.counts["states_kept"] == len(TALKS) and source.counts["states_computed"] == 0
    assert source.fingerprint == again.fingerprint
    for (tokens, taps, last), (expected, true_taps, true_last) in zip(states(one), states(two), strict=True):
        assert torch.equal(tokens, expected)
        assert relative(taps, true_taps) < most and relative(last, true_last) < most


def test_a_conversation_that_is_cut_keeps_the_states_of_what_is_left(target, folder, tmp_path):
    lengths = [len(one.tokens) for one in CacheSource.read(target, folder, storage("fp32"), 200).conversations]
    source, one = cache(target, folder, tmp_path / "one", max_length=min(lengths) + 3)
    assert source.counts["truncated"] and source.counts["states_computed"] == 0
    _, two = cache(target, folder, tmp_path / "two", kept=False, max_length=min(lengths) + 3)
    for (_, taps, _), (_, expected, _) in zip(states(one), states(two), strict=True):
        assert relative(taps, expected) < 1e-5


def test_what_was_not_kept_is_computed_and_counted(target, folder, tmp_path):
    """A file that is gone, one that is cut, and one of other tokens: as if the states had not been kept."""
    answers = tmp_path / "answers"
    answer(target, TALKS[:4], answers, temperature=0.8, max_new_tokens=40, batch_size=2, keep_states=True)
    gone, cut, other = sorted(path for path in answers.glob("states/*/*"))[:3]
    gone.unlink()
    cut.write_bytes(cut.read_bytes()[:-100])
    kept = KeptStates(answers, target)
    (id,) = [row["id"] for row in generation.read(answers) if kept._file(row["id"]) == other]
    kept.keep(id, [1, 2, 3], (torch.zeros(3, 3, 128), torch.zeros(3, 128)))
    source, one = cache(target, answers, tmp_path / "one")
    assert (source.counts["states_kept"], source.counts["states_computed"]) == (1, 3)
    _, two = cache(target, answers, tmp_path / "two", kept=False)
    for (_, taps, last), (_, true_taps, true_last) in zip(states(one), states(two), strict=True):
        assert relative(taps, true_taps) < 1e-5 and relative(last, true_last) < 1e-5


def test_states_of_other_taps_are_refused(folder):
    other = Target.load("specbench/data/embedded", [0, 1, 2])
    with pytest.raises(ValueError, match=r"other taps .*kept_states=false"):
        CacheSource.read(other, folder, storage("fp32"), 200)
    assert CacheSource.read(other, folder, storage("fp32"), 200, kept_states=False).kept is None
