"""Discovery: turns paths, folders, globs and manifests into the list of videos of a run.

Only names and sizes are read here; no video is opened. A folder gives the files with a video's extension. A file that
is named is taken whatever its extension. Columns of a manifest are kept as they are.
"""

from __future__ import annotations

import errno
import fnmatch
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
from fsspec.implementations.local import LocalFileSystem

from vidshard.pipeline import storage
from vidshard.pipeline.inputs.archives import videos_in_archive, videos_in_parquet
from vidshard.pipeline.inputs.lerobot import Dataset, is_dataset
from vidshard.pipeline.inputs.manifest import REF_SCHEMA, InputError, Manifest, read_manifest
from vidshard.pipeline.row_access import RowAccess
from vidshard.pipeline.row_errors import log_unforeseen
from vidshard.pipeline.rows import signal_source
from vidshard.schemas.errors import VidshardError, one_line
from vidshard.schemas.locations import each_location
from vidshard.schemas.text import readable
from vidshard.schemas.uris import is_web

VIDEO_EXTENSIONS = frozenset(
    [
        "3gp",
        "asf",
        "avi",
        "flv",
        "f4v",
        "gif",
        "h264",
        "hevc",
        "ivf",
        "m2ts",
        "m2v",
        "m4v",
        "mkv",
        "mov",
        "mp4",
        "mpeg",
        "mpg",
        "mts",
        "mxf",
        "ogv",
        "tar",
        "ts",
        "vob",
        "webm",
        "wmv",
        "y4m",
        "zip",
    ]
)
MANIFEST_EXTENSIONS = frozenset({"parquet", "csv", "jsonl"})

_STAT_THREADS = 16
_FILES_PER_BATCH = 1 << 16

FoundFile = tuple[str, int, str | None]
"""A row of ``REF_SCHEMA``: URI, bytes, fingerprint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Discovery:
    """The videos that the inputs name."""

    videos: pa.Table
    """``REF_SCHEMA`` and the manifests' columns, one row a video. Rows of manifests come first. No URI is there twice,
    except where manifests repeat it. ``fault`` says why a row of a manifest names no video, and ``refusal`` why the run
    does not allow what it names; both are null, or missing, for the others."""
    manifests: tuple[str, ...]
    """The manifests among the inputs, without credentials."""
    storage_hosts: tuple[str, ...]
    """The web servers that the run depends on, as many rows are there (``storage.storage_hosts``)."""
    renamed_columns: dict[str, str]
    """Manifest columns that would clash with a shard's own, and their new names."""
    num_passed_over: int
    """Number of files in folders without a video's extension."""
    passed_over_extensions: tuple[tuple[str, int], ...]
    """Their extensions and counts, the most frequent first."""


def discover(
    inputs: Sequence[str],
    *,
    signals: Sequence[str] = (),
    limit: int | None = None,
    ask_remote: bool = False,
    access: RowAccess | None = None,
    cameras: Sequence[str] = (),
    episodes: Sequence[tuple[int, int]] = (),
) -> Discovery:
    """List the videos that the inputs name.

    Files that were listed have their fingerprint from the listing; local files of a manifest are asked one by one.

    Args:
        inputs: files, folders, globs, manifests and LeRobot datasets, local or on any file system that fsspec knows.
        signals: columns of manifests that hold paths of signal files, or features of datasets; they come back as
            ``NAME_source``.
        limit: keep only so many videos, the first ones.
        ask_remote: also ask object stores for the fingerprint of each file that a manifest names.
        access: rules for what rows of manifests name; a row against them has the reason in a column ``refusal``. None
            allows everything.
        cameras: keys of the cameras of LeRobot datasets; all by default.
        episodes: intervals [start, end) of their episodes; all by default.

    Raises:
        InputError: an input does not exist, matches nothing or is no usable manifest.
        storage.StorageError: a file system cannot be reached.
    """
    if (cameras or episodes) and not any(map(is_dataset, inputs)):
        raise InputError("--cameras and --episodes are for LeRobot datasets: give an input such as lerobot:/data/pusht")
    named = _Named(signals=signals, access=access)
    for text in inputs:
        if is_dataset(text):
            dataset = Dataset.open(text)
            listed = dataset.rows(cameras=cameras, episodes=episodes, signals=signals)
            named.add_rows(listed, dataset.root, shown=dataset.shown)
            continue
        path = storage.absolute(text)
        if _add_embedded_videos(named, path):
            continue
        if _extension(path) in MANIFEST_EXTENSIONS and not _is_glob(path):
            named.add_rows(_read_table(path, signals), path)
        else:
            _add_files(named, path)
    named.refuse_missing_signals()
    videos = _joined(named.tables, named.files)
    if videos.num_rows == 0:
        raise InputError(f"no video in {', '.join(storage.public_uri(i) for i in inputs)}: the manifest has no rows")
    pa.default_memory_pool().release_unused()  # reading took some 100 MB for a million videos
    videos = videos.slice(0, limit)
    locations = [videos[name] for name in ("uri", *map(signal_source, signals)) if name in videos.column_names]
    return Discovery(
        videos=_with_fingerprints(videos, ask_remote),
        storage_hosts=storage.storage_hosts(locations, videos.num_rows),
        manifests=tuple(named.sources),
        renamed_columns=named.renamed,
        num_passed_over=named.passed_over.total(),
        passed_over_extensions=tuple(named.passed_over.most_common()),
    )


@dataclass(kw_only=True, slots=True)
class _Named:
    """Videos that the inputs read so far name."""

    signals: Sequence[str]
    access: RowAccess | None
    tables: list[pa.Table] = field(default_factory=list)
    """Rows of manifests, datasets and archives: ``REF_SCHEMA`` and further columns."""
    files: list[pa.Table] = field(default_factory=list)
    """Files that were named or listed: ``REF_SCHEMA``."""
    sources: list[str] = field(default_factory=list)
    """The inputs that gave rows, as messages show them."""
    renamed: dict[str, str] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)
    """Counts of files without a video's extension, by extension."""

    def add_rows(self, manifest: Manifest, path: str, *, shown: str | None = None) -> None:
        """Add the rows of one input, those that the run does not allow with the reason.

        Args:
            manifest: the rows.
            path: where they were read: the one place that they may name in any case.
            shown: the input in messages; None for the path without credentials.
        """
        videos = manifest.videos
        self.tables.append(videos if self.access is None else _with_refusals(videos, self.access, path, self.signals))
        self.sources.append(storage.public_uri(path) if shown is None else shown)
        self.renamed |= manifest.renamed_columns

    def refuse_missing_signals(self) -> None:
        """Refuse signals that no input has.

        Raises:
            InputError: there is one.
        """
        for name in self.signals:
            if not any(signal_source(name) in table.column_names for table in self.tables):
                raise InputError(f"no manifest among the inputs has a column '{name}' with the paths of that signal")


def _add_embedded_videos(named: _Named, path: str) -> bool:
    """Add the videos whose bytes Parquet files hold; False if one of the files that match holds none."""
    if _extension(path) != "parquet":
        return False
    embedded = [(each, _videos_in_parquet(each, named.signals)) for each in _matching(path)]
    found = [(each, manifest) for each, manifest in embedded if manifest is not None]
    if not found or len(found) < len(embedded):
        return False
    for each, manifest in found:
        named.add_rows(manifest, each)
    return True


def _read_table(path: str, signals: Sequence[str]) -> Manifest:
    """Read a manifest; whatever goes wrong is an error that names it.

    Raises:
        VidshardError: it cannot be read.
    """
    try:
        return read_manifest(path, signals, extension=_extension(path))
    except VidshardError:
        raise
    except Exception as error:
        log_unforeseen(error, path)
        shown = storage.public_uri(path)
        raise InputError(f"manifest {shown} cannot be read: {type(error).__name__}: {one_line(error)}") from error


def _add_files(named: _Named, path: str) -> None:
    """Add the files that a path, folder or glob names, and the videos in archives among them.

    Raises:
        InputError: there are none.
        storage.StorageError: the file system cannot be reached.
    """
    listed = _table(_list(path, named.passed_over))
    if not listed.num_rows:
        raise InputError(_nothing_found(path, named.passed_over))
    archives, files = _with_archives_opened(listed, named.signals)
    for archive, manifest in archives:
        named.add_rows(manifest, archive)
    named.files.append(files)


def _matching(path: str) -> list[str]:
    """The files that a path or a pattern names, sorted."""
    if not _is_glob(path):
        return [path]
    try:
        fs, inner = storage.filesystem(path)
        return [path] if _exists(fs, path, inner) else [_uri(fs, name) for name in sorted(_matched(fs, path, inner))]
    except storage.StorageError:
        raise
    except storage.storage_errors() as error:
        raise _not_listed(path, error) from error


def _videos_in_parquet(path: str, signals: Sequence[str]) -> Manifest | None:
    """The videos whose bytes a Parquet file holds; None if it has none or, as a manifest, says why not."""
    try:
        return videos_in_parquet(path, signals)
    except InputError:
        return None


def _with_archives_opened(listed: pa.Table, signals: Sequence[str]) -> tuple[list[tuple[str, Manifest]], pa.Table]:
    """The videos in archives among the files, by archive; and the files without those archives."""
    is_archive = pc.match_substring_regex(listed["uri"], r"(?i)\.(tar|zip)(\?[^/]*)?$")
    archives = listed["uri"].filter(is_archive).to_pylist()
    if not archives:
        return [], listed

    def opened(path: str) -> Manifest | None:
        try:
            return videos_in_archive(path, VIDEO_EXTENSIONS, signals)
        except InputError:
            return None  # it is a video, and opening that says why it is none

    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        found = [(path, each) for path, each in zip(archives, pool.map(opened, archives), strict=True) if each]
    members = pa.array([path for path, _ in found], pa.string())
    return found, listed.filter(pc.invert(pc.is_in(listed["uri"], members)))


def _with_refusals(table: pa.Table, access: RowAccess, manifest: str, signals: Sequence[str]) -> pa.Table:
    """Add a column ``refusal`` if a row names what the run does not allow. The file of the rows itself is allowed."""
    columns = ["uri", *(name for name in map(signal_source, signals) if name in table.column_names)]
    has_faults = "fault" in table.column_names
    refusals = []
    for batch in table.select(columns + ["fault"] * has_faults).to_batches(max_chunksize=_FILES_PER_BATCH):
        faults = batch["fault"].to_pylist() if has_faults else [None] * batch.num_rows
        for fault, *uris in zip(faults, *(batch[name].to_pylist() for name in columns), strict=True):
            named = [each for uri in uris if uri is not None and fault is None for each in each_location(uri)]
            named = [each for each in named if each != manifest]
            found = (access.refusal(uri, manifest) for uri in named)
            refusals.append(next((text for text in found if text is not None), None))
    if not any(refusals):
        return table
    return table.append_column("refusal", pa.array(refusals, pa.string()))


def _joined(manifests: Sequence[pa.Table], files: Sequence[pa.Table]) -> pa.Table:
    """Rows of manifests, then the files that no manifest names, each once, sorted by URI.

    Raises:
        InputError: the manifests do not agree on their columns' types.
    """
    loose = pa.concat_tables([REF_SCHEMA.empty_table(), *files])
    if manifests:
        listed = pa.chunked_array([chunk for table in manifests for chunk in table["uri"].chunks], pa.string())
        loose = loose.filter(pc.invert(pc.is_in(loose["uri"], listed.combine_chunks())))
    if len(files) > 1:
        numbered = loose.append_column("number", pa.array(range(loose.num_rows), pa.int64()))
        loose = loose.take(numbered.group_by("uri").aggregate([("number", "min")])["number_min"])
    try:
        return pa.concat_tables([*manifests, loose.sort_by("uri")], promote_options="default")
    except pa.ArrowException as error:
        raise InputError(f"the manifests do not agree on their columns' types: {error}") from error


def _table(files: Iterator[FoundFile]) -> pa.Table:
    """Files as ``REF_SCHEMA``. A million of them are never Python objects at once."""
    batches = []
    while rows := list(islice(files, _FILES_PER_BATCH)):
        batches.append(pa.table([list(column) for column in zip(*rows, strict=True)], schema=REF_SCHEMA))
    return pa.concat_tables([REF_SCHEMA.empty_table(), *batches])


def _with_fingerprints(videos: pa.Table, ask_remote: bool) -> pa.Table:
    """Fill in missing fingerprints: of local files, and of remote ones if that is asked for."""
    if videos["fingerprint"].null_count == 0:
        return videos

    def ask(some: pa.RecordBatch) -> pa.Array:
        columns = (some["uri"], some["fingerprint"], *(some[name] for name in barring))
        found = [
            storage.fingerprint(uri)
            if mark is None and not any(bars) and (ask_remote or storage.is_local(uri))
            else mark
            for uri, mark, *bars in zip(*(column.to_pylist() for column in columns), strict=True)
        ]
        return pa.array(found, pa.string())

    barring = [name for name in ("fault", "refusal") if name in videos.column_names]
    names = ["uri", "fingerprint", *barring]
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        parts = list(pool.map(ask, videos.select(names).to_batches(max_chunksize=1024)))
    at = videos.schema.get_field_index("fingerprint")
    return videos.set_column(at, REF_SCHEMA.field("fingerprint"), pa.chunked_array(parts, pa.string()))


def _extension(path: str) -> str:
    if is_web(path):
        path = path.split("?", 1)[0]
    return PurePosixPath(path).suffix.lower().removeprefix(".")


def _is_glob(path: str) -> bool:
    return glob.has_magic(path) and not is_web(path)


def _list(path: str, passed_over: Counter[str]) -> Iterator[FoundFile]:
    """List the files that a path, folder or glob names.

    Raises:
        storage.StorageError: the file system cannot be reached.
    """
    fs, inner = storage.filesystem(path)
    try:
        if _is_glob(path) and not _exists(fs, path, inner):
            if isinstance(fs, LocalFileSystem):
                seen: set[str] = set()
                for name in sorted(set(_matches("", inner.split("/")))):
                    for found in _entry(name, passed_over, set()):
                        if found[0] not in seen:  # a folder matches, and so does a file in it
                            seen.add(found[0])
                            yield found
                return
            for name, info in _matched(fs, path, inner).items():
                if name.rsplit("/", 1)[-1].startswith(".") and not path.rsplit("/", 1)[-1].startswith("."):
                    continue  # as a shell does
                if info["type"] == "directory":
                    yield from _walk(fs, path, name, passed_over)
                elif _is_video(name, passed_over):
                    yield _uri(fs, name), _size(info), _fingerprint(fs, name, info)
        elif is_web(path) and urlsplit(path).path.endswith("/"):
            for url in storage.list_web_folder(path):
                if _is_video(url, passed_over):
                    yield url, -1, None
        elif not is_web(path) and storage.with_retries(path, lambda: fs.isdir(inner)):
            yield from _walk(fs, path, inner, passed_over)
        elif _exists(fs, path, inner) and not _has_foreign_bytes(path, passed_over):
            info = storage.with_retries(path, lambda: fs.info(inner))
            yield path, _size(info), _fingerprint(fs, inner, info)
    except (FileNotFoundError, storage.StorageError) as error:
        if isinstance(error, storage.StorageError):
            raise
        return  # object stores say so where a bucket or folder does not exist
    except storage.storage_errors() as error:
        raise _not_listed(path, error) from error
    except ValueError as error:  # fsspec's, for an address such as s3://
        raise _not_listed(path, error) from error


def _not_listed(path: str, error: BaseException) -> storage.StorageError:
    """The error for an input that cannot be listed: an outage if it may pass, and did not while it was retried."""
    kind = storage.StorageOutageError if storage.is_transient(error) else storage.StorageError
    words = "; ".join([storage.describe(error), *getattr(error, "__notes__", ())])
    return kind(
        f"cannot list {storage.public_uri(path)}: {words}; check the name, the network and the credentials in the "
        "environment"
    )


def _exists(fs: Any, path: str, inner: str) -> bool:
    """Whether a path is there; a storage that cannot be asked raises, and is no absence."""
    return bool(fs.exists(inner)) if isinstance(fs, LocalFileSystem) else storage.exists(path)


def _matched(fs: Any, path: str, inner: str) -> dict[str, Any]:
    """Descriptions of the entries that a pattern matches, by name."""
    return dict(storage.with_retries(path, lambda: fs.glob(inner, detail=True)))


def _matches(folder: str, parts: Sequence[str], above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """List the entries below a local folder that match a pattern, as a shell does with ``**`` for any folders.

    A folder that has to be searched and cannot be is listed itself, so that opening it rejects it with the reason.

    Args:
        folder: the folder, without the ``/`` at its end.
        parts: the pattern by component, at least one.
        above: device and inode of the folders above, to which a link may lead back.
    """
    part, rest = parts[0], parts[1:]
    if part == "**" and not rest:
        yield folder  # a folder is listed with all that is below it
        return
    if not glob.has_magic(part):
        path = f"{folder}/{part}" if folder or part else ""  # the pattern is absolute: its first part is empty
        if not rest:
            if os.path.lexists(path):
                yield path
        elif os.path.isdir(f"{path}/"):
            yield from _matches(path, rest, above)
        return
    try:
        here = os.stat(f"{folder}/")
        with os.scandir(f"{folder}/") as entries:
            names = [
                # a link to itself would raise
                (entry.name, os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir())
                for entry in entries
            ]
    except OSError:
        yield folder
        return
    if part != "**":
        for name, is_folder in names:
            if fnmatch.fnmatchcase(name, part) and (part.startswith(".") or not name.startswith(".")):
                if not rest:
                    yield f"{folder}/{name}"
                elif is_folder:
                    yield from _matches(f"{folder}/{name}", rest, above)
        return
    yield from _matches(folder, rest, above)
    key = (here.st_dev, here.st_ino)
    if key not in above:
        for name, is_folder in names:
            if is_folder and not name.startswith("."):
                yield from _matches(f"{folder}/{name}", parts, above | {key})


def _walk(fs: Any, path: str, folder: str, passed_over: Counter[str]) -> Iterator[FoundFile]:
    if isinstance(fs, LocalFileSystem):
        os.scandir(folder).close()  # the input itself must be a folder that can be listed
        yield from _walk_local(folder, passed_over, set())
        return
    for name, info in storage.with_retries(path, lambda: fs.find(folder, detail=True)).items():
        below = name.removeprefix(folder).strip("/").split("/")
        if info["type"] == "file" and not any(part.startswith(".") for part in below) and _is_video(name, passed_over):
            yield _uri(fs, name), _size(info), storage.fingerprint_of(info)


def _walk_local(folder: str, passed_over: Counter[str], above: set[tuple[int, int]]) -> Iterator[FoundFile]:
    """List a local folder, one folder at a time: fsspec's listing of a million files takes a gigabyte.

    A folder that cannot be listed is listed itself, so that opening it rejects it with the reason.

    Args:
        folder: the folder.
        passed_over: counts the files without a video's extension.
        above: device and inode of the folders above, to which a link may lead back.
    """
    try:
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in above:
            return
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".")]
    except OSError:
        if not _has_foreign_bytes(folder, passed_over):
            yield folder, -1, None
        return
    above = above | {(here.st_dev, here.st_ino)}
    for name in names:
        yield from _entry(f"{folder.rstrip('/')}/{name}", passed_over, above)


def _entry(path: str, passed_over: Counter[str], above: set[tuple[int, int]]) -> Iterator[FoundFile]:
    """List an entry of a local folder: a folder, a file, or something that is neither.

    A name with a video's extension is listed whatever is behind it, such as a link to nothing, so that opening it
    rejects it with the reason. So is a name without an extension that cannot be looked at, as it may be a folder.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        may_be_a_folder = not _extension(path) and error.errno not in (errno.ENOENT, errno.ENOTDIR)
        if not _has_foreign_bytes(path, passed_over) and (may_be_a_folder or _is_video(path, passed_over)):
            yield path, -1, None
        return
    if stat.S_ISDIR(found.st_mode):
        yield from _walk_local(path, passed_over, above)
    elif _is_video(path, passed_over):
        is_file = stat.S_ISREG(found.st_mode)
        yield path, found.st_size if is_file else -1, f"{found.st_size}-{found.st_mtime_ns}" if is_file else None


def _is_video(name: str, passed_over: Counter[str]) -> bool:
    extension = _extension(name)
    if _has_foreign_bytes(name, passed_over):
        return False
    if extension in VIDEO_EXTENSIONS:
        return True
    passed_over[f".{extension}" if extension else "(none)"] += 1
    return False


def _has_foreign_bytes(name: str, passed_over: Counter[str]) -> bool:
    """Whether a name is not UTF-8; then it is counted as passed over."""
    if any("\ud800" <= character <= "\udfff" for character in name):
        passed_over["files whose name is not UTF-8"] += 1
        return True
    return False


def _uri(fs: Any, name: str) -> str:
    return name if "file" in fs.protocol else str(fs.unstrip_protocol(name))


def _fingerprint(fs: Any, name: str, info: dict[str, object]) -> str | None:
    """The fingerprint from a listing. Local files are asked again: fsspec lists times as floats, which lose digits."""
    return storage.fingerprint(name) if isinstance(fs, LocalFileSystem) else storage.fingerprint_of(info)


def _size(info: dict[str, object]) -> int:
    size = info.get("size")
    return int(size) if isinstance(size, int) else -1


def _nothing_found(path: str, passed_over: Counter[str]) -> str:
    shown = storage.public_uri(path)
    if _has_foreign_bytes(path, Counter()):
        return (
            f"no video in {readable(path)}: names that are not UTF-8 cannot be stored. Rename it, or set a locale in "
            "which it is UTF-8, such as LC_ALL=C.UTF-8"
        )
    if passed_over:
        kinds = ", ".join(f"{count} {readable(extension, 40)}" for extension, count in passed_over.most_common(5))
        return (
            f"no video in {shown}: it holds other files only ({kinds}). Files named one by one, or in a manifest, are "
            "tried whatever their extension"
        )
    if _is_glob(path):
        return f"no file matches {shown}: check the pattern, and quote it so that the shell leaves it alone"
    return f"no video in {shown}: there is no such file, or the folder is empty"
