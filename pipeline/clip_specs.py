"""Clip settings of a run for its tokenizer: length, padding, tiling and payload of a clip."""

from __future__ import annotations

from dataclasses import replace

from vidshard.models.vidtok.lengths import Padding
from vidshard.models.vidtok.tiling import Tiling
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.tokenizers import TokenizerConfig
from vidshard.schemas.tokens import Payload
from vidshard.schemas.video import ClipSpec


def clip_specs_of(run: TokenizeRun, config: TokenizerConfig) -> list[ClipSpec]:
    """Clip settings of a run for its tokenizer, one per bucket.

    Raises:
        ValueError: the run is continuous, and the tokenizer or another setting does not allow it.
    """
    specs = run.clip_specs
    if not run.continuous:
        return specs
    if run.tile_size is not None:
        raise ValueError("--continuous cannot go with --tile-size: a stream takes whole frames")
    if run.stride_seconds is not None or run.clips_per_video is not None:
        raise ValueError("--continuous is one sequence without gaps: leave --stride-seconds and --clips-per-video out")
    if run.damaged == "keep":
        raise ValueError("--continuous is one sequence without gaps: it cannot go with --damaged keep")
    return [continuous_spec(spec, config) for spec in specs]


def continuous_spec(spec: ClipSpec, config: TokenizerConfig) -> ClipSpec:
    """Clip settings for a continuous sequence, with as many latents per clip as a single clip of ``spec`` has.

    The first latent of a causal model covers the first frame alone, every other one time_stride frames. All clips
    become alike by time_stride - 1 copies before the first frame, which is the model's own padding.

    Raises:
        ValueError: the model is not causal, or does not take clips of this length.
    """
    if config.why_no_streams is not None:
        raise ValueError(f"{config.why_no_streams}; choose a causal tokenizer for --continuous, or leave it out")
    num_latents = config.latent_frames(spec.num_frames)
    if config.decoded_frames(num_latents) != spec.num_frames:
        raise ValueError(
            f"--continuous takes --frames of 1 + a multiple of {config.time_stride}, got {spec.num_frames}; nearest: "
            f"{config.decoded_frames(num_latents)}"
        )
    num_frames = num_latents * config.time_stride
    return replace(
        spec,
        num_frames=num_frames,
        continuous=True,
        lead_frames=config.time_stride - 1,
        halo_clips=-(-config.history_frames // num_frames),
    )


def encoded_frames(run: TokenizeRun, config: TokenizerConfig) -> int:
    """Number of frames of a clip as it is encoded, padding included.

    Raises:
        ValueError: the tokenizer does not take clips of this length, and padding is off.
    """
    if run.pad_frames != "refuse":
        return config.valid_frames(run.frames)
    try:
        config.latent_frames(run.frames)
    except ValueError as error:
        hint = ". Or fill up every clip: --pad-frames repeat-last" if _can_be_padded(run.frames, config) else ""
        raise ValueError(f"{error}{hint}") from error
    return run.frames


def _can_be_padded(num_frames: int, config: TokenizerConfig) -> bool:
    try:
        config.valid_frames(num_frames)
    except ValueError:
        return False
    return True


def padding_of(run: TokenizeRun, config: TokenizerConfig) -> Padding | None:
    """Placement of the frames that pad clips to a valid length; None if they are not padded."""
    is_valid = config.valid_frames(run.frames) == run.frames
    return None if is_valid or run.continuous or run.pad_frames == "refuse" else Padding(run.pad_frames)


def requested_tiling(run: TokenizeRun, config: TokenizerConfig) -> Tiling | None:
    """Tiles of the settings, even if frames are no larger than a tile; None for whole frames.

    Raises:
        ValueError: the tiles do not lie on the model's latent grid, or are not larger than their overlap.
    """
    if run.tile_size is None:
        return None
    height, width = run.tile_size
    tiling = Tiling(height=height, width=width, overlap=run.tile_overlap)
    tiling.check(config)
    return tiling


def payload_of(run: TokenizeRun, config: TokenizerConfig, height: int, width: int) -> Payload:
    """Payload of a clip of one frame size.

    Raises:
        ValueError: as :func:`encoded_frames`; or the strides do not divide the size, or a log-variance is to be kept
            but the tokenizer has none.
    """
    return config.payload(encoded_frames(run, config), height, width, keep_logvar=run.keep_logvar)
