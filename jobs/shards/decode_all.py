"""Job behind ``vidshard decode --all``: whole videos of an output as video files, on Ray or in this process.

The clips of each video are stitched in order. The same command again writes what is missing; ``decoded.jsonl`` beside
the videos says which file is which video. Where clips are missing a video is several files, and each gap is named.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console

from vidshard.jobs.runtime.events import reported
from vidshard.jobs.runtime.executor import ray_failures_named
from vidshard.jobs.runtime.progress import PhaseProgress, warn
from vidshard.jobs.shards.decode import DecodeRun, introduce, resolved_of, tiling_for
from vidshard.pipeline import storage
from vidshard.pipeline.crossing import check_parts
from vidshard.pipeline.output.layout import RUN, reject_paths
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.pipeline.output.shard_reader import output_shards
from vidshard.pipeline.stitching import Decoded, Gap, Piece, PieceDecoder, plan_pieces
from vidshard.schemas.errors import EXIT_FAILED, UserError
from vidshard.schemas.rejections import REMEDIES, Reason
from vidshard.schemas.text import counted, readable
from vidshard.schemas.uris import shown_uri

RECORD = "decoded.jsonl"
"""File beside the videos, one line per video file."""
GAPS = "gaps.jsonl"
"""File beside the videos, one line per gap; not there without gaps."""
_MAX_RECORD_BYTES = 1 << 30
_SAVE_SECONDS = 5.0
_SHOWN = 10
"""Gaps and failures that are printed; the files hold all."""


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """Figures of decoding all videos."""

    num_files: int
    """Video files that are there now."""
    num_new: int
    """Files that this run wrote."""
    num_gaps: int
    failures: Mapping[str, str] = field(default_factory=dict)
    """Reason by name of the files that could not be made."""

    @property
    def exit_code(self) -> int:
        """0; 1 if a file could not be made."""
        return EXIT_FAILED if self.failures else 0


def decode_all(request: DecodeRun, console: Console, *, local: bool) -> DecodeResult:
    """Decode the videos of an output into a folder.

    Args:
        local: decode in this process, without Ray.

    Raises:
        VidshardError: the weights are missing or others, a shard is damaged, or a file cannot be written.
    """
    assert request.folder is not None, "the command says where to"
    with reported(console, request.reporting, command="decode --all", out=request.folder) as events:
        result = _decode_all(request, request.folder, console, local=local)
        events.emit("summary", result=asdict(result))
        events.will_end(result.exit_code, [f"{name}: {reason}" for name, reason in result.failures.items()])
    return result


def _decode_all(request: DecodeRun, folder: str, console: Console, *, local: bool) -> DecodeResult:
    """As :func:`decode_all`."""
    paths = output_shards(request.out)
    resolved = resolved_of(request, paths[0])
    if request.only:
        check_parts(resolved, request.only)
    tiling = tiling_for(request, resolved)
    introduce(resolved, console)
    dest = storage.absolute(folder)
    if dest != storage.public_uri(dest):
        raise UserError(f"{storage.public_uri(dest)}: put the credentials into the environment, not the URL")
    lost_frames = resolved.config.time_stride - 1 if resolved.run.continuous else 0
    pieces, gaps = plan_pieces(paths, lost_frames=lost_frames)
    pieces = pieces[: request.limit]
    settings = [resolved.source.sha256, list(request.only), str(tiling)]
    digests = {piece.name: piece.digest(settings) for piece in pieces}
    record = _Record.load(dest)
    left = [piece for piece in pieces if not record.has(piece.name, digests[piece.name])]
    failures: dict[str, str] = {}
    by_name = {piece.name: piece for piece in left}
    total = sum(piece.num_frames for piece in left)
    storage.remove_leftovers(dest)
    decoder = PieceDecoder(resolved, paths, tiling=tiling, parts=request.only)
    num_new = done = 0
    try:
        with ExitStack() as stack:
            results = _results(left, decoder, request, stack, local=local) if left else iter(())
            display = stack.enter_context(PhaseProgress(console, "decoding", total))
            for decoded in results:
                if decoded.is_refused:
                    raise UserError(decoded.failure)
                piece = by_name[decoded.name]
                done += piece.num_frames
                if decoded.failure:
                    failures[decoded.name] = decoded.failure
                else:
                    record.add(piece, decoded, digests[piece.name])
                    num_new += 1
                display.update(
                    done, f"{num_new:,} of {counted(len(left), 'video')} · {done / display.seconds:.1f} frames/s"
                )
        if request.limit is None:
            record.forget_others(pieces)
    finally:
        record.save_if_changed()
    return _report(request, pieces, gaps if request.limit is None else [], failures, num_new, dest, console)


def _results(
    left: Sequence[Piece], decoder: PieceDecoder, request: DecodeRun, stack: ExitStack, *, local: bool
) -> Iterator[Decoded]:
    """Results as they come; a Ray that is started for it ends with the stack."""
    if local:
        return map(decoder, left)
    from vidshard.jobs.runtime.cluster import ray_cluster  # imports Ray, which takes seconds that --local can save
    from vidshard.pipeline.decode_flow import decode_on_ray

    cluster = stack.enter_context(
        ray_cluster(address=request.ray_address, object_store_bytes=None, verbose=request.verbose)
    )
    gpus = int(cluster.num_gpus)
    workers = min(len(left), request.workers or gpus or max(1, cluster.num_cpus // 4))
    stack.enter_context(ray_failures_named())
    return decode_on_ray(
        left,
        decoder,
        workers=workers,
        # one CPU is left, as a pool of actors that takes all of them may stop a flow
        cpus_per_worker=1 if gpus else max(1, (cluster.num_cpus - 1) // max(1, cluster.num_nodes) // workers),
        gpus_per_worker=min(1.0, gpus / workers),
    )


class _Record:
    """Video files that are finished, by name: ``decoded.jsonl``."""

    def __init__(self, dest: str, lines: dict[str, dict[str, Any]], there: frozenset[str]) -> None:
        self._dest, self._lines, self._there = dest, lines, there
        self._saved, self._took, self._changed = time.monotonic(), 0.0, False

    @classmethod
    def load(cls, dest: str) -> _Record:
        """Read it; lines that are damaged count as files that are not there."""
        path = storage.join(dest, RECORD)
        lines: dict[str, dict[str, Any]] = {}
        if storage.exists(path):
            for line in storage.read_bytes(path, max_bytes=_MAX_RECORD_BYTES).decode(errors="replace").splitlines():
                try:
                    found = json.loads(line)
                    lines[str(found["file"])] = found
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue
        names = frozenset(name.rsplit("/", 1)[-1] for name in storage.list_files(dest, ".mp4"))
        return cls(dest, lines, names)

    def has(self, name: str, digest: str) -> bool:
        """Whether the file of a piece is there, with the same content."""
        line = self._lines.get(f"{name}.mp4")
        return line is not None and f"{name}.mp4" in self._there and line.get("digest") == digest

    def add(self, piece: Piece, decoded: Decoded, digest: str) -> None:
        """Write the file of a piece, and record it.

        Raises:
            storage.StorageError: it could not be written.
        """
        name = f"{piece.name}.mp4"
        storage.write_atomic(storage.join(self._dest, name), decoded.video)
        self._lines[name] = {
            "file": name,
            "video_id": piece.video_id,
            "uri": piece.uri,
            "start_seconds": piece.start_seconds,
            "fps": piece.fps,
            "num_frames": decoded.num_frames,
            "first_clip": piece.clips[0].clip_index,
            "last_clip": piece.clips[-1].clip_index,
            "digest": digest,
        }
        self._changed = True
        if time.monotonic() - self._saved > max(_SAVE_SECONDS, 20 * self._took):
            self.save()

    def forget_others(self, pieces: Sequence[Piece]) -> None:
        """Remove recorded files of the same videos that are of an earlier state: clips that were missing are there now.

        Raises:
            storage.StorageError: one could not be removed.
        """
        wanted = {f"{piece.name}.mp4" for piece in pieces}
        videos = {piece.name.split("-from-")[0] for piece in pieces}
        for name in [n for n in self._lines if n not in wanted and n in self._there]:
            if name.removesuffix(".mp4").split("-from-")[0] in videos:
                storage.remove(storage.join(self._dest, name))
                del self._lines[name]
                self._changed = True

    def save_if_changed(self) -> None:
        """Write the record, if it differs from the file."""
        if self._changed:
            self.save()

    def save(self) -> None:
        """Write the record."""
        begun = time.monotonic()
        lines = "".join(json.dumps(line) + "\n" for _, line in sorted(self._lines.items()))
        storage.write_atomic(storage.join(self._dest, RECORD), lines.encode())
        self._saved = time.monotonic()
        self._took = self._saved - begun
        self._changed = False


def _report(
    request: DecodeRun,
    pieces: Sequence[Piece],
    gaps: Sequence[Gap],
    failures: Mapping[str, str],
    num_new: int,
    dest: str,
    console: Console,
) -> DecodeResult:
    """Print what is there, what is missing and why; returns the figures."""

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    num_files = len(pieces) - len(failures)
    new = f"{num_new:,} written now" if num_new else "nothing new was written"
    line(f"{counted(num_files, 'video')} in {shown_uri(dest)}: {new}")
    reasons, counts = _rejections(request.out)
    records: list[dict[str, Any]] = [
        {
            "video_id": gap.video_id,
            "uri": gap.uri,
            "first_missing_clip": gap.first,
            "last_missing_clip": gap.last,
            "reasons": sorted(reasons.get(gap.video_id, ())),
        }
        for gap in gaps
    ]
    path = storage.join(dest, GAPS)
    if records:
        storage.write_atomic(path, "".join(json.dumps(record) + "\n" for record in records).encode())
        warn(console, f"{len(records):,} gaps: the video goes on in another file; {shown_uri(path)} lists them")
    elif request.limit is None and storage.exists(path):
        storage.remove(path)
    for gap, record in list(zip(gaps, records, strict=True))[:_SHOWN]:
        why = ", ".join(record["reasons"]) or "not tokenized"
        which = f"clip {gap.first}" if gap.first == gap.last else f"clips {gap.first} to {gap.last}"
        line(f"  {readable(shown_uri(gap.uri))}: {which} missing ({why})")
    for reason, count in counts.most_common():
        remedy = REMEDIES[Reason(reason)] if reason in set(Reason) else ""
        line(f"  rejected {count:,} x {readable(reason, 80)}: {remedy}")
    for name, failure in list(failures.items())[:_SHOWN]:
        warn(console, f"{name}.mp4 could not be made: {failure}")
    return DecodeResult(num_files=num_files, num_new=num_new, num_gaps=len(gaps), failures=failures)


def _rejections(out: str) -> tuple[dict[str, set[str]], Counter[str]]:
    """Reasons of rejections by video id, and how often each reason occurs; none for a folder of shards."""
    out = storage.absolute(out)
    reasons: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    if not out.endswith(".parquet") and storage.exists(storage.join(out, RUN)) and reject_paths(out):
        table = read_rejects(out)
        counts.update(table["reason"].to_pylist())
        for video, reason in zip(table["video_id"].to_pylist(), table["reason"].to_pylist(), strict=True):
            if video is not None:
                reasons.setdefault(video, set()).add(reason)
    return reasons, counts
