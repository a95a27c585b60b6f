"""An HTTP server on loopback that serves what a test says, and remembers what it was asked."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = bytes | tuple[int, dict[str, str], bytes]


@dataclass
class HttpServer:
    """Files that are served, and the requests for them."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    """Method, path and query of each request."""


_held: list[socket.socket] = []
"""Sockets of ports at which nothing listens."""


def unused_port() -> int:
    """A port of loopback at which nothing listens, nor will as long as this process lives.

    Given back at once, it could become the port of another test's server, which would then get these requests.
    """
    held = socket.socket()
    held.bind(("127.0.0.1", 0))
    _held.append(held)
    return int(held.getsockname()[1])


@contextmanager
def http_server(answer: Callable[[str], Answer | None]) -> Iterator[HttpServer]:
    """Serve for a while; ``answer`` gives the body of a path, or status, headers and body, or None for 404."""
    state = HttpServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            state.asked.append(f"{self.command} {self.path}")
            found = answer(self.path)
            status, headers, body = found if isinstance(found, tuple) else (200, {}, found or b"")
            if found is None:
                status = 404
            elif (wanted := self.headers.get("Range")) and status == 200:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                end = min(int(last or len(body)) + 1, len(body))
                headers = {**headers, "Content-Range": f"bytes {first}-{end - 1}/{len(body)}"}
                status, body = 206, body[int(first) : end]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
