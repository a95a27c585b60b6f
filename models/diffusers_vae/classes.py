"""Table of the diffusers classes that are tokenizers here, with the quirks of each.

A row says what cannot be read from a config: which clip lengths the class takes without dropping, padding or blending
frames, whether latents depend on later frames, how pixels and latents are scaled, and which switches are set. Strides
and channels are derived from the config (`models.diffusers_vae.derive`). No row needs diffusers to be installed.
"""

# T frames of a clip, r frames per latent

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Lengths = Callable[[int, int], int | None]
"""Function from (T, r) to the number of latent frames; None for a length that the class does not take."""


def one_and_multiples(num_frames: int, stride: int) -> int | None:
    """1 + k r frames to 1 + k latents."""
    return 1 + (num_frames - 1) // stride if (num_frames - 1) % stride == 0 else None


def per_frame(num_frames: int, _stride: int) -> int | None:
    """Any number of frames, a latent each."""
    return num_frames


def up_to_16(num_frames: int, stride: int) -> int | None:
    """1 + k r frames, at most 16: the class blends overlapping pieces of 16 frames of longer clips."""
    return one_and_multiples(num_frames, stride) if num_frames <= 16 else None


def eights(num_frames: int, stride: int) -> int | None:
    """1, 8 k or 8 k + 1 frames: the class encodes batches of 8 frames, of which the first may have one more."""
    if num_frames == 1 or num_frames % 8 == 0:
        return max(1, num_frames // stride)
    return num_frames // stride + 1 if num_frames % 8 == 1 else None


def segments_of_16(num_frames: int, stride: int) -> int | None:
    """1 + k r frames but 16 j + 5 from 21 on, which decode to fewer: the class decodes segments of 17 and 16 frames."""
    is_cut = num_frames > 5 and num_frames % 16 == 5
    return None if is_cut else one_and_multiples(num_frames, stride)


def seventeens_and_5(num_frames: int, stride: int) -> int | None:
    """17 k + 5 frames: the class encodes clips of 17 frames, pads the last one and drops 3 latents."""
    clips, left = divmod(num_frames - 5, 17)
    per_clip = -(-17 // stride)
    return clips * per_clip + 2 if left == 0 and clips >= 1 else None


def cubes_of_24(num_frames: int, stride: int) -> int | None:
    """24 + 16 k frames: the class encodes overlapping cubes of 24 frames."""
    return num_frames // stride if num_frames >= 24 and num_frames % 16 == 8 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """Names of the numbers by which trainers standardize latents: settings of the config, or entries of the weights."""

    mean: str = ""
    std: str = ""
    scale: str = ""
    shift: str = ""
    in_weights: bool = False
    """Whether mean and standard deviation are entries of the weights."""


MEAN_STD = Scaling(mean="latents_mean", std="latents_std", scale="scaling_factor", shift="shift_factor")
BUFFERS = Scaling(mean="latents_mean", std="latents_std", scale="scaling_factor", in_weights=True)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of RGB in [0, 1] by which some classes standardize pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeClass:
    """Class of diffusers that is a tokenizer here."""

    name: str
    """Name of the class, ``_class_name`` in a config.json."""
    models: str
    """Models that use it, for display."""
    lengths: Lengths = one_and_multiples
    is_causal: bool = False
    """Whether latents depend on no later frames."""
    streams: bool = False
    """Whether a video of any length can be encoded piece by piece with the latents of one pass."""
    no_streams: str = ""
    """Reason why not, if ``streams`` is false: completes "cannot encode a video piece by piece: "."""
    frames_are_images: bool = False
    """Whether the class takes images, so that each frame is encoded by itself."""
    decodes_frames_together: bool = False
    """Whether a class that takes images decodes them with ``num_frames``."""
    has_logvar: bool = True
    scaling: Scaling = MEAN_STD
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and standard deviation of the class's pixels in [0, 1]; None for pixels in [-1, 1]."""
    flags: Mapping[str, bool] = field(default_factory=lambda: {"use_tiling": False, "use_slicing": False})
    """Switches of the network that are set, which the provenance records."""
    float32_only: bool = False
    """Whether the class keeps parts of the network in float32."""
    cubes: bool = False
    """Whether the class encodes cubes of ``kernel`` pixels every ``stride`` pixels, attributes of the network, and
    leaves out what no cube covers."""
    decodes_time_first: bool = False
    """Whether decoded clips are (B, T, C, H, W)."""
    in_channels: tuple[str, int] | None = None
    """Setting that must have this value for RGB frames, where the network adds channels of its own."""

    @property
    def clips(self) -> str:
        """Rule of the clip lengths in one sentence, for display."""
        return (self.lengths.__doc__ or "").strip().removesuffix(".")


_WHOLE = {"use_tiling": False, "use_slicing": False}
_NOT_CAUSAL = "its latents depend on later frames"
_ATTENTION = "it attends to all earlier frames, so its latents depend on the whole video"
_CHUNKS = "it encodes chunks whose latents depend on where they begin"
_LONG = "its latents depend on more earlier frames than are bounded here"
_FRAMES = "its frames are encoded one by one anyway, and clips of any length give the same latents"

CLASSES: dict[str, VaeClass] = {
    row.name: row
    for row in (
        VaeClass(name="AutoencoderKLWan", models="Wan 2.1, Wan 2.2", is_causal=True, streams=True),
        VaeClass(name="AutoencoderKLQwenImage", models="Qwen-Image", is_causal=True, streams=True),
        VaeClass(
            name="AutoencoderKLHunyuanVideo",
            models="HunyuanVideo",
            lengths=up_to_16,
            no_streams=_NOT_CAUSAL,
            flags=_WHOLE | {"use_framewise_encoding": True, "use_framewise_decoding": True},
        ),
        VaeClass(name="AutoencoderKLHunyuanVideo15", models="HunyuanVideo 1.5", is_causal=True, no_streams=_ATTENTION),
        VaeClass(
            name="AutoencoderKLLTXVideo",
            models="LTX-Video",
            is_causal=True,
            no_streams=_LONG,
            scaling=BUFFERS,
            flags=_WHOLE | {"use_framewise_encoding": False, "use_framewise_decoding": False},
        ),
        VaeClass(
            name="AutoencoderKLLTX2Video",
            models="LTX-2",
            is_causal=True,
            no_streams=_LONG,
            scaling=BUFFERS,
            flags=_WHOLE | {"use_framewise_encoding": False, "use_framewise_decoding": False},
        ),
        VaeClass(name="AutoencoderKLCogVideoX", models="CogVideoX", lengths=eights, no_streams=_CHUNKS),
        VaeClass(
            name="AutoencoderKLMochi",
            models="Mochi 1",
            is_causal=True,
            no_streams=_ATTENTION,
            in_channels=("in_channels", 15),
            flags=_WHOLE | {"use_framewise_encoding": False, "use_framewise_decoding": False},
        ),
        VaeClass(
            name="AutoencoderKLCosmos",
            models="Cosmos 1 CV",
            is_causal=True,
            no_streams=_ATTENTION,
            has_logvar=False,
            flags=_WHOLE | {"use_framewise_encoding": False, "use_framewise_decoding": False},
        ),
        VaeClass(
            name="AutoencoderKLMagvit",
            models="EasyAnimate",
            no_streams=_CHUNKS,
            flags=_WHOLE | {"use_framewise_encoding": False, "use_framewise_decoding": False},
        ),
        VaeClass(
            name="AutoencoderKLKVAEVideo",
            models="Kandinsky 5 KVAE",
            lengths=segments_of_16,
            no_streams=_CHUNKS,
            has_logvar=False,
        ),
        VaeClass(name="Kandinsky6SRVAE", models="Kandinsky 6", is_causal=True, no_streams=_LONG, flags={}),
        VaeClass(
            name="AutoencoderKLMiniMaxH3",
            models="MiniMax-H3",
            lengths=seventeens_and_5,
            no_streams=_CHUNKS,
            pixels=IMAGENET,
            flags={"use_tiling": True, "use_slicing": False},
            float32_only=True,
        ),
        VaeClass(
            name="AutoencoderKLAllegro",
            models="Allegro",
            lengths=cubes_of_24,
            no_streams=_NOT_CAUSAL,
            flags={"use_tiling": True, "use_slicing": False},
            cubes=True,
            decodes_time_first=True,
        ),
        VaeClass(
            name="AutoencoderKLTemporalDecoder",
            models="Stable Video Diffusion",
            lengths=per_frame,
            frames_are_images=True,
            decodes_frames_together=True,
            no_streams=_FRAMES,
            flags={},
        ),
        VaeClass(
            name="AutoencoderKL",
            models="Stable Diffusion, SDXL, SD 3, FLUX.1",
            lengths=per_frame,
            frames_are_images=True,
            no_streams=_FRAMES,
        ),
        VaeClass(
            name="AutoencoderTiny",
            models="TAESD",
            lengths=per_frame,
            frames_are_images=True,
            no_streams=_FRAMES,
            has_logvar=False,
        ),
        VaeClass(
            name="AutoencoderDC",
            models="DC-AE (SANA)",
            lengths=per_frame,
            frames_are_images=True,
            no_streams=_FRAMES,
            has_logvar=False,
        ),
        VaeClass(
            name="AutoencoderKLKVAE",
            models="Kandinsky 5 KVAE, images",
            lengths=per_frame,
            frames_are_images=True,
            no_streams=_FRAMES,
        ),
        VaeClass(
            name="AutoencoderKLFlux2",
            models="FLUX.2",
            lengths=per_frame,
            frames_are_images=True,
            no_streams=_FRAMES,
            scaling=Scaling(),
        ),
    )
}
"""Classes by name: the allow-list."""

EXCLUDED: dict[str, str] = {
    "AutoencoderKLQwenImage21": "it takes single images of four channels only",
    "AutoencoderRAE": "its encoder is a network of the package transformers",
    "AutoencoderVidTok": "these networks are a family of their own here: name a preset of `vidshard tokenizers`",
    "ConsistencyDecoderVAE": "its decoder samples noise, so decoding is not deterministic",
    "VQModel": "it is for images, and its tokens were trained with other models",
}
"""Reasons why other classes are refused, by name."""


def find_class(name: object) -> VaeClass:
    """Look up a class.

    Raises:
        ValueError: it is not on the list; the message says why, or lists all.
    """
    if isinstance(name, str) and name in CLASSES:
        return CLASSES[name]
    if isinstance(name, str) and name in EXCLUDED:
        raise ValueError(f"{name} is not taken: {EXCLUDED[name]}")
    raise ValueError(f"{name!r:.80} is not a class that is taken; there are: {', '.join(CLASSES)}")


def settings_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a config.json without the notes of diffusers, whose names begin with an underscore."""
    return {str(name): value for name, value in record.items() if not str(name).startswith("_")}
