"""Read-ahead of batches: row groups are read on threads, and kept until their last use within a block."""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from vidshard.pipeline.reader.pages import Spare
from vidshard.pipeline.reader.source import Integers, Loaded, Picks, Plan, Source
from vidshard.schemas.tokens import payload_bytes

AHEAD_BYTES = 64 << 20
"""Payload that is read ahead of the batch that is made."""
_REQUEST_BYTES = 4 << 20
"""Payload of neighboring row groups that are fetched in one request."""
_LOCAL_THREADS, _REMOTE_THREADS = 2, 16
"""Threads that read: locally to decode beside the caller, remotely to wait for as many requests at once."""
_MOST_BATCHES = 1 << 16
"""Batches that are planned ahead, at most."""


class ReadAhead:
    """Makes the batches of a source in the order of their plans."""

    def __init__(self, source: Source, plans: Iterator[Plan]) -> None:
        """Start nothing yet.

        Args:
            source: what is read.
            plans: batches in the order of their positions.
        """
        self._source, self._plans = source, plans
        self._row_bytes = payload_bytes(source.catalog.provenance.payload)
        self._waiting: deque[tuple[Plan, Integers, Picks]] = deque()
        """Batches that are planned and not yet made."""
        self._num_asked = 0
        """Number of the first of them whose row groups are all asked for."""
        self._uses: Counter[int] = Counter()
        """Waiting batches that need a row group."""
        self._loads: dict[int, tuple[Future[list[Loaded]], int]] = {}
        """Request of each row group, and its place in the request's answer."""
        self._fresh: dict[int, int] = {}
        """Bytes of the row groups that no batch has used yet."""
        self._fresh_bytes = 0
        self._spare = Spare(AHEAD_BYTES)

    def __iter__(self) -> Iterator[tuple[Plan, dict[str, Any]]]:
        """Yield each plan with its batch.

        Raises:
            ShardError: a shard is damaged.
            storage.StorageError: the storage failed.
        """
        source = self._source
        threads = _REMOTE_THREADS if source.is_remote else _LOCAL_THREADS
        pool = ThreadPoolExecutor(threads, "vidshard-reader")
        # kept here, as modules may be gone when an iterator that was not used up ends with the process
        is_exiting = sys.is_finalizing
        try:
            while self._waiting or self._plan_one():
                while self._waiting[-1][0].stop <= self._waiting[0][0].block_end and self._plan_one():
                    pass
                for run in self._runs(self._wanted()):
                    future = pool.submit(source.load, run, self._spare)
                    self._loads.update({group: (future, at) for at, group in enumerate(run)})
                plan, rows, picks = self._waiting.popleft()
                self._num_asked -= 1
                yield plan, source.batch(plan, rows, picks, self._loaded)
                self._let_go(picks)
        finally:
            if not is_exiting():
                pool.shutdown(cancel_futures=True)

    def _plan_one(self) -> bool:
        """Plan another batch; False if there is none."""
        plan = next(self._plans, None)
        if plan is None:
            return False
        rows, picks = self._source.picks(plan.units)
        self._uses.update(group for group, _, _ in picks)
        self._waiting.append((plan, rows, picks))
        return True

    def _wanted(self) -> dict[int, int]:
        """Row groups to ask for now, in the order in which they are needed, and their bytes."""
        source = self._source
        wanted: dict[int, int] = {}
        # remotely several row groups are asked for at a time, so that neighbors come in one request
        is_full = source.is_remote and self._num_asked and self._fresh_bytes > AHEAD_BYTES - AHEAD_BYTES // 4
        while not is_full and (self._num_asked < len(self._waiting) or self._plan_one()):
            missing = [g for g, _, _ in self._waiting[self._num_asked][2] if g not in self._loads and g not in wanted]
            if self._num_asked and self._fresh_bytes > AHEAD_BYTES and missing:
                break
            for group in missing:
                num_rows = int(source.catalog.group_ends[group] - source.group_starts[group])
                wanted[group] = self._fresh[group] = num_rows * self._row_bytes
                self._fresh_bytes += wanted[group]
            self._num_asked += 1
            if self._num_asked > _MOST_BATCHES:
                break
        return wanted

    def _runs(self, wanted: Mapping[int, int]) -> Iterator[list[int]]:
        """Row groups that are read together, by the first one that is needed.

        Args:
            wanted: bytes by row group, in the order in which they are needed.
        """
        shard = self._source.catalog.group_shard
        left = dict(wanted)
        for first in wanted:
            if first not in left:
                continue
            run, num_bytes = [first], left.pop(first)
            for step in (1, -1) if self._source.is_remote else ():
                group = first + step
                while group in left and shard[group] == shard[first] and num_bytes + left[group] <= _REQUEST_BYTES:
                    run.append(group)
                    num_bytes += left.pop(group)
                    group += step
            yield sorted(run)

    def _loaded(self, group: int) -> Loaded:
        """Columns of a row group, once they are read."""
        future, place = self._loads[group]
        return future.result()[place]

    def _let_go(self, picks: Picks) -> None:
        """Give the memory of row groups back that no waiting batch needs."""
        for group, _, _ in picks:
            self._fresh_bytes -= self._fresh.pop(group, 0)
            self._uses[group] -= 1
            if not self._uses[group]:
                del self._uses[group]
                columns = self._loaded(group)
                del self._loads[group]
                for values, is_reusable in zip(columns, self._source.reusable, strict=True):
                    if is_reusable:
                        self._spare.give(values)
                columns.clear()  # the others of its request may be needed for longer
