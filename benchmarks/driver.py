"""Driver's cost per clip of a run on many GPUs, with stages that only make rows: part of ``benchmarks.scale``.

A Ray with declared GPUs runs the job's own flow, writers and commits. Its decoders give frames of a hundredth of the
real size, and its encoders random payloads, both without computing. Blocks have a hundredth of the real size too: Ray
handles as many of them for each clip as in a real run. Every clip has its own values and id, as equal ones compress
away.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext

from benchmarks.report import Row
from vidshard.jobs.runtime.cluster import ray_cluster
from vidshard.jobs.runtime.executor import ClusterExecutor
from vidshard.jobs.runtime.interrupts import Feed
from vidshard.jobs.tokenization.collect import SpanCounter
from vidshard.pipeline.output.commit import Committer, SpanAccount
from vidshard.pipeline.output.shard_writer import ShardSettings
from vidshard.pipeline.resources import StageResources
from vidshard.pipeline.rows import WORK_NUMBER, WORK_SCHEMA, EncodeStats, add_clips, add_payload, span_row
from vidshard.schemas.tokens import Payload, Provenance, latents_payload, tokens_payload
from vidshard.schemas.video import Clip, ClipSpec, Geometry, Span, SpanClips, VideoSource

CLIPS_PER_SPAN = 10
SPANS_PER_TASK, SPANS_PER_CALL = 8, 13
"""Spans per decoder task and per GPU encoder call, as ``plan_resources`` chooses them for ten clips a span."""
FRAMES_SHARE = 100
SPEC = ClipSpec(fps=Fraction(8), num_frames=17, height=256, width=256)
PAYLOADS = {
    "tokens": tokens_payload((5, 32, 32), 32768),
    "KL-4": latents_payload((4, 5, 32, 32), keep_logvar=False),
    "KL-16": latents_payload((16, 5, 32, 32), keep_logvar=False),
}
SHARD_BYTES = 128 << 20


def provenance_of(payload: Payload) -> Provenance:
    """Make the provenance of shards that no tokenizer made."""
    return Provenance(
        tokenizer={},
        weights_sha256="0",
        weights_source="seed:0",
        payload=payload,
        run={},
        identity={},
        code_version="0",
        libraries={},
    )


def work_rows(first: int, count: int) -> pa.Table:
    """Rows of a work list: spans of ten clips, each of a video of its own."""
    spans = [
        Span(
            video_id=f"{number * 2654435761 % (1 << 96):024x}",
            uri=f"s3://a-bucket/videos/{number:012d}.mp4",
            time_base=Fraction(1, 90000),
            grid_start_pts=0,
            first_clip=0,
            end_clip=None,
            duration_seconds_from_header=CLIPS_PER_SPAN * 17 / 8,
            source=VideoSource(width=1280, height=720, codec="h264", fps=30.0, rotation_degrees=0),
        )
        for number in range(first, first + count)
    ]
    table = pa.Table.from_pylist([span_row(span, SPEC, None) for span in spans], schema=WORK_SCHEMA)
    return table.append_column(WORK_NUMBER, pa.array(range(first, first + count), pa.int64()))


@dataclass(frozen=True)
class StubDecoder:
    """Decode stage that opens no video."""

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Give each span ten clips of frames of a hundredth of their size."""
        geometry = Geometry(policy="crop", scaled_width=455, scaled_height=256, left=99, top=0)
        for at in range(rows.num_rows):
            row = rows.slice(at, 1)
            video_id = row["video_id"][0].as_py()
            clips = [
                Clip(
                    video_id=video_id,
                    clip_index=index,
                    frames=np.zeros((17, 25, 26, 3), np.uint8),
                    start_seconds=index * 17 / 8,
                    frame_pts_seconds=index * 17 / 8 + np.arange(17) / 8,
                    num_valid_frames=17,
                    geometry=geometry,
                )
                for index in range(CLIPS_PER_SPAN)
            ]
            yield add_clips(row, SpanClips(clips=clips), uri=row["uri"][0].as_py(), start_seconds=0.0, seconds=0.01)


class StubEncoder:
    """Encode stage that computes nothing: values are cut out of random ones at random places."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._random = np.random.default_rng()
        [column] = payload
        count = max(1 << 22, 8 * column.num_values)
        if column.codebook_size is None:
            self._values = self._random.standard_normal(count, np.float32).astype(np.float16)
        else:
            self._values = self._random.integers(0, column.codebook_size, count).astype(column.dtype)

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Give each clip random values."""
        [column] = self._payload
        starts = self._random.integers(0, len(self._values) - column.num_values, rows.num_rows * CLIPS_PER_SPAN)
        clips = [self._values[start : start + column.num_values] for start in starts]
        return add_payload(
            rows, {column.name: clips}, self._payload, EncodeStats(seconds=0.1, wait_seconds=0.0, num_slots=len(clips))
        )


@dataclass(frozen=True)
class StubSpec:
    """Stands for ``EncoderSpec``."""

    payload: Payload

    def encoder(self) -> StubEncoder:
        """Make an encoder."""
        return StubEncoder(self.payload)


def measure_driver(name: str, kind: str, *, num_gpus: int, num_clips: int) -> Row:
    """Measure the processor time of the driver's process for each clip, after the first quarter of the clips.

    Args:
        name: of ``PAYLOADS``.
        kind: ``disk``, or ``S3`` for a server on this machine.
        num_gpus: declared GPUs, with an encoder process each.
    """
    payload, num_spans = PAYLOADS[name], num_clips // CLIPS_PER_SPAN
    with _output(kind) as out, tempfile.TemporaryDirectory(prefix="vs-") as files:
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=num_gpus,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
            object_store_memory=1 << 30,
            _temp_dir=files,
        )
        try:
            with ray_cluster(address=None, object_store_bytes=None, verbose=False) as cluster:
                executor = ClusterExecutor(cluster=cluster)
                row: Row = {"payload": name, "store": kind, "GPUs": num_gpus}
                return row | _run(executor, out, payload, num_spans)
        finally:
            ray.shutdown()


def _run(executor: ClusterExecutor, out: str, payload: Payload, num_spans: int) -> Row:
    DataContext.get_current().target_max_block_size = (128 << 20) // FRAMES_SHARE
    settings = ShardSettings(
        out=out,
        buckets=((SPEC, payload),),
        provenance=provenance_of(payload),
        shard_bytes=SHARD_BYTES,
        commit_seconds=600,
    )
    resources = StageResources(
        encode_workers=int(executor.num_gpus),
        gpus_per_worker=1.0,
        cpus_per_worker=0.01,
        decode_workers=None,
        rows_per_task=SPANS_PER_TASK,
        rows_per_batch=SPANS_PER_CALL,
    )
    account = SpanAccount(num_spans)
    committer = Committer(settings, executor.open_writers(settings), account)
    counter = SpanCounter(is_awaited=np.ones(num_spans, np.bool_))
    receipts = executor.run(
        work_rows(0, num_spans),
        decoder=StubDecoder(),  # type: ignore[arg-type]
        encoder=StubSpec(payload),  # type: ignore[arg-type]
        resources=resources,
        writers=committer.writers,
    )
    begun = None
    for rows in _as_they_come(receipts):
        if rows is not None:
            counter.take(rows)
        committer.tick()
        if begun is None and 4 * counter.clips >= num_spans * CLIPS_PER_SPAN:
            begun = counter.clips, time.process_time(), time.monotonic()
    committer.finish()
    assert begun is not None
    assert account.num_open == 0
    clips = counter.clips - begun[0]
    driver_seconds, seconds = time.process_time() - begun[1], time.monotonic() - begun[2]
    committer.close()
    committed = committer.committed
    return {
        "clips": counter.clips,
        "driver ms/clip": round(1000 * driver_seconds / clips, 3),
        "clips/s of one core": round(clips / driver_seconds),
        "clips/s here": round(clips / seconds),
        "bytes/clip on disk": round(committed.file_bytes / committed.num_clips),
        "shards": committed.num_shards,
    }


def _as_they_come(receipts: Iterator[pa.Table]) -> Iterator[pa.Table | None]:
    """Receipts, and None after each second without any: writers that are full wait for the driver's commits."""
    feed = Feed(receipts)
    while True:
        try:
            yield feed.take(1.0)
        except StopIteration:
            return


@contextmanager
def _output(kind: str) -> Iterator[str]:
    """A folder on the local disk, or in a bucket of an S3 server of its own."""
    if kind == "disk":
        with tempfile.TemporaryDirectory(prefix="vidshard-scale-") as folder:
            yield folder
        return
    with tempfile.TemporaryDirectory() as folder:
        address = Path(folder) / "address"
        server = subprocess.Popen([sys.executable, "-c", _SERVER, str(address)])
        try:
            while not address.exists():
                time.sleep(0.05)
            os.environ |= {
                "AWS_ENDPOINT_URL": address.read_text(),
                "AWS_ACCESS_KEY_ID": "benchmark",
                "AWS_SECRET_ACCESS_KEY": "benchmark",
                "AWS_DEFAULT_REGION": "us-east-1",
            }
            yield "s3://benchmark/out"
        finally:
            server.kill()
            server.wait()


_SERVER = """
import sys, os, time
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
url = f"http://{host}:{port}"
import boto3
keys = {"aws_access_key_id": "benchmark", "aws_secret_access_key": "benchmark", "region_name": "us-east-1"}
boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket="benchmark")
with open(sys.argv[1] + ".new", "w") as file:
    file.write(url)
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(100000)
"""
