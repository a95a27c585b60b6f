"""Probe and decode stages on the CPU: rows in, rows out; a failure of a video is a value in its row.

This module translates between rows and ``pipeline.video.decode``, which does the work and does not know Ray. FFmpeg
runs in the sandbox, a child process of each worker (``pipeline.video.sandbox``), so that a hostile file costs one row
and no worker. Nothing here imports torch, which takes 1.1 s and 180 MB in each worker.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vidshard.pipeline import storage
from vidshard.pipeline.cancel import CancelToken
from vidshard.pipeline.checked_answers import checked_clips, checked_probe
from vidshard.pipeline.recut import Recutting
from vidshard.pipeline.remote_bytes import forget_fetching_processes, remote_file
from vidshard.pipeline.row_errors import row_error
from vidshard.pipeline.rows import FRAME_SECONDS, add_clips, add_signals, row_span, row_spec, signal_source
from vidshard.pipeline.unchanged import read_unchanged, refuse_changed
from vidshard.pipeline.video.child import given_file, missing_confinement
from vidshard.pipeline.video.decode import SEEK_GAP_SECONDS, decode_spans
from vidshard.pipeline.video.frame_times import frame_seconds
from vidshard.pipeline.video.input_file import open_file
from vidshard.pipeline.video.member import open_member
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import ClipTimeline, plan_spans
from vidshard.pipeline.video.sandbox import DecodeSandbox
from vidshard.pipeline.video.signal_files import MAX_SIGNALS, Columns, SignalSource, read_signals, read_times
from vidshard.pipeline.video.signals import Signal, Steps, align_clip, signal_arrays, signal_fields
from vidshard.pipeline.video.sparse_file import refuse_sparse
from vidshard.pipeline.video.timestamps import Clock
from vidshard.schemas.errors import OutageError, UserError
from vidshard.schemas.locations import split_member
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec, Limits, Part, SignalRule, Span, SpanClips, VideoProbe, VideoRef

R = TypeVar("R")

PROBE_TIMEOUT_SECONDS = 120.0 + storage.RETRY_SECONDS
"""Time limit for opening a file and decoding its first frame, including retries of slow object stores."""

_SIGNAL_RECORDS, _ERROR_RECORDS = 4096, 32
"""Room in an answer, counted in records: for the names of a signal's channels, and for the error of a span."""

_crashes: dict[str, VideoError] = {}
"""Crash of this worker's decoder by video id; such a video is not tried again, as each try costs a new decoder and a
core dump."""


def read_groups(groups: pa.Table, plan: str) -> pa.Table:
    """Read row groups of a work list's Parquet file.

    Args:
        groups: the column ``group`` holds their numbers.
        plan: path of the file.
    """
    with storage.open_binary(plan) as file:
        return storage.ParquetFile(file).read_row_groups(groups["group"].to_pylist())


@cache
def _sandbox(memory_bytes: int, confined: bool, files_per_child: int) -> DecodeSandbox:
    """Sandbox of this worker process, started at its first video and reused for all later ones."""
    return DecodeSandbox(memory_limit_bytes=memory_bytes, confined=confined, files_per_child=files_per_child)


def forget_processes() -> None:
    """Start new child processes from now on, without the connections that those of before kept."""
    _sandbox.cache_clear()
    forget_fetching_processes()


def confinement_lacks(limits: Limits) -> list[str]:
    """The parts of the confinement that this machine lacks; none where the limits ask for no confinement."""
    if limits.sandbox == "off":
        return []
    sandbox = _sandbox(limits.memory_bytes, True, limits.videos_per_decoder)
    return sandbox.run(_lacks_in_child, timeout_seconds=PROBE_TIMEOUT_SECONDS)


def _lacks_in_child() -> list[str]:
    return missing_confinement()  # called from here, so that the child loads this module before it is confined


def _run(
    function: Callable[..., R],
    uri: str,
    *args: object,
    limits: Limits,
    timeout_seconds: float,
    fingerprint: str | None = None,
    **options: Any,
) -> R:
    """Call a function in the sandbox, with the file at ``uri`` open for it.

    Args:
        fingerprint: state of a remote file when it was planned; None to skip the check.

    Raises:
        VideoError: the file cannot be opened, or as ``DecodeSandbox.run``.
    """
    if limits.sandbox == "required" and (lacking := confinement_lacks(limits)):
        raise UserError(f"--sandbox required, and the kernel of this machine lacks {' and '.join(lacking)}")
    sandbox = _sandbox(limits.memory_bytes, limits.sandbox != "off", limits.videos_per_decoder)
    path, member = split_member(uri)
    if storage.is_local(path):
        opened: AbstractContextManager[Any] = open_file(path, storage.open_video)
    else:
        opened = remote_file(path, limits, fingerprint)
    with opened as file:
        files = (file,)
        if member:
            found: R = sandbox.run(
                _with_member,
                member,
                function,
                *args,
                timeout_seconds=timeout_seconds,
                files=files,
                subject=uri,
                **options,
            )
            return found
        return sandbox.run(function, *args, timeout_seconds=timeout_seconds, files=files, subject=uri, **options)


_member: dict[str, str] = {}
"""In the child, the member that the request is about, of the archive that came with it."""


def _with_member(member: dict[str, str], function: Callable[..., R], *args: object, **options: Any) -> R:
    """In the child, call a function for a member of the archive that came with the request."""
    _member.update(member)
    try:
        return function(*args, **options)
    finally:
        _member.clear()


def _given_video() -> BinaryIO:
    """In the child, the file that came with the request, or the member of it that is meant."""
    return open_member(given_file(), _member) if _member else given_file()


def _given(_uri: str) -> BinaryIO:
    """In the child, the file that came with the request."""
    return _given_video()


_SIGNAL_CACHE_BYTES = 512 << 20
"""Signals that a worker keeps for other rows of the same video; at least those of the last row."""

_signal_cache: OrderedDict[Hashable, list[Signal]] = OrderedDict()


def _signals_of(source: SignalSource, columns: tuple[Columns, ...], limits: Limits, *, counted: bool) -> list[Signal]:
    """Read signals of one file in the sandbox, as it is no more trusted than its video; kept for other rows."""
    key = (source, columns, counted, limits)
    if key in _signal_cache:
        _signal_cache.move_to_end(key)
        return _signal_cache[key]
    read = partial(_run, limits=limits, timeout_seconds=PROBE_TIMEOUT_SECONDS, answer_records=_SIGNAL_RECORDS)
    times, shown = None, replace(source, path=storage.public_uri(source.path))
    if source.times is not None:
        times = read(read_times, source.times, storage.public_uri(source.times), _given)
        shown = replace(shown, times=storage.public_uri(source.times))
    found = read(read_signals, source.path, shown, columns, _given, times=times, counted=counted)
    _signal_cache[key] = found
    while len(_signal_cache) > 1 and _held_bytes() > _SIGNAL_CACHE_BYTES:
        _signal_cache.popitem(last=False)
    return found


@lru_cache(maxsize=4)
def _frame_seconds(uri: str, clock: Clock, limits: Limits) -> npt.NDArray[np.float64]:
    """Times of a video's frames after the first one, in seconds, in increasing order."""
    seconds = limits.seconds_for(0)
    found = _run(_frame_seconds_in_child, uri, clock, limits, limits=limits, timeout_seconds=seconds)
    if found.dtype != np.float64 or found.ndim != 1 or not np.isfinite(found).all() or (np.diff(found) <= 0).any():
        raise VideoError(Reason.DECODER_CRASHED, "the decoding process sent times of frames that are none")
    return found


def _frame_seconds_in_child(clock: Clock, limits: Limits) -> npt.NDArray[np.float64]:
    return frame_seconds(_given_video(), clock, limits)


def _of_frames(signal: Signal, uri: str, span: Span, limits: Limits) -> Signal:
    """A signal of numbered samples at the times of the frames with these numbers.

    Raises:
        VideoError: BAD_SIGNAL: it has more samples than the video has frames. UNSUPPORTED: they cannot be counted.
    """
    seconds = _frame_seconds(uri, Clock(time_base=span.time_base, start_pts=span.grid_start_pts), limits)
    if len(signal.seconds) > len(seconds):
        raise VideoError(
            Reason.BAD_SIGNAL,
            f"it has {len(signal.seconds)} samples, and the video {len(seconds)} frames: with the rule frames a sample "
            "belongs to each frame",
        )
    return replace(signal, seconds=seconds[: len(signal.seconds)])


def _held_bytes() -> int:
    return sum(each.values.nbytes + each.seconds.nbytes for found in _signal_cache.values() for each in found)


def probe(ref: VideoRef, limits: Limits | None = None) -> VideoProbe | VideoError:
    """Open a video in the sandbox and read its header; an error is returned, not raised.

    Raises:
        OutageError: its storage does not answer.
    """
    limits = limits or Limits()
    try:
        if storage.is_local(ref.uri):
            refuse_sparse(storage.absolute(split_member(ref.uri)[0]))
        shown = replace(ref, uri=storage.public_uri(ref.uri))  # the secrets of a signed URL are not for the child
        found = _run(probe_video, ref.uri, shown, _given, limits, limits=limits, timeout_seconds=PROBE_TIMEOUT_SECONDS)
        return checked_probe(found, ref, limits)
    except Exception as error:  # noqa: BLE001  whatever one file does, it is this row's error
        return row_error(error, ref.uri, limits.storage_hosts)


def _decode_in_child(
    spans: Sequence[Span], specs: Sequence[ClipSpec], max_clips: int, limits: Limits, keep_undamaged: bool
) -> list[SpanClips]:
    """Decode spans of one video in the sandbox's child process.

    Raises:
        VideoError: the file cannot be read, or has changed since it was planned.
    """
    decode = partial(
        decode_spans, spans, specs, max_clips=max_clips, limits=limits, keep_undamaged=keep_undamaged, continuing=True
    )
    return read_unchanged(_given_video(), spans[0].video_id, limits, decode)


def _decode_spans(
    spans: Sequence[Span],
    specs: Sequence[ClipSpec],
    max_clips: int,
    limits: Limits,
    keep_undamaged: bool,
    fingerprint: str | None,
    *,
    timeout_seconds: float,
) -> list[SpanClips]:
    """Decode spans of one video in the sandbox.

    Args:
        specs: clip settings of each span.
        max_clips: largest number of clips of an open-ended last span.
        fingerprint: state of the file when it was planned; None to skip the check.

    Raises:
        VideoError: the file cannot be read, or has changed since it was planned.
    """
    uri = spans[0].uri
    if fingerprint is not None and storage.is_local(uri):
        refuse_changed(uri, fingerprint)
    shown = [replace(span, uri=storage.public_uri(uri)) for span in spans]
    most = [_most_clips(span, spec, max_clips) for span, spec in zip(spans, specs, strict=True)]
    results = _run(
        _decode_in_child,
        uri,
        shown,
        tuple(specs),
        max_clips,
        limits,
        keep_undamaged,
        limits=limits,
        timeout_seconds=timeout_seconds,
        fingerprint=fingerprint,
        answer_bytes=sum(n * (spec.clip_bytes + 8 * spec.num_frames) for n, spec in zip(most, specs, strict=True)),
        answer_records=2 * sum(most) + _ERROR_RECORDS * len(spans),
    )
    return checked_clips(results, spans, specs, max_clips)


def _most_clips(span: Span, spec: ClipSpec, max_clips: int) -> int:
    """Largest number of clips of a span, those of its halo included."""
    return spec.halo_clips + (max_clips if span.end_clip is None else span.end_clip - span.first_clip)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanDecoder:
    """Decode stage: adds frames, or a rejection, to each row of the plan."""

    spec: ClipSpec
    """Clip settings; each row gives its own frame size."""
    max_clips: int
    """Largest number of clips in one row; an open-ended last span with more is rejected."""
    clips_per_pass: int
    """Largest total number of clips of rows of one video that are decoded in one pass."""
    limits: Limits = field(default_factory=Limits)
    keep_undamaged: bool = False
    """Whether to keep the undamaged clips of a damaged stretch of video."""
    signals: tuple[tuple[str, SignalRule], ...] = ()
    """Names and rules of the signals."""
    stop: CancelToken | None = None
    """Cancellation token; rows after it is set are skipped and left to the next run."""
    recutting: Recutting | None = None
    """Spans that are decoded a second time with another cut; None for none."""

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Decode the spans of the rows, consecutive ones of one video together, up to ``clips_per_pass``.

        Yields:
            One table of one row for each row of the plan.
        """
        plan = rows.to_pylist()
        number = 0
        while number < len(plan):
            end = number + 1
            clips = plan[number]["expected_clips"]
            while end < len(plan) and plan[end]["uri"] == plan[number]["uri"]:
                clips += plan[end]["expected_clips"]
                if clips > self.clips_per_pass:
                    break
                end += 1
            if self.stop is not None and self.stop.is_cancelled():
                return
            started = time.monotonic()
            spec = row_spec(plan[number], self.spec)
            fingerprint = plan[number].get("fingerprint")
            spans = [row_span(row) for row in plan[number:end]]
            outcomes = self.decode_together(spans, [spec] * len(spans), fingerprint)
            recut = [self._recut(*each, spec, fingerprint) for each in zip(spans, outcomes, strict=True)]
            seconds = (time.monotonic() - started) / len(outcomes)
            for row, (outcome, is_recut) in enumerate(recut, start=number):
                yield self.with_outcome(rows.slice(row, 1), plan[row], outcome, spec, seconds, is_recut=is_recut)
            number = end

    def _recut(self, span: Span, outcome: SpanClips, spec: ClipSpec, fingerprint: str | None) -> tuple[SpanClips, bool]:
        """Decode a chosen span again with another cut.

        Returns:
            The outcome, which is an error where the cut makes a difference; and whether it was compared.
        """
        chosen = self.recutting is not None and outcome.clips and outcome.error is None and self.recutting.chooses(span)
        if self.recutting is None or not chosen:
            return outcome, False

        def decode(piece: Span) -> SpanClips:
            [result] = self.decode_together([piece], [spec], fingerprint)
            _crashes.pop(span.video_id, None)  # the spans themselves may be decoded all the same
            return result

        try:
            error = self.recutting.compare(span, outcome.clips, decode)
        except VideoError:
            return outcome, False
        return outcome if error is None else SpanClips(clips=[], error=error), True

    def with_outcome(
        self,
        row: pa.Table,
        plan: dict[str, Any],
        outcome: SpanClips,
        spec: ClipSpec,
        seconds: float,
        *,
        is_recut: bool = False,
    ) -> pa.Table:
        """The row with its clips and signals, or with a rejection."""
        try:
            _refuse_other_episode(plan, outcome)
            table = add_clips(
                row,
                outcome,
                uri=storage.public_uri(plan["uri"]),
                start_seconds=start_seconds(row_span(plan), spec),
                seconds=seconds,
                is_recut=is_recut,
                continuous=spec.continuous,
            )
            return add_signals(table, self._signals(plan, outcome, spec))
        except Exception as error:
            if not outcome.clips:  # nothing of the row is left that could have failed
                raise
            refused = row_error(error, plan["uri"], self.limits.storage_hosts)
            return self.with_outcome(row, plan, SpanClips(clips=[], error=refused), spec, seconds)

    def _signals(self, row: dict[str, Any], outcome: SpanClips, spec: ClipSpec) -> list[tuple[pa.Field, pa.Array]]:
        """The signal columns of a row, with one value per clip (without the halo).

        Raises:
            VideoError: a signal cannot be read.
        """
        span = row_span(row)
        first_seconds = float(span.grid_start_pts * span.time_base)
        columns: list[tuple[pa.Field, pa.Array]] = []
        clips = [clip for clip in outcome.clips if clip.clip_index >= span.first_clip]
        signals = self._read_signals(row) if clips else {}
        for name, rule in self.signals:
            fields = signal_fields(name, rule)
            if name in signals:
                signal, steps = signals[name]
                aligned = [
                    align_clip(signal, clip, rule, first_seconds=first_seconds, fps=float(spec.fps), steps=steps)
                    for clip in clips
                ]
                arrays = signal_arrays(name, rule, aligned)
            elif row[signal_source(name)] is not None:
                arrays = signal_arrays(name, rule, [])
            else:
                arrays = [pa.nulls(len(clips), field.type) for field in fields]
            columns += [(field, array.cast(field.type)) for field, array in zip(fields, arrays, strict=True)]
        return columns

    def _read_signals(self, row: dict[str, Any]) -> dict[str, tuple[Signal, Steps | None]]:
        """The signals of a row by name, with their clocks; those of one file are read together.

        Raises:
            VideoError: a signal cannot be read.
        """
        files: dict[tuple[SignalSource, bool], list[tuple[str, Columns]]] = {}
        for name, rule in self.signals:
            if row[signal_source(name)] is not None:
                source = SignalSource.of(row[signal_source(name)])
                counted = rule == "frames"
                if counted and (source.rate is not None or source.times is not None or source.offset_seconds):
                    detail = f"{storage.public_uri(source.path)}: rate=, times= and offset= are not for the rule frames"
                    raise VideoError(Reason.BAD_SIGNAL, detail)
                files.setdefault((source.without_columns, counted), []).append((name, source.columns))
        signals: dict[str, tuple[Signal, Steps | None]] = {}
        for (source, counted), wanted in files.items():
            for first in range(0, len(wanted), MAX_SIGNALS):
                some = wanted[first : first + MAX_SIGNALS]
                try:
                    found = _signals_of(source, tuple(columns for _, columns in some), self.limits, counted=counted)
                except OutageError as error:
                    raise row_error(error, source.path, self.limits.storage_hosts) from error
                if counted:
                    found = [_of_frames(signal, row["uri"], row_span(row), self.limits) for signal in found]
                steps = (
                    None if source.rate is None else Steps(offset_seconds=source.offset_seconds, per_second=source.rate)
                )
                signals |= {name: (signal, steps) for (name, _), signal in zip(some, found, strict=True)}
        return signals

    def decode_together(
        self, spans: Sequence[Span], specs: Sequence[ClipSpec], fingerprint: str | None
    ) -> list[SpanClips]:
        """Decode spans of one video in one pass over its frames; a failure is an error of the span.

        Args:
            specs: clip settings of each span, which may differ.
            fingerprint: state of the file when it was planned; None to skip the check.
        """
        video_id = spans[0].video_id
        if video_id in _crashes:
            return [SpanClips(clips=[], error=_crashes[video_id])] * len(spans)
        seconds = 0.0
        for span, spec in zip(spans, specs, strict=True):
            clip_seconds = min(max(spec.clip_seconds, spec.stride), spec.clip_seconds + SEEK_GAP_SECONDS)
            seconds += float(_most_clips(span, spec, self.max_clips) * clip_seconds)
        try:
            return _decode_spans(
                spans,
                specs,
                self.max_clips,
                self.limits,
                self.keep_undamaged,
                fingerprint,
                timeout_seconds=self.limits.seconds_for(seconds),
            )
        except Exception as raised:  # noqa: BLE001  whatever one file does, it is this row's error
            error = row_error(raised, spans[0].uri, self.limits.storage_hosts)
            of_the_file = error.reason in (Reason.UNREADABLE, Reason.CHANGED)
            if len(spans) > 1 and not of_the_file:  # the span that failed is unknown: try each by itself
                each = zip(spans, specs, strict=True)
                return [result for span, spec in each for result in self.decode_together([span], [spec], fingerprint)]
            if error.reason is Reason.DECODER_CRASHED:
                _crashes[video_id] = error
            return [SpanClips(clips=[], error=error)] * len(spans)


def _refuse_other_episode(row: dict[str, Any], outcome: SpanClips) -> None:
    """Refuse a row of a dataset's episode that begins with a frame of the episode before, as its own first is missing.

    Raises:
        VideoError: TRUNCATED.
    """
    frame_seconds = row.get(FRAME_SECONDS.name)
    if frame_seconds is None or not outcome.clips or outcome.clips[0].clip_index > 0:
        return
    span = row_span(row)
    shown = float(outcome.clips[0].frame_pts_seconds[0]) - float(span.grid_start_pts * span.time_base)
    if shown < float(span.part.start_seconds) - frame_seconds / 2:
        raise VideoError(
            Reason.TRUNCATED,
            f"its episode begins at {float(span.part.start_seconds):.6g} s, and the frame shown then is one from "
            f"{shown:.6g} s, of the episode before: the first frame is missing",
        )


def start_seconds(span: Span, spec: ClipSpec) -> float:
    """Start of a span, in seconds after the first frame."""
    layout = ClipTimeline.of(span, span.part, spec)
    inside = not layout.is_beyond(span.first_clip)
    return float(max(span.part.start_seconds, layout.start_seconds(span.first_clip) if inside else 0))


def decode_clip(span: Span, spec: ClipSpec, *, limits: Limits, fingerprint: str | None = None) -> Clip:
    """Decode the first clip of a span by itself.

    Args:
        fingerprint: state of the file when it was planned; None to skip the check.

    Raises:
        VideoError: the clip cannot be decoded, or the span has none.
    """
    if span.video_id in _crashes:
        raise _crashes[span.video_id]
    span = replace(span, end_clip=span.first_clip + 1)
    seconds = limits.seconds_for(float(spec.clip_seconds))
    try:
        [result] = _decode_spans([span], [spec], 1, limits, False, fingerprint, timeout_seconds=seconds)
    except Exception as raised:
        error = row_error(raised, span.uri, limits.storage_hosts)
        if error.reason is Reason.DECODER_CRASHED:
            _crashes[span.video_id] = error
        raise error from raised
    if result.error is not None:
        raise result.error
    if not result.clips:
        raise VideoError(Reason.TOO_SHORT, f"there is no whole clip of {float(spec.clip_seconds):.3g} s")
    clip: Clip = result.clips[-1]
    return clip


def header_of(uri: str, video_id: str, limits: Limits) -> VideoProbe:
    """Open a video that was planned before, perhaps by an earlier version, which made the ids of small files otherwise.

    Returns:
        The header. Its id is ``video_id`` if the file has that content.

    Raises:
        VideoError: the video cannot be opened.
    """
    found = probe(VideoRef(uri=uri, num_bytes=-1), limits)
    if isinstance(found, VideoProbe) and found.video_id != video_id:
        other = replace(limits, sampled_ids=not limits.sampled_ids)
        found = probe(VideoRef(uri=uri, num_bytes=-1), other)
    if isinstance(found, VideoError):
        raise found
    return found


def decode_again(
    uri: str,
    video_id: str,
    clip_index: int,
    spec: ClipSpec,
    part: Part | None = None,
    limits: Limits | None = None,
) -> list[Clip]:
    """Decode a clip of a tokenized video again from its source.

    Args:
        uri: location of the source.
        video_id: id that the source must have.
        clip_index: index of the clip in its part.
        spec: clip settings of its run, frame size included.
        part: part of the video; None for the whole video.
        limits: limits of its run, which include the frame rate of image archives.

    Returns:
        The clips of the halo, then the clip itself.

    Raises:
        VideoError: the source is gone, was replaced, or no longer decodes.
    """
    limits = replace(limits or Limits(), sandbox="auto")  # what an output records does not switch it off
    header = header_of(uri, video_id, limits)
    if header.video_id != video_id:
        raise VideoError(Reason.UNREADABLE, f"the file is another one now: its id is {header.video_id}")
    [first, *_] = plan_spans(header, spec, 1, part)
    span = replace(first, first_clip=clip_index, end_clip=clip_index + 1)
    seconds = PROBE_TIMEOUT_SECONDS
    try:
        [result] = _decode_spans([span], [spec], 1, limits, False, None, timeout_seconds=seconds)
    except Exception as error:
        raise row_error(error, uri) from error
    if result.error is not None:
        raise result.error
    if not result.clips or result.clips[-1].clip_index != clip_index:
        raise VideoError(Reason.TRUNCATED, f"the video has no clip {clip_index} any more")
    return result.clips
