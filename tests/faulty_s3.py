"""A proxy before an S3 server that misbehaves on purpose: throttling, errors, broken and hanging connections."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("slow_down", "error", "reset", "lost_answer", "half_answer", "hang")
"""Answers 503 SlowDown; 500; a connection that is reset before anything was done; done, and the connection reset before
the answer; an answer of which half is missing; one that does not come until the client gives up."""

_ERROR = b"<?xml version='1.0'?><Error><Code>%b</Code><Message>made for a test</Message></Error>"


class FaultyS3:
    """The proxy; behaves until it is told otherwise."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.rng = random.Random(0)
        self.share = 0.0
        """Of requests that go wrong."""
        self.faults: tuple[str, ...] = FAULTS
        self.path_part = ""
        """Only requests with this in their path go wrong."""
        self.counts: Counter[str] = Counter()
        self.ended = threading.Event()
        self._lock = threading.Lock()

    def misbehave(self, share: float, *faults: str, seed: int = 0, path_part: str = "") -> None:
        """Let this share of the requests go wrong from now on."""
        with self._lock:
            self.rng, self.share, self.faults, self.path_part = random.Random(seed), share, faults or FAULTS, path_part
            self.counts.clear()

    def next_fault(self, path: str) -> str | None:
        """What happens to the next request."""
        with self._lock:
            self.counts["requests"] += 1
            if self.path_part not in path or self.rng.random() >= self.share:
                return None
            fault = self.rng.choice(self.faults)
            self.counts[fault] += 1
            return fault


@contextmanager
def faulty_s3_server(target: str) -> Iterator[tuple[str, FaultyS3]]:
    """(URL, control) of a proxy before the server at ``target``."""
    control = FaultyS3(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, TimeoutError):
                self.close_connection = True

        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                body = self._chunks()
            fault = control.next_fault(self.path)
            if fault == "hang":
                control.ended.wait(30)
                return self._reset()
            if fault == "reset":
                return self._reset()
            if fault in ("slow_down", "error"):
                status, code = (503, b"SlowDown") if fault == "slow_down" else (500, b"InternalError")
                return self._answer(status, [("Content-Type", "application/xml")], _ERROR % code)
            upstream = http.client.HTTPConnection(control.target.hostname or "", control.target.port, timeout=60)
            headers = {
                k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "content-length")
            }
            upstream.request(self.command, self.path, body, headers)
            response = upstream.getresponse()
            data = response.read()
            upstream.close()
            if fault == "lost_answer":
                return self._reset()
            skip = ("connection", "transfer-encoding", "server", "date")
            kept = [(k, v) for k, v in response.getheaders() if k.lower() not in skip]
            if fault == "half_answer" and len(data) > 1:
                self._answer(response.status, kept, data, cut=len(data) // 2)
                return self._reset()
            return self._answer(response.status, kept, data)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do  # noqa: N815

        def _chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, cut: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers:
                if name.lower() != "content-length" or self.command == "HEAD":
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data[:cut])

        def _reset(self) -> None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", control
        control.ended.set()
        server.shutdown()
