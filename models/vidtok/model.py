"""VidTok: clips to tokens or latents and back.

`models.vidtok.config` says which networks there are, `models.weights` fills one with trained weights. Nothing here
knows of video files, shards or Ray.
"""

# B batch, C channels, T frames, H height, W width; a prime in text (T', H', W') is the latent grid

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from vidshard.models.vidtok.autoencoder import ARCHITECTURES, Decoder, Encoder, Past, check_video
from vidshard.models.vidtok.config import VidTokConfig
from vidshard.models.vidtok.heads import FSQ, KL, LFQ, VQ, Encoded, Head
from vidshard.models.vidtok.layers import TIME_RULES
from vidshard.models.vidtok.tiling import Tiling, map_tiles


class VidTok(nn.Module):
    """A video tokenizer of the VidTok family.

    A new instance has random weights; `models.weights.load_tokenizer` returns one that is ready to use. Results for a
    clip do not depend on the other clips of its batch nor on its place among them. Encoding and decoding are
    deterministic.
    """

    def __init__(self, config: VidTokConfig) -> None:
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
            bands=config.haar_bands,
            shortcuts=config.shortcuts,
        )
        self.decoder = Decoder(
            widths=widths,
            num_pairs=config.decoder_pairs,
            space_levels=config.decoder_space_levels,
            time_levels=config.decoder_time_levels,
            in_channels=self.head.latent_channels,
            rule=TIME_RULES[config.variant],
            architecture=ARCHITECTURES[config.architecture],
            bands=config.haar_bands,
            shortcuts=config.shortcuts,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the network computes in; the head computes in float32."""
        return self.encoder.conv_in.conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.encoder.conv_in.conv.weight.device

    def set_precision(self, dtype: torch.dtype) -> Self:
        """Cast encoder and decoder; the head stays float32, since a codebook in reduced precision is another one."""
        self.encoder.to(dtype)
        self.decoder.to(dtype)
        return self

    def encode(self, x_BCTHW: Tensor, *, tiling: Tiling | None = None) -> Encoded:
        """Encode whole clips.

        Args:
            x_BCTHW: floating (B, 3, T, H, W) in [-1, 1], see `frames_to_input`.
            tiling: encode larger frames than this tile by tile, about as well, see `models.vidtok.tiling`.

        Raises:
            ValueError: for a length, size or tile the strides do not fit, by name, or another shape or dtype.
        """
        check_video(x_BCTHW, self.config.name)
        self.config.latent_shape(*x_BCTHW.shape[2:])
        if tiling is not None:
            tiling.check(self.config)
        z_BCTHW = map_tiles(
            self.encoder_output,
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
        check_video(x_BCTHW, self.config.name)
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

    def encoder_output(self, x_BCTHW: Tensor, *, recompute: bool = False) -> Tensor:
        """Compute the input of the head for whole clips: (B, encoder_channels, T', H', W').

        Args:
            recompute: recompute activations in the backward pass, see `run_to_features`.
        """
        return self._encode(x_BCTHW, (), keep_past=False, recompute=recompute)[0]

    def _encode(self, x_BCTHW: Tensor, past: Past, *, keep_past: bool, recompute: bool = False) -> tuple[Tensor, Past]:
        """Compute the input of the head for a chunk."""
        x_BTHWC = x_BCTHW.to(self.dtype).permute(0, 2, 3, 4, 1).contiguous()
        if not past:
            # A first latent with fewer frames than the others is filled with copies of the first frame.
            first_BTHWC = x_BTHWC[:, :1].expand(-1, -x_BTHWC.shape[1] % self.config.time_stride, -1, -1, -1)
            x_BTHWC = torch.cat([first_BTHWC, x_BTHWC], dim=1)
        z_BTHWC, next_past = self.encoder(x_BTHWC, past, keep_past=keep_past, recompute=recompute)
        return z_BTHWC.permute(0, 4, 1, 2, 3), next_past

    def decode(
        self, tokens_or_latents: Tensor, num_frames: int | None = None, *, tiling: Tiling | None = None
    ) -> Tensor:
        """Decode whole clips, from tokens or from the latents they stand for: bitwise the same.

        Args:
            tokens_or_latents: integer (B, T', H', W') below codebook_size, or floating (B, C, T', H', W').
            num_frames: how many frames the clips had; None for what `decoded_frames` gives. Only v1.1 leaves a
                choice.
            tiling: decode larger frames than this tile by tile, about as well, see `models.vidtok.tiling`.

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
        """Decode all frames, with those that `_encode` put before the video."""
        z_BTHWC = z_BCTHW.to(self.dtype).permute(0, 2, 3, 4, 1).contiguous()
        x_BTHWC, next_past = self.decoder(z_BTHWC, past, keep_past=keep_past, last=last)
        return x_BTHWC.permute(0, 4, 1, 2, 3), next_past

    def decode_payload(
        self,
        payload: Mapping[str, Tensor],
        num_frames: int | None = None,
        *,
        tiling: Tiling | None = None,
        parts: Collection[str] | None = None,
    ) -> Tensor:
        """Decode whole clips from the columns of shards: ``tokens`` or ``latents``; otherwise as `decode`.

        Raises:
            ValueError: as `decode`; or parts are given, since a VidTok clip has none.
        """
        if parts is not None:
            self.config.columns_of(parts)
        return self.decode(_decodable(payload), num_frames, tiling=tiling)

    def decode_payload_stream(
        self, payload: Mapping[str, Tensor], past: Past = (), *, last: bool = False
    ) -> tuple[Tensor, Past]:
        """Decode videos piece by piece from the columns of shards; otherwise as `decode_stream`."""
        return self.decode_stream(_decodable(payload), past, last=last)

    def _check_streams(self) -> None:
        if not self.config.is_causal:
            raise ValueError(
                f"{self.config.name} is not causal: its latents depend on later frames, so it takes whole clips only; "
                "for streaming choose a causal preset"
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


def _decodable(payload: Mapping[str, Tensor]) -> Tensor:
    return payload["tokens"] if "tokens" in payload else payload["latents"]


def head_of(config: VidTokConfig) -> Head:
    """Make the head that a config describes."""
    if config.head == "fsq":
        return FSQ(config.fsq_levels)
    if config.head == "lfq":
        return LFQ(config.latent_channels)
    if config.head == "vq":
        assert config.vq_codebook_size is not None
        return VQ(config.vq_codebook_size, config.latent_channels)
    return KL(config.latent_channels)


def checkpoint_name(name: str, config: VidTokConfig) -> str:
    """Name that files give to a weight which the network calls ``name``.

    The released non-causal models lack the ``conv`` level below convolutions over time and 1x1x1 ones; causal names
    are the network's own.
    """
    return (
        name
        if config.is_causal
        else re.sub(r"\b(conv|conv_in|conv_out|conv1|conv2|q|k|v|proj_out)\.conv\.", r"\1.", name)
    )
