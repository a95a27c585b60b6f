"""Decoding job: writes clips, or a whole continuous video, of an output as video files.

Clips of a family with payload parts are also written by part, or crossed: the parts of several clips as one video.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console

from vidshard.jobs.runtime.progress import PhaseProgress, warn
from vidshard.models.vidtok.tiling import Tiling
from vidshard.pipeline import storage
from vidshard.pipeline.crossing import check_parts, cross_clips
from vidshard.pipeline.output.names import safe_name
from vidshard.pipeline.output.shard_reader import StoredClip, find_clips, open_shard, output_shards, read_clips
from vidshard.pipeline.reconstruct import (
    ClipDecoder,
    Row,
    load_decoder,
    reconstruct_video,
    rows_of_video,
    source_frames,
    stored_clip,
)
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.video_file import write_video
from vidshard.schemas.errors import UserError, one_line
from vidshard.schemas.fields import ReportSettings
from vidshard.schemas.rejections import VideoError
from vidshard.schemas.text import counted, readable
from vidshard.schemas.uris import is_remote, shown_uri, typed_hosts


@dataclass(frozen=True, kw_only=True)
class DecodeRun:
    """Request to decode clips or a video of an output."""

    out: str
    """Output folder, or a single shard."""
    clip_ids: Sequence[str] = ()
    """Clip ids or unique prefixes of them; empty for every clip."""
    video_id: str | None = None
    """Video id, or a unique prefix, of a continuous output: decodes the whole video."""
    target: str | None = None
    """File to write for a single clip or video."""
    folder: str | None = None
    """Folder for files ``ID.mp4``, used without a target; None for the working directory."""
    limit: int | None = None
    """Largest number of clips, if no ids are given; None for all."""
    only: Sequence[str] = ()
    """Names of the payload parts to decode; empty for the whole payload."""
    crossed: Mapping[str, str] = field(default_factory=dict)
    """Clip ids, or unique prefixes, by payload part, to decode as one clip into ``target``; empty for single clips."""
    side_by_side: bool = False
    """Whether to show the source at the left and, of a whole clip, its payload parts at the right."""
    fetch_sources: bool = False
    """Whether sources may be read from remote storage: the output names them, and may be foreign."""
    allow_private: bool = False
    """Whether sources may lie on web servers with private addresses that ``out`` does not name."""
    weights: str | None = None
    """Present location of the weights; None for the location that the shards record."""
    tile_size: tuple[int, int] | None = None
    """(height, width) in pixels of the tiles in which large frames are decoded; None for that of the run."""
    ray_address: str | None = None
    """Address of the Ray cluster that decodes whole videos; None for a new one on this machine."""
    workers: int | None = None
    """Number of processes that decode whole videos; None for one per GPU, or per four CPUs."""
    verbose: bool = False
    """Show Ray's log."""
    reporting: ReportSettings = field(default_factory=ReportSettings)
    """Progress lines and event log of the job."""
    tile_overlap: int | None = None
    """Overlap of tiles in pixels; None for that of the run."""


def decode_output(request: DecodeRun, console: Console) -> list[Path]:
    """Decode clips of an output; returns the files written.

    Raises:
        VidshardError: there is no such clip or output, the weights are missing or have another digest, or a file
            cannot be written.
    """
    paths = output_shards(request.out)
    if request.crossed:
        return [_decode_crossed(request, paths, console)]
    rows = [_only_clip(paths, clip_id) for clip_id in request.clip_ids] or find_clips(paths, "")[: request.limit]
    resolved = resolved_of(request, rows[0][0] if rows else paths[0])
    if request.only:
        check_parts(resolved, request.only)
    if request.video_id is not None:
        rows = _whole_video(paths, request.video_id, resolved)
    decoder = ClipDecoder(resolved, paths, tiling=tiling_for(request, resolved))
    introduce(resolved, console)
    if request.video_id is not None:
        return [_decode_video(request, request.video_id, rows, resolved, console)]
    return _decode_clips(request, rows, decoder, resolved, console)


def resolved_of(request: DecodeRun, path: str) -> ResolvedRun:
    """Resolve the run that made a shard."""
    with open_shard(path) as (_, provenance):
        return ResolvedRun.from_provenance(
            provenance,
            weights=request.weights,
            source_hosts=None if request.allow_private else typed_hosts([request.out]),
        )


def introduce(resolved: ResolvedRun, console: Console) -> None:
    """Print the notice of a run and, if the output names weights that do not come with vidshard, which are opened."""
    if resolved.notice:
        warn(console, readable(resolved.notice))
    weights = resolved.source.weights
    if resolved.source.cached_only and weights is not None and not weights.startswith(storage.SHIPPED_SCHEME):
        console.print(f"opening the weights that the output names: {shown_uri(weights)}", highlight=False, markup=False)


def _decode_clips(
    request: DecodeRun, rows: Sequence[Row], decoder: ClipDecoder, resolved: ResolvedRun, console: Console
) -> list[Path]:
    files: list[Path] = []
    order: list[str] = []
    with PhaseProgress(console, "decoding", len(rows)) as display:
        for row in rows:
            clip = stored_clip(row)
            file = Path(request.target) if request.target else Path(request.folder or ".") / file_name(clip.clip_id)
            pictures = _pictures(request, clip, decoder, resolved, console)
            order = max(order, list(pictures), key=len)
            _write_pictures(file, pictures, clip, resolved)
            files.append(file)
            speed = len(files) / display.seconds
            display.update(len(files), f"{len(files):,} of {counted(len(rows), 'clip')} · {speed:.2f} clips/s")
            if request.clip_ids:
                console.print(f"wrote {file}: {describe_clip(clip)}", highlight=False, markup=False)
    if not request.clip_ids:
        console.print(f"wrote {counted(len(files), 'clip')} to {request.folder}", highlight=False, markup=False)
    _say_order(order, console)
    return files


def _pictures(
    request: DecodeRun, clip: StoredClip, decoder: ClipDecoder, resolved: ResolvedRun, console: Console
) -> dict[str, np.ndarray]:
    """Pictures of a clip from left to right, by what they show: each uint8 (T, H, W, 3)."""
    pictures: dict[str, np.ndarray] = {}
    if request.side_by_side:
        source = _source_or_none(clip, resolved, console, fetch=request.fetch_sources)
        if source is not None:
            pictures["source"] = source
    if request.only:
        pictures[" with ".join(request.only)] = decoder.decode(clip, parts=request.only)
        return pictures
    pictures["reconstruction"] = decoder.decode(clip)
    if request.side_by_side and not resolved.run.continuous and len(resolved.config.parts) > 1:
        for part in resolved.config.parts:
            pictures[f"{part} alone"] = decoder.decode(clip, parts=[part])
    return pictures


def _decode_crossed(request: DecodeRun, paths: Sequence[str], console: Console) -> Path:
    rows = {part: _only_clip(paths, clip_id) for part, clip_id in request.crossed.items()}
    clips = {part: stored_clip(row) for part, row in rows.items()}
    resolved = resolved_of(request, next(iter(rows.values()))[0])
    crossed = cross_clips(resolved, clips)
    introduce(resolved, console)
    assert request.target is not None, "a crossed clip has no name of its own"
    file = Path(request.target)
    pictures: dict[str, np.ndarray] = {}
    if request.side_by_side:
        for part, clip in clips.items():
            source = _source_or_none(clip, resolved, console, fetch=request.fetch_sources)
            if source is not None:
                pictures[f"source of {part}"] = source
    decoder = ClipDecoder(resolved, paths, tiling=tiling_for(request, resolved))
    pictures["crossed"] = decoder.decode(crossed)
    _write_pictures(file, pictures, crossed, resolved)
    for part, clip in clips.items():
        console.print(f"{part}: {clip.clip_id}, {describe_clip(clip)}", highlight=False, markup=False)
    num_frames = crossed.values["num_valid_frames"]
    console.print(f"wrote {file}: {num_frames} frames of {' with '.join(clips)}", highlight=False, markup=False)
    _say_order(list(pictures), console)
    return file


def _write_pictures(file: Path, pictures: Mapping[str, np.ndarray], clip: StoredClip, resolved: ResolvedRun) -> None:
    """Write the valid frames of pictures side by side."""
    frames = np.concatenate(list(pictures.values()), axis=2)
    write_video(file, frames[: clip.values["num_valid_frames"]], resolved.run.fps)


def _say_order(order: Sequence[str], console: Console) -> None:
    """Print the order of pictures side by side."""
    if len(order) > 1:
        console.print(f"from left to right: {', '.join(order)}", highlight=False, markup=False)


def _decode_video(
    request: DecodeRun, video_id: str, rows: Sequence[Row], resolved: ResolvedRun, console: Console
) -> Path:
    tokenizer = load_decoder(resolved)
    file = Path(request.target or file_name(video_id))
    with PhaseProgress(console, "decoding", len(rows)) as display:
        write_video(file, _watched(reconstruct_video(rows, tokenizer), display), resolved.run.fps)
    console.print(f"wrote {file}: {counted(len(rows), 'row')} of video {video_id}", highlight=False, markup=False)
    return file


def _whole_video(paths: Sequence[str], prefix: str, resolved: ResolvedRun) -> list[Row]:
    """List all rows of the only video whose id starts with ``prefix``, in order.

    Raises:
        UserError: no or several videos match, rows are missing, or the output is not continuous.
    """
    if not resolved.run.continuous:
        raise UserError("--video takes an output of --continuous; these clips stand apart: --clip ID, or --all DIR")
    videos = sorted({clip_id.rsplit("-", 1)[0] for _, clip_id in find_clips(paths, prefix)})
    if len(videos) != 1:
        some = (
            f"{len(videos)} videos, or parts of one, begin so: {', '.join(map(readable, videos[:3]))} ..."
            if videos
            else "vidshard inspect shows some"
        )
        raise UserError(f"no single video whose id begins with '{prefix}'; {some}")
    rows = rows_of_video(paths, videos[0])
    for number, (index, _) in enumerate(rows):
        if index != number:
            raise UserError(
                f"row {number} of video {readable(videos[0])} is missing: see rejects/, or tokenize it again; "
                f"the rows that are there decode one by one (--clip ID)"
            )
    return [row for _, row in rows]


def _watched(frames: Iterable[np.ndarray], display: PhaseProgress) -> Iterator[np.ndarray]:
    for number, frame in enumerate(frames, start=1):
        yield frame
        display.update(0, f"{number} frames · {number / display.seconds:.1f} frames/s")


def _only_clip(paths: Sequence[str], prefix: str) -> Row:
    """Find the only clip whose id starts with ``prefix``.

    Raises:
        UserError: no clip matches, or several do and none is equal.
    """
    found = find_clips(paths, prefix)
    if not found:
        example = next((readable(clip.clip_id) for path in paths for clip in read_clips(path)), "none")
        raise UserError(f"no clip whose id begins with '{prefix}'; one that is there: {example}")
    exact = [(path, clip_id) for path, clip_id in found if clip_id == prefix]
    matches = exact or found
    if len({clip_id for _, clip_id in matches}) > 1:
        some = ", ".join(readable(clip_id) for _, clip_id in found[:3])
        raise UserError(f"{len(found)} clips begin with '{prefix}' ({some} ...): give more of the id")
    if len(matches) > 1 and len({_identity(path) for path, _ in matches}) > 1:
        shards = ", ".join(shown_uri(path) for path, _ in matches[:3])
        raise UserError(
            f"clip {readable(matches[0][1])} stands in shards that were made with different settings ({shards}): "
            "decode from one of these files"
        )
    return matches[0]


def _identity(path: str) -> str:
    with open_shard(path) as (_, provenance):
        return json.dumps(provenance.identity, sort_keys=True)


def file_name(clip_id: str) -> str:
    """Name of the video file of a clip; one that leaves no folder, whatever text a shard has as the id."""
    return f"{safe_name(clip_id)}.mp4"


def tiling_for(request: DecodeRun, resolved: ResolvedRun) -> Tiling | None:
    """Tiles for decoding, from the request or else from the run; None for whole frames.

    Raises:
        UserError: the tokenizer does not allow such tiles.
    """
    size = request.tile_size or resolved.run.tile_size
    overlap = resolved.run.tile_overlap if request.tile_overlap is None else request.tile_overlap
    if size is None:
        return None
    if not resolved.config.takes_tiles:
        raise UserError(f"{resolved.config.name} decodes whole frames only: leave out --tile-size")
    try:
        tiling = Tiling(height=size[0], width=size[1], overlap=overlap)
        tiling.check(resolved.config)
    except ValueError as error:
        raise UserError(f"{error} (--tile-size, --tile-overlap)") from error
    return tiling


def _source_or_none(clip: StoredClip, resolved: ResolvedRun, console: Console, *, fetch: bool) -> np.ndarray | None:
    """Decode a clip again from its source; prints a note and returns None if the source cannot be read."""
    source = shown_uri(clip.values["uri"])
    if is_remote(clip.values["uri"]):
        if not fetch:
            note = f"{source} is not shown beside: it is remote; --fetch-sources fetches what the output names"
            console.print(note, highlight=False, markup=False)
            return None
        console.print(f"fetching {source}", highlight=False, markup=False)
    try:
        return source_frames(clip, resolved)
    except VideoError as error:
        console.print(f"{source} cannot be shown beside: {one_line(error)}", highlight=False, markup=False)
        return None


def describe_clip(clip: StoredClip) -> str:
    """Describe a clip in one line: number of frames, source and times."""
    values = clip.values
    times = values["frame_pts_seconds"]
    source = shown_uri(values["uri"])
    return f"{values['num_valid_frames']} frames of {source} from {times[0]:.2f} s to {times[-1]:.2f} s"
