"""Summary of a tokenization run: printed at the end and saved beside the shards."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
import yaml
from rich.console import Console
from rich.text import Text

from vidshard.jobs.runtime.errors import exit_code_of
from vidshard.jobs.runtime.events import events_of
from vidshard.jobs.runtime.progress import warn
from vidshard.jobs.runtime.terminal import print_field
from vidshard.jobs.tokenization.forecast import Forecast
from vidshard.jobs.tokenization.history import save_to_history
from vidshard.jobs.tokenization.quality import QualitySummary, print_quality
from vidshard.jobs.tokenization.usage import Usage
from vidshard.pipeline import storage
from vidshard.pipeline.discover import Discovery
from vidshard.pipeline.output.layout import SUMMARY
from vidshard.pipeline.output.shard_reader import decodable
from vidshard.pipeline.output.shard_writer import WriteStats
from vidshard.pipeline.resolved_run import ResolvedRun, public_record
from vidshard.schemas.errors import EXIT_AGAIN, EXIT_FAILED, VidshardError
from vidshard.schemas.rejections import REMEDIES, Reason, remedy_of
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.text import counted, readable
from vidshard.schemas.tokens import Payload, PayloadColumn
from vidshard.schemas.uris import without_secrets


@dataclass(kw_only=True)
class Summary:
    """Result of a tokenization run, saved as ``summary.json``."""

    out: str
    num_videos: int
    """Number of videos in the inputs."""
    num_rejected_videos: int
    """Number of these that were rejected in whole or in part, without copies of other videos."""
    planned_spans: int
    expected_clips: int
    """Number of clips of all planned spans, by the headers of the videos."""
    reused_spans: int
    """Number of spans that an earlier run finished."""
    rejected_before: int
    """Number of spans that an earlier run rejected."""
    written: WriteStats
    reasons: Counter[str]
    """Number of rejections of this run, of spans and of whole videos, by reason."""
    has_unkept_spans: bool = False
    """Whether spans were rejected of which no clip is kept."""
    seconds: dict[str, float]
    """Wall time by phase, and the summed time of all workers by stage."""
    batch_fill: float
    """Share of the forward passes' capacity that held clips, in [0, 1]."""
    example_clip_id: str | None
    """Id of a clip that the printed summary suggests to decode; None if none was written."""
    usage: Usage | None = None
    """Use of the machines; None if nothing was encoded."""
    forecast: Forecast | None = None
    """Forecast of `vidshard plan` for this output; None without one."""
    machine_speed: float | None = None
    """Speed of this machine during the run, if it follows a forecast that has one (`calibration`)."""
    quality: QualitySummary | None = None
    """Quality of the audited clips; None without ``--audit``."""
    notice: str | None
    """Warning for readers, such as that the weights are random."""
    num_recut_spans: int = 0
    """Number of spans that were decoded a second time with another cut; those that differed are rejected."""
    frame_bytes: int = 0
    """Bytes of decoded frames that went to encoders through Ray; 0 in one process."""
    moved_frame_bytes: int = 0
    """Bytes of these that crossed the network, as they were decoded on another node than encoded."""
    timeline: list[tuple[float, int, int]] = field(default_factory=list)
    """Points of the phase in which videos are decoded and encoded: seconds, clips and rejections so far."""
    problems: list[str] = field(default_factory=list)
    """Reasons why the run failed; empty if it did not."""
    printed_problems: list[str] = field(default_factory=list)
    """Those of these reasons that were printed as they came."""
    may_pass: bool = False
    """Whether all of these reasons lie outside of the run, so that the same command may go on."""
    interruption: KeyboardInterrupt | None = None
    """Ctrl-C or SIGTERM that ended the run; None otherwise."""

    @property
    def exit_code(self) -> int:
        """0 for success, 1 for failure, 75 for one that may pass, 130 or 143 after an interrupt."""
        if self.interruption is not None:
            return exit_code_of(self.interruption)
        if not self.problems:
            return 0
        return EXIT_AGAIN if self.may_pass else EXIT_FAILED

    def fail(self, problem: str, error: VidshardError | None = None) -> None:
        """Record a reason why the run failed, once.

        Args:
            error: the error behind it; None for one that the same command would meet again.
        """
        is_outside = error is not None and error.exit_code == EXIT_AGAIN
        self.may_pass = is_outside and (self.may_pass or not self.problems)
        if problem not in self.problems:
            self.problems.append(problem)
            if error is not None and error.is_printed:
                self.printed_problems.append(problem)

    @property
    def is_complete_first(self) -> bool:
        """Whether this run did all of its output's work, as a forecast expects."""
        is_complete = not self.problems and self.interruption is None and not self.pending_spans
        return is_complete and not self.reused_spans and not self.rejected_before

    @property
    def pending_spans(self) -> int:
        """Number of planned spans that are neither finished nor rejected."""
        done = self.written.num_spans + self.written.num_rejected_spans + self.reused_spans + self.rejected_before
        return self.planned_spans - done


FEWEST_INTERNAL_ERRORS = 10
"""Number of videos with an internal error below which none ends a run, so that one odd file in a small run does not."""


def too_many_internal_errors(num_broken: int, num_videos: int, run: TokenizeRun) -> str | None:
    """Say that internal errors are too many to be the fault of single videos; None if they are not.

    Args:
        num_broken: number of videos that this run rejected with INTERNAL_ERROR.
        num_videos: number of videos of the inputs.
        run: its ``max_internal_error_share`` is the limit.
    """
    share = num_broken / max(1, num_videos)
    if num_broken < FEWEST_INTERNAL_ERRORS or share <= run.max_internal_error_share:
        return None
    return (
        f"{num_broken} of {num_videos} videos ({share:.0%}) were rejected with internal_error, more than "
        f"--max-internal-error-share {run.max_internal_error_share:g} allows: this is a defect, and not one of the "
        f"videos. Report it with the log; what is committed is valid, and see rejects/ in {run.out}"
    )


def too_many_not_finite(num_broken: int, num_videos: int, run: TokenizeRun, *, has_encoded: bool) -> str | None:
    """Say that values that are not finite are no fault of single videos; None if they may be.

    Args:
        num_broken: number of videos that this run rejected with NOT_FINITE.
        num_videos: number of videos of the inputs.
        run: its ``max_internal_error_share`` is the limit.
        has_encoded: whether other clips of the output were encoded, or may be; if not, one such video is too many.
    """
    share = num_broken / max(1, num_videos)
    is_rare = num_broken < FEWEST_INTERNAL_ERRORS or share <= run.max_internal_error_share
    if not num_broken or (is_rare and has_encoded):
        return None
    return (
        f"{num_broken} of {counted(num_videos, 'video')} gave values that are not finite in {run.precision}, so it is "
        f"no fault of single videos: {REMEDIES[Reason.NOT_FINITE]}. What is committed is valid"
    )


def print_run(resolved: ResolvedRun, found: Discovery, console: Console) -> None:
    """Print the complete resolved run and its inputs."""
    record = public_record(resolved.run)
    console.print(yaml.safe_dump(record, sort_keys=False).rstrip(), highlight=False, markup=False)
    config = resolved.config
    for spec in resolved.clip_specs:
        what = ", ".join(map(describe_column, decodable(resolved.payload_of(spec))))
        console.print(f"{config.name}: {resolved.run.frames}x{spec.bucket} frames become {what}", highlight=False)
    console.print(f"weights SHA-256 {resolved.source.sha256[:16]}", highlight=False)
    if resolved.padding is not None:
        num_frames = resolved.encoded_frames
        console.print(f"each clip is encoded as {num_frames} frames: {resolved.padding}", highlight=False)
    if resolved.notice:
        warn(console, resolved.notice)
    for old, new in found.renamed_columns.items():
        names = f"'{readable(old)}' has the name of a shard column and is stored as '{readable(new)}'"
        console.print(f"manifest column {names}", markup=False)
    if found.num_passed_over:
        kinds = ", ".join(f"{count} {readable(extension, 40)}" for extension, count in found.passed_over_extensions[:5])
        console.print(
            f"passed over {counted(found.num_passed_over, 'file')} without a video's extension: {kinds}", markup=False
        )
    rows, videos = found.videos.num_rows, pc.count_distinct(found.videos["uri"]).as_py()
    console.print(counted(videos, "video") + (f", {rows:,} parts of them" if rows != videos else ""), highlight=False)


def describe_column(column: PayloadColumn) -> str:
    """Describe a payload column in words: shape, dtype or codebook size, and name."""
    what = f"float16 {column.name}" if column.codebook_size is None else f"{column.name} below {column.codebook_size}"
    return f"{list(column.shape)} {what}"


def save_summary(summary: Summary) -> None:
    """Write ``summary.json`` beside the shards; if videos were tokenized, also as one more file of ``history/``."""
    record = summary_record(summary)
    storage.write_atomic(storage.join(summary.out, SUMMARY), json.dumps(record, indent=2).encode())
    if "tokenize" in summary.seconds:
        save_to_history(summary.out, record)


def summary_record(summary: Summary) -> dict[str, Any]:
    """The content of ``summary.json``, as JSON values."""
    written = summary.written
    return {
        **{f.name: getattr(summary, f.name) for f in fields(summary) if f.name != "printed_problems"},
        "written": {f.name: getattr(written, f.name) for f in fields(written)}
        | {"rejected_uris": sorted(written.rejected_uris)},
        "pending_spans": summary.pending_spans,
        "usage": None if summary.usage is None else asdict(summary.usage),
        "forecast": None if summary.forecast is None else asdict(summary.forecast),
        "quality": None if summary.quality is None else summary.quality.record(),
        "ended_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "interruption": None if summary.interruption is None else type(summary.interruption).__name__,
    }


def print_summary(summary: Summary, payload: Payload, console: Console) -> None:
    """Print the summary of a run, with commands that show its output."""
    console.print()
    _print_counts(summary, payload, console)
    _print_speed(summary, console)
    _print_advice(summary, console)


def _print_counts(summary: Summary, payload: Payload, console: Console) -> None:
    """Print what became of the videos, spans and clips."""
    written, line = summary.written, partial(print_field, console)
    line("output", summary.out)
    line("videos", f"{summary.num_videos} found, {summary.num_rejected_videos} rejected in whole or in part")
    line("clips", f"{written.num_clips:,} written in {counted(written.num_shards, 'shard')}")
    reused = f" + {summary.reused_spans} reused, finished by an earlier run" if summary.reused_spans else ""
    reused += f" + {summary.rejected_before} rejected before" if summary.rejected_before else ""
    reused += f" + {summary.pending_spans} left to do" if summary.pending_spans else ""
    gaps = f" ({written.num_damaged_spans} of them with clips missing)" if written.num_damaged_spans else ""
    came_out = f"{written.num_spans} as tokens{gaps} + {written.num_rejected_spans} rejected{reused}"
    line("plan", f"{counted(summary.planned_spans, 'span')} of video = {came_out}")
    if summary.num_recut_spans:
        differ = summary.reasons[Reason.CUT_DEPENDENT]
        again = f"{counted(summary.num_recut_spans, 'span')} decoded again with another cut"
        line("checked", f"{again}: {f'{differ} of them DIFFER and are rejected' if differ else 'all the same'}")
    if written.num_values:
        line("values", f"{_on_disk(written, payload)}; {written.file_bytes:,} bytes in all shards")


def _print_speed(summary: Summary, console: Console) -> None:
    """Print what the run took, and how well."""
    written, seconds, line = summary.written, summary.seconds, partial(print_field, console)
    phases = [f"{name} {value:.1f} s" for name, value in seconds.items()]
    line("time", " · ".join(phases))
    if written.num_clips:
        rate = written.num_clips / seconds["tokenize"]
        line("speed", f"{rate:.2f} clips/s; batches {summary.batch_fill:.0%} full")
    if written.num_clips and summary.usage is not None:
        usage = summary.usage
        busy = f"busy {usage.busy_share:.0%} of the phase, waiting for frames {usage.wait_share:.0%} of their time"
        line("machines", f"{usage.yields}; encoders {busy}")
        line("", usage.verdict)
    if summary.frame_bytes:
        gigabytes, share = summary.frame_bytes / 1e9, summary.moved_frame_bytes / summary.frame_bytes
        line("frames", f"{gigabytes:.3g} GB from decoders to encoders, {share:.0%} of it over the network")
    if summary.quality is not None:
        print_quality(summary.quality, console)
    if summary.forecast is not None and summary.is_complete_first:
        came = (written.num_clips, written.file_bytes, seconds["total"], summary.machine_speed)
        line("forecast", summary.forecast.compared(*came))


def _print_advice(summary: Summary, console: Console) -> None:
    """Print rejections with their remedies, problems, and commands that show the output or go on."""
    line = partial(print_field, console)
    for reason, count in summary.reasons.most_common():
        name = "doubtful" if reason == Reason.POSSIBLE_LOSS else "rejected"
        remedy = remedy_of(Reason(reason), can_keep=summary.has_unkept_spans)
        line(name, f"{count} x {reason}: {remedy}")
    if summary.reasons:
        line("", f"see {storage.join(summary.out, 'rejects')}/ or: vidshard inspect {shlex.quote(summary.out)}")
    if summary.example_clip_id:
        clip = f"--clip {summary.example_clip_id} --to clip.mp4"
        line("look at one", f"vidshard decode {shlex.quote(summary.out)} {clip}")
    if summary.notice:
        warn(console, summary.notice)
    if not summary.written.num_clips and not summary.reused_spans:
        warn(console, "NOTHING WAS TOKENIZED")
    for problem in summary.problems:
        if problem in summary.printed_problems:
            events_of(console).emit("warning", text=without_secrets(problem))
        else:
            warn(console, without_secrets(problem))
    if summary.interruption is not None:
        again = "what is committed is valid; run the same command again to go on"
        console.print(Text(f"interrupted: {again}", style="bold"))


def _on_disk(written: WriteStats, payload: Payload) -> str:
    """Describe the compressed size: bits per token and log2 of the codebook size, or latent bytes and raw bytes."""
    codebook = payload[0].codebook_size
    if codebook is not None:
        bits = 8 * written.payload_bytes / written.num_values
        needed = math.log2(codebook)
        return f"{written.num_values:,} tokens at {bits:.2f} bits each on disk (log2 of the codebook: {needed:g})"
    raw = written.num_values * np.dtype(payload[0].dtype).itemsize
    share = written.payload_bytes / raw
    return f"{written.num_values:,} latent values in {written.payload_bytes:,} bytes, {share:.0%} of their raw {raw:,}"
