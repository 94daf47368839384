"""The package as others install it: a wheel that works outside of the clone, and old packages refused by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from specbench.data.cache.shards import read_and_close
from specbench.requirements_check import check_requirements, required

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("specbench", "experiments", "analysis", "configs")


def test_the_requirements_are_those_of_pyproject() -> None:
    written = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {text.replace(" ", "") for text in required() if "extra" not in text} <= set(written)
    check_requirements(written)


def test_an_old_or_missing_package_is_refused_by_name() -> None:
    def installed(name: str) -> str:
        return {"torch": "2.4.1+cpu", "lightning": "2.6.0.dev1"}.get(name) or version("no-such-package")

    with pytest.raises(ImportError, match=r"^specbench needs torch>=2.8, and 2\.4\.1\+cpu is installed: pip install"):
        check_requirements(["torch>=2.8", "lightning>=2.5", 'mkdocs>=1; extra == "docs"'], installed)
    with pytest.raises(ImportError, match="rich>=13, which is not installed"):
        check_requirements(["rich>=13"], installed)
    with pytest.raises(ImportError, match="Linux or macOS"):
        check_requirements([], installed, "win32")
    with pytest.raises(PackageNotFoundError):
        installed("rich")


def test_the_command_line_refuses_an_old_torch_in_one_sentence(tmp_path: Path) -> None:
    """The first metadata on the path is what importlib.metadata reads; torch itself is not imported."""
    for name, text in {"torch": "Version: 2.4.1", "specbench": "Version: 0.1.0\nRequires-Dist: torch>=2.8"}.items():
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\n{text}\n")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    command = [sys.executable, "-m", "experiments.cli", "train"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "specbench: specbench needs torch>=2.8, and 2.4.1 is installed: pip install --upgrade 'torch>=2.8'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import specbench"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert "ImportError: specbench needs torch>=2.8" in done.stderr


def test_reading_at_a_place_needs_no_preadv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which some builds of Python for macOS lack."""
    (tmp_path / "x").write_bytes(bytes(range(100)))
    monkeypatch.delattr(os, "preadv")
    room = bytearray(20)
    assert read_and_close(os.open(tmp_path / "x", os.O_RDONLY), memoryview(room), 90) == 10
    assert bytes(room[:10]) == bytes(range(90, 100))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_wheel_works_outside_of_the_clone(tmp_path: Path) -> None:
    """Built from a copy of the tree, installed beside the present packages, run from another folder."""
    clone, wheels = tmp_path / "clone", tmp_path / "wheels"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines():
        if (REPOSITORY / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, clone / name)
    pip = [sys.executable, "-m", "pip"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", str(wheels), str(clone)]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = wheels.glob("specbench-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith((".dist-info", ".data"))} == set(PACKAGES)
    for package in PACKAGES:
        tree = [path for path in (clone / package).rglob("*") if path.is_file()]
        assert {str(path.relative_to(clone)) for path in tree} <= set(names)

    venv.create(tmp_path / "fresh", with_pip=False)
    python = tmp_path / "fresh" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", "-q", str(wheel)], check=True)
    site = next((tmp_path / "fresh" / "lib").glob("python*/site-packages"))
    (site / "present.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def specbench(*words: str) -> str:
        command = [str(python.with_name("specbench")), *words]
        done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stderr
        return done.stdout

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = subprocess.run(
        [str(python), "-c", "import specbench; print(specbench.__file__)"], cwd=elsewhere, env=env, capture_output=True
    )
    assert where.stdout.decode().startswith(str(site)), where.stderr
    small = ["prompts=20", "held_out=4", "steps=4", "max_new_tokens=8", "benchmark_prompts=1", "temperatures=[0.0]"]
    specbench("quickstart", "methods=[mtp]", *small, "clock.prompts=0")
    assert (elsewhere / "outputs" / "quickstart" / "compare" / "quickstart" / "report.html").is_file()
    data = json.loads(specbench("status", "root=outputs/quickstart", "json=true"))
    assert {item["status"] for item in data["items"]} == {"complete"} and len(data["items"]) == 6
    pages = specbench("docs")
    assert str(tmp_path / "fresh") in pages and "  evaluation" in pages
    assert specbench("docs", "data") == (REPOSITORY / "docs" / "data.md").read_text()
