"""Archives of videos: tar files (WebDataset), zip files, and Parquet files that hold the bytes of videos.

Each video in one is a row, read where it lies: a window of the tar or zip, or a value of the Parquet file
(``pipeline.video.member``). Files beside a video that share its name up to the first dot are its columns: the fields of
a ``.json`` file, and ``.txt`` and other texts under their extension. An archive whose first files are images is one
video and stays one (``pipeline.video.image_archive``).

Indexes are read here, in the driver, by Python with limits; contents of videos are not. What is wrong with a member is
a fault of its row, and what is wrong with an archive one of a row that stands for the rest of it.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import pyarrow as pa

from vidshard.pipeline import storage
from vidshard.pipeline.inputs.manifest import InputError, Manifest, manifest_of
from vidshard.pipeline.inputs.manifest_file import RowFaults
from vidshard.pipeline.inputs.manifest_json import read_json_lines
from vidshard.pipeline.output.parquet import BoundedParquet
from vidshard.pipeline.video.image_archive import IMAGE_EXTENSIONS, MAX_INDEX_BYTES, MAX_MEMBERS
from vidshard.pipeline.video.member import DEFLATED, MAX_HELD_BYTES, STORED
from vidshard.schemas.errors import VidshardError, one_line
from vidshard.schemas.locations import join_options
from vidshard.schemas.text import readable

ARCHIVE_EXTENSIONS = frozenset({"tar", "zip"})

_MAX_SIDE_BYTES = 1 << 20
"""Largest file of columns beside a video."""
_MAX_SIDES_BYTES = 512 << 20
"""All of them in one archive."""
_MAX_NAME = 1024
_FIRST_MEMBERS = 64
"""Members among which a video must be, where images are too, or the archive is one of images."""
_BLOCK_BYTES = 64 << 10
"""Bytes read at once: a tar has a header before each member, and nearly all of it is jumped over."""
_TEXT_EXTENSIONS = frozenset({"txt", "text", "caption", "cls", "id", "label", "prompt"})
_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    OverflowError,
    RecursionError,
    NotImplementedError,
    IndexError,
)


class _TooLargeError(ValueError):
    """A read that no index needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    """A file in an archive."""

    name: str
    options: dict[str, str]
    """Options of the location that say where in the archive the video is."""
    num_bytes: int
    read: Callable[[], bytes]
    """Reads the content, of small members only."""
    fault: str | None = None
    """Why it cannot be read where it lies; None if it can."""


@dataclass(slots=True)
class _Rows:
    """Rows of the videos of an archive."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[int, str] = field(default_factory=dict)

    def add(self, row: dict[str, Any], fault: str | None = None) -> None:
        if fault is not None:
            self.faults[len(self.rows)] = fault
        self.rows.append(row)


@dataclass(slots=True)
class _Bounded:
    """The file object for Python's archive modules: refuses reads that are too large and seeks before the start."""

    file: BinaryIO
    num_bytes: int

    def read(self, num_bytes: int = -1) -> bytes:
        if num_bytes < 0:
            num_bytes = max(0, self.num_bytes - self.tell())
        if num_bytes > MAX_INDEX_BYTES:
            raise _TooLargeError(f"an index of {num_bytes:,} bytes, more than the {MAX_INDEX_BYTES:,} that are read")
        return self.file.read(num_bytes)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self.num_bytes}[whence]
        if start + offset < 0:
            raise EOFError("it points before the start of the file")
        return self.file.seek(start + offset)

    def tell(self) -> int:
        return self.file.tell()

    def seekable(self) -> bool:
        return True


def videos_in_archive(path: str, extensions: frozenset[str], signals: Sequence[str] = ()) -> Manifest | None:
    """The videos of a tar or zip file as rows; None for a file that is no such archive, or one of images.

    Args:
        path: the file, absolute or at a URL.
        extensions: of videos.
        signals: columns of files beside videos that hold paths of signals.

    Raises:
        InputError: the file cannot be read.
    """
    with _opened(path) as file:
        head = file.read(512)
        num_bytes = file.seek(0, os.SEEK_END)
        bounded = _Bounded(file, num_bytes)
        if head.startswith((b"PK\3\4", b"PK\5\6")):
            members = _zip_members(bounded)
        elif head[257:262] == b"ustar":
            members = _tar_members(bounded)
        else:
            return None
        found = _listed(members, path, extensions)
    return None if found is None else _manifest(found, path, signals)


def _opened(path: str) -> BinaryIO:
    try:
        return storage.open_binary(path, block_bytes=_BLOCK_BYTES)
    except storage.StorageError as error:
        raise InputError(f"{error} (given as an archive)") from error


def _listed(members: Iterator[_Member | str], path: str, extensions: frozenset[str]) -> _Rows | None:
    """The rows of an archive; None if it has no videos.

    Args:
        members: of the archive; a text, the last one, says why there are no more.
        path: of the archive.
        extensions: of videos.
    """
    videos: list[_Member] = []
    sides: dict[str, dict[str, _Member | bytes]] = defaultdict(dict)
    broken: str | None = None
    num_images = num_sides = 0
    for number, member in enumerate(members):
        if isinstance(member, str):
            broken = member
            break
        if number >= MAX_MEMBERS:
            broken = f"it has more than {MAX_MEMBERS:,} members"
            break
        extension = PurePosixPath(member.name).suffix.lower().removeprefix(".")
        num_images += extension in IMAGE_EXTENSIONS
        if extension in extensions - ARCHIVE_EXTENSIONS:
            videos.append(member)
        elif number >= _FIRST_MEMBERS and num_images and not videos:
            return None
        elif extension == "json" or extension in _TEXT_EXTENSIONS:
            num_sides += member.num_bytes
            if member.fault is None and member.num_bytes <= _MAX_SIDE_BYTES and num_sides <= _MAX_SIDES_BYTES:
                content: _Member | bytes = member.read()
            else:
                content = member
            sides[_key(member.name)][extension] = content
    if not videos:
        return None
    rows = _Rows()
    counts = Counter(member.name for member in videos)
    for member in videos:
        fault = member.fault or _fault_of_name(member.name)
        if counts[member.name] > 1:
            fault = f"{readable(member.name, 200)} is {counts[member.name]} times in the archive"
        columns: dict[str, Any] = {}
        for extension, side in sides.get(_key(member.name), {}).items():
            try:
                columns |= _columns_of(extension, side)
            except ValueError as error:
                fault = fault or f"{readable(member.name, 200)}: {error}"
        uri = join_options(path, {**member.options, "member": member.name[:_MAX_NAME]})
        rows.add({**columns, "member": member.name[:_MAX_NAME], "uri": uri}, fault)
    if broken is not None:
        rows.add({"uri": join_options(path, {"bytes": "0:0", "member": "the rest"})}, broken)
    return rows


def _key(name: str) -> str:
    """Key that a video shares with the files beside it: the name up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.split(".", 1)[0]


_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def _fault_of_name(name: str) -> str | None:
    shown = readable(name, 200)
    if len(name) > _MAX_NAME:
        return f"its name has {len(name):,} characters: {shown}"
    if name.startswith("/") or ".." in name.replace("\\", "/").split("/") or _DRIVE.match(name):
        return f"its name leads out of the archive: {shown}"
    if any("\ud800" <= character <= "\udfff" for character in name) or "\0" in name:
        return f"its name is not UTF-8: {shown}"
    return None


def _columns_of(extension: str, side: _Member | bytes) -> dict[str, Any]:
    """Columns from a file beside a video.

    Raises:
        ValueError: it is too large, or no such file.
    """
    if isinstance(side, _Member):
        raise ValueError(f"the .{extension} file beside it has {side.num_bytes:,} bytes, or {side.fault or 'too many'}")
    try:
        text = side.decode("utf-8-sig")
        if extension != "json":
            return {extension: text.strip()}
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the .{extension} file beside it cannot be read: {one_line(error, 120)}") from error
    if not isinstance(values, dict):
        raise ValueError("the .json file beside it holds no object")
    if "" in values:
        raise ValueError("the .json file beside it has a field without a name")
    return {f"json_{name}" if name in ("uri", "member") else name: _storable(value) for name, value in values.items()}


def _storable(value: Any) -> Any:
    """A JSON value without empty objects, which Parquet cannot store: they are null."""
    if isinstance(value, dict):
        return {name: _storable(each) for name, each in value.items()} or None
    return [_storable(each) for each in value] if isinstance(value, list) else value


def _tar_members(file: _Bounded) -> Iterator[_Member | str]:
    """The regular files of a tar; at last, if it is damaged, the reason."""
    try:
        file.seek(0)
        tar = tarfile.TarFile(fileobj=cast(BinaryIO, file), errors="surrogateescape")
        for entry in tar:
            cast(Any, tar).members.clear()  # else it keeps every header
            if entry.isdir():
                continue
            fault = None
            if not entry.isreg():
                fault = "it is a link, a device or a pipe, and no file"
            elif entry.issparse():
                fault = "it is stored as a sparse file"
            elif entry.offset_data + entry.size > file.num_bytes:
                yield f"the tar archive ends inside {readable(entry.name, 200)}"
                return
            yield _Member(
                name=entry.name,
                options={"bytes": f"{entry.offset_data}:{entry.size}"},
                num_bytes=entry.size,
                read=_reader(file, entry.offset_data, entry.size, tar),
                fault=fault and f"{readable(entry.name, 200)}: {fault}",
            )
        # tarfile takes any header that makes no sense for the end of the archive, which is a block of zeros
        file.seek(tar.offset)
        block = file.read(tarfile.BLOCKSIZE)
        if len(block) < tarfile.BLOCKSIZE:
            yield "the tar archive has no end mark: it was cut"
        elif block.strip(b"\0"):
            yield f"the tar archive is damaged at byte {tar.offset}"
    except _DAMAGE as error:
        yield f"the tar archive is damaged: {one_line(error, 200)}"


def _reader(file: _Bounded, at: int, num_bytes: int, tar: tarfile.TarFile) -> Callable[[], bytes]:
    def read() -> bytes:
        file.seek(at)
        data = file.read(num_bytes)
        file.seek(tar.offset)
        return data

    return read


def _zip_members(file: _Bounded) -> Iterator[_Member | str]:
    """The files of a zip, by its index; at last, if that is damaged, the reason."""
    try:
        archive = zipfile.ZipFile(cast(BinaryIO, file))
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        ends: dict[int, int] = {}
        order = sorted(entries, key=lambda entry: entry.header_offset)
        for entry, following in zip(order, [*order[1:], None], strict=True):
            ends[id(entry)] = archive.start_dir if following is None else following.header_offset
        for entry in entries:
            yield _Member(
                name=entry.filename,
                options={"zip": f"{entry.header_offset}:{entry.compress_size}:{entry.compress_type}:{entry.file_size}"},
                num_bytes=entry.file_size,
                read=_inflater(archive, entry),
                fault=_fault_of_entry(entry, ends[id(entry)]),
            )
    except _DAMAGE as error:
        yield f"the zip archive's index is damaged: {one_line(error, 200)}"


def _inflater(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            with archive.open(entry) as member:
                return member.read(_MAX_SIDE_BYTES + 1)
        except _DAMAGE:
            return b"\xff"  # no text, which is a fault of the row

    return read


def _fault_of_entry(entry: zipfile.ZipInfo, end: int) -> str | None:
    """Why a file of a zip cannot be read where it lies; None if it can.

    Args:
        entry: as the index states it.
        end: offset of what follows it.
    """
    name = readable(entry.filename, 200)
    if entry.flag_bits & 1:
        return f"{name} is encrypted: pack the archive without a password"
    if entry.compress_type not in (STORED, DEFLATED):
        return f"{name} is compressed by zip's method {entry.compress_type}: pack it with deflate, or stored"
    if entry.compress_type == DEFLATED and entry.file_size > MAX_HELD_BYTES:
        return f"{name} is compressed and {entry.file_size:,} bytes large: above {MAX_HELD_BYTES:,} it must be stored"
    if entry.header_offset + 30 + entry.compress_size > end:
        return f"{name} overlaps what follows it in the zip archive"
    return None


def _manifest(found: _Rows, path: str, signals: Sequence[str]) -> Manifest:
    """Rows as those of a manifest, by the rules for JSON lines: columns of mixed types are faults of rows."""
    faults = RowFaults()
    for number, text in found.faults.items():
        faults.add(number, text)
    lines = [
        json.dumps(row if number not in found.faults else {"uri": row["uri"]}) for number, row in enumerate(found.rows)
    ]
    kinds = dict.fromkeys(("uri", "member", *_TEXT_EXTENSIONS), "text")
    try:
        table = read_json_lines(io.BytesIO("\n".join(lines).encode()), faults, kinds)
        return _with_fingerprint(manifest_of(table, faults, path, signals), path)
    except (pa.ArrowException, ValueError, InputError) as error:
        faults = RowFaults()
        faults.add(0, f"the columns of the files beside its videos cannot be stored: {one_line(error, 300)}")
        return _with_fingerprint(manifest_of(pa.table({"uri": [path]}), faults, path), path)


def _with_fingerprint(manifest: Manifest, path: str) -> Manifest:
    """The state of the archive as that of each of its members."""
    videos = manifest.videos
    at = videos.schema.get_field_index("fingerprint")
    state = pa.array([storage.fingerprint(path)] * videos.num_rows, pa.string())
    videos = videos.set_column(at, videos.schema.field(at), state)
    return Manifest(videos=videos, renamed_columns=manifest.renamed_columns)


# Parquet.


def videos_in_parquet(path: str, signals: Sequence[str] = ()) -> Manifest | None:
    """The videos whose bytes a Parquet file holds, as rows; None for a file without any, or with a column ``uri``.

    Columns of videos are those that Hugging Face's metadata calls so, structures of ``bytes`` and ``path`` or columns
    of bytes whose name says it. Other columns are copied, without those of bytes.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        with _opened(path) as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 8))
            if int.from_bytes(file.read(8)[:4], "little") > min(MAX_INDEX_BYTES, end):
                raise ValueError("its footer is larger than is read")
            file.seek(0)
            parquet = BoundedParquet(file)
            schema = parquet.schema_arrow
            columns = _video_columns(schema)
            if not columns or "uri" in schema.names:
                return None
            num_rows = parquet.metadata.num_rows
            if num_rows * len(columns) > MAX_MEMBERS:
                raise ValueError(f"it holds more than {MAX_MEMBERS:,} videos")
            others = [each.name for each in schema if not _holds_bytes(each.type)]
            table = _columns_beside(parquet, others)
    except VidshardError:
        raise
    except Exception as error:  # a damaged file makes Arrow raise whatever its bytes lead to
        raise InputError(f"{storage.public_uri(path)} cannot be read: {one_line(error, 200)}") from error
    pieces = []
    for column in columns:
        uris = [join_options(path, {"row": str(row), "column": column}) for row in range(num_rows)]
        names = pa.array([column] * num_rows, pa.string())
        beside = {f"parquet_{name}" if name == "member" else name: table[name] for name in others}
        pieces.append(pa.table({**beside, "member": names, "uri": pa.array(uris, pa.string())}))
    joined = pa.concat_tables(pieces).replace_schema_metadata(None)
    return _with_fingerprint(manifest_of(joined, RowFaults(), path, signals), path)


def _columns_beside(parquet: BoundedParquet, names: list[str]) -> pa.Table:
    """Columns of all rows.

    Raises:
        ValueError: they are too large.
    """
    groups, num_bytes = [], 0
    for number in range(parquet.metadata.num_row_groups if names else 0):
        groups.append(parquet.group(number, names))
        num_bytes += groups[-1].nbytes
        if num_bytes > _MAX_SIDES_BYTES:
            raise ValueError(f"its columns beside the videos have more than {_MAX_SIDES_BYTES:,} bytes")
    schema = pa.schema([parquet.schema_arrow.field(name) for name in names])
    return pa.concat_tables([schema.empty_table(), *groups])


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(_holds_bytes(each.type) for each in kind)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _holds_bytes(kind.value_type)
    if pa.types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    kinds = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return any(is_kind(kind) for is_kind in kinds)


def _video_columns(schema: pa.Schema) -> list[str]:
    stated: dict[str, Any] = {}
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        stated = {name: each.get("_type") for name, each in info["info"]["features"].items() if isinstance(each, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        stated = {}
    found = []
    for each in schema:
        is_struct = pa.types.is_struct(each.type) and each.type.get_field_index("bytes") >= 0
        holds = _holds_bytes(each.type.field("bytes").type) if is_struct else _holds_bytes(each.type)
        if not holds or (not is_struct and (pa.types.is_struct(each.type) or pa.types.is_nested(each.type))):
            continue
        named = any(word in each.name.lower() for word in ("video", "mp4", "webm"))
        if stated.get(each.name) == "Video" or (stated.get(each.name) in (None, "Value") and named):
            found.append(each.name)
    return found
