"""Cost of the driver as a corpus and a cluster grow: planning, resuming, shards, writers, and runs on declared GPUs.

    python -m benchmarks.scale                     10^3 to 10^6 videos of ten clips, twenty minutes
    python -m benchmarks.scale --only driver --gpus 64
    python -m benchmarks.scale --videos 1000,10000
    python -m benchmarks.scale --json scale.json

Nothing is decoded: a synthetic manifest names videos that do not exist, and the results of opening them are made up
and written as the job writes them. Each step runs in its own process, which imports all that the job's driver imports,
so that its peak memory is the driver's, but for the weights of a tokenizer.

``plan`` is everything that the driver does for a new corpus, without the wait for workers that open videos. ``resume
99 %`` and ``resume, all done`` are the same command again, with that much in shards. Shards are real Parquet files
without rows, since a resumed run reads only their footers.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

import vidshard.jobs.tokenization.job  # noqa: F401  all that the driver loads
from benchmarks.driver import SHARD_BYTES, measure_driver, provenance_of
from benchmarks.report import Row, report
from benchmarks.stub_stages import CLIPS_PER_SPAN, PAYLOADS, StubDecoder, StubSpec, work_rows
from vidshard.jobs.tokenization.planning import MAX_PLANNED_ROWS, plan_output
from vidshard.pipeline.discover import discover
from vidshard.pipeline.output.commit import TokenShardSink
from vidshard.pipeline.output.committed import committed_spans, shard_spans
from vidshard.pipeline.output.entries import Inputs, location_keys
from vidshard.pipeline.output.layout import SHARDS, SPANS_KEY, shard_paths
from vidshard.pipeline.output.plan_store import write_planned
from vidshard.pipeline.output.shard_writer import ShardSettings
from vidshard.pipeline.output.state import OutputState
from vidshard.pipeline.rows import WORK_SCHEMA, span_row
from vidshard.schemas.rejections import Rejection
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.tokens import payload_bytes
from vidshard.schemas.video import ClipSpec, Span, VideoSource

CLIPS_PER_VIDEO = 10
SPANS_PER_SHARD = 1300
"""128 MiB of 17x256x256 clips, 10 kB of tokens each, ten in a span."""
SPEC = ClipSpec(fps=Fraction(8), num_frames=17, height=256, width=256)
SOURCE = VideoSource(width=1280, height=720, codec="h264", fps=30.0, rotation_degrees=0)


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--videos", "sizes", default="1000,10000,100000,1000000", show_default=True, metavar="N,...")
@click.option(
    "--gpus", default="8,64", show_default=True, metavar="N,...", help="Declared GPUs; 0.1 GB of memory each."
)
@click.option("--gpus-per-encoder", default=1, show_default=True, help="Declared GPUs of each process.")
@click.option("--clips", "num_clips", default=40_000, show_default=True, help="Clips of a run on declared GPUs.")
@click.option("--payloads", default="tokens,KL-4,KL-16", show_default=True, metavar="NAME,...", help="For the driver.")
@click.option(
    "--stores", default="disk,S3", show_default=True, metavar="NAME,...", help="For the driver; S3 on loopback."
)
@click.option("--only", type=click.Choice(["driver"]), help="Measure nothing but the driver of a run.")
@click.option("--json", "json_path", metavar="FILE", help="Write the tables there too.")
@click.option("--step", hidden=True)
@click.option("--folder", hidden=True)
def main(
    sizes: str,
    gpus: str,
    gpus_per_encoder: int,
    num_clips: int,
    payloads: str,
    stores: str,
    only: str | None,
    json_path: str | None,
    step: str | None,
    folder: str | None,
) -> None:
    """Print the tables."""
    if only == "driver":
        measure_drivers(gpus, gpus_per_encoder, num_clips, payloads, stores)
        return
    if step is not None and folder is not None:
        print(json.dumps(STEPS[step](Path(folder))))
        return
    rows: list[Row] = []
    for size in map(int, sizes.split(",")):
        with tempfile.TemporaryDirectory(prefix="vidshard-scale-") as name:
            make_manifest(Path(name), size)
            for step in ("plan", "resume 99 %", "resume, all done", "audit"):
                if step.startswith("resume"):
                    make_shards(Path(name), size, 0.99 if "99" in step else 1.0)
                command = [sys.executable, "-m", "benchmarks.scale", "--videos", str(size)]
                started = subprocess.run(
                    [*command, "--step", step, "--folder", name], check=True, capture_output=True, text=True
                )
                rows.append(
                    {"videos": size, "clips": size * CLIPS_PER_VIDEO, "step": step} | json.loads(started.stdout)
                )
    report("the driver, by videos", rows, json_path)
    report("shards, listed and their ends read", [measure_shards(count) for count in (100, 1000, 10_000)], None)
    report("a writer", [measure_writer(name, threads) for name in PAYLOADS for threads in (1, 2)], None)
    measure_drivers(gpus, gpus_per_encoder, num_clips, payloads, stores)


def measure_drivers(gpus: str, gpus_per_encoder: int, num_clips: int, payloads: str, stores: str) -> None:
    """Print what the driver of a run costs for each clip, as ``benchmarks.driver`` measures it."""
    rows: list[Row] = []
    for count in gpus.split(","):
        for name, kind in itertools.product(payloads.split(","), stores.split(",")):
            rows.append(
                measure_driver(name, kind, num_gpus=int(count), num_clips=num_clips, gpus_per_encoder=gpus_per_encoder)
            )
            print(rows[-1], file=sys.stderr, flush=True)
    report("the driver, by GPUs", rows, None)


def names_of(size: int) -> list[str]:
    """Make a name of plausible length, on remote storage, which is not asked about the files that a manifest names."""
    return [f"s3://a-bucket/some/folder/of/videos/{number % 1000:03d}/{number:012d}.mp4" for number in range(size)]


def make_manifest(folder: Path, size: int) -> None:
    """Write a manifest of N videos with captions."""
    table = pa.table({"uri": names_of(size), "caption": [f"what is seen in video {n}" for n in range(size)]})
    pq.write_table(table, folder / "manifest.parquet")


def span_of(number: int) -> Span:
    return Span(
        video_id=f"{number * 2654435761 % (1 << 96):024x}",
        uri="",
        time_base=Fraction(1, 90000),
        grid_start_pts=0,
        first_clip=0,
        end_clip=None,
        duration_seconds_from_header=CLIPS_PER_VIDEO * 17 / 8,
        source=SOURCE,
    )


def make_shards(folder: Path, size: int, share: float) -> None:
    """Write shards without rows whose footers list this many of the spans."""
    (folder / "out" / SHARDS).mkdir(parents=True, exist_ok=True)
    done = [span_of(number).span_id for number in range(int(size * share))]
    empty = pa.table({"clip_id": pa.array([], pa.string())})
    for at in range(0, len(done), SPANS_PER_SHARD):
        metadata = {SPANS_KEY: json.dumps(done[at : at + SPANS_PER_SHARD])}
        pq.write_table(empty.replace_schema_metadata(metadata), folder / "out" / SHARDS / f"{at:09d}.parquet")


def plan(folder: Path) -> Row:
    """Measure planning a new corpus."""
    template = pa.Table.from_pylist(
        [span_row(span_of(0), SPEC, '1234567-"d41d8cd98f00b204e9800998ecf8427e"')],
        schema=WORK_SCHEMA,
    )

    def opened(videos: pa.Table, first: int) -> pa.Table:
        """Make the results of the workers."""
        rows = pa.concat_tables([template] * videos.num_rows).combine_chunks()
        spans = [span_of(first + n) for n in range(videos.num_rows)]
        columns = {
            "span_id": pa.array([span.span_id for span in spans]),
            "video_id": pa.array([span.video_id for span in spans]),
            "uri": videos["uri"],
        }
        for name, values in columns.items():
            rows = rows.set_column(rows.schema.get_field_index(name), name, values)
        return (
            rows.append_column("entry", videos["entry"])
            .append_column("seen_entry", videos["entry"])
            .append_column("place", location_keys(videos["uri"].to_pylist()))
        )

    out = str(folder / "out")
    made = 0.0

    def open_videos(unknown: pa.Table) -> list[Rejection]:
        nonlocal made
        for first in range(0, unknown.num_rows, MAX_PLANNED_ROWS):
            begun = time.monotonic()
            rows = opened(unknown.slice(first, MAX_PLANNED_ROWS), first)
            made += time.monotonic() - begun
            write_planned(out, rows)
        return []

    row = _planned(folder, open_videos)
    return row | {"seconds": round(float(row["seconds"]) - made, 2)}


def resume(folder: Path) -> Row:
    """Measure the same command again."""

    def open_videos(_unknown: pa.Table) -> list[Rejection]:
        raise AssertionError("all videos are known")

    return _planned(folder, open_videos)


def _planned(folder: Path, open_videos: Callable[[pa.Table], list[Rejection]]) -> Row:
    out = str(folder / "out")
    started = time.monotonic()
    run = TokenizeRun(inputs=[str(folder / "manifest.parquet")], out=out)
    found = discover(run.inputs)
    planned = plan_output(run, Inputs.of(found.videos, run.part), open_videos=open_videos)
    return _cost(started) | {"left to do": planned.work.num_spans, "shards": len(shard_paths(out))}


def audit(folder: Path) -> Row:
    """Measure the audit that `vidshard verify` adds up after reading the shards."""
    from vidshard.pipeline.output.audit import AUDIT_COLUMNS, make_audit

    out = str(folder / "out")
    started = time.monotonic()
    shards = [shard_spans(path) for path in shard_paths(out)]
    made = make_audit(OutputState.load(out, columns=AUDIT_COLUMNS, shards=shards), {(256, 256): SPEC})
    return _cost(started) | {"left to do": made.num_pending, "shards": len(shard_paths(out))}


def _cost(started: float) -> Row:
    seconds = time.monotonic() - started
    return {"seconds": round(seconds, 2), "peak MiB": _peak_mib(), "of it imports": IMPORTED_MIB}


def _peak_mib() -> int:
    """Peak memory of this process alone; getrusage would include that of its parent before the fork."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) >> 10


IMPORTED_MIB = _peak_mib()
STEPS: dict[str, Callable[[Path], Row]] = {
    "plan": plan,
    "resume 99 %": resume,
    "resume, all done": resume,
    "audit": audit,
}


def measure_shards(count: int, spans_per_shard: int = 100) -> Row:
    """Measure listing this many shards on the local disk and reading which spans they hold."""
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / SHARDS
        shards.mkdir()
        empty = pa.table({"clip_id": pa.array([], pa.string())})
        for number in range(count):
            first = number * spans_per_shard
            spans = [span_of(first + n).span_id for n in range(spans_per_shard)]
            pq.write_table(
                empty.replace_schema_metadata({SPANS_KEY: json.dumps(spans)}), shards / f"{number:09d}.parquet"
            )
        started = time.monotonic()
        shard_paths(folder)
        listed = time.monotonic()
        committed_spans(folder)
        ended = time.monotonic()
    return {
        "shards": count,
        "listing s": round(listed - started, 3),
        "ends s": round(ended - listed, 2),
        "ms/shard": round(1000 * (ended - listed) / count, 2),
    }


def measure_writer(name: str, num_threads: int, num_clips: int = 4_000) -> Row:
    """Measure writing rows of the encoder, each clip with its own values, into shards on the local disk."""
    payload = PAYLOADS[name]
    encode = StubSpec(payload).encoder()
    spans = num_clips // CLIPS_PER_SPAN
    decoded = StubDecoder()(work_rows(0, spans))
    rows = [encode(row).drop_columns("todo_number") for row in decoded]
    with tempfile.TemporaryDirectory() as folder:
        settings = ShardSettings(
            out=folder,
            buckets=((SPEC, payload),),
            provenance=provenance_of(payload),
            shard_bytes=SHARD_BYTES // 8,
            commit_seconds=600,
        )
        sink = TokenShardSink(settings, num_threads=num_threads)
        started = time.monotonic()
        for row in rows:
            sink.add(row)
        sink.close()
        seconds = time.monotonic() - started
    clips = sink.committed.num_clips
    return {
        "payload": name,
        "threads": num_threads,
        "clips": clips,
        "clips/s": round(clips / seconds),
        "payload MB/s": round(clips * payload_bytes(payload) / seconds / 1e6, 1),
        "bytes/clip on disk": round(sink.committed.file_bytes / clips),
    }


if __name__ == "__main__":
    main()
