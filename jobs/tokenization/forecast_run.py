"""Plan of a run: opens the videos, tries a sample of them, and forecasts output and cost without writing tokens.

Clips come from the headers of the videos. A sample of the spans is decoded, all of them if that is soon done, and of a
few of those some clips are encoded with the executor, the resources and the writer of the real run. Everything happens
in a temporary folder. For another machine speeds come from a table (`jobs.tokenization.machines`).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from vidshard.jobs.runtime.events import reported
from vidshard.jobs.runtime.executor import Executor, LocalExecutor, open_executor
from vidshard.jobs.runtime.run_record import RunRecord
from vidshard.jobs.runtime.terminal import print_field
from vidshard.jobs.tokenization.calibration import SpeedWatch, is_one_machine
from vidshard.jobs.tokenization.collect import shard_settings, span_decoder
from vidshard.jobs.tokenization.forecast import Forecast
from vidshard.jobs.tokenization.machines import Machine, decoding_seconds, find_machine
from vidshard.jobs.tokenization.placement import place, with_gpus
from vidshard.jobs.tokenization.planning import discover_inputs, make_plan
from vidshard.jobs.tokenization.resources import plan_resources
from vidshard.models.cost import Cost, encoding_cost
from vidshard.pipeline import storage
from vidshard.pipeline.devices import DEFAULT_PRECISION
from vidshard.pipeline.output.commit import TokenShardSink
from vidshard.pipeline.output.lease import Lease
from vidshard.pipeline.output.work_list import WorkList
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.tokenizer_source import PRECISIONS
from vidshard.schemas.errors import UserError
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.text import counted
from vidshard.schemas.video import Limits

DECODING_BUDGET_SECONDS = 20.0
"""Time for decoding a sample."""
HEAVY_FLOPS = 1e12
"""FLOPs of a clip from which fewer clips are tried."""
HERE = "here"


@dataclass(kw_only=True)
class _Trial:
    """Figures of the sample."""

    num_spans: int = 0
    expected_clips: int = 0
    """Clips of the decoded spans by the headers."""
    clips: int = 0
    """Clips of the decoded spans that came out."""
    decode_seconds: float = 0.0
    by_table: float = 0.0
    """Seconds of decoding the same spans by the table of codecs."""
    rejected: set[str] = field(default_factory=set)
    good_rows: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Speed:
    """Speed of encoding a few clips with the executor and the writer of the run."""

    clip_seconds: float
    """Seconds of an encoder for a clip."""
    start_seconds: float
    """From the start of the stages to the start of the first pass."""
    clip_bytes: float
    shard_bytes: float
    """Bytes of a shard without its clips."""


def forecast_run(run: TokenizeRun, console: Console, *, local: bool, machine: str, save: bool) -> Forecast:
    """Forecast a run and print it.

    Args:
        run: settings of the run.
        local: whether the run will be one of ``--local``.
        machine: ``here``, a name in `machines.MACHINES`, or a file of `benchmarks.machine`.
        save: write ``forecast.json`` into the output of the run, which compares itself with it.

    Raises:
        VidshardError: the run could not start as requested, or no video can be opened.
    """
    with reported(console, run, command="plan", out=run.out if save else None) as events:
        forecast = _forecast_run(run, console, local=local, machine=machine, save=save)
        events.emit("summary", result=asdict(forecast))
    return forecast


def _forecast_run(run: TokenizeRun, console: Console, *, local: bool, machine: str, save: bool) -> Forecast:
    """As :func:`forecast_run`."""
    other = None if machine == HERE else find_machine(machine)
    resolved = ResolvedRun.of(run)
    storage.restrict_addresses(resolved.run.limits.private_hosts)
    try:
        with tempfile.TemporaryDirectory(prefix="vidshard-plan-") as folder:
            here = replace(resolved, run=resolved.run.model_copy(update={"out": folder}))
            forecast = _plan(here, console, local=local, other=other)
    finally:
        storage.restrict_addresses(None)
    if save:
        forecast.save(resolved.run.out)
    print_forecast(forecast, resolved, console)
    return forecast


def _plan(resolved: ResolvedRun, console: Console, *, local: bool, other: Machine | None) -> Forecast:
    started = time.monotonic()
    run = resolved.run
    found = discover_inputs(run)
    lease = Lease.acquire(run.out, ttl_seconds=run.lease_seconds, on_wait=console.print)
    with SpeedWatch(every_seconds=2) as watch, lease, open_executor(run, local=local) as opened:
        executor = with_gpus(opened, run, console)
        if other is None:
            resolved = place(resolved, RunRecord(identity={}, code_version=""), executor, console)
        else:
            device: Literal["cuda", "cpu"] = "cuda" if other.is_gpu else "cpu"
            default = resolved.config.default_precision or DEFAULT_PRECISION[device]
            precision = default if run.precision == "auto" else run.precision
            resolved = resolved.placed(device=device, precision=precision)
        limits = replace(run.limits, storage_hosts=found.storage_hosts)
        planned = make_plan(resolved, found, executor, lease, console, limits=limits)
        preparing = time.monotonic() - started
        rows = _rows_of(planned.work)
        if not rows.num_rows:
            raise UserError(f"none of the {found.videos.num_rows} videos can be opened: vidshard tokenize says why")
        trial = _try_decoding(resolved, rows, limits)
        speed = _try_encoding(resolved, rows, trial, planned.work, executor) if other is None else None
        videos = pc.count_distinct(found.videos["uri"]).as_py()
        rejected = {r.uri for r in planned.new_rejections} | trial.rejected
        forecast = _forecast(resolved, rows, trial, speed, other, executor, preparing, videos, len(rejected))
        is_comparable = other is None and not forecast.is_gpu and is_one_machine(executor)
        return replace(forecast, machine_speed=watch.speed if is_comparable else None)


def _rows_of(work: WorkList) -> pa.Table:
    if isinstance(work.source, pa.Table):
        return work.source.combine_chunks()
    with storage.open_binary(work.source) as file:
        return storage.ParquetFile(file).read().combine_chunks()


def _try_decoding(resolved: ResolvedRun, rows: pa.Table, limits: Limits) -> _Trial:
    """Decode spans in random order until all are done or the time is over."""
    trial = _Trial()
    decode = span_decoder(resolved, limits)
    end = time.monotonic() + DECODING_BUDGET_SECONDS
    for at in np.random.default_rng(0).permutation(rows.num_rows):
        row = rows.slice(int(at), 1)
        for decoded in decode(row):
            num_clips = pc.sum(pc.list_value_length(decoded["clips"])).as_py()
            trial.num_spans += 1
            trial.expected_clips += row["expected_clips"][0].as_py()
            trial.clips += num_clips
            trial.decode_seconds += decoded["decode_seconds"][0].as_py()
            trial.by_table += _decoding_by_table(resolved, row)
            if decoded["rejection"][0].is_valid:
                trial.rejected.add(row["uri"][0].as_py())
            if num_clips:
                trial.good_rows.append(int(at))
        if time.monotonic() > end:
            break
    return trial


def _decoding_by_table(resolved: ResolvedRun, rows: pa.Table) -> float:
    stride = float(resolved.largest.stride_seconds or resolved.largest.clip_seconds)
    names = ("source_codec", "source_width", "source_height", "source_fps", "expected_clips")
    columns = [rows[name].to_pylist() for name in names]
    return sum(
        decoding_seconds(codec, width, height, fps, clips * stride)
        for codec, width, height, fps, clips in zip(*columns, strict=True)
    )


def _try_encoding(
    resolved: ResolvedRun, rows: pa.Table, trial: _Trial, work: WorkList, executor: Executor
) -> _Speed | None:
    """Encode a few clips of different videos as the run will; None if nothing decodes."""
    heavy = _cost_of(resolved, resolved.largest.height, resolved.largest.width).flops > HEAVY_FLOPS
    chosen = _different_videos(rows, trial.good_rows, 2 if heavy else 5)
    if not chosen:
        return None
    sample = _shortened(rows.take(pa.array(sorted(chosen))), 1 if heavy else 2)
    resources, encoder = plan_resources(resolved, sample.num_rows, 1.0, executor)
    resources = replace(
        resources, encode_workers=1, is_elastic=False, rows_per_batch=1 if encoder.batch_size == 1 else sample.num_rows
    )
    decoder = span_decoder(resolved, resolved.run.limits)
    started = time.monotonic()
    tables: list[pa.Table] = []
    first = 0.0
    for table in executor.run(sample, decoder=decoder, encoder=encoder, resources=resources):
        first = first or time.monotonic() - started - (pc.sum(table["encode_seconds"]).as_py() or 0.0)
        tables.append(table)
    calls = [
        (seconds, slots)
        for table in tables
        for seconds, slots in zip(table["encode_seconds"].to_pylist(), table["encode_slots"].to_pylist(), strict=True)
        if slots
    ]
    timed = calls[1:] or calls  # the first one warms up
    clip_bytes, shard_bytes = _bytes_of(resolved, work, [table for table in tables if table.num_rows])
    return _Speed(
        clip_seconds=statistics.median(seconds / slots for seconds, slots in timed),
        start_seconds=max(0.0, first),
        clip_bytes=clip_bytes,
        shard_bytes=shard_bytes,
    )


def _different_videos(rows: pa.Table, numbers: list[int], count: int) -> list[int]:
    """Choose rows, of as many videos as there are."""
    uris = rows["uri"].to_pylist()
    by_video: dict[str, list[int]] = {}
    for number in numbers:
        by_video.setdefault(uris[number], []).append(number)
    chosen: list[int] = []
    while len(chosen) < count and any(by_video.values()):
        for found in by_video.values():
            if found and len(chosen) < count:
                chosen.append(found.pop(0))
    return chosen


def _shortened(rows: pa.Table, num_clips: int) -> pa.Table:
    """Rows that end after a few clips."""
    ends = [
        first + min(num_clips, expected)
        for first, expected in zip(rows["first_clip"].to_pylist(), rows["expected_clips"].to_pylist(), strict=True)
    ]
    place = rows.schema.get_field_index("end_clip")
    return rows.set_column(place, rows.schema.field("end_clip"), pa.array(ends, pa.int32()))


def _bytes_of(resolved: ResolvedRun, work: WorkList, tables: list[pa.Table]) -> tuple[float, float]:
    """Write the sample as shards of two sizes: bytes of a clip, and of a shard without its clips."""
    whole = pa.concat_tables(tables)
    sizes = []
    for rows in (whole.slice(0, 1), whole):
        with tempfile.TemporaryDirectory(prefix="vidshard-plan-") as folder:
            sink = TokenShardSink(replace(shard_settings(resolved, work), out=folder))
            sink.add(rows)
            sink.close()
            sizes.append((sink.committed.num_clips, sink.committed.file_bytes))
    (few, few_bytes), (many, many_bytes) = sizes
    if many <= few:
        return few_bytes / max(1, few), 0.0
    clip_bytes = (many_bytes - few_bytes) / (many - few)
    return clip_bytes, max(0.0, few_bytes - few * clip_bytes)


def _cost_of(resolved: ResolvedRun, height: int, width: int) -> Cost:
    num_frames = resolved.config.valid_frames(max(resolved.encoded_frames, resolved.largest.num_frames))
    return encoding_cost(resolved.config, num_frames, height, width)


@dataclass(frozen=True, kw_only=True)
class _Encoding:
    """Cost of encoding all clips, and the size of what comes of them."""

    seconds: float
    """Seconds of a GPU, or of a CPU core."""
    clip_bytes: float
    shard_bytes: float
    run_seconds: float | None
    """Seconds of the whole command; None for another machine."""
    machine: str


def _forecast(
    resolved: ResolvedRun,
    rows: pa.Table,
    trial: _Trial,
    speed: _Speed | None,
    other: Machine | None,
    executor: Executor,
    preparing: float,
    videos: int,
    rejected: int,
) -> Forecast:
    run = resolved.run
    header_clips = pc.sum(rows["expected_clips"]).as_py()
    is_every_span_tried = trial.num_spans == rows.num_rows
    share = trial.clips / trial.expected_clips if trial.expected_clips else 0.0
    clips = trial.clips if is_every_span_tried else round(header_clips * share)
    spec = resolved.largest
    stride = min(float(spec.clip_seconds), float(spec.stride_seconds or spec.clip_seconds))
    ratio = trial.decode_seconds / trial.by_table if trial.by_table and other is None else 1.0
    decode_seconds = trial.decode_seconds if is_every_span_tried and other is None else 0.0
    decode_seconds = decode_seconds or _decoding_by_table(resolved, rows) * ratio
    if other is not None:
        encoding = _encoding_by_table(resolved, clips, other)
    elif speed is None:
        raise UserError("nothing of the sample decodes: `vidshard tokenize` lists the reasons")
    else:
        encoding = _encoding_here(resolved, rows, clips, speed, executor, preparing, decode_seconds)
    shards = _num_shards(run, clips * encoding.clip_bytes, encoding.run_seconds, len(resolved.clip_specs))
    return Forecast(
        videos=videos,
        rejected_videos=rejected,
        video_seconds=clips * stride,
        header_clips=header_clips,
        clips=clips,
        is_every_span_tried=is_every_span_tried,
        output_bytes=round(clips * encoding.clip_bytes + shards * encoding.shard_bytes) if clips else 0,
        shards=shards,
        encode_hours=encoding.seconds / 3600,
        decode_hours=decode_seconds / 3600,
        is_gpu=run.device == "cuda",
        cores_needed=decode_seconds / encoding.seconds if encoding.seconds else 0.0,
        run_seconds=encoding.run_seconds,
        machine=encoding.machine,
    )


def _encoding_by_table(resolved: ResolvedRun, clips: int, machine: Machine) -> _Encoding:
    """Encoding on another machine, by its speeds in the table."""
    run, spec = resolved.run, resolved.largest
    cost = _cost_of(resolved, spec.height, spec.width)
    clip_bytes, shard_bytes = _bytes_by_table(resolved)
    return _Encoding(
        seconds=clips * machine.seconds(cost, run.precision, PRECISIONS[run.precision].itemsize),
        clip_bytes=clip_bytes,
        shard_bytes=shard_bytes,
        run_seconds=None,
        machine=f"{machine.name} ({machine.source})",
    )


def _encoding_here(
    resolved: ResolvedRun,
    rows: pa.Table,
    clips: int,
    speed: _Speed,
    executor: Executor,
    preparing: float,
    decode_seconds: float,
) -> _Encoding:
    """Encoding on this machine or cluster, at the speed of the sample, beside the decoding."""
    is_gpu = resolved.run.device == "cuda"
    is_local = isinstance(executor, LocalExecutor)
    mean_clips = pc.sum(rows["expected_clips"]).as_py() / rows.num_rows
    resources, encoder = plan_resources(resolved, rows.num_rows, mean_clips, executor)
    encoders = 1 if is_local else resources.encode_workers
    busy = clips * speed.clip_seconds
    seconds = busy * (resources.gpus_per_worker if is_gpu else encoder.num_threads)
    if is_local:
        phase = busy + decode_seconds
    elif is_gpu:
        phase = max(busy / encoders, decode_seconds / max(1, executor.num_cpus - 1))
    else:
        phase = max(busy / encoders, (seconds + decode_seconds) / executor.num_cpus)
    return _Encoding(
        seconds=seconds,
        clip_bytes=speed.clip_bytes,
        shard_bytes=speed.shard_bytes,
        run_seconds=preparing + speed.start_seconds + phase,
        machine=f"{executor}, measured on a sample",
    )


def _num_shards(run: TokenizeRun, payload_bytes: float, seconds: float | None, buckets: int) -> int:
    by_size = -(-payload_bytes // run.shard_size)
    by_time = 1 if seconds is None else 1 + seconds // (60 * run.commit_minutes)
    return int(max(by_size, by_time, buckets, 1))


def _bytes_by_table(resolved: ResolvedRun) -> tuple[float, float]:
    """Bytes of a clip and of a shard's metadata, from the measured bits of values (docs/performance.md)."""
    clip_bytes = 250.0  # ids, times and geometry
    for column in resolved.payload_of(resolved.largest):
        if column.codebook_size is None:
            clip_bytes += 2 * 0.85 * column.num_values
        else:
            clip_bytes += (np.log2(column.codebook_size) + 0.3) / 8 * column.num_values
    return clip_bytes, 12_000.0


def print_forecast(forecast: Forecast, resolved: ResolvedRun, console: Console) -> None:
    """Print a forecast."""

    line = partial(print_field, console)
    console.print()
    line("videos", f"{forecast.videos}, {forecast.rejected_videos} of them rejected in whole or in part")
    tried = "every span was tried" if forecast.is_every_span_tried else "a sample was tried"
    line("clips", f"{forecast.clips} ({forecast.header_clips} by the headers; {tried})")
    line("video", f"{forecast.video_seconds / 3600:.3g} hours")
    line("output", f"{forecast.output_bytes:,} bytes in {counted(forecast.shards, 'shard')}")
    unit = "GPU-hours" if forecast.is_gpu else "core-hours"
    line("encoding", f"{forecast.encode_hours:.3g} {unit} for {resolved.config.name}")
    line("decoding", f"{forecast.decode_hours:.3g} core-hours")
    if forecast.is_gpu:
        line("cores", f"{forecast.cores_needed:.2g} for each GPU, so that it does not wait")
    if forecast.run_seconds is not None:
        line("time", f"{forecast.run_seconds:.0f} s for the whole command")
    line("machine", forecast.machine)
