"""Tokens back to video: one clip or all of an output, beside their sources if wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from vidshard.jobs.runtime.errors import exit_code_of, print_error
from vidshard.jobs.runtime.progress import PhaseProgress
from vidshard.models.tokenizer import Past, TokenizerConfig, VideoTokenizer, output_to_frames
from vidshard.models.vidtok.lengths import Padding, pad
from vidshard.models.vidtok.tiling import Tiling
from vidshard.models.weights import NoAveragesError
from vidshard.pipeline import storage
from vidshard.pipeline.decode_stage import decode_again
from vidshard.pipeline.encode import EncoderSpec, clip_specs_of, make_reproducible, open_tokenizer
from vidshard.pipeline.output.shard_reader import (
    ShardError,
    StoredClip,
    find_clips,
    open_shard,
    output_shards,
    read_clips,
)
from vidshard.pipeline.rows import row_part
from vidshard.schemas.errors import EXIT_REFUSED, UserError
from vidshard.schemas.rejections import VideoError
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.tokens import Provenance
from vidshard.schemas.video import ClipSpec


def decode_output(
    out: str,
    console: Console,
    *,
    clip_ids: Sequence[str] = (),
    video_id: str | None = None,
    target: str | None = None,
    folder: str | None = None,
    limit: int | None = None,
    side_by_side: bool = False,
    weights: str | None = None,
    tile_size: tuple[int, int] | None = None,
    tile_overlap: int | None = None,
) -> int:
    """Decode clips of an output; gives the exit code.

    Args:
        clip_ids: ids, or their beginnings; none for every clip.
        video_id: or the beginning of one: that whole video, of a continuous output.
        target: the file for a single clip.
        folder: where the clips go as ``ID.mp4``, when there is no target.
        limit: only the first so many.
        side_by_side: put the source at the left.
        weights: where the weights are now, when not where the shard says.
        tile_size: (height, width) of the tiles in which large frames are decoded; None as they were encoded.
        tile_overlap: likewise, in pixels.
    """
    try:
        paths = output_shards(out)
        wanted = [_only_clip(paths, clip_id) for clip_id in clip_ids] or find_clips(paths, "")[:limit]
        with open_shard(paths[0]) as (_, provenance):
            pass
        if provenance.notice:
            console.print(Text(f"!! {provenance.notice}", style="bold yellow"))
        run = TokenizeRun.model_validate({**provenance.run, "inputs": ["-"]})
        tokenizer = tokenizer_of(provenance, weights)
        tiling = tiling_for(tokenizer.config, tile_size or run.tile_size, tile_overlap, run.tile_overlap)
        if video_id is not None:
            rows = _whole_video(paths, video_id, run)
            file = Path(target or f"{video_id}.mp4")
            with PhaseProgress(console, "decoding", len(rows)) as display:
                write_video(file, _watched(reconstruct_video(rows, tokenizer), display), run.fps)
            console.print(f"wrote {file}: {len(rows)} rows of video {video_id}", highlight=False, markup=False)
            return 0
        with PhaseProgress(console, "decoding", len(wanted)) as display:
            for done, (path, clip_id) in enumerate(wanted, start=1):
                clip = next(read_clips(path, clip_id))
                file = Path(target) if target else Path(folder or ".") / f"{clip_id}.mp4"
                if run.continuous:
                    frames = reconstruct_row(clip, paths, tokenizer)
                else:
                    frames = reconstruct(clip, tokenizer, padding=padding_of(run), tiling=tiling)
                if side_by_side and (source := _source_frames(clip, run, tokenizer.config, console)) is not None:
                    frames = np.concatenate([source, frames], axis=2)
                write_video(file, frames[: clip.values["num_valid_frames"]], run.fps)
                display.update(done, f"{done} of {len(wanted)} clips · {done / display.seconds:.2f} clips/s")
                if clip_ids:
                    console.print(f"wrote {file}: {describe_clip(clip)}", highlight=False, markup=False)
        if not clip_ids:
            console.print(f"wrote {len(wanted)} clips to {folder}", highlight=False, markup=False)
    except (UserError, ShardError, storage.StorageError) as error:
        print_error(error)
        return EXIT_REFUSED
    except KeyboardInterrupt as interrupt:
        console.print("interrupted; the files written so far are whole", highlight=False)
        return exit_code_of(interrupt)
    return 0


def _whole_video(paths: list[str], prefix: str, run: TokenizeRun) -> list[tuple[str, str]]:
    """(path, clip id) of every row of the one video whose id begins so.

    Raises:
        UserError: none or several, rows are missing, or the output holds clips apart.
    """
    if not run.continuous:
        raise UserError("--video takes an output of --continuous; these clips stand apart: --clip ID, or --all DIR")
    videos = sorted({clip_id.rsplit("-", 1)[0] for _, clip_id in find_clips(paths, prefix)})
    if len(videos) != 1:
        some = (
            f"{len(videos)} videos, or parts of one, begin so: {', '.join(videos[:3])} ..."
            if videos
            else "vidshard inspect shows some"
        )
        raise UserError(f"no single video whose id begins with '{prefix}'; {some}")
    rows = _rows_of_video(paths, videos[0])
    for number, (index, _) in enumerate(rows):
        if index != number:
            raise UserError(
                f"row {number} of video {videos[0]} is missing: see rejects/, or tokenize it again; "
                f"the rows that are there decode one by one (--clip ID)"
            )
    return [row for _, row in rows]


def _watched(frames: Iterable[np.ndarray], display: PhaseProgress) -> Iterator[np.ndarray]:
    for number, frame in enumerate(frames, start=1):
        yield frame
        display.update(0, f"{number} frames · {number / display.seconds:.1f} frames/s")


def _only_clip(paths: list[str], prefix: str) -> tuple[str, str]:
    """(path, clip id) of the one clip whose id begins so."""
    found = find_clips(paths, prefix)
    if not found:
        example = next(read_clips(paths[0])).clip_id
        raise UserError(f"no clip whose id begins with '{prefix}'; one that is there: {example}")
    exact = [(path, clip_id) for path, clip_id in found if clip_id == prefix]
    if len(found) > 1 and not exact:
        some = ", ".join(clip_id for _, clip_id in found[:3])
        raise UserError(f"{len(found)} clips begin with '{prefix}' ({some} ...): give more of the id")
    return (exact or found)[0]


def tokenizer_of(provenance: Provenance, weights: str | None) -> VideoTokenizer:
    """The tokenizer that made a shard, ready to decode.

    Args:
        weights: where its weights are now; None for where the shard says.

    Raises:
        UserError: the weights are missing, or not those that made the shard.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make_reproducible(device, torch.get_num_threads())
    source = provenance.weights_source
    seed = int(source.removeprefix("seed:")) if source.startswith("seed:") and weights is None else None
    spec = EncoderSpec(
        tokenizer=TokenizerConfig.model_validate(provenance.tokenizer),
        weights=None if seed is not None else (weights or source),
        ema=TokenizeRun.model_validate({**provenance.run, "inputs": ["-"]}).ema,
        random_seed=seed,
        weights_sha256=provenance.weights_sha256,
        precision="float32",
        num_frames=0,
        payload=provenance.payload,
        batch_size=1,
        num_threads=torch.get_num_threads(),
    )
    try:
        try:
            return open_tokenizer(spec, device)
        except NoAveragesError:
            if weights is None:
                raise
            # `vidshard convert --ema` keeps nothing but the averages; the digest tells whether it is these
            return open_tokenizer(replace(spec, ema=False), device)
    except (ValueError, FileNotFoundError, storage.StorageError) as error:
        raise UserError(f"{error} (--weights FILE names another place)") from error


def padding_of(run: TokenizeRun) -> Padding:
    """Where the run put copies, if clips were not as long as the tokenizer takes."""
    return Padding.REPEAT_LAST if run.pad_frames == "refuse" else Padding(run.pad_frames)


def tiling_for(
    config: TokenizerConfig, size: tuple[int, int] | None, overlap: int | None, default: int
) -> Tiling | None:
    """The tiles to decode in; None for whole frames.

    Raises:
        UserError: the tokenizer cannot have such tiles.
    """
    if size is None:
        return None
    try:
        tiling = Tiling(height=size[0], width=size[1], overlap=default if overlap is None else overlap)
        tiling.check(config)
    except ValueError as error:
        raise UserError(f"{error} (--tile-size, --tile-overlap)") from error
    return tiling


def reconstruct(
    clip: StoredClip,
    tokenizer: VideoTokenizer,
    *,
    padding: Padding = Padding.REPEAT_LAST,
    tiling: Tiling | None = None,
) -> np.ndarray:
    """The clip's frames as the tokenizer remembers them: uint8 (T, H, W, 3), as many as were sampled.

    Args:
        padding: where copies were put to make the clip as long as the tokenizer takes, if it was not.
        tiling: for large frames.
    """
    num_frames = len(clip.values["frame_pts_seconds"])
    padded = pad(torch.empty(1, 3, num_frames, 0, 0), tokenizer.config, padding)  # no pixels: only the places matter
    with torch.inference_mode():
        decoded_BCTHW = tokenizer.decode(_to_tensor(clip.payload, tokenizer), padded.frames.shape[2], tiling=tiling)
        return output_to_frames(padded.cut(decoded_BCTHW))[0].cpu().numpy()


def reconstruct_row(clip: StoredClip, paths: list[str], tokenizer: VideoTokenizer) -> np.ndarray:
    """The frames of a row of a continuous sequence, as in the whole video: uint8 (T, H, W, 3).

    It is decoded with the rows before it that its frames depend on and, for an interpolating model, the one after it.
    Where one of them is missing, the sequence is taken to begin, or to end, there.
    """
    config = tokenizer.config
    index = int(clip.values["clip_index"])
    rows = dict(_rows_of_video(paths, clip.clip_id.rsplit("-", 1)[0]))
    num_latents = clip.payload.shape[-3]
    first = index
    while first - 1 in rows and (index - first) * num_latents < config.history_latents:
        first -= 1
    payloads = [_stored(rows[number]).payload for number in range(first, index)] + [clip.payload]
    if config.lookahead_latents and index + 1 in rows:
        payloads.append(np.take(_stored(rows[index + 1]).payload, range(config.lookahead_latents), axis=-3))
    stored = _to_tensor(np.concatenate(payloads, axis=-3), tokenizer)
    with torch.inference_mode():
        frames = output_to_frames(tokenizer.decode(stored, config.decoded_frames(stored.shape[-3])))[0]
    before = config.decoded_frames((index - first) * num_latents) if index > first else 0
    return frames[before : before + len(clip.values["frame_pts_seconds"])].cpu().numpy()


def reconstruct_video(rows: Sequence[tuple[str, str]], tokenizer: VideoTokenizer) -> Iterator[np.ndarray]:
    """The frames of a continuous sequence one by one, uint8 (H, W, 3), in memory that does not grow with its length.

    Args:
        rows: (path, clip id) of every row in order.
    """
    past: Past = ()
    wanted = 0
    for number, row in enumerate(rows, start=1):
        clip = _stored(row)
        wanted += clip.values["num_valid_frames"]
        with torch.inference_mode():
            decoded, past = tokenizer.decode_stream(_to_tensor(clip.payload, tokenizer), past, last=number == len(rows))
        frames = output_to_frames(decoded)[0].cpu().numpy()
        yield from frames[:wanted]
        wanted -= len(frames)


def _rows_of_video(paths: list[str], sequence: str) -> list[tuple[int, tuple[str, str]]]:
    """(clip index, (path, clip id)) of every row of a video, or of a part of one, in order.

    Args:
        sequence: what the rows' ids have in common: all but the index.
    """
    rows = find_clips(paths, f"{sequence}-")
    return sorted((int(clip_id.rsplit("-", 1)[1]), (path, clip_id)) for path, clip_id in rows)


def _stored(row: tuple[str, str]) -> StoredClip:
    return next(read_clips(*row))


def _to_tensor(payload: np.ndarray, tokenizer: VideoTokenizer) -> torch.Tensor:
    device = next(tokenizer.parameters()).device
    return torch.from_numpy(payload.astype(np.int64 if payload.dtype.kind == "u" else np.float32))[None].to(device)


def describe_clip(clip: StoredClip) -> str:
    """A clip in a line: where it comes from and when."""
    values = clip.values
    times = values["frame_pts_seconds"]
    return f"{values['num_valid_frames']} frames of {values['uri']} from {times[0]:.2f} s to {times[-1]:.2f} s"


def _source_frames(clip: StoredClip, run: TokenizeRun, config: TokenizerConfig, console: Console) -> np.ndarray | None:
    """The clip decoded again from its source; None, with a word, where that can no longer be read."""
    values = clip.values
    try:
        spec = replace(stored_spec(run, config, values), halo_clips=0)
        uri, video_id, part = values["uri"], values["video_id"], row_part(values)
        source = decode_again(uri, video_id, values["clip_index"], spec, part, run.limits)[-1]
    except VideoError as error:
        console.print(f"{values['uri']} cannot be shown beside: {error}", highlight=False, markup=False)
        return None
    return source.frames[source.lead_frames :]


def stored_spec(run: TokenizeRun, config: TokenizerConfig, values: Mapping[str, Any]) -> ClipSpec:
    """How a stored row's clip was made."""
    specs = {spec.bucket: spec for spec in clip_specs_of(run, config)}
    return specs[values["bucket"]] if "bucket" in values else next(iter(specs.values()))


def write_video(target: Path, frames: Iterable[np.ndarray], rate: Fraction) -> None:
    """Write frames as h264 in mp4.

    Args:
        frames: each uint8 (H, W, 3) RGB, even height and width; at least one.
        rate: frames per second.

    Raises:
        UserError: the file cannot be written, or its extension names no video format.
    """
    unfinished = target.with_name(f".unfinished-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(unfinished), "w") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "preset": "veryfast"})
            stream.pix_fmt = "yuv420p"
            for number, array in enumerate(frames):
                if number == 0:
                    stream.height, stream.width = array.shape[:2]
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")))
            container.mux(stream.encode())
        unfinished.replace(target)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise UserError(f"cannot write {target}: {error}; name a file such as clip.mp4") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
