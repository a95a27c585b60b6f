"""VideoTokenizer: clips to tokens or latents and back; its configuration and presets.

A `TokenizerConfig` describes a model completely, `PRESETS` is the table of known ones; `models.weights` fills one
with what it learned. Nothing here knows of video files, shards or Ray.
"""

# B batch, C channels, T frames, H height, W width; a prime in text (T', H', W') is the latent grid

from __future__ import annotations

import difflib
import math
from fractions import Fraction
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from models.autoencoder import ARCHITECTURES, Decoder, Encoder, Past
from models.heads import FSQ, KL, LFQ, VQ, Encoded, Head
from models.layers import TIME_RULES
from models.tiling import Tiling, map_tiles

__all__ = [
    "PRESETS",
    "Encoded",
    "Past",
    "TokenizerConfig",
    "VideoTokenizer",
    "frames_to_input",
    "get_preset",
    "output_to_frames",
]


class TokenizerConfig(BaseModel):
    """A tokenizer, described completely: two equal configs are the same network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    """What people call it; the presets' names follow the released configurations."""
    family: Literal["vidtok"] = "vidtok"
    variant: Literal["causal-v1.0", "causal-v1.1", "non-causal"] = "causal-v1.0"
    """How time is padded and resampled, see `TIME_RULES`. Weights do not tell the causal ones apart: they share names
    and shapes."""
    architecture: Literal["released", "fully-3d", "no-blend", "no-3d"] = "released"
    """Where convolutions see space and time at once, see `ARCHITECTURES`: as released, or an ablation of the paper."""
    head: Literal["fsq", "kl", "lfq", "vq"]
    """What makes tokens, or for KL latents, of what the encoder gives."""
    latent_channels: int = Field(ge=1)
    """Channels that the decoder takes."""
    fsq_levels: tuple[int, ...] = ()
    """FSQ: levels of each latent channel; empty for others."""
    vq_codebook_size: int | None = Field(default=None, ge=2, le=2**31 - 1)
    """VQ: entries of the codebook; None for others. LFQ has 2**latent_channels tokens."""
    base_width: int = Field(default=128, ge=1)
    """Channels of level 0."""
    width_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each level, in units of base_width."""
    encoder_pairs: int = Field(default=2, ge=1)
    """Residual pairs (within frames, then through time) at each encoder level."""
    decoder_pairs: int = Field(default=3, ge=1)
    encoder_space_levels: tuple[int, ...] = (0, 1, 2)
    """Levels after which the encoder halves height and width."""
    encoder_time_levels: tuple[int, ...] = (1, 2)
    """Those of them after which it halves the frames too."""
    decoder_space_levels: tuple[int, ...] = (1, 2, 3)
    """Levels after which the decoder, which runs from the last level to 0, doubles height and width."""
    decoder_time_levels: tuple[int, ...] = (1, 2)
    """Those of them after which it doubles the frames too."""

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
        if not self.width_multipliers or min(self.width_multipliers) < 1:
            raise ValueError(f"{self.name}: width_multipliers must be positive, got {self.width_multipliers}")
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
        return self

    @property
    def is_causal(self) -> bool:
        """Whether no latent depends on frames after its own."""
        return TIME_RULES[self.variant].causal

    @property
    def time_stride(self) -> int:
        """Frames for each latent; the first one of a causal model may stand for fewer."""
        return 1 << len(self.encoder_time_levels)

    @property
    def space_stride(self) -> int:
        """Pixels for each latent, along height and along width."""
        return 1 << len(self.encoder_space_levels)

    @property
    def codebook_size(self) -> int | None:
        """Number of different tokens; None where latents are continuous."""
        by_head = {"fsq": math.prod(self.fsq_levels), "lfq": 2**self.latent_channels, "vq": self.vq_codebook_size}
        return by_head.get(self.head)

    @property
    def has_tokens(self) -> bool:
        """Whether clips become tokens; otherwise continuous latents."""
        return self.codebook_size is not None

    @property
    def token_bits(self) -> float | None:
        """log2 of the codebook size; None where latents are continuous."""
        return math.log2(self.codebook_size) if self.codebook_size is not None else None

    @property
    def history_frames(self) -> int:
        """How many frames before its own last one a latent can depend on, summed over the encoder's layers.

        Encoding that starts at a multiple of time_stride at least this many frames early gives the whole video's
        latents, once those of the early frames are dropped.
        """
        # The same in every architecture: two convolutions over time in a pair or 3D unit, one in the resampling.
        # A causal convolution of three frames looks back two frames of its own rate; at stride 2, one before its own.
        conv, down = (2, 1) if self.is_causal else (1, 0)
        return self._reach(conv, down) + self.time_stride - 1

    @property
    def future_frames(self) -> int:
        """How many frames after its own last one a latent can depend on; 0 in causal models."""
        return 0 if self.is_causal else self._reach(1, 1)

    @property
    def history_latents(self) -> int:
        """How many latents before its own a frame can depend on, summed over the decoder's layers; causal models only.

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
        """How many latents after its own a frame of a causal model depends on."""
        return int(TIME_RULES[self.variant].upsampling == "linear")

    def _reach(self, conv: int, down: int) -> int:
        """Frames that the encoder sees on one side of a latent's own, given what its layers see at their rate."""
        reach = conv  # conv_in
        rate = 1
        for level in range(len(self.width_multipliers)):
            reach += self.encoder_pairs * 2 * conv * rate
            if level in self.encoder_time_levels:
                reach += down * rate
                rate *= 2
        return reach + (2 * 2 + 1) * conv * rate  # two units of the middle block and the output convolution

    def _lengths(self) -> tuple[int, int]:
        """The shortest clip that the model takes, and the step to the next longer ones."""
        return {
            "causal-v1.0": (1, self.time_stride),  # the first frame stands alone
            "causal-v1.1": (1, 1),  # the first latent stands for the frames that the others leave over
            "non-causal": (self.time_stride, self.time_stride),
        }[self.variant]

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip: one for each time_stride frames, and one for what is left over.

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
        """Frames of a clip of so many latents, if nothing else is known: 1 for the first latent of a causal model."""
        return latent_frames * self.time_stride - (self.time_stride - 1 if self.is_causal else 0)

    def valid_frames(self, num_frames: int) -> int:
        """The shortest length that the model takes and that is not below num_frames.

        Raises:
            ValueError: for num_frames below 1.
        """
        if num_frames < 1:
            raise ValueError(f"{self.name}: num_frames must be at least 1, got {num_frames}")
        first, step = self._lengths()
        return first + -(-max(num_frames - first, 0) // step) * step

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, ...]:
        """What is stored of a clip: (T', H', W') tokens, or (C, T', H', W') latents for KL.

        Raises:
            ValueError: for a length or size that the strides do not divide.
        """
        grid = (self.latent_frames(num_frames), self._latent_size("height", height), self._latent_size("width", width))
        return grid if self.has_tokens else (self.latent_channels, *grid)

    def _latent_size(self, axis: str, size: int) -> int:
        stride = self.space_stride
        if size < stride or size % stride:
            below = max(size, 0) // stride * stride
            nearest = " or ".join(str(n) for n in (below, below + stride) if n > 0)
            raise ValueError(f"{self.name}: {axis} must be divisible by {stride}, got {size}; nearest: {nearest}")
        return size // stride


def get_preset(name: str) -> TokenizerConfig:
    """The preset of that name.

    Raises:
        ValueError: listing what there is, nearest names first.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else "."
    raise ValueError(f"unknown tokenizer preset {name!r}{hint} There are: {', '.join(PRESETS)}")


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


def _fsq(name: str, topology: Row, dims: int, variant: Row, **small: object) -> TokenizerConfig:
    head = {"head": "fsq", "latent_channels": dims, "fsq_levels": (8,) * dims}
    return TokenizerConfig.model_validate({"name": name, **head, **topology, **variant, **small})


def _kl(name: str, topology: Row, channels: int, variant: Row, **small: object) -> TokenizerConfig:
    head = {"head": "kl", "latent_channels": channels}
    return TokenizerConfig.model_validate({"name": name, **head, **topology, **variant, **small})


def _lfq(name: str, topology: Row, bits: int, variant: Row, **small: object) -> TokenizerConfig:
    head = {"head": "lfq", "latent_channels": bits}
    return TokenizerConfig.model_validate({"name": name, **head, **topology, **variant, **small})


def _vq(name: str, topology: Row, size: int, channels: int, variant: Row, **small: object) -> TokenizerConfig:
    head = {"head": "vq", "latent_channels": channels, "vq_codebook_size": size}
    return TokenizerConfig.model_validate({"name": name, **head, **topology, **variant, **small})


PRESETS: dict[str, TokenizerConfig] = {
    config.name: config
    for config in (
        # For tests, demos and laptops: no trained weights exist.
        _fsq("tiny", _488, 5, _V1_0, **_TINY),
        _kl("tiny_kl", _488, 4, _V1_0, **_TINY),
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


class VideoTokenizer(nn.Module):
    """A video tokenizer.

    Freshly made it has random weights; `models.weights.load_tokenizer` gives one that is ready to use. Results for a
    clip do not depend on the other clips of its batch nor on its place among them. Encoding and decoding are
    deterministic.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.head: Head = head_of(config)
        widths = [config.base_width * multiplier for multiplier in config.width_multipliers]
        self.encoder = Encoder(
            widths=widths,
            num_pairs=config.encoder_pairs,
            space_levels=config.encoder_space_levels,
            time_levels=config.encoder_time_levels,
            out_channels=self.head.encoder_channels,
            rule=TIME_RULES[config.variant],
            architecture=ARCHITECTURES[config.architecture],
        )
        self.decoder = Decoder(
            widths=widths,
            num_pairs=config.decoder_pairs,
            space_levels=config.decoder_space_levels,
            time_levels=config.decoder_time_levels,
            in_channels=self.head.latent_channels,
            rule=TIME_RULES[config.variant],
            architecture=ARCHITECTURES[config.architecture],
        )

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in; the head computes in float32."""
        return self.encoder.conv_in.conv.weight.dtype

    def encode(self, x_BCTHW: Tensor, *, tiling: Tiling | None = None) -> Encoded:
        """Encode whole clips.

        Args:
            x_BCTHW: floating (B, 3, T, H, W) in [-1, 1], see `frames_to_input`.
            tiling: encode larger frames than this tile by tile, about as well, see `models.tiling`.

        Raises:
            ValueError: for a length, size or tile the strides do not fit, by name, or another shape or dtype.
        """
        self._check_video(x_BCTHW)
        self.config.latent_shape(*x_BCTHW.shape[2:])
        if tiling is not None:
            tiling.check(self.config)
        z_BCTHW = map_tiles(
            lambda tile_BCTHW: self._encode(tile_BCTHW, (), keep_past=False)[0],
            x_BCTHW,
            tiling,
            cell_in=self.config.space_stride,
            cell_out=1,
        )
        return self.head.quantize(z_BCTHW)

    def encode_stream(self, x_BCTHW: Tensor, past: Past = ()) -> tuple[Encoded, Past]:
        """Encode videos piece by piece, in memory that does not grow with their length.

        Args:
            x_BCTHW: as for `encode`. The first chunk has any length that `encode` takes, the later ones have
                multiples of time_stride.
            past: what the previous call returned; empty for the first chunk.

        Returns:
            The chunk's part of what `encode` gives for the whole, and the next chunk's past.

        Raises:
            ValueError: as `encode`, and for a model that is not causal.
        """
        self._check_streams()
        self._check_video(x_BCTHW)
        num_frames, height, width = x_BCTHW.shape[2:]
        stride = self.config.time_stride
        if past and (num_frames < 1 or num_frames % stride):
            raise ValueError(
                f"{self.config.name}: after the first chunk, chunks must have a multiple of {stride} frames, "
                f"got {num_frames}"
            )
        self.config.latent_shape(stride + 1 if past else num_frames, height, width)
        z_BCTHW, next_past = self._encode(x_BCTHW, past, keep_past=True)
        return self.head.quantize(z_BCTHW), next_past

    def _encode(self, x_BCTHW: Tensor, past: Past, *, keep_past: bool) -> tuple[Tensor, Past]:
        """What the head takes."""
        x_BTHWC = x_BCTHW.to(self.dtype).permute(0, 2, 3, 4, 1).contiguous()
        if not past:
            # A first latent that stands for fewer frames than the others is filled with copies of the first frame.
            first_BTHWC = x_BTHWC[:, :1].expand(-1, -x_BTHWC.shape[1] % self.config.time_stride, -1, -1, -1)
            x_BTHWC = torch.cat([first_BTHWC, x_BTHWC], dim=1)
        z_BTHWC, next_past = self.encoder(x_BTHWC, past, keep_past=keep_past)
        return z_BTHWC.permute(0, 4, 1, 2, 3), next_past

    def decode(
        self, tokens_or_latents: Tensor, num_frames: int | None = None, *, tiling: Tiling | None = None
    ) -> Tensor:
        """Decode whole clips, from tokens or from the latents they stand for: bitwise the same.

        Args:
            tokens_or_latents: integer (B, T', H', W') below codebook_size, or floating (B, C, T', H', W').
            num_frames: how many frames the clips had; None for what `decoded_frames` gives. Only v1.1 leaves a
                choice.
            tiling: decode larger frames than this tile by tile, about as well, see `models.tiling`.

        Returns:
            (B, 3, T, H, W) of the model's dtype, about [-1, 1] but not clamped, with T = num_frames.

        Raises:
            ValueError: for another shape, a token outside the codebook, tokens given to a KL model, num_frames that
                do not make so many latents, or a tile that the strides do not fit.
        """
        z_BCTHW = self._latents(tokens_or_latents)
        latent_frames = z_BCTHW.shape[2]
        if num_frames is None:
            num_frames = self.config.decoded_frames(latent_frames)
        elif self.config.latent_frames(num_frames) != latent_frames:
            raise ValueError(
                f"{self.config.name}: {num_frames} frames make {self.config.latent_frames(num_frames)} latent frames, "
                f"got {latent_frames}"
            )
        if tiling is not None:
            tiling.check(self.config)
        x_BCTHW = map_tiles(
            lambda tile_BCTHW: self._decode(tile_BCTHW, (), keep_past=False, last=True)[0],
            z_BCTHW,
            tiling,
            cell_in=1,
            cell_out=self.config.space_stride,
        )
        return x_BCTHW[:, :, -num_frames:]

    def decode_stream(
        self, tokens_or_latents: Tensor, past: Past = (), *, last: bool = False, first_frames: int = 1
    ) -> tuple[Tensor, Past]:
        """Decode videos piece by piece; chunks of any number of latent frames, otherwise as `decode`.

        Causal v1.1 interpolates towards the next latent: the last time_stride - 1 frames of a chunk come with the
        next one, or at once where the chunk is the `last`. Nothing waits for v1.0, nor after the first latent.

        Args:
            past: what the previous call returned; empty for the first chunk.
            last: whether the video ends with this chunk.
            first_frames: how many frames the video's first latent stands for; more than 1 only in v1.1, for a video
                of another length than 1 + a multiple of time_stride.

        Returns:
            The frames that are known by now, and the next chunk's past.

        Raises:
            ValueError: as `decode`, for a model that is not causal, and for other first_frames.
        """
        self._check_streams()
        if self.config.latent_frames(first_frames) != 1:
            raise ValueError(
                f"{self.config.name}: first_frames must be 1 ... {self.config.time_stride}, got {first_frames}"
            )
        x_BCTHW, next_past = self._decode(self._latents(tokens_or_latents), past, keep_past=True, last=last)
        return x_BCTHW if past else x_BCTHW[:, :, self.config.time_stride - first_frames :], next_past

    def _decode(self, z_BCTHW: Tensor, past: Past, *, keep_past: bool, last: bool) -> tuple[Tensor, Past]:
        """All frames, with those that `_encode` put before the video."""
        z_BTHWC = z_BCTHW.to(self.dtype).permute(0, 2, 3, 4, 1).contiguous()
        x_BTHWC, next_past = self.decoder(z_BTHWC, past, keep_past=keep_past, last=last)
        return x_BTHWC.permute(0, 4, 1, 2, 3), next_past

    def _check_streams(self) -> None:
        if not self.config.is_causal:
            raise ValueError(
                f"{self.config.name} is not causal: its latents depend on later frames, so it takes whole clips only; "
                "for streaming choose a causal preset"
            )

    def _check_video(self, x_BCTHW: Tensor) -> None:
        if x_BCTHW.ndim != 5 or x_BCTHW.shape[1] != 3 or x_BCTHW.shape[0] < 1 or not x_BCTHW.is_floating_point():
            raise ValueError(
                f"{self.config.name}: encode takes floating (B, 3, T, H, W) in [-1, 1], got {x_BCTHW.dtype} "
                f"{tuple(x_BCTHW.shape)}; frames_to_input makes it from uint8 (B, T, H, W, 3)"
            )

    def _latents(self, tokens_or_latents: Tensor) -> Tensor:
        shape = tuple(tokens_or_latents.shape)
        if not tokens_or_latents.is_floating_point():
            if len(shape) != 4 or 0 in shape:
                raise ValueError(f"{self.config.name}: tokens must be (B, T', H', W'), got shape {shape}")
            return self.head.tokens_to_latents(tokens_or_latents)
        if len(shape) != 5 or shape[1] != self.config.latent_channels or 0 in shape:
            raise ValueError(
                f"{self.config.name}: latents must be (B, {self.config.latent_channels}, T', H', W'), got shape {shape}"
            )
        return tokens_or_latents


def head_of(config: TokenizerConfig) -> Head:
    """The head that a config describes."""
    if config.head == "fsq":
        return FSQ(config.fsq_levels)
    if config.head == "lfq":
        return LFQ(config.latent_channels)
    if config.head == "vq":
        assert config.vq_codebook_size is not None
        return VQ(config.vq_codebook_size, config.latent_channels)
    return KL(config.latent_channels)


def frames_to_input(frames_BTHWC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turn uint8 (B, T, H, W, 3) in [0, 255] into (B, 3, T, H, W) in [-1, 1], on the same device.

    Raises:
        ValueError: for another dtype or shape.
    """
    if frames_BTHWC.dtype is not torch.uint8 or frames_BTHWC.ndim != 5 or frames_BTHWC.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 (B, T, H, W, 3), got {frames_BTHWC.dtype} {tuple(frames_BTHWC.shape)}")
    return (frames_BTHWC.float() / 127.5 - 1).to(dtype).permute(0, 4, 1, 2, 3)


def output_to_frames(x_BCTHW: Tensor) -> Tensor:
    """Turn floating (B, 3, T, H, W) into uint8 (B, T, H, W, 3), rounded and cut to [0, 255]."""
    frames_BTHWC = (x_BCTHW.permute(0, 2, 3, 4, 1).float() + 1) * 127.5
    return frames_BTHWC.round().clamp(0, 255).to(torch.uint8).contiguous()
