"""A sweep of trainings as jobs of their own, by submitit: on Slurm, and in processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from safetensors.torch import load_file

from experiments.quickstart import stage
from specbench.files.atomic import read_json
from tests import slurm_cluster
from tests.pipeline import prepare

PLUGIN = [] if "hydra-submitit-launcher" in {one.name for one in distributions()} else ["hydra-submitit-launcher"]
MISSING = [*slurm_cluster.missing(), *PLUGIN]
METHODS = ("dflash", "mtp")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Path], list[str]]:
    """The drafts of single commands, and the settings with which they were trained."""
    root = tmp_path_factory.mktemp("jobs")
    words = [word for word in prepare(root) if not word.startswith("root=")]
    (cache,) = (root / "cache").iterdir()
    words += ["evaluate=false", f"cache={cache}", "trainer.probe.every=null"]
    return {method: stage("train", [f"root={root}", *words, f"method={method}"]) for method in METHODS}, words


def sweep(*words: str, config: Path | None = None) -> None:
    """Run `specbench train -m` in a process of its own."""
    slurm = {"SLURM_CONF": str(config)} if config else {}
    command = [sys.executable, "-m", "experiments.cli", "train", "-m", *words]
    done = subprocess.run(command, env={**os.environ, **slurm}, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr


def same_weights(here: Path, there: Path) -> None:
    one, other = (load_file(run / "draft" / "model.safetensors") for run in (here, there))
    assert sorted(one) == sorted(other) and all(one[name].equal(other[name]) for name in one)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(
            "submitit_slurm",
            marks=[
                pytest.mark.slurm,
                pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (docs/experiments.md)"),
            ],
        ),
        pytest.param(
            "submitit_local",
            marks=[
                pytest.mark.slurm,
                pytest.mark.skipif(
                    bool(PLUGIN), reason="needs hydra-submitit-launcher (pip install 'specbench[slurm]')"
                ),
            ],
        ),
    ],
)
def test_jobs_of_a_sweep_train_the_drafts_of_single_commands(single, launcher: str, tmp_path: Path) -> None:
    """The same weights bit for bit, and every job ran where it was sent."""
    alone, words = single
    jobs = [*words, f"root={tmp_path / 'jobs'}", f"method={','.join(METHODS)}", f"hydra/launcher={launcher}"]
    if launcher == "submitit_slurm":
        with slurm_cluster.cluster(tmp_path / "cluster") as config:
            sweep(*jobs, config=config)
        ran = (tmp_path / "cluster" / "slurmctld.log").read_text()
        assert ran.count("WEXITSTATUS 0") == len(METHODS), ran
    else:
        sweep(*jobs)
    runs = [path.parent for path in (tmp_path / "jobs" / "runs" / "train").glob("*/summary.json")]
    assert sorted(run.name for run in runs) == sorted(run.name for run in alone.values())
    for run in runs:
        same_weights(run, alone[read_json(run / "summary.json", {})["method"]])
