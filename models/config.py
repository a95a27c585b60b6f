"""Configuration of a tokenizer, as every family has it.

A config describes a network completely and says which clips it takes and what they become. The pipeline knows this
base class alone; each family derives its own (`models.vidtok.config.VidTokConfig`). No weights and no computation stand
here.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field

from vidshard.schemas.tokens import Payload

IDENTITY_WHEN_SET: Final[dict[str, Any]] = {"identity": "when set"}
"""Mark of a field (``json_schema_extra``) that is part of a tokenizer's identity only where it differs from its
default, so that outputs from before the field existed stay the same output."""


class TokenizerConfig(BaseModel, ABC):
    """Base of the families' configs: two equal configs are the same network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    """Name of the model; those of presets follow the released configurations."""
    family: str
    """Tag of the family that the config belongs to, a key of `models.tokenizer.FAMILIES`."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values of the fields that decide what a token means."""
        record: dict[str, Any] = json.loads(self.model_dump_json())
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("identity") == "when set" and record[name] == field.default:
                del record[name]
        return record

    @property
    @abstractmethod
    def is_causal(self) -> bool:
        """Whether no latent depends on frames after its own; only causal models encode streams."""

    @property
    @abstractmethod
    def time_stride(self) -> int:
        """Frames for each latent; the first one of a causal model may stand for fewer."""

    @property
    @abstractmethod
    def space_stride(self) -> int:
        """Pixels for each latent, along height and along width."""

    @property
    @abstractmethod
    def codebook_size(self) -> int | None:
        """Number of different tokens; None where latents are continuous."""

    @property
    @abstractmethod
    def head_name(self) -> str:
        """Kind of latents in a word, for people: fsq, kl ..."""

    @property
    @abstractmethod
    def has_logvar(self) -> bool:
        """Whether the model gives a log-variance beside its latents."""

    @property
    @abstractmethod
    def history_frames(self) -> int:
        """Number of frames before its own last one that a latent can depend on."""

    @property
    @abstractmethod
    def history_latents(self) -> int:
        """Number of latents before its own that a frame can depend on; causal models only."""

    @property
    @abstractmethod
    def lookahead_latents(self) -> int:
        """Number of latents after its own that a frame of a causal model depends on."""

    @abstractmethod
    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a clip.

        Raises:
            ValueError: for a length that the model does not take, naming the nearest that it does.
        """

    @abstractmethod
    def decoded_frames(self, latent_frames: int) -> int:
        """Frames of a clip of so many latents, if nothing else is known."""

    @abstractmethod
    def valid_frames(self, num_frames: int) -> int:
        """The shortest length that the model takes and that is not below num_frames.

        Raises:
            ValueError: for num_frames below 1, or above the longest clip of the model.
        """

    @abstractmethod
    def payload(self, num_frames: int, height: int, width: int, *, keep_logvar: bool = False) -> Payload:
        """Columns that a clip of this size becomes in a shard.

        Raises:
            ValueError: for a length or size that the model does not take, or a log-variance that it does not give.
        """
