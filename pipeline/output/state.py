"""The state of an output as one value: its plan, its finished spans and its rejections, each file read once.

Nothing else is state. What is left to do is what was planned, less what is finished or rejected, and a process that is
killed between two writes leaves files from which the next run concludes the same (``pipeline.output.resume``).
``pipeline.output.lease`` makes sure that one process writes.

No Python object is held for each video. A million planned spans with as many finished ones take some 150 MB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from vidshard.pipeline.output.committed import COMMITTED_SCHEMA, ShardSpans, read_committed
from vidshard.pipeline.output.layout import plan_paths, reject_paths
from vidshard.pipeline.output.parquet import FileRows, ShardError, release_memory
from vidshard.pipeline.output.plan_store import check_plan_file, read_planned
from vidshard.pipeline.output.rejects import read_reject_file, read_reject_files

RESUME_COLUMNS = ("entry", "seen_entry", "place", "span_id", "first_clip", "expected_clips")
"""Columns of the plan that resuming reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputState:
    """State of an output, as its files say it."""

    plan: pa.Table
    """Columns of ``PLAN_SCHEMA``, oldest rows first."""
    committed: FileRows
    """Spans of shards: ``span_id``, and for an audit the other columns of ``COMMITTED_SCHEMA``."""
    rejects: FileRows
    """Rejections, ``REJECT_SCHEMA``."""

    @classmethod
    def load(
        cls, out: str, *, columns: Sequence[str] = RESUME_COLUMNS, shards: Sequence[ShardSpans] | None = None
    ) -> OutputState:
        """Read the state of an output; nothing is written.

        Args:
            out: the output.
            columns: those of the plan that are needed.
            shards: the shards that count, read already, for an audit; all of the output otherwise.

        Raises:
            ShardError: a file is damaged.
            storage.StorageError: the output could not be read.
        """
        if shards is None:
            committed = read_committed(out)
        else:
            committed = FileRows.of(COMMITTED_SCHEMA, [(shard.path, shard.to_table()) for shard in shards])
        state = cls(plan=read_planned(out, columns), committed=committed, rejects=read_reject_files(out))
        release_memory()
        return state

    def after_planning(self, out: str) -> OutputState:
        """Read plan and rejections again, after videos were opened; the shards are as they were.

        Raises:
            ShardError, storage.StorageError: as :meth:`load`.
        """
        plan = read_planned(out, self.plan.column_names)
        return replace(self, plan=plan, rejects=read_reject_files(out))


def damaged_files(out: str) -> list[tuple[str, ShardError]]:
    """(path, its error) of the files of the plan and of the rejections that cannot be read."""
    damaged = []
    for paths, check in ((plan_paths(out), check_plan_file), (reject_paths(out), read_reject_file)):
        for path in paths:
            try:
                check(path)
            except ShardError as error:
                damaged.append((path, error))
    return damaged
