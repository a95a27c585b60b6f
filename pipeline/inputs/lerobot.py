"""LeRobot datasets, ``lerobot:FOLDER``: every episode and camera is a row, with its task and signals.

Reads versions 2.0, 2.1 and 3.x, local or on any file system of fsspec. A row is a part of a video with slices of a data
file as its signals, as a manifest could name them too (``schemas.locations``). Only ``meta/`` is read here.

    v3    meta/episodes/chunk-000/*.parquet: where an episode lies in shared .mp4 and .parquet files
    v2    meta/episodes.jsonl; a file of each episode and camera, data/ and videos/ by the templates of info.json

A dataset may be anybody's: its templates and names are data, and name only files below its folder.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Self

import pyarrow as pa

from vidshard.pipeline import storage
from vidshard.pipeline.inputs.manifest import PART_COLUMNS, REF_SCHEMA, InputError, Manifest
from vidshard.pipeline.output.entries import row_fault
from vidshard.pipeline.output.parquet import BoundedParquet
from vidshard.pipeline.rows import FRAME_SECONDS, signal_source
from vidshard.schemas.errors import VidshardError, one_line
from vidshard.schemas.locations import join_options
from vidshard.schemas.text import readable
from vidshard.schemas.uris import shown_uri
from vidshard.schemas.video import SignalRule

PREFIX = "lerobot:"
"""Beginning of an input that is a dataset."""

RULE: SignalRule = "nearest"
"""Rule of a dataset's signals: the row of the frame that is shown, as rows and frames are less than half apart."""

_NUMBERS = frozenset(
    {"bool", "float16", "float32", "float64"}
    | {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
)
_BOOKKEEPING = frozenset({"timestamp", "frame_index", "episode_index", "index", "task_index"})
"""Numeric features that say which row it is; they are signals only where they are asked for."""

_EARLY_SECONDS = 1e-6
"""Added to the start of every part. A part that starts after 0 has a tolerance of a millisecond (``video.sampling``),
so that rounded times of frames count as exact, and clips of two cameras are placed alike wherever their files begin."""

_OWN_SECONDS, _MAX_OWN = 1e-10, 1_000_000
"""Added to that for each row before, 0.1 ms at most, so that no two rows are the same part of the same content: videos
of two cameras or episodes with the same bytes are no copies of each other, as their actions differ."""

_MAX_INFO_BYTES = 64 << 20
_MAX_EPISODES_BYTES = 2 << 30
_MAX_FPS = 1000
_PLACEHOLDER = re.compile(r"\{([a-z_]+)(?::0?(\d)d)?\}")


def is_dataset(text: str) -> bool:
    """Whether an input is a LeRobot dataset."""
    return text.startswith(PREFIX)


def absolute(text: str) -> str:
    """An input as every process understands it: absolute where it is local."""
    if is_dataset(text):
        return PREFIX + storage.absolute(text.removeprefix(PREFIX)).rstrip("/")
    return storage.absolute(text)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A LeRobot dataset by its ``info.json``."""

    root: str
    """Folder, absolute or a URL."""
    major: int
    """Version of the layout, 2 or 3."""
    fps: Fraction
    """Rows of an episode, and frames of its videos, per second."""
    cameras: tuple[str, ...]
    """Keys of the features that are videos."""
    numbers: tuple[str, ...]
    """Keys of the features that are numbers, those that say which row it is included."""
    info: Mapping[str, Any] = field(repr=False)

    @classmethod
    def open(cls, text: str) -> Self:
        """Read ``meta/info.json``.

        Args:
            text: the input, ``lerobot:FOLDER``.

        Raises:
            InputError: it is missing, damaged, or of a version or a layout that is not read here.
            storage.StorageError: the file system cannot be reached.
        """
        root = storage.absolute(text.removeprefix(PREFIX)).rstrip("/")
        path = storage.join(root, "meta/info.json")
        try:
            data = storage.read_bytes(path, max_bytes=_MAX_INFO_BYTES)
        except storage.StorageError as error:
            raise InputError(
                f"{error}; a LeRobot dataset is a folder with meta/info.json, such as lerobot:/data/pusht or "
                "lerobot:hf://datasets/OWNER/NAME"
            ) from error
        info = _json(data, path)
        if not isinstance(info, dict):
            raise _broken(path, "it is no JSON object")
        version = info.get("codebase_version")
        major = re.fullmatch(r"v?([23])\.\d+(\.\d+)?", version) if isinstance(version, str) else None
        if major is None:
            raise _broken(path, f"codebase_version is {readable(version, 40)}; versions 2.0, 2.1 and 3.x are read")
        if info.get("storage_format") not in (None, "parquet", "default"):
            shown = readable(info["storage_format"], 40)
            raise _broken(path, f"storage_format is {shown}; Parquet and mp4 files are read")
        rate = info.get("fps")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= _MAX_FPS:
            raise _broken(path, f"fps is {readable(rate, 40)}, and must be a rate of at most {_MAX_FPS}")
        features = info.get("features")
        if not isinstance(features, dict) or not all(isinstance(each, dict) for each in features.values()):
            raise _broken(path, "features is no object of objects")
        for name, each in features.items():
            if not isinstance(each.get("dtype"), str):
                raise _broken(path, f"the feature {readable(name, 60)} has the dtype {readable(each.get('dtype'), 40)}")
        for name in ("data_path", "video_path"):
            if not isinstance(info.get(name), str):
                raise _broken(path, f"{name} is {readable(info.get(name), 40)}, and must be a template of paths")
        cameras = tuple(name for name, each in features.items() if each.get("dtype") == "video")
        if not cameras:
            images = [name for name, each in features.items() if each.get("dtype") == "image"]
            stored = f"; {readable(images[0], 60)} is stored as single images" if images else ""
            raise _broken(path, f"none of its features is a video{stored}")
        for name in cameras:
            if not _is_plain_name(name):
                raise _broken(path, f"the name of the camera {readable(name, 60)} leads out of the folder")
        numbers = tuple(name for name, each in features.items() if each.get("dtype") in _NUMBERS)
        return cls(
            root=root,
            major=int(major[1]),
            fps=Fraction(str(rate)),
            cameras=cameras,
            numbers=numbers,
            info=info,
        )

    @property
    def shown(self) -> str:
        """The dataset in messages."""
        return shown_uri(self.root)

    @property
    def signals(self) -> list[tuple[str, SignalRule]]:
        """Every numeric feature, as a signal.

        Raises:
            InputError: a feature cannot be named as a signal.
        """
        names = [name for name in self.numbers if name not in _BOOKKEEPING]
        for name in names:
            if not all(part.isidentifier() for part in name.split(".")):
                raise InputError(
                    f"{self.shown}: the feature {readable(name, 60)} cannot be the name of a column; choose features "
                    "with --signals NAME=nearest,..."
                )
        return [(name, RULE) for name in names]

    def chosen_cameras(self, cameras: Sequence[str]) -> tuple[str, ...]:
        """The cameras with these keys, or with these last parts of keys; all for none.

        Raises:
            InputError: there is no such camera, or there are several.
        """
        chosen = []
        for wanted in cameras:
            found = [name for name in self.cameras if name == wanted] or [
                name for name in self.cameras if name.endswith(f".{wanted}")
            ]
            if len(found) != 1:
                why = "several cameras" if found else "no camera"
                raise InputError(
                    f"--cameras: {self.shown} has {why} {readable(wanted, 60)}; its cameras are "
                    f"{readable(', '.join(self.cameras), 400)}"
                )
            chosen += found
        return tuple(dict.fromkeys(chosen)) or self.cameras

    def rows(
        self,
        *,
        cameras: Sequence[str] = (),
        episodes: Sequence[tuple[int, int]] = (),
        signals: Sequence[str] = (),
    ) -> Manifest:
        """A row for each episode and camera, in the order of the episodes.

        Args:
            cameras: keys, or last parts of keys; all by default.
            episodes: intervals [start, end) of episode indices; all by default.
            signals: features to list as signals; those that the dataset lacks are left out.

        Raises:
            InputError: the metadata is damaged, or there is no such camera or episode.
            storage.StorageError: the file system cannot be reached.
        """
        keys = self.chosen_cameras(cameras)
        found = list(self._episodes_v3(keys) if self.major == 3 else self._episodes_v2())
        self._refuse_wrong_count([episode.index for episode in found])
        chosen = _chosen_episodes(found, episodes, self.shown)
        names = [name for name in signals if name in self.numbers]
        rows: list[dict[str, Any]] = []
        for episode in chosen:
            for key in keys:
                row = self._row(episode, key, names, number=len(rows) + 1)
                rows.append(row)
        schema = [*REF_SCHEMA, *(pa.field(name, pa.float64()) for name in PART_COLUMNS.values())]
        schema += [
            pa.field("episode_index", pa.int64()),
            pa.field("camera", pa.string()),
            pa.field("task", pa.string()),
        ]
        schema += [pa.field(signal_source(name), pa.string()) for name in names]
        schema.append(FRAME_SECONDS)
        if any(row["fault"] is not None for row in rows):
            schema.append(pa.field("fault", pa.string()))
        return Manifest(videos=pa.Table.from_pylist(rows, schema=pa.schema(schema)), renamed_columns={})

    def _row(self, episode: _Episode, key: str, signals: Sequence[str], *, number: int) -> dict[str, Any]:
        """The row of an episode and a camera, or one with its fault."""
        row: dict[str, Any] = {"num_bytes": -1, "fingerprint": None, "episode_index": episode.index, "camera": key}
        row |= {"task": episode.task, "fault": None, FRAME_SECONDS.name: float(1 / self.fps)}
        try:
            video, start, end = self._video(episode, key)
            row |= {"uri": storage.join(self.root, video), "part_end_seconds": end}
            number_of_row = episode.index * len(self.cameras) + self.cameras.index(key)
            row["part_start_seconds"] = start + _EARLY_SECONDS + number_of_row % _MAX_OWN * _OWN_SECONDS
            if signals:
                data, first = self._data(episode)
                rows = f"{first}:{first + episode.length}"
                rate = {"offset": repr(start), "rate": repr(float(self.fps))}
                options = {"rows": rows, **rate, "episode": str(episode.index)}
                path = storage.join(self.root, data)
                row |= {signal_source(name): join_options(path, {**options, "columns": name}) for name in signals}
        except ValueError as error:
            row["uri"] = f"{self.root} episode {episode.index} {key}"
            row["fault"] = row_fault(number, self.shown, f"episode {episode.index}, {key}: {error}")
        return row

    def _video(self, episode: _Episode, key: str) -> tuple[str, float, float]:
        """Path of an episode's video, and its start and end there in seconds.

        Raises:
            ValueError: the metadata of the episode is broken.
        """
        length = _count(episode.values, "length")
        seconds = float(length / self.fps)
        if self.major == 2:
            chunk = episode.index // self._chunk_size()
            place: dict[str, int | str] = {"episode_chunk": chunk, "episode_index": episode.index, "video_key": key}
            return _formatted(self.info["video_path"], place), 0.0, seconds
        start = _seconds(episode.values, f"videos/{key}/from_timestamp")
        end = _seconds(episode.values, f"videos/{key}/to_timestamp")
        if not 0 <= start < end:
            raise ValueError(f"its video is from {start:g} s to {end:g} s")
        if abs(end - start - seconds) > float(1 / self.fps):
            raise ValueError(
                f"its length is {length} frames, {seconds:g} s, and its video takes {end - start:g} s, from {start:g} "
                f"to {end:g} s"
            )
        values = {name: _count(episode.values, f"videos/{key}/{name}", 0) for name in ("chunk_index", "file_index")}
        return _formatted(self.info["video_path"], {**values, "video_key": key}), start, end

    def _data(self, episode: _Episode) -> tuple[str, int]:
        """Path of an episode's data file, and its first row there.

        Raises:
            ValueError: the metadata of the episode is broken.
        """
        if self.major == 2:
            values = {"episode_chunk": episode.index // self._chunk_size(), "episode_index": episode.index}
            return _formatted(self.info["data_path"], values), 0
        first = _count(episode.values, "dataset_from_index", 0)
        end = _count(episode.values, "dataset_to_index", 0)
        if end - first != episode.length:
            raise ValueError(f"its length is {episode.length}, and its rows are {first} to {end}")
        values = {name: _count(episode.values, f"data/{name}", 0) for name in ("chunk_index", "file_index")}
        assert episode.first_in_file is not None
        return _formatted(self.info["data_path"], values), first - episode.first_in_file

    def _chunk_size(self) -> int:
        size = self.info.get("chunks_size", 1000)
        if type(size) is not int or size < 1:
            raise _broken(storage.join(self.root, "meta/info.json"), f"chunks_size is {readable(size, 40)}")
        return size

    def _episodes_v2(self) -> Iterator[_Episode]:
        path = storage.join(self.root, "meta/episodes.jsonl")
        try:
            data = storage.read_bytes(path, max_bytes=_MAX_EPISODES_BYTES)
        except storage.StorageError as error:
            raise InputError(f"{error}; it lists the episodes of the LeRobot dataset {self.shown}") from error
        for number, line in enumerate(data.split(b"\n"), start=1):
            if line.strip():
                values = _json(line, path, f"line {number}")
                if not isinstance(values, dict):
                    raise _broken(path, f"line {number} is no JSON object")
                yield _Episode.of(values, path, f"line {number}")

    def _episodes_v3(self, keys: Sequence[str]) -> Iterator[_Episode]:
        names = ["episode_index", "tasks", "length", "dataset_from_index", "dataset_to_index"]
        places = [*("data/" + name for name in ("chunk_index", "file_index"))]
        for key in keys:
            places += [
                f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
            ]
        folder = storage.join(self.root, "meta/episodes")
        found: list[_Episode] = []
        for chunk in itertools.count():
            paths = storage.list_files(storage.join(folder, f"chunk-{chunk:03d}"), ".parquet")
            if not paths:
                break
            for path in paths:
                found += [_Episode.of(row, path, f"row {n}") for n, row in enumerate(_table(path, names + places))]
        if not found:
            raise _broken(folder, "there is no chunk-000/*.parquet with episodes")
        first: dict[tuple[str, str], int] = {}
        for episode in found:
            start = episode.values.get("dataset_from_index")
            if type(start) is int:
                first[episode.file] = min(first.get(episode.file, start), start)
        for episode in found:
            yield _Episode(index=episode.index, values=episode.values, first_in_file=first.get(episode.file))

    def _refuse_wrong_count(self, found: Sequence[int]) -> None:
        repeated = [index for index, count in Counter(found).items() if count > 1]
        where = storage.join(self.root, "meta/episodes")
        if repeated:
            raise _broken(where, f"episode {repeated[0]} is listed twice")
        total = self.info.get("total_episodes")
        if type(total) is int and total != len(found):
            raise _broken(where, f"{len(found)} episodes are listed, and info.json states {total}")


@dataclass(frozen=True, kw_only=True)
class _Episode:
    """An episode as the metadata lists it."""

    index: int
    values: Mapping[str, Any]
    first_in_file: int | None = None
    """Smallest row number in the dataset of those in the same data file, for v3."""

    @classmethod
    def of(cls, values: Mapping[str, Any], path: str, where: str) -> Self:
        index = values.get("episode_index")
        if type(index) is not int or not 0 <= index < 1 << 31:
            raise _broken(path, f"{where} has the episode_index {readable(index, 40)}")
        return cls(index=index, values=values)

    @property
    def file(self) -> tuple[str, str]:
        """Numbers of the data file, as texts: a damaged dataset may have anything there."""
        return str(self.values.get("data/chunk_index")), str(self.values.get("data/file_index"))

    @property
    def length(self) -> int:
        """Rows of the episode; raises ValueError for none."""
        return _count(self.values, "length")

    @property
    def task(self) -> str | None:
        """Tasks of the episode, joined by ``; ``; None where none is stated."""
        tasks = self.values.get("tasks")
        tasks = [tasks] if isinstance(tasks, str) else tasks
        if not isinstance(tasks, list) or not tasks:
            return None
        return "; ".join(dict.fromkeys(str(task) for task in tasks))


def _chosen_episodes(found: Sequence[_Episode], intervals: Sequence[tuple[int, int]], shown: str) -> list[_Episode]:
    if not intervals:
        return sorted(found, key=lambda episode: episode.index)
    by_index = {episode.index: episode for episode in found}
    chosen: dict[int, _Episode] = {}
    last = max(by_index)
    for start, end in intervals:
        some = [index for index in range(start, min(end, last + 1)) if index in by_index]
        if not some or (end == start + 1 and start not in by_index):
            text = f"{start}" if end == start + 1 else f"{start}:{end}"
            raise InputError(f"--episodes: {shown} has no episode {text}; it has {len(found)}, up to {last}")
        chosen |= {index: by_index[index] for index in some}
    return [chosen[index] for index in sorted(chosen)]


def _table(path: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a Parquet file of metadata.

    Raises:
        InputError: it cannot be read, or lacks a column.
    """
    try:
        data = storage.read_bytes(path, max_bytes=_MAX_EPISODES_BYTES)
        parquet = BoundedParquet(io.BytesIO(data))
        names = parquet.schema_arrow.names
        missing = [name for name in columns if name not in names and name != "tasks"]
        if missing:
            raise _broken(path, f"it has no column {readable(missing[0], 80)}")
        rows: list[dict[str, Any]] = parquet.whole([name for name in columns if name in names]).to_pylist()
    except VidshardError:
        raise
    except Exception as error:  # a damaged file makes Arrow raise whatever its bytes lead to
        raise _broken(path, one_line(error, 200)) from error
    return rows


def _json(data: bytes, path: str, what: str = "it") -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"{what} is no JSON: {one_line(error, 120)}") from error


def _broken(path: str, why: str) -> InputError:
    return InputError(f"{shown_uri(path)}: {why}")


def _count(values: Mapping[str, Any], name: str, least: int = 1) -> int:
    value = values.get(name)
    if type(value) is not int or not least <= value < 1 << 53:
        raise ValueError(f"{name} is {readable(value, 40)}")
    return value


def _seconds(values: Mapping[str, Any], name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {readable(value, 40)}")
    return float(value)


def _formatted(template: str, values: Mapping[str, int | str]) -> str:
    """Fill a template of paths. Python's own format would follow attributes that a template names.

    Raises:
        ValueError: it has another field, or leads out of the dataset's folder.
    """

    def fill(found: re.Match[str]) -> str:
        name, width = found[1], found[2]
        if name not in values:
            raise ValueError(f"the template {readable(template, 120)} has the field {name}")
        value = values[name]
        return str(value).zfill(int(width or 0)) if isinstance(value, int) else value

    path = _PLACEHOLDER.sub(fill, template)
    if any(character in path for character in "{}#?\\\0") or "://" in path or path.startswith(("/", "~")):
        raise ValueError(f"the template {readable(template, 120)} names no file of the dataset")
    if {"..", ""} & set(path.split("/")):
        raise ValueError(f"the template {readable(template, 120)} leads out of the dataset")
    return path


def _is_plain_name(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not any(character in name for character in "/\\#?{}\0")
