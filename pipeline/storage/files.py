"""One way to list, open and atomically write a path, local or remote.

Everything goes through fsspec. A write is whole or absent: locally a temporary file is renamed into place, on
object stores one upload becomes visible when it is complete. What fails for a while (throttling, a broken
connection) is tried again, with growing pauses, for two minutes; all operations here may be repeated without harm.
Credentials come from the environment (AWS profiles, variables, instance roles), never from settings, so that no run
record can leak them.
"""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import IncompleteRead
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import unquote, urlsplit, urlunsplit

import fsspec.config
from fsspec.asyn import sync
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from vidshard.schemas.errors import VidshardError

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

SHIPPED_SCHEME = "shipped://"
"""Of the weights that are part of the package, see `local_copy`."""

RETRY_SECONDS_VARIABLE = "VIDSHARD_STORAGE_RETRY_SECONDS"

RETRY_SECONDS = float(os.environ.get(RETRY_SECONDS_VARIABLE, "120"))
"""How long an operation on remote storage is tried again before it counts as failed."""

_FIRST_PAUSE_SECONDS = 0.5
"""The longest pause before the second attempt; the bound doubles with each."""

_MIN_ATTEMPTS = 3
"""Also of an operation of which one attempt takes longer than the limit, such as a long listing."""

_FIRST_CONTACT_SHARE = 0.25
"""Of the limit, for a host that cannot be connected to and never was: its name may well be wrong."""

_ANSWER_SECONDS, _CONNECT_SECONDS = 15.0, 5.0
"""How long one request waits for an answer, or for more of it, and for a connection."""

_SLOWEST_BYTES_PER_SECOND = 1 << 20
"""A transfer below this is taken for stuck."""

_UPLOAD_PART_BYTES = 50 << 20
"""On S3, what is twice this and more is uploaded in parts of this size."""


class StorageError(VidshardError):
    """A path could not be reached, read or written; the message names it and says what to check."""


class _ReadError(StorageError, OSError):
    """A file that was open could not be read on; an OSError also, as files are expected to raise."""


class _ShortBodyError(OSError):
    """Fewer bytes came than were asked for."""


def is_local(path: str) -> bool:
    """Whether the path is on this machine's file system."""
    return "://" not in path or path.startswith(("file://", "local://"))


def absolute(path: str) -> str:
    """The path as every worker understands it: absolute when local (``~`` expanded), unchanged otherwise.

    A URI's ``%20`` and the like are the characters they stand for (RFC 8089), as ``Path.as_uri()`` writes them, unless
    there is a file of that very name: many put ``file://`` before a path as it is.
    """
    if not is_local(path):
        return path
    if path.startswith("file://"):
        path = re.sub("^file://(localhost(?=/))?", "", path)
        if "%" in path and not os.path.exists(path):
            path = unquote(path)
    return os.path.abspath(os.path.expanduser(path.removeprefix("local://")))


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
    # no listings kept from before: others write there too, and a file may be asked for that a kept listing lacks
    if is_local(path):
        return LocalFileSystem(), absolute(path)  # a name with '::' in it is no chain of file systems
    options = {"use_listings_cache": False, **_patience(path.split("://", 1)[0])}
    try:
        fs, inner = url_to_fs(path, **options)
    except (ImportError, ValueError) as error:
        raise StorageError(f"cannot open {public_uri(path)}: {error}") from error
    if hasattr(fs, "call_s3"):
        fs.retries = 1  # its own multiply with botocore's and ours: 25 time-outs of 15 s before one attempt fails
    return fs, inner


def _patience(protocol: str) -> dict[str, Any]:
    """Settings of a file system that keep a request from hanging; the user's own in fsspec's config come first."""
    if protocol in ("s3", "s3a"):
        config: dict[str, Any] = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _ANSWER_SECONDS}
        if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys():
            # one request of many, such as a part of an upload, is tried again before all of them are
            config["retries"] = {"mode": "standard", "total_max_attempts": 3}
        return {"config_kwargs": config | _configured("config_kwargs", "s3", "s3a")}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_ANSWER_SECONDS)
        return {"client_kwargs": {"timeout": timeout} | _configured("client_kwargs", "http", "https")}
    return {}


def _configured(option: str, *protocols: str) -> dict[str, Any]:
    """What fsspec's config says of an option that is a dictionary."""
    found: dict[str, Any] = {}
    for protocol in protocols:
        found |= fsspec.config.conf.get(protocol, {}).get(option) or {}
    return found


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


_TRANSIENT_CODES = frozenset(
    [
        "BadDigest",
        "BandwidthLimitExceeded",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
        # of an upload in parts, when the answer to its completion, or to its ending, was lost
        "InvalidPart",
        "NoSuchUpload",
    ]
)
"""Of S3 (docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html), apart from all that come as a 5xx."""

_TRANSIENT_ERRNOS = frozenset(
    {
        errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH,
        errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ENETRESET, errno.EAGAIN, errno.EIO,
    }
)  # fmt: skip


def is_transient(error: BaseException) -> bool:
    """Whether an error of a remote file system may pass: trouble of the network or the server, not of the request."""
    return bool(_verdict(_chain(error)[0]))


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what it was made of, the one that knows most first.

    File systems translate what their clients say and lose some of it: s3fs makes the same OSError of a request to
    slow down and of a conflict, and fsspec's HTTP a FileNotFoundError of everything.
    """
    links = [error]
    while (below := links[-1].__cause__ or links[-1].__context__) is not None and below not in links:
        links.append(below)
    return [link for link in reversed(links) if _verdict(link) is not None] or [error]


def _verdict(error: BaseException) -> bool | None:
    """Whether this error, by itself, may pass; None where it does not say."""
    if isinstance(error, StorageError):
        return False  # it was tried again already
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # of botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return response.get("Error", {}).get("Code") in _TRANSIENT_CODES or _passing_status(status)
    status = (
        getattr(error, "status", None) or getattr(error, "status_code", None) or getattr(response, "status_code", None)
    )
    if isinstance(status, int) and status:
        return _passing_status(status)
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    if isinstance(error, (TimeoutError, ConnectionError, EOFError, IncompleteRead, _ShortBodyError, socket.gaierror)):
        return True
    if isinstance(error, _connection_errors()):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return False if isinstance(error, storage_errors()) else None


def _passing_status(status: object) -> bool:
    """Whether an HTTP status tells of trouble that passes: not those that tell what a server cannot do, or is full."""
    return isinstance(status, int) and (
        status in (408, 425, 429) or (status >= 500 and status not in (501, 505, 507, 511))
    )


def _connection_errors() -> tuple[type[BaseException], ...]:
    errors: list[type[BaseException]] = []
    with suppress(ImportError):
        from botocore import exceptions as boto
        from botocore.parsers import ResponseParserError

        errors += [boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, ResponseParserError]
        errors += [boto.FlexibleChecksumError, boto.CredentialRetrievalError, boto.MetadataRetrievalError]
    with suppress(ImportError):
        import aiohttp

        errors += [aiohttp.ClientConnectionError, aiohttp.ClientPayloadError]
    return tuple(errors)


def _is_unreachable(error: BaseException) -> bool:
    """Whether no connection was made at all."""
    errors: list[type[BaseException]] = [ConnectionRefusedError, socket.gaierror]
    with suppress(ImportError):
        from botocore.exceptions import EndpointConnectionError

        errors.append(EndpointConnectionError)
    with suppress(ImportError):
        from aiohttp import ClientConnectorError

        errors.append(ClientConnectorError)
    return isinstance(_chain(error)[0], tuple(errors))


_reached: set[str] = set()
"""Hosts, buckets among them, that have answered this process."""


def with_retries(path: str, operation: Callable[[], Result], retry_seconds: float | None = None) -> Result:
    """The operation's result; on remote storage it is repeated while it fails in a way that may pass.

    Raises:
        BaseException: what it raised the last time, with notes of how often it was tried and what to check.
    """
    if is_local(path):
        return operation()
    limit = RETRY_SECONDS if retry_seconds is None else retry_seconds
    host = "/".join(path.split("/", 3)[:3])
    started = time.monotonic()

    def once() -> Result:
        try:
            result = operation()
        except storage_errors() as error:
            if not _is_unreachable(error):
                _reached.add(host)
            raise
        _reached.add(host)
        return result

    def stop(state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        elapsed = time.monotonic() - started
        if error is not None and host not in _reached and _is_unreachable(error):
            return elapsed >= limit * _FIRST_CONTACT_SHARE
        return elapsed >= limit and (state.attempt_number >= _MIN_ATTEMPTS or limit == 0)

    def warn(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        pause = state.next_action.sleep if state.next_action else 0.0
        text = describe(error) if error is not None else ""
        _log.warning("%s: %s; attempt %d, again in %.1f s", public_uri(path), text, state.attempt_number, pause)

    retrying = Retrying(
        stop=stop,
        # anything up to a bound that doubles, which spreads many workers best (Brooker, "Exponential Backoff And
        # Jitter", AWS Architecture Blog 2015, "full jitter")
        wait=wait_random_exponential(
            multiplier=min(_FIRST_PAUSE_SECONDS, limit / 20), max=min(20.0, max(0.1, limit / 6))
        ),
        retry=retry_if_exception(is_transient),
        before_sleep=warn,
        reraise=True,
    )
    try:
        return retrying(once)
    except storage_errors() as error:
        if is_transient(error):
            tries = retrying.statistics.get("attempt_number", 1)
            error.add_note(f"tried {tries} times in {time.monotonic() - started:.0f} s")
        if is_transient(error):
            error.add_note(
                "check the network, the endpoint and whether the store is up; "
                f"{RETRY_SECONDS_VARIABLE}={2 * limit:g} tries for longer"
            )
        raise


@contextmanager
def _named(what: str, path: str, kind: type[StorageError] = StorageError) -> Iterator[None]:
    """Turn what a file system raises into a StorageError that says what could not be done with what."""
    try:
        yield
    except StorageError:
        raise
    except storage_errors() as error:
        text = "; ".join([describe(error), *getattr(error, "__notes__", ())])
        raise kind(f"cannot {what} {public_uri(path)}: {text}") from error


def _bounded(fs: Any, name: str, *args: Any, num_bytes: int = 0, **options: Any) -> Any:
    """Call a method of a file system that moves so many bytes, and end it when it takes far too long.

    Time-outs of clients do not cover a server that stops to take in what it is sent.
    """
    if not getattr(fs, "async_impl", False) or fs.asynchronous or not hasattr(fs, f"_{name}"):
        return getattr(fs, name)(*args, **options)
    seconds = max(1.0, RETRY_SECONDS / 3) + num_bytes / _SLOWEST_BYTES_PER_SECOND

    async def bounded() -> Any:
        return await asyncio.wait_for(getattr(fs, f"_{name}")(*args, **options), seconds)

    return sync(fs.loop, bounded)


def _info(fs: Any, inner: str) -> Mapping[str, Any]:
    """What the file system knows of a path."""
    return cast(Mapping[str, Any], _bounded(fs, "info", inner))


@contextmanager
def _missing_is_fine() -> Iterator[None]:
    """For file systems that make a FileNotFoundError of any trouble, too."""
    try:
        yield
    except FileNotFoundError as error:
        if is_transient(error) or _code(_chain(error)[0]) in ("401", "403"):
            raise


def _read_persistently(file: Any, path: str) -> None:
    """Make an open remote file ask again for a stretch that did not come, or came short.

    Above the file's cache that would not help: a stretch that was fetched ahead and failed, fails for ever there.
    """
    cache: Any = getattr(file, "cache", None)
    if getattr(cache, "fetcher", None) is None:
        return
    fetch, size = cache.fetcher, cache.size

    def fetch_all(start: int, end: int) -> bytes:
        def once() -> bytes:
            data: bytes = fetch(start, end)
            return data if size is None else _whole(data, min(end, size) - start)

        with _named("read", path, _ReadError):
            return with_retries(path, once)

    cache.fetcher = fetch_all


def _whole(data: bytes, num_bytes: int) -> bytes:
    """The data, if that is all of it.

    Raises:
        _ShortBodyError: it is not.
    """
    if len(data) < num_bytes:
        raise _ShortBodyError(f"{len(data)} of {num_bytes} bytes came")
    return data


def open_binary(path: str, *, block_bytes: int = 8 << 20) -> BinaryIO:
    """Open for reading, seekable; remote files with read-ahead.

    Raises:
        StorageError: it is missing or not readable.
    """
    with _named("read", path):
        if is_local(path):
            local = Path(absolute(path))
            if local.exists() and not local.is_file():
                raise OSError("it is not a regular file")  # opening a pipe would wait for ever
            return local.open("rb")
        fs, inner = filesystem(path)
        options = {"block_size": block_bytes, "cache_type": "readahead"}
        file = with_retries(path, lambda: fs.open(inner, "rb", **options))
        _read_persistently(file, path)
        return cast(BinaryIO, file)


WHOLE_BYTES = 16 << 20
"""Remote videos up to this size are fetched at once."""

_BLOCK_BYTES = 4 << 20
_MAX_BLOCKS = 8


class RemoteVideo(io.RawIOBase):
    """A large remote file, read in blocks of 4 MiB of which it keeps eight, the next one fetched meanwhile.

    A decoder reads an index, often at the end, then the rest in order: that fetches no byte twice, as long as the
    stretches it goes back and forth between lie in fewer than eight blocks.
    """

    def __init__(self, url: str, fs: Any, path: str, num_bytes: int) -> None:
        """The file of ``num_bytes`` bytes at a URL, which is ``path`` in the file system's own terms."""
        super().__init__()
        self._url, self._fs, self._path, self._num_bytes = url, fs, path, num_bytes
        options = {"maxblocks": _MAX_BLOCKS}
        self._file = fs.open(
            path, "rb", block_size=_BLOCK_BYTES, cache_type="background", cache_options=options, size=num_bytes
        )
        _read_persistently(self._file, url)

    def samples(self, offsets: Sequence[int], num_bytes: int) -> list[bytes]:
        """So many bytes from each offset, fetched side by side and not as blocks."""
        ends = [min(offset + num_bytes, self._num_bytes) for offset in offsets]
        paths = [self._path] * len(ends)

        def once() -> list[bytes]:
            parts = self._fs.cat_ranges(paths, list(offsets), ends, on_error="raise")
            return [_whole(part, end - at) for part, at, end in zip(parts, offsets, ends, strict=True)]

        with _named("read", self._url, _ReadError):
            return with_retries(self._url, once)

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
    fs, inner = filesystem(path)

    def opened() -> BinaryIO:
        num_bytes = _info(fs, inner)["size"]
        if num_bytes is None:
            raise OSError("its length is unknown, and a video is read in parts")
        if num_bytes > WHOLE_BYTES:
            return cast(BinaryIO, RemoteVideo(path, fs, inner, num_bytes))
        return io.BytesIO(_whole(_bounded(fs, "cat_file", inner, num_bytes=num_bytes), num_bytes))

    with _named("read", path):
        return with_retries(path, opened)


def read_bytes(path: str) -> bytes:
    """The whole content.

    Raises:
        StorageError: it is missing or not readable.
    """
    if is_local(path):
        with open_binary(path) as file:
            return file.read()
    fs, inner = filesystem(path)
    with _named("read", path):
        return cast(bytes, with_retries(path, lambda: fs.cat_file(inner)))


@contextmanager
def local_copy(path: str | None) -> Iterator[Path | None]:
    """A file as a local path: itself when it is local, otherwise a temporary copy that is removed at the end.

    ``hf://OWNER/REPO[@REVISION]/PATH`` stays in the cache of huggingface_hub; ``shipped://PRESET`` are the trained
    weights that come with the package.

    Raises:
        StorageError: it is missing or not readable.
    """
    if path is not None and _is_hub_file(path):
        yield _fetch(path)[0]
        return
    if path is not None and path.startswith(SHIPPED_SCHEME):
        yield _shipped(path)
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


def _shipped(path: str) -> Path:
    from vidshard.models.weights import shipped_weights  # and torch with it, which no decoder needs

    try:
        return shipped_weights(path.removeprefix(SHIPPED_SCHEME))
    except FileNotFoundError as error:
        raise StorageError(f"cannot read {path}: {error}") from error


def _fetch(reference: str) -> tuple[Path, str]:
    from vidshard.pipeline.storage import hub  # not for every decoder, as loading it takes time

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

    def is_there() -> bool:
        with _missing_is_fine():
            _info(fs, inner)  # exists() of s3fs and of HTTP takes trouble for absence
            return True
        return False

    with _named("reach", path):
        return with_retries(path, is_there)


def list_files(folder: str, suffix: str) -> list[str]:
    """Paths of the files directly in a folder that end in ``suffix``, sorted; none where there is no folder.

    Raises:
        StorageError: the folder is there but cannot be listed.
    """
    fs, inner = filesystem(folder)

    def entries_now() -> list[dict[str, Any]]:
        with _missing_is_fine():
            return list(fs.ls(inner, detail=True))
        return []

    with _named("list", folder):
        entries = with_retries(folder, entries_now)
    if is_local(folder) and [e["name"] for e in entries] == [inner.rstrip("/")]:
        raise StorageError(f"cannot list {public_uri(folder)}: it is a file where a folder should be: move it away")
    names = [e["name"].rsplit("/", 1)[-1] for e in entries if e["type"] == "file"]
    return [join(folder, n) for n in sorted(names) if n.endswith(suffix) and not n.startswith(".")]


def write_atomic(path: str, data: bytes | memoryview) -> None:
    """Put the whole content at ``path``: readers see all of it or none.

    Raises:
        StorageError: it could not be written; nothing is left at ``path``.
    """
    fs, inner = filesystem(path)
    with _named("write", path):
        if isinstance(fs, LocalFileSystem):
            with _temporary(Path(inner), data) as temporary:
                temporary.replace(inner)
        else:
            content = bytes(data)
            try:
                options = {"chunksize": _UPLOAD_PART_BYTES} if hasattr(fs, "call_s3") else {}
                with_retries(path, lambda: _bounded(fs, "pipe_file", inner, content, num_bytes=len(content), **options))
            except BaseException:
                if len(content) >= 2 * _UPLOAD_PART_BYTES:
                    _abort_uploads(fs, inner)
                raise


def _abort_uploads(fs: Any, inner: str) -> None:
    """End the uploads in parts to a key that were begun: nothing shows of them, but they are paid for.

    Where the store refuses, or the writer was killed, a rule of the bucket for incomplete uploads removes them.
    """
    if hasattr(fs, "call_s3"):
        bucket, key, _ = fs.split_path(inner)
        with suppress(*storage_errors()):
            for upload in fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key).get("Uploads") or []:
                if upload["Key"] == key:
                    fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload["UploadId"])


@contextmanager
def _temporary(target: Path, data: bytes | memoryview) -> Iterator[Path]:
    """A file beside the target with the content, on the disk; gone at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str) -> int:
    """Remove temporary files that a killed :func:`write_atomic` left in a local folder; gives how many.

    Only while nobody else writes there.
    """
    if not is_local(folder):
        return 0
    left = [
        path for path in Path(absolute(folder)).glob(".*.tmp") if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", path.name)
    ]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def create_exclusive(path: str, data: bytes) -> bool:
    """Put the content at ``path`` unless something is there: of several that try only one succeeds.

    Locally by a hard link, on S3 (and file systems whose fsspec class knows the mode ``create``) by a conditional put.
    Elsewhere by looking first and reading back what is there after: two at the very same time may both succeed.

    Args:
        path: of a file that is not there.
        data: unlike what anybody else would put there, so that an attempt whose answer was lost is known again.

    Returns:
        Whether it is this content that is there now.

    Raises:
        StorageError: it could not be written.
    """
    fs, inner = filesystem(path)
    with _named("write", path):
        if isinstance(fs, LocalFileSystem):
            with _temporary(Path(inner), data) as temporary:
                try:
                    os.link(temporary, inner)
                except FileExistsError:
                    return False
                except OSError:  # a file system without links
                    try:
                        with open(inner, "xb") as file:
                            file.write(data)
                    except FileExistsError:
                        return False
                return True
        # also an attempt that seemed to fail may have succeeded, and some stores take no notice of the condition
        return with_retries(path, lambda: _create(fs, inner, data))


def _create(fs: Any, inner: str, data: bytes) -> bool:
    try:
        _bounded(fs, "pipe_file", inner, data, num_bytes=len(data), mode="create")
    except FileExistsError:
        pass
    except (NotImplementedError, TypeError, ValueError):  # a file system that does not know the mode
        if not fs.exists(inner):
            fs.pipe_file(inner, data)
    return bool(fs.cat_file(inner) == data)


def remove(path: str) -> None:
    """Remove a file; that it is not there is no error.

    Raises:
        StorageError: it could not be removed.
    """
    fs, inner = filesystem(path)

    def gone() -> None:
        with _missing_is_fine():
            _bounded(fs, "rm_file", inner)

    with _named("remove", path):
        with_retries(path, gone)


def fingerprint(path: str) -> str | None:
    """Size and time stamp of a file as its storage states them, or size and tag; None if it cannot be asked.

    Another one when the file was replaced. The same whether it comes from here or, for remote files, from a listing
    (:func:`fingerprint_of`).
    """
    with suppress(StorageError, *storage_errors()):
        if is_local(path):
            stat = os.stat(absolute(path))
            return f"{stat.st_size}-{stat.st_mtime_ns}"
        fs, inner = filesystem(path)

        return fingerprint_of(with_retries(path, lambda: fs.info(inner)))
    return None


_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime", "Last-Modified")


def fingerprint_of(info: Mapping[str, Any]) -> str | None:
    """The same from what a remote file system says of a file; None where that tells no two states apart."""
    tag = next((str(info[name]).strip('"') for name in _TAGS if info.get(name)), None)
    return None if tag is None else f"{info.get('size')}-{tag}"


def check_writable(folder: str) -> None:
    """Make sure that files can be put into a folder, by putting one there and taking it away.

    Raises:
        StorageError: they cannot.
    """
    path = join(folder, f".write-test-{uuid.uuid4().hex[:8]}")
    write_atomic(path, b"vidshard")
    remove(path)


def describe(error: BaseException) -> str:
    """One line for a person: what a file system's exception says."""
    error = _chain(error)[0]
    code = _code(error)
    if isinstance(error, FileNotFoundError) or code in ("404", "NoSuchKey", "NoSuchBucket"):
        return "no such file or bucket"
    text = re.sub(r"\b[a-z][a-z0-9+.-]*://[^\s'\"]+", lambda match: public_uri(match[0]), " ".join(str(error).split()))
    if isinstance(error, PermissionError) or code in ("403", "401", "AccessDenied"):
        return f"permission denied ({text})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}: make space, then run the same command again"
    return text or type(error).__name__


def _code(error: BaseException) -> str | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code"))
    status = getattr(error, "status", None)
    return str(status) if isinstance(status, int) else None
