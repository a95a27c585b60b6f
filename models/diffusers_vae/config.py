"""Configuration of a video autoencoder of diffusers.

A `DiffusersConfig` holds the settings of its config.json and what was derived from them, so that lengths, shapes and
strides are known without diffusers and without weights. `models.diffusers_vae.derive` makes one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from vidshard.models.diffusers_vae.classes import VaeClass, find_class, settings_of
from vidshard.schemas.tokenizers import ClipShape, TokenizerConfig
from vidshard.schemas.tokens import Payload, latents_payload

MAX_VALUES = 20_000
"""Most values in a config.json; released ones have fewer than 600."""
MAX_NUMBER = 65_536
"""Largest number in a config.json that may size a network."""
_MAX_DEPTH = 6
_WIDEST_GAP = 64
"""Largest distance between two lengths that a class takes, in frames."""


class DiffusersConfig(TokenizerConfig):
    """A video autoencoder of diffusers: two equal configs describe the same network."""

    family: Literal["diffusers"] = "diffusers"
    class_name: str = Field(max_length=100)
    """Class in diffusers, one of `classes.CLASSES`."""
    settings: dict[str, Any]
    """Settings of its config.json that the class takes, as JSON values; others have the class's defaults."""
    ignored_settings: tuple[str, ...] = Field(default=(), max_length=1000)
    """Names of settings in config.json that the class does not take, as in files of another version."""
    config_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the settings of config.json as JSON with sorted keys, without names that begin with an underscore."""
    flags: dict[str, bool] = Field(max_length=20)
    """Switches of tiles and of pieces of a clip, as the network has them."""
    latent_channels: int = Field(ge=1, le=4096)
    frames_per_latent: int = Field(ge=1, le=64)
    """Frames per latent; the first one of a clip may hold fewer."""
    pixels_per_latent: int = Field(ge=1, le=256)
    """Pixels per latent, along height and along width."""
    smallest_side: int = Field(ge=1, le=4096)
    """Smallest height and width that the class reads, in pixels."""
    side_steps: tuple[int, int]
    """Height and width in pixels are the smallest side and multiples of these."""
    looks_back_frames: int = Field(default=0, ge=0, le=1_000_000)
    """Frames before its own last one that a latent depends on, for classes that encode streams."""
    looks_back_latents: int = Field(default=0, ge=0, le=1_000_000)
    """Latents before its own that a decoded frame depends on, for classes that encode streams."""

    def __hash__(self) -> int:
        return hash((self.name, self.config_sha256))

    @field_validator("settings", mode="before")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        check_settings(value)
        return value

    @field_validator("flags", mode="after")
    @classmethod
    def _switches(cls, flags: dict[str, bool]) -> dict[str, bool]:
        if unknown := [name for name in flags if not re.fullmatch(r"use_[a-z]{1,20}(_[a-z]{1,20})?", name)]:
            raise ValueError(f"{unknown[0]!r:.80} is no switch of an autoencoder")
        return flags

    @model_validator(mode="after")
    def _known(self) -> Self:
        find_class(self.class_name)
        return self

    @property
    def row(self) -> VaeClass:
        """Quirks of the class."""
        return find_class(self.class_name)

    @property
    def is_causal(self) -> bool:
        """No latent depends on frames after its own."""
        return self.row.is_causal

    @property
    def why_no_streams(self) -> str | None:
        """Reason of the class; None where it encodes streams."""
        return None if self.row.streams else f"{self.class_name} cannot encode a video piece by piece: {self._reason}"

    @property
    def _reason(self) -> str:
        return self.row.no_streams

    @property
    def libraries(self) -> tuple[str, ...]:
        """diffusers, whose version the provenance records."""
        return ("diffusers",)

    @property
    def default_precision(self) -> str | None:
        """float32 on every device, as trainers encode with these networks."""
        return "float32"

    @property
    def time_stride(self) -> int:
        """Frames per latent; the first one may hold fewer."""
        return self.frames_per_latent

    @property
    def space_stride(self) -> int:
        """Pixels per latent, along height and along width."""
        return self.pixels_per_latent

    @property
    def codebook_size(self) -> int | None:
        """None: latents are continuous."""
        return None

    @property
    def head_name(self) -> str:
        """``kl`` where there is a log-variance, else ``ae``."""
        return "kl" if self.has_logvar else "ae"

    @property
    def has_logvar(self) -> bool:
        """Whether the class gives a log-variance."""
        return self.row.has_logvar

    @property
    def takes_tiles(self) -> bool:
        """False: the classes have tiles of their own."""
        return False

    @property
    def history_frames(self) -> int:
        """Frames before its own last one that a latent depends on; 0 where the class encodes no streams."""
        return self.looks_back_frames

    @property
    def history_latents(self) -> int:
        """Latents before its own that a decoded frame depends on; 0 where the class encodes no streams."""
        return self.looks_back_latents

    @property
    def lookahead_latents(self) -> int:
        """0: streams are decoded latent by latent."""
        return 0

    @property
    def default_clip(self) -> ClipShape:
        """Valid length next to 17 frames, and 256x256 pixels or the smallest size above."""
        try:
            num_frames = self.valid_frames(17)
        except ValueError:
            num_frames = next(self._valid_below(17))
        height, width = (self._valid_sides(axis, 256)[-1] for axis in (0, 1))
        return ClipShape(num_frames=num_frames, height=height, width=width)

    def _valid_sides(self, axis: int, size: int) -> list[int]:
        """Largest valid height (axis 0) or width not above size, and smallest not below; one if they are equal."""
        first, step = self.smallest_side, self.side_steps[axis]
        if size <= first:
            return [first]
        below = first + (size - first) // step * step
        return [below] if below == size else [below, below + step]

    def _latents(self, num_frames: int) -> int | None:
        return self.row.lengths(num_frames, self.frames_per_latent) if num_frames >= 1 else None

    def _valid_below(self, num_frames: int) -> Iterator[int]:
        return (n for n in range(num_frames, 0, -1) if self._latents(n) is not None)

    def _valid_above(self, num_frames: int) -> Iterator[int]:
        return (n for n in range(max(1, num_frames), num_frames + _WIDEST_GAP) if self._latents(n) is not None)

    def latent_frames(self, num_frames: int) -> int:
        """Number of latent frames of a clip.

        Raises:
            ValueError: of this length the class would drop, add or blend frames, or raise; the message names the
                nearest that it takes.
        """
        latents = self._latents(num_frames)
        if latents is not None:
            return latents
        nearest = [*list(self._valid_below(num_frames))[:1], *list(self._valid_above(num_frames))[:1]]
        taken = [n for n in range(1, 3 * _WIDEST_GAP) if self._latents(n) is not None]
        more = " ..." if len(taken) > 5 else ""
        raise ValueError(
            f"{self.name}: the class takes clips of {', '.join(map(str, taken[:5]))}{more} frames, got {num_frames}; "
            f"of other lengths it would drop, add or blend frames; nearest: {' or '.join(map(str, nearest))}"
        )

    def decoded_frames(self, latent_frames: int) -> int:
        """Number of frames of the clip that has this many latent frames.

        Raises:
            ValueError: no clip has.
        """
        around = latent_frames * self.frames_per_latent
        for num_frames in range(around, max(0, around - _WIDEST_GAP - self.frames_per_latent), -1):
            if self._latents(num_frames) == latent_frames:
                return num_frames
        raise ValueError(f"{self.name}: no clip has {latent_frames} latent frames")

    def valid_frames(self, num_frames: int) -> int:
        """Shortest length that the class takes and that is not below num_frames.

        Raises:
            ValueError: num_frames is below 1, or above the longest clip.
        """
        if num_frames < 1:
            raise ValueError(f"{self.name}: num_frames must be at least 1, got {num_frames}")
        found = next(self._valid_above(num_frames), None)
        if found is None:
            raise ValueError(
                f"{self.name}: the longest clip has {next(self._valid_below(num_frames))} frames, got {num_frames}"
            )
        return found

    def payload(self, num_frames: int, height: int, width: int, *, keep_logvar: bool = False) -> Payload:
        """Columns of a clip: ``latents`` (C, T', H', W') and, if kept, ``latents_logvar``.

        Raises:
            ValueError: the class does not take this length or size, or has no log-variance to keep.
        """
        if keep_logvar and not self.has_logvar:
            raise ValueError(f"{self.name} has no log-variance to keep")
        grid = (self.latent_frames(num_frames), self._latent_size(0, height), self._latent_size(1, width))
        return latents_payload((self.latent_channels, *grid), keep_logvar=keep_logvar)

    def _latent_size(self, axis: int, size: int) -> int:
        nearest = self._valid_sides(axis, size)
        if nearest != [size]:
            first, step = self.smallest_side, self.side_steps[axis]
            rule = f"a multiple of {step}" if first == step else f"{first} + a multiple of {step}"
            why = "" if first == self.pixels_per_latent else ", as the class leaves out what its cubes do not cover"
            raise ValueError(
                f"{self.name}: {'width' if axis else 'height'} must be {rule}{why}; got {size}; "
                f"nearest: {' or '.join(map(str, nearest))}"
            )
        return size // self.pixels_per_latent


def check_settings(settings: object) -> None:
    """Check that the settings of a config.json are few and small enough to build a network from.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"the settings of a config.json are an object, got a {type(settings).__name__}")
    level: list[Any] = [settings]
    count = 0
    for _ in range(_MAX_DEPTH):
        values: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                level_names = [str(name) for name in value]
                if any(len(name) > 100 for name in level_names):
                    raise ValueError("a setting of config.json has a name of more than 100 characters")
                values.extend(value.values())
            elif isinstance(value, (list, tuple)):
                values.extend(value)
            else:
                _check_value(value)
        count += len(values)
        if count > MAX_VALUES:
            raise ValueError(f"config.json has more than {MAX_VALUES:,} values")
        level = values
    if level:
        raise ValueError(f"config.json is nested more than {_MAX_DEPTH} levels deep")


def _check_value(value: object) -> None:
    if value is None or isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        if not math.isfinite(value) or abs(value) > MAX_NUMBER:
            raise ValueError(f"config.json has the number {value!r:.40}; at most {MAX_NUMBER:,} are allowed")
        return
    if not (isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_.+-]{0,100}", value)):
        raise ValueError(f"config.json has the value {value!r:.80} where a number, a name or a list should be")


def canonical(record: dict[str, Any]) -> str:
    """Settings of a config.json as JSON with sorted keys."""
    return json.dumps(settings_of(record), sort_keys=True, separators=(",", ":"))
