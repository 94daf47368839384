"""The layering of docs/design.md, read from the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("specbench", "analysis", "experiments")

# Every file of specbench/ by layer. A file imports from its own layer and from those before it, never in a circle.
LAYERS = (
    "ranges atomic data.jsonl provenance runfolder blocks attention sampling verification costs",
    """backbone kvcache stack directpass tables losses projection rowpass roundcounts slots metrics stepspeed
    data.memory data.codec data.grouped data.codecs""",
    "methods.draft methods.parallel methods.recurrent methods.dflash methods.dspark methods.eagle3 methods.mtp",
    """targets objective chunks oracle
    data.hub data.overlap data.foreign data.turns data.sources data.prompts data.templates data.chat data.servers
    data.engines data.answers data.corpus data.arithmetic data.stdlib data.bytepairs data.rows data.storage data.shards
    tokenclasses""",
    """decoding audit baselines teacherforced scheduling calibration rounds
    data.order data.layout data.manifest data.agreement data.writing data.online data.cache data.sizing data.reading
    data.remote data.steps data.stepdata data.datamodule data.benchmarks data.released_cache data.codec_quality
    data.reading_speed trainspeed""",
    """training memory pretraining callbacks initialisation evaluation speed simulator serving simulationcheck
    configkeys layerconfig draftfiles formats exports interchange publishing modelcard folderlogger tracking syncing""",
)
LAYER = {f"specbench.{name}": layer for layer, names in enumerate(LAYERS) for name in names.split()}
METHODS = {"dflash", "dspark", "eagle3", "mtp"}
BANNED = {"utils", "common", "base", "core", "helpers", "manager", "misc"}
# A library, and the only place that may import it.
DOORS = {"wandb": "specbench/runs/wandb_tracking.py", "hydra": "experiments/", "omegaconf": "experiments/"}


def sources(*packages: str) -> list[Path]:
    return sorted(file for package in packages for file in (REPOSITORY / package).rglob("*.py"))


def module(file: Path) -> str:
    return ".".join(file.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(file) for file in sources(*PACKAGES)}


def imports(file: Path) -> set[str]:
    """Every module that a file imports, also inside functions; `from package import module` counts as the module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: imports are absolute"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (full & MODULES) or {node.module}
    return found


def path(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


def test_every_file_has_a_layer() -> None:
    present = {module(file) for file in sources("specbench") if file.name != "__init__.py"}
    assert present - set(LAYER) == set(), "give these files a layer in LAYERS"
    assert set(LAYER) - present == set(), "these files are in LAYERS and are not there"


@pytest.mark.parametrize("file", sources("specbench"), ids=path)
def test_imports_point_down(file: Path) -> None:
    own = LAYER.get(module(file), -1)  # a package's own file imports nothing of ours
    for name in imports(file):
        assert name.split(".")[0] not in ("experiments", "analysis", "configs"), name
        if name in MODULES and name in LAYER:
            assert LAYER[name] <= own, f"layer {own} imports {name} of layer {LAYER[name]}"


def test_no_circles() -> None:
    graph = {module(file): imports(file) & MODULES - {module(file)} for file in sources("specbench", "analysis")}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_method_imports_another() -> None:
    for method in METHODS:
        used = {name.rpartition(".")[2] for name in imports(REPOSITORY / f"specbench/methods/{method}.py")}
        assert not used & (METHODS - {method}), method


@pytest.mark.parametrize("file", sources(*PACKAGES), ids=path)
def test_each_volatile_library_has_one_door(file: Path) -> None:
    for name in imports(file):
        door = DOORS.get(name.split(".")[0])
        assert door is None or path(file).startswith(door), f"{name} may be imported in {door} only"


@pytest.mark.parametrize("file", sources(*PACKAGES), ids=path)
def test_only_targets_knows_the_models_of_transformers(file: Path) -> None:
    if path(file) == "specbench/models/target.py":
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "transformers" for alias in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            others = [alias.name for alias in node.names if "Token" not in alias.name]
            assert not others, f"tokenizers alone may be imported here, not {others}"


@pytest.mark.parametrize("file", sources("analysis"), ids=path)
def test_analysis_stands_alone(file: Path) -> None:
    used = {
        name.split(".")[0] for name in imports(file) - {"specbench.files.json_lines"}
    }  # the one reader of line files
    assert not used & {"torch", "lightning", "transformers", "specbench", "experiments"}


def test_analysis_runs_without_torch() -> None:
    names = ", ".join(module(file) for file in sources("analysis"))
    code = f"import sys; import {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize("file", sources(*PACKAGES, "tests", "configs"), ids=path)
def test_files_are_named_for_what_they_hold(file: Path) -> None:
    assert file.stem not in BANNED
