"""The layering of docs/design.md, read from the imports themselves."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("specbench", "analysis", "experiments")

# The folders of specbench/ in the order of docs/design.md: a folder imports from itself and from those before it.
FOLDERS = [
    "files",
    "runs",
    "metrics",
    "models",
    "drafts",
    "checkpoints",
    "losses",
    "decoding",
    "data",
    "training",
    "evaluation",
    "profiling",
    "serving",
    "library",
    "cli",
]
# What every method may import.
CONTRACT = {
    *("draft", "on_policy", "expansion", "parallel", "recurrent", "fused_taps", "heads", "baselines"),
    *("initialisation", "work"),
}
BANNED = {"utils", "common", "base", "core", "helpers", "manager", "misc"}
# What analysis shares beside specbench/files: modules without torch, as test_analysis_runs_without_torch sees to.
SHARED = (
    "specbench.metrics.functional",
    "specbench.runs.result_schema",
    "specbench.runs.run_schema",
    "specbench.runs.settings_without_effect",
    "specbench.runs.wandb_account",
)
# A library, and the only place that may import it.
DOORS = {
    "wandb": ("specbench/runs/wandb_",),
    "hydra": ("experiments/", "specbench/cli/"),
    "omegaconf": ("experiments/", "specbench/cli/"),
}


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


def folder(name: str) -> int:
    """Place of a module's folder in FOLDERS; -1 for the modules that lie beside the folders and need none of them."""
    parts = name.split(".")
    return FOLDERS.index(parts[1]) if len(parts) > 1 and parts[1] in FOLDERS else -1


def test_every_folder_has_a_place() -> None:
    present = {file.relative_to(REPOSITORY / "specbench").parts[0] for file in (REPOSITORY / "specbench").rglob("*.py")}
    assert {name for name in present if not name.endswith(".py")} == set(FOLDERS)


@pytest.mark.parametrize("file", sources("specbench"), ids=path)
def test_imports_point_down(file: Path) -> None:
    own = folder(module(file))
    for name in imports(file):
        top = name.split(".")[0]
        # The library hands out tables with intervals, which analysis makes; nothing below it may ask for them.
        assert top not in ("experiments", "configs"), name
        assert top != "analysis" or path(file).startswith("specbench/library/"), name
        if name in MODULES and name.startswith("specbench."):
            assert folder(name) <= own, f"{module(file)} imports {name}, which comes after it"


def test_no_circles() -> None:
    graph = {module(file): imports(file) & MODULES - {module(file)} for file in sources("specbench", "analysis")}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_method_imports_another() -> None:
    methods = {file.stem for file in (REPOSITORY / "specbench/drafts").glob("*.py")} - CONTRACT - {"__init__"}
    for method in methods:
        used = {name.rpartition(".")[2] for name in imports(REPOSITORY / f"specbench/drafts/{method}.py")}
        assert not used & (methods - {method}), method


@pytest.mark.parametrize("file", sources(*PACKAGES), ids=path)
def test_each_volatile_library_has_one_door(file: Path) -> None:
    for name in imports(file):
        door = DOORS.get(name.split(".")[0])
        assert door is None or path(file).startswith(door), f"{name} may be imported in {door} only"


@pytest.mark.parametrize("file", sources(*PACKAGES), ids=path)
def test_only_targets_knows_the_models_of_transformers(file: Path) -> None:
    if path(file) in [
        f"specbench/models/{name}.py" for name in ("target", "target_files", "library_pass", "gguf_conversion")
    ]:
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "transformers" for alias in node.names)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            others = [alias.name for alias in node.names if "Token" not in alias.name]
            assert not others, f"tokenizers alone may be imported here, not {others}"


@pytest.mark.parametrize("file", sources("analysis"), ids=path)
def test_analysis_stands_alone(file: Path) -> None:
    """It reads files and computes metrics as the rest of the project does, and needs nothing else of it."""
    shared = ("specbench.files", *SHARED)
    used = {name.split(".")[0] for name in imports(file) if not name.startswith(shared)}
    assert not used & {
        "torch",
        "lightning",
        "transformers",
        "specbench",
        "experiments",
    }


def test_analysis_runs_without_torch() -> None:
    names = ", ".join(module(file) for file in sources("analysis"))
    code = f"import sys; import {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize("file", sources(*PACKAGES, "tests", "configs"), ids=path)
def test_files_are_named_for_what_they_hold(file: Path) -> None:
    assert file.stem not in BANNED


def classes(file: Path) -> Iterator[str]:
    """Names of the public classes and type aliases that a file defines."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        name = node.name if isinstance(node, ast.ClassDef) else ""
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        if name[:1].isupper() and not name.isupper():
            yield name


def test_one_name_is_one_class() -> None:
    """A reader who meets a class by its name knows which one it is."""
    where: dict[str, list[str]] = {}
    for file in sources(*PACKAGES):
        for name in classes(file):
            where.setdefault(name, []).append(path(file))
    assert not {name: files for name, files in where.items() if len(files) > 1}


def test_one_name_is_one_module() -> None:
    """The same for modules below folders; a verb in experiments/ is named as the command is."""
    where: dict[str, list[str]] = {}
    for file in sources("specbench", "analysis"):
        if file.stem != "__init__":
            where.setdefault(file.stem, []).append(path(file))
    assert not {name: files for name, files in where.items() if len(files) > 1}
