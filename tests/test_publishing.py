"""Drafts and targets to and from a hub that this machine serves: the library's real requests over real sockets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import save

from experiments.cli import main
from specbench.checkpoints.draft_folder import fetch, load_draft
from specbench.models.target import Target
from tests.hubserver import TOKEN, Hub, hub

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "fixtures" / "golden"
FINISHED = {"schema": "specbench.run/1", "status": "finished"}
DRAFTS = [GOLDEN / case / "draft" for case in ("qwen3_dspark_vanilla", "qwen3_dflash")]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A hub, and this process sent to it as HF_ENDPOINT would have, with a token and a cache of its own."""
    with hub() as running:
        point(monkeypatch, running.url, tmp_path / "hub")
        yield running


def point(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """What HF_ENDPOINT, HF_HUB_CACHE and HF_HUB_OFFLINE=0 set when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def trained(root: Path) -> Path:
    """A finished training run with an evaluation, as far as an export reads them."""
    run = root / "runs" / "train" / "mine"
    run.mkdir(parents=True)
    (run / "draft").symlink_to(DRAFTS[0])
    (run / "summary.json").write_text(json.dumps(FINISHED | {"method": "dspark", "steps": 240}))
    (run / "config.yaml").write_text(yaml.safe_dump({"target": {"id": "me/target"}, "seed": {"init": 3}}))
    (run / "provenance.json").write_text(json.dumps({"command": ["specbench", "train", "seed.init=3"]}))
    judged = root / "runs" / "evaluate" / "judged"
    judged.mkdir(parents=True)
    length = {"value": 3.14159, "low": 3.0, "high": 3.25, "count": 999}
    facts = FINISHED | {"suite": "paper", "temperature": 1.0, "metrics": {"accepted_length": length}}
    (judged / "summary.json").write_text(json.dumps(facts | {"lineage": {"parents": [str(run)]}}))
    return run


def export(root: Path, *more: str) -> int:
    return main(["export", f"draft={root / 'runs/train/mine'}", "format=deepspec", f"root={root}", *more])


def test_what_arrives_is_what_was_exported(tmp_path: Path) -> None:
    """The command as it is typed, in a process of its own: HF_ENDPOINT and HF_TOKEN come from the environment."""
    run = trained(tmp_path)
    command = ["export", f"draft={run}", "format=deepspec", "push=me/draft", "licence=mit", f"root={tmp_path}"]
    with hub() as server:
        known = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-m", "experiments.cli", *command],
            cwd=REPOSITORY, env={**os.environ, **known}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"{server.url}/me/draft" in done.stdout
        arrived = server.repositories["me/draft"][-1][1]
    folder = tmp_path / "export" / "mine-deepspec"
    assert {name: content for name, content in arrived.items() if name != ".gitattributes"} == contents(folder)
    assert set(contents(folder)) == {"README.md", "config.json", "model.safetensors"}
    card = arrived["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "me/target"
    for fact in ("# me/draft", "3.142 | 3.000 to 3.250 | 999", "specbench train seed.init=3", "license: mit"):
        assert fact in card, fact


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ({"models/me": 401}, "push=me/draft: the hub refused it (401: so it shall be); does the token (HF_TOKEN) have"),
        ({"create": 403}, "push=me/draft: the hub refused it (403: so it shall be); does the token"),
        ({"commit": 403}, "push=me/draft: the hub refused it (403: so it shall be); does the token"),
        (None, "push=me/draft: the hub cannot be reached"),
    ],
)
def test_what_goes_wrong_is_a_sentence_and_loses_nothing(
    trouble: dict | None, said: str, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = trained(tmp_path)
    server.fails = trouble or {}
    if trouble is None:
        point(monkeypatch, "http://127.0.0.1:9", tmp_path / "hub")
    assert export(tmp_path, "push=me/draft") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"specbench: {said}")
    folder = tmp_path / "export" / "mine-deepspec"
    worked = trouble is not None and "models/me" not in trouble  # the rest is found out before the export begins
    assert folder.exists() == worked and (f"the export lies in {folder}" in error) == worked
    if worked:
        before = contents(folder)
        server.fails = {}
        assert export(tmp_path, "push=me/draft", "force=true") == 0
        assert contents(folder) == before
        assert before.items() <= server.repositories["me/draft"][-1][1].items()
    assert (run / "draft" / "model.safetensors").read_bytes() == (DRAFTS[0] / "model.safetensors").read_bytes()


def test_a_published_draft_is_not_buried(server: Hub, tmp_path: Path, capsys) -> None:
    trained(tmp_path)
    server.commit("me/draft", {"config.json": b"another draft"})
    assert export(tmp_path, "push=me/draft") == 2
    assert "push=me/draft: this repository holds a draft already: choose another name" in capsys.readouterr().err
    assert len(server.repositories["me/draft"]) == 1 and not (tmp_path / "export").exists()
    assert export(tmp_path, "push=me/draft", "force=true") == 0
    assert [history[1]["config.json"] == b"another draft" for history in server.repositories["me/draft"]] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("token", "repository", "said"),
    [(None, "me/draft", "no Hugging Face token here; set HF_TOKEN"), (TOKEN, "draft", "OWNER/NAME")],
)
def test_an_upload_needs_a_token_and_a_name(token, repository, said, tmp_path: Path, monkeypatch, capsys) -> None:
    trained(tmp_path)
    monkeypatch.setattr("specbench.checkpoints.publishing.get_token", lambda: token)
    assert export(tmp_path, f"push={repository}") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "export").exists()


def test_a_draft_is_imported_at_the_revision_that_is_named(server: Hub, tmp_path: Path, capsys) -> None:
    commits = [server.commit("me/draft", contents(folder)) for folder in DRAFTS]
    for number, revision in enumerate((commits[0], "main")):
        own = tmp_path / str(number)
        assert main(["import", "draft=me/draft", f"revision={revision}", f"folder={own}"]) == 0
        one, other = load_draft(own), load_draft(DRAFTS[number])
        assert type(one) is type(other)
        assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())
    assert main(["import", "draft=me/draft", f"revision={'0' * 40}", f"folder={tmp_path / 'none'}"]) == 2
    error = capsys.readouterr().err
    assert f"the hub does not give it at revision {'0' * 40} (404: Invalid rev id)" in error
    assert main(["import", "draft=me/other", f"folder={tmp_path / 'none'}"]) == 2
    assert "draft=me/other: there is no such folder, and the hub does not give it (404: Repo" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_was_fetched_once_needs_no_hub(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = server.commit("me/draft", contents(DRAFTS[0]) | {"weights.bin": b"not asked for"})
    first = fetch("me/draft", commit)
    assert set(contents(first)) == {"config.json", "model.safetensors"}
    point(monkeypatch, "http://127.0.0.1:9", tmp_path / "hub")
    assert fetch("me/draft", commit) == first
    with pytest.raises(ValueError, match="draft=me/other: there is no such folder, and the hub does not give it"):
        fetch("me/other")


def test_a_target_is_loaded_at_the_revision_that_is_named(server: Hub) -> None:
    folder = GOLDEN / "targets" / "qwen3_tiny"
    old = contents(folder)
    other = Target.from_config(json.loads(old["config.json"]), [0], seed=5)
    new = save({key: value.contiguous() for key, value in other.model.state_dict().items()}, {"format": "pt"})
    commits = [server.commit("me/target", files) for files in (old, {"model.safetensors": new})]
    pinned, newest = (Target.load("me/target", [0], revision=revision) for revision in (commits[0], None))
    assert pinned.weights_hash == Target.load(folder, [0]).weights_hash
    assert newest.weights_hash == other.weights_hash != pinned.weights_hash
    assert (pinned.name, pinned.revision) == ("target", commits[0])
    with pytest.raises(ValueError, match=f"me/target.*{'0' * 40}"):
        Target.load("me/target", [0], revision="0" * 40)
    with pytest.raises(ValueError, match="me/none"):
        Target.load("me/none", [0])
