"""Reading videos from remote storage for a decoder: a small one whole, a large one in cached blocks."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any, BinaryIO, cast

from vidshard.pipeline.storage.errors import ReadError, StorageError
from vidshard.pipeline.storage.file_systems import bounded, file_info, filesystem, retry_reads
from vidshard.pipeline.storage.files import open_binary
from vidshard.pipeline.storage.paths import is_local
from vidshard.pipeline.storage.retry import errors_named, whole, with_retries
from vidshard.pipeline.storage.transient import storage_errors
from vidshard.schemas.errors import one_line
from vidshard.schemas.uris import shown_uri

WHOLE_BYTES = 16 << 20
"""Remote videos up to this size are fetched at once."""

UNSIZED_BYTES = 256 << 20
"""Remote videos whose server does not state their length are fetched at once, up to this size."""

_BLOCK_BYTES = 4 << 20
_MAX_BLOCKS = 8


class RemoteVideo(io.RawIOBase):
    """A large remote file, read in blocks of 4 MiB; eight blocks are kept, and the next one is prefetched.

    A decoder reads an index, often at the end, then the rest in order. No byte is fetched twice as long as the ranges
    it alternates between lie in fewer than eight blocks.
    """

    def __init__(self, url: str, fs: Any, path: str, num_bytes: int) -> None:
        """Open the file of ``num_bytes`` bytes at a URL, which is ``path`` in the file system's own terms."""
        super().__init__()
        self._url, self._fs, self._path, self._num_bytes = url, fs, path, num_bytes
        options = {"maxblocks": _MAX_BLOCKS}
        self._file = fs.open(
            path, "rb", block_size=_BLOCK_BYTES, cache_type="background", cache_options=options, size=num_bytes
        )
        retry_reads(self._file, url)

    @property
    def num_bytes(self) -> int:
        """Size of the file."""
        return self._num_bytes

    def samples(self, offsets: Sequence[int], num_bytes: int) -> list[bytes]:
        """``num_bytes`` bytes from each offset, fewer at the end of the file; fetched side by side, past the cache.

        Raises:
            StorageError: they cannot be read; it is an OSError also.
        """
        ends = [min(offset + num_bytes, self._num_bytes) for offset in offsets]
        paths = [self._path] * len(ends)

        def once() -> list[bytes]:
            parts = self._fs.cat_ranges(paths, list(offsets), ends, on_error="raise")
            return [whole(part, end - at) for part, at, end in zip(parts, offsets, ends, strict=True)]

        with errors_named("read", self._url, ReadError):
            return with_retries(self._url, once)

    def read(self, num_bytes: int = -1, /) -> bytes:
        """At most this many bytes.

        Raises:
            StorageError: they cannot be read; it is an OSError also.
        """
        with errors_named("read", self._url, ReadError):
            return cast(bytes, self._file.read(num_bytes))

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """The new position."""
        return int(self._file.seek(offset, whence))

    def tell(self) -> int:
        """The position."""
        return int(self._file.tell())

    def close(self) -> None:
        """Release the blocks."""
        self._file.close()
        super().close()


def open_video(path: str) -> BinaryIO:
    """Open a video for decoding: a small remote one is fetched whole, a larger one is a ``RemoteVideo``.

    One whose server does not state its length, as with chunked or compressed answers, is fetched whole too.

    Raises:
        StorageError: it is missing or not readable, or its length is not stated and beyond ``UNSIZED_BYTES``.
    """
    if is_local(path):
        return open_binary(path)
    fs, inner = filesystem(path)

    def opened() -> BinaryIO:
        num_bytes = file_info(fs, inner)["size"]
        if num_bytes is None:
            return io.BytesIO(_without_length(fs, inner))
        if num_bytes > WHOLE_BYTES:
            return cast(BinaryIO, RemoteVideo(path, fs, inner, num_bytes))
        return io.BytesIO(whole(bounded(fs, "cat_file", inner, num_bytes=num_bytes), num_bytes))

    with errors_named("read", path):
        try:
            return with_retries(path, opened)
        except Exception as error:
            if isinstance(error, (StorageError, *storage_errors())):
                raise
            # the file systems of fsspec's odder protocols raise whatever an address leads to
            raise StorageError(f"cannot read {shown_uri(path)}: {type(error).__name__}: {one_line(error)}") from error


def _without_length(fs: Any, inner: str) -> bytes:
    """The content of a file whose length is unknown.

    Raises:
        OSError: it is larger than ``UNSIZED_BYTES``.
    """
    data = bytearray()
    with fs.open(inner, "rb", block_size=0) as file:
        while part := file.read(_BLOCK_BYTES):
            data += part
            if len(data) > UNSIZED_BYTES:
                raise OSError(
                    f"the server does not state its length, and it is larger than {UNSIZED_BYTES:,} bytes: serve it "
                    "with a Content-Length, or copy it to a file system"
                )
    return bytes(data)
