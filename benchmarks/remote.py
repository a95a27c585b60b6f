"""Decoding cost of videos on a web server beside that of the same files on disk.

    python -m benchmarks.remote [--repeats 5] [--json PATH]

Two videos of moving noise in h264, 640x360 and 1280x720, are encoded once and kept in the temporary folder. A server on
loopback, in a process of its own, serves ranges of them. The small one is fetched whole, the large one in ranges. Each
video is opened and decoded to 8 frames per second and 256x256 in the sandbox, as a run does it.

* Figures are seconds by the clock and of processor time, child processes included and the server not. Each is the
  median of the repeats, which alternate between disk and server, after one that is not counted.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from fractions import Fraction
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import click
import numpy as np

from benchmarks.processes import tree_seconds
from benchmarks.report import Row, report
from vidshard.pipeline import storage
from vidshard.pipeline.decode_stage import SpanDecoder, probe
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import VideoError
from vidshard.schemas.video import ClipSpec, VideoRef

SPEC = ClipSpec(fps=Fraction(8), num_frames=17, height=256, width=256)
SIZES = {"whole": (640, 360, 8), "in ranges": (1280, 720, 12)}
"""Width, height and seconds of each video."""


def corpus(folder: Path) -> dict[str, Path]:
    """The videos by the way in which they are fetched."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, (width, height, seconds) in SIZES.items():
        path = found[name] = folder / f"{height}p-{seconds}s.mp4"
        if path.exists():
            continue
        texture = np.random.default_rng(0).integers(0, 256, (height * 2, width * 2, 3)).astype(np.uint8)
        texture = texture // 2 + np.roll(texture, 1, axis=1) // 2
        with av.open(f"{path}.part", "w", format="mp4") as output:
            stream = output.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.gop_size = width, height, 50
            stream.codec_context.options = {"preset": "ultrafast", "crf": "24"}
            for number in range(25 * seconds):
                y, x = number % height, 3 * number % width
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(texture[y : y + height, x : x + width]))
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        os.replace(f"{path}.part", path)
    return found


class _Ranges(SimpleHTTPRequestHandler):
    """Serves files, and ranges of them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first, last = (int(wanted[1]), min(int(wanted[2] or size), size - 1)) if wanted else (0, size - 1)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        with path.open("rb") as file, suppress(ConnectionError):
            self.wfile.flush()
            while first <= last:
                first += os.sendfile(self.connection.fileno(), file.fileno(), first, last + 1 - first)

    def log_message(self, *_args: object) -> None:
        pass


def decode(uri: str) -> int:
    """Open and decode a video; the number of clips."""
    header = probe(VideoRef(uri=uri, num_bytes=-1))
    if isinstance(header, VideoError):
        raise header
    decoder = SpanDecoder(spec=SPEC, max_clips=100, clips_per_pass=8)
    spans = plan_spans(header, SPEC, 8)
    results = [result for span in spans for result in decoder.decode_together([span], [SPEC], storage.fingerprint(uri))]
    for result in results:
        if result.error is not None:
            raise result.error
    return sum(len(result.clips) for result in results)


@click.command(help=__doc__)
@click.option("--repeats", default=5, show_default=True)
@click.option("--json", "json_path", metavar="PATH")
@click.option("--serve", hidden=True)
def main(repeats: int, json_path: str | None, serve: str | None) -> None:
    """Print the table."""
    if serve is not None:
        os.chdir(serve)
        with ThreadingHTTPServer(("127.0.0.1", 0), _Ranges) as listening:
            print(listening.server_port, flush=True)
            listening.serve_forever()
    folder = Path(tempfile.gettempdir()) / "vidshard-remote-benchmark"
    videos = corpus(folder)
    command = [sys.executable, "-m", "benchmarks.remote", "--serve", str(folder)]
    rows: list[Row] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        try:
            for name, path in videos.items():
                uris = {"disk": str(path), "server": f"http://127.0.0.1:{port}/{path.name}"}
                clock: dict[str, list[float]] = {where: [] for where in uris}
                processor: dict[str, list[float]] = {where: [] for where in uris}
                for repeat in range(repeats + 1):
                    for where, uri in uris.items():
                        started, used = time.perf_counter(), tree_seconds(os.getpid(), without=server.pid)
                        decode(uri)
                        if repeat:
                            clock[where].append(time.perf_counter() - started)
                            processor[where].append(tree_seconds(os.getpid(), without=server.pid) - used)
                row: Row = {"fetched": name, "MB": round(path.stat().st_size / 1e6, 1)}
                for where in uris:
                    row[f"{where}, s"] = round(statistics.median(clock[where]), 3)
                    row[f"{where}, CPU s"] = round(statistics.median(processor[where]), 3)
                rows.append(row)
        finally:
            server.kill()
    report("remote", rows, json_path)


if __name__ == "__main__":
    main()
