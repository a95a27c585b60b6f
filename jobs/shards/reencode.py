"""A share of an output's clips encoded again from their sources, and compared with what is stored.

Encoding again takes another cut than the run did: streams piece by piece where clips were encoded at once, another halo
and other pieces where they were streams. In float32 on a CPU the tokens are the same, but for values that lie at a tie
of rounding; on a GPU, or in bfloat16, the share that differs is what is reported.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from vidshard.jobs.runtime.progress import PhaseProgress
from vidshard.jobs.shards.decode import padding_of, stored_spec, tiling_for, tokenizer_of
from vidshard.models.tokenizer import Encoded, Past, VideoTokenizer, frames_to_input
from vidshard.models.vidtok.lengths import pad
from vidshard.pipeline.decode_stage import decode_again
from vidshard.pipeline.encode import DTYPES
from vidshard.pipeline.output.shard_reader import find_clips, open_shard, read_clips
from vidshard.pipeline.rows import row_part
from vidshard.schemas.errors import EXIT_FAILED
from vidshard.schemas.rejections import VideoError
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.video import Clip

TIE = 1e-4
"""A value so near to the middle between two levels, in units of one, may round to either: sums of float32 in another
order differ by some 1e-5."""


@dataclass(kw_only=True)
class Comparison:
    """Stored clips beside what encoding them again gives."""

    num_clips: int = 0
    num_values: int = 0
    num_different: int = 0
    """Tokens that differ; latents that differ by more than a unit in the last place of float16."""
    num_ties: int = 0
    """Of these, tokens that lie at a tie of rounding."""
    largest_difference: float = 0.0
    """Of latents."""
    different_clips: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    """Clips whose source cannot be read any more, and why."""


def encode_again(paths: list[str], console: Console, *, share: float, seed: int, weights: str | None) -> int:
    """Encode a share of the clips of some shards again and say how they differ from what is stored; the exit code.

    Args:
        paths: of the shards.
        share: of all their clips, in (0, 1].
        seed: which ones.
        weights: where the weights are now, when not where the shards say.
    """
    with open_shard(paths[0]) as (_, provenance):
        pass
    run = TokenizeRun.model_validate({**provenance.run, "inputs": ["-"]})
    tokenizer = tokenizer_of(provenance, weights).to(DTYPES[run.precision])
    everything = find_clips(paths, "")
    chosen = sorted(random.Random(seed).sample(everything, math.ceil(share * len(everything))))  # noqa: S311
    result = Comparison()
    with PhaseProgress(console, "encoding again", len(chosen)) as display:
        for done, (path, clip_id) in enumerate(chosen, start=1):
            stored = next(read_clips(path, clip_id))
            values = stored.values
            try:
                again = encode_by_another_cut(tokenizer, run, values)
            except VideoError as error:
                result.gone.append(f"{clip_id} of {values['uri']}: {error}")
            else:
                compare(stored.payload, again, result, clip_id)
            display.update(done, f"{done} of {len(chosen)} clips · {done / display.seconds:.2f} clips/s")
    _report(result, share, seed, console)
    must_be_equal = run.precision == "float32" and next(tokenizer.parameters()).device.type == "cpu"
    return EXIT_FAILED if must_be_equal and result.num_different > result.num_ties else 0


def encode_by_another_cut(tokenizer: VideoTokenizer, run: TokenizeRun, values: Mapping[str, Any]) -> Encoded:
    """The clip of a stored row from its source, computed otherwise than the run did.

    Raises:
        VideoError: the source is gone, was replaced, or no longer decodes.
    """
    config = tokenizer.config
    spec = stored_spec(run, config, values)
    wider = replace(spec, halo_clips=spec.halo_clips + int(spec.continuous))
    clips = decode_again(values["uri"], values["video_id"], values["clip_index"], wider, row_part(values), run.limits)
    if spec.continuous:
        num_latents = spec.num_frames // config.time_stride
        whole = _in_pieces(tokenizer, _to_input(tokenizer, clips)[:, :, spec.lead_frames :])
        return _each_field([whole], lambda values: values[0][..., -num_latents:, :, :])
    x_BCTHW = pad(_to_input(tokenizer, clips), config, padding_of(run)).frames
    tiling = tiling_for(config, run.tile_size, None, run.tile_overlap)
    if config.is_causal and tiling is None:
        return _in_pieces(tokenizer, x_BCTHW)
    with torch.inference_mode():
        twice = tokenizer.encode(x_BCTHW.expand(2, -1, -1, -1, -1), tiling=tiling)
    return _each_field([twice], lambda values: values[0][1:])


def _to_input(tokenizer: VideoTokenizer, clips: Sequence[Clip]) -> Tensor:
    frames = torch.from_numpy(np.concatenate([clip.frames for clip in clips]))[None]
    return frames_to_input(frames.to(next(tokenizer.parameters()).device), tokenizer.dtype)


def _in_pieces(tokenizer: VideoTokenizer, x_BCTHW: Tensor) -> Encoded:
    """Encode a clip as a stream of single latents."""
    stride = tokenizer.config.time_stride
    past: Past = ()
    parts: list[Encoded] = []
    cuts = range((x_BCTHW.shape[2] - 1) % stride + 1, x_BCTHW.shape[2], stride)
    for piece in torch.tensor_split(x_BCTHW, list(cuts), dim=2):
        with torch.inference_mode():
            encoded, past = tokenizer.encode_stream(piece, past)
        parts.append(encoded)
    return _each_field(parts, lambda values: torch.cat(values, dim=-3))


def _each_field(parts: Sequence[Encoded], change: Callable[[list[Tensor]], Tensor]) -> Encoded:
    def changed(values: list[Tensor | None]) -> Tensor | None:
        there = [value for value in values if value is not None]
        return change(there) if there else None

    return Encoded(
        latents=change([part.latents for part in parts]),
        tokens=changed([part.tokens for part in parts]),
        pre_quantized=changed([part.pre_quantized for part in parts]),
    )


def compare(stored: np.ndarray, again: Encoded, result: Comparison, clip_id: str) -> None:
    """Count where a clip's stored tokens or latents are not those of encoding it again."""
    result.num_clips += 1
    result.num_values += stored.size
    if again.tokens is not None:
        different = again.tokens[0].cpu().numpy() != stored
        if again.pre_quantized is not None:
            from_tie = (again.pre_quantized - again.pre_quantized.floor() - 0.5).abs()
            result.num_ties += int((different & (from_tie < TIE).any(dim=1)[0].cpu().numpy()).sum())
    else:
        latents = again.latents[0].cpu().numpy()
        difference = np.abs(latents - stored.astype(np.float32))
        result.largest_difference = max(result.largest_difference, float(difference.max()))
        # near zero, where a unit of float16 is smaller than the noise of float32, the noise counts
        different = difference > np.maximum(np.abs(np.spacing(stored)).astype(np.float32), 1e-4)
    result.num_different += int(different.sum())
    if different.any():
        result.different_clips.append(clip_id)


def _report(result: Comparison, share: float, seed: int, console: Console) -> None:
    console.print(
        f"encoded {result.num_clips} clips again by another cut ({share:.2%} of all, seed {seed}): "
        f"{result.num_different} of {result.num_values:,} values differ"
        + (f" ({result.num_different / result.num_values:.4%})" if result.num_values else "")
        + (f", {result.num_ties} of them at ties of rounding" if result.num_ties else "")
        + (f"; latents by at most {result.largest_difference:.2g}" if result.largest_difference else ""),
        highlight=False,
    )
    for clip_id in result.different_clips[:10]:
        console.print(f"  differs: {clip_id}", highlight=False, markup=False)
    for line in result.gone[:10]:
        console.print(f"  not compared: {line}", highlight=False, markup=False)
    if len(result.gone) > 10:
        console.print(f"  ... and {len(result.gone) - 10} more whose source cannot be read", highlight=False)
