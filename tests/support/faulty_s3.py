"""A real S3 server with a real network's manners: an HTTP proxy that breaks what it is told to break.

It stands between a client and moto, speaks HTTP/1.1 on sockets, and spoils requests by a script (the next three
puts of this key) or by chance from a seed, so that clients meet what they meet in the wild: answers of 5xx,
connections that are reset before or after the request was carried out, bodies that stop in the middle, and silence.
"""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

ANSWERS = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "unavailable": (503, "ServiceUnavailable", "Service is unable to handle request."),
    "internal_error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "bad_gateway": (502, "BadGateway", "The answer was lost"),
    "denied": (403, "AccessDenied", "Access Denied"),
    "clock": (403, "RequestTimeTooSkewed", "The difference between the request time and the server's is too large."),
    "full": (507, "XMinioStorageFull", "Storage backend has reached its minimum free drive threshold."),
    "timeout": (400, "RequestTimeout", "Your socket connection was not read from or written to in time."),
    "conflict": (409, "ConditionalRequestConflict", "A conflicting operation occurred during the request."),
}
"""Answers of a server instead of carrying out a request: status, code and message."""

KINDS = (*ANSWERS, "reset_before", "reset_after", "lost_answer", "truncate", "short", "stall")
"""
``reset_before`` and ``reset_after``: the connection breaks before or after the request is carried out;
``lost_answer``: it is carried out, the answer is a 503; ``truncate``: half of the announced body comes;
``short``: half of the body comes, and is announced as such; ``stall``: nothing comes.
"""


@dataclass(kw_only=True)
class Fault:
    """Requests that go wrong."""

    kind: str
    method: str
    path: str
    """A pattern that is searched for in path and query."""
    left: float
    skip: int

    def strikes(self, method: str, path: str) -> bool:
        """Whether it is the turn of this request."""
        if self.left <= 0 or self.method not in ("", method) or not re.search(self.path, path):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.left -= 1
        return True


class FaultyS3:
    """The proxy; behaves until it is told otherwise."""

    def __init__(self, backend: str) -> None:
        """In front of the server at this URL."""
        self._backend = urlsplit(backend).netloc
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._chance: tuple[random.Random, float, Sequence[str]] | None = None
        self._released = threading.Event()
        self.seen: list[tuple[str, str, str]] = []
        """Method, path with query, and the kind of the fault or "" of each request."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def misbehave(self, kind: str, *, method: str = "", path: str = "", times: float = 1, skip: int = 0) -> None:
        """Spoil the next requests of a method to a path, after ``skip`` of them; ``times=math.inf`` all."""
        assert kind in KINDS
        with self._lock:
            self._faults.append(Fault(kind=kind, method=method, path=path, left=times, skip=skip))

    def misbehave_at_random(self, seed: int, share: float, kinds: Sequence[str]) -> None:
        """Spoil a share of all requests."""
        assert set(kinds) <= set(KINDS)
        with self._lock:
            self._chance = random.Random(seed), share, kinds

    def behave(self) -> None:
        """No faults from now on; who waits is let go."""
        with self._lock:
            self._faults, self._chance = [], None
        self._released.set()
        self._released = threading.Event()

    def count(self, method: str, path: str = "") -> int:
        """Requests so far."""
        return sum(m == method and re.search(path, p) is not None for m, p, _ in self.seen)

    def next_fault(self, method: str, path: str) -> str:
        """The kind of what happens to this request, "" for nothing."""
        with self._lock:
            kind = next((fault.kind for fault in self._faults if fault.strikes(method, path)), "")
            if not kind and self._chance is not None:
                chance, share, kinds = self._chance
                kind = chance.choice(kinds) if chance.random() < share else ""
            self.seen.append((method, path, kind))
        return kind

    def forward(self, handler: _Handler, body: bytes) -> tuple[HTTPResponse, bytes]:
        """Have the request carried out."""
        connection = HTTPConnection(self._backend, timeout=30)
        try:
            connection.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in handler.headers.items():
                if name.lower() not in ("host", "connection", "transfer-encoding", "content-length", "expect"):
                    connection.putheader(name, value)
            connection.putheader("Host", self._backend)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()

    def wait(self) -> None:
        """Until faults end, at most a minute."""
        self._released.wait(60)

    @contextmanager
    def running(self) -> Iterator[FaultyS3]:
        """Answer requests meanwhile."""
        thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.behave()
            self._server.shutdown()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyS3

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError, ValueError):  # of a connection that was reset
            super().handle()

    def _answer(self) -> None:
        kind = self.proxy.next_fault(self.command, self.path)
        body = self._body()
        if kind == "stall":
            self.proxy.wait()
        if kind in ("stall", "reset_before"):
            self._reset()
        elif kind in ANSWERS:
            self._refuse(kind)
        else:
            response, content = self.proxy.forward(self, body)
            if kind == "reset_after":
                self._reset()
            elif kind == "lost_answer":
                self._refuse("unavailable")
            else:
                self._pass_on(response, content, kind)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer  # noqa: N815  names that http.server asks for

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refuse(self, kind: str) -> None:
        status, code, message = ANSWERS[kind]
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _pass_on(self, response: HTTPResponse, content: bytes, kind: str) -> None:
        shown = content[: len(content) // 2] if kind in ("truncate", "short") else content
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "server", "date"):
                self.send_header(name, value)
        length = response.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", str(len(shown)) if kind == "short" else length)
        self.end_headers()
        self.wfile.write(shown)
        if kind == "truncate":
            self.close_connection = True

    def _reset(self) -> None:
        self.close_connection = True
        # no time to linger: closing sends a reset rather than an end
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        with suppress(OSError):
            self.wfile.close()
