"""Telemetry of a tokenization run: its events (`jobs.runtime.events`) and its metrics (`jobs.tokenization.metrics`)."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from vidshard.jobs.runtime.events import events_of
from vidshard.jobs.runtime.executor import Executor
from vidshard.jobs.tokenization.metrics import RunMetrics
from vidshard.jobs.tokenization.summary import Summary
from vidshard.pipeline.output.shard_writer import WriteStats
from vidshard.pipeline.resolved_run import ResolvedRun, public_record
from vidshard.schemas.rejections import Rejection
from vidshard.schemas.uris import public_uri


class Telemetry:
    """Tells what becomes of a run's videos and spans."""

    def __init__(self, console: Console) -> None:
        self._events = events_of(console)
        self._metrics = RunMetrics(out="", is_exported=False)
        self._clip_seconds = self._frame_seconds = 0.0
        self._left = 0
        self._lock = threading.Lock()  # commits are told from a thread
        self._came: deque[tuple[float, int]] = deque()
        """Time and number of the clips that came out and are not committed."""

    def started(self, resolved: ResolvedRun, executor: Executor) -> None:
        """Tell that device, precision and machines are decided."""
        self._metrics = RunMetrics(out=public_uri(resolved.run.out), is_exported=executor.can_grow)
        spec = resolved.largest
        self._clip_seconds = min(float(spec.clip_seconds), float(spec.stride_seconds or spec.clip_seconds))
        self._frame_seconds = self._clip_seconds / spec.num_frames
        self._events.emit(
            "run_started",
            settings=public_record(resolved.run),
            executor=str(executor),
            cpus=executor.num_cpus,
            gpus=executor.num_gpus,
            nodes=executor.num_nodes,
            device=resolved.run.device,
            precision=resolved.run.precision,
        )

    def planned(self, summary: Summary, rejections: Sequence[Rejection], left: int) -> None:
        """Tell the plan.

        Args:
            summary: summary of the run, after planning.
            rejections: videos that were rejected while they were opened.
            left: number of spans to do now.
        """
        share = left / summary.planned_spans if summary.planned_spans else 0.0
        self._left = left
        self._metrics.add("videos_in", summary.num_videos)
        self._metrics.add("video_seconds_in", summary.expected_clips * share * self._clip_seconds)
        self._metrics.set("spans_left", left)
        for reason, count in summary.reasons.items():
            self._metrics.add("rejections", count, reason=reason)
        for rejection in rejections:
            self._events.emit(
                "video_rejected",
                uri=public_uri(rejection.uri),
                reason=str(rejection.reason),
                detail=rejection.detail,
            )
        self._events.emit(
            "planned",
            videos=summary.num_videos,
            spans=summary.planned_spans,
            clips=summary.expected_clips,
            reused=summary.reused_spans,
            rejected_before=summary.rejected_before,
            left=left,
            rejected_videos=len(rejections),
        )

    def encoding(self, encoders: int) -> None:
        """Tell with how many encoders the run begins."""
        self._metrics.set("encoders", encoders)

    def committed(self, path: str, stats: WriteStats) -> None:
        """Tell of a shard that is committed; may be called from any thread."""
        self._metrics.add("shards", 1)
        self._metrics.add("tokens", stats.num_values)
        self._metrics.add("bytes", stats.file_bytes)
        self._events.emit(
            "shard_written",
            path=public_uri(path),
            clips=stats.num_clips,
            spans=stats.num_spans,
            bytes=stats.file_bytes,
        )
        left = stats.num_clips
        with self._lock:
            while left and self._came:
                came, clips = self._came.popleft()
                if clips > left:
                    self._came.appendleft((came, clips - left))
                left -= min(left, clips)

    def begun_again(self, left: int) -> None:
        """Tell that spans which had come out were lost with their writers: ``left`` are to do now."""
        self._left = left
        self._metrics.set("spans_left", left)
        with self._lock:
            self._came.clear()
        self.tick()

    def tick(self) -> None:
        """Tell how far the writers are behind; called about every second."""
        with self._lock:
            waiting = sum(clips for _, clips in self._came)
            oldest = self._came[0][0] if self._came else None
        self._metrics.set("clips_uncommitted", waiting)
        self._metrics.set("writer_lag_seconds", 0.0 if oldest is None else time.monotonic() - oldest)

    def took(self, receipts: pa.Table, rejections: Sequence[Mapping[str, Any]]) -> None:
        """Tell of the spans that came out, each once.

        Args:
            receipts: ``RECEIPT_SCHEMA``.
            rejections: rejections among them, as rows of ``rejects/``.
        """
        clips = pc.sum(receipts["num_clips"]).as_py() or 0
        self._left -= receipts.num_rows
        self._metrics.add("clips", clips)
        self._metrics.add("videos_tokenized", pc.sum(receipts["is_last"]).as_py() or 0)
        frames = pc.sum(receipts["num_valid_frames"]).as_py() or 0
        self._metrics.add("video_seconds_tokenized", frames * self._frame_seconds)
        for name in ("decode_seconds", "encode_seconds", "encode_wait_seconds"):
            self._metrics.add(name, pc.sum(receipts[name]).as_py() or 0)
        for rejection in rejections:
            self._metrics.add("rejections", 1, reason=rejection["reason"])
        self._metrics.set("spans_left", self._left)
        if clips:
            with self._lock:
                self._came.append((time.monotonic(), clips))
        self.tick()
        if not self._events.is_open:
            return
        columns = (receipts[name].to_pylist() for name in ("span_id", "num_clips", "decode_seconds"))
        for span_id, clips, seconds in zip(*columns, strict=True):
            if clips:
                self._events.emit("span_finished", span_id=span_id, clips=clips, decode_seconds=round(seconds, 3))
        for rejection in rejections:
            self._events.emit(
                "span_rejected",
                span_id=rejection["span_id"],
                video_id=rejection["video_id"],
                uri=public_uri(rejection["uri"]),
                reason=rejection["reason"],
                detail=rejection["detail"],
                kept_clips=rejection["kept_clips"],
            )
