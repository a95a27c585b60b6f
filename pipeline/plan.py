"""Planning: opens every video once and lists its spans as rows, and its failures as rejections.

Ids come from content and settings, so the same videos give the same rows on any machine and in any order.
``pipeline.output.resume`` stores the rows and selects those that are left to process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vidshard.pipeline import storage
from vidshard.pipeline.decode_stage import probe
from vidshard.pipeline.output.entries import entry_ids, location_keys
from vidshard.pipeline.output.plan_store import PLAN_SCHEMA
from vidshard.pipeline.row_errors import row_error
from vidshard.pipeline.rows import FRAME_SECONDS, REJECTION, rejection_row, row_part, span_row
from vidshard.pipeline.video.geometry import nearest_bucket
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import Reason, Rejection, Stage, VideoError
from vidshard.schemas.video import ClipSpec, Limits, Part, VideoProbe, VideoRef

SPAN_BYTES = 32 << 20
"""Default size of the frames of a span: several spans fit one of Ray's 128 MiB blocks, and at 256x256 a span is about
20 s of video, which keeps the share of time spent seeking to its keyframe low."""

_ROWS = PLAN_SCHEMA.append(REJECTION)

_MAX_VIDEOS_PER_TASK = 64
_MAX_TASKS = 4096
"""Number of probe tasks above which tasks get more videos instead: each task costs the driver an object in Ray's
store."""


def clips_per_span(spec: ClipSpec, wanted: int | None) -> int:
    """Number of clips per span: ``wanted`` if set, otherwise as many as fit ``SPAN_BYTES``, at least one.

    In a continuous sequence the default is at least four times the halo, so that the halo adds at most a quarter to
    the work.
    """
    return wanted or max(1, SPAN_BYTES // spec.clip_bytes, 4 * spec.halo_clips)


def open_videos(
    videos: pa.Table,
    specs: Sequence[ClipSpec],
    *,
    part: Part,
    span_clips: int,
    num_tasks: int,
    map_videos: Callable[[Sequence[pa.Table], Callable[[pa.Table], pa.Table]], Iterator[pa.Table]],
    limits: Limits | None = None,
) -> Iterator[pa.Table]:
    """Open every video and plan its spans; yields tables of rows in any order.

    Rows have ``plan_store.PLAN_SCHEMA`` and a column ``rejection``. A video that cannot be opened has one row, with
    its rejection and without a span.

    Args:
        videos: rows of ``pipeline.discover``, with their entries.
        specs: clip settings, one per bucket; a video gets the bucket nearest to its aspect ratio.
        part: part of each video whose row names none.
        span_clips: clips per span.
        num_tasks: smallest number of tasks to spread the videos over, if there are enough.
        map_videos: function that runs a stage over tables of videos, as an executor does.
        limits: resource limits for one video; None for the defaults.
    """
    most = max(_MAX_VIDEOS_PER_TASK, videos.num_rows // _MAX_TASKS)
    size = max(1, min(most, -(-videos.num_rows // num_tasks)))
    names = ("uri", "num_bytes", "entry", "refusal", "part_start_seconds", "part_end_seconds", FRAME_SECONDS.name)
    needed = videos.select([name for name in names if name in videos.column_names])
    tables = [needed.slice(at, size).combine_chunks() for at in range(0, videos.num_rows, size)]
    yield from map_videos(tables, VideoPlanner(tuple(specs), part, span_clips, limits or Limits()))


@dataclass(frozen=True)
class VideoPlanner:
    """Probe stage: rows of videos in, rows of their spans out, or one row with a rejection."""

    specs: tuple[ClipSpec, ...]
    part: Part
    span_clips: int
    limits: Limits

    def __call__(self, videos: pa.Table) -> pa.Table:
        """Open the videos and plan their spans.

        Raises:
            OutageError: a storage does not answer.
        """
        storage.restrict_addresses(self.limits.private_hosts)
        probes: dict[str, tuple[VideoProbe | VideoError, str | None]] = {}
        tables = [self._planned(video, probes) for video in videos.to_pylist()]
        return pa.concat_tables([_ROWS.empty_table(), *tables])

    def _planned(
        self, video: dict[str, Any], probes: dict[str, tuple[VideoProbe | VideoError, str | None]]
    ) -> pa.Table:
        """The spans of one video, or a row with its rejection."""
        fingerprint: str | None = None
        try:
            uri = video["uri"]
            if video.get("refusal") is not None:
                raise VideoError(Reason.NOT_ALLOWED, video["refusal"])
            if uri not in probes:
                # taken before the video is opened: a file that is replaced in between then counts as changed
                fingerprint = storage.fingerprint(uri)
                probes[uri] = probe(VideoRef(uri=uri, num_bytes=video["num_bytes"]), self.limits), fingerprint
            found, fingerprint = probes[uri]
            if isinstance(found, VideoError):
                raise found
            _refuse_other_times(found, row_part(video), video.get(FRAME_SECONDS.name))
            common = self._entries(video, fingerprint)
            rows = [{**span, **common} for span in self._spans(found, row_part(video), fingerprint)]
            return pa.Table.from_pylist(rows, schema=_ROWS)
        except Exception as error:  # noqa: BLE001  whatever one row says or holds, it is this row's error
            refused = row_error(error, video["uri"], self.limits.storage_hosts)
        common = self._entries(video, fingerprint)
        rejection = Rejection(
            uri=common["uri"],
            video_id=None,
            span_id=None,
            start_seconds=None,
            stage=Stage.PROBE,
            reason=refused.reason,
            detail=refused.detail,
            place=common["place"].hex(),
        )
        return pa.Table.from_pylist([{**common, "rejection": rejection_row(rejection)}], schema=_ROWS)

    def _entries(self, video: dict[str, Any], fingerprint: str | None) -> dict[str, Any]:
        """Columns by which a video is recognized later."""
        uri = video["uri"]
        times = video.get("part_start_seconds"), video.get("part_end_seconds")
        [seen] = entry_ids([uri], [fingerprint], [times[0]], [times[1]], self.part).to_pylist()
        [place] = location_keys([uri]).to_pylist()
        return {"entry": video["entry"], "seen_entry": seen, "place": place, "uri": storage.public_uri(uri)}

    def _spans(self, video: VideoProbe, part: Part, fingerprint: str | None) -> list[dict[str, Any]]:
        part = self.part if part.is_whole else part
        if part.start_seconds > self.limits.max_seconds:
            raise VideoError(
                Reason.TOO_SHORT,
                f"its part starts at {float(part.start_seconds):g} s, and no video is longer than the "
                f"{self.limits.max_seconds:g} of --max-seconds",
            )
        sizes = {(spec.height, spec.width): spec for spec in self.specs}
        spec = sizes[nearest_bucket(video.source.width, video.source.height, list(sizes))]
        rows = [span_row(span, spec, fingerprint) for span in plan_spans(video, spec, self.span_clips, part)]
        num_clips = sum(row["expected_clips"] for row in rows)
        if num_clips > self.limits.max_clips:
            raise VideoError(
                Reason.OVER_LIMIT,
                f"{num_clips:,} clips by its header, more than the {self.limits.max_clips:,} of --max-clips",
            )
        return rows


def _refuse_other_times(video: VideoProbe, part: Part, frame_seconds: float | None) -> None:
    """Refuse a video whose times are not those of the dataset that names it.

    A header may leave out the last frame's own time on screen, so that a frame may be missing at the end.

    Raises:
        VideoError: TRUNCATED: it begins later, or ends earlier. UNSUPPORTED: it begins before time 0.
    """
    if frame_seconds is None:
        return
    first = float(video.grid_start_pts * video.time_base)
    if abs(first) > frame_seconds / 2:
        raise VideoError(
            Reason.TRUNCATED if first > 0 else Reason.UNSUPPORTED,
            f"its first frame is shown at {first:.6g} s, and the dataset counts from 0: it was cut, or lost a frame",
        )
    seconds = video.duration_seconds_from_header
    if part.end_seconds is not None and 0 < seconds < float(part.end_seconds) - 1.5 * frame_seconds:
        raise VideoError(
            Reason.TRUNCATED,
            f"it is {seconds:.6g} s long, and its episode ends at {float(part.end_seconds):.6g} s",
        )
