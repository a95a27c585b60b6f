"""One way to list, open and atomically write a path, local or remote.

Everything goes through fsspec. A write is whole or absent: locally a temporary file is renamed into place, on
object stores one upload becomes visible when it is complete. Credentials come from the environment (AWS
profiles, variables, instance roles), never from settings, so that no run record can leak them.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit, urlunsplit

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


class StorageError(Exception):
    """A path could not be reached, read or written; the message names it and says what to check."""


def is_local(path: str) -> bool:
    """Whether the path is on this machine's file system."""
    return "://" not in path or path.startswith(("file://", "local://"))


def absolute(path: str) -> str:
    """The path as every worker understands it: absolute when local (``~`` expanded), unchanged otherwise."""
    if not is_local(path):
        return path
    return os.path.abspath(os.path.expanduser(path.removeprefix("file://").removeprefix("local://")))


def join(root: str, *parts: str) -> str:
    """Path of something below a local or remote folder."""
    return "/".join([root.rstrip("/") or "/", *parts]) if root != "/" else "/" + "/".join(parts)


def public_uri(uri: str) -> str:
    """The URI without user, password, query and fragment, for logs, shards and rejects.

    Signed URLs carry their secret in the query; plain object-store and local paths come back as they are.
    """
    if "://" not in uri:
        return uri
    scheme = uri.split("://", 1)[0]
    parts = urlsplit(uri)
    host = parts.netloc.rsplit("@", 1)[-1]
    if scheme in ("http", "https", "ftp", "sftp"):
        return urlunsplit((parts.scheme, host, parts.path, "", ""))
    return uri if host == parts.netloc else uri.replace(parts.netloc, host, 1)


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path, and the path in that file system's own terms.

    Raises:
        StorageError: an unknown protocol, or one whose package is not installed.
    """
    try:
        fs, inner = url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise StorageError(f"cannot open {public_uri(path)}: {error}") from error
    return fs, inner


def storage_errors() -> tuple[type[BaseException], ...]:
    """Exceptions by which file systems say that they cannot: OSError and what object-store clients raise."""
    errors: list[type[BaseException]] = [OSError, TimeoutError]
    with suppress(ImportError):
        from botocore.exceptions import BotoCoreError, ClientError

        errors += [BotoCoreError, ClientError]
    with suppress(ImportError):
        from aiohttp import ClientError as HttpError

        errors.append(HttpError)
    return tuple(errors)


def open_binary(path: str, *, block_bytes: int = 8 << 20) -> BinaryIO:
    """Open for reading, seekable; remote files with read-ahead.

    Raises:
        StorageError: it is missing or not readable.
    """
    try:
        if is_local(path):
            local = Path(absolute(path))
            if local.exists() and not local.is_file():
                raise OSError("it is not a regular file")  # opening a pipe would wait for ever
            return local.open("rb")
        fs, inner = filesystem(path)
        return cast(BinaryIO, fs.open(inner, "rb", block_size=block_bytes, cache_type="readahead"))
    except storage_errors() as error:
        raise StorageError(f"cannot read {public_uri(path)}: {describe(error)}") from error


WHOLE_BYTES = 16 << 20
"""Remote videos up to this size are fetched at once."""

_BLOCK_BYTES = 4 << 20
_MAX_BLOCKS = 8


class RemoteVideo(io.RawIOBase):
    """A large remote file, read in blocks of 4 MiB of which it keeps eight, the next one fetched meanwhile.

    A decoder reads an index, often at the end, then the rest in order: that fetches no byte twice, as long as the
    stretches it goes back and forth between lie in fewer than eight blocks.
    """

    def __init__(self, fs: Any, path: str, num_bytes: int) -> None:
        """The file of ``num_bytes`` bytes at the file system's own path."""
        super().__init__()
        self._fs, self._path, self._num_bytes = fs, path, num_bytes
        options = {"maxblocks": _MAX_BLOCKS}
        self._file = fs.open(
            path, "rb", block_size=_BLOCK_BYTES, cache_type="background", cache_options=options, size=num_bytes
        )

    def samples(self, offsets: Sequence[int], num_bytes: int) -> list[bytes]:
        """So many bytes from each offset, fetched side by side and not as blocks."""
        ends = [min(offset + num_bytes, self._num_bytes) for offset in offsets]
        return list(self._fs.cat_ranges([self._path] * len(ends), list(offsets), ends, on_error="raise"))

    def read(self, num_bytes: int = -1, /) -> bytes:
        """At most this many bytes."""
        return cast(bytes, self._file.read(num_bytes))

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """The new position."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """The position."""
        return int(self._file.tell())

    def close(self) -> None:
        """Let go of the blocks."""
        self._file.close()
        super().close()


def open_video(path: str) -> BinaryIO:
    """Open a video for decoding: a small remote one is fetched whole, a larger one is a ``RemoteVideo``.

    Raises:
        StorageError: it is missing or not readable.
    """
    if is_local(path):
        return open_binary(path)
    try:
        fs, inner = filesystem(path)
        num_bytes = fs.info(inner)["size"]
        if num_bytes is None:
            raise OSError("its length is unknown, and a video is read in parts")
        if num_bytes <= WHOLE_BYTES:
            return io.BytesIO(fs.cat_file(inner))
        return cast(BinaryIO, RemoteVideo(fs, inner, num_bytes))
    except storage_errors() as error:
        raise StorageError(f"cannot read {public_uri(path)}: {describe(error)}") from error


def read_bytes(path: str) -> bytes:
    """The whole content.

    Raises:
        StorageError: it is missing or not readable.
    """
    with open_binary(path) as file:
        return file.read()


@contextmanager
def local_copy(path: str | None) -> Iterator[Path | None]:
    """A file as a local path: itself when it is local, otherwise a temporary copy that is removed at the end.

    ``hf://OWNER/REPO[@REVISION]/PATH`` stays in the cache of huggingface_hub.

    Raises:
        StorageError: it is missing or not readable.
    """
    if path is not None and _is_hub_file(path):
        yield _fetch(path)[0]
        return
    if path is None or is_local(path):
        if path is not None and not Path(absolute(path)).is_file():
            raise StorageError(f"cannot read {path}: there is no such file")
        yield None if path is None else Path(absolute(path))
        return
    with tempfile.TemporaryDirectory(prefix="vidshard-") as folder:
        target = Path(folder) / path.rsplit("/", 1)[-1]
        with open_binary(path) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, 8 << 20)
        yield target


def pinned(path: str) -> str:
    """The path by which the very same file is found later: one of the Hub by its commit, others unchanged.

    Raises:
        StorageError: a file of the Hub that is missing or not readable.
    """
    return _fetch(path)[1] if _is_hub_file(path) else path


def _is_hub_file(path: str) -> bool:
    return path.startswith("hf://")


def _fetch(reference: str) -> tuple[Path, str]:
    from pipeline import hub  # not for every decoder, as loading it takes time

    try:
        return hub.fetch(reference)
    except hub.HubError as error:
        raise StorageError(f"cannot read {public_uri(reference)}: {error}") from error


def exists(path: str) -> bool:
    """Whether a file or folder is there.

    Raises:
        StorageError: the file system could not be asked.
    """
    fs, inner = filesystem(path)
    try:
        return bool(fs.exists(inner))
    except storage_errors() as error:
        raise StorageError(f"cannot reach {public_uri(path)}: {describe(error)}") from error


def list_files(folder: str, suffix: str) -> list[str]:
    """Paths of the files directly in a folder that end in ``suffix``, sorted; none where there is no folder.

    Raises:
        StorageError: the folder is there but cannot be listed.
    """
    fs, inner = filesystem(folder)
    try:
        fs.invalidate_cache(inner)
        entries = fs.ls(inner, detail=True)
    except FileNotFoundError:
        return []
    except storage_errors() as error:
        raise StorageError(f"cannot list {public_uri(folder)}: {describe(error)}") from error
    names = [e["name"].rsplit("/", 1)[-1] for e in entries if e["type"] == "file"]
    return [join(folder, n) for n in sorted(names) if n.endswith(suffix) and not n.startswith(".")]


def write_atomic(path: str, data: bytes | memoryview) -> None:
    """Put the whole content at ``path``: readers see all of it or none.

    Raises:
        StorageError: it could not be written; nothing is left at ``path``.
    """
    fs, inner = filesystem(path)
    try:
        if isinstance(fs, LocalFileSystem):
            target = Path(inner)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                with temporary.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
        else:
            fs.pipe_file(inner, bytes(data))
    except storage_errors() as error:
        raise StorageError(f"cannot write {public_uri(path)}: {describe(error)}") from error


def check_writable(folder: str) -> None:
    """Make sure that files can be put into a folder, by putting one there and taking it away.

    Raises:
        StorageError: they cannot.
    """
    path = join(folder, f".write-test-{uuid.uuid4().hex[:8]}")
    write_atomic(path, b"vidshard")
    fs, inner = filesystem(path)
    try:
        fs.rm_file(inner)
    except storage_errors() as error:
        raise StorageError(f"cannot remove {public_uri(path)}: {describe(error)}") from error


def describe(error: BaseException) -> str:
    """One line for a person: what a file system's exception says."""
    if isinstance(error, FileNotFoundError):
        return "no such file or bucket"
    if isinstance(error, PermissionError):
        return f"permission denied ({error})"
    return " ".join(str(error).split()) or type(error).__name__
