"""Mutations of text that reaches a run: header fields, signals, manifests and addresses; each ends as a value.

``python -m tests.support.fuzz_text --mutations 10000 --seed 0`` prints what became of them, by kind. An escape is an
exception that is not meant for users; the first of each kind is printed with its traceback.
"""

from __future__ import annotations

import argparse
import io
import random
import struct
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from tests.support.videos import Recipe, write_video
from vidshard.pipeline import storage
from vidshard.pipeline.discover import discover
from vidshard.pipeline.output.entries import Inputs
from vidshard.pipeline.plan import VideoPlanner
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.signal_files import read_signal
from vidshard.schemas.errors import VidshardError
from vidshard.schemas.video import ClipSpec, Limits, Part, VideoRef

SPEC = ClipSpec(fps=Fraction(4), num_frames=5, height=32, width=32)

ODD_TEXTS = (
    "", " ", "\0", "\n", "\r\n", "\x1b]52;c;x\a", "\u202e", "😀", "é" * 300, "9" * 400, "9" * 5000,
    "0." + "1" * 5000, "1e308", "-1e308", "nan", "inf", "-0", "NA", "null", "0001", "::", "://", "http://[::1",
    "http://127.0.0.1:1/\0", "s3:///", "s3://", "hf://", "file://", "file:///\0", "zip://a::b", "a::b", "tar://",
    "reference://", "dir://x", "jlab://x", "gist://x", "generic::x", "async_wrapper://x", "data://x", "memory://x",
    "%", "%00", "%ff", "../" * 50, "~nobody-there/x", "C:\\x", "?", "*", "[", "{", "#", "\\", "/" * 300,
    '"', '"\n', ',"', "[" * 20_000, '{"a":' * 20_000, "\ufeff", "18446744073709551615",
)  # fmt: skip
"""Texts that trip parsers of numbers, times, paths and addresses."""


def odd_text(random_: random.Random) -> str:
    """A text to put where a field, a name or an address stands."""
    match random_.randrange(4):
        case 0:
            return random_.choice(ODD_TEXTS)
        case 1:
            return random_.choice(ODD_TEXTS) + random_.choice(ODD_TEXTS)
        case 2:
            return "".join(chr(random_.choice((*range(128), 0x2028, 0xFEFF))) for _ in range(random_.randrange(40)))
        case _:
            text = random_.choice(("clip.mp4", "s3://bucket/key.mp4", "https://h/x.mp4?sig=1", "hf://a/b/c.mp4"))
            at = random_.randrange(len(text) + 1)
            return text[:at] + random_.choice(ODD_TEXTS) + text[at:]


def mutated(data: bytes, random_: random.Random) -> bytes:
    """A few bytes of the first KiB, or anywhere, changed, left out or doubled."""
    out = bytearray(data)
    for _ in range(random_.randrange(1, 4)):
        reach = min(len(out), 1024) if random_.random() < 0.7 else len(out)
        at = random_.randrange(max(1, reach))
        match random_.randrange(4):
            case 0:
                out[at : at + 1] = bytes([random_.randrange(256)])
            case 1:
                del out[at : at + random_.randrange(1, 9)]
            case 2:
                out[at:at] = out[at : at + random_.randrange(1, 99)]
            case _:
                out[at:at] = odd_text(random_).encode(errors="replace")
    return bytes(out)


@cache
def _samples(folder: Path) -> list[tuple[str, bytes]]:
    samples = []
    for suffix in ("mkv", "mp4", "avi", "webm"):
        codec = "libvpx" if suffix == "webm" else "mpeg4"
        path = write_video(folder / f"plain.{suffix}", Recipe(num_frames=6, codec=codec, width=32, height=32))
        samples.append((suffix, path.read_bytes()))
    return samples


def header_field(random_: random.Random, folder: Path) -> str:
    """Open a Matroska file with odd tags, or a file whose header's bytes were changed."""
    path = folder / "odd.mkv"
    if random_.random() < 0.3:
        with av.open(str(folder / "plain.mkv")) as source, av.open(str(path), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            key = random_.choice(("DURATION", "DURATION-eng", "duration", "rotate", "alpha_mode", "title"))
            stream.metadata[key] = random_.choice((odd_text(random_), f"{odd_text(random_)}:00:00.0"))
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
    else:
        suffix, data = random_.choice(_samples(folder))
        path = folder / f"odd.{suffix}"
        path.write_bytes(mutated(data, random_))
    probe_video(VideoRef(uri=str(path), num_bytes=-1), storage.open_binary, Limits(max_pixels=1 << 20))
    return "accepted"


def signal(random_: random.Random, folder: Path) -> str:
    """Read a signal of any form with changed bytes."""
    times, values = np.arange(20) / 10, np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    buffer = io.BytesIO()
    match random_.randrange(5):
        case 0:
            suffix = "npy"
            np.save(buffer, np.column_stack([times, values]))
        case 1:
            suffix = "npz"
            np.savez(buffer, seconds=times, values=values)
        case 2:
            suffix = "npz"
            np.savez_compressed(buffer, seconds=times, values=values)
        case 3:
            suffix = "parquet"
            pq.write_table(pa.table({"seconds": times, "x": values[:, 0], "名": values[:, 1]}), buffer)
        case _:
            suffix = "npy"
            header = odd_text(random_).encode(errors="replace")[:60000]
            buffer.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    path = folder / f"odd.{suffix}"
    path.write_bytes(mutated(buffer.getvalue(), random_))
    read_signal(str(path), storage.open_binary)
    return "accepted"


def manifest(random_: random.Random, folder: Path) -> str:
    """Read a manifest with odd fields, or changed bytes, and plan its rows."""
    uris, notes = [str(folder / "plain.mkv"), odd_text(random_)], [odd_text(random_), "x"]
    columns: dict[str, list[Any]] = {"uri": uris, "note": notes}
    if random_.random() < 0.5:
        times = (0.0, 1e-300, 1e307, 1e308, -1.0, 5.0, float("nan"), float("inf"))
        columns |= {name: [random_.choice(times) for _ in range(2)] for name in ("start_seconds", "end_seconds")}
    table = pa.table({odd_text(random_) or "x" if random_.random() < 0.05 else k: v for k, v in columns.items()})
    buffer = io.BytesIO()
    suffix = random_.choice(("parquet", "csv", "jsonl"))
    if suffix == "parquet":
        pq.write_table(table, buffer)
    elif suffix == "csv":
        pyarrow.csv.write_csv(table, buffer)
    else:
        buffer.write("\n".join(str(row).replace("'", '"') for row in table.to_pylist()).encode(errors="replace"))
    path = folder / f"odd.{suffix}"
    path.write_bytes(mutated(buffer.getvalue(), random_) if random_.random() < 0.5 else buffer.getvalue())
    return _plan(discover([str(path)]).videos)


def address(random_: random.Random, folder: Path) -> str:
    """Plan a row whose address is odd. Addresses of other hosts are left out."""
    uri = odd_text(random_)
    if any(uri.lower().startswith(f"{scheme}://") for scheme in ("http", "https", "s3", "hf")) and "[" not in uri:
        uri = "x" + uri
    return _plan(pa.table({"uri": [uri], "num_bytes": pa.array([-1]), "fingerprint": pa.array([None], pa.string())}))


def _plan(videos: pa.Table) -> str:
    planner = VideoPlanner((SPEC,), Part(), 4, Limits(max_pixels=1 << 20))
    local = [storage.is_local(uri) or uri[:1] == "x" for uri in videos["uri"].to_pylist()]
    inputs = Inputs.of(videos.filter(pa.array(local, pa.bool_())), Part()).videos
    rows = planner(inputs)
    assert rows.num_rows >= inputs.num_rows, "an input vanished"
    return " + ".join(sorted({"planned" if r is None else str(r["reason"]) for r in rows["rejection"].to_pylist()}))


KINDS: dict[str, Callable[[random.Random, Path], str]] = {
    "header fields": header_field,
    "signals": signal,
    "manifests": manifest,
    "addresses": address,
}


def fuzz_text(kind: str, mutations: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """Try mutations of one kind.

    Returns:
        What became of them: "accepted" or "planned", the reasons of rejections, or the error for users; and the
        tracebacks of escapes. A reason ``internal_error`` is an exception that the row boundary caught.
    """
    random_ = random.Random(f"{kind} {seed}")
    _samples(folder)
    outcomes: Counter[str] = Counter()
    escapes = []
    for _ in range(mutations):
        try:
            outcomes[KINDS[kind](random_, folder)] += 1
        except VidshardError as error:
            outcomes[str(getattr(error, "reason", type(error).__name__))] += 1
        except Exception as error:  # noqa: BLE001  counting these is the purpose
            outcomes[f"ESCAPED {type(error).__name__}"] += 1
            escapes.append("".join(traceback.format_exception(error)))
    return outcomes, escapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=10_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    arguments = parser.parse_args()
    for kind in arguments.kind or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            outcomes, escapes = fuzz_text(kind, arguments.mutations, arguments.seed, Path(folder))
        print(f"{kind}: {arguments.mutations} mutations, {len(escapes)} escapes; {dict(outcomes.most_common())}")
        for text in list(dict.fromkeys(text.splitlines()[-1] for text in escapes))[:10]:
            print("   ", text)
        if escapes:
            print(escapes[0])


if __name__ == "__main__":
    main()
