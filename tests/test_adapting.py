"""A draft is trained further on other data, with replay of the old, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.quickstart import stage
from specbench.runs.run_folder import read_summary
from tests.pipeline import prepare


@pytest.mark.long
def test_a_draft_is_adapted_with_replay(tmp_path: Path) -> None:
    old = prepare(tmp_path)
    first = stage("train", [*old, "method=mtp", "evaluate=false"])
    cache = next((tmp_path / "cache").iterdir())
    words = [f"start={first}", f"cache={cache}", f"replay={cache}", "replay_share=0.5", "name=adapted"]
    adapted = stage("train", [*old, "method=mtp", "evaluate=false", *words])
    summary = read_summary(adapted)
    assert summary["status"] == "finished" and summary["lineage"]["start"] == str(first)
    replayed = summary["lineage"]["cache"]
    assert replayed["replay"] == json.loads((cache / "manifest.json").read_text())["fingerprint"]
    assert replayed["replay_share"] == 0.5
    with pytest.raises(ValueError, match=r"replay=.* by index"):
        stage("train", [*old, "method=mtp", f"replay={cache}", "stream=true", "name=no"])
