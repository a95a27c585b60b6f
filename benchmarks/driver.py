"""Driver's cost per clip of a run on many GPUs, with stages that only make rows: part of ``benchmarks.scale``.

    python -m benchmarks.driver
    git worktree add ../before 9d9ece5 && python -m benchmarks.driver --beside ../before

The second one also measures the code in another folder, and the two take turns.

A Ray with declared GPUs runs the job's own flow, writers and commits. Its decoders give frames of a hundredth of the
real size, and its encoders random payloads, both without computing. Blocks have a hundredth of the real size too: Ray
handles as many of them for each clip as in a real run. Every clip has its own values and id, as equal ones compress
away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext

from benchmarks.report import Row, report
from benchmarks.stub_stages import CLIPS_PER_SPAN, FRAMES_SHARE, PAYLOADS, SPEC, StubDecoder, StubSpec, work_rows
from vidshard.jobs.runtime.cluster import ray_cluster
from vidshard.jobs.runtime.executor import ClusterExecutor
from vidshard.jobs.runtime.interrupts import Feed
from vidshard.jobs.tokenization.collect import SpanCounter
from vidshard.jobs.tokenization.resources import SPANS_PER_TASK
from vidshard.pipeline.output.commit import Committer, SpanAccount
from vidshard.pipeline.output.shard_writer import ShardSettings
from vidshard.pipeline.resources import StageResources
from vidshard.schemas.tokens import Payload, Provenance

SPANS_PER_CALL = 13
"""Spans per GPU encoder call, as ``plan_resources`` chooses them for ten clips a span."""
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


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--payloads", default="tokens,KL-16", show_default=True, metavar="NAME,...")
@click.option("--gpus", "num_gpus", default=8, show_default=True, help="Declared GPUs; 0.13 GB of memory each.")
@click.option("--clips", "num_clips", default=12_000, show_default=True)
@click.option("--turns", default=1, show_default=True, help="Runs of each side.")
@click.option("--beside", metavar="FOLDER", help="Measure also the code in this folder, as its own.")
def main(payloads: str, num_gpus: int, num_clips: int, turns: int, beside: str | None) -> None:
    """Print the table, and how many times cheaper this code is than the one beside it."""
    here = str(Path(__file__).resolve().parents[1])
    sides = {"here": here} | ({"beside": str(Path(beside).resolve())} if beside else {})
    rows: list[Row] = []
    for name in payloads.split(","):
        costs: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(turns):
            for side in sorted(sides, reverse=turn % 2 == 1):
                row = _measured_in(sides[side], name, num_gpus, num_clips)
                costs[side].append(float(row["driver ms/clip"]))
                rows.append({"code": side, **row})
                print(rows[-1], file=sys.stderr, flush=True)
        if beside:
            means = {side: sum(values) / turns for side, values in costs.items()}
            print(f"{name}: {means['beside'] / means['here']:.1f} times", flush=True)
    report("the driver", rows, None)


def _measured_in(folder: str, name: str, num_gpus: int, num_clips: int) -> Row:
    """Measure the code of a folder, in a process of its own."""
    call = f"measure_driver({name!r}, 'disk', num_gpus={num_gpus}, num_clips={num_clips})"
    code = f"import json; from benchmarks.driver import measure_driver; print(json.dumps({call}))"
    environment = os.environ | {"PYTHONPATH": folder}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


def measure_driver(name: str, kind: str, *, num_gpus: int, num_clips: int, gpus_per_encoder: int = 1) -> Row:
    """Measure the processor time of the driver's process for each clip, after the first quarter of the clips.

    Args:
        name: of ``PAYLOADS``.
        kind: ``disk``, or ``S3`` for a server on this machine.
        num_gpus: declared GPUs.
        gpus_per_encoder: GPUs of each encoder process.
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
                encoders = num_gpus // gpus_per_encoder
                row: Row = {"payload": name, "store": kind, "GPUs": num_gpus, "encoders": encoders}
                return row | _run(executor, out, payload, num_spans, encoders)
        finally:
            ray.shutdown()


def _run(executor: ClusterExecutor, out: str, payload: Payload, num_spans: int, encoders: int) -> Row:
    DataContext.get_current().target_max_block_size = (128 << 20) // FRAMES_SHARE
    settings = ShardSettings(
        out=out,
        buckets=((SPEC, payload),),
        provenance=provenance_of(payload),
        shard_bytes=SHARD_BYTES,
        commit_seconds=600,
    )
    resources = StageResources(
        encode_workers=encoders,
        gpus_per_worker=executor.num_gpus / encoders,
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

if __name__ == "__main__":
    main()
