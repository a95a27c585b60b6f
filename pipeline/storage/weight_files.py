"""Files of weights as local paths: local, remote, from the Hugging Face Hub (``hf://``) or shipped (``shipped://``)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vidshard.pipeline.storage.errors import StorageError
from vidshard.pipeline.storage.files import open_binary
from vidshard.pipeline.storage.paths import absolute, is_local
from vidshard.schemas.uris import public_uri, shown_uri

SHIPPED_SCHEME = "shipped://"
"""Scheme of the trained weights that are part of the package: ``shipped://PRESET``."""


@contextmanager
def local_copy(path: str | None, *, cached_only: bool = False) -> Iterator[Path | None]:
    """A file as a local path: itself when it is local, otherwise a temporary copy that is removed at the end.

    ``hf://OWNER/REPO[@REVISION]/PATH`` stays in the cache of huggingface_hub. ``shipped://PRESET`` names the trained
    weights that come with the package. The copy has the name that the URL's path ends in. Errors of the block that are
    ValueErrors and name the copy name the URL instead.

    Args:
        path: the file; None gives None.
        cached_only: fetch nothing over the network: the file must be local, shipped, or in the cache of the Hub. For
            locations that a foreign file states.

    Raises:
        StorageError: it is missing, not readable, or would have to be fetched.
    """
    if path is not None and _is_hub_file(path):
        yield _fetch(path, cached_only=cached_only)[0]
        return
    if path is not None and path.startswith(SHIPPED_SCHEME):
        yield _shipped(path)
        return
    if path is None or is_local(path):
        if path is not None and not Path(absolute(path)).is_file():
            raise StorageError(f"cannot read {path}: there is no such file")
        yield None if path is None else Path(absolute(path))
        return
    if cached_only:
        raise StorageError(
            f"{shown_uri(path)} is not fetched by itself: a file that may be foreign names it; {_NAME_IT}"
        )
    with tempfile.TemporaryDirectory(prefix="vidshard-") as folder:
        target = Path(folder) / _file_name(path)
        with open_binary(path) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 8 << 20)
        try:
            yield target
        except ValueError as error:
            if str(target) not in str(error) or len(error.args) != 1:
                raise
            error.args = (str(error).replace(str(target), shown_uri(path)),)
            raise


_NAME_IT = "name it yourself if you trust it"


def _file_name(url: str) -> str:
    """Name for the copy of a URL's file: the end of its path, without what signs the URL."""
    name = public_uri(url).rsplit("/", 1)[-1]
    return name[-200:] if name.strip(".") and "\0" not in name else "weights"


def pinned(path: str) -> str:
    """The path under which the very same file is found later: a Hub file by its commit, others unchanged.

    Raises:
        StorageError: a Hub file is missing or not readable.
    """
    return _fetch(path)[1] if _is_hub_file(path) else path


def _is_hub_file(path: str) -> bool:
    return path.startswith("hf://")


def _shipped(path: str) -> Path:
    from vidshard.models.weights import shipped_weights  # not at the top: it loads torch, which no decoder needs

    try:
        return shipped_weights(path.removeprefix(SHIPPED_SCHEME))
    except FileNotFoundError as error:
        raise StorageError(f"cannot read {path}: {error}") from error


def _fetch(reference: str, *, cached_only: bool = False) -> tuple[Path, str]:
    from vidshard.pipeline.storage import hub  # not at the top: loading it takes time, and no decoder needs it

    try:
        return hub.fetch(reference, cached_only=cached_only)
    except hub.HubError as error:
        if cached_only:
            text = f"{shown_uri(reference)} is not fetched by itself, and {error}; {_NAME_IT}"
            raise StorageError(text) from error
        raise StorageError(f"cannot read {public_uri(reference)}: {error}") from error
