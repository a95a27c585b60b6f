"""Clips of a run as its tokenizer takes them: the length of a clip, its padding, its tiles, its payload."""

from __future__ import annotations

from dataclasses import replace

from vidshard.models.config import TokenizerConfig
from vidshard.models.vidtok.lengths import Padding
from vidshard.models.vidtok.tiling import Tiling
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.tokens import Payload
from vidshard.schemas.video import ClipSpec


def clip_specs_of(run: TokenizeRun, config: TokenizerConfig) -> list[ClipSpec]:
    """Rules by which a run makes clips for its tokenizer, one for each frame size.

    Raises:
        ValueError: a continuous sequence that the tokenizer or another setting does not allow.
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
    """Clips of a video as one sequence: as many latents in each as in a clip of ``spec`` by itself.

    A causal model's first latent stands for the first frame alone, every other one for time_stride frames. With
    time_stride - 1 copies before the first frame, which is what the model itself puts there, all clips are alike.

    Raises:
        ValueError: the model is not causal, or takes no clips of this length.
    """
    if not config.is_causal:
        raise ValueError(
            f"{config.name} is not causal: its latents depend on later frames, so a video cannot be encoded piece by "
            "piece; choose a causal tokenizer for --continuous"
        )
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
    """Frames of a clip as the tokenizer gets it.

    Raises:
        ValueError: the tokenizer takes no clips of this length, and they are not to be padded.
    """
    if run.pad_frames != "refuse":
        return config.valid_frames(run.frames)
    try:
        config.latent_frames(run.frames)
    except ValueError as error:
        raise ValueError(f"{error}. Or fill up every clip: --pad-frames repeat-last") from error
    return run.frames


def padding_of(run: TokenizeRun, config: TokenizerConfig) -> Padding | None:
    """Place of the copies that make clips as long as the tokenizer takes; None where they are that long."""
    is_valid = config.valid_frames(run.frames) == run.frames
    return None if is_valid or run.continuous or run.pad_frames == "refuse" else Padding(run.pad_frames)


def requested_tiling(run: TokenizeRun, config: TokenizerConfig) -> Tiling | None:
    """Tiles that the settings ask for, whether or not a frame is larger than one.

    Raises:
        ValueError: tiles that do not lie on the model's latent grid, or are not larger than their overlap.
    """
    if run.tile_size is None:
        return None
    height, width = run.tile_size
    tiling = Tiling(height=height, width=width, overlap=run.tile_overlap)
    tiling.check(config)
    return tiling


def payload_of(run: TokenizeRun, config: TokenizerConfig, height: int, width: int) -> Payload:
    """Columns that a clip of one frame size becomes.

    Raises:
        ValueError: as :func:`encoded_frames`, for a size that the strides do not divide, or a log-variance to keep
            where there is none.
    """
    return config.payload(encoded_frames(run, config), height, width, keep_logvar=run.keep_logvar)
