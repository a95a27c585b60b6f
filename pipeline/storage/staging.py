"""Staged files: a file is written whole by one process, stays invisible, and is published by another.

A writer stages, and the process that holds the output's lease publishes, through which no content passes:

======================  ==========================================  =====================================
storage                 staged as                                   published by
======================  ==========================================  =====================================
local                   a file in the area, synced                  a rename
S3                      a multipart upload that is not completed    its completion
another object store    an object in the area                       a copy by the store
======================  ==========================================  =====================================

An area is a folder, ``staged/NUMBER``, that belongs to one run. :func:`remove_areas` takes all of them away, and aborts
the uploads. From then on nothing that was staged before can be published, whoever still tries.
"""

from __future__ import annotations

import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vidshard.pipeline.storage.errors import StorageError
from vidshard.pipeline.storage.file_systems import bounded, file_info, filesystem, missing_is_fine
from vidshard.pipeline.storage.files import UPLOAD_PART_BYTES, make_folder, sync_folder
from vidshard.pipeline.storage.paths import absolute, is_local, join
from vidshard.pipeline.storage.retry import errors_named, with_retries
from vidshard.pipeline.storage.transient import error_code, root_cause
from vidshard.schemas.uris import shown_uri


class StagedFileGoneError(StorageError):
    """A staged file is there no more: another run has taken over, or the file was discarded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StagedFile:
    """A file that is written and not yet visible at its path."""

    path: str
    """Path at which it is published."""
    handle: str
    """Path of the staged file or object, or the id of the upload."""
    num_bytes: int
    parts: tuple[str, ...] = ()
    """Tags of the parts of an upload; empty for a file or an object."""


def open_area(area: str) -> None:
    """Make the folder of an area, and the folders above it.

    Raises:
        StorageError: it could not be made.
    """
    if is_local(area):
        with errors_named("write", area):
            make_folder(Path(absolute(area)))


def close_area(area: str) -> None:
    """Remove a local area with whatever is staged in it, and the folder of areas if it is the last one."""
    if is_local(area):
        with suppress(OSError):
            shutil.rmtree(absolute(area), ignore_errors=True)
            Path(absolute(area)).parent.rmdir()


def stage(path: str, data: bytes | memoryview, *, area: str) -> StagedFile:
    """Write a file without making it visible.

    Args:
        path: where it is to be published.
        data: its whole content.
        area: an area that is open.

    Raises:
        StagedFileGoneError: the area was removed.
        StorageError: the file could not be written; nothing of it is left.
    """
    fs, inner = filesystem(path)
    staged = join(area, f"{path.rsplit('/', 1)[-1]}.{uuid.uuid4().hex[:8]}.tmp")
    num_bytes = len(memoryview(data).cast("B"))
    with errors_named("write", path):
        if is_local(path):
            _write_local(Path(absolute(staged)), data)
        elif hasattr(fs, "call_s3"):
            return _upload(fs, path, inner, bytes(data))
        else:
            content = bytes(data)
            _, hidden = filesystem(staged)
            with_retries(path, lambda: bounded(fs, "pipe_file", hidden, content, num_bytes=num_bytes))
    return StagedFile(path=path, handle=staged, num_bytes=num_bytes)


def publish(staged: StagedFile) -> None:
    """Make a staged file visible at its path, in one step; a file that is there already is replaced.

    Raises:
        StagedFileGoneError: it is staged no more, and nothing is at its path.
        StorageError: it could not be published.
    """
    fs, inner = filesystem(staged.path)
    with errors_named("write", staged.path):
        if is_local(staged.path):
            target = Path(inner)
            make_folder(target.parent)
            try:
                os.rename(absolute(staged.handle), target)
            except FileNotFoundError as error:
                raise _gone(staged) from error
            sync_folder(target.parent)
        elif staged.parts:
            if not with_retries(staged.path, lambda: _complete(fs, inner, staged)):
                raise _gone(staged)
        else:
            _, hidden = filesystem(staged.handle)
            if not with_retries(staged.path, lambda: _copy(fs, hidden, inner, staged)):
                raise _gone(staged)
            discard(staged)


def discard(staged: StagedFile) -> None:
    """Remove a staged file; what cannot be removed is left to :func:`remove_areas` of the next run."""
    fs, inner = filesystem(staged.path)
    with suppress(Exception):
        if is_local(staged.path):
            Path(absolute(staged.handle)).unlink(missing_ok=True)
        elif staged.parts:
            bucket, key, _ = fs.split_path(inner)
            fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=staged.handle)
        else:
            bounded(fs, "rm_file", filesystem(staged.handle)[1])


def remove_areas(areas: str, published: str) -> int:
    """Remove every area, so that nothing staged in one can be published any more; returns how many files were staged.

    Call it only while holding the lease of the output. On S3 it needs the permissions to list and to abort multipart
    uploads. Without them uploads of a killed run stay, and the run could complete one that it had checked before.

    Args:
        areas: the folder of the areas.
        published: the folder at which files of them would have been published.

    Raises:
        StorageError: an area could not be removed.
    """
    fs, inner = filesystem(areas)
    if is_local(areas):
        with errors_named("remove", areas):
            return _remove_local(Path(inner))
    if hasattr(fs, "call_s3"):
        return _abort_uploads(fs, filesystem(published)[1])

    def found_now() -> list[str]:
        with missing_is_fine():
            return list(fs.find(inner))
        return []

    with errors_named("remove", areas):
        found = with_retries(areas, found_now)
        for path in found:
            with_retries(areas, lambda path=path: _remove(fs, path))  # type: ignore[misc]
    return len(found)


def _gone(staged: StagedFile) -> StagedFileGoneError:
    return StagedFileGoneError(
        f"cannot write {shown_uri(staged.path)}: its staged file is gone, as another run has taken over the output"
    )


def _write_local(path: Path, data: bytes | memoryview) -> None:
    try:
        # no folder is made: one that another run has removed stays away
        with path.open("xb") as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except FileNotFoundError as error:
        raise StagedFileGoneError(
            f"cannot write {shown_uri(str(path))}: its folder is gone, as another run has taken over the output"
        ) from error


def _remove_local(areas: Path) -> int:
    count = 0
    if not areas.is_dir():
        return 0
    for area in areas.iterdir():
        # in one step, so that no file of it is published while others are removed
        removed = area if area.name.startswith(".") else area.rename(area.with_name(f".{uuid.uuid4().hex[:8]}"))
        count += sum(1 for _ in removed.iterdir())
        shutil.rmtree(removed, ignore_errors=True)
    with suppress(OSError):
        areas.rmdir()
    return count


def _upload(fs: Any, path: str, inner: str, content: bytes) -> StagedFile:
    bucket, key, _ = fs.split_path(inner)
    upload = with_retries(path, lambda: bounded(fs, "call_s3", "create_multipart_upload", Bucket=bucket, Key=key))
    number = str(upload["UploadId"])
    tags: list[str] = []
    try:
        for at in range(0, max(1, len(content)), UPLOAD_PART_BYTES):
            part = content[at : at + UPLOAD_PART_BYTES]
            place = {"Bucket": bucket, "Key": key, "UploadId": number, "PartNumber": len(tags) + 1}
            answer = with_retries(
                path,
                lambda part=part, place=place: bounded(  # type: ignore[misc]
                    fs, "call_s3", "upload_part", num_bytes=len(part), Body=part, **place
                ),
            )
            tags.append(str(answer["ETag"]))
    except BaseException:
        discard(StagedFile(path=path, handle=number, num_bytes=0, parts=("begun",)))
        raise
    return StagedFile(path=path, handle=number, num_bytes=len(content), parts=tuple(tags))


def _complete(fs: Any, inner: str, staged: StagedFile) -> bool:
    """Complete an upload; returns whether its object is there."""
    bucket, key, _ = fs.split_path(inner)
    parts = [{"ETag": tag, "PartNumber": number} for number, tag in enumerate(staged.parts, start=1)]
    place = {"Bucket": bucket, "Key": key, "UploadId": staged.handle, "MultipartUpload": {"Parts": parts}}
    try:
        bounded(fs, "call_s3", "complete_multipart_upload", **place)
        return True
    except Exception:
        if _is_begun(fs, bucket, key, staged.handle):
            raise
    # completed by an attempt whose answer was lost, or aborted; asked here, as an error inherits its context's verdict
    return _is_there(fs, inner)


def _is_begun(fs: Any, bucket: str, key: str, upload: str) -> bool:
    try:
        bounded(fs, "call_s3", "list_parts", Bucket=bucket, Key=key, UploadId=upload)
    except Exception as error:  # noqa: BLE001  whatever else happens, the first error is raised
        return error_code(root_cause(error)) != "NoSuchUpload" and not isinstance(error, FileNotFoundError)
    return True


def _copy(fs: Any, hidden: str, inner: str, staged: StagedFile) -> bool:
    """Copy a staged object to its path; returns whether it is there."""
    with suppress(FileNotFoundError):
        bounded(fs, "cp_file", hidden, inner, num_bytes=staged.num_bytes)
        return True
    return _is_there(fs, inner)


def _is_there(fs: Any, inner: str) -> bool:
    with missing_is_fine():
        file_info(fs, inner)
        return True
    return False


def _remove(fs: Any, path: str) -> None:
    with missing_is_fine():
        bounded(fs, "rm_file", path)


def _abort_uploads(fs: Any, published: str) -> int:
    bucket, prefix, _ = fs.split_path(published.rstrip("/") + "/x")
    prefix = prefix[:-1]
    count = 0
    markers: dict[str, str] = {}
    while True:
        try:
            options: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, **markers}
            list_now = partial(bounded, fs, "call_s3", "list_multipart_uploads", **options)
            answer = with_retries(f"s3://{published}", list_now)
        except PermissionError:
            return count
        for upload in answer.get("Uploads") or []:
            with suppress(FileNotFoundError, PermissionError):
                bounded(
                    fs,
                    "call_s3",
                    "abort_multipart_upload",
                    Bucket=bucket,
                    Key=upload["Key"],
                    UploadId=upload["UploadId"],
                )
                count += 1
        if not answer.get("IsTruncated"):
            return count
        markers = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer["NextUploadIdMarker"]}
