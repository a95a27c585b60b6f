"""The face of the models: what a tokenizer is to the pipeline, its families, and the presets of all of them.

A family is a row of `FAMILIES`. To add one: a folder beside ``vidtok/`` with a config that derives from
`models.config.TokenizerConfig`, a network that is a `Tokenizer`, and a table of presets.
"""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from vidshard.models.config import TokenizerConfig
from vidshard.models.vidtok import config as vidtok_config
from vidshard.models.vidtok.autoencoder import Past
from vidshard.models.vidtok.heads import Encoded
from vidshard.models.vidtok.model import VidTok, checkpoint_name
from vidshard.models.vidtok.tiling import Tiling

__all__ = [
    "FAMILIES",
    "PRESETS",
    "Encoded",
    "EncodedClips",
    "Family",
    "Past",
    "Tokenizer",
    "TokenizerConfig",
    "frames_to_input",
    "get_preset",
    "output_to_frames",
    "parse_config",
]


class EncodedClips(Protocol):
    """Result of encoding a batch of clips."""

    @property
    def payload(self) -> dict[str, Tensor]:
        """A tensor (B, *shape) for each payload column that the model gives, log-variances included."""
        ...

    def near_ties(self, tolerance: float) -> dict[str, Tensor]:
        """For columns of tokens: bool (B, *shape), where a value before rounding lies this near to a tie.

        Args:
            tolerance: in units of one level; another order of summation can flip tokens within it.
        """
        ...


class Tokenizer(Protocol):
    """A video tokenizer, as the pipeline uses it. Encoding and decoding are deterministic.

    Results for a clip do not depend on the other clips of its batch nor on its place among them.
    """

    @property
    def config(self) -> TokenizerConfig:
        """The network, described completely."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the network computes in; quantizers compute in float32."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    def set_precision(self, dtype: torch.dtype) -> Self:
        """Cast what may be computed in another precision, in place."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move the weights."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Weights by name."""
        ...

    def encode(self, x_BCTHW: Tensor, *, tiling: Tiling | None = None) -> EncodedClips:
        """Encode whole clips, floating (B, 3, T, H, W) in [-1, 1].

        Raises:
            ValueError: for a length, size or tile that the model does not take.
        """
        ...

    def encode_stream(self, x_BCTHW: Tensor, past: Past = ()) -> tuple[EncodedClips, Past]:
        """Encode a chunk of videos, given the past that the chunk before gave.

        Raises:
            ValueError: as `encode`, and for a model that takes whole clips only.
        """
        ...

    def decode_payload(
        self, payload: Mapping[str, Tensor], num_frames: int | None = None, *, tiling: Tiling | None = None
    ) -> Tensor:
        """Decode whole clips from payload columns, each (B, *shape), into (B, 3, T, H, W), about [-1, 1].

        Args:
            num_frames: length of the clips; None for what `TokenizerConfig.decoded_frames` gives.

        Raises:
            ValueError: for a column of another shape, or a token outside the codebook.
        """
        ...

    def decode_payload_stream(
        self, payload: Mapping[str, Tensor], past: Past = (), *, last: bool = False
    ) -> tuple[Tensor, Past]:
        """Decode a chunk of videos, given the past that the chunk before gave; ``last`` ends the videos.

        Raises:
            ValueError: as `decode_payload`, and for a model that takes whole clips only.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of tokenizers: how its configs are read, its networks built, its weights named."""

    config: type[TokenizerConfig]
    presets: Mapping[str, TokenizerConfig]
    build: Callable[[Any], torch.nn.Module]
    """Makes a network, which is a `Tokenizer`, with random weights from a config of this family."""
    checkpoint_name: Callable[[str, Any], str]
    """Name that published files give to a weight, from the network's own name for it and the config."""


FAMILIES: dict[str, Family] = {
    "vidtok": Family(
        config=vidtok_config.VidTokConfig,
        presets=vidtok_config.PRESETS,
        build=VidTok,
        checkpoint_name=checkpoint_name,
    ),
}
"""Every family by the tag that its configs carry."""


def _all_presets() -> Iterator[tuple[str, TokenizerConfig]]:
    for family in FAMILIES.values():
        yield from family.presets.items()


PRESETS: dict[str, TokenizerConfig] = dict(_all_presets())
"""Every known model by its name."""


def get_preset(name: str) -> TokenizerConfig:
    """The preset of that name.

    Raises:
        ValueError: listing all presets, nearest names first.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else "."
    raise ValueError(f"unknown tokenizer preset {name!r}{hint} There are: {', '.join(PRESETS)}")


def parse_config(record: Mapping[str, Any]) -> TokenizerConfig:
    """The config that a file or a shard states, as JSON values; older ones state no family and are VidTok's.

    Raises:
        ValueError: an unknown family, or values that are no config of it.
    """
    tag = record.get("family", "vidtok")
    if tag not in FAMILIES:
        raise ValueError(f"unknown tokenizer family {tag!r}; this vidshard knows: {', '.join(FAMILIES)}")
    return FAMILIES[tag].config.model_validate(record)


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
