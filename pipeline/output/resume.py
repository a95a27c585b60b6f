"""Resume: compares the inputs with the state of an output and finds the spans still to process.

Every function here is pure: it reads no file and writes none. ``pipeline.output.work_list`` writes what they decide.

    plan/      what was planned          ─┐
    shards/    what is finished           ├─▶ OutputState ─┐
    rejects/   what was refused          ─┘                ├─▶ reconcile ─▶ Resume: spans to do, files to correct
    inputs     videos and their entries ───▶ Inputs ───────┘

A video is recognized by its entry (``pipeline.output.entries``). A file that was replaced has another entry and is
opened again; if its content is another one, the clips of the former content are superseded and taken out.

Where nothing was rejected, replaced or removed, no Python object is held for each video (benchmarks/scale.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vidshard.pipeline import storage
from vidshard.pipeline.output.entries import Inputs, is_row_of, location_keys, public_uris
from vidshard.pipeline.output.parquet import Mask, release_memory
from vidshard.pipeline.output.rejects import RetrySet, is_partial, rejected_spans
from vidshard.pipeline.output.state import OutputState
from vidshard.schemas.rejections import Reason, Rejection, Stage

Numbers = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Resume:
    """The spans still to process for the inputs of a run, and what is outdated in the output's files."""

    left: Mask
    """For each row of the plan whether the span is to be processed now."""
    input_row: Numbers
    """For each row of the plan the number of its video among the inputs, or -1."""
    num_left: int
    num_spans: int
    """All planned spans of the inputs, each once."""
    num_committed: int
    """Those of them that are finished."""
    num_rejected: int
    """Those of them that were rejected and have no clips."""
    expected_clips: int
    """Clips of all planned spans, if the headers tell the truth."""
    superseded: frozenset[str]
    """Ids of videos that were replaced by others since."""
    outdated_spans: Mask
    """For each committed span whether it must leave its shard: superseded, or in an earlier shard too."""
    num_superseded_spans: int
    kept_rejects: Mask
    """For each rejection of the state whether it still holds."""
    new_rejects: tuple[Rejection, ...]
    """Copies of other videos, and bad rows of manifests, that no rejection says yet."""
    rejected_uris: frozenset[str]
    """URIs, without credentials, of videos of the inputs with rejections; copies of others are left out."""


def videos_to_open(state: OutputState, inputs: Inputs, retry: RetrySet | None = None) -> pa.Table:
    """Select the videos that the plan does not know as they are now.

    Args:
        state: of the output.
        inputs: the videos.
        retry: open none but the videos of this set.
    """
    row = _input_rows(state.plan, inputs)
    has_span = _is_valid(state.plan["span_id"])
    known = _flags(row[has_span], inputs.num_videos)
    if (has_span & (row < 0)).any():
        known &= ~_came_back(state.plan, inputs, row, has_span)
    refused = _whole_video_keys(state.rejects.table)
    if refused:
        is_refused = np.fromiter((key.hex() in refused for key in inputs.location_keys()), np.bool_, inputs.num_videos)
        known |= _flags(row[~has_span], inputs.num_videos) & is_refused
    unknown = inputs.videos if not known.any() else inputs.videos.filter(pa.array(~known))
    if retry is None:
        return unknown
    return unknown.filter(pa.array([uri in retry.uris for uri in public_uris(unknown)], pa.bool_()))


def reconcile(
    state: OutputState, inputs: Inputs, *, retry: RetrySet | None = None, opened: pa.Table | None = None
) -> Resume:
    """Compare the inputs with the state of an output.

    Args:
        state: of the output, after the videos of :func:`videos_to_open` were opened.
        inputs: the videos; each is in the plan, or was rejected.
        retry: process none but the spans of this set, and those of ``opened``.
        opened: videos that were opened this time.
    """
    plan = _InputPlan.of(state.plan, inputs)
    committed = state.committed.table["span_id"]
    unique = committed.unique()
    wanted = _wanted(state.plan["span_id"], plan)
    is_done = _is_in(state.plan["span_id"], unique)
    is_refused = _is_in(state.plan["span_id"], rejected_spans(state.rejects.table)) & ~is_done
    release_memory()
    left = wanted & ~is_done & ~is_refused
    if retry is not None:
        left &= _is_retried(state.plan, retry, opened)
    is_repeated = _is_repeated(committed, unique)
    is_superseded = ~is_repeated & _is_of(committed, plan.superseded)
    kept, new = _reconcile_rejects(state.rejects.table.to_pylist(), inputs, plan, unique)
    return Resume(
        left=left,
        input_row=plan.row,
        num_left=int(left.sum()),
        num_spans=int(wanted.sum()),
        num_committed=int((wanted & is_done).sum()),
        num_rejected=int((wanted & is_refused).sum()),
        expected_clips=int(pc.fill_null(state.plan["expected_clips"], 0).to_numpy()[wanted].sum()),
        superseded=plan.superseded,
        outdated_spans=is_superseded | is_repeated,
        num_superseded_spans=int(is_superseded.sum()),
        kept_rejects=kept,
        new_rejects=new,
        rejected_uris=_rejected_uris(state.rejects.table.filter(pa.array(kept)), inputs),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _InputPlan:
    """The videos of the inputs in the plan."""

    row: Numbers
    """For each row of the plan the number of its video among the inputs, or -1."""
    is_opened: Mask
    """For each video of the inputs whether it could be opened; the others were rejected."""
    is_owner: Mask
    """For each video of the inputs whether it is the first with its content; the others are copies."""
    has_repeats: bool
    """Whether a video is in the plan several times: it has copies, or was opened again and found the same."""
    copies: tuple[Rejection, ...]
    """A rejection for each copy."""
    superseded: frozenset[str]
    """Ids of videos that were replaced by others since."""

    @classmethod
    def of(cls, plan: pa.Table, inputs: Inputs) -> _InputPlan:
        row = _input_rows(plan, inputs)
        heads = _heads(plan, row)
        first = heads.group_by("content").aggregate([("input_row", "min")])["input_row_min"].to_numpy()
        release_memory()
        return cls(
            row=row,
            is_opened=_flags(heads["input_row"].to_numpy(), inputs.num_videos),
            is_owner=_flags(first, inputs.num_videos),
            has_repeats=heads.num_rows > len(first),
            copies=(*_copies(inputs, heads, first), *(_named_twice(uri) for uri in inputs.repeated)),
            superseded=_superseded(plan, inputs, row, heads),
        )


# The plan and the inputs.


def _input_rows(plan: pa.Table, inputs: Inputs) -> Numbers:
    """For each row of the plan the number of its video among the inputs; -1 for one that is not among them."""
    entries = inputs.videos["entry"].combine_chunks()
    row = np.asarray(pc.fill_null(pc.index_in(plan["entry"], entries), -1).to_numpy(), np.int32)
    if (row < 0).any():
        seen = pc.fill_null(pc.index_in(plan["seen_entry"], entries), -1).to_numpy()
        row = np.where(row < 0, seen, row)
    release_memory()
    return np.asarray(row, np.int32)


def _is_valid(column: pa.ChunkedArray) -> Mask:
    return np.asarray(pc.is_valid(column).to_numpy(), np.bool_)


def _is_in(column: pa.ChunkedArray, values: pa.Array) -> Mask:
    return np.asarray(pc.is_in(column, values).to_numpy(), np.bool_)


def _flags(numbers: Numbers, length: int) -> Mask:
    """bool (length,): true at these numbers; -1 is none."""
    found = np.zeros(length, np.bool_)
    found[numbers[numbers >= 0]] = True
    return found


def _heads(plan: pa.Table, row: Numbers) -> pa.Table:
    """The first span of each planned video of the inputs: ``input_row``, and ``content``, its video and part."""
    is_first = np.asarray(pc.fill_null(pc.equal(plan["first_clip"], 0), False).to_numpy(), np.bool_)
    is_head = pa.array(is_first & _is_valid(plan["span_id"]) & (row >= 0))
    content = pc.replace_substring_regex(plan["span_id"].filter(is_head), r"-\d+-(\d+|end)$", "")
    return pa.table({"content": content, "input_row": pa.array(row, pa.int32()).filter(is_head)})


def _wanted(spans: pa.ChunkedArray, plan: _InputPlan) -> Mask:
    """Mask of the plan's rows that are spans of the inputs: of several copies of a video those of the first alone."""
    is_owner = np.append(plan.is_owner, False)  # row -1, no video of the inputs, takes the last
    wanted: Mask = is_owner[plan.row] & _is_valid(spans)
    if plan.has_repeats:
        numbers = np.flatnonzero(wanted)
        table = pa.table({"span_id": spans.filter(pa.array(wanted)), "number": numbers})
        wanted = _flags(table.group_by("span_id").aggregate([("number", "min")])["number_min"].to_numpy(), len(wanted))
    return wanted


def _is_retried(plan: pa.Table, retry: RetrySet, opened: pa.Table | None) -> Mask:
    again = _is_in(plan["span_id"], pa.array(sorted(retry.spans), pa.string()))
    if opened is not None:
        again |= _is_in(plan["entry"], opened["entry"].combine_chunks())
    return again


def _came_back(plan: pa.Table, inputs: Inputs, row: Numbers, has_span: Mask) -> Mask:
    """Mask of the planned videos at whose location another one was planned since: they are opened again."""
    latest: dict[bytes, int] = {}
    for number in np.flatnonzero(has_span & (row < 0)):
        latest[plan["place"][int(number)].as_py()] = int(number)
    own = np.full(inputs.num_videos, -1)
    planned = np.flatnonzero(has_span & (row >= 0))
    np.maximum.at(own, row[planned], planned)
    return np.array(
        [latest.get(key, -1) > mine >= 0 for key, mine in zip(inputs.location_keys(), own, strict=True)], np.bool_
    )


def _superseded(plan: pa.Table, inputs: Inputs, row: Numbers, heads: pa.Table) -> frozenset[str]:
    """Ids of videos that were replaced: at each location of theirs that the inputs name is another video now.

    A video whose location the inputs do not name any more was removed, not replaced, and its clips stay.
    """
    gone = (row < 0) & _is_valid(plan["span_id"])
    if not gone.any():
        return frozenset()
    ids = dict(zip(heads["input_row"].to_pylist(), map(_video_id, heads["content"].to_pylist()), strict=True))
    now: dict[bytes, set[str]] = defaultdict(set)
    for number, key in enumerate(inputs.location_keys()):
        if number in ids:
            now[key].add(ids[number])
    replaced: set[str] = set()
    elsewhere: set[str] = set(ids.values())
    former = plan.select(["place", "span_id"]).filter(pa.array(gone))
    for key, video_id in zip(former["place"].to_pylist(), map(_video_id, former["span_id"].to_pylist()), strict=True):
        if video_id not in now.get(key, set()):
            (replaced if key in now else elsewhere).add(video_id)
    return frozenset(replaced - elsewhere)


def _video_id(span_id: str) -> str:
    """The id of a span's video; also of what ``_heads`` calls content."""
    return span_id.split("-", 1)[0]


# The shards.


def _is_of(spans: pa.ChunkedArray, video_ids: Collection[str]) -> Mask:
    """Mask of the spans that are of one of these videos."""
    if not video_ids:
        return np.zeros(len(spans), np.bool_)
    return np.array([_video_id(span) in video_ids for span in spans.to_pylist()], np.bool_)


def _is_repeated(spans: pa.ChunkedArray, unique: pa.Array) -> Mask:
    """Mask of the committed spans that an earlier shard has too, as two runs at once might have written them."""
    if len(unique) == len(spans):
        return np.zeros(len(spans), np.bool_)
    numbered = pa.table({"span_id": spans, "number": np.arange(len(spans))})
    first = numbered.group_by("span_id").aggregate([("number", "min")])["number_min"].to_numpy()
    return ~_flags(first, len(spans))


# The rejections.


def rejects_to_retry(rejects: pa.Table, reasons: Collection[Reason] | None, inputs: Inputs) -> Mask:
    """Mask of the rejections for ``--retry-rejected``: those of videos of the inputs, as others cannot be tried now.

    Args:
        rejects: all of the output.
        reasons: the reasons asked for; None for all but copies of other videos.
        inputs: the videos.
    """
    uris = {*inputs.public_uris(), *(one.uri for one in inputs.bad_rows)}

    def is_meant(row: Mapping[str, Any]) -> bool:
        is_asked_for = row["reason"] != Reason.DUPLICATE if reasons is None else row["reason"] in reasons
        return is_asked_for and row["uri"] in uris

    return np.array([is_meant(row) for row in rejects.to_pylist()], np.bool_)


def _whole_video_keys(rejects: pa.Table) -> set[str | None]:
    """Location keys, in hex, of the rejections of whole videos."""
    return set(rejects.filter(pc.is_null(rejects["span_id"]))["place"].to_pylist())


def _copies(inputs: Inputs, heads: pa.Table, first: Numbers) -> list[Rejection]:
    """A rejection for each video with the same content as an earlier one of the inputs."""
    if heads.num_rows == len(first):
        return []
    is_owner = pc.is_in(heads["input_row"], pa.array(first, pa.int32()))
    copies = heads.filter(pc.invert(is_owner)).sort_by("input_row")
    owners = heads.filter(pc.and_(is_owner, pc.is_in(heads["content"], copies["content"].combine_chunks())))
    owner_of = dict(zip(owners["content"].to_pylist(), owners["input_row"].to_pylist(), strict=True))
    content_of = dict(zip(copies["input_row"].to_pylist(), copies["content"].to_pylist(), strict=True))
    return [
        _copy(
            inputs.uri(number),
            video_id=_video_id(content),
            stage=Stage.PROBE,
            detail=f"the same content as {storage.public_uri(inputs.uri(owner_of[content]))}",
        )
        for number, content in content_of.items()
    ]


def _named_twice(uri: str) -> Rejection:
    """The rejection of a row of the inputs that repeats an earlier one."""
    detail = f"the same content as {storage.public_uri(uri)}, which the inputs name twice"
    return _copy(uri, video_id=None, stage=Stage.DISCOVER, detail=detail)


def _copy(uri: str, *, video_id: str | None, stage: Stage, detail: str) -> Rejection:
    return Rejection(
        uri=storage.public_uri(uri),
        video_id=video_id,
        span_id=None,
        start_seconds=None,
        stage=stage,
        reason=Reason.DUPLICATE,
        detail=detail,
        place=location_keys([uri])[0].as_py().hex(),
    )


def _reconcile_rejects(
    rejects: Sequence[Mapping[str, Any]], inputs: Inputs, plan: _InputPlan, committed: pa.Array
) -> tuple[Mask, tuple[Rejection, ...]]:
    """Find the rejections that do not hold any more, as a run killed between two writes may leave them.

    These are: of superseded videos; of spans whose file had changed, which are tried again; of whole spans that are
    finished after all; of what is missing beside clips that were never written; of whole videos that could be opened
    since; of copies that are none now; and of rows of manifests that were mended.

    Args:
        rejects: rejections of the output.
        inputs: the videos.
        plan: the videos in the plan.
        committed: ids of finished spans.

    Returns:
        For each rejection whether it holds, and the rejections of copies and bad rows that are not there yet.
    """
    whole = {row["place"] for row in rejects if row["span_id"] is None}
    named: set[str] = set()
    refused: set[str] = set()
    if whole:
        for key, opened in zip(inputs.location_keys(), plan.is_opened, strict=True):
            if key.hex() in whole:
                named.add(key.hex())
                if not opened:
                    refused.add(key.hex())
    spans = pa.array(sorted({row["span_id"] for row in rejects if row["span_id"] is not None}), pa.string())
    finished = set(spans.filter(pc.is_in(spans, committed)).to_pylist())
    missing = {(one.uri, one.detail): one for one in (*plan.copies, *inputs.bad_rows)}

    def holds(row: Mapping[str, Any]) -> bool:
        if row["video_id"] is not None and row["video_id"] in plan.superseded:
            return False
        if row["reason"] == Reason.BAD_ROW:
            is_known = missing.pop((row["uri"], row["detail"]), None) is not None
            return is_known or not any(is_row_of(row["detail"], manifest) for manifest in inputs.manifests)
        if row["reason"] == Reason.DUPLICATE:
            return missing.pop((row["uri"], row["detail"]), None) is not None or row["place"] not in named
        if row["span_id"] is None:
            return row["place"] in refused or row["place"] not in named
        return row["reason"] != Reason.CHANGED and is_partial(row) == (row["span_id"] in finished)

    kept = np.array([holds(row) for row in rejects], np.bool_)
    return kept, tuple(missing.values())


def _rejected_uris(rejects: pa.Table, inputs: Inputs) -> frozenset[str]:
    kept_whole = pa.array([str(Reason.DUPLICATE), str(Reason.POSSIBLE_LOSS)])
    rejected = set(rejects.filter(pc.invert(pc.is_in(rejects["reason"], kept_whole)))["uri"].to_pylist())
    bad = {one.uri for one in inputs.bad_rows}
    return frozenset(bad | rejected.intersection(inputs.public_uris()) if rejected else bad)
