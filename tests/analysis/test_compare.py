"""A whole comparison: every file, the figures, the page in a real browser, the W&B report."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import image
from omegaconf import OmegaConf

from analysis.compare import compare
from analysis.figures import acceptance as figures
from analysis.figures import curves, style
from analysis.html import content as report
from analysis.tables import frames as tables
from experiments import cli
from tests.analysis.synthetic import simulate, write_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for method in ("dspark", "dflash"):
        for layers in (1, 2):
            config = {"draft": {"layers": layers}}
            write_run(root, f"{method}-{layers}", simulate(method, 12, layers), config=config)
        folder = write_run(root, f"train-{method}", [], kind="train")
        lines = [json.dumps({"step": step, "train/loss": 3 / (1 + step)}) for step in range(5)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_run(root, "killed", [], status="running")
    serve = write_run(root, "load", [], kind="serve")
    points = {"policy": "fixed", "interactivity": [90, 60, 20], "throughput": [90, 240, 600]}
    pd.DataFrame(points).to_csv(serve / "points.csv", index=False)
    return root


@pytest.fixture(scope="module")
def made(root, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "all"
    bins = {"count": [4, 10], "predicted": [0.2, 0.8], "observed": [0.1, 0.6]}
    rows = [{"slot": 1, "calibrated": c, "n": 14, "ece": 0.2, "reliability": bins} for c in (False, True)]
    calibration = tmp_path_factory.mktemp("calibrate") / "head"
    calibration.mkdir()
    (calibration / "reliability.json").write_text(json.dumps(rows))
    settings = {"group_by": ["draft.layers"], "resamples": 100, "command": "specbench compare runs=X"}
    return compare(root, output, calibrations=[calibration], **settings)


def test_every_file_is_there(made):
    names = {str(path.relative_to(made.folder)) for path in made.folder.rglob("*") if path.is_file()}
    assert names == {str(path.relative_to(made.folder)) for path in made.files}
    expected = {f"accepted_length.{kind}" for kind in ("csv", "md", "tex")}
    expected |= {"conditional_acceptance.csv", "differences.csv", "report.html"}
    drawn = "conditional_acceptance conditional_acceptance_math survival suffix_decay training frontier_load"
    drawn = [*drawn.split(), "reliability_head", "accepted_length_by_draft_layers", "suffix_decay_by_draft_layers"]
    expected |= {f"figures/{name}.{kind}" for name in drawn for kind in ("png", "pdf")}
    assert expected <= names
    assert all((made.folder / name).stat().st_size > 0 for name in names)
    header = (made.folder / "conditional_acceptance.csv").read_text().splitlines()[0].split(",")
    assert header == [*tables.KEYS, *tables.SLOT_MEASURES, "draft.layers"]


def test_the_text_names_what_was_left_out(made):
    assert "dspark, layers 2" in made.text and "left out: 1" in made.text
    assert "killed: unfinished (status: running)" in made.text


def test_figures_are_of_print_size_and_not_blank(made):
    sizes = {"conditional_acceptance": style.PAGE, "conditional_acceptance_math": style.COLUMN}
    for name, width in sizes.items():
        pixels = image.imread(made.folder / "figures" / f"{name}.png")
        assert pixels.shape[1] == pytest.approx(width * 300, abs=2)
        assert (pixels[..., :3].min(-1) < 0.9).mean() > 0.02


def test_the_same_numbers_give_the_same_files(made, root, tmp_path):
    settings = {"group_by": ["draft.layers"], "resamples": 100, "command": "specbench compare runs=X"}
    again = compare(root, tmp_path / "all", draw=False, **settings)
    tables_only = {path.relative_to(again.folder) for path in again.files}
    assert tables_only == {p.relative_to(made.folder) for p in made.files if p.parent == made.folder}
    for path in tables_only - {Path("report.html")}:
        assert (made.folder / path).read_bytes() == (again.folder / path).read_bytes(), path
    frame = made.frames["suffix_decay"].query("`draft.layers` == 1")
    files = [style.save(figures.bars(frame, "suffix_decay"), tmp_path / name, "decay") for name in ("one", "two")]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(*files, strict=True))


def test_known_methods_keep_their_look_and_new_ones_get_their_own():
    names = [*style.KNOWN, *(f"new{i}" for i in range(20))]
    found = style.looks(names)
    assert {name: found[name] for name in style.KNOWN} == style.KNOWN
    assert len(set(found.values())) == len(names) and list(found) == names
    assert style.looks(reversed(names)) == found
    assert style.looks(["dflash"])["dflash"] == style.KNOWN["dflash"]


def test_a_figure_draws_the_numbers_that_it_is_given(made):
    frame = made.frames["conditional_acceptance"].query("`draft.layers` == 1")
    figure = figures.by_slot(frame, panel="benchmark")
    for ax, (_, part) in zip(figure.axes, frame.groupby("benchmark", sort=False), strict=True):
        drawn = {line.get_label(): line.get_ydata() for line in ax.lines if not line.get_label().startswith("_")}
        for variant, line in part.groupby("variant"):
            line = line[line["n"] >= figures.FEWEST_ROUNDS]
            np.testing.assert_array_equal(drawn[variant], line["conditional"].where(line["low"].notna()))


def test_slots_of_few_rounds_are_not_drawn_and_rounds_are_those_of_each():
    curves_of = {"a": (100, 40, 4), "b": (90, 5, 5)}
    rows = [
        {"domain": "math", "variant": name, "slot": k + 1, "conditional": 0.5, "low": 0.4, "high": 0.6, "n": n}
        for name, counts in curves_of.items()
        for k, n in enumerate(counts)
    ]
    (ax,) = figures.by_slot(pd.DataFrame(rows)).axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in ax.lines if not line.get_label().startswith("_")}
    assert drawn == {"a": [1, 2], "b": [1, 2, 3]}
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1\n100\n90", "2\n40\n5", "3\n4\n5"]


def test_the_front_of_prices_holds_what_nothing_beats():
    """b is slower to propose than a and shorter: it is not on the front of lengths, but is on that of speeds."""
    seconds = {"variant": ["c", "a", "b"], "proposal_seconds": [0.004, 0.001, 0.002]}
    values = {"speedup_accepted_length": [3.0, 2.0, 1.9], "tokens_per_second": [50.0, 60.0, 70.0]}
    frame = pd.DataFrame(seconds | values)
    left, right = figures.price(frame).axes
    assert list(left.lines[0].get_xdata()) == [1.0, 4.0] and list(left.lines[0].get_ydata()) == [2.0, 3.0]
    assert list(right.lines[0].get_xdata()) == [1.0, 2.0] and list(right.lines[0].get_ydata()) == [60.0, 70.0]


def test_an_axis_without_numbers_is_refused(made):
    with pytest.raises(ValueError, match="holds no numbers"):
        figures.along(made.frames["macro_average"], "suite")


def test_threshold_and_reliability_figures_draw():
    place = {"domain": ["math", "math"], "threshold": [0.0, 0.5], "acceptance_rate": [0.7, 0.9], "rate_low": [0.6, 0.8]}
    numbers = {"rate_high": [0.8, 0.95], "accepted_length": [4.0, 3.5], "low": [3.8, 3.3], "high": [4.2, 3.7]}
    figure = curves.threshold(pd.DataFrame(place | numbers), "threshold")
    assert [bar.get_height() for bar in figure.axes[1].patches] == [4.0, 3.5]
    bins = {"count": [0, 10], "predicted": [0.0, 0.8], "observed": [0.0, 0.6]}
    rows = [{"slot": 1, "calibrated": c, "n": 10, "ece": 0.2, "reliability": bins} for c in (False, True)]
    figure = curves.reliability([*rows, {"slot": 2, "calibrated": False, "n": 0, "ece": None, "reliability": None}])
    assert len(figure.axes) == 1 and "ECE 0.200 → 0.200" in figure.axes[0].get_title()
    with pytest.raises(ValueError, match="no slot has a reliability diagram"):
        curves.reliability([])


def test_the_page_asks_nothing_of_the_network(made):
    page = (made.folder / "report.html").read_text()
    loaded = re.findall(r'(?:src|href|action)\s*=\s*["\']([^"\']*)', page) + re.findall(r"url\(([^)]*)\)", page)
    assert loaded and all(address.startswith("#") for address in loaded)
    assert "@import" not in page and "fetch(" not in page and "<link" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and {a[1:] for a in loaded} <= set(ids)
    assert "specbench compare runs=X" in page and "method=dspark" in page and "0123abcd" in page


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(made, tmp_path):
    """Tables sort by number when their header is clicked, figures have a size, and a screenshot shows something."""
    page = (made.folder / "report.html").read_text()
    probe = """<script>
      const table = document.querySelector("#accepted_length"), head = table.querySelectorAll("tr.keys button")[1];
      const read = () => [...table.tBodies[0].rows].map(row => row.children[1].textContent).join(";");
      head.click(); const down = read(); head.click(); const up = read();
      const widths = [...document.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect().width);
      document.title = JSON.stringify({down, up, widths, over: document.body.scrollWidth > innerWidth});
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", probe))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3000"]
    shot = tmp_path / "page.png"
    ask = [BROWSER, *flags, "--dump-dom", f"file://{file}"]
    dom = subprocess.run(ask, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = json.loads(re.search(r"<title>(.*?)</title>", dom)[1])
    numbers = [float(text.split(" ")[0]) for text in seen["up"].split(";")]
    assert numbers == sorted(numbers) and seen["down"].split(";") == seen["up"].split(";")[::-1]
    assert min(seen["widths"]) > 300 and not seen["over"]
    take = [BROWSER, *flags, f"--screenshot={shot}", f"file://{made.folder / 'report.html'}"]
    subprocess.run(take, capture_output=True, timeout=120, check=True)
    pixels = image.imread(shot)
    assert pixels.shape[1] == 1200 and pixels[..., :3].std() > 0.05


def test_the_wandb_report_builds_without_a_login(made, monkeypatch):
    pytest.importorskip("wandb_workspaces", reason="the extra `report` is not installed")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    blocks = report.blocks(made.content, "me", "proj", ["dspark", "dflash"], ["qwen3_4b"], ["train/loss"])
    sent = json.loads(report.serialise(blocks))
    text = json.dumps(sent)
    assert "specbench compare runs=X" in text and "| dspark, layers 2 |" in text
    grid = next(block for block in sent["blocks"] if block["type"] == "panel-grid")["metadata"]
    chosen = json.dumps(grid["runSets"][0]["filters"])
    assert all(name in chosen for name in ("qwen3_4b", "dspark", "dflash"))
    line, slots = grid["panelBankSectionConfig"]["panels"]
    assert line["config"]["xAxis"] == "trainer/global_step" and line["config"]["metrics"] == ["train/loss"]
    assert slots["config"]["panelDefId"] == "wandb/line/v0"
    assert report.publish(blocks) is None


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        (["target=qwen3_4b", "suite=paper", "method=dspark"], 2),
        (["filters.target=qwen3_4b", "filters.method=dspark"], 2),
        (["method=dspark,dflash", "where=draft.layers=2"], 2),
        (["filters.method=[dspark,dflash]", "benchmark=gsm8k"], 4),
    ],
)
def test_filters_are_typed_as_they_are_spoken(words, runs, root, tmp_path):
    folder = tmp_path / "compare" / "all"
    given = [f"runs={root}/runs/evaluate", f"root={tmp_path}", "figures=false", "resamples=20"]
    assert cli.main(["compare", *given, "group_by=[draft.layers]", *words]) == 0
    lengths = pd.read_csv(folder / "accepted_length.csv")
    assert len(lengths[["method", "draft.layers"]].drop_duplicates()) == runs


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["target=qwen3_8b"], "no record is left after the filter target=qwen3_8b; target was one of qwen3_4b"),
        (["temperature=0.7"], "no record is left after the filter temperature=0.7; temperature was one of 0"),
        (["domian=math"], "compare has no setting 'domian'; did you mean 'filters.domain'?"),
        (["where=draft.layer=2"], "no run has the key 'draft.layer'; did you mean 'draft.layers'?"),
    ],
)
def test_a_filter_that_leaves_nothing_says_what_there_is(words, said, root, tmp_path, capsys):
    assert cli.main(["compare", f"runs={root}", f"root={tmp_path}", *words]) == 2
    assert said in capsys.readouterr().err


def test_from_the_command_line_settings(root, tmp_path, capsys):
    from experiments import compare as verb
    from experiments import report as other

    cfg = OmegaConf.load("configs/compare.yaml")
    own = {"root": str(tmp_path), "runs": [str(root)], "resamples": 50, "where": "draft.layers!=2 method=dspark,dflash"}
    own["figures"] = False
    cfg = OmegaConf.merge(cfg, own, {"filters": {"temperature": 0, "domain": ["math", "code"]}})
    folder = verb.run(cfg)
    assert folder == tmp_path / "compare" / "all" and (folder / "report.html").exists()
    lengths = pd.read_csv(folder / "accepted_length.csv")
    assert set(lengths["benchmark"]) == {"gsm8k", "mbpp"} and (lengths["prompts"] == 12).all()
    out = capsys.readouterr().out
    assert "dspark" in out and str(folder / "report.html") in out
    more = {"entity": "me", "project": "proj", "title": "Mine", "name": "second"}
    folder = other.run(OmegaConf.merge(cfg, more))
    assert "<h1>Mine</h1>" in (folder / "report.html").read_text() and (folder / "report.json").exists()
