"""Reading shards into training batches: vidshard.TokenShards beside other readers, local and from S3, in one run.

Writes tokens and latents in vidshard's format (uniform tokens, normal latents: what compresses least) and the same
values in the formats of other readers (`benchmarks.read_peers`), and reads them with every reader that is installed.
"raw" is PyArrow alone, which decodes the same row groups in order and makes no batches. From S3 "raw" fetches the same
bytes by s3fs in ranges of 1 MiB on 16 threads and decodes nothing; "raw, signed" does so by signed addresses.

    python -m benchmarks.read
    python -m benchmarks.read --peers litdata webdataset --s3-ms 20 --kinds "tokens 15 bit"

Time counts from the call on, so that nothing that is read ahead is left out; the start of workers counts too. CPU time
is that of the process, its workers and their threads; it holds on a busy machine too. Ray's workers are not counted.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.read_peers import BATCH, PEERS, Place
from benchmarks.report import Row, report
from benchmarks.slow_s3 import slow_s3
from vidshard.pipeline import storage
from vidshard.pipeline.output.shard_writer import compressed_bytes, parquet_bytes
from vidshard.pipeline.reader.token_shards import TokenShards
from vidshard.pipeline.reader.token_shards_map import TokenShardsMap
from vidshard.pipeline.storage.signed_ranges import signed_range
from vidshard.schemas.tokens import (
    CLIP_FIELDS,
    Payload,
    Provenance,
    latents_payload,
    payload_bytes,
    shard_schema,
    tokens_payload,
)

KINDS: dict[str, Payload] = {
    "tokens 12 bit": tokens_payload((5, 32, 32), 1 << 12),
    "tokens 15 bit": tokens_payload((5, 32, 32), 1 << 15),
    "tokens 18 bit": tokens_payload((5, 32, 32), 1 << 18),
    "latents KL-16": latents_payload((16, 5, 32, 32), keep_logvar=False),
}


def write(folder: Path, payload: Payload, num_clips: int, num_shards: int) -> np.ndarray:
    """Write shards as `vidshard tokenize` does, of made-up clips; returns the values, (clips, values of a clip)."""
    [column] = payload
    provenance = Provenance(
        tokenizer={"name": "made up"},
        weights_sha256="0",
        weights_source="seed:0",
        payload=payload,
        run={},
        identity={},
        code_version="0",
        libraries={},
    )
    schema = shard_schema([], provenance)
    written: list[np.ndarray] = []
    random = np.random.default_rng(0)
    per_shard = num_clips // num_shards
    folder.mkdir(parents=True)
    for shard in range(num_shards):
        size = (per_shard, column.num_values)
        if column.codebook_size is None:
            values = random.standard_normal(size, np.float32).astype(np.float16)
        else:
            values = random.integers(0, column.codebook_size, size).astype(column.dtype)
        written.append(values)
        flat = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=column.arrow_type)
        names = [f"{shard:024x}-00000000-{at:06d}" for at in range(per_shard)]
        made: dict[str, Any] = {
            "clip_id": names, "video_id": [f"{shard:024x}"] * per_shard, "uri": ["/v.mp4"] * per_shard,
            "clip_index": list(range(per_shard)), "part_start_seconds": [None] * per_shard,
            "part_end_seconds": [None] * per_shard, "start_seconds": [2.125 * at for at in range(per_shard)],
            "fps": [8.0] * per_shard, "frame_pts_seconds": [[at / 8 for at in range(17)]] * per_shard,
            "num_valid_frames": [17] * per_shard, "continues_previous": [False] * per_shard,
            "decode_errors": [0] * per_shard, "source_width": [640] * per_shard, "source_height": [480] * per_shard,
            "source_codec": ["h264"] * per_shard, "source_fps": [25.0] * per_shard, "source_rotation": [0] * per_shard,
            "geometry": [{"policy": "crop"}] * per_shard,
            "bucket": ["256x256"] * per_shard,
        }  # fmt: skip
        arrays = [flat if f.name == column.name else pa.array(made[f.name], f.type) for f in schema]
        table = pa.Table.from_arrays(arrays, schema=schema)
        (folder / f"{shard:04d}.parquet").write_bytes(parquet_bytes(table, payload))
    assert len(CLIP_FIELDS) + 1 == len(schema)
    return np.concatenate(written)


def raw(place: Place) -> Iterator[int]:
    """PyArrow alone: the payload of each row group, decoded; no batches."""
    for path in sorted(Path(place.path).glob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=[place.name]).num_rows


def raw_bytes(place: Place, num_clips: int, is_signed: bool) -> Iterator[float]:
    """The bytes of the shards, in ranges of 1 MiB on 16 threads, by s3fs or signed addresses; counts clips by bytes."""
    fs, _ = storage.filesystem(place.path)

    def fetch(wanted: tuple[str, int, int]) -> int:
        path, start, stop = wanted
        data = signed_range(fs, path, start, stop) if is_signed else fs.cat_file(path, start=start, end=stop)
        assert data is not None
        return len(data)

    sizes = {path: fs.info(path)["size"] for path in fs.ls(place.path.removeprefix("s3://"))}
    ranges = [(path, at, min(at + (1 << 20), size)) for path, size in sizes.items() for at in range(0, size, 1 << 20)]
    share = num_clips / sum(sizes.values())
    with ThreadPoolExecutor(16) as pool:
        for num_bytes in pool.map(fetch, ranges):
            yield num_bytes * share


def ours(place: Place, shuffle: bool, workers: int) -> Iterator[int]:
    """vidshard.TokenShards."""
    dataset = TokenShards(place.path, columns=[place.name], batch_size=BATCH, shuffle=shuffle)
    for batch in dataset.loader(workers):
        yield len(batch[place.name])


def cpu_seconds() -> float:
    """CPU time of this process and of all that it started, without the S3 server."""
    tick = os.sysconf("SC_CLK_TCK")
    times: dict[int, tuple[int, float]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = status.read_text().rsplit(")", 1)[1].split()
            times[int(status.parent.name)] = (int(fields[1]), sum(map(int, fields[11:15])) / tick)
    ours = {os.getpid()}
    servers: set[int] = set()
    while more := {pid for pid, (parent, _) in times.items() if parent in ours - servers} - ours:
        ours |= more
        for pid in more:
            with suppress(OSError):
                if b"benchmarks.slow_s3" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    servers.add(pid)
    return sum(times[pid][1] for pid in ours - servers if pid in times)


def measure(read: Callable[[], Iterator[float]], most_seconds: float) -> tuple[float, float]:
    """Clips a second and CPU seconds a clip, for at most so long."""
    clips, started, cpu = 0.0, time.perf_counter(), cpu_seconds()
    for count in read():
        clips += count
        if time.perf_counter() - started > most_seconds:
            break
    seconds, used = time.perf_counter() - started, cpu_seconds() - cpu
    return clips / seconds, used / clips


def measure_apart(read: Callable[[], Iterator[float]], most_seconds: float) -> tuple[float, float]:
    """As `measure`, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, read, most_seconds).result(timeout=60)


def rows_of(kind: str, payload: Payload, places: Mapping[str, Place], arguments: argparse.Namespace) -> list[Row]:
    """A row for each reader; readers take turns, and the best of several turns counts."""
    [column] = payload
    mine = places["vidshard"]
    readers: dict[tuple[str, str, int], Callable[[], Iterator[float]]] = {("raw", "in order", 0): partial(raw, mine)}
    if mine.endpoint:
        for name, is_signed in (("raw", False), ("raw, signed", True)):
            readers[name, "in order", 0] = partial(raw_bytes, mine, arguments.of_kind[kind], is_signed)
    for shuffle in [order == "shuffled" for order in arguments.orders]:
        for workers in arguments.workers:
            how = "shuffled" if shuffle else "in order"
            readers["vidshard", how, workers] = partial(ours, mine, shuffle, workers)
            for name in arguments.peers:
                if workers and name in places:
                    readers[name, how, workers] = partial(PEERS[name].read, places[name], shuffle, workers)
    best: dict[tuple[str, str, int], tuple[float, float]] = {}
    for _ in range(arguments.turns):
        for reader, read in readers.items():
            try:
                is_apart = reader[0] in PEERS and PEERS[reader[0]].is_apart
                rate, cpu = (measure_apart if is_apart else measure)(read, arguments.seconds)
            except Exception as error:  # noqa: BLE001 - one reader's fault is not that of the others
                print(f"{kind}, {reader}: {type(error).__name__}: {error!s:.300}")
                continue
            before = best.get(reader, (0.0, float("inf")))
            best[reader] = (max(rate, before[0]), min(cpu, before[1]))
    raw_rate, raw_cpu = best["raw", "in order", 0]
    return [
        {
            "payload": kind,
            "from": "S3" if mine.endpoint else "disk",
            "reader": reader,
            "order": how,
            "workers": workers,
            "M values/s": round(rate * column.num_values / 1e6, 1),
            "MB/s": round(rate * payload_bytes(payload) / 1e6, 1),
            "x raw time": round(raw_rate / rate, 2),
            "CPU us/clip": round(1e6 * cpu, 1),
            "x raw CPU": round(cpu / max(raw_cpu, 1e-9), 2),
        }
        for (reader, how, workers), (rate, cpu) in best.items()
    ]


def sizes_of(kind: str, payload: Payload, places: Mapping[str, Place], num_clips: int) -> list[Row]:
    """Bits a value on disk, of each format."""
    found: list[Row] = []
    for name, place in places.items():
        if name in ("datasets", "ray.data"):
            continue
        num_bytes = sum(path.stat().st_size for path in Path(place.path).rglob("*") if path.is_file())
        if name == "vidshard":
            num_bytes = 0
            for path in sorted(Path(place.path).glob("*.parquet")):
                num_bytes += compressed_bytes(pa.py_buffer(path.read_bytes()), [place.name])
        bits = 8 * num_bytes / num_clips / payload[0].num_values
        found.append({"payload": kind, "format": name, "bits a value": round(bits, 3)})
    return found


def random_access(place: Place) -> float:
    """Median milliseconds of one clip at random, without a cache."""
    twin = TokenShardsMap(place.path, columns=[place.name], cache_bytes=0)
    picks = np.random.default_rng(1).integers(0, len(twin), 60).tolist()
    times = []
    for pick in picks:
        started = time.perf_counter()
        twin[pick]
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times[10:]))


def upload(places: Mapping[str, Place], endpoint: str) -> dict[str, Place]:
    """Copy the files of each place to the server; the places there."""
    import s3fs

    fs = s3fs.S3FileSystem(endpoint_url=endpoint)
    found: dict[str, Place] = {}
    for name, place in places.items():
        if name in PEERS and not PEERS[name].reads_s3:
            continue
        path = f"s3://{Path(place.path).parent.name}/{Path(place.path).name}"
        if not fs.exists(path):
            with suppress(FileExistsError):
                fs.mkdir(Path(place.path).parent.name, acl="public-read")
            fs.put(place.path + "/", path, recursive=True, ACL="public-read")
        found[name] = replace(place, path=path, endpoint=endpoint)
    return found


def main() -> None:
    """Write, read, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", type=int, default=12_000, help="Clips of tokens; of latents an eighth as many.")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="Longest time for each reader and turn.")
    parser.add_argument("--turns", type=int, default=2, help="Turns of each reader, of which the best counts.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--orders", nargs="+", default=["in order", "shuffled"], choices=["in order", "shuffled"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--peers", nargs="*", default=[name for name, peer in PEERS.items() if peer.is_installed])
    parser.add_argument("--s3-ms", type=float, help="Read from an S3 server too, whose answers come so much later.")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
    folder = Path(tempfile.mkdtemp(prefix="vidshard-read-"))
    rows: list[Row] = []
    sizes: list[Row] = []
    extra: list[Row] = []
    arguments.of_kind = {}
    try:
        with slow_s3(arguments.s3_ms) if arguments.s3_ms else nullcontext() as endpoint:
            if endpoint:
                os.environ["AWS_ENDPOINT_URL"] = endpoint
            for kind in arguments.kinds:
                payload = KINDS[kind]
                [column] = payload
                clips = arguments.clips if column.codebook_size is not None else arguments.clips // 8
                arguments.of_kind[kind] = clips = clips // arguments.shards * arguments.shards
                own = folder / kind.replace(" ", "-").lower()
                values = write(own / "vidshard", payload, clips, arguments.shards)
                facts: dict[str, Any] = {"name": column.name, "dtype": column.dtype, "width": column.num_values}
                places = {"vidshard": Place(path=str(own / "vidshard"), **facts)}
                for name in arguments.peers:
                    convert = PEERS[name].convert
                    if convert is not None:
                        (own / name).mkdir()
                        convert(own / name, values)
                    places[name] = Place(path=str(own / (name if convert else "vidshard")), **facts)
                rows += rows_of(kind, payload, places, arguments)
                if endpoint:
                    rows += rows_of(kind, payload, upload(places, endpoint), arguments)
                sizes += sizes_of(kind, payload, places, clips)
                extra.append({"payload": kind, "one clip at random, ms": round(random_access(places["vidshard"]), 2)})
                shutil.rmtree(own)
    finally:
        shutil.rmtree(folder)
    report("reading", rows, None)
    report("size", sizes, None)
    report("random access", extra, None)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"reading": rows, "size": sizes, "random access": extra}, indent=1))


if __name__ == "__main__":
    main()
