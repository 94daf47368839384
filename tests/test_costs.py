"""The cost profile: interpolation, files, refusals."""

from pathlib import Path

import numpy as np
import pytest

from specbench.decoding.cost_profile import CostProfile


class TestCostProfile:
    def test_linear_interpolates_seconds_and_padded_charges_the_next_size(self):
        linear = CostProfile([1, 3, 5], [10.0, 5.0, 4.0], "x", "illustrative")
        np.testing.assert_allclose(linear.seconds(1, 4), [0.1, 0.15, 0.2, 0.225, 0.25])
        padded = CostProfile([1, 3, 5], [10.0, 5.0, 4.0], "x", "illustrative", interpolation="padded")
        np.testing.assert_allclose(padded.seconds(1, 4), [0.1, 0.2, 0.2, 0.25, 0.25])
        np.testing.assert_allclose(padded.rates(3), [5.0])

    def test_draft_time_is_added_by_requests(self):
        profile = CostProfile([1, 8], [10.0, 10.0], "x", "illustrative").with_draft([1, 3], [0.02, 0.04])
        np.testing.assert_allclose(profile.seconds(2, 3), [0.13] * 4)
        with pytest.raises(ValueError, match=r"1 to 3 requests.*asked for 4"):
            profile.seconds(4)

    def test_files_come_back_the_same(self, tmp_path: Path):
        profile = CostProfile([1, 3], [10.0, 5.5], "one machine", "measured", "padded", (1, 2), (0.1, 0.2))
        profile.save(tmp_path / "p.json")
        assert CostProfile.load(tmp_path / "p.json") == profile
        (tmp_path / "rates.csv").write_text("tokens,steps_per_second\n4,2.0\n1,9.0\n1,11.0\n1,10.0\n")
        (tmp_path / "seconds.csv").write_text("tokens,seconds\n1,0.1\n4,0.5\n")
        for name in ("rates", "seconds"):
            read = CostProfile.from_csv(tmp_path / f"{name}.csv", "m")
            assert CostProfile.load(tmp_path / f"{name}.csv").tokens == read.tokens
            assert (read.tokens, read.steps_per_second, read.source) == ((1, 4), (10.0, 2.0), "measured")

    def test_monotone_never_lowers_a_cost(self):
        profile = CostProfile([1, 2, 3, 4], [10.0, 8.0, 9.0, 7.0], "x", "measured").monotone()
        assert profile.steps_per_second == (10.0, 8.0, 8.0, 7.0) and "monotone" in profile.label

    @pytest.mark.parametrize(
        ("tokens", "rates", "source", "message"),
        [
            ([1, 1], [2.0, 1.0], "measured", "ascending"),
            ([1, 2], [2.0], "measured", "give pairs"),
            ([1, 2], [2.0, 0.0], "measured", "positive and finite"),
            ([1, 2], [2.0, 1.0], "guessed", "source='guessed'"),
        ],
    )
    def test_tables_that_make_no_sense_are_refused(self, tokens, rates, source, message):
        with pytest.raises(ValueError, match=message):
            CostProfile(tokens, rates, "x", source)
