"""An S3 protocol server (moto) whose every answer comes late, as from another building; for `benchmarks.read`.

moto copies a whole object to answer a request of a part of it, 60 MB for 1 MB. Such requests are answered here, from
moto's object, as a store of files answers them.
"""

from __future__ import annotations

import argparse
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def slow_s3(latency_ms: float) -> Iterator[str]:
    """Run a server in a process of its own; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.slow_s3", "--port", str(port), "--latency-ms", str(latency_ms)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if server.poll() is not None:
                    raise RuntimeError("moto's server did not start: is moto[server] installed?") from None
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _part(path: str, first: int, last: int, start_response: Callable[..., Any]) -> list[bytes]:
    """Answer a request of a part of an object, with the bytes from ``first`` to ``last``."""
    from moto.s3.models import s3_backends

    bucket, name = path.lstrip("/").split("/", 1)
    [backend] = s3_backends["123456789012"].values()
    key = backend.get_object(bucket, name)
    if key is None:
        start_response("404 Not Found", [("Content-Length", "0")])
        return []
    with key.lock:
        key._value_buffer.seek(first)
        data = key._value_buffer.read(last + 1 - first)
    headers = {
        "Content-Type": "application/octet-stream",
        "Content-Length": str(len(data)),
        "Content-Range": f"bytes {first}-{first + len(data) - 1}/{key.size}",
        "ETag": key.etag,
        "Last-Modified": key.last_modified_RFC1123,
    }
    start_response("206 Partial Content", list(headers.items()))
    return [data]


def main() -> None:
    """Serve until the process is ended."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    arguments = parser.parse_args()
    inner = DomainDispatcherApplication(create_backend_app)

    def late(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        time.sleep(arguments.latency_ms / 1000)
        bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", environ.get("HTTP_RANGE", ""))
        if environ["REQUEST_METHOD"] == "GET" and bounds is not None:
            return _part(environ["PATH_INFO"], int(bounds[1]), int(bounds[2]), start_response)
        return inner(environ, start_response)

    run_simple("127.0.0.1", arguments.port, late, threaded=True)


if __name__ == "__main__":
    main()
