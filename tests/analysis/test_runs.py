"""Reading run folders: what is found, what is left out by name, filters, groups, damaged records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from analysis.read import folders, records, runs
from specbench.runs.run_folder import RunFolder
from tests.analysis.synthetic import record, simulate, write_run


@pytest.fixture
def root(tmp_path):
    for layers in (1, 2):
        for method in ("dspark", "dflash"):
            config = {"draft": {"layers": layers, "taps": [1, layers]}, "seed": 10 + layers}
            write_run(tmp_path, f"{method}-{layers}", simulate(method, 3), config=config, training_tokens=5)
    return tmp_path


def test_reads_every_record_once(root):
    read = runs.load([root, root / "runs", root / "runs" / "evaluate" / "dspark-1"])
    assert sorted(read.runs["run"]) == ["dflash-1", "dflash-2", "dspark-1", "dspark-2"]
    assert len(read.records) == 4 * 9 and read.faults.empty
    expected = pq.read_table(root / "runs/evaluate/dspark-2/records.parquet").to_pylist()
    found = read.where("run=dspark-2")
    for row, want, index in zip(found.records.to_dict("records"), expected, range(9), strict=True):
        assert {key: row[key] for key in want if key not in ("histogram", "thinking")} == {
            key: value for key, value in want.items() if key not in ("histogram", "thinking")
        }
        cells = found.cells[found.cells["record"] == index]
        assert cells[["proposed", "accepted", "count"]].to_numpy().tolist() == want["histogram"]


def test_reads_what_the_library_writes(tmp_path):
    rows = [row | {"run": "mine", "thinking": None} for row in simulate("dspark", 3)]
    with RunFolder(tmp_path, "evaluate", "mine", {"suite": {"name": "paper"}, "scheduler": {"threshold": 0.3}}) as run:
        run.write_records(rows)
        run.write_provenance({"seeds": {"init": 5}, "command": ["specbench", "evaluate"]})
        run.log({"test/accepted_length": 2.0}, step=0)
        run.update(method="dspark", target="qwen3_4b", suite="paper")
    read = runs.load(tmp_path).where("scheduler.threshold=0.3 summary.method=dspark thinking=none")
    assert read.counts().rounds.sum() == sum(row["rounds"] for row in rows)
    assert set(read.training_seeds()) == {5} and read.faults.empty
    assert folders.metrics(read.runs)["name"].tolist() == ["time", "test/accepted_length"]


def test_counts_equal_the_records(root):
    for keys, part in runs.load(root).groups(["method", "draft.layers", "benchmark"]):
        counts = part.counts()
        assert len(counts.prompts) == 3 and set(part.records["method"]) == {keys["method"]}
        assert counts.committed.sum() == part.records["committed"].sum()
        assert counts.rounds.sum() == part.records["rounds"].sum()
        assert counts.accepted.sum() == part.records["accepted"].sum()


def test_filters_on_records_config_and_summary(root):
    read = runs.load(root)
    assert set(read.where("method=dspark draft.layers=2").runs["run"]) == {"dspark-2"}
    assert set(read.where(["draft.layers!=2"]).runs["run"]) == {"dflash-1", "dspark-1"}
    assert set(read.where("draft.layers=1,2.0").runs["run"]) == set(read.runs["run"])
    assert set(read.where("summary.training_tokens=5 thinking=False").runs["run"]) == set(read.runs["run"])
    only = read.where("benchmark=gsm8k,mbpp domain!=code")
    assert set(only.records["benchmark"]) == {"gsm8k"} and len(only.runs) == 4
    assert set(only.cells["record"]) == set(range(len(only.records)))


def test_a_filter_says_what_is_wrong(root):
    read = runs.load(root)
    with pytest.raises(ValueError, match=r"'draft\.layer'; did you mean 'draft\.layers'"):
        read.where("draft.layer=2")
    with pytest.raises(ValueError, match="suite was one of paper"):
        read.where("suite=papr")
    for text in ("suite", "=paper", "suite="):
        with pytest.raises(ValueError, match="not of the form key=value"):
            read.where([text])


def test_training_runs_survive_filters_on_what_only_records_say(root):
    write_run(root, "training", [], kind="train")
    assert "training" in set(runs.load(root).where("temperature=0 benchmark=gsm8k").runs["run"])
    assert "training" not in set(runs.load(root).where("method=dflash").runs["run"])


def test_groups_by_lists_and_missing_values(root):
    write_run(root, "bare", simulate("dspark", 3))
    found = {keys["draft.taps"]: len(part.runs) for keys, part in runs.load(root).groups(["draft.taps"])}
    assert found == {None: 1, "(1, 1)": 2, "(1, 2)": 2}


def test_training_seed_is_that_of_initialisation_then_of_the_record(root):
    write_run(root, "bare", simulate("mtp", 3, seed=3), config={"seed": 99})
    folder = write_run(root, "told", simulate("mtp", 3, seed=4))
    (folder / "provenance.json").write_text(json.dumps({"seeds": {"init": 8, "decoding": 0}}))
    read = runs.load(root)
    seeds = read.training_seeds().groupby(read.records["run"].astype(str)).unique().map(list).to_dict()
    assert seeds["bare"] == [3] and seeds["told"] == [8] and seeds["dspark-2"] == [0]


def test_an_evaluation_inherits_from_the_training_of_its_draft(root):
    config = {"draft": {"layers": 9}, "method": {"draft": {"depth": 4}}}
    training = write_run(root, "parent", [], kind="train", config=config, parameters=7)
    own = {"draft": {"layers": 1}}
    write_run(root, "child", simulate("mtp", 3), config=own, lineage={"parents": ["somewhere/else/parent"]})
    for sources in (root, root / "runs" / "evaluate"):  # read with its parent, and alone
        row = runs.load(sources).where("run=child").runs.iloc[0]
        assert row["draft.layers"] == 1 and row["method.draft.depth"] == 4
        assert row["parent.parameters"] == 7 and row["kind"] == "evaluate" and row["run"] == "child"
    assert training.exists()


def test_plain_decoding_is_named_and_set_aside(root):
    rows = [record([], method="plain", prompt_id=f"p{i}") for i in range(3)]
    write_run(root, "baseline", rows)
    read = runs.load(root).decoded()
    assert "baseline" not in set(read.runs["run"]) and "plain" not in set(read.records["method"])
    assert read.faults["reason"].tolist() == ["no speculative round (plain decoding)"]
    assert len(read.records) == 4 * 9 and len(runs.load(root).records) == 4 * 9 + 3


def test_unusable_folders_are_named(root):
    where = root / "runs" / "evaluate"
    write_run(root, "killed", simulate("mtp", 2), status="running")
    write_run(root, "recordless", [])
    (where / "dspark-1" / "summary.json").unlink()
    (where / "dspark-2" / "summary.json").write_text('{"schema"')
    (where / "dflash-1" / "records.parquet").write_bytes(b"PAR1 and then nothing")
    facts = json.loads((where / "dflash-2" / "summary.json").read_text()) | {"schema": "specbench.run/9"}
    (where / "dflash-2" / "summary.json").write_text(json.dumps(facts))
    read = runs.load(root)
    assert read.runs.empty and len(read.records) == 0
    reasons = {path.rpartition("/")[2]: reason for path, reason in read.faults.itertuples(index=False)}
    assert reasons["killed"] == "unfinished (status: running)"
    assert reasons["dspark-1"] == "unfinished (status: no summary.json)"
    assert "summary.json holds no JSON" in reasons["dspark-2"]
    assert reasons["recordless"] == "no records.parquet although the evaluation finished"
    assert "specbench.run/9" in reasons["dflash-2"]
    assert len(reasons) == 6 and reasons["dflash-1"]
    assert set(runs.load(root, unfinished=True).runs["run"]) == {"killed", "dspark-1"}


def test_a_copy_of_a_run_counts_once(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("mirror")
    shutil.copytree(root / "runs" / "evaluate" / "dspark-1", other / "under another name")
    read = runs.load([root, other])
    assert len(read.runs) == 4 and len(read.faults) == 1
    assert "the same run as" in read.faults["reason"].iloc[0]


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        runs.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no run folder"):
        runs.load(tmp_path)
    write_run(tmp_path, "one", simulate("dspark", 2))
    assert len(runs.load(str(tmp_path / "runs" / "*")).runs) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rounds": 3}, "says rounds = 3, its histogram 2"),
        ({"accepted": 4}, "says accepted = 4, its histogram 5"),
        ({"proposed": 15}, "says proposed = 15, its histogram 14"),
        ({"committed": 8}, "says committed = 8, its histogram allows 5 to 7"),
        ({"committed": 4}, "says committed = 4, its histogram allows 5 to 7"),
        ({"histogram": [[3, 4, 1]]}, "impossible histogram entry"),
    ],
)
def test_a_record_that_contradicts_its_histogram_is_refused(tmp_path, change, said):
    write_run(tmp_path, "bad", [record([(7, 2)], prompt_id="p0"), record([(7, 2), (7, 3)], prompt_id="p1") | change])
    with pytest.raises(ValueError, match=said) as caught:
        runs.load(tmp_path)
    assert "run bad: prompt p1 of gsm8k" in str(caught.value)


def test_stop_tokens_and_empty_prompts_are_fine(tmp_path):
    rows = [record([(7, 2), (7, 3)], stops=1, prompt_id="stopped"), record([], prompt_id="empty")]
    counts = runs.load(write_run(tmp_path, "good", rows)).counts()
    assert len(counts.prompts) == 2 and counts.rounds.sum() == 2 and counts.committed.sum() == 6


def test_a_doubled_record_is_refused_and_a_second_turn_is_not(tmp_path):
    write_run(tmp_path / "turns", "good", [record([(7, 2)]), record([(7, 3)], turn=1)])
    assert len(runs.load(tmp_path / "turns").counts().prompts) == 1
    write_run(tmp_path / "twice", "bad", [record([(7, 2)]), record([(7, 2)])])
    with pytest.raises(ValueError, match="stands twice"):
        runs.load(tmp_path / "twice")


def test_metrics_in_long_form_without_a_cut_line(tmp_path):
    folder = write_run(tmp_path, "training", [], kind="train")
    lines = [{"step": 1, "time": 0.5, "train/loss": 2.0}, {"step": 2, "time": 0.6, "train/loss": None, "lr": 0.1}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "tr')
    table = folders.metrics(runs.load(tmp_path).runs)
    found = {(row["step"], row["name"]): row["value"] for row in table.to_dict("records")}
    assert found[1, "train/loss"] == 2.0 and found[2, "lr"] == 0.1 and (2, "train/loss") not in found
    assert not [key for key in found if key[0] == 3]
    (folder / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1: not JSON"):
        folders.metrics(runs.load(tmp_path).runs)


def test_many_runs_cost_four_open_files_each_and_no_more_parsing(tmp_path, monkeypatch):
    """Twice the runs of a sweep: twice the files, each opened once, and not one more entry of YAML to parse."""
    opened, parsed, load = [], [], folders.plain_yaml.read
    parquet = records.pq.ParquetFile
    monkeypatch.setattr(records.pq, "ParquetFile", lambda file, **k: opened.append(file.name) or parquet(file, **k))
    monkeypatch.setattr(folders.plain_yaml, "read", lambda text: parsed.append(text) or load(text))
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda file, **k: opened.append(file.name) or read(file, **k))
    for method, start in (("dspark", 0), ("dflash", 20)):
        for i in range(start, start + 20):
            config = {"trainer": {f"key{j}": {"deep": [j] * 3} for j in range(12)}, "seed": i % 5, "data": i}
            write_run(tmp_path / method, f"{method}-{i}", simulate(method, 2), config=config)
    folders._entry.cache_clear()
    read_first = runs.load(tmp_path / "dspark")
    first = (len(opened), len(parsed))
    assert len(read_first.runs) == 20 and first[0] == 4 * 20
    # trainer, method, suite and target, five seeds, and one number of its own for every run
    assert len(set(parsed)) == len(parsed) == 4 + 5 + 20
    assert len(runs.load(tmp_path).runs) == 40
    assert len(opened) - first[0] == 4 * 40 and len(parsed) - first[1] == 1 + 20  # method: dflash


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb:\n  c: [1, 2]\n  d:\n  - x\nlist:\n- 1\n- two: 3\n",
        "shared: &id001\n  a: 1\nagain: *id001\n",
        "text: |\n  one\n\n  two\nquoted: 'first\n\n  second'\nend: null\n",
        "plain: a long text\n  that goes on\n? key\n: value\n",
        "# comment\na: 1\n",
        "'a': 1\nb: 2\n",
        "just a text",
        "{a: 1}\n",
        "",
    ],
)
def test_yaml_entry_by_entry_is_yaml(text, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    whole = yaml.safe_load(text) or {}
    if not isinstance(whole, dict):
        with pytest.raises(ValueError, match="is not a mapping"):
            folders._yaml(file)
        return
    assert folders._yaml(file) == (whole, dict(folders.flatten(whole)))
