"""A W&B project as a source, against an HTTP stub that answers only the fields it knows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
import yaml

from analysis.read import runs, wandb_runs
from tests.analysis.synthetic import simulate, write_run

FIELDS = {
    *("project", "runs", "edges", "node", "name", "displayName", "state", "jobType", "config", "summaryMetrics"),
    *("files", "directUrl", "md5", "pageInfo", "endCursor", "hasNextPage"),
    *("filters", "first", "after", "names", "entityName"),
}


class Stub(BaseHTTPRequestHandler):
    """Two runs a page at most; a field outside FIELDS is an error, as it would be on a server without it."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, self.headers.get("Authorization"), body["variables"]))
        asked = re.sub(r"\$\w+", "", body["query"][body["query"].index("{") :])
        unknown = set(re.findall(r"[A-Za-z]\w+", asked)) - FIELDS
        if unknown:
            return self._send({"errors": [{"message": f"unknown fields {sorted(unknown)}"}]})
        variables = body["variables"]
        if (variables["entity"], variables["project"]) != ("me", "proj"):
            return self._send({"data": {"project": None}})
        wanted = json.loads(variables["run"]).get("name")
        nodes = [node for node in self.server.nodes if wanted in (None, node["name"])]
        start = int(variables["cursor"] or 0)
        page = [self._node(node, variables["files"]) for node in nodes[start : start + 2]]
        info = {"endCursor": str(start + 2), "hasNextPage": start + 2 < len(nodes)}
        return self._send({"data": {"project": {"runs": {"edges": [{"node": n} for n in page], "pageInfo": info}}}})

    def _node(self, node, names):
        address = f"http://127.0.0.1:{self.server.server_port}"
        files = []
        for name in names:
            content = node["contents"].get(name)
            if content is not None:
                md5 = base64.b64encode(hashlib.md5(content).digest()).decode()
                file = {"name": name, "directUrl": f"{address}/files/{node['name']}/{name}", "md5": md5}
                files.append({"node": file})
        return {key: value for key, value in node.items() if key != "contents"} | {"files": {"edges": files}}

    def do_GET(self):
        self.server.fetched.append(self.path)
        run, _, name = self.path.removeprefix("/files/").partition("/")
        content = next(node["contents"][name] for node in self.server.nodes if node["name"] == run)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def _send(self, answer):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    stub = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    stub.seen, stub.fetched, stub.nodes = [], [], []
    for index, method in enumerate(("dspark", "dflash", "mtp")):
        folder = write_run(
            tmp_path / "local", f"{method}-run", simulate(method, 3), config={"draft": {"layers": index}}
        )
        contents = {f"record/{file.name}": file.read_bytes() for file in folder.iterdir()}
        config = {key: {"value": value} for key, value in yaml.safe_load((folder / "config.yaml").read_text()).items()}
        facts = {"name": f"id{index}", "displayName": f"{method}-run", "state": "finished", "jobType": "evaluate"}
        facts |= {"config": json.dumps({**config, "_wandb": {"value": {}}}), "summaryMetrics": '{"_step": 3}'}
        stub.nodes.append(facts | {"contents": contents})
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{stub.server_port}")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    yield stub
    stub.shutdown()
    stub.server_close()


def test_a_project_gives_the_same_frame_as_its_folders(server, tmp_path):
    local = runs.load(tmp_path / "local")
    mirror = runs.load("wandb:me/proj", cache=tmp_path / "cache")
    frames = [frame.records.drop(columns=["source", "prompt"]) for frame in (local, mirror)]
    texts = frames[0].select_dtypes("category").columns
    order = ["run", "benchmark", "prompt_id"]
    same = [frame.astype(dict.fromkeys(texts, str)).sort_values(order, ignore_index=True) for frame in frames]
    pd.testing.assert_frame_equal(*same)
    keep = [column for column in local.runs if column != "path"]
    rows = [frame.runs[keep].sort_values("run", ignore_index=True) for frame in (local, mirror)]
    pd.testing.assert_frame_equal(*rows)
    assert mirror.where("draft.layers=1").runs["run"].tolist() == ["dflash-run"]


def test_pages_key_and_cache(server, tmp_path):
    wandb_runs.fetch("wandb:me/proj", tmp_path / "cache")
    assert [variables["cursor"] for _, _, variables in server.seen] == [None, "2"]
    key = "Basic " + base64.b64encode(b"api:" + b"k" * 40).decode()
    assert {(path, sent) for path, sent, _ in server.seen} == {("/graphql", key)}
    assert len(server.fetched) == 3 * 4  # summary, config, provenance and records of each
    wandb_runs.fetch("wandb:me/proj", tmp_path / "cache")
    assert len(server.fetched) == 3 * 4
    contents = server.nodes[0]["contents"]
    contents["record/provenance.json"] = b"{}"
    folder = wandb_runs.fetch("wandb:me/proj/id0", tmp_path / "cache")[0]
    assert len(server.fetched) == 3 * 4 + 1 and (folder / "provenance.json").read_bytes() == b"{}"


def test_a_run_that_uploaded_no_record_is_written_from_what_the_project_knows(server, tmp_path):
    contents = server.nodes[0]["contents"]
    del contents["record/summary.json"], contents["record/config.yaml"]
    server.nodes[0]["summaryMetrics"] = json.dumps({"training_tokens": 12, "_runtime": 3})
    read = runs.load("wandb:me/proj/id0", cache=tmp_path / "cache")
    row = read.runs.iloc[0]
    assert (row["run"], row["kind"], row["status"], row["draft.layers"]) == ("dspark-run", "evaluate", "finished", 0)
    assert row["summary.training_tokens"] == 12 and "summary._runtime" not in row and len(read.records) == 9


def test_a_crashed_run_and_a_local_copy_are_named(server, tmp_path):
    del server.nodes[2]["contents"]["record/summary.json"]
    server.nodes[2]["state"] = "crashed"
    read = runs.load([tmp_path / "local", "wandb:me/proj"], cache=tmp_path / "cache")
    reasons = sorted(read.faults["reason"])
    assert len(read.runs) == 3 and len(reasons) == 3
    assert reasons[2] == "unfinished (status: crashed)" and all("the same run as" in r for r in reasons[:2])


def test_errors_name_the_remedy(server, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="write wandb:entity/project"):
        runs.load("wandb:proj", cache=tmp_path)
    with pytest.raises(ValueError, match="has no project me/other"):
        runs.load("wandb:me/other", cache=tmp_path)
    monkeypatch.setattr(wandb_runs, "QUERY", wandb_runs.QUERY.replace("displayName", "displayName tags"))
    with pytest.raises(ValueError, match=r"refused the query.*tags"):
        runs.load("wandb:me/proj", cache=tmp_path)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match="cannot reach"):
        runs.load("wandb:me/proj", cache=tmp_path)
