"""Configuration of VidTok tokenizers, and the table of their presets.

A `VidTokConfig` describes a network completely; `PRESETS` holds a row for each known model. No weights and no
computation stand here.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, Self

from pydantic import Field, model_validator

from vidshard.models.vidtok.heads import FSQ, LFQ
from vidshard.models.vidtok.layers import TIME_RULES
from vidshard.schemas.tokenizers import IDENTITY_WHEN_SET, TokenizerConfig
from vidshard.schemas.tokens import Payload, latents_payload, tokens_payload


class VidTokConfig(TokenizerConfig):
    """A VidTok tokenizer, described completely: two equal configs are the same network."""

    family: Literal["vidtok"] = "vidtok"
    variant: Literal["causal-v1.0", "causal-v1.1", "non-causal"] = "causal-v1.0"
    """Rule of padding and resampling in time, see `TIME_RULES`. Weights of the two causal variants have the same names
    and shapes, so a file cannot tell them apart."""
    architecture: Literal["released", "fully-3d", "no-blend", "no-3d"] = Field(
        default="released", json_schema_extra=IDENTITY_WHEN_SET
    )
    """Released structure or an ablation of the paper, see `ARCHITECTURES`."""
    head: Literal["fsq", "kl", "lfq", "vq"]
    """Quantizer: fsq, lfq and vq give tokens, kl gives latents."""
    latent_channels: int = Field(ge=1, le=1024)
    """Channels of the decoder input."""
    fsq_levels: tuple[int, ...] = Field(default=(), max_length=64)
    """FSQ: number of levels of each latent channel; empty for other heads."""
    vq_codebook_size: int | None = Field(default=None, ge=2, le=2**31 - 1, json_schema_extra=IDENTITY_WHEN_SET)
    """VQ: number of entries of the codebook; None for other heads. LFQ has 2**latent_channels tokens."""
    base_width: int = Field(default=128, ge=1, le=4096)
    """Channels of level 0."""
    width_multipliers: tuple[int, ...] = Field(default=(1, 2, 4, 4), max_length=8)
    """Channels of each level, in units of base_width."""
    encoder_pairs: int = Field(default=2, ge=1, le=16)
    """Residual pairs (within frames, then through time) at each encoder level."""
    decoder_pairs: int = Field(default=3, ge=1, le=16)
    encoder_space_levels: tuple[int, ...] = (0, 1, 2)
    """Levels after which the encoder halves height and width."""
    encoder_time_levels: tuple[int, ...] = (1, 2)
    """Space levels after which the encoder also halves the frames."""
    decoder_space_levels: tuple[int, ...] = (1, 2, 3)
    """Levels after which the decoder, which runs from the last level to 0, doubles height and width."""
    decoder_time_levels: tuple[int, ...] = (1, 2)
    """Space levels after which the decoder also doubles the frames."""
    haar_bands: bool = Field(default=False, json_schema_extra=IDENTITY_WHEN_SET)
    """Frames enter and leave as the four bands of a 2x2 Haar transform: level 0 has half of their height and width."""
    shortcuts: bool = Field(default=False, json_schema_extra=IDENTITY_WHEN_SET)
    """Each resampling in space has a shortcut of DC-AE, without weights, see `models.vidtok.shortcuts`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head == "fsq":
            FSQ(self.fsq_levels)
        if self.head == "lfq":
            LFQ(self.latent_channels)
        if (self.head == "vq") != (self.vq_codebook_size is not None):
            expected = "takes a vq_codebook_size" if self.head == "vq" else "takes no vq_codebook_size"
            raise ValueError(f"{self.name}: a {self.head} head {expected}, got {self.vq_codebook_size}")
        expected_levels = self.latent_channels if self.head == "fsq" else 0
        if len(self.fsq_levels) != expected_levels:
            raise ValueError(
                f"{self.name}: a {self.head} head with {self.latent_channels} latent channels takes "
                f"{expected_levels} fsq_levels, got {self.fsq_levels}"
            )
        if not self.width_multipliers or not 1 <= min(self.width_multipliers) <= max(self.width_multipliers) <= 64:
            raise ValueError(f"{self.name}: width_multipliers must lie in 1 ... 64, got {self.width_multipliers}")
        last = len(self.width_multipliers) - 1
        for field, first_level, last_level in (("encoder", 0, last - 1), ("decoder", 1, last)):
            space = getattr(self, f"{field}_space_levels")
            time = getattr(self, f"{field}_time_levels")
            if len({*space}) != len(space) or not {*space} <= {*range(first_level, last_level + 1)}:
                raise ValueError(
                    f"{self.name}: {field}_space_levels must be distinct and within {first_level} ... {last_level}, "
                    f"got {space}"
                )
            if len({*time}) != len(time) or not {*time} <= {*space}:
                raise ValueError(
                    f"{self.name}: {field}_time_levels must be distinct and among its space levels {space}, got {time}"
                )
        if len(self.encoder_space_levels) != len(self.decoder_space_levels) or len(self.encoder_time_levels) != len(
            self.decoder_time_levels
        ):
            raise ValueError(f"{self.name}: the decoder must double as often as the encoder halves, in space and time")
        if self.shortcuts and TIME_RULES[self.variant].upsampling != "repeated":
            raise ValueError(
                f"{self.name}: shortcuts repeat frames, and {self.variant} interpolates them; give variant causal-v1.0 "
                "or non-causal"
            )
        return self

    @property
    def is_causal(self) -> bool:
        """No latent depends on frames after its own."""
        return TIME_RULES[self.variant].causal

    @property
    def time_stride(self) -> int:
        """Frames per latent; the first latent of a causal model may hold fewer."""
        return 1 << len(self.encoder_time_levels)

    @property
    def space_stride(self) -> int:
        """Pixels per latent, along height and along width."""
        return 1 << len(self.encoder_space_levels) + self.haar_bands

    @property
    def codebook_size(self) -> int | None:
        """Number of different tokens; None where latents are continuous."""
        by_head = {"fsq": math.prod(self.fsq_levels), "lfq": 2**self.latent_channels, "vq": self.vq_codebook_size}
        return by_head.get(self.head)

    @property
    def has_tokens(self) -> bool:
        """Clips become tokens; otherwise continuous latents."""
        return self.codebook_size is not None

    @property
    def token_bits(self) -> float | None:
        """log2 of the codebook size; None where latents are continuous."""
        return math.log2(self.codebook_size) if self.codebook_size is not None else None

    @property
    def history_frames(self) -> int:
        """Number of frames before its own last one that a latent can depend on, summed over the encoder's layers.

        Encoding that starts at a multiple of time_stride at least this many frames early gives the whole video's
        latents, once those of the early frames are dropped.
        """
        # The same in every architecture: two convolutions over time in a pair or 3D unit, one in the resampling.
        # A causal convolution of three frames looks back two frames of its own rate; at stride 2, one before its own.
        conv, down = (2, 1) if self.is_causal else (1, 0)
        return self._reach(conv, down) + self.time_stride - 1

    @property
    def future_frames(self) -> int:
        """Number of frames after its own last one that a latent can depend on; 0 in causal models."""
        return 0 if self.is_causal else self._reach(1, 1)

    @property
    def history_latents(self) -> int:
        """Latents before its own that a frame of a causal model can depend on, summed over the decoder's layers.

        Decoding that starts at least this many latents early gives the whole video's frames, once those of the early
        latents are dropped. In v1.1 a frame can depend on one latent after its own too, see `lookahead_latents`.
        """
        reach = Fraction(2 + 2 * 2 * 2)  # conv_in and the two units of the middle block, in latents
        rate = 1
        for level in reversed(range(len(self.width_multipliers))):
            reach += Fraction(self.decoder_pairs * 2 * 2, rate)
            if level in self.decoder_time_levels:
                # a doubled frame is made of the source frames up to two before its own
                reach += Fraction(2, rate)
                rate *= 2
        return math.ceil(reach + Fraction(2, rate)) + 1  # the output convolution; a latent's frames see back from any

    @property
    def lookahead_latents(self) -> int:
        """Number of latents after its own that a frame of a causal model depends on."""
        return int(TIME_RULES[self.variant].upsampling == "linear")

    def _reach(self, conv: int, down: int) -> int:
        """Frames that the encoder sees on one side of a latent's own, from what each layer sees at its rate."""
        reach = conv  # conv_in
        rate = 1
        for level in range(len(self.width_multipliers)):
            reach += self.encoder_pairs * 2 * conv * rate
            if level in self.encoder_time_levels:
                reach += down * rate
                rate *= 2
        return reach + (2 * 2 + 1) * conv * rate  # two units of the middle block and the output convolution

    def _lengths(self) -> tuple[int, int]:
        """Shortest clip that the model takes, and the step to longer ones, both in frames."""
        return {
            "causal-v1.0": (1, self.time_stride),  # the first frame stands alone
            "causal-v1.1": (1, 1),  # the first latent stands for the frames that the others leave over
            "non-causal": (self.time_stride, self.time_stride),
        }[self.variant]

    def latent_frames(self, num_frames: int) -> int:
        """Number of latent frames of a clip: its frames divided by time_stride, rounded up.

        Raises:
            ValueError: for a length that the model does not take, naming the nearest that it does. Causal v1.0 takes
                1 + a multiple of time_stride, v1.1 any, non-causal a multiple of time_stride.
        """
        first, step = self._lengths()
        if num_frames < first or (num_frames - first) % step:
            below = first + max(num_frames - first, 0) // step * step
            nearest = " or ".join(str(n) for n in ((first,) if num_frames < first else (below, below + step)))
            rule = f"a multiple of {step}" if first == step else f"{first} + a multiple of {step}"
            raise ValueError(
                f"{self.name}: num_frames must be {rule} ({first}, {first + step}, {first + 2 * step} ...), "
                f"got {num_frames}; nearest: {nearest}"
            )
        return -(-num_frames // self.time_stride)

    def decoded_frames(self, latent_frames: int) -> int:
        """Number of frames of a clip with this many latent frames, counting 1 for the first one of a causal model."""
        return latent_frames * self.time_stride - (self.time_stride - 1 if self.is_causal else 0)

    def valid_frames(self, num_frames: int) -> int:
        """Shortest length that the model takes and that is not below num_frames.

        Raises:
            ValueError: for num_frames below 1.
        """
        if num_frames < 1:
            raise ValueError(f"{self.name}: num_frames must be at least 1, got {num_frames}")
        first, step = self._lengths()
        return first + -(-max(num_frames - first, 0) // step) * step

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """Shape of a clip's stored values: (T', H', W') tokens, or (C, T', H', W') latents for KL.

        Raises:
            ValueError: for a length or size that the strides do not divide.
        """
        grid = (self.latent_frames(num_frames), self._latent_size("height", height), self._latent_size("width", width))
        return grid if self.has_tokens else (self.latent_channels, *grid)

    @property
    def head_name(self) -> str:
        """Name of the head."""
        return self.head

    @property
    def has_logvar(self) -> bool:
        """The model gives a log-variance beside its latents."""
        return self.head == "kl"

    def payload(self, num_frames: int, height: int, width: int, *, keep_logvar: bool = False) -> Payload:
        """Columns that a clip becomes: ``tokens``, or ``latents`` and, if kept, ``latents_logvar``.

        Raises:
            ValueError: for a length or size that the strides do not divide, or a log-variance that there is not.
        """
        shape = self.latent_shape(num_frames, height, width)
        if keep_logvar and not self.has_logvar:
            raise ValueError(f"{self.name} has no log-variance to keep: it gives tokens")
        if self.codebook_size is None:
            return latents_payload(shape, keep_logvar=keep_logvar)
        return tokens_payload(shape, self.codebook_size)

    def _latent_size(self, axis: str, size: int) -> int:
        stride = self.space_stride
        if size < stride or size % stride:
            below = max(size, 0) // stride * stride
            nearest = " or ".join(str(n) for n in (below, below + stride) if n > 0)
            raise ValueError(f"{self.name}: {axis} must be divisible by {stride}, got {size}; nearest: {nearest}")
        return size // stride


Row = dict[str, object]

# Time stride, then space strides in the name. The 41616 models halve time at levels 2 and 3 but double it at 2 and 1.
_488: Row = {}
_41616: Row = {
    "width_multipliers": (1, 2, 4, 4, 4),
    "encoder_space_levels": (0, 1, 2, 3),
    "encoder_time_levels": (2, 3),
    "decoder_space_levels": (1, 2, 3, 4),
}
_444: Row = {"encoder_space_levels": (1, 2), "decoder_space_levels": (1, 2)}
_288: Row = {"encoder_time_levels": (1,), "decoder_time_levels": (2,)}
_888: Row = {"encoder_time_levels": (0, 1, 2), "decoder_time_levels": (1, 2, 3)}

_V1_0: Row = {"variant": "causal-v1.0"}
_V1_1: Row = {"variant": "causal-v1.1"}
_NON_CAUSAL: Row = {"variant": "non-causal"}

_FULLY_3D: Row = {"architecture": "fully-3d"}
_NO_BLEND: Row = {"architecture": "no-blend"}
_NO_3D: Row = {"architecture": "no-3d"}
_TINY: Row = {"base_width": 8, "encoder_pairs": 1, "decoder_pairs": 1}
_SMALL: Row = {"base_width": 16, "width_multipliers": (1, 2, 4, 6), "encoder_pairs": 1, "decoder_pairs": 1}
# Levels 1 to 3 of the small one: the Haar bands take the place of level 0.
_SMALL_HAAR: Row = {
    "haar_bands": True,
    "shortcuts": True,
    "base_width": 32,
    "width_multipliers": (1, 2, 3),
    "encoder_pairs": 1,
    "decoder_pairs": 1,
    "encoder_space_levels": (0, 1),
    "encoder_time_levels": (0, 1),
    "decoder_space_levels": (1, 2),
    "decoder_time_levels": (1, 2),
}


def _fsq(name: str, topology: Row, dims: int, variant: Row, **small: object) -> VidTokConfig:
    head = {"head": "fsq", "latent_channels": dims, "fsq_levels": (8,) * dims}
    return VidTokConfig.model_validate({"name": name, **head, **topology, **variant, **small})


def _kl(name: str, topology: Row, channels: int, variant: Row, **small: object) -> VidTokConfig:
    head = {"head": "kl", "latent_channels": channels}
    return VidTokConfig.model_validate({"name": name, **head, **topology, **variant, **small})


def _lfq(name: str, topology: Row, bits: int, variant: Row, **small: object) -> VidTokConfig:
    head = {"head": "lfq", "latent_channels": bits}
    return VidTokConfig.model_validate({"name": name, **head, **topology, **variant, **small})


def _vq(name: str, topology: Row, size: int, channels: int, variant: Row, **small: object) -> VidTokConfig:
    head = {"head": "vq", "latent_channels": channels, "vq_codebook_size": size}
    return VidTokConfig.model_validate({"name": name, **head, **topology, **variant, **small})


PRESETS: dict[str, VidTokConfig] = {
    config.name: config
    for config in (
        # For tests, demos and laptops: no trained weights exist.
        _fsq("tiny", _488, 5, _V1_0, **_TINY),
        _kl("tiny_kl", _488, 4, _V1_0, **_TINY),
        # 3 million weights instead of 157. They come with the package: `models.weights.SHIPPED`.
        _fsq("fsq_causal_488_small_haar", _488, 6, _V1_0, **_SMALL_HAAR),
        _fsq("fsq_causal_488_small_haar_lpips", _488, 6, _V1_0, **_SMALL_HAAR),
        _fsq("fsq_causal_488_small", _488, 6, _V1_0, **_SMALL),
        # The release. FSQ: eight levels in each dimension.
        _fsq("fsq_causal_488_262144", _488, 6, _V1_0),
        _fsq("fsq_causal_488_32768", _488, 5, _V1_0),
        _fsq("fsq_causal_488_4096", _488, 4, _V1_0),
        _fsq("fsq_causal_41616_262144", _41616, 6, _V1_0),
        _kl("kl_causal_488_4chn", _488, 4, _V1_0),
        _kl("kl_causal_488_8chn", _488, 8, _V1_0),
        _kl("kl_causal_488_16chn", _488, 16, _V1_0),
        _kl("kl_causal_41616_4chn", _41616, 4, _V1_0),
        _kl("kl_causal_444_4chn", _444, 4, _V1_0),
        _kl("kl_causal_288_8chn", _288, 8, _V1_0),
        _fsq("fsq_causal_488_32768_v1_1", _488, 5, _V1_1),
        _fsq("fsq_causal_888_32768_v1_1", _888, 5, _V1_1),
        _fsq("fsq_causal_41616_262144_v1_1", _41616, 6, _V1_1),
        _kl("kl_causal_488_4chn_v1_1", _488, 4, _V1_1),
        _kl("kl_causal_488_16chn_v1_1", _488, 16, _V1_1),
        _kl("kl_causal_41616_16chn_v1_1", _41616, 16, _V1_1),
        _kl("kl_causal_288_8chn_v1_1", _288, 8, _V1_1),
        _fsq("fsq_noncausal_488_262144", _488, 6, _NON_CAUSAL),
        _fsq("fsq_noncausal_41616_262144", _41616, 6, _NON_CAUSAL),
        _kl("kl_noncausal_488_4chn", _488, 4, _NON_CAUSAL),
        _kl("kl_noncausal_488_16chn", _488, 16, _NON_CAUSAL),
        _kl("kl_noncausal_41616_4chn", _41616, 4, _NON_CAUSAL),
        _kl("kl_noncausal_41616_16chn", _41616, 16, _NON_CAUSAL),
        # The ablations of the paper's Table 2: no weights were released.
        _kl("kl_causal_488_4chn_fully_3d", _488, 4, _V1_0, **_FULLY_3D),
        _kl("kl_causal_488_4chn_no_blend", _488, 4, _V1_0, **_NO_BLEND),
        _kl("kl_causal_488_4chn_no_3d", _488, 4, _V1_0, **_NO_3D),
        # For its comparison of quantizers, Table 3: no weights were released. VQ has the channels of FSQ.
        _lfq("lfq_causal_488_262144", _488, 18, _V1_0),
        _vq("vq_causal_488_262144", _488, 262144, 6, _V1_0),
    )
}
