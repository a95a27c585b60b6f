"""List, open and atomically write files, local or remote.

Everything goes through fsspec. A write is whole or absent: locally a temporary file is renamed into place, on object
stores one upload becomes visible when it is complete.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.implementations.local import LocalFileSystem

from vidshard.pipeline.storage.errors import StorageError
from vidshard.pipeline.storage.file_systems import bounded, file_info, filesystem, missing_is_fine, retry_reads
from vidshard.pipeline.storage.paths import absolute, is_local, join
from vidshard.pipeline.storage.retry import errors_named, with_retries
from vidshard.pipeline.storage.transient import storage_errors
from vidshard.schemas.locations import split_member
from vidshard.schemas.uris import is_web, public_uri, shown_uri

_NO_FOLDER_SYNC = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM}
)

UPLOAD_PART_BYTES = 50 << 20
"""Part size of multipart uploads to S3, which are used for content of at least twice this size."""


def open_binary(path: str, *, block_bytes: int = 8 << 20) -> BinaryIO:
    """Open a file for reading, seekable; remote files are read ahead in blocks of ``block_bytes``.

    Raises:
        StorageError: it is missing or not readable.
    """
    with errors_named("read", path):
        fs, inner = filesystem(path)
        if is_local(path):
            mode = os.stat(inner).st_mode
            if stat.S_ISDIR(mode):
                os.scandir(inner).close()  # a folder that cannot be listed says why
                raise OSError("it is a folder")
            if not stat.S_ISREG(mode):
                kind = next((name for of, name in _KINDS if of(mode)), "no regular file")
                # opening a pipe would wait for ever
                raise OSError(f"it is {kind}: save what it gives as a file, and name that")
            return _no_view_of_a_process(open(inner, "rb"))
        options = {"block_size": block_bytes, "cache_type": "readahead"}
        file = with_retries(path, lambda: fs.open(inner, "rb", **options))
        retry_reads(file, path)
        return cast(BinaryIO, file)


_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
"""Tests of a file's mode for what cannot be read twice or from any place, with its name."""


def _no_view_of_a_process(file: BinaryIO) -> BinaryIO:
    """Refuse a file of /proc: it shows the memory or the environment of the process that opened it, which is this one.

    Raises:
        OSError: it is one.
    """
    with suppress(FileNotFoundError):
        if os.fstat(file.fileno()).st_dev == os.stat("/proc/self").st_dev:
            file.close()
            raise OSError("it is a view of a running process, not a file")
    return file


def read_bytes(path: str, *, max_bytes: int | None = None) -> bytes:
    """The whole content of a file.

    Args:
        path: the file.
        max_bytes: refuse a larger file; no more than this is read, whatever size the storage states.

    Raises:
        StorageError: it is missing, not readable or too large.
    """
    too_large = f"cannot read {shown_uri(path)}: it is larger than the {max_bytes or 0:,} bytes that are allowed here"
    if is_local(path) or (max_bytes is not None and is_web(path)):
        with open_binary(path) as file, errors_named("read", path):
            data = file.read(-1 if max_bytes is None else max_bytes + 1)
        if max_bytes is not None and len(data) > max_bytes:
            raise StorageError(too_large)
        return data
    fs, inner = filesystem(path)
    with errors_named("read", path):
        if max_bytes is not None and (with_retries(path, lambda: file_info(fs, inner)).get("size") or 0) > max_bytes:
            raise StorageError(too_large)
        return cast(bytes, with_retries(path, lambda: fs.cat_file(inner)))


def exists(path: str) -> bool:
    """Whether a file or folder is there.

    Raises:
        StorageError: the file system could not be asked.
    """
    fs, inner = filesystem(path)

    def is_there() -> bool:
        with missing_is_fine():
            file_info(fs, inner)  # exists() of s3fs and of HTTP mistakes trouble for absence
            return True
        return False

    with errors_named("reach", path):
        return with_retries(path, is_there)


def list_files(folder: str, suffix: str) -> list[str]:
    """Paths of the files directly in a folder that end in ``suffix``, sorted; none where there is no folder.

    Raises:
        StorageError: the folder is there but cannot be listed.
    """
    fs, inner = filesystem(folder)

    def entries_now() -> list[dict[str, Any]]:
        with missing_is_fine():
            return list(fs.ls(inner, detail=True))
        return []

    with errors_named("list", folder):
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
    with errors_named("write", path):
        if isinstance(fs, LocalFileSystem):
            with _temporary(Path(inner), data) as temporary:
                temporary.replace(inner)
            sync_folder(Path(inner).parent)
        else:
            content = bytes(data)
            try:
                options = {"chunksize": UPLOAD_PART_BYTES} if hasattr(fs, "call_s3") else {}
                with_retries(path, lambda: bounded(fs, "pipe_file", inner, content, num_bytes=len(content), **options))
            except BaseException:
                if len(content) >= 2 * UPLOAD_PART_BYTES:
                    _abort_uploads(fs, inner)
                raise


def _abort_uploads(fs: Any, inner: str) -> None:
    """Abort the unfinished multipart uploads to a key: they are invisible, but they are billed.

    Where the store refuses, or the writer was killed, a lifecycle rule of the bucket for incomplete uploads removes
    them.
    """
    if hasattr(fs, "call_s3"):
        bucket, key, _ = fs.split_path(inner)
        with suppress(*storage_errors()):
            for upload in fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=key).get("Uploads") or []:
                if upload["Key"] == key:
                    fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=upload["UploadId"])


@contextmanager
def _temporary(target: Path, data: bytes | memoryview) -> Iterator[Path]:
    """A temporary file beside the target that holds the content, synced to disk; removed at the end."""
    make_folder(target.parent)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a local folder, and those above it that are missing, so that they are there after a power loss."""
    missing = []
    above = folder
    while not above.exists():
        missing.append(above)
        above = above.parent
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Sync the entries of a local folder to disk: a renamed file is there after a power loss only then.

    File systems that cannot sync a folder, and folders that may be written but not read, are left alone.

    Raises:
        OSError: the disk failed.
    """
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def remove_leftovers(folder: str) -> int:
    """Remove temporary files that a killed :func:`write_atomic` left in a local folder.

    Call it only while nobody else writes there.

    Returns:
        Number of files removed; 0 for a remote folder.
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
    """Put the content at ``path`` unless something is there: of several writers only one succeeds.

    Uses a hard link locally, and a conditional put on S3 and on file systems whose fsspec class knows the mode
    ``create``. Elsewhere it looks first and reads the content back: two writers at the very same time may both succeed.

    Args:
        path: the file to create.
        data: must differ from the content of every other writer, so that an attempt whose answer was lost is
            recognized as our own.

    Returns:
        Whether this content is there now.

    Raises:
        StorageError: it could not be written.
    """
    fs, inner = filesystem(path)
    with errors_named("write", path):
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
                            file.flush()
                            os.fsync(file.fileno())
                    except FileExistsError:
                        return False
            sync_folder(Path(inner).parent)
            return True
        # an attempt that seemed to fail may have succeeded, and some stores ignore the condition
        return with_retries(path, lambda: _create(fs, inner, data))


def _create(fs: Any, inner: str, data: bytes) -> bool:
    try:
        bounded(fs, "pipe_file", inner, data, num_bytes=len(data), mode="create")
    except FileExistsError:
        pass
    except (NotImplementedError, TypeError, ValueError):  # a file system that does not know the mode
        if not fs.exists(inner):
            fs.pipe_file(inner, data)
    return bool(fs.cat_file(inner) == data)


def remove(path: str) -> None:
    """Remove a file; a missing file is no error.

    Raises:
        StorageError: it could not be removed.
    """
    fs, inner = filesystem(path)

    def gone() -> None:
        with missing_is_fine():
            bounded(fs, "rm_file", inner)

    with errors_named("remove", path):
        with_retries(path, gone)


def fingerprint(path: str) -> str | None:
    """Size and time stamp (or tag) of a file as its storage states them; None if it cannot be asked.

    It changes when the file is replaced. For remote files it equals the fingerprint from a listing
    (:func:`fingerprint_of`). A member of an archive has that of the archive.
    """
    path, _ = split_member(path)
    with suppress(StorageError, ValueError, *storage_errors()):  # ValueError: a zero byte in a name
        if is_local(path):
            found = os.stat(absolute(path))
            return f"{found.st_size}-{found.st_mtime_ns}"
        fs, inner = filesystem(path)

        return fingerprint_of(with_retries(path, lambda: fs.info(inner)))
    return None


_TAGS = ("ETag", "etag", "md5Hash", "content_md5", "LastModified", "last_modified", "updated", "mtime", "Last-Modified")


def fingerprint_of(info: Mapping[str, Any]) -> str | None:
    """The fingerprint from a remote file system's description of a file; None where it holds no tag or time."""
    tag = next((str(info[name]).strip('"') for name in _TAGS if info.get(name)), None)
    # bytes of a server's header that are not UTF-8 cannot be encoded again
    return None if tag is None else f"{info.get('size')}-{tag.encode(errors='backslashreplace').decode()}"


def check_writable(folder: str) -> None:
    """Check that files can be written into a folder, by writing one and removing it.

    Raises:
        StorageError: files cannot be written there, or not removed.
    """
    path = join(folder, f".write-test-{uuid.uuid4().hex[:8]}")
    write_atomic(path, b"vidshard")
    remove(path)
