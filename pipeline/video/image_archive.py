"""Images in a tar or zip archive, read as the frames of a video.

An archive is recognized by its content. Its images, in natural order of their names, are shown one after another at
the run's rate, ``image_fps``: frame ``n`` has tick ``n``. Each is read into memory and decoded by itself; nothing is
unpacked to disk. A zip has an index of its members. A tar has none, so all its headers are read each time it is
opened.
"""

from __future__ import annotations

import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO, Literal, cast

import av
import av.logging
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame

from vidshard.pipeline.video.container import allocated_pixels, refuse_large, refuse_long
from vidshard.pipeline.video.input_file import WatchedFile, read_exactly
from vidshard.schemas.errors import one_line
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Limits

IMAGE_EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff", "ppm"})

# The first bytes decide, not the name: a jpeg called .png is common.
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8", "mjpeg"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"P1", "pbm"),
    (b"P4", "pbm"),
    (b"P2", "pgm"),
    (b"P5", "pgm"),
    (b"P3", "ppm"),
    (b"P6", "ppm"),
)

# Without these FFmpeg conceals what is missing. Its tiff decoder would refuse tags that it does not know.
_STRICTNESS = {"png": "crccheck+explode", "mjpeg": "explode"}

# None, CCITT (three of them), LZW, deflate (two) and PackBits; FFmpeg silently shows black for others.
_TIFF_COMPRESSIONS = frozenset({1, 2, 3, 4, 5, 8, 32946, 32773})

MAX_MEMBERS = 1_000_000
"""Largest number of members of an archive, whatever they are; of images 11 hours at 24 per second."""

MAX_INDEX_BYTES = 128 << 20
"""Largest index of a zip, or name or header in a tar: Python reads either at once."""

_BAD_ZIP = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, ValueError, OverflowError)
_BAD_TAR = (tarfile.TarError, zlib.error, struct.error, EOFError, ValueError, OverflowError, RecursionError)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Image:
    name: str
    num_bytes: int
    """Size as the archive states it."""
    at: zipfile.ZipInfo | int
    """The entry in a zip, or the offset in a tar."""


@dataclass(slots=True)
class _Bounded:
    """The file object for Python's archive modules: refuses reads that are too large and seeks before the start."""

    watched: WatchedFile
    most_bytes: int = MAX_INDEX_BYTES

    def read(self, num_bytes: int = -1) -> bytes:
        if num_bytes < 0:
            num_bytes = max(0, self.watched.num_bytes - self.watched.tell())
        if num_bytes > self.most_bytes:
            raise VideoError(Reason.OVER_LIMIT, f"an index or name of {num_bytes:,} bytes in an archive")
        return read_exactly(self.watched, num_bytes)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.watched.tell(), os.SEEK_END: self.watched.num_bytes}[whence]
        if start + offset < 0:
            raise EOFError("it points before the start of the file")  # to the file it would be a storage error
        return self.watched.seek(start + offset)

    def tell(self) -> int:
        return self.watched.tell()

    def seekable(self) -> bool:
        return True


class ImageArchive:
    """The images of an archive, in order."""

    rate: Fraction
    images: list[_Image]
    codec: str
    """Codec of the image that was decoded last; empty before."""

    def __init__(self, kind: str, watched: WatchedFile) -> None:
        """Read the index.

        Raises:
            VideoError: DECODE_ERROR or TRUNCATED: the archive is damaged; NOT_A_VIDEO: it holds no images; OVER_LIMIT.
        """
        self.rate = watched.limits.image_fps
        self.codec = ""
        self._limits = watched.limits
        self._file = _Bounded(watched)
        self._zip: zipfile.ZipFile | None = None
        with _damage_named(f"the {kind} archive's index is damaged", _BAD_ZIP if kind == "zip" else _BAD_TAR):
            images = list(self._of_zip() if kind == "zip" else self._of_tar())
        latest = {image.name: image for image in images}  # as unpacking does when a name comes twice
        self.images = sorted(latest.values(), key=lambda image: _natural(image.name))
        if not self.images:
            known = ", ".join(sorted(IMAGE_EXTENSIONS))
            raise VideoError(
                Reason.NOT_A_VIDEO,
                f"a {kind} archive without images ({known}); name an archive of videos as an input of its own; "
                "archives in it are not opened",
            )
        refuse_long(watched.limits, seconds=len(self.images) / self.rate, num_frames=len(self.images))
        self._file.most_bytes = _most_bytes(watched.limits)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def frame(self, index: int) -> VideoFrame:
        """Decode an image.

        Raises:
            VideoError: DECODE_ERROR, OVER_LIMIT or UNSUPPORTED, with the name of the member.
        """
        image = self.images[index]
        try:
            frame, self.codec = _decode(self._bytes(image), self._limits)
        except VideoError as error:
            at = f"at {float(index / self.rate):.2f} s, in {_readable(image.name)}"
            raise VideoError(error.reason, f"{at}: {error.detail}") from error
        return frame

    def _of_zip(self) -> Iterator[_Image]:
        self._zip = zipfile.ZipFile(cast(BinaryIO, self._file))
        entries = self._zip.infolist()
        _refuse_many(len(entries))
        for entry in entries:
            if _is_image(entry.filename):  # no folder is: its name ends in a slash
                yield _Image(name=entry.filename, num_bytes=entry.file_size, at=entry)

    def _of_tar(self) -> Iterator[_Image]:
        self._file.seek(0)
        tar = tarfile.TarFile(fileobj=cast(BinaryIO, self._file), errors="surrogateescape")
        for number, member in enumerate(tar, start=1):
            _refuse_many(number)
            if member.isreg() and not member.issparse() and _is_image(member.name):
                if member.offset_data + member.size > self._file.watched.num_bytes:
                    raise VideoError(Reason.TRUNCATED, f"the tar archive ends inside {_readable(member.name)}")
                yield _Image(name=member.name, num_bytes=member.size, at=member.offset_data)
        # tarfile takes any header that makes no sense for the end of the archive, which is a block of zeros
        offset = tar.offset
        self._file.seek(offset)
        block = self._file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            raise VideoError(Reason.TRUNCATED, "the tar archive has no end mark")
        if block.strip(b"\0"):
            raise VideoError(Reason.DECODE_ERROR, f"the tar archive is damaged at byte {offset}")

    def _bytes(self, image: _Image) -> bytes:
        most = _most_bytes(self._limits)
        if image.num_bytes > most:
            raise VideoError(
                Reason.OVER_LIMIT,
                f"an image file of {image.num_bytes:,} bytes, more than the {most:,} that --max-pixels allows",
            )
        if isinstance(image.at, int):
            self._file.seek(image.at)
            return self._file.read(image.num_bytes)
        if image.at.flag_bits & 1:
            raise VideoError(Reason.DECODE_ERROR, "it is encrypted; pack the archive without a password")
        if image.at.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise VideoError(
                Reason.UNSUPPORTED,
                f"compressed by zip's method {image.at.compress_type}; pack the archive with deflate, or stored",
            )
        assert self._zip is not None, "entries come of a zip"
        with _damage_named("it is damaged", _BAD_ZIP), self._zip.open(image.at) as member:
            data = member.read(image.num_bytes + 1)  # a number: without one it inflates up to 2 GiB whatever it claims
        if len(data) != image.num_bytes:
            raise VideoError(Reason.DECODE_ERROR, f"{len(data)} bytes, not the {image.num_bytes} that the index says")
        return data


def image_archive(watched: WatchedFile) -> ImageArchive | None:
    """Open a file as an image archive; None where it is none.

    Raises:
        VideoError: as :class:`ImageArchive`.
    """
    watched.seek(0)
    head = read_exactly(watched, 512)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ImageArchive("zip", watched)
    if head[257:262] == b"ustar":
        return ImageArchive("tar", watched)
    return None


def _most_bytes(limits: Limits) -> int:
    """Largest image file: its pixels uncompressed, RGBA of 16 bits, and some more."""
    return 8 * limits.max_pixels + (1 << 20)


def _refuse_many(num_members: int) -> None:
    if num_members > MAX_MEMBERS:
        raise VideoError(Reason.OVER_LIMIT, f"an archive of more than {MAX_MEMBERS:,} files")


def _is_image(name: str) -> bool:
    """Whether a member's name is that of an image, and not hidden."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in _parts(name))
    return not hidden and name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def _natural(name: str) -> list[tuple[list[str | tuple[int, str]], str]]:
    """Sort key for natural order: folder by folder, and numbers by value, so that frame2 comes before frame10."""
    keys = []
    for part in _parts(name):
        pieces: list[str | tuple[int, str]] = list(re.split(r"([0-9]+)", part))
        for at in range(1, len(pieces), 2):
            digits = str(pieces[at]).lstrip("0")
            pieces[at] = len(digits), digits  # not an integer, as Python limits their length
        keys.append((pieces, part))
    return keys


def _decode(data: bytes, limits: Limits) -> tuple[VideoFrame, str]:
    codec = next((name for magic, name in _MAGIC if data.startswith(magic)), "")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        codec = "webp"
    if not codec:
        raise VideoError(Reason.DECODE_ERROR, "not an image of a kind that is known here, whatever its name says")
    if codec == "tiff" and (compression := _tiff_compression(data)) not in _TIFF_COMPRESSIONS:
        raise VideoError(Reason.UNSUPPORTED, f"a tiff compressed by method {compression}; save it with LZW or deflate")
    context = cast(VideoCodecContext, av.CodecContext.create(codec, "r"))
    context.thread_type, context.thread_count = "NONE", 1
    context.options = {"max_pixels": str(allocated_pixels(limits)), "err_detect": _STRICTNESS.get(codec, "crccheck")}
    frames: list[VideoFrame] = []
    words = "no picture in it"
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as messages:
            frames = context.decode(Packet(data)) + context.decode(None)
    except av.error.MemoryError:
        raise
    except av.FFmpegError as error:
        words = error.strerror or words
    finally:
        av.logging.set_level(None)
    said = [" ".join(text.split()) for _, _, text in messages if "EXIF" not in text]
    size = re.search(r"Picture size (\d+)x(\d+)", " ".join(said))
    if size is not None:
        refuse_large(limits, int(size[1]), int(size[2]))
    if not frames or frames[0].is_corrupt or (said and codec == "tiff"):
        raise VideoError(Reason.DECODE_ERROR, said[-1] if said else words)
    refuse_large(limits, frames[0].width, frames[0].height)
    return frames[0], codec


def _tiff_compression(data: bytes) -> int:
    """Compression tag of the first picture; 1 (none) where it is not stated."""
    order: Literal["little", "big"] = "little" if data.startswith(b"II") else "big"
    at = int.from_bytes(data[4:8], order)
    for entry in range(at + 2, at + 2 + 12 * int.from_bytes(data[at : at + 2], order), 12):
        if int.from_bytes(data[entry : entry + 2], order) == 259:
            return int.from_bytes(data[entry + 8 : entry + 10], order)
    return 1


@contextmanager
def _damage_named(what: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    try:
        yield
    except errors as error:
        raise VideoError(Reason.DECODE_ERROR, f"{what}: {_readable(one_line(error))}") from error


def _readable(name: str) -> str:
    """A name on one line, of printable characters, at most 200 long."""
    text = "".join(c if c.isprintable() else "?" for c in name.encode("utf-8", "replace").decode())
    return text if len(text) <= 200 else f"{text[:100]}...{text[-90:]}"
