"""Public interface of the models: the `Tokenizer` protocol, the families, and their presets.

A family is an entry of `FAMILIES`. To add one, make a folder beside ``vidtok/`` with a config that derives from
`schemas.tokenizers.TokenizerConfig`, a network that implements `Tokenizer`, and a table of presets.
"""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from vidshard.models.diffusers_vae import model as diffusers_vae
from vidshard.models.diffusers_vae.config import DiffusersConfig
from vidshard.models.diffusers_vae.derive import check_clip as check_diffusers_clip
from vidshard.models.vidtok import config as vidtok_config
from vidshard.models.vidtok.autoencoder import Past
from vidshard.models.vidtok.heads import Encoded
from vidshard.models.vidtok.model import VidTok, checkpoint_name
from vidshard.models.vidtok.tiling import Tiling
from vidshard.models.vidtwin import config as vidtwin_config
from vidshard.models.vidtwin import model as vidtwin
from vidshard.schemas.tokenizers import TokenizerConfig
from vidshard.schemas.tokens import Normalization
from vidshard.schemas.training import WEIGHT_SUFFIXES

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
        """Tensors (B, *shape) by payload column, log-variances included."""
        ...

    @property
    def is_finite(self) -> Tensor | None:
        """Whether the network's output was finite for each clip, bool (B,); None if the payload itself shows it."""
        ...

    def near_ties(self, tolerance: float) -> dict[str, Tensor]:
        """Masks of rounding ties, bool (B, *shape) by token column: values that lie within the tolerance of a tie.

        Args:
            tolerance: distance in levels; summation in another order can change tokens within it.
        """
        ...


class Tokenizer(Protocol):
    """Interface of a video tokenizer. Encoding and decoding are deterministic.

    The result of a clip depends neither on the other clips of its batch nor on its position in it.
    """

    @property
    def config(self) -> TokenizerConfig:
        """Complete configuration of the network."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the network computes; quantizers compute in float32."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    def set_precision(self, dtype: torch.dtype) -> Self:
        """Cast the network to a dtype in place, except quantizers, which stay float32."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move the weights to a device, in place."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Weights by name."""
        ...

    def encode(self, x_BCTHW: Tensor, *, tiling: Tiling | None = None) -> EncodedClips:
        """Encode whole clips.

        Args:
            x_BCTHW: floating (B, 3, T, H, W) in [-1, 1].
            tiling: tiles for large frames; None for whole frames.

        Raises:
            ValueError: the model does not take this length, size or tile.
        """
        ...

    def encode_stream(self, x_BCTHW: Tensor, past: Past = ()) -> tuple[EncodedClips, Past]:
        """Encode the next chunk of streams.

        Args:
            x_BCTHW: floating (B, 3, T, H, W) in [-1, 1].
            past: state returned with the previous chunk; empty for the first one.

        Returns:
            The encoded chunk, and the state for the next one.

        Raises:
            ValueError: as `encode`; or the model takes whole clips only.
        """
        ...

    def decode_payload(
        self,
        payload: Mapping[str, Tensor],
        num_frames: int | None = None,
        *,
        tiling: Tiling | None = None,
        parts: Collection[str] | None = None,
    ) -> Tensor:
        """Decode whole clips to floating (B, 3, T, H, W), approximately in [-1, 1].

        Args:
            payload: payload columns by name, each (B, *shape). Columns of different parts may come from different
                clips; log-variances are ignored.
            num_frames: length of the clips; None for `TokenizerConfig.decoded_frames`.
            tiling: tiles for large frames; None for whole frames.
            parts: names of `TokenizerConfig.parts` to decode alone; None for all columns.

        Raises:
            ValueError: a column has another shape or is missing, a token is outside the codebook, or the model has
                no such part.
        """
        ...

    def decode_payload_stream(
        self, payload: Mapping[str, Tensor], past: Past = (), *, last: bool = False
    ) -> tuple[Tensor, Past]:
        """Decode the next chunk of streams.

        Args:
            payload: payload columns by name, each (B, *shape).
            past: state returned with the previous chunk; empty for the first one.
            last: whether this chunk ends the streams.

        Returns:
            The decoded frames, floating (B, 3, T, H, W), and the state for the next chunk.

        Raises:
            ValueError: as `decode_payload`; or the model takes whole clips only.
        """
        ...


def _no_tables(_config: Any) -> Mapping[str, Tensor]:
    return {}


def _untold(_shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
    return {}


def _any_clip(_config: Any, _num_frames: int, _height: int, _width: int) -> None:
    """Accept a clip: the config alone decides."""


def _raw(_config: Any, _weights: Mapping[str, Tensor]) -> Normalization | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """Family of tokenizers: config class, presets, network, and weight names."""

    config: type[TokenizerConfig]
    presets: Mapping[str, TokenizerConfig]
    """Presets by name."""
    build: Callable[[Any], torch.nn.Module]
    """Function from a config of this family to a network with random weights, which implements `Tokenizer`."""
    checkpoint_name: Callable[[str, Any], str]
    """Function from the network's name of a weight, and the config, to its name in published files."""
    fixed_tables: Callable[[Any], Mapping[str, Tensor]] = _no_tables
    """Function from a config to the entries of the weights that are computed instead of learned, by the network's
    names. Files hold them too, and they must agree."""
    latents_in: Callable[[Mapping[str, tuple[int, ...]]], Mapping[str, tuple[int, ...]]] = _untold
    """Function from the shapes of a file's entries to the shapes of a clip's latents by payload column; empty if they
    do not tell."""
    suffixes: tuple[str, ...] = WEIGHT_SUFFIXES
    """Suffixes of the weights files that are taken."""
    is_no_weight: Callable[[str], bool] = lambda _name: False
    """Function from a name in a published file to whether it is no weight and left out."""
    check_clip: Callable[[Any, int, int, int], None] = _any_clip
    """Function that raises ValueError where a network of this config does not take (frames, height, width) although
    the config does."""
    normalization: Callable[[Any, Mapping[str, Tensor]], Normalization | None] = _raw
    """Function from a config and its weights to the numbers by which trainers standardize its latents."""


FAMILIES: dict[str, Family] = {
    "vidtok": Family(
        config=vidtok_config.VidTokConfig,
        presets=vidtok_config.PRESETS,
        build=VidTok,
        checkpoint_name=checkpoint_name,
    ),
    "vidtwin": Family(
        config=vidtwin_config.VidTwinConfig,
        presets=vidtwin_config.PRESETS,
        build=vidtwin.VidTwin,
        checkpoint_name=vidtwin.checkpoint_name,
        fixed_tables=vidtwin.fixed_tables,
        latents_in=vidtwin.latents_in,
    ),
    "diffusers": Family(
        config=DiffusersConfig,
        presets={},
        build=diffusers_vae.DiffusersVae,
        checkpoint_name=diffusers_vae.checkpoint_name,
        suffixes=(".safetensors",),
        is_no_weight=diffusers_vae.is_counter,
        check_clip=check_diffusers_clip,
        normalization=diffusers_vae.normalization_of,
    ),
}
"""All families by the ``family`` tag of their configs."""


def _all_presets() -> Iterator[tuple[str, TokenizerConfig]]:
    for family in FAMILIES.values():
        yield from family.presets.items()


PRESETS: dict[str, TokenizerConfig] = dict(_all_presets())
"""All presets of all families by name."""


def get_preset(name: str) -> TokenizerConfig:
    """Look up a preset by name.

    Raises:
        ValueError: there is no such preset; the message lists all, and the nearest names first.
    """
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(near)}?" if near else "."
    raise ValueError(f"unknown tokenizer preset {name!r}{hint} There are: {', '.join(PRESETS)}")


def parse_config(record: Mapping[str, Any]) -> TokenizerConfig:
    """Parse the config of a file or a shard.

    Args:
        record: JSON values of the config; without ``family``, as in older ones, the family is ``vidtok``.

    Raises:
        ValueError: the family is unknown, or the values are not a valid config of it.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"a tokenizer config is an object, got a {type(record).__name__}")
    tag = record.get("family", "vidtok")
    if not isinstance(tag, str) or tag not in FAMILIES:
        raise ValueError(f"unknown tokenizer family {tag!r:.80}; this vidshard knows: {', '.join(FAMILIES)}")
    return FAMILIES[tag].config.model_validate(record)


def frames_to_input(frames_BTHWC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert uint8 (B, T, H, W, 3) in [0, 255] to ``dtype`` (B, 3, T, H, W) in [-1, 1], on the same device.

    Raises:
        ValueError: the frames have another dtype or shape.
    """
    if frames_BTHWC.dtype is not torch.uint8 or frames_BTHWC.ndim != 5 or frames_BTHWC.shape[-1] != 3:
        raise ValueError(f"frames must be uint8 (B, T, H, W, 3), got {frames_BTHWC.dtype} {tuple(frames_BTHWC.shape)}")
    return (frames_BTHWC.float() / 127.5 - 1).to(dtype).permute(0, 4, 1, 2, 3)


def output_to_frames(x_BCTHW: Tensor) -> Tensor:
    """Convert floating (B, 3, T, H, W), nominally in [-1, 1], to uint8 (B, T, H, W, 3), rounded and clipped."""
    frames_BTHWC = (x_BCTHW.permute(0, 2, 3, 4, 1).float() + 1) * 127.5
    return frames_BTHWC.round().clamp(0, 255).to(torch.uint8).contiguous()
