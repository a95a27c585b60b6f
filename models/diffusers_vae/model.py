"""Autoencoders of diffusers behind the `Tokenizer` protocol.

Latents are the raw mean of the posterior; trainers scale them by the numbers of `normalization_of`. Every pass has one
clip, because batching changes the last bits of most classes.
"""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from vidshard.models.diffusers_vae.config import DiffusersConfig
from vidshard.models.diffusers_vae.library import build_network, parameters_of
from vidshard.models.diffusers_vae.streams import Caches, decode_chunk, encode_chunk
from vidshard.models.vidtok.autoencoder import Past
from vidshard.models.vidtok.tiling import Tiling
from vidshard.schemas.tokens import Normalization


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EncodedLatents:
    """Result of encoding a batch of clips."""

    mean: Tensor
    """float32 (B, C, T', H', W')."""
    logvar: Tensor | None
    """float32, shaped like the mean, in [-30, 20]; None where the class gives none."""

    @property
    def payload(self) -> dict[str, Tensor]:
        """Columns ``latents`` and, where there is one, ``latents_logvar``."""
        logvar = {} if self.logvar is None else {"latents_logvar": self.logvar}
        return {"latents": self.mean, **logvar}

    @property
    def is_finite(self) -> None:
        """None: a value that is not finite shows in the latents themselves."""

    def near_ties(self, tolerance: float) -> dict[str, Tensor]:  # noqa: ARG002 - nothing is rounded to tokens
        """Empty: there are no tokens."""
        return {}


class DiffusersVae(nn.Module):
    """An autoencoder of diffusers; a new instance has no weights.

    The classes keep caches in the network during a pass, so that an instance serves one thread.
    """

    def __init__(self, config: DiffusersConfig) -> None:
        super().__init__()
        self.config = config
        self.vae = build_network(config.class_name, config.settings, config.flags)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights; latents are float32."""
        return next(self.vae.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.vae.parameters()).device

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Weights by their published names, counters of training left out."""
        return {name: tensor for name, tensor in self.vae.state_dict(*args, **kwargs).items() if not is_counter(name)}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights by their published names."""
        counters = {name: torch.zeros((), dtype=torch.int64) for name in self.vae.state_dict() if is_counter(name)}
        return self.vae.load_state_dict(counters | dict(state_dict), strict=strict, assign=assign)

    def set_precision(self, dtype: torch.dtype) -> Self:
        """Cast the network in place.

        Raises:
            ValueError: the class keeps parts of the network in float32.
        """
        if self.config.row.float32_only and dtype is not torch.float32:
            raise ValueError(f"{self.config.class_name} computes in float32 only: give --precision float32")
        return self.to(dtype)

    def encode(self, x_BCTHW: Tensor, *, tiling: Tiling | None = None) -> EncodedLatents:
        """Encode whole clips, one by one.

        Args:
            x_BCTHW: floating (B, 3, T, H, W) in [-1, 1].
            tiling: None; the classes have tiles of their own.

        Raises:
            ValueError: the class does not take this length or size, or tiling is given.
        """
        self._refuse_tiling(tiling)
        shape = self._check_video(x_BCTHW)
        return self._encoded([self._checked(self.moments(clip), shape) for clip in torch.split(x_BCTHW, 1)])

    def encode_stream(self, x_BCTHW: Tensor, past: Past = ()) -> tuple[EncodedLatents, Past]:
        """Encode the next chunk of streams, clip by clip.

        Args:
            x_BCTHW: floating (B, 3, T, H, W) in [-1, 1]; T is 1 + a multiple of 4 at the start, a multiple of 4 later.
            past: state returned with the previous chunk; empty for the first one.

        Raises:
            ValueError: as `encode`; or the class takes whole clips only.
        """
        self._refuse_streams()
        pasts = cast("tuple[Caches, ...]", past) or ((),) * len(x_BCTHW)
        done = [
            encode_chunk(self.vae, self._pixels(x), each)
            for x, each in zip(torch.split(x_BCTHW, 1), pasts, strict=True)
        ]
        chunks = [_split(moments) for moments, _ in done]
        return self._encoded(chunks), cast(Past, tuple(caches for _, caches in done))

    def moments(self, x_BCTHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and log-variance of one clip (1, 3, T, H, W), each (1, C, T', H', W'), of the weights' dtype."""
        row = self.config.row
        x_BCTHW = self._pixels(x_BCTHW)
        if row.streams:
            return _split(encode_chunk(self.vae, x_BCTHW, ())[0])
        x = x_BCTHW.transpose(1, 2).flatten(0, 1) if row.frames_are_images else x_BCTHW
        output = cast(Any, self.vae).encode(x)
        if hasattr(output, "latent_dist"):
            mean = output.latent_dist.mode()
            logvar = output.latent_dist.logvar if row.has_logvar else None
        else:
            mean, logvar = output.latents if hasattr(output, "latents") else output.latent, None
        if row.frames_are_images:
            mean, logvar = (None if value is None else value.transpose(0, 1)[None] for value in (mean, logvar))
        return mean, logvar

    def decode_payload(
        self,
        payload: Mapping[str, Tensor],
        num_frames: int | None = None,
        *,
        tiling: Tiling | None = None,
        parts: Collection[str] | None = None,
    ) -> Tensor:
        """Decode whole clips, one by one, to floating (B, 3, T, H, W).

        Raises:
            ValueError: the latents have another shape, no clip of ``num_frames`` has as many, or tiles or parts are
                asked for.
        """
        self._refuse_tiling(tiling)
        if parts is not None:
            self.config.columns_of(parts)
        z_BCTHW = self._check_latents(payload)
        num_frames = self.config.decoded_frames(z_BCTHW.shape[2]) if num_frames is None else num_frames
        if self.config.latent_frames(num_frames) != z_BCTHW.shape[2]:
            raise ValueError(
                f"{self.config.name}: {num_frames} frames have {self.config.latent_frames(num_frames)} latent frames, "
                f"got {z_BCTHW.shape[2]}"
            )
        decoded = torch.cat([self.frames(latents, num_frames) for latents in torch.split(z_BCTHW, 1)])
        if decoded.shape[2] != num_frames:
            raise ValueError(f"{self.config.name}: decoding gave {decoded.shape[2]} frames of {num_frames}")
        return decoded

    def decode_payload_stream(
        self,
        payload: Mapping[str, Tensor],
        past: Past = (),
        *,
        last: bool = False,  # noqa: ARG002 - none looks ahead
    ) -> tuple[Tensor, Past]:
        """Decode the next chunk of streams, clip by clip.

        Raises:
            ValueError: as `decode_payload`; or the class takes whole clips only.
        """
        self._refuse_streams()
        z_BCTHW = self._check_latents(payload).to(self.dtype)
        pasts = cast("tuple[Caches, ...]", past) or ((),) * len(z_BCTHW)
        done = [decode_chunk(self.vae, z, each) for z, each in zip(torch.split(z_BCTHW, 1), pasts, strict=True)]
        return torch.cat([frames for frames, _ in done]), cast(Past, tuple(caches for _, caches in done))

    def frames(self, z_BCTHW: Tensor, num_frames: int) -> Tensor:
        """Frames (1, 3, T, H, W) of the latents of one clip, in [-1, 1] or about."""
        row = self.config.row
        z_BCTHW = z_BCTHW.to(self.dtype).contiguous()
        if row.streams:
            return decode_chunk(self.vae, z_BCTHW, ())[0]
        vae = cast(Any, self.vae)
        if row.frames_are_images:
            images = z_BCTHW.transpose(1, 2).flatten(0, 1).contiguous()
            together = {"num_frames": num_frames} if row.decodes_frames_together else {}
            x_BCTHW = vae.decode(images, **together).sample.transpose(0, 1)[None]
        else:
            x_BCTHW = vae.decode(z_BCTHW).sample
            if row.decodes_time_first:
                x_BCTHW = x_BCTHW.transpose(1, 2)
        if row.pixels is None:
            return cast(Tensor, x_BCTHW)
        mean, std = _table(row.pixels[0], x_BCTHW), _table(row.pixels[1], x_BCTHW)
        return cast(Tensor, (x_BCTHW * std + mean) * 2 - 1)

    def _pixels(self, x_BCTHW: Tensor) -> Tensor:
        """Convert pixels in [-1, 1] to those of the class, of the weights' dtype."""
        row = self.config.row
        if row.pixels is not None:
            x_BCTHW = x_BCTHW.float()
            x_BCTHW = ((x_BCTHW + 1) / 2 - _table(row.pixels[0], x_BCTHW)) / _table(row.pixels[1], x_BCTHW)
        return x_BCTHW.to(self.dtype).contiguous()

    def _encoded(self, clips: Sequence[tuple[Tensor, Tensor | None]]) -> EncodedLatents:
        logvars = [logvar.float() for _, logvar in clips if logvar is not None]
        return EncodedLatents(
            mean=torch.cat([mean.float() for mean, _ in clips]),
            logvar=torch.cat(logvars) if logvars and self.config.has_logvar else None,
        )

    def _check_video(self, x_BCTHW: Tensor) -> tuple[int, ...]:
        if not x_BCTHW.is_floating_point() or x_BCTHW.ndim != 5 or x_BCTHW.shape[1] != 3:
            raise ValueError(f"clips are floating (B, 3, T, H, W), got {x_BCTHW.dtype} {tuple(x_BCTHW.shape)}")
        return self.config.payload(*x_BCTHW.shape[2:])[0].shape

    def _checked(self, moments: tuple[Tensor, Tensor | None], shape: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """Refuse latents of another shape than the config says, as of a class that another version changed."""
        if tuple(moments[0].shape[1:]) != shape:
            raise ValueError(f"{self.config.name}: latents should be {shape}, got {tuple(moments[0].shape[1:])}")
        return moments

    def _check_latents(self, payload: Mapping[str, Tensor]) -> Tensor:
        z_BCTHW = payload.get("latents")
        if z_BCTHW is None or z_BCTHW.ndim != 5 or z_BCTHW.shape[1] != self.config.latent_channels:
            found = "none" if z_BCTHW is None else str(tuple(z_BCTHW.shape))
            wanted = f"(B, {self.config.latent_channels}, T', H', W')"
            raise ValueError(f"{self.config.name}: latents are {wanted}, got {found}")
        return z_BCTHW

    def _refuse_tiling(self, tiling: Tiling | None) -> None:
        if tiling is not None:
            raise ValueError(f"{self.config.name} takes whole frames only, no tiles")

    def _refuse_streams(self) -> None:
        if self.config.why_no_streams is not None:
            raise ValueError(self.config.why_no_streams)


def is_counter(name: str) -> bool:
    """Whether an entry of the weights counts training steps, which nothing here needs."""
    return name.endswith("num_batches_tracked")


def checkpoint_name(name: str, _config: DiffusersConfig) -> str:
    """Name of a weight in published files: the network's own."""
    return name


def normalization_of(config: DiffusersConfig, weights: Mapping[str, Tensor]) -> Normalization | None:
    """Numbers by which trainers standardize the latents; None where the class has none.

    Raises:
        ValueError: the numbers of the config are not those of its latents.
    """
    scaling = config.row.scaling
    settings = parameters_of(config.class_name) | config.settings

    def number(name: str, default: float) -> float:
        value = settings.get(name)
        return default if value is None else float(value)

    def numbers(name: str) -> tuple[float, ...] | None:
        if scaling.in_weights:
            return tuple(float(value) for value in weights[name].flatten()) if name in weights else None
        value = settings.get(name)
        return None if value is None else tuple(float(each) for each in value)

    mean, std = numbers(scaling.mean), numbers(scaling.std)
    scale, shift = number(scaling.scale, 1.0), number(scaling.shift, 0.0)
    if mean is None and std is None and (scale, shift) == (1.0, 0.0):
        return None
    return Normalization.of(channels=config.latent_channels, mean=mean, std=std, scale=scale, shift=shift)


def _split(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean, logvar = moments.chunk(2, dim=1)
    return mean, logvar.clamp(-30.0, 20.0)


def _table(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1, 1)
