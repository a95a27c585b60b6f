"""Runs on an output without Ray, video files or a model: what opening and encoding would give is made up.

A corpus says for each URI which content is there. The content decides the spans and what becomes of them, so that an
output says by itself which content its clips are of.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vidshard.jobs.tokenization.planning import Planned, plan_output
from vidshard.pipeline import storage
from vidshard.pipeline.output.commit import TokenShardSink
from vidshard.pipeline.output.entries import Inputs, entry_ids, location_keys
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.plan_store import PLAN_SCHEMA, record_opened
from vidshard.pipeline.output.rejects import forget_retry_set, read_rejects
from vidshard.pipeline.output.shard_reader import check_shard
from vidshard.pipeline.output.shard_writer import ShardSettings
from vidshard.pipeline.rows import REJECTION, EncodeStats, add_clips, add_payload, rejection_row, row_span, span_row
from vidshard.schemas.rejections import Reason, Rejection, Stage, VideoError
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.tokens import Provenance, tokens_payload
from vidshard.schemas.video import Clip, ClipSpec, Geometry, Part, Span, SpanClips, VideoSource

CLIPS_PER_SPAN = 2
SPEC = ClipSpec(fps=Fraction(8), num_frames=1, height=8, width=8)
SOURCE = VideoSource(width=8, height=8, codec="h264", fps=8.0, rotation_degrees=0)
PAYLOAD = tokens_payload((1, 1, 1), 256)
PROVENANCE = Provenance(
    tokenizer={},
    weights_sha256="0",
    weights_source="seed:0",
    payload=PAYLOAD,
    run={},
    identity={},
    code_version="0",
    libraries={},
)

Outcome = Literal["clips", "refused", "gaps", "changed"]


@dataclass(frozen=True, kw_only=True)
class Content:
    """The bytes of a video, by a name."""

    name: str
    spans: tuple[Outcome, ...] = ("clips",)
    """Outcome of each span; none for a file that cannot be opened."""

    @property
    def video_id(self) -> str:
        """As content decides it."""
        return hashlib.sha256(self.name.encode()).hexdigest()[:24]


@dataclass(kw_only=True)
class File:
    """A content at a URI."""

    content: Content
    stamp: int = 0


Corpus = dict[str, File]
"""By URI."""


class Killed(BaseException):
    """The process ended here."""


@dataclass(kw_only=True)
class Writes:
    """Counts the writes of a run, and ends it before one of them."""

    last: int | None = None
    """Number of writes before the process ends; None for all."""
    made: list[str] = field(default_factory=list)

    def count(self, path: str) -> None:
        """Called before each write."""
        if self.last is not None and len(self.made) >= self.last:
            raise Killed(path)
        self.made.append(path)


@contextmanager
def counted(last: int | None = None) -> Iterator[Writes]:
    """Count what is written meanwhile; raise `Killed` before the write after so many, and before all later ones."""
    writes = Writes(last=last)
    write_atomic, remove, stage, publish = storage.write_atomic, storage.remove, storage.stage, storage.publish

    def counted_write(path: str, data: Any, **options: Any) -> None:
        writes.count(path)
        write_atomic(path, data, **options)

    def counted_remove(path: str) -> None:
        writes.count(path)
        remove(path)

    def counted_stage(path: str, data: Any, *, area: str) -> storage.StagedFile:
        writes.count(f"{path}, staged")
        return stage(path, data, area=area)

    def counted_publish(staged: storage.StagedFile) -> None:
        writes.count(staged.path)
        publish(staged)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "write_atomic", counted_write)
        patch.setattr(storage, "stage", counted_stage)
        patch.setattr(storage, "publish", counted_publish)
        patch.setattr(storage, "remove", counted_remove)
        yield writes


def inputs_of(corpus: Corpus, *, twice: tuple[str, ...] = ()) -> Inputs:
    """The corpus as ``pipeline.discover`` would list it, some URIs twice."""
    uris = [*corpus, *twice]
    table = pa.table(
        {
            "uri": pa.array(uris, pa.string()),
            "num_bytes": pa.array([1] * len(uris), pa.int64()),
            "fingerprint": pa.array([_fingerprint(corpus[uri]) for uri in uris], pa.string()),
        }
    )
    return Inputs.of(table, Part())


def _fingerprint(file: File) -> str:
    return f"{file.content.name}-{file.stamp}"


def opened(corpus: Corpus, videos: pa.Table) -> pa.Table:
    """Table of opened videos: ``PLAN_SCHEMA`` and ``rejection``."""
    rows: list[dict[str, Any]] = []
    for video in videos.select(["uri", "entry"]).to_pylist():
        uri, file = video["uri"], corpus[video["uri"]]
        [seen] = entry_ids([uri], [_fingerprint(file)], [None], [None], Part()).to_pylist()
        [place] = location_keys([uri]).to_pylist()
        common = {"entry": video["entry"], "seen_entry": seen, "place": place, "uri": storage.public_uri(uri)}
        if not file.content.spans:
            rejection = Rejection(
                uri=common["uri"],
                video_id=None,
                span_id=None,
                start_seconds=None,
                stage=Stage.PROBE,
                reason=Reason.NOT_A_VIDEO,
                detail="no video",
                place=place.hex(),
            )
            rows.append({**common, "rejection": rejection_row(rejection)})
        spans = spans_of(file.content, uri)
        rows += [{**span_row(span, SPEC, _fingerprint(file)), **common} for span in spans]
    return pa.Table.from_pylist(rows, schema=PLAN_SCHEMA.append(REJECTION))


def spans_of(content: Content, uri: str = "") -> list[Span]:
    """The spans of a content, the last of which is open."""
    count = len(content.spans)
    return [
        Span(
            video_id=content.video_id,
            uri=uri,
            time_base=Fraction(1, 8),
            grid_start_pts=0,
            first_clip=CLIPS_PER_SPAN * number,
            end_clip=None if number == count - 1 else CLIPS_PER_SPAN * (number + 1),
            duration_seconds_from_header=count * CLIPS_PER_SPAN / 8,
            source=SOURCE,
        )
        for number in range(count)
    ]


def encoded(row: pa.Table, outcome: Outcome) -> pa.Table:
    """Result of the encoder for a row of the work list."""
    span = row_span(row.to_pylist()[0])
    num_clips = {"clips": CLIPS_PER_SPAN, "gaps": 1}.get(outcome, 0)
    clips = [
        Clip(
            video_id=span.video_id,
            clip_index=index,
            frames=np.zeros((1, 8, 8, 3), np.uint8),
            frame_pts_seconds=np.array([index / 8]),
            num_valid_frames=1,
            start_seconds=index / 8,
            geometry=Geometry(policy="crop", scaled_width=8, scaled_height=8, left=0, top=0),
        )
        for index in range(span.first_clip, span.first_clip + num_clips)
    ]
    reasons = {"refused": Reason.DECODE_ERROR, "gaps": Reason.DECODE_ERROR, "changed": Reason.CHANGED}
    error = VideoError(reasons[outcome], outcome) if outcome in reasons else None
    decoded = add_clips(row, SpanClips(clips=clips, error=error), uri=span.uri, start_seconds=0.0, seconds=0.1)
    tokens = [np.array([clip.clip_index % 256], np.uint8) for clip in clips]
    stats = EncodeStats(seconds=0.0, wait_seconds=0.0, num_slots=1)
    return add_payload(decoded, {"tokens": tokens}, PAYLOAD, stats)


@dataclass(frozen=True, kw_only=True)
class Done:
    """A run that came to its end."""

    planned: Planned
    opened: list[str]
    """URIs of videos that were opened."""
    encoded: list[str]
    """Ids of spans that were encoded."""


def tokenize(
    out: str, corpus: Corpus, *, retry: list[Reason] | None = None, twice: tuple[str, ...] = (), log: Done | None = None
) -> Done:
    """A run on an output: planning as the job does it, then the work list into the sink, in small shards.

    Args:
        out: the output.
        corpus: its inputs.
        retry: reasons of the rejections to try again; empty for all, None for no retry.
        twice: URIs that the inputs name twice.
        log: filled meanwhile, for a run that is killed.
    """
    run = TokenizeRun(inputs=["-"], out=out, retry_rejected=retry)
    videos_opened: list[str] = [] if log is None else log.opened
    spans_encoded: list[str] = [] if log is None else log.encoded

    def open_videos(videos: pa.Table) -> list[Rejection]:
        rejections: list[Rejection] = []
        for first in range(0, videos.num_rows, 2):
            some = videos.slice(first, 2)
            rejections += record_opened(out, opened(corpus, some))
            videos_opened.extend(some["uri"].to_pylist())
        return rejections

    planned = plan_output(run, inputs_of(corpus, twice=twice), open_videos=open_videos)
    assert isinstance(planned.work.source, str)
    sink = TokenShardSink(
        ShardSettings(out=out, buckets=((SPEC, PAYLOAD),), provenance=PROVENANCE, shard_bytes=4, commit_seconds=600)
    )
    outcome_of = {
        span.span_id: outcome
        for file in corpus.values()
        for span, outcome in zip(spans_of(file.content), file.content.spans, strict=True)
    }
    try:
        work = pq.read_table(planned.work.source)
        for at, span in enumerate(work["span_id"].to_pylist()):
            spans_encoded.append(span)
            sink.add(encoded(work.slice(at, 1), outcome_of[span]))
            _commit_what_is_begun(sink)
    finally:
        sink.close()
    forget_retry_set(out)
    return Done(planned=planned, opened=videos_opened, encoded=spans_encoded)


def _commit_what_is_begun(sink: TokenShardSink) -> None:
    """Wait for the threads of a sink, so that each run on the same corpus makes the same writes.

    Otherwise, shards that are reported at once share a file of rejections, and others do not.
    """
    writer, committer = sink._writers.writer, sink._committer
    with writer._changed:
        writer._changed.wait_for(lambda: writer._num_writing == 0)
    committer.tick()
    for commit in list(committer._pending):
        commit.exception()


def clips_in(out: str) -> Counter[str]:
    """Number of times that each clip is in the shards; every shard is whole."""
    clips: Counter[str] = Counter()
    for path in shard_paths(out):
        check_shard(path)
        clips.update(pq.read_table(path, columns=["clip_id"])["clip_id"].to_pylist())
    return clips


def rejects_in(out: str) -> list[str]:
    """The rejections, in no order of files."""
    return sorted(json.dumps(row, sort_keys=True) for row in read_rejects(out).to_pylist())


def listed_spans(out: str) -> Counter[str]:
    """Number of times that the metadata of the shards lists each span, read by nothing of ours."""
    spans: Counter[str] = Counter()
    for path in sorted(Path(out, "shards").glob("*.parquet")):
        metadata: Mapping[bytes, bytes] = pq.read_metadata(path).metadata
        spans.update(json.loads(metadata[b"vidshard.spans"]))
    return spans
