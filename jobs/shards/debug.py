"""Replay of spans: runs the stages of a run for a few spans in this process, and shows what each stage gave."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console

from vidshard.jobs.runtime.run_record import read_run_record, refuse_unasked, resolved_run_of
from vidshard.pipeline import storage
from vidshard.pipeline.decode_stage import SpanDecoder, probe
from vidshard.pipeline.encode_stage import ClipEncoder
from vidshard.pipeline.output.committed import committed_spans
from vidshard.pipeline.output.plan_store import PLAN_SCHEMA, read_planned
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.pipeline.plan import VideoPlanner
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.rows import clip_frames, row_span
from vidshard.pipeline.video.sampling import clips_of_last_span
from vidshard.schemas.errors import EXIT_FAILED, UserError
from vidshard.schemas.rejections import Reason, VideoError, remedy_of
from vidshard.schemas.text import counted, readable
from vidshard.schemas.uris import shown_uri, typed_hosts, without_secrets
from vidshard.schemas.video import Limits, VideoRef

_COLUMNS_OF_SHEET = 6


def debug_spans(
    out: str,
    console: Console,
    *,
    span_id: str | None,
    uri: str | None,
    pictures: str | None,
    encode: bool,
    weights: str | None,
    fetch_sources: bool,
    allow_private: bool,
    damaged: Literal["reject", "keep"] | None = None,
) -> int:
    """Replay one span, or the rejected spans of one video, in this process, and print what each stage gave.

    Nothing is written to the output. Signals are not read.

    Args:
        out: the output.
        span_id: id of the span, or its beginning; None with ``uri``.
        uri: location of the video. Its rejected spans are replayed, or else its first one.
        pictures: folder for one PNG file per clip, its frames in rows of six; None to write none.
        encode: whether to encode what was decoded.
        weights: present location of the weights; None for the location that the output records.
        fetch_sources: whether the video may be read from remote storage.
        damaged: clips that a damaged span gives, as in tokenizing: none, or the undamaged ones. None for the setting of
            the run; if that gives none, pictures still show what is before, between and after the damage.
        allow_private: whether it may lie on a web server with a private address that neither ``out`` nor ``uri`` names.

    Returns:
        0 if every stage gave a result; 1 if one of them rejected something.

    Raises:
        VidshardError: the output cannot be read, has no such span or video, the video is remote and may not be
            fetched, or the folder for pictures cannot be made.
    """
    with _folder_for(pictures):
        folder = storage.absolute(out)
        hosts = None if allow_private else typed_hosts([out, *([] if uri is None else [uri])])
        resolved = resolved_run_of(folder, weights=weights, source_hosts=hosts)
        record = read_run_record(folder)
        limits = replace(
            resolved.source_limits,
            sandbox="auto",  # what an output records does not switch it off
            sampled_ids=record is not None and record.sampled_ids,
        )
        rows = _planned(folder, span_id, uri)
        source = rows["uri"][0].as_py()
        if not fetch_sources:
            refuse_unasked(source)
        printer = _Printer(console)
        printer.line("video", shown_uri(source))
        if not _open(source, limits, printer):
            return EXIT_FAILED
        if rows["span_id"].null_count:
            rows = _plan_again(rows, resolved, limits)
            rejection = rows["rejection"][0].as_py()
            if rejection is not None:
                printer.refused("plan", Reason(rejection["reason"]), rejection["detail"])
                return EXIT_FAILED
        rows = _chosen(rows, folder, span_id, printer)
        keep = (damaged or resolved.run.damaged) == "keep"
        decoded = _decode(rows, resolved, limits, printer, keep_undamaged=keep)
        if pictures is not None:
            shown = decoded
            if damaged is None and not keep and decoded["rejection"].null_count < decoded.num_rows:
                shown = _decode(rows, resolved, limits, None, keep_undamaged=True)
                if _num_clips(shown):
                    printer.line("pictures", "of the clips that are whole, which --damaged keep would store")
            _write_pictures(shown, resolved, Path(pictures), printer)
        if encode:
            _encode(decoded, resolved, printer)
        return EXIT_FAILED if decoded["rejection"].null_count < decoded.num_rows else 0


class _Printer:
    """Lines of one stage each, with the seconds since the line before."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._since = time.monotonic()

    def line(self, stage: str, text: str, *, timed: bool = False) -> None:
        now = time.monotonic()
        seconds = f"   {now - self._since:.2f} s" if timed else ""
        self._since = now
        self._console.print(f"  {stage:<10}{readable(text, 2000)}{seconds}", highlight=False, markup=False)

    def refused(self, stage: str, reason: Reason, detail: str, *, can_keep: bool = False) -> None:
        self.line(stage, f"rejected, {reason}: {without_secrets(detail)}", timed=True)
        self.line("", remedy_of(reason, can_keep=can_keep))


def _planned(out: str, span_id: str | None, uri: str | None) -> pa.Table:
    """Rows of the plan of one span, or of one video.

    Raises:
        UserError: there is no such row, or the id is the beginning of several.
    """
    rows = read_planned(out)
    if not rows.num_rows:
        raise UserError(f"{shown_uri(out)} has no plan: nothing of its inputs was opened yet")
    if span_id is not None:
        chosen = rows.filter(pc.fill_null(pc.starts_with(rows["span_id"], span_id), False))
        found = chosen["span_id"].unique().to_pylist()
        if len(found) != 1:
            some = ", ".join(readable(name) for name in (found or rows["span_id"].drop_null().to_pylist())[:3])
            many = f"is the beginning of {len(found)} spans" if found else "is no span of the plan"
            raise UserError(f"--span {readable(span_id)} {many}, whose ids are such as {some}")
        return chosen.slice(chosen.num_rows - 1)
    assert uri is not None
    wanted = {storage.public_uri(uri), storage.public_uri(storage.absolute(uri))}
    chosen = rows.filter(pc.is_in(rows["uri"], pa.array(sorted(wanted), pa.string())))
    if not chosen.num_rows:
        raise UserError(
            f"{shown_uri(uri)} is not in the plan of {shown_uri(out)}, which names videos such as "
            f"{shown_uri(rows['uri'][0].as_py())}"
        )
    newest = chosen.filter(pc.equal(chosen["seen_entry"], chosen["seen_entry"][-1]))
    with_spans = newest.filter(pc.is_valid(newest["span_id"]))
    return with_spans if with_spans.num_rows else newest.slice(newest.num_rows - 1)


def _open(uri: str, limits: Limits, printer: _Printer) -> bool:
    found = probe(VideoRef(uri=uri, num_bytes=-1), limits)
    if isinstance(found, VideoError):
        printer.refused("open", found.reason, found.detail)
        return False
    source = found.source
    printer.line(
        "open",
        f"{source.codec} {source.width}x{source.height}, {source.fps:.6g} fps, "
        f"{found.duration_seconds_from_header:.3f} s by its header, rotated by {source.rotation_degrees}, "
        f"id {found.video_id}",
        timed=True,
    )
    return True


def _plan_again(row: pa.Table, resolved: ResolvedRun, limits: Limits) -> pa.Table:
    """Plan a video that could not be opened by the run."""
    planner = VideoPlanner(tuple(resolved.clip_specs), resolved.run.part, resolved.clips_per_span, limits)
    videos = row.select(["uri", "entry"]).append_column("num_bytes", pa.array([-1], pa.int64()))
    return planner(videos)


def _chosen(rows: pa.Table, out: str, span_id: str | None, printer: _Printer) -> pa.Table:
    """Say what became of the spans in the run; the ones to replay."""
    rejects = {reject["span_id"]: reject for reject in read_rejects(out).to_pylist() if reject["span_id"] is not None}
    committed = set(committed_spans(out).to_pylist())
    ids = rows["span_id"].to_pylist()
    refused = [number for number, name in enumerate(ids) if name in rejects]
    chosen = rows.take(refused or [0])
    for row in chosen.to_pylist():
        span = row_span(row)
        last = "the end" if span.end_clip is None else span.end_clip - 1
        state = "committed" if span.span_id in committed else "not in a shard"
        if span.span_id in rejects:
            reject = rejects[span.span_id]
            state += f", rejected as {reject['reason']}: {without_secrets(reject['detail'])}"
        of = "" if span_id is not None else f" ({len(chosen)} of {len(ids)} spans of the video)"
        printer.line("plan", f"span {span.span_id}, clips {span.first_clip} to {last}{of}: {state}")
    return chosen.select([name for name in PLAN_SCHEMA.names if name in chosen.column_names])


def _num_clips(decoded: pa.Table) -> int:
    return sum(len(clips) for clips in decoded["clips"].to_pylist())


def _decode(
    rows: pa.Table, resolved: ResolvedRun, limits: Limits, printer: _Printer | None, *, keep_undamaged: bool
) -> pa.Table:
    """Decode spans, and print what each gave if there is a printer."""
    decoder = SpanDecoder(
        spec=resolved.largest,
        max_clips=clips_of_last_span(resolved.clips_per_span),
        clips_per_pass=resolved.clips_per_span,
        limits=limits,
        keep_undamaged=keep_undamaged,
    )
    tables = []
    for table in decoder(rows):
        tables.append(table)
        if printer is None:
            continue
        [row] = table.select(["clips", "rejection", "span_id"]).to_pylist()
        printer.line("decode", f"{counted(len(row['clips']), 'clip')} of span {row['span_id']}", timed=True)
        for clip in row["clips"]:
            times = clip["frame_pts_seconds"]
            printer.line(
                "",
                f"clip {clip['clip_index']}: {clip['num_valid_frames']} of {len(times)} frames are of the video, shown "
                f"from {times[0]:.3f} to {times[-1]:.3f} s; decoding errors {clip['decode_errors']}",
            )
        if row["rejection"] is not None:
            reason, detail = Reason(row["rejection"]["reason"]), row["rejection"]["detail"]
            printer.refused("", reason, detail, can_keep=not keep_undamaged)
    return pa.concat_tables(tables)


@contextmanager
def _folder_for(pictures: str | None) -> Iterator[None]:
    """Context with a folder for pictures; one that was made for them and stays empty is removed."""
    if pictures is None:
        yield
        return
    folder = Path(pictures)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--pictures {folder}: {error.strerror}; name a folder that you may write to") from error
    try:
        yield
    finally:
        if is_new:
            with suppress(OSError):  # it has pictures
                folder.rmdir()


def _write_pictures(decoded: pa.Table, resolved: ResolvedRun, folder: Path, printer: _Printer) -> None:
    """Write a PNG file per clip: its frames from left to right, six in a row."""
    written = []
    spans = clip_frames(decoded, resolved.largest.num_frames)
    for number, (clips, frames) in enumerate(zip(decoded["clips"].to_pylist(), spans, strict=True)):
        own = frames[len(frames) - len(clips) :]  # without the halo
        for clip, pixels in zip(clips, own, strict=True):
            path = folder / f"{number:03d}-clip{clip['clip_index']:06d}.png"
            path.write_bytes(_png(_sheet(pixels)))
            written.append(path)
    place = f"{written[0]} to {written[-1].name}" if written else "none: no clip was decoded"
    printer.line("pictures", place, timed=True)


def _sheet(frames: np.ndarray) -> np.ndarray:
    """Frames, uint8 (T, H, W, 3), side by side as one picture, uint8 (rows * H, 6 * W, 3)."""
    columns = min(_COLUMNS_OF_SHEET, len(frames))
    rows = math.ceil(len(frames) / columns)
    sheet = np.zeros((rows * columns, *frames.shape[1:]), np.uint8)
    sheet[: len(frames)] = frames
    _, height, width, _ = frames.shape
    return sheet.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def _png(picture: np.ndarray) -> bytes:
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = picture.shape[:2]
    codec.pix_fmt = "rgb24"
    codec.time_base = Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return b"".join(bytes(packet) for packet in [*codec.encode(frame), *codec.encode(None)])


def _encode(decoded: pa.Table, resolved: ResolvedRun, printer: _Printer) -> None:
    """Encode what was decoded, on the CPU or the GPU of the run, and print the payload."""
    if not _num_clips(decoded):
        printer.line("encode", "nothing to encode")
        return
    device = resolved.run.device
    if device == "cuda" and not torch.cuda.is_available():
        printer.line("encode", "on a CPU, as this machine has no GPU that PyTorch can use; the run had one")
        device = "cpu"
    placed = resolved.placed(device="cuda" if device == "cuda" else "cpu", precision=resolved.run.precision)
    encoder = ClipEncoder(placed.encoder_spec(batch_size=1, num_threads=os.cpu_count() or 1))
    encoded = encoder(decoded)
    names = [column.name for column in resolved.payload]
    for name in names:
        printer.line("encode", f"{name}: {_described(encoded[name])}", timed=True)
    for rejection in encoded["rejection"].to_pylist():
        if rejection is not None and rejection["stage"] == "encode":
            printer.refused("encode", Reason(rejection["reason"]), rejection["detail"])


def _described(column: pa.ChunkedArray) -> str:
    values = column.combine_chunks().flatten().flatten().to_numpy(zero_copy_only=False)
    clips = sum(len(each) for each in column.to_pylist())
    if not len(values):
        return "no values"
    numbers = values.astype(np.float64)
    distinct = f", {len(np.unique(values)):,} different" if values.dtype.kind == "u" else ""
    return (
        f"{len(values):,} values of {counted(clips, 'clip')}, {values.dtype}, "
        f"from {numbers.min():.6g} to {numbers.max():.6g}, mean {numbers.mean():.6g}{distinct}"
    )
