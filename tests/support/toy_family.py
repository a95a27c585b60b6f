"""A second family of tokenizers, as small as one can be: what the pipeline must not know of VidTok.

A clip of 4 frames of 16x16 becomes three payloads: ``structure`` (its mean picture), ``motion`` (how bright each
frame is beside it) and ``tokens`` (the brightness of each frame, in 300 levels).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from vidshard.models.tokenizer import Family, Past
from vidshard.models.vidtok.tiling import Tiling
from vidshard.schemas.tokenizers import TokenizerConfig
from vidshard.schemas.tokens import Payload, PayloadColumn

NUM_FRAMES, SIZE, LEVELS = 4, 16, 300


class ToyConfig(TokenizerConfig):
    """Config of a toy."""

    family: Literal["toy"] = "toy"

    @property
    def is_causal(self) -> bool:
        return False

    @property
    def time_stride(self) -> int:
        return 1

    @property
    def space_stride(self) -> int:
        return 4

    @property
    def codebook_size(self) -> int | None:
        return LEVELS

    @property
    def head_name(self) -> str:
        return "toy"

    @property
    def has_logvar(self) -> bool:
        return False

    @property
    def history_frames(self) -> int:
        return NUM_FRAMES

    @property
    def history_latents(self) -> int:
        return NUM_FRAMES

    @property
    def lookahead_latents(self) -> int:
        return 0

    def latent_frames(self, num_frames: int) -> int:
        if num_frames != NUM_FRAMES:
            raise ValueError(f"{self.name}: clips have {NUM_FRAMES} frames, got {num_frames}")
        return num_frames

    def decoded_frames(self, latent_frames: int) -> int:
        return latent_frames

    def valid_frames(self, num_frames: int) -> int:
        return max(num_frames, NUM_FRAMES)

    def payload(self, num_frames: int, height: int, width: int, *, keep_logvar: bool = False) -> Payload:
        self.latent_frames(num_frames)
        if (height, width) != (SIZE, SIZE) or keep_logvar:
            raise ValueError(f"{self.name}: frames are {SIZE}x{SIZE}, got {height}x{width}")
        return (
            PayloadColumn(name="structure", shape=(3, SIZE // 4, SIZE // 4), dtype="float16"),
            PayloadColumn(name="motion", shape=(NUM_FRAMES,), dtype="float16"),
            PayloadColumn(name="tokens", shape=(NUM_FRAMES,), dtype="uint16", codebook_size=LEVELS),
        )

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        return {"structure": ("structure",), "motion": ("motion", "tokens")}


@dataclass(frozen=True)
class ToyEncoded:
    """Payload of a batch."""

    payload: dict[str, Tensor]
    is_finite: Tensor | None = None

    def near_ties(self, tolerance: float) -> dict[str, Tensor]:
        return {}


class Toy(nn.Module):
    """A tokenizer with one weight."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.gain = nn.Linear(1, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.gain.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.gain.weight.device

    def set_precision(self, dtype: torch.dtype) -> Self:
        self.gain.to(dtype)
        return self

    def encode(self, x_BCTHW: Tensor, *, tiling: Tiling | None = None) -> ToyEncoded:
        x_BCTHW = x_BCTHW.float()
        structure = F.avg_pool2d(x_BCTHW.mean(dim=2), 4)
        bright = x_BCTHW.mean(dim=(1, 3, 4))
        levels = ((bright + 1) / 2 * (LEVELS - 1)).round().int()
        return ToyEncoded(
            {"structure": structure, "motion": bright - bright.mean(dim=1, keepdim=True), "tokens": levels}
        )

    def encode_stream(self, x_BCTHW: Tensor, past: Past = ()) -> tuple[ToyEncoded, Past]:
        raise ValueError(f"{self.config.name} takes whole clips only")

    def decode_payload(
        self,
        payload: Mapping[str, Tensor],
        num_frames: int | None = None,
        *,
        tiling: Tiling | None = None,
        parts: Collection[str] | None = None,
    ) -> Tensor:
        chosen = tuple(self.config.parts if parts is None else parts)
        some = payload[self.config.columns_of(chosen)[0]]
        decoded_BCTHW = torch.zeros(len(some), 3, NUM_FRAMES, SIZE, SIZE, device=self.device)
        if "structure" in chosen:
            decoded_BCTHW = decoded_BCTHW + F.interpolate(payload["structure"].float(), scale_factor=4)[:, :, None]
        if "motion" in chosen:
            decoded_BCTHW = decoded_BCTHW + payload["motion"].float()[:, None, :, None, None]
        return decoded_BCTHW

    def decode_payload_stream(
        self, payload: Mapping[str, Tensor], past: Past = (), *, last: bool = False
    ) -> tuple[Tensor, Past]:
        raise ValueError(f"{self.config.name} takes whole clips only")


def _own_name(name: str, _config: Any) -> str:
    return name


TOY_CONFIG = ToyConfig(name="toy")
TOY = Family(config=ToyConfig, presets={"toy": TOY_CONFIG}, build=Toy, checkpoint_name=_own_name)
