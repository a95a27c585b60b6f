"""Writers on the nodes of the encoders, as Ray actors: a coordinator beside the driver, and one writer a node.

    EncoderActor ── rows ──▶ NodeWriter ── ShardReport ──▶ Coordinator ◀── asks ── driver
       same node, acknowledged      stages shards                              publishes, settles

A writer starts on a node when an encoder there has rows for the first time. An encoder returns its receipts once its
writer has taken the rows, and the writer takes none while too many of its shards are unsettled. A writer that dies is
replaced by another one. What it held is done again at the end of the run, as no shard of it was committed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from vidshard.pipeline.attempts import Attempts
from vidshard.pipeline.cancel import Cancellation
from vidshard.pipeline.output.shard_writer import WRITER_THREADS, ShardReport, ShardSettings, ShardWriter
from vidshard.schemas.errors import RunCutShortError, RunFailedError, VidshardError, one_line

_LOOKING_SECONDS = 0.25
"""Pause between two looks of the driver at the reports."""
_ANSWER_SECONDS = 60.0
"""Time for the directory to answer."""
_DUE_SECONDS = 1.0
"""Pause between two looks of a writer at whether its rows are due."""
_MAX_WRITERS = 6
"""Writers that an encoder tries for the same rows."""


class NodeWriter:
    """`ShardWriter` as a Ray actor. Rows are copied out of the object store, whose memory is for frames."""

    def __init__(self, settings: ShardSettings, name: str, coordinator: ActorHandle) -> None:
        self._writer = ShardWriter(settings, self._report, name=name)
        self._coordinator = coordinator
        threading.Thread(target=self._look, name="due", daemon=True).start()

    def add(self, rows: pa.Table) -> None:
        """Take encoded rows, as `ShardWriter.add`, once there is room."""
        self._writer.wait_for_room()
        self._writer.add(_copied(rows))

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def settle(self, number: int, unwanted: Collection[int]) -> None:
        """Settle a shard, as `ShardWriter.settle`."""
        self._writer.settle(number, unwanted)

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def begin_all(self) -> None:
        """Begin to write everything, as `ShardWriter.begin_all`."""
        self._writer.begin_all()

    @ray.method(concurrency_group="control")  # type: ignore[untyped-decorator]
    def flush(self) -> None:
        """Write everything, and return when the coordinator has all reports."""
        self._writer.flush()

    def _look(self) -> None:
        while True:
            time.sleep(_DUE_SECONDS)
            self._writer.write_if_due()

    def _report(self, report: ShardReport) -> None:
        if report.error is not None and not isinstance(report.error, VidshardError):
            # others perhaps cannot be sent
            report = replace(report, error=RunFailedError(f"{type(report.error).__name__}: {one_line(report.error)}"))
        ray.get(self._coordinator.report.remote(report))


def _copied(rows: pa.Table) -> pa.Table:
    """Copy a table to memory of this process."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    return pa.ipc.open_stream(sink.getvalue()).read_all()


class Coordinator(Attempts, Cancellation):
    """State that all processes of a run share: writers, reports that the driver has not taken, attempts, cancellation.

    It is one actor, on the driver's node, since each actor is a process that takes a second of CPU to start. It is not
    restarted, as the list of writers would be lost.
    """

    def __init__(self, settings: ShardSettings) -> None:
        Attempts.__init__(self)
        Cancellation.__init__(self)
        self._settings = settings
        self._writers: dict[str, tuple[str, Any]] = {}
        self._all: dict[str, Any] = {}
        self._reports: list[ShardReport] = []

    def writer_of(self, node_id: str, lost: str | None) -> tuple[str, Any]:
        """Name and handle of the writer of a node; a new one if there is none, or the last one is ``lost``."""
        name, writer = self._writers.get(node_id, (None, None))
        if name is not None and name != lost:
            return name, writer
        name = f"{node_id[:8]}-{len(self._all)}"
        here = ray.get_runtime_context().current_actor
        writer = (
            ray.remote(num_cpus=0, max_concurrency=64, concurrency_groups={"control": 4})(NodeWriter)
            .options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=True),
            )
            .remote(self._settings, name, here)
        )
        self._writers[node_id] = name, writer
        self._all[name] = writer
        return name, writer

    def report(self, report: ShardReport) -> None:
        """Keep a report for the driver."""
        self._reports.append(report)

    def take(self) -> tuple[list[ShardReport], dict[str, Any]]:
        """Give the reports since the last call, and the writers by name."""
        reports, self._reports = self._reports, []
        return reports, self._all


class NodeDelivery:
    """Hands the rows of one encoder to the writer of its node."""

    def __init__(self, coordinator: ActorHandle) -> None:
        self._coordinator = coordinator
        self._writer: tuple[str, Any] | None = None
        self._lost: str | None = None

    def add(self, rows: pa.Table) -> None:
        """Return when a writer has taken the rows.

        Raises:
            RunFailedError: several writers died of them.
        """
        for _ in range(_MAX_WRITERS):
            if self._writer is None:
                node = ray.get_runtime_context().get_node_id()
                self._writer = ray.get(self._coordinator.writer_of.remote(node, self._lost))
            name, writer = self._writer
            try:
                ray.get(writer.add.remote(rows))
                return
            except RayActorError:
                self._writer, self._lost = None, name
        raise RunFailedError(
            f"the writer of this node died {_MAX_WRITERS} times: look for the kernel's out-of-memory killer"
        )


class NodeWriters:
    """The writers of a run on a cluster, as the driver sees them (`pipeline.output.commit.Writers`)."""

    def __init__(self, settings: ShardSettings) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.coordinator: Any = ray.remote(Coordinator).options(num_cpus=0, scheduling_strategy=here).remote(settings)
        self._asked: Any = None
        self._look_at = 0.0
        self._kept: list[ShardReport] = []
        self._writers: dict[str, Any] = {}
        self._is_over = False

    @property
    def num_threads(self) -> int:
        """Threads of all writers so far, as `Writers.num_threads`."""
        return WRITER_THREADS * max(1, len(self._writers))

    def reports(self) -> list[ShardReport]:
        """Take the reports that have come, as `Writers.reports`."""
        kept, self._kept = self._kept, []
        now = time.monotonic()
        if self._is_over or now < self._look_at:
            return kept
        self._look_at = now + _LOOKING_SECONDS
        if self._asked is None:
            self._asked = self.coordinator.take.remote()
        elif ray.wait([self._asked], timeout=0)[0]:
            kept += self._answer()
        return kept

    def settle(self, report: ShardReport, unwanted: Collection[int] = ()) -> None:
        """Tell a writer about its shard, as `Writers.settle`; one that is lost needs to know nothing."""
        writer = self._writers.get(report.writer)
        if writer is None or self._is_over:
            return
        with suppress(RayError):
            settled = writer.settle.remote(report.number, tuple(unwanted))
            if unwanted:  # calls of one caller may overtake one another, and a flush must find the other rows
                ray.wait([settled], timeout=_ANSWER_SECONDS)

    def begin_all(self) -> None:
        """Let every writer begin to write, as `Writers.begin_all`."""
        for writer in self._writers.values():
            with suppress(RayError):
                writer.begin_all.remote()

    def flush(self, seconds: float | None = None) -> bool:
        """Let every writer write what it holds, as `Writers.flush`; those that are lost are passed over."""
        if self._is_over:
            return bool(self._kept)
        deadline = None if seconds is None else time.monotonic() + seconds
        self._kept += self._answer()
        flushed = []
        for writer in self._writers.values():
            with suppress(RayError):
                flushed.append(writer.flush.remote())
        if flushed:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ray.wait(flushed, num_returns=len(flushed), timeout=left, fetch_local=False)
            self._kept += self._answer()
        return bool(self._kept)

    def give_up(self) -> None:
        """Ask for nothing any more, as Ray is gone."""
        self._is_over = True

    def close(self) -> None:
        """End the writers and the coordinator."""
        if not self._is_over:
            self._is_over = True
            with suppress(RayError):
                for writer in self._writers.values():
                    ray.kill(writer)
                ray.kill(self.coordinator)

    def _answer(self) -> list[ShardReport]:
        """Reports that the coordinator has, or had when it was asked."""
        asked, self._asked = self._asked, None
        try:
            reports, self._writers = ray.get(asked or self.coordinator.take.remote(), timeout=_ANSWER_SECONDS)
            if asked is not None:
                more, self._writers = ray.get(self.coordinator.take.remote(), timeout=_ANSWER_SECONDS)
                reports += more
        except RayError as error:
            self._is_over = True
            raise RunCutShortError(
                "the run stopped: the actor that lists its writers, on the node of this command, died or does not "
                f"answer ({type(error).__name__}); what is committed is valid. Run the same command again"
            ) from error
        return list(reports)
