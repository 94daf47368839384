"""A small Hugging Face hub on this machine, as far as huggingface_hub asks it: make, list, upload and read model
repositories of small files. It keeps commits, so that a revision can be pinned. Large-file storage is not spoken."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "a" * 34


class Hub(ThreadingHTTPServer):
    """`repositories`: commits of each, oldest first, as (40 hex digits, {path: bytes}); `requests`: what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.requests: list[str] = []
        self.fails: dict[str, int] = {}  # status for addresses that hold a text
        self.url = f"http://127.0.0.1:{self.server_port}"

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """A new commit that adds `files` to the last one; returns its hash."""
        history = self.repositories.setdefault(repository, [])
        tree = {**(history[-1][1] if history else {}), **files}
        digest = hashlib.sha1(repr((repository, len(history), sorted(tree.items()))).encode()).hexdigest()
        history.append((digest, tree))
        return digest


@contextmanager
def hub() -> Iterator[Hub]:
    """A running hub."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self._path()
        if path is None:
            return None
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.server.repositories:
                return self._send(
                    409, {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
                )
            self.server.repositories[name] = []
            self.server.commit(name, {".gitattributes": b""})
            return self._send(200, {"url": f"{self.server.url}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        _, _, kind, owner, name, verb, _ = path.split("/")
        if kind != "models" or f"{owner}/{name}" not in self.server.repositories:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if verb == "preupload":
            asked = json.loads(body)["files"]
            plain = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self._send(200, {"files": [{"path": file["path"], **plain} for file in asked]})
        assert verb == "commit", path
        lines = [json.loads(line) for line in body.splitlines()]
        assert lines[0]["key"] == "header" and {line["key"] for line in lines[1:]} == {"file"}, lines[0]
        files = {line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines[1:]}
        digest = self.server.commit(f"{owner}/{name}", files)
        address = f"{self.server.url}/{owner}/{name}/commit/{digest}"
        return self._send(200, {"success": True, "commitOid": digest, "commitUrl": address, "hookOutput": ""})

    def do_GET(self) -> None:
        path = self._path()
        if path is None:
            return None
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            (owner, name), verb, revision = parts[2:4], (*parts[4:], "info")[0], (*parts[5:], "main")[0]
        elif len(parts) >= 4:
            owner, name, verb, revision = parts[:4]
        else:  # what else the library asks for, and does without
            return self._send(404, {"error": "there is no such address"})
        history = self.server.repositories.get(f"{owner}/{name}")
        if history is None:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        digest, files = next((c for c in reversed(history) if revision in ("main", c[0])), (None, {}))
        if digest is None:
            return self._send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        if verb in ("info", "revision"):
            siblings = [{"rfilename": file} for file in files]
            return self._send(200, {"id": f"{owner}/{name}", "sha": digest, "siblings": siblings, "tags": []})
        if verb == "tree":
            rows = [{"type": "file", "path": p, "size": len(b), "oid": _oid(b)} for p, b in files.items()]
            return self._send(200, rows)
        assert verb == "resolve", path
        file = "/".join(parts[4:])
        if file not in files:
            return self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        facts = {"ETag": f'"{_oid(files[file])}"', "X-Repo-Commit": digest, "Accept-Ranges": "none"}
        return self._send(200, files[file], facts)

    do_HEAD = do_GET

    def _path(self) -> str | None:
        """The address asked for, noted; None when it is one that fails, which is answered here."""
        self.server.requests.append(f"{self.command} {self.path}")
        for text, status in self.server.fails.items():
            if text in self.path:
                return self._send(status, {"error": "so it shall be"})
        return unquote(urlsplit(self.path).path)

    def _send(self, status: int, answer: object, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/octet-stream" if answer is content else "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _oid(content: bytes) -> str:
    """What git calls a blob of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
