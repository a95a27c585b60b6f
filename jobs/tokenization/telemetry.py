"""Telemetry of a tokenization run: the events that it tells while it goes on (`jobs.runtime.events`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from rich.console import Console

from vidshard.jobs.runtime.events import events_of
from vidshard.jobs.runtime.executor import Executor
from vidshard.jobs.tokenization.summary import Summary
from vidshard.pipeline.resolved_run import ResolvedRun, public_record
from vidshard.schemas.rejections import Rejection
from vidshard.schemas.uris import public_uri


class Telemetry:
    """Tells what becomes of a run's videos and spans."""

    def __init__(self, console: Console) -> None:
        self._events = events_of(console)

    def started(self, resolved: ResolvedRun, executor: Executor) -> None:
        """Tell that device, precision and machines are decided."""
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

    def took(self, receipts: pa.Table, rejections: Sequence[Mapping[str, Any]]) -> None:
        """Tell of the spans that came out, each once.

        Args:
            receipts: ``RECEIPT_SCHEMA``.
            rejections: rejections among them, as rows of ``rejects/``.
        """
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
