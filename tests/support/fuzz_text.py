"""Mutations of text that reaches a run: header fields, signals, manifests, archives, datasets; each ends as a value.

``python -m tests.support.fuzz_text --mutations 10000 --seed 0`` prints what became of them, by kind. An escape is an
exception that is not meant for users; the first of each kind is printed with its traceback.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import struct
import tarfile
import tempfile
import traceback
import zipfile
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

from tests.support.lerobot import Shape, make_dataset
from tests.support.videos import Recipe, write_video
from vidshard.pipeline import storage
from vidshard.pipeline.discover import discover
from vidshard.pipeline.output.entries import Inputs
from vidshard.pipeline.plan import VideoPlanner
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.signal_files import read_signal
from vidshard.schemas.errors import VidshardError
from vidshard.schemas.locations import join_options
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


def archive(random_: random.Random, folder: Path) -> str:
    """List a tar, a zip or a Parquet file of videos with changed bytes, and plan its rows."""
    video = next(data for suffix, data in _samples(folder) if suffix == "mp4")
    beside = b'{"caption": "x", "n": 1, "deep": {"y": [1, 2]}}'
    entries = [("a.mp4", video), ("a.json", beside), ("d/b.mp4", video), ("d/b.txt", b"text")]
    suffix, buffer = random_.choice(("tar", "zip", "parquet")), io.BytesIO()
    if suffix == "tar":
        with tarfile.open(fileobj=buffer, mode="w", format=random_.choice((0, 1, 2))) as tar:
            for name, data in entries:
                info = tarfile.TarInfo(name if random_.random() < 0.9 else odd_text(random_)[:20].strip("\0") or "x")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    elif suffix == "zip":
        with zipfile.ZipFile(buffer, "w", random_.choice((0, 8))) as packed:
            for name, data in entries:
                packed.writestr(name, data)
    else:
        cells = [{"bytes": video, "path": "a"}, None]
        pq.write_table(pa.table({"video": cells, "caption": ["x", odd_text(random_)[:99]]}), buffer)
    data = buffer.getvalue()
    at_end = suffix != "tar" and random_.random() < 0.7  # the index is at the end of a zip and of Parquet
    data = mutated(data[::-1], random_)[::-1] if at_end else mutated(data, random_)
    path = folder / f"odd.{suffix}"
    path.write_bytes(data)
    return _plan(discover([str(path)]).videos)


def dataset(random_: random.Random, folder: Path) -> str:
    """List a LeRobot dataset whose metadata has changed bytes or values, and plan its rows."""
    major = random_.choice((2, 3))
    root = folder / f"robot{major}"
    if not root.exists():
        make_dataset(root, Shape(version=f"v{major}.0", lengths=(4, 3), files={"top": (0, 0)}, data_files=(0, 0)))
    name = random_.choice(("info.json", "episodes.jsonl" if major == 2 else "episodes/chunk-000/file-000.parquet"))
    path = root / "meta" / name
    kept = path.read_bytes()
    data = kept
    if name == "info.json" and random_.random() < 0.6:
        info = json.loads(kept)
        values: tuple[Any, ...] = (
            odd_text(random_),
            -1,
            0,
            1e308,
            10**30,
            None,
            [],
            {},
            True,
            [{}],
            {"a": None},
            [1] * 9,
        )
        place = random_.choice((info, info["features"], *info["features"].values()))
        place[random_.choice([*place, odd_text(random_)])] = random_.choice(values)
        data = json.dumps(info).encode(errors="replace")
    elif name.endswith(".parquet"):
        if random_.random() < 0.5:
            record = pq.read_table(path).to_pylist()
            column = random_.choice(list(record[0]))
            value: Any = random_.choice((None, -1, 1 << 62, float("nan"), 1e308, odd_text(random_), [], b"x"))
            table = pa.Table.from_pylist([row | {column: value} for row in record])
            buffer = io.BytesIO()
            pq.write_table(table, buffer)
            data = buffer.getvalue()
        else:
            data = mutated(kept[::-1], random_)[::-1]
    else:
        data = mutated(kept, random_)
    try:
        path.write_bytes(data)
        return _plan(discover([f"lerobot:{root}"]).videos)
    finally:
        path.write_bytes(kept)


def sliced_signal(random_: random.Random, folder: Path) -> str:
    """Read a slice of a signal's file with changed bytes or odd options."""
    suffix = random_.choice(("parquet", "jsonl", "json", "npy"))
    path, buffer = folder / f"odd.{suffix}", io.BytesIO()
    lines = [{"mouse": {"dx": n, "dy": -n}, "keys": ["w"] * (n % 2), "x": n / 2} for n in range(6)]
    if suffix == "parquet":
        table = pa.table({"timestamp": np.arange(6) / 10, "x": [[n, 1.0] for n in range(6)], "episode_index": [3] * 6})
        pq.write_table(table, buffer)
    elif suffix == "npy":
        np.save(buffer, np.arange(12.0).reshape(6, 2))
    elif suffix == "jsonl":
        buffer.write("\n".join(map(json.dumps, lines)).encode())
    else:
        buffer.write(json.dumps({"actions": {str(n): line for n, line in enumerate(lines)}}).encode())
    path.write_bytes(mutated(buffer.getvalue(), random_) if random_.random() < 0.6 else buffer.getvalue())
    odd = odd_text(random_)[:200]
    options = {
        "rows": random_.choice(("1:4", "0:0", "5:2", "0:999999999999", "-1:2", odd)),
        "rate": random_.choice(("10", "0", "nan", "1e308", "-1", odd)),
        "offset": random_.choice(("0.5", "inf", "1e308", odd)),
        "columns": random_.choice(("x", "mouse.dx,keys=keys.w", "mouse", ",", "x,x", odd)),
        "episode": random_.choice(("3", "4", "x", odd)),
        "key": random_.choice(("actions", "x", odd)),
        "times": str(path),
    }
    chosen = {name: options[name] for name in random_.sample(list(options), random_.randrange(5))}
    read_signal(join_options(str(path), chosen), storage.open_binary)
    return "accepted"


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
    "archives": archive,
    "datasets": dataset,
    "slices of signals": sliced_signal,
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
