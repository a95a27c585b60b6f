"""Reconstruction: decodes stored rows to frames with their tokenizer, and reads the same clips from their sources."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from vidshard.models.tokenizer import Past, Tokenizer, output_to_frames
from vidshard.models.vidtok.lengths import Padding, pad
from vidshard.models.vidtok.tiling import Tiling
from vidshard.pipeline.crossing import check_clip, check_parts, cross_clips, stored_spec
from vidshard.pipeline.decode_payload import clips_before, decode_in_sequence, to_tensors
from vidshard.pipeline.decode_stage import decode_again
from vidshard.pipeline.devices import make_reproducible
from vidshard.pipeline.output.shard_reader import StoredClip, find_clips, read_clips
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.rows import row_part
from vidshard.schemas.errors import UserError

Row = tuple[str, str]
"""A row of an output: the path of its shard and its clip id."""


def load_decoder(resolved: ResolvedRun, *, precision: str = "float32") -> Tokenizer:
    """Load the tokenizer that made an output, on a GPU if there is one.

    Args:
        precision: precision to compute in; by default float32, whatever the run used.

    Raises:
        UserError: the weights are missing, or have another digest than the output records.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make_reproducible(device, torch.get_num_threads(), precision)
    try:
        return resolved.load_tokenizer(device, precision=precision)
    except UserError as error:
        raise UserError(f"{error} (--weights FILE names another place)") from error


class ClipDecoder:
    """Decodes single clips of an output: whole, by payload part, or crossed. The first clip loads the tokenizer."""

    def __init__(self, resolved: ResolvedRun, paths: Sequence[str], *, tiling: Tiling | None) -> None:
        """Prepare to decode.

        Args:
            resolved: run that made the output.
            paths: paths of the shards; a row of a continuous sequence is decoded with the rows around it.
            tiling: tiles for large frames; None for whole frames.
        """
        self._resolved, self._paths, self._tiling = resolved, paths, tiling

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the output; see `load_decoder`."""
        return load_decoder(self._resolved)

    def decode(self, clip: StoredClip, *, parts: Collection[str] | None = None) -> np.ndarray:
        """Decode a stored clip: uint8 (T, H, W, 3).

        Args:
            parts: names of the payload parts to decode; None for the whole clip.

        Raises:
            UserError: as `load_decoder`; or the tokenizer has no such part.
            ShardError: the clip was made by another tokenizer, or its payload is damaged.
        """
        if parts is not None:
            check_parts(self._resolved, parts)
        check_clip(self._resolved, clip)
        if self._resolved.run.continuous:
            return reconstruct_row(clip, self._paths, self.tokenizer)
        return reconstruct(clip, self.tokenizer, padding=self._resolved.padding, tiling=self._tiling, parts=parts)

    def cross(self, clips: Mapping[str, StoredClip]) -> np.ndarray:
        """Decode payload parts of several clips together: uint8 (T, H, W, 3).

        Args:
            clips: a clip for each payload part of the tokenizer, by name of the part.

        Raises:
            UserError: as `load_decoder`; or a part is missing or unknown, or the clips do not go together.
            ShardError: as `decode`.
        """
        return self.decode(cross_clips(self._resolved, clips))


def reconstruct(
    clip: StoredClip,
    tokenizer: Tokenizer,
    *,
    padding: Padding | None = None,
    tiling: Tiling | None = None,
    parts: Collection[str] | None = None,
) -> np.ndarray:
    """Decode a stored clip: uint8 (T, H, W, 3), as many frames as were sampled.

    Args:
        padding: placement of the frames that padded the clip before encoding; None if it was not padded.
        tiling: tiles for large frames; None for whole frames.
        parts: names of the payload parts to decode; None for all.
    """
    num_frames = len(clip.values["frame_pts_seconds"])
    no_pixels = torch.empty(1, 3, num_frames, 0, 0)  # only the lengths matter
    padded = pad(no_pixels, tokenizer.config, padding or Padding.REPEAT_LAST)
    with torch.inference_mode():
        decoded_BCTHW = tokenizer.decode_payload(
            to_tensors(clip.payload, tokenizer), padded.frames.shape[2], tiling=tiling, parts=parts
        )
        return output_to_frames(padded.cut(decoded_BCTHW))[0].cpu().numpy()


def reconstruct_row(clip: StoredClip, paths: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """Decode a row of a continuous sequence, as in the whole video: uint8 (T, H, W, 3).

    The rows before it that its frames depend on are decoded with it and, for an interpolating model, the one after
    it. If one of them is missing, the sequence starts, or ends, there.

    Args:
        paths: paths of the shards.
    """
    config = tokenizer.config
    index = int(clip.values["clip_index"])
    rows = dict(rows_of_video(paths, clip.clip_id.rsplit("-", 1)[0]))
    first = index
    while first - 1 in rows and index - first < clips_before(config, clip.payload):
        first -= 1
    before = [stored_clip(rows[number]).payload for number in range(first, index)]
    after = stored_clip(rows[index + 1]).payload if config.lookahead_latents and index + 1 in rows else None
    with torch.inference_mode():
        decoded = decode_in_sequence(before, clip.payload, after, tokenizer)
    return output_to_frames(decoded)[0][: len(clip.values["frame_pts_seconds"])].cpu().numpy()


def reconstruct_video(rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Decode a continuous sequence frame by frame, each uint8 (H, W, 3); memory does not grow with its length.

    Args:
        rows: all rows of the sequence, in order.
    """
    yield from reconstruct_stream(map(stored_clip, rows), tokenizer)


def reconstruct_stream(
    clips: Iterable[StoredClip], tokenizer: Tokenizer, *, inside: bool = False
) -> Iterator[np.ndarray]:
    """Decode consecutive clips of a continuous sequence, as `reconstruct_video`.

    Args:
        clips: the clips in order.
        inside: the clip before the first one is missing, so that the first latent is decoded to one frame, its last.
    """
    past: Past = ()
    wanted = 1 - tokenizer.config.time_stride if inside else 0
    left = iter(clips)
    clip = next(left, None)
    while clip is not None:
        after = next(left, None)
        wanted += clip.values["num_valid_frames"]
        with torch.inference_mode():
            decoded, past = tokenizer.decode_payload_stream(
                to_tensors(clip.payload, tokenizer), past, last=after is None
            )
        frames = output_to_frames(decoded)[0].cpu().numpy()
        yield from frames[: max(0, wanted)]
        wanted -= len(frames)
        clip = after


def rows_of_video(paths: Sequence[str], sequence: str) -> list[tuple[int, Row]]:
    """List (clip index, row) of all rows of a video or part, in order.

    Args:
        sequence: common prefix of their clip ids, without "-" and the index.
    """
    rows = find_clips(paths, f"{sequence}-")
    return sorted((int(clip_id.rsplit("-", 1)[1]), (path, clip_id)) for path, clip_id in rows)


def stored_clip(row: Row) -> StoredClip:
    """Read a row with its payload."""
    return next(read_clips(*row))


def source_frames(clip: StoredClip, resolved: ResolvedRun) -> np.ndarray:
    """Decode a stored clip again from its source: uint8 (T, H, W, 3).

    Raises:
        VideoError: the source is gone, was replaced, or no longer decodes.
    """
    values = clip.values
    spec = replace(stored_spec(resolved, values), halo_clips=0)
    uri, video_id, part = values["uri"], values["video_id"], row_part(values)
    source = decode_again(uri, video_id, values["clip_index"], spec, part, resolved.source_limits)[-1]
    return source.frames[source.lead_frames :]
