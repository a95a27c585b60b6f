"""Config of an autoencoder of diffusers from its config.json: strides and channels by passes on the meta device.

Passes on the meta device compute shapes and no values. They need no weights, so a plan can state sizes before any are
downloaded. The table of classes states which lengths are taken; `check_clip` holds one against the class.
"""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from functools import lru_cache
from itertools import count, islice
from typing import Any

import torch

from vidshard.models.diffusers_vae.classes import VaeClass, find_class, settings_of
from vidshard.models.diffusers_vae.config import DiffusersConfig, canonical, check_settings
from vidshard.models.diffusers_vae.library import parameters_of
from vidshard.models.diffusers_vae.model import DiffusersVae
from vidshard.models.diffusers_vae.streams import looks_back

_SIDE = 256
"""Height and width of the frames of a pass, in pixels: a multiple of the strides of all released models."""
_MOST_FRAMES_PER_LATENT = 16


def config_from(record: Mapping[str, Any]) -> DiffusersConfig:
    """Make the config of an autoencoder.

    Args:
        record: values of its config.json.

    Raises:
        ValueError: the class is not taken, is not installed, or does not take the settings.
    """
    row = find_class(record.get("_class_name"))
    given = settings_of(record)
    check_settings(given)
    parameters = parameters_of(row.name)
    settings = {name: value for name, value in given.items() if name in parameters}
    if missing := [n for n, value in parameters.items() if value is inspect.Parameter.empty and n not in settings]:
        raise ValueError(f"config.json of {row.name} lacks {', '.join(missing)}")
    _check_channels(row, parameters | settings)
    digest = hashlib.sha256(canonical(dict(record)).encode()).hexdigest()
    draft = DiffusersConfig(
        name=f"{row.name}-{digest[:8]}",
        class_name=row.name,
        settings=settings,
        ignored_settings=tuple(sorted(given.keys() - settings.keys())),
        config_sha256=digest,
        flags=dict(row.flags),
        latent_channels=1,
        frames_per_latent=1,
        pixels_per_latent=1,
        smallest_side=1,
        side_steps=(1, 1),
    )
    return _measured(draft, row, parameters | settings)


def _check_channels(row: VaeClass, settings: Mapping[str, Any]) -> None:
    """Refuse autoencoders of something else than RGB frames."""
    names = ("in_channels", "input_channels", "out_channels", "out_ch")
    patch = settings.get("patch_size") if row.name == "AutoencoderKLWan" else None
    expected = 3 * (patch or 1) ** 2 if patch is None or isinstance(patch, int) else 3
    for name in names:
        wanted = row.in_channels[1] if row.in_channels and row.in_channels[0] == name else expected
        if name in settings and settings[name] != wanted:
            raise ValueError(f"{row.name} of {name} {settings[name]!r:.40} is not taken: RGB frames make {wanted}")


def _measured(draft: DiffusersConfig, row: VaeClass, settings: Mapping[str, Any]) -> DiffusersConfig:
    cubes = _cubes(draft) if row.cubes else None
    side = _SIDE if cubes is None else cubes[0]
    first = next(n for n in range(1, 64) if row.lengths(n, 4) is not None)
    channels, latents, height, _ = _latent_shape(draft, first, side, side)
    if not 1 <= height <= side or side % height:
        raise ValueError(f"{row.name}: {side} pixels become {height} latents, which is no whole stride")
    fields: dict[str, Any] = {
        "latent_channels": channels,
        "pixels_per_latent": side // height,
        "smallest_side": side // height if cubes is None else cubes[0],
        "side_steps": (side // height,) * 2 if cubes is None else cubes[1],
        "frames_per_latent": _frames_per_latent(draft, row, settings, first, latents, side),
    }
    if row.streams:
        fields["looks_back_frames"], fields["looks_back_latents"] = looks_back(settings)
    return DiffusersConfig.model_validate(draft.model_dump() | fields)


def _frames_per_latent(
    draft: DiffusersConfig, row: VaeClass, settings: Mapping[str, Any], first: int, latents: int, side: int
) -> int:
    """Frames per latent: the number by which the rule of the class gives the latents that the class gives.

    Two lengths must agree, and come back whole.
    """
    if row.frames_are_images:
        return 1
    if first > 1:
        return -(-first // latents)
    for stride in range(1, _MOST_FRAMES_PER_LATENT + 1):
        lengths = islice((n for n in count(2) if row.lengths(n, stride) is not None), 2)
        if all(_is_taken(draft, length, row.lengths(length, stride), side) for length in lengths):
            return stride
    raise ValueError(f"{row.name}: no clip of more than one frame comes back whole ({dict(settings)!s:.200})")


def _is_taken(config: DiffusersConfig, num_frames: int, latents: int | None, side: int) -> bool:
    try:
        shape = _latent_shape(config, num_frames, side, side)
    except ValueError:
        return False
    return shape[1] == latents and _comes_back(config, num_frames, shape, (side, side))


def _latent_shape(config: DiffusersConfig, num_frames: int, height: int, width: int) -> tuple[int, ...]:
    """Shape (C, T', H', W') of the latents of a clip.

    Raises:
        ValueError: the class raises.
    """
    x_BCTHW = torch.empty(1, 3, num_frames, height, width, device="meta")
    try:
        with torch.inference_mode():
            mean_BCTHW = _network(config).moments(x_BCTHW)[0]
    except Exception as error:  # a class raises anything on lengths that it does not take
        _network.cache_clear()  # one that raised may be left broken
        raise ValueError(f"{config.class_name} does not encode {num_frames} frames: {error!s:.200}") from error
    return tuple(mean_BCTHW.shape[1:])


def _comes_back(config: DiffusersConfig, num_frames: int, latents: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether latents of a shape (C, T', H', W') decode to as many frames, of the same size."""
    try:
        with torch.inference_mode():
            frames = _network(config).frames(torch.empty(1, *latents, device="meta"), num_frames)
    except Exception:  # noqa: BLE001 - a class raises anything on lengths that it does not take
        _network.cache_clear()
        return False
    return tuple(frames.shape[2:]) == (num_frames, *size)


@lru_cache(maxsize=2)
def _network(config: DiffusersConfig) -> DiffusersVae:
    """Network on the meta device, tables included."""
    return DiffusersVae(config).to("meta")


def _cubes(config: DiffusersConfig) -> tuple[int, tuple[int, int]]:
    """Side of the cubes that the class encodes, and their distances along height and width, in pixels."""
    vae: Any = _network(config).vae
    height, width = vae.kernel[1:]
    if height != width:
        raise ValueError(f"{config.class_name}: cubes of {height}x{width} pixels are not taken")
    return int(height), (int(vae.stride[1]), int(vae.stride[2]))


def check_clip(config: DiffusersConfig, num_frames: int, height: int, width: int) -> None:
    """Check on the meta device that the class encodes and decodes such clips as the table of classes says.

    Raises:
        ValueError: it does not, as of a size that is too small, or a diffusers version that changed the class.
    """
    expected = config.payload(num_frames, height, width)[0].shape
    try:
        found = _latent_shape(config, num_frames, height, width)
    except ValueError as error:
        raise ValueError(f"{config.name} does not take frames of {height}x{width}: {error}") from error
    if found != expected or not _comes_back(config, num_frames, expected, (height, width)):
        raise ValueError(
            f"{config.name}: {num_frames} frames of {height}x{width} should become latents of {expected} and come back "
            f"whole, which they do not with this diffusers: its latents are {found}"
        )
