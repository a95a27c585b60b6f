"""Resuming: what is left to do of any state of an output, and that no crash loses or repeats anything."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.support.outputs import (
    Content,
    Corpus,
    File,
    Killed,
    clips_in,
    counted,
    inputs_of,
    listed_spans,
    opened,
    rejects_in,
    spans_of,
    tokenize,
)
from vidshard.pipeline.output.committed import COMMITTED_SCHEMA, drop_repeated_spans
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.parquet import FileRows
from vidshard.pipeline.output.plan_store import PLAN_SCHEMA
from vidshard.pipeline.output.rejects import RetrySet
from vidshard.pipeline.output.resume import Resume, reconcile, videos_to_open
from vidshard.pipeline.output.state import OutputState
from vidshard.pipeline.rows import rejections_table, row_rejection
from vidshard.schemas.rejections import Reason, Rejection, Stage

LONG = Content(name="long", spans=("clips", "clips", "clips"))
SHORT = Content(name="short")
OTHER = Content(name="other", spans=("clips", "clips"))
DAMAGED = Content(name="damaged", spans=("clips", "refused", "gaps"))
MENDED = Content(name="damaged", spans=("clips", "clips", "clips"))  # the same bytes, by a decoder that can
TEXT = Content(name="text", spans=())
CHANGING = Content(name="changing", spans=("clips", "changed"))
SETTLED = Content(name="changing", spans=("clips", "clips"))


def corpus_of(**contents: Content) -> Corpus:
    return {f"/videos/{name}.mp4": File(content=content) for name, content in contents.items()}


# Pure functions on tables in memory.


def state_of(
    *plans: tuple[Corpus, pa.Table],
    committed: dict[str, list[str]] | None = None,
    rejects: list[Rejection] | None = None,
) -> OutputState:
    """An output whose plan was made of these corpora, one after the other, with so many spans in shards."""
    rows = [opened(corpus, videos) for corpus, videos in plans]
    rejections = [row_rejection(row) for table in rows for row in table["rejection"].to_pylist() if row is not None]
    schema = pa.schema([COMMITTED_SCHEMA.field("span_id")])
    shards = [(path, pa.table([spans], schema=schema)) for path, spans in (committed or {}).items()]
    table = rejections_table([*rejections, *(rejects or [])])
    return OutputState(
        plan=pa.concat_tables([PLAN_SCHEMA.empty_table(), *(table.select(PLAN_SCHEMA.names) for table in rows)]),
        committed=FileRows.of(schema, shards),
        rejects=FileRows.of(table.schema, [("rejects/0.parquet", table)] if table.num_rows else []),
    )


def planned(corpus: Corpus) -> tuple[Corpus, pa.Table]:
    return corpus, inputs_of(corpus).videos


def ids(content: Content) -> list[str]:
    return [span.span_id for span in spans_of(content)]


def left(state: OutputState, resume: Resume) -> list[str]:
    return state.plan["span_id"].filter(pa.array(resume.left)).to_pylist()  # type: ignore[no-any-return]


def uris(videos: pa.Table) -> list[str]:
    return [Path(uri).stem for uri in videos["uri"].to_pylist()]


def rejection(
    content: Content, span: int, reason: Reason = Reason.DECODE_ERROR, kept_clips: int | None = 0
) -> Rejection:
    return Rejection(
        uri=f"/videos/{content.name}.mp4",
        video_id=content.video_id,
        span_id=ids(content)[span],
        start_seconds=0.0,
        stage=Stage.DECODE,
        reason=reason,
        detail="",
        kept_clips=kept_clips,
    )


def test_of_an_empty_output_all_is_left() -> None:
    corpus = corpus_of(a=LONG, b=TEXT)
    assert uris(videos_to_open(state_of(), inputs_of(corpus))) == ["a", "b"]
    state = state_of(planned(corpus))
    assert not videos_to_open(state, inputs_of(corpus)).num_rows
    resume = reconcile(state, inputs_of(corpus))
    assert left(state, resume) == ids(LONG)
    assert (resume.num_spans, resume.num_left, resume.num_committed, resume.num_rejected) == (3, 3, 0, 0)
    assert resume.expected_clips == 6
    assert resume.rejected_uris == {"/videos/b.mp4"}
    assert resume.kept_rejects.all()


@pytest.mark.parametrize("kept_clips", [0, None])
def test_finished_and_rejected_spans_are_not_left(kept_clips: int | None) -> None:
    corpus = corpus_of(long=LONG)
    committed, rejects = {"s.parquet": ids(LONG)[:1]}, [rejection(LONG, 1, kept_clips=kept_clips)]
    state = state_of(planned(corpus), committed=committed, rejects=rejects)
    resume = reconcile(state, inputs_of(corpus))
    assert left(state, resume) == ids(LONG)[2:]
    assert (resume.num_committed, resume.num_rejected) == (1, 1)
    assert resume.kept_rejects.all()


@pytest.mark.parametrize(
    ("reject", "is_finished", "is_left", "holds"),
    [
        (rejection(SHORT, 0, kept_clips=1), True, False, True),
        (rejection(SHORT, 0, kept_clips=1), False, True, False),  # killed before its clips were written
        (rejection(SHORT, 0, kept_clips=0), True, False, False),  # tokenized after all
        (rejection(SHORT, 0, kept_clips=0), False, False, True),
        (rejection(SHORT, 0, Reason.CHANGED), False, True, False),  # tried again in any case
    ],
)
def test_a_rejection_holds_by_what_the_shards_say(
    reject: Rejection, is_finished: bool, is_left: bool, holds: bool
) -> None:
    corpus = corpus_of(short=SHORT)
    state = state_of(planned(corpus), committed={"s": ids(SHORT)} if is_finished else {}, rejects=[reject])
    resume = reconcile(state, inputs_of(corpus))
    assert bool(left(state, resume)) == is_left
    assert resume.kept_rejects.tolist() == [holds]


def test_a_rejected_video_is_opened_again_when_its_rejection_is_gone() -> None:
    corpus = corpus_of(a=TEXT, b=TEXT)
    state = state_of(planned(corpus))
    assert not videos_to_open(state, inputs_of(corpus)).num_rows
    first = state.rejects.table.slice(0, 1)
    forgotten = replace(state, rejects=FileRows.of(first.schema, [("rejects/0.parquet", first)]))
    assert uris(videos_to_open(forgotten, inputs_of(corpus))) == ["b"]


def test_a_touched_file_is_opened_again_and_found_to_be_the_same() -> None:
    before, touched = corpus_of(a=LONG), {"/videos/a.mp4": File(content=LONG, stamp=1)}
    state = state_of(planned(before), committed={"s": ids(LONG)})
    assert uris(videos_to_open(state, inputs_of(touched))) == ["a"]
    state = state_of(planned(before), planned(touched), committed={"s": ids(LONG)})
    resume = reconcile(state, inputs_of(touched))
    assert not left(state, resume)
    assert not resume.superseded
    assert (resume.num_spans, resume.num_committed) == (3, 3)


def test_a_replaced_file_supersedes_the_former_and_a_removed_one_does_not() -> None:
    before, now = corpus_of(a=LONG, gone=SHORT), corpus_of(a=OTHER)
    committed = {"s": ids(LONG)[:2], "t": [*ids(LONG)[2:], *ids(SHORT)]}
    state = state_of(planned(before), planned(now), committed=committed)
    resume = reconcile(state, inputs_of(now))
    assert resume.superseded == {LONG.video_id}
    assert resume.outdated_spans.tolist() == [True, True, True, False]
    assert resume.num_superseded_spans == 3
    assert left(state, resume) == ids(OTHER)


def test_a_video_that_comes_back_is_opened_again() -> None:
    first, second = corpus_of(a=LONG), corpus_of(a=OTHER)
    state = state_of(planned(first), planned(second))
    assert uris(videos_to_open(state, inputs_of(first))) == ["a"]
    assert uris(videos_to_open(state, inputs_of(second))) == []
    state = state_of(planned(first), planned(second), planned(first))
    assert uris(videos_to_open(state, inputs_of(first))) == []
    assert reconcile(state, inputs_of(first)).superseded == {OTHER.video_id}


def test_of_copies_the_first_is_tokenized_and_the_others_are_named() -> None:
    corpus = corpus_of(a=LONG, b=LONG, c=SHORT)
    state = state_of(planned(corpus))
    resume = reconcile(state, inputs_of(corpus, twice=("/videos/c.mp4",)))
    assert sorted(left(state, resume)) == sorted([*ids(LONG), *ids(SHORT)])
    assert [(reject.uri, reject.detail) for reject in resume.new_rejects] == [
        ("/videos/b.mp4", "the same content as /videos/a.mp4"),
        ("/videos/c.mp4", "the same content as /videos/c.mp4, which the inputs name twice"),
    ]
    assert not resume.rejected_uris
    again = state_of(planned(corpus), rejects=list(resume.new_rejects))
    second = reconcile(again, inputs_of(corpus, twice=("/videos/c.mp4",)))
    assert second.kept_rejects.all()
    assert not second.new_rejects
    alone = reconcile(again, inputs_of(corpus_of(b=LONG)))  # b is no copy any more; of c nothing is known
    assert [reject.uri for reject, kept in zip(resume.new_rejects, alone.kept_rejects, strict=True) if kept] == [
        "/videos/c.mp4"
    ]


def test_a_span_in_two_shards_leaves_the_second() -> None:
    corpus = corpus_of(a=LONG)
    state = state_of(planned(corpus), committed={"s": ids(LONG)[:2], "t": ids(LONG)[1:]})
    resume = reconcile(state, inputs_of(corpus))
    assert resume.outdated_spans.tolist() == [False, False, True, False]
    assert dict(state.committed.touched(resume.outdated_spans)) == {"t": slice(2, 4)}


def test_a_retry_does_nothing_else() -> None:
    corpus = corpus_of(a=LONG, b=OTHER, text=TEXT)
    state = state_of(planned(corpus))
    retry = RetrySet(spans=frozenset(ids(LONG)[:1]), uris=frozenset({"/videos/text.mp4"}))
    assert not videos_to_open(state, inputs_of(corpus), retry).num_rows  # its rejection is still there
    bare = OutputState(plan=state.plan, committed=state.committed, rejects=FileRows.of(state.rejects.table.schema, []))
    assert uris(videos_to_open(bare, inputs_of(corpus), retry)) == ["text"]
    resume = reconcile(bare, inputs_of(corpus), retry=retry, opened=inputs_of(corpus).videos.slice(1, 1))
    assert left(state, resume) == [*ids(LONG)[:1], *ids(OTHER)]
    assert resume.num_spans == 5


# Crashes.

Prepare = Callable[[str], None]


def nothing(_out: str) -> None:
    pass


FIRST = corpus_of(a=LONG, b=OTHER, c=OTHER, damaged=DAMAGED, text=TEXT, gone=SHORT)


def first_run(out: str) -> None:
    tokenize(out, FIRST)


def two_runs_at_once(out: str) -> None:
    """A second writer put some spans into a shard of its own."""
    first_run(out)
    path = Path(shard_paths(out)[0])
    shutil.copy(path, path.with_name("zzzz.parquet"))


def changed_meanwhile(out: str) -> None:
    tokenize(out, corpus_of(a=LONG, changing=CHANGING))


SCENARIOS: dict[str, tuple[Prepare, Corpus, list[Reason] | None]] = {
    "a new output": (nothing, FIRST, None),
    "the same again": (first_run, FIRST, None),
    "files replaced, touched, mended, removed, added": (
        first_run,
        {
            **corpus_of(a=SHORT, c=OTHER, b=LONG, damaged=DAMAGED, text=Content(name="text, mended"), new=CHANGING),
            "/videos/damaged.mp4": File(content=DAMAGED, stamp=1),
        },
        None,
    ),
    "the original of a copy is replaced": (first_run, corpus_of(b=Content(name="b"), c=OTHER), None),
    "a replaced file that cannot be opened": (first_run, corpus_of(a=TEXT, b=OTHER), None),
    "all rejections tried again": (first_run, corpus_of(a=LONG, damaged=MENDED, text=TEXT), []),
    "some rejections tried again": (first_run, corpus_of(a=LONG, damaged=MENDED, text=TEXT), [Reason.DECODE_ERROR]),
    "two runs at once": (two_runs_at_once, FIRST, None),
    "a file changed while a run went on": (changed_meanwhile, corpus_of(a=LONG, changing=SETTLED), None),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_killed_before_any_of_its_writes_is_completed_by_the_next(name: str, tmp_path: Path) -> None:
    prepare, corpus, retry = SCENARIOS[name]
    twice = tuple(corpus)[:1]
    (tmp_path / "prepared").mkdir()
    prepare(str(tmp_path / "prepared"))

    def copy(name: str) -> str:
        return shutil.copytree(tmp_path / "prepared", str(tmp_path / name))

    undisturbed = copy("undisturbed")
    with counted() as writes:
        tokenize(undisturbed, corpus, retry=retry, twice=twice)
    clips, rejects = clips_in(undisturbed), rejects_in(undisturbed)
    assert set(clips.values()) == {1}

    for number, path in enumerate(writes.made, start=1):
        killed_at = f"killed before write {number} of {len(writes.made)}, of {path.removeprefix(undisturbed)}"
        out = copy(f"killed before {number}")
        with counted(last=number - 1), pytest.raises(Killed):
            tokenize(out, corpus, retry=retry, twice=twice)
        finished = listed_spans(out).keys()
        done = tokenize(out, corpus, retry=retry, twice=twice)
        assert clips_in(out) == clips, killed_at
        assert rejects_in(out) == rejects, killed_at
        # nothing is encoded twice, but for damaged spans whose retry was asked for
        damaged = set(ids(DAMAGED)) if retry is not None else set()
        assert finished.isdisjoint(set(done.encoded) - damaged), killed_at
        with counted() as more:
            again = tokenize(out, corpus, twice=twice)
        changed = {file.content for file in corpus.values() if "changed" in file.content.spans}
        assert set(again.encoded) <= {span for content in changed for span in ids(content)}, killed_at
        if not changed:
            assert [Path(path).name for path in more.made] == ["todo.parquet", "retry.json"], killed_at
            assert clips_in(out) == clips, killed_at
        shutil.rmtree(out)


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_is_left_is_what_was_planned_less_what_is_finished_or_rejected(name: str, tmp_path: Path) -> None:
    prepare, corpus, _ = SCENARIOS[name]
    prepare(str(tmp_path))
    with counted() as writes:
        tokenize(shutil.copytree(tmp_path, f"{tmp_path}-undisturbed"), corpus)
    for number in range(len(writes.made)):
        out = shutil.copytree(tmp_path, f"{tmp_path}-{number}")
        with counted(last=number), pytest.raises(Killed):
            tokenize(out, corpus)
        state = OutputState.load(out)
        if videos_to_open(state, inputs_of(corpus)).num_rows:
            continue  # killed while videos were opened
        rejected = {
            row["span_id"]
            for row in state.rejects.table.to_pylist()
            if not row["kept_clips"] and row["reason"] != Reason.CHANGED
        }
        planned = {span for file in corpus.values() for span in ids(file.content)}
        remaining = planned - listed_spans(out).keys() - rejected
        assert sorted(left(state, reconcile(state, inputs_of(corpus)))) == sorted(remaining)


def test_repeated_spans_stay_in_the_first_shard(tmp_path: Path) -> None:
    out = str(tmp_path)
    two_runs_at_once(out)
    assert max(clips_in(out).values()) == 2
    assert drop_repeated_spans(shard_paths(out)) > 0
    assert set(clips_in(out).values()) == {1}
    np.testing.assert_array_equal(list(listed_spans(out).values()), 1)
