"""Content id: the digest that names a video wherever its file is, and checks that a file still holds what was planned.

A file of up to ``WHOLE_ID_BYTES`` is digested whole: decoding reads all of it anyway, and nobody can make another file
of the same id. Of a larger one the size and five samples are digested. Files that differ between the samples alone then
share an id; whoever makes videos on purpose can do that.

Digesting 16 MiB takes about 17 ms, and five samples 0.4 ms.
"""

from __future__ import annotations

import hashlib
import os
from fractions import Fraction

from vidshard.pipeline.video.input_file import WatchedFile

WHOLE_ID_BYTES = 16 << 20
"""Size up to which a file is digested whole."""

_SAMPLE_BYTES = 1 << 16
_READ_BYTES = 1 << 20


def content_id(file: WatchedFile) -> str:
    """Digest of a file's content: 24 hex digits, the same for all copies. The position goes back to the start.

    ``file.limits.sampled_ids`` asks for samples of small files too, as in outputs of earlier versions.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    if num_bytes > WHOLE_ID_BYTES or file.limits.sampled_ids:
        return _sampled(file, num_bytes)
    return _whole(file, num_bytes)


def archive_id(file_id: str, rate: Fraction) -> str:
    """Id of the video in an archive of images: the run's rate gives the images their times, so it is part of it."""
    return hashlib.blake2b(f"{file_id} {rate}".encode(), digest_size=12).hexdigest()


def has_content(file: WatchedFile, video_id: str) -> bool:
    """Whether the file holds the video of an id, whichever version of vidshard made it. The position is lost."""
    num_bytes = file.seek(0, os.SEEK_END)
    digests = [_sampled] if num_bytes > WHOLE_ID_BYTES else [_whole, _sampled]
    for digest in digests:
        file_id = digest(file, num_bytes)
        if video_id in (file_id, archive_id(file_id, file.limits.image_fps)):
            return True
    return False


def _whole(file: WatchedFile, num_bytes: int) -> str:
    digest = hashlib.blake2b(num_bytes.to_bytes(8, "little"), digest_size=12)
    file.seek(0)
    while part := file.read(_READ_BYTES):
        digest.update(part)
    file.seek(0)
    return digest.hexdigest()


def _sampled(file: WatchedFile, num_bytes: int) -> str:
    digest = hashlib.blake2b(num_bytes.to_bytes(8, "little"), digest_size=12)
    last = num_bytes - _SAMPLE_BYTES
    if num_bytes <= 5 * _SAMPLE_BYTES:
        return _whole(file, num_bytes)
    for sample in file.samples((0, last // 4, last // 2, last * 3 // 4, last), _SAMPLE_BYTES):
        digest.update(sample)
    file.seek(0)
    return digest.hexdigest()
