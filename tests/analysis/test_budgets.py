"""What a table says about budgets: what was equal, that they are not matched, and whether trainings had converged."""

import pandas as pd
import pytest

from analysis.compare import compare
from tests.analysis.synthetic import simulate, write_run


def written(root, spent, protocol=None, converged=(True, True)):
    """Two methods with two trainings each, which spent `spent` operations."""
    for method, flops in spent.items():
        for seed, ended in enumerate(converged):
            name = f"train-{method}-{seed}"
            config = {"protocol": protocol, "seed": {"init": seed}}
            certificate = {
                "gain_per_doubling": 0.1 * (seed + 1),
                "gain_low": -0.2,
                "gain_high": 0.5,
                "converged": ended,
            }
            facts = {"training_flops": flops, "training_seconds": 3600.0 * (1 + seed), "convergence": certificate}
            write_run(root, name, [], "train", config=config, **facts)
            write_run(root, f"{method}-{seed}", simulate(method, 12, seed), lineage={"parents": [name]})
    return compare(root, root / "out", draw=False, resamples=100)


def test_rows_that_spent_unlike_operations_say_so(tmp_path):
    made = written(tmp_path, {"dspark": 1e12, "mtp": 7e12}, converged=(True, False))
    assert "Budgets are not matched: training took from 1e+12 (dspark) to 7e+12 FLOP (mtp)" in " ".join(
        made.text.split()
    )
    assert made.text.count("not converged") == 2  # one training of each method had not
    costs = pd.read_csv(tmp_path / "out" / "costs.csv")
    assert costs["training_seconds"].tolist() == [5400.0] * 2 and costs["converged"].tolist() == [0.0] * 2
    assert costs["gain_per_doubling"].tolist() == pytest.approx([0.15] * 2)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("+0.15 [-0.20, +0.50]") == 2 and "1.500" in page


def test_a_protocol_that_makes_budgets_equal_is_named(tmp_path):
    protocol = {"name": "matched_flops", "quantity": "flops", "amount": 2e12}
    made = written(tmp_path, {"dspark": 1.9e12, "mtp": 2e12}, protocol)
    said = " ".join(made.text.split())
    assert "Equal for every row: matched_flops, 2e+12 flops." in said and "not matched" not in said
    assert "not converged" not in made.text and "converged" in made.text
