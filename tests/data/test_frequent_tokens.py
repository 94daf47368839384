"""The tokens of a reduced draft vocabulary, against a plain count."""

from __future__ import annotations

from collections import Counter

import pytest

from specbench.data.cache.build import build
from specbench.data.cache.storage import storage
from specbench.data.loading.frequent_tokens import frequent_tokens
from specbench.data.loading.target_cache import TargetCache
from tests.data.tiny_target import TinyTarget, talks


def test_supervised_tokens_come_first_and_tokens_of_questions_before_those_that_occur_nowhere(tmp_path) -> None:
    build(TinyTarget(), talks(4), tmp_path, storage("fp32"), 24, batch_tokens=48)
    data = TargetCache(tmp_path)
    data.setup()
    answers, everywhere = Counter(), Counter()
    for sample in data.samples(data.rows[0]):
        everywhere.update(sample.tokens.tolist())
        answers.update(sample.tokens[sample.loss_mask].tolist())
    whole, stop = len(data.tables.embedding), 0
    ranked = sorted(range(whole), key=lambda token: (token != stop, -answers[token], -everywhere[token], token))
    for size in (2, len(answers) - 1, len(answers) + 1, len(everywhere) + 1, whole):
        ids, covered = frequent_tokens(data, size, always=[stop])
        assert ids.tolist() == sorted(ranked[:size])
        assert covered == sum(answers[token] for token in ranked[:size]) / answers.total()
    assert len(answers) < len(everywhere)
    with pytest.raises(ValueError, match=r"method.vocabulary=1: choose more than 1 and at most"):
        frequent_tokens(data, 1, always=[stop])
