"""One way to list, open and atomically write a path, local or remote.

Everything goes through fsspec. A write is whole or absent: locally a temporary file is renamed into place, on
object stores one upload becomes visible when it is complete. What fails for a while (throttling, a broken
connection) is tried again, with growing pauses, for two minutes; all operations here may be repeated without harm.
Credentials come from the environment (AWS profiles, variables, instance roles), never from settings, so that no run
record can leak them.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

Result = TypeVar("Result")

_log = logging.getLogger(__name__)

RETRY_SECONDS = float(os.environ.get("VIDSHARD_STORAGE_RETRY_SECONDS", "120"))
"""How long an operation on remote storage is tried again before it counts as failed."""


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
    # no listings kept from before: others write there too, and a file may be asked for that a kept listing lacks
    options = {} if is_local(path) else {"use_listings_cache": False}
    try:
        fs, inner = url_to_fs(path, **options)
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


_PERMANENT = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)
_TRANSIENT_ERRNO = frozenset(
    [errno.EBUSY, errno.EAGAIN, errno.EIO, errno.EPIPE, errno.ETIMEDOUT, errno.ENETUNREACH, errno.EHOSTUNREACH]
)
_TRANSIENT_CODES = frozenset(
    [
        "BandwidthLimitExceeded",
        "InternalError",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
    ]
)


def is_transient(error: BaseException) -> bool:
    """Whether an operation on remote storage that failed so may succeed when it is repeated."""
    if isinstance(error, _PERMANENT):
        return False
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    response = getattr(error, "response", None)  # botocore's errors that came from the server
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in (408, 429) or response.get("Error", {}).get("Code") in _TRANSIENT_CODES
    status = getattr(error, "status", None)  # aiohttp's
    if isinstance(status, int) and status:
        return status >= 500 or status in (408, 429)
    if isinstance(error, OSError):
        cause = error.__cause__
        return error.errno in _TRANSIENT_ERRNO or (cause is not None and is_transient(cause))
    module, name = type(error).__module__.split(".")[0], type(error).__name__
    return (
        module in ("botocore", "aiohttp")
        and re.search("Connect|Timeout|HTTPClient|Incomplete|Payload|Stream|Server", name) is not None
    )


def with_retries(path: str, operation: Callable[[], Result], retry_seconds: float | None = None) -> Result:
    """The operation's result; on remote storage it is repeated while it fails in a way that may pass.

    Raises:
        BaseException: what it raised the last time, with a note of how often it was tried.
    """
    if is_local(path):
        return operation()
    limit = RETRY_SECONDS if retry_seconds is None else retry_seconds

    def warn(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        pause = state.next_action.sleep if state.next_action else 0.0
        text = describe(error) if error is not None else ""
        _log.warning("%s: %s; again in %.1f s", public_uri(path), text, pause)

    started = time.monotonic()
    retrying = Retrying(
        stop=stop_after_delay(limit),
        wait=wait_random_exponential(multiplier=0.2, max=min(20.0, max(0.1, limit / 4))),
        retry=retry_if_exception(is_transient),
        before_sleep=warn,
        reraise=True,
    )
    try:
        return retrying(operation)
    except storage_errors() as error:
        if is_transient(error):
            tries = retrying.statistics.get("attempt_number", 1)
            error.add_note(f"tried {tries} times in {time.monotonic() - started:.0f} s")
        raise


@contextmanager
def _named(what: str, path: str) -> Iterator[None]:
    """Turn what a file system raises into a StorageError that says what could not be done with what."""
    try:
        yield
    except storage_errors() as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        raise StorageError(f"cannot {what} {public_uri(path)}: {describe(error)}{notes}") from error


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
        return cast(BinaryIO, with_retries(path, lambda: fs.open(inner, "rb", **options)))


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
        self._file = self._open()

    def _open(self) -> Any:
        options = {"maxblocks": _MAX_BLOCKS}
        return self._fs.open(
            self._path,
            "rb",
            block_size=_BLOCK_BYTES,
            cache_type="background",
            cache_options=options,
            size=self._num_bytes,
        )

    def samples(self, offsets: Sequence[int], num_bytes: int) -> list[bytes]:
        """So many bytes from each offset, fetched side by side and not as blocks."""
        ends = [min(offset + num_bytes, self._num_bytes) for offset in offsets]
        paths = [self._path] * len(ends)
        return with_retries(self._url, lambda: list(self._fs.cat_ranges(paths, list(offsets), ends, on_error="raise")))

    def read(self, num_bytes: int = -1, /) -> bytes:
        """At most this many bytes."""
        at = self._file.tell()

        def read() -> bytes:
            if self._file.tell() != at:  # a read that failed on the way: what its cache holds is not known
                self._file.close()
                self._file = self._open()
                self._file.seek(at)
            return cast(bytes, self._file.read(num_bytes))

        return with_retries(self._url, read)

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
        num_bytes = fs.info(inner)["size"]
        if num_bytes is None:
            raise OSError("its length is unknown, and a video is read in parts")
        if num_bytes > WHOLE_BYTES:
            return cast(BinaryIO, RemoteVideo(path, fs, inner, num_bytes))
        data = fs.cat_file(inner)
        if len(data) != num_bytes:
            raise ConnectionError(f"{len(data)} of its {num_bytes} bytes came")
        return io.BytesIO(data)

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
    with _named("reach", path):
        return bool(with_retries(path, lambda: fs.exists(inner)))


def list_files(folder: str, suffix: str) -> list[str]:
    """Paths of the files directly in a folder that end in ``suffix``, sorted; none where there is no folder.

    Raises:
        StorageError: the folder is there but cannot be listed.
    """
    fs, inner = filesystem(folder)

    with _named("list", folder):
        try:
            entries = with_retries(folder, lambda: fs.ls(inner, detail=True))
        except FileNotFoundError:
            return []
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
            with_retries(path, lambda: fs.pipe_file(inner, content))


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
        try:
            with_retries(path, lambda: _create(fs, inner, data))
        except FileExistsError:
            return read_bytes(path) == data
        return True


def _create(fs: Any, inner: str, data: bytes) -> None:
    try:
        fs.pipe_file(inner, data, mode="create")
    except (NotImplementedError, TypeError):
        if fs.exists(inner):
            raise FileExistsError(inner) from None
        fs.pipe_file(inner, data)
    except OSError as error:
        # what S3 answers to a conditional put of something that is there, or is being put by somebody else
        if "PreconditionFailed" in repr(error) + repr(error.__cause__) or "ConditionalRequestConflict" in repr(
            error.__cause__
        ):
            raise FileExistsError(inner) from error
        raise


def remove(path: str) -> None:
    """Remove a file; that it is not there is no error.

    Raises:
        StorageError: it could not be removed.
    """
    fs, inner = filesystem(path)
    with _named("remove", path), suppress(FileNotFoundError):
        with_retries(path, lambda: fs.rm_file(inner))


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
    if isinstance(error, FileNotFoundError):
        return "no such file or bucket"
    if isinstance(error, PermissionError):
        return f"permission denied ({error})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}: make space, then run the same command again"
    return " ".join(str(error).split()) or type(error).__name__
