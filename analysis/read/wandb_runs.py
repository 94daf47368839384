"""W&B projects as a source of runs, read by GraphQL queries for the required fields only.

The files of every run are stored below a cache folder in the form of run folders, so both are read by the same code. A
run has copies of its files below record/ (summary.json, config.yaml, provenance.json, metrics.jsonl, records.parquet);
if the first two were not uploaded, they are written from the project's config, summary and state.

Server and key are those of specbench/runs/wandb_account.py.
"""

from __future__ import annotations

import base64
import hashlib
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from specbench.runs import wandb_account as account
from specbench.runs.run_schema import KINDS, MIRROR, MIRRORED, OUTPUTS, SCHEMA

PREFIX = "wandb:"
PAGE = 500
TIMEOUT = 60
QUERY = """query Runs($entity: String!, $project: String!, $run: JSONString, $cursor: String, $page: Int!,
    $files: [String]!) {
  project(name: $project, entityName: $entity) {
    runs(filters: $run, first: $page, after: $cursor) {
      edges { node { name displayName state jobType config summaryMetrics
        files(names: $files, first: 5) { edges { node { name directUrl md5 } } } } }
      pageInfo { endCursor hasNextPage }
    }
  }
}"""


def fetch(source: str, cache: Path) -> list[Path]:
    """Download `wandb:entity/project` or `wandb:entity/project/run` below `cache`; returns the run folders.

    A file is downloaded again only if its checksum on the server has changed.

    Raises:
        ValueError: the source is not of that form, the project is not there, or the server or the key refuses.
    """
    parts = source.removeprefix(PREFIX).strip("/").split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(f"{source!r} does not name a W&B project; write wandb:entity/project or .../project/run")
    entity, project, *run = parts
    server = account.server()
    # Runs of prompts, answers, caches and calibrations have no run folder and nothing to compare.
    nodes = [node for node in _runs(server, entity, project, run[0] if run else None) if _kind(node) not in OUTPUTS]
    if not nodes:
        raise ValueError(f"{source} holds no run on {server} that has a run folder (of {', '.join(KINDS)})")
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda node: _mirror(server, node, cache / entity / project / _safe(node["name"])), nodes))


def _runs(server: str, entity: str, project: str, run: str | None) -> Iterator[dict[str, Any]]:
    cursor = None
    while True:
        variables = {
            "entity": entity,
            "project": project,
            "cursor": cursor,
            "page": PAGE,
            "files": [f"{MIRROR}/{name}" for name in MIRRORED],
        }
        variables["run"] = json.dumps({"name": run} if run else {})
        answer = json.loads(_request(server, f"{server}/graphql", {"query": QUERY, "variables": variables}))
        if answer.get("errors"):
            raise ValueError(f"{server} refused the query for {entity}/{project}: {answer['errors'][0].get('message')}")
        found = (answer.get("data") or {}).get("project")
        if not found:
            raise ValueError(f"{server} has no project {entity}/{project}, or your key may not see it")
        yield from (edge["node"] for edge in found["runs"]["edges"])
        page = found["runs"]["pageInfo"]
        if not page["hasNextPage"]:
            return
        cursor = page["endCursor"]


def _mirror(server: str, node: dict[str, Any], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    uploaded = {edge["node"]["name"].removeprefix(f"{MIRROR}/"): edge["node"] for edge in node["files"]["edges"]}
    for name in MIRRORED:
        if name in uploaded:
            if not _current(folder / name, uploaded[name].get("md5")):
                _write(folder / name, _request(server, uploaded[name]["directUrl"]))
        else:
            (folder / name).unlink(missing_ok=True)
    if "config.yaml" not in uploaded:
        config = {key: entry["value"] for key, entry in _mapping(node["config"]).items() if key != "_wandb"}
        _write(folder / "config.yaml", yaml.safe_dump(config).encode())
    if "summary.json" not in uploaded:
        summary = {key: value for key, value in _mapping(node["summaryMetrics"]).items() if not key.startswith("_")}
        facts = {"schema": SCHEMA, "kind": node["jobType"], "name": node["displayName"], "status": node["state"]}
        _write(folder / "summary.json", json.dumps({**facts, **summary}).encode())
    return folder


def _kind(node: dict[str, Any]) -> str | None:
    """The kind that a run's settings state; None for one that was not made by SpecBench."""
    return _mapping(node["config"]).get("kind", {}).get("value")


def _mapping(text: str | dict[str, Any] | None) -> dict[str, Any]:
    return json.loads(text) if isinstance(text, str) else text or {}


def _current(file: Path, md5: str | None) -> bool:
    if md5 is None or not file.exists():
        return False
    digest = hashlib.md5(file.read_bytes(), usedforsecurity=False).digest()
    return md5 in (base64.b64encode(digest).decode(), digest.hex())


def _write(file: Path, content: bytes) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(content)
    temporary.replace(file)


def _safe(name: str) -> str:
    return urllib.parse.quote(name, safe="").lstrip(".") or "run"


def _request(server: str, url: str, body: dict[str, Any] | None = None) -> bytes:
    """POST `body` as JSON, or GET without one. The key goes to the server itself only, never to a signed file URL."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
    key = account.key()
    if key and urllib.parse.urlsplit(url).netloc == urllib.parse.urlsplit(server).netloc:
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(f"api:{key}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        hint = "; set WANDB_API_KEY" if error.code in (401, 403) else ""
        raise ValueError(f"{server} answered {error.code} {error.reason}{hint}") from error
    except OSError as error:
        raise ValueError(f"cannot reach {server} ({error}); compare the local run folders instead") from error
