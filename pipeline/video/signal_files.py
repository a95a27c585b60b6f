"""Reads signals beside a video from ``.parquet``, ``.npz``, ``.npy``, ``.json`` and ``.jsonl`` files.

A file is no more trusted than the video: these functions run in the decoding process, unpickle nothing, and bound what
they read. ``pipeline.video.signals`` aligns what is read here with the frames of clips. JSON is read by
``pipeline.video.signal_json``.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Self, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline.video.input_file import open_file
from vidshard.pipeline.video.signal_json import BadSignalError, json_columns
from vidshard.pipeline.video.signals import Floats, Seconds, Signal
from vidshard.schemas.errors import OutageError, one_line
from vidshard.schemas.locations import SIGNAL_OPTIONS, split_options
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.uris import public_uri

MAX_SIGNAL_BYTES = 1 << 30
"""Largest file, and largest content once decompressed. A slice of a Parquet file counts by itself."""

MAX_SIGNALS = 64
"""Most signals that are read from one file at once."""

# Names of the column or field of times, and its units per second.
_TIME_UNITS = {"seconds": 1, "timestamp": 1, "timestamp_ms": 10**3, "timestamp_us": 10**6, "timestamp_ns": 10**9}

_CLOCK_SECONDS = 1e8  # three years: no video is that long, so these are times of day and not of the video
_EXACT_INTEGER = 1 << 24  # up to here float32 holds every integer

_MAX_FOOTER_BYTES = 256 << 20
_ROWS_AT_ONCE = 1 << 14

Columns = Sequence[str] | None
"""Columns or fields of one signal, in order; None for all that hold numbers."""
Named = tuple[str | None, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SignalSource:
    """A file of samples, and what of it is meant; a location with options (``schemas.locations``)."""

    path: str
    rows: tuple[int, int] | None = None
    """Rows [start, end) of the file, or lines; None for all."""
    offset_seconds: float = 0.0
    """Seconds that are added to the times."""
    columns: tuple[str, ...] | None = None
    """Columns or fields, in order; None for all that hold numbers."""
    rate: float | None = None
    """Samples per second, in place of times: sample n is at ``offset_seconds`` + n / ``rate``. None for times."""
    episode: int | None = None
    """Value that the column ``episode_index`` must have in these rows, and in no others beside them."""
    times: str | None = None
    """A ``.npy`` file with the time of each sample; None where the file itself has them."""
    key: str | None = None
    """Member of a JSON object that holds the samples; None to find it."""

    @classmethod
    def of(cls, uri: str) -> Self:
        """Parse a location.

        Raises:
            VideoError: BAD_SIGNAL: an option has another form.
        """
        path, options = split_options(uri)
        try:
            rows = offset = episode = rate = None
            if "rows" in options:
                start, _, end = options["rows"].partition(":")
                rows = (int(start), int(end))
                if not 0 <= rows[0] < rows[1]:
                    raise ValueError(f"rows={options['rows']} must be START:END with 0 <= START < END")
            if "offset" in options:
                offset = float(options["offset"])
                if not math.isfinite(offset):
                    raise ValueError("offset= must be a finite number of seconds")
            if "rate" in options:
                rate = float(options["rate"])
                if not 0 < rate < 1e9:
                    raise ValueError("rate= must be a positive number of samples per second")
            if "episode" in options:
                episode = int(options["episode"])
            columns = options.get("columns")
            names = None if columns is None else tuple(name.strip() for name in columns.split(","))
            if names is not None and not all(names):
                raise ValueError("columns= must be names separated by commas")
            unknown = set(options) - set(SIGNAL_OPTIONS)
            if unknown:
                raise ValueError(f"{min(unknown)}= is no option of a signal")
        except ValueError as error:
            detail = f"{public_uri(path)}: {error}; write it as FILE#rows=0:100&offset=2.5&columns=a,b"
            raise VideoError(Reason.BAD_SIGNAL, detail) from error
        return cls(
            path=path,
            rows=rows,
            offset_seconds=offset or 0.0,
            columns=names,
            rate=rate,
            episode=episode,
            times=options.get("times"),
            key=options.get("key"),
        )

    @property
    def without_columns(self) -> Self:
        """The same samples with all columns: what several signals of one file share."""
        return replace(self, columns=None)


def read_signal(
    path: str, open_input: Callable[[str], BinaryIO], columns: Columns = None, *, max_bytes: int = MAX_SIGNAL_BYTES
) -> Signal:
    """Read one signal; see :func:`read_signals`."""
    source = SignalSource.of(path)
    [signal] = read_signals(source, [source.columns if columns is None else columns], open_input, max_bytes=max_bytes)
    return signal


def read_signals(
    source: SignalSource,
    wanted: Sequence[Columns],
    open_input: Callable[[str], BinaryIO],
    *,
    counted: bool = False,
    times: Seconds | None = None,
    max_bytes: int = MAX_SIGNAL_BYTES,
) -> list[Signal]:
    """Read signals of one file.

    Parquet: times in ``seconds`` or ``timestamp`` (seconds), or integers in ``timestamp_ms``, ``_us`` or ``_ns``; every
    other column of numbers, or of equally long lists of numbers, gives channels, in the file's order. ``.npz``:
    arrays ``seconds`` (N,) and ``values`` (N, D) or (N,). ``.npy``: (N, 1 + D) with the times first, or a structured
    array with a field of times. ``.json`` and ``.jsonl``: see ``signal_json``. Missing numbers become NaN. Numbers
    become float32: floats are rounded, an integer beyond 2**24 is refused rather than rounded.

    Args:
        source: the file; its own ``columns`` do not count.
        wanted: columns of each signal; for Parquet, JSON and structured ``.npy``.
        open_input: opens the path as a binary file, which is closed here.
        counted: whether samples have no times but numbers, which are then ``seconds``: 0.0, 1.0, 2.0 ... A ``.npy``
            is (N, D) or (N,) then, and ``.npz`` needs no ``seconds``. So it is with a ``rate`` too.
        times: float64 (N,), times of the samples of a file without any; None where it has them.
        max_bytes: the largest file, and the largest content once decompressed.

    Raises:
        VideoError: UNREADABLE: the storage refused. BAD_SIGNAL: the content is not such a signal.
        OutageError: the storage does not answer.
    """
    name = public_uri(source.path)
    with _failures_named(name), open_file(source.path, open_input) as file:
        reader = _READERS.get(_suffix(source))
        if reader is None:
            raise BadSignalError("not a .parquet, .npz, .npy, .json or .jsonl file")
        counted = counted or source.rate is not None
        with_times = not counted and times is None
        found = reader(file, source, wanted, with_times, max_bytes)
        return [_signal_of(times_of, columns, source, counted, times) for times_of, columns in found]


def read_times(path: str, open_input: Callable[[str], BinaryIO]) -> Seconds:
    """Read the times of samples from a ``.npy`` file of numbers, (N,): float64 (N,).

    Raises:
        VideoError: UNREADABLE: the storage refused. BAD_SIGNAL: the content is something else.
        OutageError: the storage does not answer.
    """
    with _failures_named(public_uri(path)), open_file(path, open_input) as file:
        times = _npy_array(_whole(file, MAX_SIGNAL_BYTES))
        if times.ndim != 1 or times.dtype.kind not in "iuf":
            raise BadSignalError(f"times must be numbers (N,), got {times.dtype} {times.shape}")
        return times.astype(np.float64)


class _failures_named:  # noqa: N801  used as a function
    """Turns failures of reading a file into errors that name it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, OutageError):
            return
        if isinstance(error, BadSignalError):
            raise VideoError(Reason.BAD_SIGNAL, f"{self._name}: {error}") from error
        if isinstance(error, OSError):
            detail = one_line(error)
            shown = detail if self._name in detail else f"{self._name}: {detail}"
            raise VideoError(Reason.UNREADABLE, shown) from error


def _suffix(source: SignalSource) -> str:
    name = source.path.split("?", 1)[0].rsplit("/", 1)[-1]
    if "." not in name and source.times is not None:
        return "npy"  # comma2k19 names its arrays value and t
    return name.rsplit(".", 1)[-1].lower()


def _whole(file: BinaryIO, max_bytes: int) -> bytes:
    data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise BadSignalError(f"more than {max_bytes} bytes; split it, or store fewer channels")
    return data


def _signal_of(
    named_times: tuple[str, npt.NDArray[Any]] | None,
    columns: list[Named],
    source: SignalSource,
    counted: bool,
    given: Seconds | None,
) -> Signal:
    count = max((len(column) for _, column in columns), default=0)
    if named_times is not None:
        time_name, times = named_times
        unit = _TIME_UNITS[time_name]
        if times.ndim != 1 or times.dtype.kind not in ("iu" if unit > 1 else "iuf"):
            raise BadSignalError(
                f"{time_name} must be {'integers' if unit > 1 else 'numbers'} (N,), got {times.dtype} {times.shape}"
            )
        seconds = times.astype(np.float64) / unit
    else:
        time_name = "times="
        seconds = np.arange(count, dtype=np.float64) if given is None else given
        if given is not None and len(given) != count:
            raise BadSignalError(f"it has {count} samples, and times= has {len(given)}")
    blocks, channels = [], []
    for name, column in columns:
        block = column[:, None] if column.ndim == 1 else column
        if block.ndim != 2 or len(block) != len(seconds):
            raise BadSignalError(f"{name or 'values'} must be ({len(seconds)}, D), got {column.shape}")
        blocks.append(_as_float32(name or "values", block))
        if name is not None:
            width = block.shape[1]
            channels += [name] if column.ndim == 1 else [f"{name}[{index}]" for index in range(width)]
    if not blocks or not sum(block.shape[1] for block in blocks):
        raise BadSignalError("no channels beside the times; add columns of numbers")
    values = np.ascontiguousarray(np.concatenate(blocks, axis=1))
    if source.rows is not None and source.episode is None and _suffix(source) != "parquet":
        _refuse_rows_beyond(source.rows, len(values))
        seconds, values = seconds[slice(*source.rows)], values[slice(*source.rows)]
        if counted:
            seconds = seconds - source.rows[0]
    if not counted:
        seconds = seconds + source.offset_seconds
    if len(seconds) and seconds[0] > _CLOCK_SECONDS:
        raise BadSignalError(f"{time_name} begins at {seconds[0]:.0f} s; subtract the time of the video's first frame")
    try:
        return Signal(seconds=seconds, values=values, channels=tuple(channels) or None)
    except ValueError as error:
        raise BadSignalError(f"{error}; sort the samples by time and leave out those without one") from error


def _refuse_rows_beyond(rows: tuple[int, int], num_rows: int) -> None:
    if rows[1] > num_rows:
        raise BadSignalError(f"it has {num_rows} rows, and rows={rows[0]}:{rows[1]} are asked for")


def _as_float32(name: str, values: npt.NDArray[Any]) -> Floats:
    if values.dtype.kind not in "biuf":
        raise BadSignalError(f"{name} must be numbers, got {values.dtype}")
    if values.dtype.kind in "iu" and values.size and max(-int(values.min()), int(values.max())) > _EXACT_INTEGER:
        raise BadSignalError(
            f"{name} has integers beyond 2**24, which float32 would round; store differences or floats"
        )
    with np.errstate(over="ignore"):
        result = values.astype(np.float32)
    if values.dtype.kind == "f" and (np.isinf(result) & np.isfinite(values)).any():
        raise BadSignalError(f"{name} has numbers beyond the range of float32; scale them")
    return result


def _words(error: Exception) -> str:
    if isinstance(error, MemoryError):
        raise error
    return one_line(error, 200)


def _time_column(names: Sequence[str]) -> str:
    found = [name for name in _TIME_UNITS if name in names]
    if not found:
        raise BadSignalError(
            f"no column of times; name it one of {', '.join(_TIME_UNITS)}, or use the rule frames, which needs none"
        )
    return found[0]


def _chosen(names: Sequence[str], columns: Columns) -> list[str]:
    if columns is None:
        return [name for name in names if name not in _TIME_UNITS]
    for name in columns:
        if name not in names:
            raise BadSignalError(f"no column {name!r}; there are {', '.join(names)}")
    return list(columns)


_Found = list[tuple[tuple[str, npt.NDArray[Any]] | None, list[Named]]]
"""For each signal the name and the times of its samples, None for samples without, and its columns."""


# Parquet.


def _from_parquet(
    file: BinaryIO, source: SignalSource, wanted: Sequence[Columns], with_times: bool, max_bytes: int
) -> _Found:
    is_slice = source.rows is not None
    try:
        if is_slice:
            _refuse_large_footer(file)
        parquet = pq.ParquetFile(file if is_slice else pa.BufferReader(_whole(file, max_bytes)), pre_buffer=False)
        schema = parquet.schema_arrow
        time_name = _time_column(schema.names) if with_times else None
        chosen = [_chosen(schema.names, columns) for columns in wanted]
        for number, columns in enumerate(wanted):
            if columns is None:
                left_out = {"episode_index"} if source.episode is not None else set()
                holds = [name for name in chosen[number] if holds_numbers(schema.field(name).type)]
                chosen[number] = [name for name in holds if name not in left_out]
        needed = list(dict.fromkeys([*([time_name] if time_name else []), *(name for each in chosen for name in each)]))
        for name in needed:
            if not holds_numbers(schema.field(name).type):
                raise BadSignalError(
                    f"column {name} must be numbers or lists of numbers, got {schema.field(name).type}"
                )
        table = _rows_of(parquet, source, needed, max_bytes)
    except (BadSignalError, OSError, VideoError):
        raise
    except Exception as error:  # a damaged file makes Arrow raise whatever its bytes lead to
        raise BadSignalError(f"not readable as Parquet: {_words(error)}; write it again") from error
    times = None
    if time_name is not None:
        if table[time_name].null_count:
            raise BadSignalError(f"column {time_name} has missing times; leave those samples out")
        times = (time_name, _numbers(time_name, table[time_name]))
    arrays = {name: _numbers(name, table[name]) for name in needed}
    return [(times, [(name, arrays[name]) for name in columns]) for columns in chosen]


def _refuse_large_footer(file: BinaryIO) -> None:
    end = file.seek(0, io.SEEK_END)
    file.seek(max(0, end - 8))
    length = int.from_bytes(file.read(8)[:4], "little")
    if length > min(_MAX_FOOTER_BYTES, end):
        raise BadSignalError(f"its footer claims {length} bytes; write it again")
    file.seek(0)


def _rows_of(parquet: pq.ParquetFile, source: SignalSource, columns: list[str], max_bytes: int) -> pa.Table:
    """The rows that are meant; the row groups without any are not read."""
    num_rows = parquet.metadata.num_rows
    start, end = source.rows or (0, num_rows)
    if source.rows is not None:
        _refuse_rows_beyond(source.rows, num_rows)
    checks = [] if source.episode is None else ["episode_index", "frame_index", "timestamp"]
    names = list(dict.fromkeys([*columns, *(name for name in checks if name in parquet.schema_arrow.names)]))
    if checks and "episode_index" not in names:
        raise BadSignalError("no column 'episode_index', by which the rows of an episode are known")
    first, last = (max(0, start - 1), min(num_rows, end + 1)) if checks else (start, end)
    batches, num_bytes = [], 0
    at = 0
    for group in range(parquet.metadata.num_row_groups):
        count = parquet.metadata.row_group(group).num_rows
        if at + count > first and at < last:
            here = at
            # a confined process starts no threads
            for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=names, use_threads=False):
                piece = batch.slice(max(0, first - here), max(0, min(last, here + len(batch)) - max(first, here)))
                here += len(batch)
                if len(piece):
                    num_bytes += piece.nbytes
                    if num_bytes > max_bytes:
                        raise BadSignalError(
                            f"more than {max_bytes} bytes of content; split it, or store fewer channels"
                        )
                    batches.append(piece)
                if here >= last:
                    break
        at += count
    if not batches:
        raise BadSignalError("no samples; leave the signal out")
    table = pa.Table.from_batches(batches)
    if checks:
        _refuse_other_episodes(table, source, first)
    return table.slice(start - first, end - start)


def _refuse_other_episodes(table: pa.Table, source: SignalSource, first: int) -> None:
    """Refuse rows that are not those of one whole episode: the metadata then is about other rows.

    Args:
        table: the rows, with one before and one after them where there are any.
        source: the episode and its rows.
        first: number of the table's first row.
    """
    assert source.rows is not None
    episodes = _numbers("episode_index", table["episode_index"])
    start, end = source.rows[0] - first, source.rows[1] - first
    others = np.flatnonzero(episodes[start:end] != source.episode)
    if len(others):
        at = int(others[0])
        raise BadSignalError(
            f"row {source.rows[0] + at} is of episode {episodes[start + at]}, and the metadata says that rows "
            f"{source.rows[0]} to {source.rows[1]} are those of episode {source.episode}"
        )
    if (episodes[:start] == source.episode).any() or (episodes[end:] == source.episode).any():
        raise BadSignalError(
            f"episode {source.episode} has more rows than the {source.rows[0]} to {source.rows[1]} of the metadata"
        )
    if "timestamp" in table.column_names and source.rate is not None:
        times = _numbers("timestamp", table["timestamp"])[start:end].astype(np.float64)
        apart = np.flatnonzero(~(np.abs(times * source.rate - np.arange(len(times))) < 0.5))
        if len(apart):
            at = int(apart[0])
            raise BadSignalError(
                f"row {at} of episode {source.episode} has timestamp {times[at]:g}, and should be at "
                f"{at / source.rate:g} s, with {source.rate:g} rows a second"
            )
    if "frame_index" in table.column_names:
        frames = _numbers("frame_index", table["frame_index"])[start:end]
        jumps = np.flatnonzero(frames != np.arange(len(frames)))
        if len(jumps):
            at = int(jumps[0])
            raise BadSignalError(
                f"row {at} of episode {source.episode} has frame_index {frames[at]}: a frame is missing"
            )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def holds_numbers(kind: pa.DataType) -> bool:
    """Whether a column holds numbers, or lists of them, however deep."""
    while _is_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _numbers(name: str, column: pa.ChunkedArray) -> npt.NDArray[Any]:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if not _is_list(array.type):
        return cast(
            npt.NDArray[Any], array.to_numpy(zero_copy_only=False) if not array.null_count else _with_nan(array)
        )
    num_rows = len(array)
    while _is_list(array.type):
        if array.null_count:
            raise BadSignalError(f"column {name} has missing lists; fill them")
        flat = array.flatten()
        width, rest = divmod(len(flat), max(1, len(array)))
        if not pa.types.is_fixed_size_list(array.type) and (rest or (np.diff(array.offsets.to_numpy()) != width).any()):
            raise BadSignalError(f"column {name} has lists of different lengths; pad them")
        array = flat
    values = _with_nan(array) if array.null_count else array.to_numpy(zero_copy_only=False)
    return cast(npt.NDArray[Any], values.reshape(num_rows, -1 if num_rows else 0))


def _with_nan(array: pa.Array) -> npt.NDArray[Any]:
    _as_float32("a column", array.drop_null().to_numpy(zero_copy_only=False))  # to refuse the same numbers as elsewhere
    return cast(npt.NDArray[Any], array.cast(pa.float64()).to_numpy(zero_copy_only=False))


# NumPy.


def _from_npz(file: BinaryIO, _: SignalSource, wanted: Sequence[Columns], with_times: bool, max_bytes: int) -> _Found:
    if any(columns is not None for columns in wanted):
        raise BadSignalError("columns cannot be chosen in .npz; store them in .parquet")
    arrays = {}
    data = _whole(file, max_bytes)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for key in ("seconds", "values") if with_times else ("values",):
                with archive.open(f"{key}.npy") as member:
                    content = member.read(max_bytes + 1)  # limits the content itself, whatever the directory claims
                if len(content) > max_bytes:
                    raise BadSignalError(f"{key} has more than {max_bytes} bytes; split it, or store fewer channels")
                arrays[key] = _npy_array(content)
    except KeyError as error:
        raise BadSignalError("it must hold the arrays seconds and values; np.savez(path, seconds=, values=)") from error
    except BadSignalError:
        raise
    except Exception as error:  # a damaged archive makes each decompressor raise something else
        raise BadSignalError(f"not readable as .npz: {_words(error)}; write it again") from error
    times = ("seconds", arrays["seconds"]) if with_times else None
    return [(times, [(None, arrays["values"])])] * len(wanted)


def _from_npy(file: BinaryIO, _: SignalSource, wanted: Sequence[Columns], with_times: bool, max_bytes: int) -> _Found:
    array = _npy_array(_whole(file, max_bytes))
    if array.ndim == 0:
        raise BadSignalError(f"it must be (N, D), got {array.shape}")
    if array.dtype.names:
        names = array.dtype.names
        times = None
        if with_times:
            time_name = _time_column(names)
            times = (time_name, array[time_name])
        return [(times, [(name, array[name]) for name in _chosen(names, columns)]) for columns in wanted]
    if any(columns is not None for columns in wanted):
        raise BadSignalError("an array without fields has no columns to choose; store a structured one")
    if not with_times:
        return [(None, [(None, array)])] * len(wanted)
    if array.ndim != 2 or array.shape[1] < 2:
        raise BadSignalError(
            f"it must be (N, 1 + D) with the times first, got {array.shape}; the rule frames takes one sample a frame, "
            "and #times=FILE.npy names a file of times"
        )
    return [(("seconds", array[:, 0]), [(None, array[:, 1:])])] * len(wanted)


def _npy_array(data: bytes) -> npt.NDArray[Any]:
    """Load an array, after checking that its header claims no more than the data holds."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version[0]}.{version[1]}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        if dtype.hasobject:
            raise BadSignalError("it holds Python objects, which are never loaded; store numbers")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > len(data) - file.tell():
            raise BadSignalError(f"its header claims {dtype} {shape}, more than there is; write it again")
        if not dtype.itemsize:
            raise BadSignalError(f"it must be numbers, got {dtype}")
        file.seek(0)
        return cast(npt.NDArray[Any], np.load(file, allow_pickle=False))
    except BadSignalError:
        raise
    except Exception as error:  # NumPy parses the header as Python source: SyntaxError, TokenError, RecursionError ...
        raise BadSignalError(f"not readable as .npy: {_words(error)}; write it again") from error


# JSON.


def _from_json(
    file: BinaryIO, source: SignalSource, wanted: Sequence[Columns], with_times: bool, max_bytes: int
) -> _Found:
    lines = _suffix(source) == "jsonl"
    data = _whole(file, max_bytes)
    found = json_columns(data, wanted, lines=lines, key=source.key, time_names=list(_TIME_UNITS))
    times = None
    if with_times:
        time_name = _time_column(list(found.times))
        times = (time_name, found.times[time_name])
    return [(times, columns) for columns in found.columns]


_READERS: dict[str, Callable[[BinaryIO, SignalSource, Sequence[Columns], bool, int], _Found]] = {
    "parquet": _from_parquet,
    "npz": _from_npz,
    "npy": _from_npy,
    "json": _from_json,
    "jsonl": _from_json,
}
