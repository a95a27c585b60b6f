"""A video that keeps a run from being over before a test has done to it what it wants to do.

The video comes over HTTP. For the plan it is read as always; once the plan stands, whoever reads it waits until it is
let go. So a signal or a kill arrives in the middle of the work on any machine, however fast or slow.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class HeldBack:
    """The video, at ``uri``."""

    def __init__(self, video: Path, out: Path, plan: str) -> None:
        """For runs on this output, whose plan stands once it has this file or folder."""
        self._content = video.read_bytes()
        self._plan = out / plan
        self._let_go = threading.Event()
        self._reached = threading.Event()
        self._plan_before = 0
        self.hold()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"video": self}))
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_port}/{video.name}"

    @property
    def is_reached(self) -> bool:
        """Whether a decoder waits for it."""
        return self._reached.is_set()

    def let_go(self) -> None:
        """Whoever waits gets it, and nobody waits any more."""
        self._let_go.set()

    def hold(self) -> None:
        """Again, from the plan of the next run on."""
        self._plan_before = self._planned()
        self._reached.clear()
        self._let_go.clear()

    def read(self) -> bytes:
        """Content of the file, once it may be had."""
        if self._planned() != self._plan_before and not self._let_go.is_set():
            self._reached.set()
            self._let_go.wait()
        return self._content

    def _planned(self) -> int:
        with suppress(FileNotFoundError):
            return self._plan.stat().st_mtime_ns
        return 0

    @contextmanager
    def served(self) -> Iterator[HeldBack]:
        """Answer requests meanwhile."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.let_go()
            self._server.shutdown()
            self._server.server_close()

    @property
    def num_bytes(self) -> int:
        """Size of the file, which is never held back."""
        return len(self._content)


class _Handler(BaseHTTPRequestHandler):
    video: HeldBack

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        """Say what there is."""
        self._begin(200, self.video.num_bytes)

    def do_GET(self) -> None:
        """All of it, or a range."""
        content = self.video.read()
        bounds = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        with suppress(ConnectionError):  # of one who lost patience, and asks again
            if bounds is None:
                self._begin(200, len(content))
                self.wfile.write(content)
            else:
                first, last = int(bounds[1]), min(int(bounds[2] or len(content)), len(content) - 1)
                self._begin(206, last + 1 - first, ("Content-Range", f"bytes {first}-{last}/{len(content)}"))
                self.wfile.write(content[first : last + 1])

    def _begin(self, status: int, num_bytes: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in (*headers, ("Accept-Ranges", "bytes"), ("ETag", '"1"'), ("Content-Length", str(num_bytes))):
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def held_back(video: Path, out: Path, plan: str = "todo.parquet") -> Iterator[HeldBack]:
    """Serve a video that keeps runs on an output from ending."""
    with HeldBack(video, out, plan).served() as held:
        yield held
