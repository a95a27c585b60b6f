"""fsspec file systems, set up so that no request hangs for ever.

Credentials come from the environment (AWS profiles, variables, instance roles), never from settings, so that no run
record can leak them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

from fsspec import get_filesystem_class
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from vidshard.pipeline.storage import retry
from vidshard.pipeline.storage.clients import client_options
from vidshard.pipeline.storage.errors import ReadError, StorageError
from vidshard.pipeline.storage.paths import absolute, is_local
from vidshard.pipeline.storage.retry import errors_named, whole, with_retries
from vidshard.pipeline.storage.transient import error_code, is_transient, root_cause
from vidshard.schemas.errors import one_line
from vidshard.schemas.uris import shown_uri

_MIN_BYTES_PER_SECOND = 1 << 20
"""A transfer slower than this counts as stuck."""


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path, and the path in that file system's own terms.

    A name with ``::`` in it is a name: fsspec's chains of file systems are never followed, as nobody means them who
    lists the keys of a bucket.

    Raises:
        StorageError: an unknown protocol, one whose package is not installed, or a malformed address.
    """
    local = absolute(path) if is_local(path) else None
    if "\0" in (local or path):  # percent escapes of file:// are decoded by now
        raise StorageError(f"cannot open {shown_uri(path)}: its name holds a zero byte")
    if local is not None:
        return LocalFileSystem(), local
    protocol, _, rest = path.partition("://")
    if "::" in protocol:
        raise StorageError(
            f"cannot open {shown_uri(path)}: it chains file systems with '::', and chains are not followed: name the "
            "file itself"
        )
    path = f"{protocol.lower()}://{rest}"  # schemes are case-insensitive (RFC 3986, section 3.1)
    try:
        kind: Any = get_filesystem_class(protocol.lower())
        # no cached listings: others write there too, and a file may be asked for that a cached listing lacks
        options = {"use_listings_cache": False, **client_options(protocol.lower())}
        fs = kind(**{**options, **kind._get_kwargs_from_urls(path)})
        inner = str(fs._strip_protocol(path))
    except (ImportError, ValueError) as error:
        raise StorageError(f"cannot open {shown_uri(path)}: {one_line(error)}") from error
    except Exception as error:  # each file system refuses addresses in its own way
        raise StorageError(f"cannot open {shown_uri(path)}: {type(error).__name__}: {one_line(error)}") from error
    walk = "_walk" if getattr(fs, "async_impl", False) else "walk"
    setattr(fs, walk, partial(getattr(type(fs), walk), fs, on_error=_raise_trouble))
    if hasattr(fs, "call_s3"):
        fs.retries = 1  # its own multiply with botocore's and ours: 25 time-outs of 15 s before one attempt fails
    return fs, inner


def bounded(fs: Any, name: str, *args: Any, num_bytes: int = 0, **options: Any) -> Any:
    """Call a file system's method that moves ``num_bytes`` bytes, and end it when it takes far too long.

    The clients' own time-outs do not cover a server that stops taking in what it is sent.

    Raises:
        TimeoutError: it took too long.
    """
    if not getattr(fs, "async_impl", False) or fs.asynchronous or not hasattr(fs, f"_{name}"):
        return getattr(fs, name)(*args, **options)

    async def call() -> Any:
        return await asyncio.wait_for(getattr(fs, f"_{name}")(*args, **options), time_limit(num_bytes))

    return sync(fs.loop, call)


def time_limit(num_bytes: int = 0) -> float:
    """Seconds after which one request that moves ``num_bytes`` bytes counts as stuck."""
    return max(1.0, retry.RETRY_SECONDS / 3) + num_bytes / _MIN_BYTES_PER_SECOND


def file_info(fs: Any, inner: str) -> Mapping[str, Any]:
    """The file system's description of a path: its size, type and tags."""
    return cast(Mapping[str, Any], bounded(fs, "info", inner))


def _raise_trouble(error: BaseException) -> None:
    """Raise what a listing meets below a folder, unless it is absence: fsspec leaves such a folder out in silence."""
    with missing_is_fine():
        raise error


@contextmanager
def missing_is_fine() -> Iterator[None]:
    """Ignore an error that means absence; some file systems raise FileNotFoundError for any trouble."""
    try:
        yield
    except NotADirectoryError:  # below a file there is nothing
        pass
    except FileNotFoundError as error:
        cause = root_cause(error)
        if isinstance(cause, StorageError):
            raise cause from None  # an address that was refused
        if is_transient(error) or error_code(cause) in ("401", "403"):
            raise


def retry_reads(file: Any, path: str) -> None:
    """Make an open remote file fetch a range again that failed or came short.

    The retry is put below the file's cache. Above it, it would not help: a block that was prefetched and failed keeps
    failing there.
    """
    cache: Any = getattr(file, "cache", None)
    if getattr(cache, "fetcher", None) is None:
        return
    fetch, size = cache.fetcher, cache.size

    def fetch_all(start: int, end: int) -> bytes:
        def once() -> bytes:
            data: bytes = fetch(start, end)
            return data if size is None else whole(data, min(end, size) - start)

        with errors_named("read", path, ReadError):
            return with_retries(path, once)

    cache.fetcher = fetch_all
