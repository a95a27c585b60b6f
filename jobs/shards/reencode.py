"""Encode a share of an output's clips again from their sources, and compare the result with the stored payload.

The computation is chunked differently from the run: clips that were encoded at once become streams of single latents,
and streams get a longer halo and other chunks. In float32 on a CPU tokens may differ only at rounding ties. On a GPU,
or in bfloat16, the share of values that differ is reported.
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

from vidshard.jobs.runtime.progress import PhaseProgress, print_alert
from vidshard.jobs.runtime.run_record import refuse_unasked
from vidshard.models.tokenizer import EncodedClips, Past, Tokenizer, frames_to_input
from vidshard.models.vidtok.lengths import pad
from vidshard.pipeline.crossing import check_clip, stored_spec
from vidshard.pipeline.decode_stage import decode_again
from vidshard.pipeline.output.shard_reader import find_clips, open_shard, read_clips
from vidshard.pipeline.reconstruct import load_decoder, stored_clip
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.rows import row_part
from vidshard.schemas.errors import RunFailedError, one_line
from vidshard.schemas.rejections import VideoError
from vidshard.schemas.text import counted, readable
from vidshard.schemas.uris import shown_uri
from vidshard.schemas.video import Clip

TIE = 1e-4
"""Tolerance of a rounding tie: distance from the midpoint between two levels, in levels. Summing float32 in another
order changes values by about 1e-5."""


@dataclass(kw_only=True)
class Comparison:
    """Difference between stored clips and the same clips encoded again."""

    num_clips: int = 0
    num_values: int = 0
    num_different: int = 0
    """Number of tokens that differ, or of latents that differ by more than a unit in the last place of float16."""
    num_ties: int = 0
    """Number of differing tokens at rounding ties."""
    largest_difference: float = 0.0
    """Largest absolute difference of a latent."""
    must_be_equal: bool = False
    """Whether only rounding ties may differ: true for float32 on a CPU."""
    different_clips: list[str] = field(default_factory=list)
    """Ids of clips with differing values."""
    gone: list[str] = field(default_factory=list)
    """Clips whose source can no longer be read, each with the reason."""

    @property
    def is_broken(self) -> bool:
        """Whether values differ that must be equal, or all sources are gone, so that nothing was compared."""
        differs = self.must_be_equal and self.num_different > self.num_ties
        return differs or (not self.num_clips and bool(self.gone))


def encode_again(
    paths: Sequence[str],
    console: Console,
    *,
    share: float,
    seed: int,
    weights: str | None,
    fetch_sources: bool = False,
    source_hosts: tuple[str, ...] | None = (),
) -> Comparison:
    """Encode a share of the clips of some shards again, and print how they differ from the stored payload.

    Args:
        paths: paths of the shards.
        share: share of all their clips, in (0, 1].
        seed: random seed that selects the clips.
        weights: present location of the weights; None for the location that the shards record.
        fetch_sources: whether sources may be read from remote storage: the shards name them, and may be foreign.
        source_hosts: web servers with private addresses that sources may be fetched from; None for all.

    Raises:
        VidshardError: the weights are missing, or have another digest, or a source is remote and may not be fetched.
    """
    with open_shard(paths[0]) as (_, provenance):
        resolved = ResolvedRun.from_provenance(provenance, weights=weights, source_hosts=source_hosts)
    tokenizer = load_decoder(resolved, precision=resolved.run.precision)
    everything = find_clips(paths, "")
    chosen = sorted(random.Random(seed).sample(everything, math.ceil(share * len(everything))))  # noqa: S311
    result = Comparison(must_be_equal=resolved.run.precision == "float32" and tokenizer.device.type == "cpu")
    with PhaseProgress(console, "encoding again", len(chosen)) as display:
        for done, row in enumerate(chosen, start=1):
            stored = stored_clip(row)
            check_clip(resolved, stored)
            if not fetch_sources:
                refuse_unasked(stored.values["uri"])
            try:
                again = encode_by_another_cut(tokenizer, resolved, stored.values)
            except VideoError as error:
                result.gone.append(
                    f"{readable(stored.clip_id)} of {shown_uri(stored.values['uri'])}: {one_line(error)}"
                )
            else:
                whole = next(read_clips(*row, with_logvar=True))
                compare(whole.payload, again, result, stored.clip_id)
            display.update(done, f"{done:,} of {counted(len(chosen), 'clip')} · {done / display.seconds:.2f} clips/s")
    _report(result, share, seed, console)
    return result


@dataclass(frozen=True, kw_only=True)
class Reencoded:
    """Payload of one clip that was encoded again, with its rounding ties."""

    payload: dict[str, Tensor]
    """Payload columns by name, each (*shape)."""
    near_ties: dict[str, Tensor]
    """Masks of rounding ties by token column, each bool (*shape)."""


def encode_by_another_cut(tokenizer: Tokenizer, resolved: ResolvedRun, values: Mapping[str, Any]) -> Reencoded:
    """Encode the clip of a stored row again from its source, with other chunks than the run used.

    Args:
        values: columns of the stored row.

    Raises:
        VideoError: the source is gone, was replaced, or no longer decodes.
    """
    config = tokenizer.config
    spec = stored_spec(resolved, values)
    wider = replace(spec, halo_clips=spec.halo_clips + int(spec.continuous))
    clips = decode_again(
        values["uri"], values["video_id"], values["clip_index"], wider, row_part(values), resolved.source_limits
    )
    x_BCTHW = _to_input(tokenizer, clips)
    if spec.continuous:
        num_latents = spec.num_frames // config.time_stride
        whole = _in_pieces(tokenizer, x_BCTHW[:, :, spec.lead_frames :])
        return _changed([whole], lambda values: values[0][..., -num_latents:, :, :])
    if resolved.padding is not None:
        x_BCTHW = pad(x_BCTHW, config, resolved.padding).frames
    if config.why_no_streams is None and resolved.tiling is None:
        return _in_pieces(tokenizer, x_BCTHW)
    with torch.inference_mode():
        twice = tokenizer.encode(x_BCTHW.expand(2, -1, -1, -1, -1), tiling=resolved.tiling)
    return _of_batch(twice, 1)


def _to_input(tokenizer: Tokenizer, clips: Sequence[Clip]) -> Tensor:
    frames = torch.from_numpy(np.concatenate([clip.frames for clip in clips]))[None]
    return frames_to_input(frames.to(tokenizer.device), tokenizer.dtype)


def _in_pieces(tokenizer: Tokenizer, x_BCTHW: Tensor) -> Reencoded:
    """Encode a clip as a stream of single latents."""
    stride = tokenizer.config.time_stride
    past: Past = ()
    parts: list[Reencoded] = []
    cuts = range((x_BCTHW.shape[2] - 1) % stride + 1, x_BCTHW.shape[2], stride)
    for piece in torch.tensor_split(x_BCTHW, list(cuts), dim=2):
        with torch.inference_mode():
            encoded, past = tokenizer.encode_stream(piece, past)
        parts.append(_of_batch(encoded, 0))
    return _changed(parts, lambda values: torch.cat(values, dim=-3))


def _of_batch(encoded: EncodedClips, number: int) -> Reencoded:
    """Result of one clip of a batch, on the CPU.

    Raises:
        RunFailedError: the network gave a value that is not finite.
    """
    if encoded.is_finite is not None and not encoded.is_finite[number]:
        raise RunFailedError("encoding again gave values that are not finite: compare in the precision of the run")
    ties = encoded.near_ties(TIE)
    return Reencoded(
        payload={name: values[number].cpu() for name, values in encoded.payload.items()},
        near_ties={name: values[number].cpu() for name, values in ties.items()},
    )


def _changed(parts: Sequence[Reencoded], change: Callable[[list[Tensor]], Tensor]) -> Reencoded:
    return Reencoded(
        payload={name: change([part.payload[name] for part in parts]) for name in parts[0].payload},
        near_ties={name: change([part.near_ties[name] for part in parts]) for name in parts[0].near_ties},
    )


def compare(stored: Mapping[str, np.ndarray], again: Reencoded, result: Comparison, clip_id: str) -> None:
    """Compare the stored payload of a clip with its new one, and add the counts to ``result``."""
    result.num_clips += 1
    num_different = 0
    for name, values in stored.items():
        result.num_values += values.size
        computed = again.payload[name].numpy()
        if values.dtype.kind == "u":
            different = computed != values
            if name in again.near_ties:
                result.num_ties += int((different & again.near_ties[name].numpy()).sum())
        else:
            difference = np.abs(computed - values.astype(np.float32))
            result.largest_difference = max(result.largest_difference, float(difference.max()))
            # near zero a unit in the last place of float16 is smaller than the noise of float32: the bound is 1e-4
            different = difference > np.maximum(np.abs(np.spacing(values)).astype(np.float32), 1e-4)
        num_different += int(different.sum())
    result.num_different += num_different
    if num_different:
        result.different_clips.append(clip_id)


def _report(result: Comparison, share: float, seed: int, console: Console) -> None:
    console.print(
        f"encoded {counted(result.num_clips, 'clip')} again by another cut ({share:.2%} of all, seed {seed}): "
        f"{result.num_different} of {result.num_values:,} values differ"
        + (f" ({result.num_different / result.num_values:.4%})" if result.num_values else "")
        + (f", {result.num_ties} of them at ties of rounding" if result.num_ties else "")
        + (f"; latents by at most {result.largest_difference:.2g}" if result.largest_difference else ""),
        highlight=False,
    )
    for clip_id in result.different_clips[:10]:
        console.print(f"  differs: {readable(clip_id)}", highlight=False, markup=False)
    for line in result.gone[:10]:
        console.print(f"  not compared: {line}", highlight=False, markup=False)
    if len(result.gone) > 10:
        console.print(f"  ... and {len(result.gone) - 10} more whose source cannot be read", highlight=False)
    if result.gone and not result.num_clips:
        print_alert(console, "no clip was compared: none of their sources can be read", style="bold red")
