"""Base class of the tokenizer configs of all families.

A config describes a network completely, including the clip lengths that it takes and the payload of a clip. The
pipeline uses only this base class; each family derives its own (`models.vidtok.config.VidTokConfig`). Configs hold no
weights and compute nothing.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, Final, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from vidshard.schemas.tokens import Payload

IDENTITY_WHEN_SET: Final[dict[str, Any]] = {"identity": "when set"}
"""Mark (``json_schema_extra``) of a field that is part of a tokenizer's identity only if it differs from its default,
so that outputs from before the field existed keep their identity."""


class ClipShape(NamedTuple):
    """Length of a clip in frames, and size of a frame in pixels."""

    num_frames: int
    height: int
    width: int


class TokenizerConfig(BaseModel, ABC):
    """Base class of tokenizer configs: two equal configs describe the same network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, max_length=200)
    """Name of the model; names of presets follow the released configurations."""
    family: str
    """Tag of the family: a key of `models.tokenizer.FAMILIES`."""

    @property
    def identity(self) -> dict[str, Any]:
        """Fields that decide what a token means, as JSON values."""
        record: dict[str, Any] = json.loads(self.model_dump_json())
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("identity") == "when set" and record[name] == field.default:
                del record[name]
        return record

    @property
    @abstractmethod
    def is_causal(self) -> bool:
        """Whether latents depend on no later frames. Only causal models encode streams, see `why_no_streams`."""

    @property
    def why_no_streams(self) -> str | None:
        """Reason why a video cannot be encoded as one stream, a sentence that names the model; None if it can."""
        if self.is_causal:
            return None
        return f"{self.name} is not causal: its latents depend on later frames, so no video is encoded piece by piece"

    @property
    def libraries(self) -> tuple[str, ...]:
        """Packages beside torch that compute its latents, whose versions the provenance records."""
        return ()

    @property
    def default_precision(self) -> str | None:
        """Precision of a run that names none; None for the default of the device."""
        return None

    @property
    @abstractmethod
    def time_stride(self) -> int:
        """Number of frames per latent; the first latent of a causal model may cover fewer."""

    @property
    @abstractmethod
    def space_stride(self) -> int:
        """Number of pixels per latent, along height and along width."""

    @property
    @abstractmethod
    def codebook_size(self) -> int | None:
        """Number of different tokens; None for continuous latents."""

    @property
    @abstractmethod
    def head_name(self) -> str:
        """Kind of latents in one word, for display, such as ``fsq`` or ``kl``."""

    @property
    @abstractmethod
    def has_logvar(self) -> bool:
        """Whether the model gives a log-variance beside its latents."""

    @property
    def default_clip(self) -> ClipShape:
        """Clip of a run that names no length and no size."""
        return ClipShape(num_frames=17 if self.is_causal else 16, height=256, width=256)

    @property
    def compression_rate(self) -> float:
        """Number of values of a default clip's tokens or latents over the number of its pixels' color values."""
        payload = self.payload(*self.default_clip)
        return sum(column.num_values for column in payload) / (3 * math.prod(self.default_clip))

    @property
    def takes_tiles(self) -> bool:
        """Whether frames can be encoded and decoded in tiles."""
        return True

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Parts of a payload that can be decoded alone, or be replaced by those of another clip.

        Payload columns by name of the part; empty for a family whose clips are decoded whole only.
        """
        return {}

    def columns_of(self, parts: Collection[str]) -> tuple[str, ...]:
        """Payload columns of some parts.

        Raises:
            ValueError: a part is unknown, or none is given; the message lists all parts.
        """
        unknown = [part for part in parts if part not in self.parts]
        if unknown or not parts:
            given = f"no part {unknown[0]!r:.80}" if unknown else "no part is given"
            has = f"there are: {', '.join(self.parts)}" if self.parts else "its clips are decoded whole"
            raise ValueError(f"{self.name}: {given}; {has}")
        return tuple(column for part in parts for column in self.parts[part])

    @property
    @abstractmethod
    def history_frames(self) -> int:
        """Largest number of frames before its own last frame that a latent depends on."""

    @property
    @abstractmethod
    def history_latents(self) -> int:
        """Largest number of latents before its own that a decoded frame depends on; causal models only."""

    @property
    @abstractmethod
    def lookahead_latents(self) -> int:
        """Number of latents after its own that a decoded frame depends on; causal models only."""

    @abstractmethod
    def latent_frames(self, num_frames: int) -> int:
        """Number of latent frames of a clip.

        Raises:
            ValueError: the model does not take clips of this length; the message names the nearest valid one.
        """

    @abstractmethod
    def decoded_frames(self, latent_frames: int) -> int:
        """Number of frames that ``latent_frames`` latents decode to by default."""

    @abstractmethod
    def valid_frames(self, num_frames: int) -> int:
        """Shortest valid clip length that is at least ``num_frames``.

        Raises:
            ValueError: ``num_frames`` is below 1, or above the longest clip of the model.
        """

    @abstractmethod
    def payload(self, num_frames: int, height: int, width: int, *, keep_logvar: bool = False) -> Payload:
        """Payload of a clip of this length, and this height and width in pixels.

        Raises:
            ValueError: the model does not take this length or size, or has no log-variance to keep.
        """
