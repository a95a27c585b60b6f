"""Commits: the account of a run's spans, and the only place from which shards become visible.

The process that holds the output's lease, the driver, owns the account. Writers report shards that they have staged
(`ShardReport`). The driver publishes a shard by its name if none of its spans is settled yet. Otherwise the writer puts
the other spans into a later shard. So each span is settled once, whatever was computed or reported twice:

    open ──▶ rejected       a receipt says so, and the rejection waits for its file
       └───▶ committed      a report lists it, and its shard is being published

A span that no report lists in the end stays open, as its writer or its node was lost. It is done again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vidshard.pipeline import storage
from vidshard.pipeline.output.rejects import write_rejects
from vidshard.pipeline.output.shard_writer import WRITER_THREADS, ShardReport, ShardSettings, ShardWriter, WriteStats
from vidshard.pipeline.rows import WORK_NUMBER, receipts_of, row_rejection
from vidshard.schemas.rejections import Rejection

_PUBLISHERS = 16
"""Shards that are published at once on an object store, where each is a request."""


class SpanAccount:
    """Account of the spans of a work list: each is open until it is rejected or committed, once.

    It is a pure state machine: it reads and writes no file.
    """

    def __init__(self, num_spans: int) -> None:
        self.is_open: npt.NDArray[np.bool_] = np.ones(num_spans, np.bool_)
        """bool (spans,)."""
        self.num_open = num_spans

    def reject(self, span: int) -> bool:
        """Settle a span as rejected; returns whether it was open."""
        was_open = bool(self.is_open[span])
        self.is_open[span] = False
        self.num_open -= was_open
        return was_open

    def claim(self, spans: Sequence[int]) -> frozenset[int]:
        """Settle the spans of a shard as committed if all of them are open.

        Returns:
            The spans that were settled before. If there are any, nothing is settled, and the shard must not be
            published.
        """
        settled = frozenset(span for span in spans if not self.is_open[span])
        if not settled:
            self.is_open[list(spans)] = False
            self.num_open -= len(spans)
        return settled


class Writers(Protocol):
    """The writers of a run."""

    @property
    def num_threads(self) -> int:
        """Threads of all writers so far together, which compress and write."""
        ...

    def reports(self) -> list[ShardReport]:
        """Take the reports that have come since the last call; does not wait for any."""
        ...

    def settle(self, report: ShardReport, unwanted: Collection[int] = ()) -> None:
        """Tell the writer of a shard that it is published, or which of its spans must not be."""
        ...

    def begin_all(self) -> None:
        """Let every writer begin to write what it holds; does not wait."""
        ...

    def flush(self, seconds: float | None = None) -> bool:
        """Let every writer write what it holds, and wait until all of it is reported, at most so many seconds.

        Returns:
            Whether reports have come that are not taken yet.
        """
        ...

    def give_up(self) -> None:
        """Ask the writers for nothing any more, as they are gone."""
        ...

    def close(self) -> None:
        """End the writers; what they hold is dropped."""
        ...


class LocalWriters:
    """One writer, in this process."""

    def __init__(self, settings: ShardSettings, *, num_threads: int = WRITER_THREADS) -> None:
        self.num_threads = num_threads
        self._reports: SimpleQueue[ShardReport] = SimpleQueue()
        self.writer = ShardWriter(settings, self._reports.put, num_threads=num_threads)

    def add(self, rows: pa.Table) -> None:
        """Take encoded rows without those that were rejected whole, once the writer has room."""
        self.writer.wait_for_room()
        self.writer.add(rows)

    def reports(self) -> list[ShardReport]:
        """Take the reports that have come, as `Writers.reports`; also writes what is due."""
        self.writer.write_if_due()
        found = []
        while True:
            try:
                found.append(self._reports.get_nowait())
            except Empty:
                return found

    def settle(self, report: ShardReport, unwanted: Collection[int] = ()) -> None:
        """Forget a shard, as `Writers.settle`."""
        self.writer.settle(report.number, unwanted)

    def begin_all(self) -> None:
        """Begin to write, as `Writers.begin_all`."""
        self.writer.begin_all()

    def flush(self, seconds: float | None = None) -> bool:
        """Write everything, as `Writers.flush`."""
        self.writer.flush(seconds)
        return not self._reports.empty()

    def give_up(self) -> None:
        """Nothing: a writer in this process is not lost."""

    def close(self) -> None:
        """End the writer's threads."""
        self.writer.close()


@dataclass(kw_only=True, slots=True)
class _Batch:
    """Shards and rejections that are committed together."""

    rejections: list[Rejection]
    reports: list[ShardReport]


class Committer:
    """Commits what writers report, and the rejections, on a thread of its own, in the order in which they came."""

    def __init__(
        self,
        settings: ShardSettings,
        writers: Writers,
        account: SpanAccount | None = None,
        *,
        before_commit: Callable[[], None] = lambda: None,
        on_published: Callable[[str, WriteStats], None] = lambda _path, _stats: None,
    ) -> None:
        """Make the area for staged shards.

        Args:
            settings: settings of the shards.
            writers: the writers of the run.
            account: account of the spans; None if rows have no numbers, and none comes twice.
            before_commit: called before files become visible; an exception stops the commits.
            on_published: called on the thread of the commits with the path and the counts of each published shard.

        Raises:
            storage.StorageError: the output cannot be written.
        """
        self._settings, self.writers, self._account = settings, writers, account
        self._before_commit, self._on_published = before_commit, on_published
        self._rejections: list[Rejection] = []
        self._oldest: float | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._publishers = ThreadPoolExecutor(1 if storage.is_local(settings.out) else _PUBLISHERS)
        self._pending: deque[Future[None]] = deque()
        self._unwritten: BaseException | None = None
        self.committed = WriteStats()
        """Counts of what is committed so far."""
        storage.open_area(settings.area)

    def reject(self, rejections: Iterable[tuple[int | None, Rejection]]) -> None:
        """Take rejections of whole spans, each with its number in the work list; those of settled spans are dropped."""
        for number, rejection in rejections:
            if number is None or self._account is None or self._account.reject(number):
                self._oldest = time.monotonic() if self._oldest is None else self._oldest
                self._rejections.append(rejection)

    def tick(self) -> None:
        """Commit what has been reported since the last call, and the rejections if they are due; waits for nothing.

        Raises:
            storage.StorageError: a shard could not be written or published.
            VidshardError: ``before_commit`` raised it.
        """
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()
        is_due = self._oldest is not None and time.monotonic() - self._oldest > self._settings.commit_seconds
        self._commit(self.writers.reports(), is_due=is_due)
        if self._unwritten is not None:
            raise self._unwritten

    def finish(self, seconds: float | None = None) -> None:
        """Let every writer write what it holds, and commit all of it.

        Args:
            seconds: what is not reported after so many seconds is not waited for; None for no limit.

        Raises:
            storage.StorageError, VidshardError: as :meth:`tick`; what could be committed is.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        error: BaseException | None = None
        while True:
            has_more = self.writers.flush(None if deadline is None else max(0.0, deadline - time.monotonic()))
            self._commit(self.writers.reports(), is_due=True)
            error = error or self._first_error()
            if error is not None or not has_more:
                break
        error = error or self._unwritten
        if error is not None:
            raise error

    def give_up_writers(self) -> None:
        """Commit what was reported, and ask the writers for nothing any more."""
        self.writers.give_up()

    def close(self) -> None:
        """End the thread after what it is committing, remove the area, and end the writers."""
        self.writers.close()
        self._thread.shutdown()
        self._publishers.shutdown()
        storage.close_area(self._settings.area)

    def _commit(self, reports: Sequence[ShardReport], *, is_due: bool) -> None:
        wanted = []
        for report in reports:
            if report.error is not None:
                self._unwritten = self._unwritten or report.error
                continue
            settled = self._account.claim(report.spans) if self._account is not None else frozenset()
            if settled:
                self.writers.settle(report, settled)
            else:
                wanted.append(report)
        if wanted or (is_due and self._rejections):
            batch = _Batch(rejections=self._rejections, reports=wanted)
            self._rejections, self._oldest = [], None
            self._pending.append(self._thread.submit(self._commit_batch, batch))

    def _commit_batch(self, batch: _Batch) -> None:
        """Write rejections, then publish shards: no incomplete span is ever committed without its rejection."""
        started = time.monotonic()
        rejections = [*batch.rejections, *(one for report in batch.reports for one in report.rejections)]
        if rejections:
            self._before_commit()
            write_rejects(self._settings.out, rejections)
            counts = WriteStats(num_rejected_spans=len(batch.rejections))
            counts.reasons.update(str(one.reason) for one in rejections)
            counts.rejected_uris.update(one.uri for one in rejections)
            self.committed.add(counts)
        if batch.reports:
            self._before_commit()
            for report, _ in zip(batch.reports, self._publishers.map(_publish, batch.reports), strict=True):
                self.committed.add(report.stats)
                assert report.staged is not None
                self._on_published(report.staged.path, report.stats)
                self.writers.settle(report)
        self.committed.seconds += time.monotonic() - started

    def _first_error(self) -> BaseException | None:
        error: BaseException | None = None
        while self._pending:
            found = self._pending.popleft().exception()
            error = error or found
        return error


def _publish(report: ShardReport) -> None:
    assert report.staged is not None
    storage.publish(report.staged)


class TokenShardSink:
    """One writer and its commits in one process: takes encoded rows, and commits them as shards and rejections."""

    def __init__(
        self, settings: ShardSettings, *, before_commit: Callable[[], None] = lambda: None, num_threads: int = 1
    ) -> None:
        """Make an empty sink.

        Args:
            settings: settings of the shards.
            num_threads: threads that compress and write.
            before_commit: called before files become visible; an exception stops the commits.
        """
        self._writers = LocalWriters(settings, num_threads=num_threads)
        self._committer = Committer(settings, self._writers, before_commit=before_commit)

    @property
    def committed(self) -> WriteStats:
        """Counts of what is committed so far."""
        return self._committer.committed

    def add(self, rows: pa.Table) -> None:
        """Take encoded rows, and commit what is full or due.

        Raises:
            storage.StorageError: an earlier shard could not be written.
        """
        good, refused = split_refused(rows)
        self._committer.reject((None, one) for _, one in refused)
        while self._writers.writer.is_full:
            self._committer.tick()
            self._writers.writer.wait_for_room(0.05)
        self._writers.writer.add(good)
        self._committer.tick()

    def close(self) -> None:
        """Commit the rest and wait until everything is written.

        Raises:
            storage.StorageError: a shard could not be written; earlier shards are whole.
        """
        try:
            self._committer.finish()
        finally:
            self._committer.close()


def split_refused(rows: pa.Table) -> tuple[pa.Table, list[tuple[int | None, Rejection]]]:
    """Split encoded rows into those for a shard, and the rejections of whole spans with their numbers."""
    refused = pc.and_(rows["rejection"].is_valid(), pc.equal(pc.list_value_length(rows["clips"]), 0))
    if not pc.any(refused).as_py():  # a filter copies the payload, also where it keeps every row
        return rows, []
    names = [name for name in ("rejection", WORK_NUMBER.name) if name in rows.column_names]
    found = rows.select(names).filter(refused).to_pylist()
    rejections = [(row.get(WORK_NUMBER.name), row_rejection(row["rejection"])) for row in found]
    return rows.filter(pc.invert(refused)), rejections


def deliver(
    rows: pa.Table, add: Callable[[pa.Table], object], frames: tuple[pa.Array, pa.Array] | None = None
) -> pa.Table:
    """Hand encoded rows to a writer, without those that were rejected whole; returns the receipts of all rows.

    Args:
        frames: bytes of their frames, as `pipeline.rows.frame_bytes`; None in one process.
    """
    good, _ = split_refused(rows)
    if good.num_rows:
        add(good)
    return receipts_of(rows, frames)
