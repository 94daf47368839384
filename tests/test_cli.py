"""The command line as a user meets it: real processes on a small configuration package of the tests' own."""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cli import main
from specbench.cli.verbs import VERBS, Verb

REPOSITORY = Path(__file__).resolve().parents[1]

FILES = {
    "toyconfigs/__init__.py": "",
    "toyconfigs/toy.yaml": """\
# The smallest verb.
defaults:
  - method: fast
  - _self_

root: outputs # where it is written
name: toy
# how often
# it is tried
steps: 4
rate: 0.5
stop: [1, 2]
draft: null
act: write # write, sleep, mistake, defect, full
limit: ${steps}
chosen: ${hydra:runtime.choices.method}
force: false
""",
    "toyconfigs/must.yaml": "draft: ??? # the folder of a draft\nroot: outputs\n",
    "toyconfigs/method/fast.yaml": "block_size: 7 # slots a block\ncolour: '#fff' # with a hash\n",
    "toyconfigs/method/slow.yaml": "block_size: 3\ncolour: red\n",
    "toyconfigs/experiment/grid.yaml": (
        "# @package _global_\nsteps: 9\nhydra:\n  sweeper:\n    params:\n      method: fast,slow\n      rate: 0.1,0.2\n"
    ),
    "toyverb.py": """\
import errno, json, pathlib, sys, time

def run(cfg):
    if cfg.act == "sleep":
        print("asleep", flush=True)
        time.sleep(60)
    if cfg.act == "mistake":
        raise ValueError("the draft was\\ntrained for another target: choose target=tiny")
    if cfg.act == "defect":
        raise KeyError("hidden")
    if cfg.act == "full":
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/data/shard")
        except OSError as error:
            raise RuntimeError("writer broke") from error
    if cfg.act == "stopped":  # as a Trainer ends on Ctrl-C
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)
    if cfg.act == "absent":
        open(cfg.draft)
    folder = pathlib.Path(cfg.root) / f"{cfg.chosen}-{cfg.rate}"
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"steps": cfg.steps, "limit": cfg.limit, "method": dict(cfg.method), "argv": sys.argv[1:]}
    (folder / "facts.json").write_text(json.dumps(facts))
""",
    "toy.py": """\
import sys
from experiments.cli import main
from specbench.cli.verbs import Verb

VERBS = {
    "toy": Verb("toy", "does little", "toyverb", experiments=True),
    "must": Verb("must", "needs a draft", "toyverb"),
}
if __name__ == "__main__":
    sys.exit(main(verbs=VERBS, package="toyconfigs"))
""",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def environment(home: Path | None = None) -> dict[str, str]:
    dropped = ("SPECBENCH_DEBUG", "HYDRA_FULL_ERROR")
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "PYTHONPATH": os.pathsep.join(str(path) for path in (REPOSITORY, home) if path), "COLUMNS": "110"}


def toy(home: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(home / "toy.py"), *words]
    return subprocess.run(
        command, cwd=home, env={**environment(home), **variables}, capture_output=True, text=True, timeout=300
    )


def facts(folder: Path) -> dict[str, object]:
    return json.loads((folder / "facts.json").read_text())


def test_a_run_gets_its_configuration(home: Path, tmp_path: Path) -> None:
    done = toy(home, "toy", "method=slow", "steps=6", "method.block_size=5", f"root={tmp_path}", "draft=x")
    assert (done.returncode, done.stderr) == (0, "")
    found = facts(tmp_path / "slow-0.5")
    assert found["steps"] == found["limit"] == 6
    assert found["method"] == {"block_size": 5, "colour": "red"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["too"], "there is no verb 'too'; did you mean 'toy'?"),
        (["toy", "method=fats"], "method has no option 'fats'; did you mean 'fast'? (there are fast, slow)"),
        (["toy", "block_sise=3"], "toy has no setting 'block_sise'; did you mean 'method.block_size'?"),
        (["toy", "methd=fast"], "toy has no setting 'methd'; did you mean 'method'?"),
        (["toy", "+stpes=3"], "toy has no setting 'stpes'; did you mean 'steps'?"),
        (["toy", "experiment=grid"], "toy has no experiment to replace: it takes method, and +experiment=... adds one"),
        (["toy", "steps=many"], "steps takes a whole number, not 'many'"),
        (["toy", "steps=1.5"], "steps takes a whole number, not 1.5"),
        (["toy", "limit=many"], "limit takes a whole number, not 'many'"),
        (["toy", "rate=true"], "rate takes a number, not True"),
        (["toy", "force=7"], "force takes true or false, not 7"),
        (["toy", "stop=257"], "stop takes a list in brackets, as in [1,2], not 257"),
        (["toy", "method.block_size=x"], "method.block_size takes a whole number, not 'x'"),
        (["toy", "-m", "method=fast,slwo"], "method has no option 'slwo'; did you mean 'slow'?"),
        (["toy", "-m", "steps=1,x"], "steps takes a whole number, not 'x'"),
        (["toy", "steps=1,2"], "add -m to run one job per value"),
        (["toy", "+experiment=grid"], "this is a sweep over method, rate: add -m, as in `specbench toy -m ...`"),
        (["toy", "+experiment=grid", "rate=1"], "this is a sweep over method: add -m"),
        (["toy", "-m", "hydra/launcher=basci"], "hydra/launcher has no option 'basci'; did you mean 'basic'?"),
        (["toy", "act=stopped"], "stopped; what was finished is kept"),
        (["toy", "--mutlirun"], "toy has no option '--mutlirun'; did you mean '--multirun'?"),
        (["toy", "steps"], "steps"),
        (["must"], "must needs draft=... (the folder of a draft)"),
        (["toy", "act=mistake"], "the draft was trained for another target: choose target=tiny"),
        (["toy", "act=full"], "no space left on the disk for /data/shard"),
        (["toy", "act=absent", "draft=/no/where"], "there is no file or folder /no/where"),
        (["toy", "limit=${nowhere}"], "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    home: Path, words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setattr(sys, "argv", ["specbench", *words])
    verbs = {
        "toy": Verb("toy", "does little", "toyverb", experiments=True),
        "must": Verb("must", "needs a draft", "toyverb"),
    }
    assert main(words, verbs, "toyconfigs") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("specbench: ") and errors.count("\n") == 1, errors
    assert said in errors


def test_a_process_ends_with_code_2_and_without_a_traceback(home: Path) -> None:
    done = toy(home, "toy", "method=fats")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "specbench: method has no option 'fats'; did you mean 'fast'? (there are fast, slow)\n"


def test_a_defect_keeps_its_traceback_and_debug_shows_any(home: Path) -> None:
    defect = toy(home, "toy", "act=defect")
    assert defect.returncode == 1 and "KeyError: 'hidden'" in defect.stderr
    mistake = toy(home, "toy", "act=mistake", SPECBENCH_DEBUG="1")
    assert mistake.returncode == 2 and "Traceback" in mistake.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_being_stopped_says_so(home: Path, number: signal.Signals) -> None:
    command = [sys.executable, str(home / "toy.py"), "toy", "act=sleep"]
    with subprocess.Popen(
        command, cwd=home, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "asleep\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors == "specbench: stopped; what was finished is kept, and the same command continues from there\n"


def test_a_sweep_runs_every_combination(home: Path, tmp_path: Path) -> None:
    done = toy(home, "toy", "-m", "+experiment=grid", f"root={tmp_path}")
    assert done.returncode == 0, done.stderr
    names = sorted(path.parent.name for path in tmp_path.glob("*/facts.json"))
    assert names == ["fast-0.1", "fast-0.2", "slow-0.1", "slow-0.2"]
    found = facts(tmp_path / "slow-0.2")
    assert found["steps"] == 9
    # Each job knows itself as a command of its own.
    assert found["argv"][0] == "toy" and "method=slow" in found["argv"] and "-m" not in found["argv"]
    again = toy(home, *found["argv"], f"root={tmp_path / 'again'}")
    assert again.returncode == 0, again.stderr
    assert facts(tmp_path / "again" / "slow-0.2")["steps"] == 9


def test_jobs_travel_through_a_launcher_of_their_own_processes(home: Path, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    done = toy(home, "toy", "-m", "method=fast,slow", "hydra/launcher=submitit_local", f"root={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert sorted(path.parent.name for path in tmp_path.glob("*/facts.json")) == ["fast-0.5", "slow-0.5"]


def test_a_failing_job_of_a_sweep_is_a_sentence_too(home: Path, tmp_path: Path) -> None:
    done = toy(home, "toy", "-m", "act=write,mistake", f"root={tmp_path}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "specbench: the draft was trained for another target: choose target=tiny\n" in done.stderr
    (which,) = [line for line in done.stderr.splitlines() if line.startswith("toy ")]
    assert "act=mistake" in which and which.endswith(": the draft was trained for another target: choose target=tiny")
    assert (tmp_path / "fast-0.5" / "facts.json").exists()


def test_help_shows_groups_keys_defaults_and_comments(home: Path) -> None:
    page = toy(home, "toy", "--help").stdout
    squeezed = " ".join(page.split())
    for text in (
        "method=fast one of fast, slow",
        "+experiment=... one of grid",
        "method.block_size=7 slots a block",
        "method.colour=#fff with a hash",
        "steps=4 how often it is tried",
        "root=outputs where it is written",
        "does little The smallest verb.",
        "draft=null",
        "stop=[1,2]",
    ):
        assert text in squeezed, page
    assert "method.block_size=3" in toy(home, "toy", "method=slow", "--help").stdout
    must = " ".join(toy(home, "must", "--help").stdout.split())
    assert "draft=(must be given) the folder of a draft" in must and "+experiment" not in must


def test_cfg_prints_what_would_run(home: Path) -> None:
    shown = toy(home, "toy", "steps=5", "--cfg", "job").stdout
    assert "limit: 5" in shown and "chosen: fast" in shown and "hydra" not in shown


def test_the_overview_is_fast_and_complete() -> None:
    command = [sys.executable, "-m", "experiments.cli", "--help"]
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300)
        times.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before)  # whatever else the machine does
    assert done.returncode == 0 and min(times) < 1
    assert [line.split()[0] for line in done.stdout.splitlines()[2 : 2 + len(VERBS)]] == list(VERBS)


def test_no_heavy_library_is_imported_for_help_or_a_mistake(home: Path) -> None:
    code = (
        "import sys; sys.argv = ['specbench', 'toy', 'steps=x']; import toy; from experiments.cli import main;"
        "main(verbs=toy.VERBS, package='toyconfigs'); print([m for m in ('torch', 'wandb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=home, env=environment(home), capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_is_there_and_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.util.find_spec(VERBS[name].module) is not None
    assert main([name, "--help"]) == 0
    page = capsys.readouterr().out
    settings = [line for line in page.partition("Settings\n")[2].splitlines() if "=" in line]
    assert settings, page
    assert main([name, "--cfg", "job"]) == 0
