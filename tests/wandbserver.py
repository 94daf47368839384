"""A small W&B server on this machine: what `wandb sync` uploads, and what its public API and our reader ask afterwards.

It answers the operations that the client was seen to send (wandb 0.31) and nothing else: an unknown one is noted in
`unknown` and answered with an error. It proves what the client sends, not that W&B's own server takes it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Wandb(ThreadingHTTPServer):
    """`runs` by id, `artifacts` by id, `files` by address; `loses`: names of artifacts
    and files of runs that are taken and not kept; `damages`: files that are kept with another content."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.unknown: list[str] = []
        self.asked: list[str] = []
        self.loses: set[str] = set()
        self.damages: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def wandb_server() -> Iterator[Wandb]:
    """A running server."""
    server = Wandb()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Wandb

    def do_POST(self) -> None:
        body = self._body()
        if self.path != "/graphql":  # a run's history and console
            return self._send({"exitcode": None, "limits": {}})
        asked = json.loads(body)
        query, variables = asked["query"], asked.get("variables") or {}
        name = re.search(r"(?:query|mutation)\s+(\w+)", query)[1]
        self.server.asked.append(name)
        answer = getattr(self, f"_{name}", None)
        if answer is None:
            self.server.unknown.append(f"{name}: {' '.join(query.split())} {json.dumps(variables)[:2000]}")
            return self._send({"errors": [{"message": f"unknown operation {name}"}]})
        return self._send({"data": answer(variables)})

    def do_PUT(self) -> None:
        place, content = unquote(urlsplit(self.path).path), self._body()
        if not place.endswith(tuple(self.server.loses)):
            self.server.files[place] = content[:-1] if place.endswith(tuple(self.server.damages)) else content
        self._send({})

    def do_GET(self) -> None:
        content = self.server.files.get(unquote(urlsplit(self.path).path))
        self._send({"error": "no such file"} if content is None else content, 404 if content is None else 200)

    def _ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _UpsertBucket(self, asked: dict[str, Any]) -> dict[str, Any]:
        new = asked["name"] not in self.server.runs
        run = self.server.runs.setdefault(asked["name"], {"name": asked["name"], "files": {}})
        run |= {key: value for key, value in asked.items() if value is not None}
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": new}}

    def _Run(self, asked: dict[str, Any]) -> dict[str, Any]:
        run = self.server.runs.get(asked["name"])
        return {"project": {"run": run and self._described(run)}}

    def _described(self, run: dict[str, Any]) -> dict[str, Any]:
        empty = dict.fromkeys(("sweepName", "group", "commit", "description", "notes", "systemMetrics", "historyKeys"))
        facts = {key: run.get(key) for key in ("name", "displayName", "config", "jobType")} | {"tags": []}
        more = {"state": "finished", "readOnly": False, "historyLineCount": 0, "user": {"name": "me", "username": "me"}}
        times = {"createdAt": "2026-01-01T00:00:00", "heartbeatAt": "2026-01-01T00:00:00"}
        return {"id": run["name"], "projectId": "1", "summaryMetrics": "{}"} | empty | facts | more | times

    def _RunOutputArtifacts(self, asked: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "project", "internalId": "1", "name": asked["project"], "entity": {"name": "me"}}
        edges = []
        for artifact in self.server.artifacts.values():
            if artifact["runName"] != asked["run"] or artifact["state"] != "COMMITTED":
                continue
            if artifact["artifactCollectionName"] in self.server.loses:
                continue
            place = {"__typename": "ArtifactSequence", "name": artifact["artifactCollectionName"], "project": project}
            facts = {"__typename": "Artifact", "artifactSequence": place, "versionIndex": 0, "tags": [], "aliases": []}
            facts |= {
                "artifactType": {"name": artifact["artifactTypeName"]},
                "size": 0,
                "fileCount": 1,
                "commitHash": None,
            }
            facts |= {key: artifact[key] for key in ("id", "state", "digest", "digestAlgorithm", "metadata")}
            facts |= dict.fromkeys(("description", "historyStep", "updatedAt"))
            edges.append(
                {
                    "node": facts
                    | {"ttlIsInherited": False, "ttlDurationSeconds": -1, "createdAt": "2026-01-01T00:00:00"}
                }
            )
        info = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"project": {"run": {"artifacts": {"totalCount": len(edges), "pageInfo": info, "edges": edges}}}}

    def _RunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        names = asked["fileNames"]
        return {"project": {"internalId": "1", "run": {"fileCount": len(names)} | self._stored(asked["name"], names)}}

    def _Runs(self, asked: dict[str, Any]) -> dict[str, Any]:
        wanted = json.loads(asked["run"]).get("name")
        kept = {name: run for name, run in self.server.runs.items() if wanted in (None, name)}
        nodes = [self._described(run) | self._stored(name, asked["files"]) for name, run in kept.items()]
        info = {"endCursor": None, "hasNextPage": False}
        return {"project": {"runs": {"edges": [{"node": node} for node in nodes], "pageInfo": info}}}

    def _stored(self, run: str, names: list[str]) -> dict[str, Any]:
        edges = []
        for name in names:
            place = f"/runs/{run}/{name}"
            if place in self.server.files:
                content = self.server.files[place]
                digest = base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()
                facts = {
                    "id": place,
                    "name": name,
                    "url": self.server.url + place,
                    "directUrl": self.server.url + place,
                }
                more = {"sizeBytes": len(content), "mimetype": "", "updatedAt": "2026-01-01T00:00:00", "md5": digest}
                edges.append({"node": facts | more, "cursor": name})
        return {"files": {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}}

    def _bucket(self, run: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "project", "name": run["project"], "entity": {"id": "entity", "name": "me"}}
        facts = {key: run.get(key) for key in ("displayName", "description", "config")}
        return {
            "id": run["name"],
            "name": run["name"],
            "sweepName": None,
            "project": project,
            "historyLineCount": 0,
        } | facts

    def _Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        person = {"id": "me", "entity": "me", "username": "me", "email": "me@localhost", "flags": "{}"}
        return {"viewer": person | {"teams": {"edges": []}}}

    _GetDefaultEntity = _Viewer

    def _CreateRunFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        files = [
            {"name": name, "uploadUrl": f"{self.server.url}/runs/{asked['run']}/{name}"} for name in asked["files"]
        ]
        return {"createRunFiles": {"runID": asked["run"], "uploadHeaders": [], "files": files}}

    def _CreateArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        asked = asked["input"]
        identity = f"artifact-{len(self.server.artifacts)}"
        self.server.artifacts[identity] = asked | {"id": identity, "state": "PENDING", "files": {}}
        artifact = {"id": identity, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": artifact}}

    def _CreateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": {"artifactManifest": self._manifest(asked["artifactID"], asked)}}

    def _UpdateArtifactManifest(self, asked: dict[str, Any]) -> dict[str, Any]:
        identity = asked["artifactManifestID"].removeprefix("manifest-")
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(identity, asked)}}

    def _manifest(self, artifact: str, asked: dict[str, Any]) -> dict[str, Any]:
        file = {"id": "file"}
        if asked["includeUpload"]:
            file |= {"uploadUrl": f"{self.server.url}/manifests/{artifact}", "uploadHeaders": []}
        return {"id": f"manifest-{artifact}", "file": file}

    def _CreateArtifactFiles(self, asked: dict[str, Any]) -> dict[str, Any]:
        nodes = []
        for spec in asked["input"]["artifactFiles"]:
            place = f"/artifacts/{spec['artifactID']}/{spec['name']}"
            node = {"storagePath": place, "uploadUrl": self.server.url + place, "uploadHeaders": []}
            nodes.append({"node": node | {"uploadMultipartUrls": None, "artifact": {"id": spec["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def _CommitArtifact(self, asked: dict[str, Any]) -> dict[str, Any]:
        artifact = self.server.artifacts[asked["artifactID"]]
        artifact["state"] = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": artifact["id"], "digest": artifact["digest"]}}}

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, answer: object, status: int = 200) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def handle(self) -> None:
        with suppress(ConnectionResetError):  # a client that ends does not say goodbye
            super().handle()

    def log_message(self, *_: object) -> None:
        pass
