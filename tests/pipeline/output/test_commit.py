"""Exactly-once commits: whatever is computed, reported or lost twice, each span is settled once."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.support.outputs import (
    PAYLOAD,
    PROVENANCE,
    SPEC,
    Content,
    Corpus,
    File,
    Outcome,
    encoded,
    inputs_of,
    listed_spans,
    opened,
    rejects_in,
)
from vidshard.pipeline import storage
from vidshard.pipeline.output.commit import Committer, SpanAccount, TokenShardSink, split_refused
from vidshard.pipeline.output.layout import remove_leftovers
from vidshard.pipeline.output.lease import LeaseLostError
from vidshard.pipeline.output.shard_writer import ShardReport, ShardSettings, ShardWriter
from vidshard.pipeline.rows import WORK_NUMBER, WORK_SCHEMA

NUM_SPANS = 6
CLIPS: Outcome = "clips"
OUTCOMES: tuple[Outcome, ...] = (CLIPS,) * NUM_SPANS
CORPUS: Corpus = {"/v/a.mp4": File(content=Content(name="a", spans=OUTCOMES))}


def work_rows() -> pa.Table:
    """The rows of a work list, one span each."""
    plan = opened(CORPUS, inputs_of(CORPUS).videos).select(WORK_SCHEMA.names)
    return plan.append_column(WORK_NUMBER, pa.array(range(NUM_SPANS), pa.int64()))


ROWS = work_rows()
SPAN_IDS = ROWS["span_id"].to_pylist()


class Machines:
    """Writers that a test kills, and whose reports it delivers when it likes."""

    def __init__(self, shards: ShardSettings) -> None:
        self._shards = shards
        self.alive: dict[str, ShardWriter] = {}
        self.reported: list[ShardReport] = []
        self._started = 0

    @property
    def num_threads(self) -> int:
        return len(self.alive)

    def start(self) -> str:
        """Start a writer; returns its name."""
        name = f"w{self._started}"
        self._started += 1
        self.alive[name] = ShardWriter(self._shards, self.reported.append, name=name)
        return name

    def kill(self, name: str) -> None:
        """End a writer: the rows that it held are gone, and its reports arrive all the same."""
        self.alive.pop(name).close()

    def reports(self) -> list[ShardReport]:
        found, self.reported[:] = list(self.reported), []
        return found

    def settle(self, report: ShardReport, unwanted: Collection[int] = ()) -> None:
        if report.writer in self.alive:
            self.alive[report.writer].settle(report.number, unwanted)

    def begin_all(self) -> None:
        for writer in self.alive.values():
            writer.begin_all()

    def flush(self, seconds: float | None = None) -> bool:
        for writer in self.alive.values():
            writer.flush(seconds)
        return bool(self.reported)

    def give_up(self) -> None:
        self.reported.clear()

    def close(self) -> None:
        for name in list(self.alive):
            self.kill(name)


class Runs(RuleBasedStateMachine):
    """Encoders that bring spans to any writer any number of times, kills of writers and drivers, and zombies."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(prefix="vidshard-commit-")
        self.out = self._folder.name
        self.number = 0
        self.zombies: list[tuple[Committer, Machines]] = []
        self.begin()

    def begin(self) -> None:
        """A run takes the lease of the next number, sweeps, and reads the state."""
        self.number += 1
        remove_leftovers(self.out)
        done = listed_spans(self.out)
        self.shards = ShardSettings(
            out=self.out,
            run_number=self.number,
            buckets=((SPEC, PAYLOAD),),
            provenance=PROVENANCE,
            shard_bytes=4,
            commit_seconds=600,
        )
        self.machines = Machines(self.shards)
        self.account = SpanAccount(NUM_SPANS)
        self.account.claim([n for n, span in enumerate(SPAN_IDS) if span in done])
        self.committer = Committer(self.shards, self.machines, self.account)
        self.machines.start()

    def writer(self, number: int) -> tuple[str, ShardWriter]:
        names = sorted(self.machines.alive)
        name = names[number % len(names)]
        return name, self.machines.alive[name]

    @rule(spans=st.lists(st.integers(0, NUM_SPANS - 1), min_size=1, max_size=3, unique=True), to=st.integers(0, 3))
    def encode(self, spans: list[int], to: int) -> None:
        """Also spans that were encoded before, as Ray repeats calls whose answer was lost."""
        _, writer = self.writer(to)
        if not writer.is_full:
            rows = pa.concat_tables([encoded(ROWS.slice(span, 1), "clips") for span in sorted(spans)])
            writer.add(rows)

    @rule(span=st.integers(0, NUM_SPANS - 1))
    def refuse(self, span: int) -> None:
        """A repeated call may refuse what the first one encoded."""
        outcome: Outcome = "refused"
        _, refused = split_refused(encoded(ROWS.slice(span, 1), outcome))
        self.committer.reject(refused)

    @rule(which=st.integers(0, 3))
    def write(self, which: int) -> None:
        self.writer(which)[1].flush()

    @rule()
    def commit(self) -> None:
        self.committer.tick()

    @rule()
    def another_node_joins(self) -> None:
        if len(self.machines.alive) < 3:
            self.machines.start()

    @rule(which=st.integers(0, 3))
    def a_writer_dies(self, which: int) -> None:
        self.machines.kill(self.writer(which)[0])
        if not self.machines.alive:
            self.machines.start()

    @rule()
    def the_driver_dies_and_another_run_takes_over(self) -> None:
        """The old driver and its writers may be suspended rather than dead: they go on later."""
        self.zombies.append((self.committer, self.machines))
        self.begin()

    @precondition(lambda self: self.zombies)
    @rule(span=st.integers(0, NUM_SPANS - 1))
    def a_zombie_goes_on(self, span: int) -> None:
        committer, machines = self.zombies[-1]
        for writer in machines.alive.values():
            if not writer.is_full:
                writer.add(encoded(ROWS.slice(span, 1), "clips"))
            writer.flush()
        with suppress(storage.StagedFileGoneError):
            committer.finish()

    @invariant()
    def no_span_is_committed_twice(self) -> None:
        assert all(count == 1 for count in listed_spans(self.out).values())

    def teardown(self) -> None:
        """The run ends: spans that are open are done again, and then each is settled once."""
        for _ in range(2):
            self.committer.finish()
            left = [n for n in range(NUM_SPANS) if self.account.is_open[n]]
            if left:
                self.machines.kill(sorted(self.machines.alive)[0])
                self.machines.start()
                for n in left:
                    writer = self.writer(0)[1]
                    while writer.is_full:
                        self.committer.tick()
                        writer.wait_for_room(0.01)
                    writer.add(encoded(ROWS.slice(n, 1), "clips"))
        assert self.account.num_open == 0
        committed = listed_spans(self.out)
        assert committed == Counter(dict.fromkeys(committed, 1))
        for committer, machines in [*self.zombies, (self.committer, self.machines)]:
            machines.close()
            committer.close()
        self._folder.cleanup()


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


def test_a_span_is_settled_once() -> None:
    account = SpanAccount(4)
    assert account.claim([0, 1]) == frozenset()
    assert account.claim([1, 2]) == {1}
    assert account.is_open.tolist() == [False, False, True, True]
    assert not account.reject(0)
    assert account.reject(3)
    assert account.num_open == 1


def test_the_other_spans_of_a_shard_with_a_settled_one_are_in_a_later_shard(tmp_path: Path) -> None:
    shards = ShardSettings(
        out=str(tmp_path),
        buckets=((SPEC, PAYLOAD),),
        provenance=PROVENANCE,
        shard_bytes=100,
        commit_seconds=600,
    )
    machines, account = Machines(shards), SpanAccount(NUM_SPANS)
    committer = Committer(shards, machines, account)
    for spans in ([0, 1], [1, 2, 3]):  # span 1 by two writers
        machines.start()
        for span in spans:
            machines.alive[max(machines.alive)].add(encoded(ROWS.slice(span, 1), "clips"))
    committer.finish()
    assert listed_spans(str(tmp_path)) == Counter(SPAN_IDS[:4])
    assert account.is_open.tolist() == [False] * 4 + [True] * 2
    committer.close()
    assert not (tmp_path / "staged").exists()


def test_what_is_staged_is_not_visible_and_gone_after_a_take_over(tmp_path: Path) -> None:
    area = f"{tmp_path}/staged/000001"
    storage.open_area(area)
    staged = storage.stage(f"{tmp_path}/shards/a.parquet", b"a", area=area)
    assert storage.list_files(f"{tmp_path}/shards", ".parquet") == []
    storage.remove_areas(f"{tmp_path}/staged", f"{tmp_path}/shards")
    with pytest.raises(storage.StagedFileGoneError):
        storage.publish(staged)
    with pytest.raises(storage.StagedFileGoneError):
        storage.stage(f"{tmp_path}/shards/b.parquet", b"b", area=area)
    assert not list(tmp_path.rglob("*.parquet*"))


@pytest.mark.parametrize("outcome", ["clips", "refused"])
def test_whoever_lost_the_lease_publishes_no_shard_and_no_rejection(tmp_path: Path, outcome: Outcome) -> None:
    def lost() -> None:
        raise LeaseLostError("another run has the output")

    shards = ShardSettings(
        out=str(tmp_path), buckets=((SPEC, PAYLOAD),), provenance=PROVENANCE, shard_bytes=100, commit_seconds=600
    )
    sink = TokenShardSink(shards, before_commit=lost)
    sink.add(encoded(ROWS.slice(0, 1), outcome))
    with pytest.raises(LeaseLostError):
        sink.close()
    assert listed_spans(str(tmp_path)) == Counter()
    assert rejects_in(str(tmp_path)) == []
