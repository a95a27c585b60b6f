"""The CPU stages as Ray calls them: rows in, rows out, and every failure of a video a value in its row.

``pipeline.decode`` does the work and knows nothing of Ray; here rows become its arguments and its results become
rows. FFmpeg runs in a child process of each Ray worker (``pipeline.sandbox``), so that a hostile file costs one
row and no worker.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache

import pyarrow as pa

from pipeline import storage
from pipeline.decode import decode_span, probe_video
from pipeline.rows import add_clips, row_span
from pipeline.sandbox import DecodeSandbox
from schemas.video import Clip, ClipSpec, Limits, Reason, Span, VideoError, VideoProbe, VideoRef

PROBE_TIMEOUT_SECONDS = 120.0
"""Opening a file and decoding its first frame; slow object stores included."""

_crashes: dict[str, VideoError] = {}
"""Videos at which this worker's decoder died, by id: not tried again, as a new decoder and a core dump each cost."""


@cache
def _sandbox(memory_bytes: int) -> DecodeSandbox:
    """This worker process's own, started at its first video and reused for all that follow."""
    return DecodeSandbox(memory_limit_bytes=memory_bytes)


def probe(ref: VideoRef, limits: Limits | None = None) -> VideoProbe | VideoError:
    """Open a video and read what its header says, in the sandbox."""
    limits = limits or Limits()
    try:
        return _sandbox(limits.memory_bytes).run(
            probe_video, ref, storage.open_video, limits, timeout_seconds=PROBE_TIMEOUT_SECONDS
        )
    except VideoError as error:
        return error


def _decode_in_child(span: Span, spec: ClipSpec, max_clips: int, limits: Limits) -> list[Clip]:
    if storage.is_local(span.uri):
        return decode_span(span, spec, span.uri, max_clips=max_clips, limits=limits)
    try:
        file = storage.open_video(span.uri)
    except storage.StorageError as error:
        raise VideoError(Reason.UNREADABLE, str(error)) from error
    with file:
        return decode_span(span, spec, file, max_clips=max_clips, limits=limits)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpanDecoder:
    """The decoding stage: a row of the plan in, the row with its frames, or with its rejection, out."""

    spec: ClipSpec
    max_clips: int
    """Clips that one row may hold; an open-ended last span beyond it is rejected."""
    limits: Limits = field(default_factory=Limits)

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        """Decode each row's span, one row at a time so that memory holds one span's frames."""
        for number in range(rows.num_rows):
            row = rows.slice(number, 1)
            span = row_span(row.to_pylist()[0])
            started = time.monotonic()
            outcome = self._decode(span)
            yield add_clips(
                row,
                outcome,
                uri=storage.public_uri(span.uri),
                start_seconds=float(max(0, self.spec.first_frame(span.first_clip)) / self.spec.fps),
                seconds=time.monotonic() - started,
                continuous=self.spec.continuous,
            )

    def _decode(self, span: Span) -> list[Clip] | VideoError:
        if span.video_id in _crashes:
            return _crashes[span.video_id]
        num_clips = self.max_clips if span.end_clip is None else span.end_clip - span.first_clip
        seconds = float((num_clips + self.spec.halo_clips) * self.spec.clip_seconds)
        try:
            return _sandbox(self.limits.memory_bytes).run(
                _decode_in_child,
                span,
                self.spec,
                self.max_clips,
                self.limits,
                timeout_seconds=self.limits.seconds_for(seconds),
            )
        except VideoError as error:
            if error.reason is Reason.DECODER_CRASHED:
                _crashes[span.video_id] = error
            return error


def decode_again(uri: str, video_id: str, clip_index: int, spec: ClipSpec) -> list[Clip]:
    """One clip of a video that was tokenized before, after those of its halo, straight from its source.

    Raises:
        VideoError: the source is gone, was replaced, or no longer decodes.
    """
    limits = Limits()
    header = probe(VideoRef(uri=uri, num_bytes=-1), limits)
    if isinstance(header, VideoError):
        raise header
    if header.video_id != video_id:
        raise VideoError(Reason.UNREADABLE, f"the file is another one now: its id is {header.video_id}")
    span = Span(
        video_id=video_id,
        uri=uri,
        time_base=header.time_base,
        grid_start_pts=header.grid_start_pts,
        first_clip=clip_index,
        end_clip=clip_index + 1,
        duration_seconds_from_header=header.duration_seconds_from_header,
        source=header.source,
    )
    clips: list[Clip] = _sandbox(limits.memory_bytes).run(
        _decode_in_child, span, spec, 1, limits, timeout_seconds=PROBE_TIMEOUT_SECONDS
    )
    if not clips or clips[-1].clip_index != clip_index:
        raise VideoError(Reason.TRUNCATED, f"the video has no clip {clip_index} any more")
    return clips
