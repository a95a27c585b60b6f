"""A Hub of our own that serves files, and commands that use it. `hub_server` has the Hub of datasets that are written.

The library reads its environment when it is imported, so every test that fetches does it in a process of its own.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

TOKEN = "hf_thisMustNeverBeSeen"
OLD, NEW = "0123456789abcdef" * 2 + "01234567", "fedcba9876543210" * 2 + "fedcba98"


@dataclass
class Hub:
    """Content and answers of a Hub, and the requests that it got."""

    url: str = ""
    files: dict[tuple[str, str, str], bytes] = field(default_factory=dict)
    """Content by (repository, commit, path)."""
    branches: dict[str, str] = field(default_factory=lambda: {"main": OLD})
    refusals: dict[str, tuple[int, dict[str, str]]] = field(default_factory=dict)
    """Repositories that are answered with a status and headers."""
    storage: dict[str, bytes] = field(default_factory=dict)
    """Content of the other host, which holds large files, by path."""
    cut_off: bool = False
    """Makes downloads end in their middle."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path) of each that asked for a file."""
    tokens: set[str | None] = field(default_factory=set)
    """``Authorization`` headers."""

    def asked(self, method: str) -> list[str]:
        return [path for asked, path in self.requests if asked == method]


class HubHandler(BaseHTTPRequestHandler):
    """As much of the Hub as serves files: ``/OWNER/REPO/resolve/REVISION/PATH``."""

    def __init__(self, hub: Hub, *args: object) -> None:
        self.hub = hub
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, authorization = self.hub, self.headers.get("Authorization")
        if self.path in hub.storage:
            assert authorization is None  # no token for other hosts
            self.reply(200, {}, hub.storage[self.path])
            return
        if "/resolve/" not in self.path:  # the library keeps a registry of its own, for its User-Agent
            self.reply(404, {})
            return
        hub.requests.append((self.command, self.path))
        hub.tokens.add(authorization)
        owner, name, _, revision, path = unquote(self.path).lstrip("/").split("/", 4)
        repository = f"{owner}/{name}"
        commit = hub.branches.get(revision, revision)
        if repository in hub.refusals:
            status, headers = hub.refusals[repository]
            self.reply(status, {**headers, "X-Error-Message": f"you came with {authorization}"})
        elif repository not in {known for known, _, _ in hub.files}:
            self.reply(404, {"X-Error-Code": "RepoNotFound"})
        elif commit not in {known for _, known, _ in hub.files}:
            self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        elif (repository, commit, path) not in hub.files:
            self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        else:
            content = hub.files[repository, commit, path]
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            linked = {"X-Repo-Commit": commit, "X-Linked-Etag": tag, "X-Linked-Size": str(len(content))}
            if content in hub.storage.values():
                location = next(path for path, stored in hub.storage.items() if stored == content)
                self.reply(302, {**linked, "Location": hub.url.replace("127.0.0.1", "localhost") + location})
            else:
                self.reply(200, {**linked, "ETag": tag}, content)

    def reply(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if self.hub.cut_off else content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A Hub on loopback that has one file."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(HubHandler, hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    hub.files["owner/models", OLD, "checkpoints/tiny.ckpt"] = b"old weights"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(hub: Hub, home: Path, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command whose Hub is ours; what it prints is checked for the token."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "RAY_")) and "proxy" not in k.lower()}
    ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    result = subprocess.run(
        [*map(str, command)], env={**clean, **ours, **environment}, capture_output=True, text=True, timeout=300
    )
    assert TOKEN not in result.stdout + result.stderr
    return result
