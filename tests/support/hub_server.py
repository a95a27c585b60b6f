"""A Hub of our own: as much of its API as creating, listing, uploading to and reading a dataset repository takes.

Large files go through Git LFS: a batch request says which contents are missing, each is put to an address, and a commit
names them by digest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class HubServer:
    """Repositories, contents, and what was asked."""

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files by path, by repository."""
    private: dict[str, bool] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    """Large contents that were put, by SHA-256."""
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    """Title, and the paths added and deleted."""
    asked: list[tuple[str, str]] = field(default_factory=list)
    """Method and path."""
    answers: dict[str, int] = field(default_factory=dict)
    """Status that requests are answered with, by a part of "METHOD /path"."""
    token: str = "hf_thisMustNeverBeSeen"
    ignored: tuple[str, ...] = ()
    """Paths that a .gitignore names."""

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        """Serve on loopback meanwhile."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def put(self) -> list[str]:
        """Addresses to which contents were put."""
        return [path for method, path in self.asked if method == "PUT"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: HubServer, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def reply(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def answer(self) -> None:
        hub = self.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        hub.asked.append((self.command, path))
        authorization = self.headers.get("Authorization")
        for part, status in hub.answers.items():
            if part in f"{self.command} {path}":
                self.reply(status, {"error": f"you came with {authorization}"}, {"X-Error-Message": f"{authorization}"})
                return
        if path.startswith("/lfs/"):
            assert authorization is None, "no token for the store of large files"
            digest = path.removeprefix("/lfs/")
            assert hashlib.sha256(body).hexdigest() == digest
            hub.contents[digest] = body
            self.reply(200)
            return
        if path == "/api/agent-harnesses" or path.startswith("/api/agent"):
            self.reply(404, {})
            return
        if authorization != f"Bearer {hub.token}":
            self.reply(401, {"error": "Invalid username or password."})
            return
        if path == "/api/validate-yaml":
            self.reply(200, {"warnings": [], "errors": []})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.startswith("/api/datasets/"):
            self._api(path.removeprefix("/api/datasets/"), body)
        elif path.startswith("/datasets/"):
            self._files(path.removeprefix("/datasets/"), body)
        else:
            self.reply(404, {}, {"X-Error-Code": "RepoNotFound"})

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request['organization']}/{request['name']}"
        if name in self.hub.repositories:
            self.reply(409, {"error": "it exists"})
            return
        self.hub.repositories[name] = {".gitattributes": b""}
        self.hub.private[name] = request.get("visibility") == "private" or request.get("private") is True
        self.reply(200, {"url": f"{self.hub.url}/datasets/{name}"})

    def _api(self, rest: str, body: bytes) -> None:
        owner, name, *more = rest.split("/")
        files = self.hub.repositories.get(f"{owner}/{name}")
        if files is None:
            self.reply(404, {}, {"X-Error-Code": "RepoNotFound"})
        elif more[:1] == ["tree"]:
            self._tree(files, "/".join(more[2:]))
        elif more[:1] == ["paths-info"]:
            asked = parse_qs(body.decode()).get("paths", []) if b"=" in body else json.loads(body)["paths"]
            found = [_described(path, files[path]) for path in asked if path in files]
            folders = [path for path in asked if any(name.startswith(f"{path}/") for name in files)]
            self.reply(200, found + [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders])
        elif more[:1] == ["preupload"]:
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".parquet") else "regular",
                    "shouldIgnore": file["path"] in self.hub.ignored,
                    "oid": None,
                }
                for file in asked
            ]
            self.reply(200, {"files": modes})
        elif more[:1] == ["commit"]:
            self._commit(f"{owner}/{name}", files, body)
        else:
            self.reply(200, {"id": f"{owner}/{name}", "sha": "0" * 40, "siblings": []})

    def _tree(self, files: dict[str, bytes], folder: str) -> None:
        """List all files below a folder; with ``recursive=False`` those in it, and its folders."""
        below = {path: data for path, data in sorted(files.items()) if path.startswith(f"{folder}/" if folder else "")}
        if folder and not below:
            self.reply(404, {}, {"X-Error-Code": "EntryNotFound"})
            return
        listed = [_described(path, data) for path, data in below.items()]
        if folder and "recursive=false" in self.path.lower():
            inner = {path: path.removeprefix(f"{folder}/") for path in below}
            listed = [_described(path, below[path]) for path, name in inner.items() if "/" not in name]
            folders = sorted({f"{folder}/{name.split('/')[0]}" for name in inner.values() if "/" in name})
            listed += [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
        self.reply(200, listed)

    def _commit(self, repository: str, files: dict[str, bytes], body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        title, touched = lines[0]["value"]["summary"], []
        for line in lines[1:]:
            value = line["value"]
            touched.append(value["path"])
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.contents[value["oid"]]
            else:
                del files[value["path"]]
        self.hub.commits.append((title, touched))
        self.reply(200, {"commitUrl": f"{self.hub.url}/datasets/{repository}/commit/1", "commitOid": "1" * 40})

    def _files(self, rest: str, body: bytes) -> None:
        owner, name, *more = rest.split("/")
        if name.endswith(".git"):
            objects = []
            for asked in json.loads(body)["objects"]:
                place = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}
                known = asked["oid"] in self.hub.contents
                objects.append({"oid": asked["oid"], "size": asked["size"], **({} if known else {"actions": place})})
            self.reply(200, {"transfer": "basic", "objects": objects})
            return
        data = self.hub.repositories.get(f"{owner}/{name}", {}).get("/".join(more[2:]))
        if data is None:
            self.reply(404, {}, {"X-Error-Code": "EntryNotFound"})
        else:
            commit = hashlib.sha1(data).hexdigest()
            headers = {"X-Repo-Commit": commit, "ETag": f'"{commit}"'}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if asked is None:
                self.reply(200, data, headers)
                return
            start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            self.reply(206, data[start : end + 1], headers)


def _described(path: str, data: bytes) -> dict[str, Any]:
    found = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith(".parquet"):
        found["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found
