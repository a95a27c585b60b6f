"""Runs on a test cluster whose processes and nodes are killed at seeded moments, until every span is committed.

    python -m tests.support.killed_runs --kills 100 --seed 1

A cluster of a head and two nodes stays up. Drivers join it one after another and run the job's own
`tokenize_spans` with stages that compute nothing. Drivers, writers, encoders, decoders and nodes are killed in turn,
writers before, during and after they stage a shard, and drivers while a shard is staged and not published.
After each end of a driver no span may be in two shards, and after each orderly end every span is in one.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
from ray.cluster_utils import Cluster as RayCluster

from tests.support.outputs import listed_spans
from tests.support.processes import DECODING, ENCODER, busy_with
from vidshard.pipeline.rows import WORK_NUMBER, WORK_SCHEMA, EncodeStats, add_clips, add_payload, row_span, span_row
from vidshard.schemas.tokens import Payload
from vidshard.schemas.video import Clip, ClipSpec, Geometry, Span, SpanClips, VideoSource

NUM_SPANS = 600
VICTIMS = (
    "writer before its put",
    "encoder",
    "writer during its put",
    "driver after a receipt",
    "decoder",
    "writer after its put",
    "node",
)
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


def span_of(number: int) -> Span:
    return Span(
        video_id=f"{number:024x}",
        uri=f"/v/{number}.mp4",
        time_base=Fraction(1, 1000),
        grid_start_pts=0,
        first_clip=0,
        end_clip=None,
        duration_seconds_from_header=1.0,
        source=VideoSource(width=8, height=8, codec="h264", fps=8.0, rotation_degrees=0),
    )


@dataclass(frozen=True)
class SlowDecoder:
    """Decode stage without videos; ten milliseconds a span."""

    spec: ClipSpec

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Give each span a clip."""
        spec = self.spec
        for at in range(rows.num_rows):
            time.sleep(0.01)
            row = rows.slice(at, 1)
            span = row_span(row.to_pylist()[0])
            clip = Clip(
                video_id=span.video_id,
                clip_index=0,
                frames=np.zeros((spec.num_frames, spec.height, spec.width, 3), np.uint8),
                frame_pts_seconds=np.arange(spec.num_frames) / 8,
                num_valid_frames=spec.num_frames,
                start_seconds=0.0,
                geometry=Geometry(policy="crop", scaled_width=8, scaled_height=8, left=0, top=0),
            )
            yield add_clips(row, SpanClips(clips=[clip]), uri=span.uri, start_seconds=0.0, seconds=0.01)


@dataclass(frozen=True)
class SlowEncoder:
    """Encoder, and its settings: the values of a clip are its span's number."""

    payload: Payload

    def encoder(self) -> SlowEncoder:
        """Make an encoder."""
        return self

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Take thirty milliseconds."""
        time.sleep(0.03)
        [column] = self.payload
        numbers = [int(video_id, 16) for video_id in rows["video_id"].to_pylist()]
        clips = [np.full(column.num_values, number, column.dtype) for number in numbers]
        stats = EncodeStats(seconds=0.03, wait_seconds=0.0, num_slots=rows.num_rows)
        return add_payload(rows, {column.name: clips}, self.payload, stats)


def drive(address: str, out: str) -> int:
    """Run one driver to its end; returns its exit code."""
    from rich.console import Console

    from vidshard.jobs.runtime.cluster import ray_cluster
    from vidshard.jobs.runtime.executor import ClusterExecutor
    from vidshard.jobs.tokenization import collect
    from vidshard.jobs.tokenization.summary import Summary
    from vidshard.jobs.tokenization.telemetry import Telemetry
    from vidshard.pipeline.output.committed import committed_spans
    from vidshard.pipeline.output.layout import remove_leftovers
    from vidshard.pipeline.output.lease import Lease
    from vidshard.pipeline.output.shard_writer import WriteStats
    from vidshard.pipeline.output.work_list import WorkList
    from vidshard.pipeline.resolved_run import ResolvedRun
    from vidshard.pipeline.resources import StageResources
    from vidshard.schemas.runs import TokenizeRun

    given = {"tokenizer": "tiny", "fps": 8, "frames": 17, "size": 64, "clips_per_span": 1, "shard_size": 5 * 640}
    run = TokenizeRun.model_validate({"inputs": ["-"], "out": out, "commit_minutes": 0.01, "lease_seconds": 5, **given})
    resolved = ResolvedRun.of(run).placed(device="cpu", precision="float32")
    spec = resolved.largest
    with (
        Lease.acquire(out, ttl_seconds=5) as lease,
        ray_cluster(address=address, object_store_bytes=None, verbose=False) as cluster,
    ):
        remove_leftovers(out)
        done = set(committed_spans(out).to_pylist())
        spans = [span_of(number) for number in range(NUM_SPANS)]
        rows = [span_row(span, spec, None) for span in spans if span.span_id not in done]
        if not rows:
            return 0
        table = pa.Table.from_pylist(rows, schema=WORK_SCHEMA)
        table = table.append_column(WORK_NUMBER, pa.array(range(len(rows)), pa.int64()))
        work = WorkList(source=table, num_spans=len(rows), schema=table.schema)
        resources = StageResources(
            encode_workers=2,
            gpus_per_worker=0,
            cpus_per_worker=0.5,
            decode_workers=None,
            rows_per_task=6,
            rows_per_batch=3,
        )
        collect.plan_resources = lambda *_: (resources, SlowEncoder(resolved.payload))  # type: ignore[assignment,attr-defined]
        collect.span_decoder = lambda *_: SlowDecoder(spec)  # type: ignore[assignment]
        summary = Summary(
            out=out,
            num_videos=len(rows),
            num_rejected_videos=0,
            planned_spans=len(rows),
            expected_clips=len(rows),
            reused_spans=0,
            rejected_before=0,
            written=WriteStats(),
            reasons=Counter(),
            seconds={},
            batch_fill=1.0,
            example_clip_id=None,
            notice=None,
        )
        executor = ClusterExecutor(cluster=cluster)
        console = Console()
        telemetry = Telemetry(console)
        collect.tokenize_spans(resolved, work, executor, lease, summary, set(), console, telemetry, limits=run.limits)
    print(summary.problems, summary.written.num_spans, "of", len(rows))
    return summary.exit_code


def kill_in_turn(folder: Path, *, num_kills: int, seed: int, until: float = float("inf")) -> Counter[str]:
    """Kill so many processes and nodes of runs on one output after another; returns what was killed, and found.

    Args:
        until: moment of ``time.monotonic`` after which no further run starts.
    """
    rng = random.Random(seed)
    figures: Counter[str] = Counter()
    everything = {span_of(number).span_id for number in range(NUM_SPANS)}
    cluster = RayCluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK},
    )
    nodes = [cluster.add_node(num_cpus=2, object_store_memory=100 << 20) for _ in range(2)]
    try:
        while figures["kills"] < num_kills and time.monotonic() < until:
            out = str(folder / f"{figures['outputs']}")
            command = [sys.executable, "-m", "tests.support.killed_runs", "--drive", out, "--address", cluster.address]
            with (
                open(folder / "printed", "w") as printed,
                subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT, text=True) as driver,
            ):
                while driver.poll() is None and figures["kills"] < num_kills and time.monotonic() < until:
                    victim = VICTIMS[figures["kills"] % len(VICTIMS)]
                    if not _wait(driver, out, rng):
                        break
                    if victim == "node":
                        cluster.remove_node(nodes.pop(rng.randrange(2)), allow_graceful=False)
                        nodes.append(cluster.add_node(num_cpus=2, object_store_memory=100 << 20))
                    elif not _kill_one(driver, victim, out, rng):
                        break
                    figures["kills"] += 1
                    figures[victim] += 1
                driver.wait(timeout=600)
            figures["runs"] += 1
            text = (folder / "printed").read_text()
            committed = listed_spans(out)
            figures["twice"] += sum(count > 1 for count in committed.values())
            assert set(committed) <= everything
            if driver.returncode == 0:
                figures["outputs"] += 1
                figures["again"] += "done again" in text
                figures["lost"] += len(everything - set(committed))
            elif driver.returncode != -signal.SIGKILL:
                figures["failed"] += 1
                print(text[-3000:])
            print(dict(figures), flush=True)
    finally:
        cluster.shutdown()
    return figures


def _wait(driver: subprocess.Popen[str], out: str, rng: random.Random) -> bool:
    """Wait until some more spans are committed; returns whether the driver still runs."""
    wanted = min(_num_shards(out) + rng.randrange(1, 5), NUM_SPANS // 5 - 2)
    while driver.poll() is None:
        if _num_shards(out) >= wanted:
            return True
        time.sleep(0.05)
    return False


def _num_shards(out: str) -> int:
    return sum(1 for _ in Path(out, "shards").glob("*.parquet"))


def _kill_one(driver: subprocess.Popen[str], victim: str, out: str, rng: random.Random) -> bool:
    """Kill a process at the moment that is meant; returns whether the driver ran until then."""
    written: dict[str, int] = {}
    while driver.poll() is None:
        found = _moment(driver, victim, out, written)
        if found:
            os.kill(rng.choice(found), signal.SIGKILL)
            return True
        time.sleep(0.01)
    return False


def _moment(driver: subprocess.Popen[str], victim: str, out: str, written: dict[str, int]) -> list[int]:
    """Processes that may be killed now.

    Args:
        written: staged files and their writers, as far as they were seen open; updated in place.
    """
    if victim in ("encoder", "decoder"):
        return sorted(busy_with(os.getpid(), {"encoder": ENCODER, "decoder": DECODING}[victim]))
    if victim == "driver after a receipt":
        return [driver.pid] if _staged(out) else []
    writers = sorted(busy_with(os.getpid(), "NodeWriter"))
    until = time.monotonic() + 1.0
    while time.monotonic() < until:  # a list of all processes takes longer than a put
        putting = {path: pid for pid in writers for path in _open_files(pid) if path.startswith(f"{out}/staged/")}
        written |= putting
        if victim == "writer during its put" and putting:
            return sorted(set(putting.values()))
        if victim == "writer before its put" and not putting and not _staged(out):
            return writers
        whole = [pid for path, pid in written.items() if path not in putting and path in _staged(out)]
        if victim == "writer after its put" and whole:
            return whole
        time.sleep(0.0005)
    return []


def _staged(out: str) -> set[str]:
    return {str(path) for path in Path(out).glob("staged/*/*")}


def _open_files(pid: int) -> Iterator[str]:
    try:
        links = list(os.scandir(f"/proc/{pid}/fd"))
    except OSError:
        return  # gone meanwhile
    for link in links:
        with suppress(OSError):
            yield os.readlink(link.path)


@click.command()
@click.option("--kills", default=100)
@click.option("--seed", default=1)
@click.option("--minutes", default=1000.0)
@click.option("--drive", "out")
@click.option("--address")
def main(kills: int, seed: int, minutes: float, out: str | None, address: str | None) -> None:
    """Print the figures."""
    if out is not None and address is not None:  # a driver
        sys.exit(drive(address, out))
    with tempfile.TemporaryDirectory(prefix="vidshard-kills-") as folder:
        until = time.monotonic() + 60 * minutes
        print(dict(kill_in_turn(Path(folder), num_kills=kills, seed=seed, until=until)))


if __name__ == "__main__":
    main()
