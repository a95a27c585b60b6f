"""VidTwin: clips to a structure latent and two dynamics latents, and back: whole, by part, or crossed.

`models.vidtwin.config` says which networks there are, `models.weights` fills one with trained weights. Nothing here
knows of video files, shards or Ray.
"""

# B batch, C channels, T frames, H height, W width, S positions of a frame

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor, nn

from vidshard.models.vidtok.autoencoder import Past, check_video
from vidshard.models.vidtok.tiling import Tiling
from vidshard.models.vidtwin.branches import Branch, branches
from vidshard.models.vidtwin.config import VidTwinConfig
from vidshard.models.vidtwin.transformer import Decoder, Encoder, is_recorded, position_tables


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Moments:
    """Gaussian posterior of one latent of a batch of clips."""

    mean: Tensor
    """float32 (B, *shape), channels last."""
    logvar: Tensor
    """float32 (B, *shape), in [-30, 20]."""

    @classmethod
    def of(cls, moments: Tensor) -> Self:
        """Split a branch's output along its last axis, in float32."""
        mean, logvar = moments.float().chunk(2, dim=-1)
        return cls(mean=mean, logvar=logvar.clamp(-30.0, 20.0))

    def kl(self) -> Tensor:
        """Divergence from N(0, 1), in nats per clip: a sum over the values, a mean over the batch."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum() / self.mean.shape[0]

    def sample(self, noise: Tensor) -> Tensor:
        """Sample of the posterior, from noise N(0, 1) shaped like the mean."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedTwins:
    """Result of encoding a batch of clips."""

    moments: dict[str, Moments]
    """Moments by payload column: ``structure``, ``dynamics_x``, ``dynamics_y``."""

    @property
    def payload(self) -> dict[str, Tensor]:
        """Columns of a shard: the mean of each latent, and its log-variance under ``..._logvar``."""
        means = {name: latent.mean for name, latent in self.moments.items()}
        return means | {f"{name}_logvar": latent.logvar for name, latent in self.moments.items()}

    @property
    def is_finite(self) -> None:
        """None: a value that is not finite shows in the latents themselves."""

    def near_ties(self, tolerance: float) -> dict[str, Tensor]:  # noqa: ARG002 - nothing is rounded to tokens
        """Empty: there are no tokens."""
        return {}


class VidTwin(nn.Module):
    """A video tokenizer of the VidTwin family.

    A new instance has random weights; `models.weights.load_tokenizer` returns one that is ready to use. Encoding and
    decoding are deterministic: latents are means. The original samples, and so do we, in training only.
    """

    def __init__(self, config: VidTwinConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.branches = nn.ModuleDict(branches(config))
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; residuals and norms are float32 at least, and latents are float32."""
        return self.encoder.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.encoder.x_embedder.proj.weight.device

    def set_precision(self, dtype: torch.dtype) -> Self:
        """Cast the weights in place; position codes stay float64."""
        return self.to(dtype)

    def encode(self, x_BCTHW: Tensor, *, tiling: Tiling | None = None) -> EncodedTwins:
        """Encode whole clips.

        Args:
            x_BCTHW: floating (B, 3, T, H, W) in [-1, 1], of the config's length and size.
            tiling: None; the model takes whole frames only.

        Raises:
            ValueError: the clips have another shape or dtype, or tiling is given.
        """
        self._check_video(x_BCTHW)
        self._refuse_tiling(tiling)
        return EncodedTwins(moments=self.moments(x_BCTHW))

    def moments(self, x_BCTHW: Tensor, *, recompute: bool = False) -> dict[str, Moments]:
        """Compute the moments of each latent by payload column, with gradients.

        Args:
            x_BCTHW: as for `encode`.
            recompute: recompute the encoder's activations in the backward pass.
        """
        if self._one_by_one(x_BCTHW):
            each = [self.moments(clip) for clip in x_BCTHW.chunk(x_BCTHW.shape[0])]
            return {
                name: Moments(
                    mean=torch.cat([latents[name].mean for latents in each]),
                    logvar=torch.cat([latents[name].logvar for latents in each]),
                )
                for name in each[0]
            }
        z_BTSC = self.encoder(x_BCTHW.to(self.dtype), recompute=recompute).to(self.dtype)
        moments: dict[str, Tensor] = {}
        for branch in self.branches.values():
            moments |= cast(Branch, branch).moments(z_BTSC)
        return {name: Moments.of(value) for name, value in moments.items()}

    def encode_stream(
        self,
        x_BCTHW: Tensor,  # noqa: ARG002
        past: Past = (),  # noqa: ARG002
    ) -> tuple[EncodedTwins, Past]:
        """Refuse: the model takes whole clips only."""
        raise ValueError(self._whole_clips)

    def aligned(self, latents: Mapping[str, Tensor], parts: Collection[str] | None = None) -> dict[str, Tensor]:
        """Turn latents into the decoder's tokens, by part; the decoder's input is their sum.

        Args:
            latents: latents by payload column, floating (B, *shape).
            parts: names of `VidTwinConfig.parts`; None for all.

        Returns:
            Tensors (B, T, S, C) by part.

        Raises:
            ValueError: a part is unknown, or one of its columns is missing or has another shape.
        """
        columns = self._columns_of(parts)
        self._check_latents(latents, columns)
        # Contiguous: kernels round differently where strides differ, as between a fresh mean and a stored one.
        typed = {name: latents[name].to(self.dtype).contiguous() for name in columns}
        return {
            name: cast(Branch, branch).align(typed)
            for name, branch in self.branches.items()
            if parts is None or name in parts
        }

    def decode(
        self, latents: Mapping[str, Tensor], *, parts: Collection[str] | None = None, recompute: bool = False
    ) -> Tensor:
        """Decode latents, with gradients.

        Structure and dynamics may come from different clips (cross-reenactment).

        Args:
            latents: latents by payload column, floating (B, *shape).
            parts: parts to decode alone; None for all. The others add nothing to the decoder's input.
            recompute: recompute the decoder's activations in the backward pass.

        Returns:
            (B, 3, T, H, W) of the weights' dtype, about [-1, 1] but not clamped.

        Raises:
            ValueError: as `aligned`.
        """
        columns = self._columns_of(parts)
        self._check_latents(latents, columns)
        latents = {name: latents[name] for name in columns}
        if self._one_by_one(*latents.values()):
            clips = zip(*(batch.chunk(batch.shape[0]) for batch in latents.values()), strict=True)
            return torch.cat([self.decode(dict(zip(latents, clip, strict=True)), parts=parts) for clip in clips])
        u_BTSC = sum_of(self.aligned(latents, parts))
        x_BTHWC: Tensor = self.decoder(u_BTSC, recompute=recompute)
        return x_BTHWC.permute(0, 4, 1, 2, 3)

    def decode_payload(
        self,
        payload: Mapping[str, Tensor],
        num_frames: int | None = None,
        *,
        tiling: Tiling | None = None,
        parts: Collection[str] | None = None,
    ) -> Tensor:
        """Decode whole clips from the columns of shards, which may be those of different clips; as `decode`.

        Raises:
            ValueError: as `decode`; or num_frames is not the model's, or tiling is given.
        """
        self._refuse_tiling(tiling)
        if num_frames is not None:
            self.config.latent_frames(num_frames)
        return self.decode({name: payload[name] for name in self._columns_of(parts) if name in payload}, parts=parts)

    def decode_payload_stream(
        self,
        payload: Mapping[str, Tensor],  # noqa: ARG002
        past: Past = (),  # noqa: ARG002
        *,
        last: bool = False,  # noqa: ARG002
    ) -> tuple[Tensor, Past]:
        """Refuse: the model takes whole clips only."""
        raise ValueError(self._whole_clips)

    def _columns_of(self, parts: Collection[str] | None) -> tuple[str, ...]:
        return tuple(self.config.latent_shapes) if parts is None else self.config.columns_of(parts)

    @property
    def _whole_clips(self) -> str:
        return f"{self.config.name} takes whole clips of {self.config.num_frames} frames only, no streams"

    def _one_by_one(self, *batches: Tensor) -> bool:
        """Whether clips are computed one by one: on a CPU without gradients.

        A batch gains nothing there, and kernels sum in an order that depends on its size.
        """
        on_cpu = all(batch.device.type == "cpu" and batch.shape[0] > 1 for batch in batches)
        return on_cpu and not is_recorded(*batches, *self.parameters())

    def _check_video(self, x_BCTHW: Tensor) -> None:
        check_video(x_BCTHW, self.config.name)
        self.config.check_clip(*x_BCTHW.shape[2:])

    def _check_latents(self, latents: Mapping[str, Tensor], columns: Collection[str]) -> None:
        expected = self.config.latent_shapes
        for name in columns:
            if name not in latents:
                there = ", ".join(latents) or "none"
                raise ValueError(f"{self.config.name}: the latents lack {name}; there are {there}")
            given = tuple(latents[name].shape)
            if given[1:] != expected[name] or 0 in given or not latents[name].is_floating_point():
                shape = ", ".join(map(str, expected[name]))
                raise ValueError(
                    f"{self.config.name}: {name} must be floating (B, {shape}), got {latents[name].dtype} {given}"
                )
        counts = {name: latents[name].shape[0] for name in columns}
        if len(set(counts.values())) > 1:
            of_each = ", ".join(f"{count} of {name}" for name, count in counts.items())
            raise ValueError(f"{self.config.name}: all latents must be of the same number of clips, got {of_each}")

    def _refuse_tiling(self, tiling: Tiling | None) -> None:
        if tiling is not None:
            tiling.check(self.config)


def sum_of(aligned: Mapping[str, Tensor]) -> Tensor:
    """Sum the aligned parts: the decoder's input."""
    total: Tensor | None = None
    for tokens in aligned.values():
        total = tokens if total is None else total + tokens
    assert total is not None
    return total


def checkpoint_name(name: str, config: VidTwinConfig) -> str:  # noqa: ARG001 - the rule of another family needs it
    """Name that files give to a weight which the network calls ``name``: they have no level for the branch."""
    return re.sub(r"^branches\.\w+\.", "", name)


def fixed_tables(config: VidTwinConfig) -> dict[str, Tensor]:
    """Compute the entries of the weights that are not learned: the position codes, float64, by the network's names."""
    return {
        f"{part}.{name}": table
        for part in ("encoder", "decoder")
        for name, table in position_tables(config).items()  # computed for each, since files refuse shared memory
    }


def latents_in(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Tell the latent shapes of a clip from the shapes of a file's entries, by payload column.

    Args:
        shapes: shapes by name in the file.

    Returns:
        Shapes as `VidTwinConfig.latent_shapes`; empty for a file that is not of the released architecture.
    """
    try:
        num_frames, num_queries, _ = shapes["cont_emb.2.weight"]
        _, num_positions, _ = shapes["encoder.pos_embed"]
        structure_channels, dynamics_channels = (
            shapes[name][0] // 2 for name in ("bottle_down.weight", "motion_head.weight")
        )
    except (KeyError, ValueError, IndexError):
        return {}

    def size(module: str) -> int:
        halvings = sum(bool(re.fullmatch(rf"{module}\.\d+\.weight", name)) for name in shapes)
        return -(-math.isqrt(num_positions) // (1 << halvings))

    structure = size("content_downsample_blocks")
    dynamics = (num_frames, size("downsample_motion_module"), dynamics_channels)
    return {
        "structure": (num_queries, structure, structure, structure_channels),
        "dynamics_x": dynamics,
        "dynamics_y": dynamics,
    }
