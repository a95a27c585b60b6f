"""Tokenizers by the names that users give: presets, and autoencoders of diffusers in a local folder or on the Hub.

``diffusers:FOLDER`` and ``diffusers:OWNER/REPO[@REVISION][/SUBFOLDER]`` name a folder with a config.json and a weights
file. Both files come from one commit, which the name is pinned to. Nothing in the folder is executed.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vidshard.models.diffusers_vae.classes import CLASSES, find_class
from vidshard.models.diffusers_vae.derive import config_from
from vidshard.models.tokenizer import TokenizerConfig, get_preset
from vidshard.pipeline import storage
from vidshard.schemas.errors import UserError
from vidshard.schemas.text import readable

log = logging.getLogger(__name__)

PREFIX = "diffusers:"
MAX_CONFIG_BYTES = 1 << 20
"""Largest config.json that is read; released ones have less than 10 KB."""
_CONFIG = "config.json"
_WEIGHTS = "diffusion_pytorch_model.safetensors"
_HUB_NAME = re.compile(
    r"(?P<repository>[\w.-]{1,96}/[\w.-]{1,96})(@(?P<revision>refs/pr/\d{1,9}|[\w.-]{1,200}))?(/(?P<folder>[\w./-]{1,400}))?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedTokenizer:
    """A tokenizer that a name stands for."""

    name: str
    """The name; a repository of the Hub is pinned to its commit, and a folder is an absolute path."""
    config: TokenizerConfig
    weights: str | None = None
    """Path or reference of the weights that the name stands for; None for a preset."""


def find_tokenizer(name: str) -> NamedTokenizer:
    """Look up a tokenizer by name.

    Raises:
        UserError: there is no such preset, folder or repository, or it holds no autoencoder that is taken.
    """
    try:
        if name.startswith(PREFIX):
            return _in_folder(name.removeprefix(PREFIX))
        return NamedTokenizer(name=name, config=get_preset(name))
    except (ValueError, storage.StorageError) as error:
        raise UserError(str(error)) from error


def _in_folder(place: str) -> NamedTokenizer:
    problem: Exception | None = None
    for folder in _folders(place):
        try:
            folder, record = _read_config(folder)
        except FileNotFoundError as error:
            problem = problem or error
            continue
        if record.get("_class_name") not in CLASSES and not isinstance(problem, ValueError):
            try:
                find_class(record.get("_class_name"))
            except ValueError as error:
                problem = ValueError(f"{storage.public_uri(storage.join(folder, _CONFIG))}: {error}")
            continue
        return _described(folder, record)
    assert problem is not None
    raise ValueError(str(problem)) from problem


def _described(folder: str, record: dict[str, Any]) -> NamedTokenizer:
    try:
        config = config_from(record)
    except ValueError as error:
        raise ValueError(f"{storage.public_uri(storage.join(folder, _CONFIG))}: {error}") from error
    if config.ignored_settings:
        _warn_of_ignored(config.class_name, config.ignored_settings)
    weights = _weights_in(folder)
    return NamedTokenizer(name=f"{PREFIX}{folder.removeprefix('hf://')}", config=config, weights=weights)


@cache
def _warn_of_ignored(class_name: str, settings: tuple[str, ...]) -> None:
    """Warn once a process: a command looks a tokenizer up several times."""
    names = ", ".join(map(readable, settings))
    log.warning("%s takes no %s, which config.json sets: ignored, as diffusers does", class_name, names)


def _folders(place: str) -> Iterator[str]:
    """Folders in which to look for a config.json, each a local path or a reference of the Hub.

    Raises:
        ValueError: the place is neither.
    """
    hub_name = place.removeprefix("hf://")
    if place == hub_name and ("://" not in place) and (place.startswith(("/", ".", "~")) or Path(place).is_dir()):
        local = storage.absolute(str(Path(place).expanduser()))
        yield local
        yield storage.join(local, "vae")
        return
    match = _HUB_NAME.fullmatch(hub_name)
    if match is None or not {"", ".", ".."}.isdisjoint((match["folder"] or "x").split("/")):
        raise ValueError(
            f"--tokenizer {PREFIX}{readable(place, 200)}: give a local folder, or OWNER/REPO[@REVISION][/SUBFOLDER] of "
            "the Hugging Face Hub"
        )
    revision = f"@{match['revision']}" if match["revision"] else ""
    root = f"hf://{match['repository']}{revision}"
    if match["folder"]:
        yield f"{root}/{match['folder']}"
        return
    yield root
    yield f"{root}/vae"


def _read_config(folder: str) -> tuple[str, dict[str, Any]]:
    """Values of a config.json, and its folder, pinned to the commit if it is on the Hub.

    Raises:
        FileNotFoundError: the folder has none.
        ValueError: it is no JSON object, or too large.
        StorageError: it could not be read.
    """
    path = f"{folder}/{_CONFIG}"
    if folder.startswith("hf://"):
        try:
            path = storage.pinned(path)
        except storage.StorageError as error:
            if _is_absence(error):
                raise FileNotFoundError(str(error)) from error
            raise
        folder = path.removesuffix(f"/{_CONFIG}")
    elif not Path(path).is_file():
        raise FileNotFoundError(f"{folder} has no {_CONFIG}, so it holds no autoencoder of diffusers")
    with storage.local_copy(path) as local:
        assert local is not None
        with local.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    shown = storage.public_uri(path)
    if len(data) > MAX_CONFIG_BYTES:
        raise ValueError(f"{shown} has more than {MAX_CONFIG_BYTES:,} bytes")
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown} is no JSON: {error!s:.200}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{shown} holds a {type(record).__name__} where an object should be")
    return folder, record


def _is_absence(error: BaseException | None) -> bool:
    """Whether the Hub answered that a repository has no such file."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    while error is not None:
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return True
        error = error.__cause__
    return False


def _weights_in(folder: str) -> str | None:
    """Weights file of a folder; None if a local folder has no safetensors file."""
    if folder.startswith("hf://"):
        return f"{folder}/{_WEIGHTS}"
    if (Path(folder) / _WEIGHTS).is_file():
        return storage.join(folder, _WEIGHTS)
    found = sorted(path.name for path in Path(folder).glob("*.safetensors"))
    return storage.join(folder, found[0]) if len(found) == 1 else None
