"""Reading shards into training batches: vidshard.TokenShards beside other readers of the same files.

Writes tokens and latents in vidshard's format (uniform tokens, normal latents: what compresses least), and reads them
with every reader that is installed: `datasets` (streaming), `ray.data` (with --ray), and PyArrow alone, which reads the
same bytes row group by row group without making batches.

    python -m benchmarks.read --datasets
    python -m benchmarks.read --workers 0 --datasets

CPU time is that of the process that reads; it holds on a busy machine too, and is not known where workers read.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.report import Row, report
from vidshard.pipeline.output.shard_writer import parquet_bytes
from vidshard.pipeline.reader.token_shards import TokenShards, TokenShardsMap
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
    "tokens 15 bit": tokens_payload((5, 32, 32), 1 << 15),
    "tokens 18 bit": tokens_payload((5, 32, 32), 1 << 18),
    "latents KL-16": latents_payload((16, 5, 32, 32), keep_logvar=False),
}
BATCH = 32


def write(folder: Path, payload: Payload, num_clips: int, num_shards: int) -> None:
    """Write shards as `vidshard tokenize` does, of made-up clips."""
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
    random = np.random.default_rng(0)
    per_shard = num_clips // num_shards
    folder.mkdir(parents=True)
    for shard in range(num_shards):
        size = (per_shard, column.num_values)
        if column.codebook_size is None:
            values = random.standard_normal(size, np.float32).astype(np.float16)
        else:
            values = random.integers(0, column.codebook_size, size).astype(column.dtype)
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


def raw(folder: str, name: str) -> Iterator[int]:
    """PyArrow alone: the payload of each row group, decoded; no batches."""
    for path in sorted(Path(folder).glob("*.parquet")):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=[name]).num_rows


def ours(folder: str, name: str, *, shuffle: bool, workers: int) -> Iterator[int]:
    """vidshard.TokenShards."""
    dataset = TokenShards(folder, columns=[name], batch_size=BATCH, shuffle=shuffle)
    for batch in dataset.loader(workers):
        yield len(batch[name])


def hugging_face(folder: str, name: str, *, shuffle: bool, workers: int) -> Iterator[int]:
    """datasets, streaming, in its fastest form: Arrow batches to torch, without Python lists."""
    import datasets

    files = sorted(str(path) for path in Path(folder).glob("*.parquet"))
    stream: Any = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, columns=[name])
    if shuffle:
        stream = stream.shuffle(seed=0, buffer_size=1000)
    loader: Any = torch.utils.data.DataLoader(stream.with_format("torch"), batch_size=BATCH, num_workers=workers)
    for batch in loader:
        yield len(batch[name])


def ray_data(folder: str, name: str, *, shuffle: bool) -> Iterator[int]:
    """ray.data.iter_torch_batches, with a local shuffle buffer; Ray has its own workers."""
    import ray

    ray.init(num_cpus=2, log_to_driver=False, ignore_reinit_error=True, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    dataset = ray.data.read_parquet(folder, columns=[name])
    buffer = 1000 if shuffle else None
    for batch in dataset.iter_torch_batches(batch_size=BATCH, local_shuffle_buffer_size=buffer):
        yield len(batch[name])


def measure(read: Callable[[], Iterator[int]], most_seconds: float) -> tuple[int, float, float]:
    """Clips, seconds, and CPU seconds of this process and its threads; for at most so long."""
    started, cpu = time.perf_counter(), time.process_time()
    clips = 0
    for count in read():
        clips += count
        if time.perf_counter() - started > most_seconds:
            break
    return clips, time.perf_counter() - started, time.process_time() - cpu


def rows_of(kind: str, payload: Payload, folder: Path, arguments: argparse.Namespace) -> list[Row]:
    """A row for each reader."""
    [column] = payload
    name, place = column.name, str(folder)
    readers: dict[str, Callable[[], Iterator[int]]] = {"pyarrow, raw": lambda: raw(place, name)}
    choices = [(shuffle, workers) for shuffle in (False, True) for workers in arguments.workers]
    for shuffle, workers in choices:
        how = f"{'shuffled' if shuffle else 'in order'}, {workers} workers"
        readers[f"vidshard, {how}"] = lambda s=shuffle, w=workers: ours(place, name, shuffle=s, workers=w)  # type: ignore[misc]
        if arguments.datasets:
            readers[f"datasets, {how}"] = lambda s=shuffle, w=workers: hugging_face(place, name, shuffle=s, workers=w)  # type: ignore[misc]
    if arguments.ray:
        for shuffle in (False, True):
            how = "shuffled" if shuffle else "in order"
            readers[f"ray.data, {how}"] = lambda s=shuffle: ray_data(place, name, shuffle=s)  # type: ignore[misc]
    rows: list[Row] = []
    base = 0.0
    for reader, read in readers.items():
        for _ in range(2):  # the first time warms caches and imports
            clips, seconds, cpu = measure(read, arguments.seconds)
        rate, own = clips / seconds, reader.endswith(("raw", " 0 workers"))
        base = base or cpu / clips
        rows.append(
            {
                "payload": kind,
                "reader": reader,
                "clips/s": round(rate),
                "values/s": f"{rate * column.num_values / 1e6:.1f} M",
                "MB/s": round(rate * payload_bytes(payload) / 1e6),
                "CPU us/clip": f"{1e6 * cpu / clips:.0f}" if own else "",
                "x raw CPU": f"{cpu / clips / base:.2f}" if own else "",
            }
        )
    return rows


def random_access(payload: Payload, folder: Path) -> float:
    """Median milliseconds of one clip at random, without a cache."""
    twin = TokenShardsMap(str(folder), columns=[payload[0].name], cache_bytes=0)
    picks = np.random.default_rng(1).integers(0, len(twin), 60).tolist()
    times = []
    for pick in picks:
        started = time.perf_counter()
        twin[pick]
        times.append(1000 * (time.perf_counter() - started))
    return float(np.median(times[10:]))


def main() -> None:
    """Write, read, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", type=int, default=6000, help="Clips of each payload.")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=4.0, help="Longest time for each reader.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--datasets", action="store_true", help="Measure datasets too.")
    parser.add_argument("--ray", action="store_true", help="Measure ray.data too.")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="vidshard-read-"))
    rows: list[Row] = []
    extra: list[Row] = []
    try:
        for kind in arguments.kinds:
            payload = KINDS[kind]
            clips = arguments.clips if payload[0].codebook_size is not None else arguments.clips // 8
            place = folder / kind.replace(" ", "-")
            write(place, payload, clips, arguments.shards)
            rows += rows_of(kind, payload, place, arguments)
            metadata = [pq.read_metadata(path) for path in sorted(place.glob("*.parquet"))]
            at = next(c for c in range(metadata[0].num_columns) if payload[0].name in metadata[0].schema.column(c).path)
            stored = sum(
                m.row_group(g).column(at).total_compressed_size for m in metadata for g in range(m.num_row_groups)
            )
            extra.append(
                {
                    "payload": kind,
                    "one clip at random, ms": round(random_access(payload, place), 2),
                    "bits a value on disk": round(
                        8 * stored / (clips // arguments.shards * arguments.shards) / payload[0].num_values, 3
                    ),
                }
            )
    finally:
        shutil.rmtree(folder)
    report("reading", rows, None)
    report("random access and size", extra, None)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"reading": rows, "random access and size": extra}, indent=1))


if __name__ == "__main__":
    main()
