"""Tokens back to video: one clip or all of an output, beside their sources if wanted."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from rich.console import Console
from rich.text import Text

from jobs.display import RunDisplay
from jobs.outcome import EXIT_REFUSED, UserError, exit_code_of, print_error
from models.lengths import Padding, pad
from models.tiling import Tiling
from models.tokenizer import TokenizerConfig, VideoTokenizer, output_to_frames
from models.weights import NoAveragesError
from pipeline import storage
from pipeline.encode import EncoderSpec, make_reproducible, open_tokenizer
from pipeline.read import ShardError, StoredClip, find_clips, open_shard, output_shards, read_clips
from pipeline.stages import decode_again
from schemas.runs import TokenizeRun
from schemas.tokens import Provenance
from schemas.video import VideoError


def decode_output(
    out: str,
    console: Console,
    *,
    clip_ids: Sequence[str] = (),
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
        tiling = _tiling(tokenizer.config, tile_size or run.tile_size, tile_overlap, run.tile_overlap)
        with RunDisplay(console, "decoding", len(wanted)) as display:
            for done, (path, clip_id) in enumerate(wanted, start=1):
                clip = next(read_clips(path, clip_id))
                file = Path(target) if target else Path(folder or ".") / f"{clip_id}.mp4"
                frames = reconstruct(clip, tokenizer, padding=padding_of(run), tiling=tiling)
                if side_by_side and (source := _source_frames(clip, run, console)) is not None:
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
        clip_shape=(0, 0, 0, 3),
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


def _tiling(config: TokenizerConfig, size: tuple[int, int] | None, overlap: int | None, default: int) -> Tiling | None:
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
    device = next(tokenizer.parameters()).device
    payload = torch.from_numpy(clip.payload.astype(np.int64 if clip.payload.dtype.kind == "u" else np.float32))
    num_frames = len(clip.values["frame_pts_seconds"])
    padded = pad(torch.empty(1, 3, num_frames, 0, 0), tokenizer.config, padding)  # no pixels: only the places matter
    with torch.inference_mode():
        decoded_BCTHW = tokenizer.decode(payload[None].to(device), padded.frames.shape[2], tiling=tiling)
        return output_to_frames(padded.cut(decoded_BCTHW))[0].cpu().numpy()


def describe_clip(clip: StoredClip) -> str:
    """A clip in a line: where it comes from and when."""
    values = clip.values
    times = values["frame_pts_seconds"]
    return f"{values['num_valid_frames']} frames of {values['uri']} from {times[0]:.2f} s to {times[-1]:.2f} s"


def _source_frames(clip: StoredClip, run: TokenizeRun, console: Console) -> np.ndarray | None:
    """The clip decoded again from its source; None, with a word, where that can no longer be read."""
    values = clip.values
    try:
        return decode_again(values["uri"], values["video_id"], values["clip_index"], run.clip_spec).frames
    except VideoError as error:
        console.print(f"{values['uri']} cannot be shown beside: {error}", highlight=False, markup=False)
        return None


def write_video(target: Path, frames: np.ndarray, rate: Fraction) -> None:
    """Write frames as h264 in mp4.

    Args:
        frames: uint8 (T, H, W, 3) RGB, even height and width.
        rate: frames per second.

    Raises:
        UserError: the file cannot be written, or its extension names no video format.
    """
    unfinished = target.with_name(f".unfinished-{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(unfinished), "w") as container:
            stream = container.add_stream("libx264", rate=rate, options={"crf": "12", "preset": "veryfast"})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            for array in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24")))
            container.mux(stream.encode())
        unfinished.replace(target)
    except (av.error.FFmpegError, ValueError, OSError) as error:
        raise UserError(f"cannot write {target}: {error}; name a file such as clip.mp4") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
