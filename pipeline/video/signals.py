"""Signals beside a video (robot actions, controller input, poses): reading them and aligning them with its frames.

Pure functions: no video is opened here and nothing knows of Ray. All times are seconds after the video's first
frame. A signal is held whole: an hour at 1 kHz with 16 channels is 260 MB; aligning a clip costs a binary search.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.pipeline.video.input_file import open_file
from vidshard.schemas.errors import OutageError, one_line
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.uris import public_uri
from vidshard.schemas.video import Clip, SignalRule

Rule = SignalRule

MAX_SIGNAL_BYTES = 1 << 30
"""Largest file, and largest content once decompressed."""

# Names of the column or field of times, and its units per second.
_TIME_UNITS = {"seconds": 1, "timestamp": 1, "timestamp_ms": 10**3, "timestamp_us": 10**6, "timestamp_ns": 10**9}

_CLOCK_SECONDS = 1e8  # three years: no video is that long, so these are times of day and not of the video
_EXACT_INTEGER = 1 << 24  # up to here float32 holds every integer

Floats = npt.NDArray[np.float32]
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Signal:
    """Samples of D channels, each with its time."""

    seconds: Seconds
    """float64 (N,), finite, non-decreasing: seconds after the video's first frame; negative before it."""
    values: Floats
    """float32 (N, D)."""
    channels: tuple[str, ...] | None = None
    """D names; None where the file has none."""
    median_step: float = field(init=False)
    """Median of the seconds between samples, repeated times aside; 0.0 for one sample. Kept, as computing it takes
    20 ms for 3.6 million samples."""

    def __post_init__(self) -> None:
        if self.seconds.dtype != np.float64 or self.seconds.ndim != 1:
            raise ValueError(f"seconds must be float64 (N,), got {self.seconds.dtype} {self.seconds.shape}")
        if self.values.dtype != np.float32 or self.values.ndim != 2 or len(self.values) != len(self.seconds):
            raise ValueError(
                f"values must be float32 ({len(self.seconds)}, D), got {self.values.dtype} {self.values.shape}"
            )
        if self.channels is not None and len(self.channels) != self.values.shape[1]:
            raise ValueError(f"{len(self.channels)} channel names for {self.values.shape[1]} channels")
        if not np.isfinite(self.seconds).all():
            raise ValueError(f"the time of sample {int(np.argmin(np.isfinite(self.seconds)))} is not a finite number")
        backwards = np.flatnonzero(np.diff(self.seconds) < 0)
        if len(backwards):
            at = int(backwards[0])
            raise ValueError(
                f"times go backwards: {self.seconds[at]} s, then {self.seconds[at + 1]} s at sample {at + 1}"
            )
        steps = np.diff(self.seconds)
        steps = steps[steps > 0]
        object.__setattr__(self, "median_step", float(np.median(steps)) if len(steps) else 0.0)

    def __repr__(self) -> str:
        span = f", {self.seconds[0]:.3f}s to {self.seconds[-1]:.3f}s" if len(self.seconds) else ""
        return f"Signal({len(self.seconds)} samples of {self.values.shape[1]}{span})"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Aligned:
    """A signal's values during the T frames of one clip."""

    values: Floats
    """float32 (T, D), a row for each frame, NaN where the signal has no value; for ``window`` (M, D), its M samples."""
    seconds: Seconds | None = None
    """Times of the samples, for ``window`` only: float64 (M,)."""
    offsets: npt.NDArray[np.int64] | None = None
    """Bounds, for ``window`` only: int64 (T + 1,); frame t has samples ``offsets[t]`` up to ``offsets[t + 1]``."""


# Reading.


class _BadSignalError(ValueError):
    """The content is not a signal; the message says why and what would be one."""


def read_signal(
    path: str,
    open_input: Callable[[str], BinaryIO],
    columns: Sequence[str] | None = None,
    *,
    max_bytes: int = MAX_SIGNAL_BYTES,
) -> Signal:
    """Read a signal from a ``.parquet``, ``.npz`` or ``.npy`` file.

    Parquet: times in ``seconds`` or ``timestamp`` (seconds), or integers in ``timestamp_ms``, ``_us`` or ``_ns``; every
    other column of numbers, or of equally long lists of numbers, gives channels, in the file's order. ``.npz``:
    arrays ``seconds`` (N,) and ``values`` (N, D) or (N,). ``.npy``: (N, 1 + D) with the times first, or a structured
    array with a field of times. Missing numbers become NaN. Numbers become float32: floats are rounded, an integer
    beyond 2**24 is refused rather than rounded.

    Args:
        path: a local path or URL.
        open_input: opens the path as a binary file, which is closed here.
        columns: read only these columns or fields, in this order; for Parquet and structured ``.npy``.
        max_bytes: the largest file, and the largest content once decompressed.

    Raises:
        VideoError: UNREADABLE: the storage refused. BAD_SIGNAL: the content is not such a signal.
        OutageError: the storage does not answer.
    """
    name = public_uri(path)
    try:
        with open_file(path, open_input) as file:
            data = file.read(max_bytes + 1)
    except OutageError:
        raise
    except OSError as error:
        detail = one_line(error)
        raise VideoError(Reason.UNREADABLE, detail if name in detail else f"{name}: {detail}") from error
    try:
        if len(data) > max_bytes:
            raise _BadSignalError(f"more than {max_bytes} bytes; split it, or store fewer channels")
        suffix = path.split("?", 1)[0].rsplit(".", 1)[-1].lower()
        if suffix == "parquet":
            return _signal_of(*_parquet_columns(data, columns, max_bytes))
        if suffix == "npy":
            return _signal_of(*_npy_columns(_npy_array(data), columns))
        if suffix == "npz":
            if columns is not None:
                raise _BadSignalError("columns cannot be chosen in .npz; store them in .parquet")
            return _signal_of(*_npz_columns(data, max_bytes))
        raise _BadSignalError("not a .parquet, .npz or .npy file")
    except _BadSignalError as error:
        raise VideoError(Reason.BAD_SIGNAL, f"{name}: {error}") from error


Named = tuple[str | None, npt.NDArray[Any]]


def _signal_of(time_name: str, times: npt.NDArray[Any], columns: list[Named]) -> Signal:
    unit = _TIME_UNITS[time_name]
    if times.ndim != 1 or times.dtype.kind not in ("iu" if unit > 1 else "iuf"):
        raise _BadSignalError(
            f"{time_name} must be {'integers' if unit > 1 else 'numbers'} (N,), got {times.dtype} {times.shape}"
        )
    seconds = times.astype(np.float64) / unit
    if len(seconds) and seconds[0] > _CLOCK_SECONDS:
        raise _BadSignalError(f"{time_name} begins at {seconds[0]:.0f} s; subtract the time of the video's first frame")
    blocks, channels = [], []
    for name, column in columns:
        block = column[:, None] if column.ndim == 1 else column
        if block.ndim != 2 or len(block) != len(seconds):
            raise _BadSignalError(f"{name or 'values'} must be ({len(seconds)}, D), got {column.shape}")
        blocks.append(_as_float32(name or "values", block))
        if name is not None:
            width = block.shape[1]
            channels += [name] if column.ndim == 1 else [f"{name}[{index}]" for index in range(width)]
    if not blocks or not sum(block.shape[1] for block in blocks):
        raise _BadSignalError("no channels beside the times; add columns of numbers")
    try:
        return Signal(
            seconds=seconds,
            values=np.ascontiguousarray(np.concatenate(blocks, axis=1)),
            channels=tuple(channels) or None,
        )
    except ValueError as error:
        raise _BadSignalError(f"{error}; sort the samples by time and leave out those without one") from error


def _as_float32(name: str, values: npt.NDArray[Any]) -> Floats:
    if values.dtype.kind not in "biuf":
        raise _BadSignalError(f"{name} must be numbers, got {values.dtype}")
    if values.dtype.kind in "iu" and values.size and max(-int(values.min()), int(values.max())) > _EXACT_INTEGER:
        raise _BadSignalError(
            f"{name} has integers beyond 2**24, which float32 would round; store differences or floats"
        )
    with np.errstate(over="ignore"):
        result = values.astype(np.float32)
    if values.dtype.kind == "f" and (np.isinf(result) & np.isfinite(values)).any():
        raise _BadSignalError(f"{name} has numbers beyond the range of float32; scale them")
    return result


def _words(error: Exception) -> str:
    if isinstance(error, MemoryError):
        raise error
    return one_line(error, 200)


def _time_column(names: Sequence[str]) -> str:
    found = [name for name in _TIME_UNITS if name in names]
    if not found:
        raise _BadSignalError(f"no column of times; name it one of {', '.join(_TIME_UNITS)}")
    return found[0]


def _chosen(names: Sequence[str], columns: Sequence[str] | None) -> list[str]:
    if columns is None:
        return [name for name in names if name not in _TIME_UNITS]
    for name in columns:
        if name not in names:
            raise _BadSignalError(f"no column {name!r}; there are {', '.join(names)}")
    return list(columns)


def _parquet_columns(
    data: bytes, columns: Sequence[str] | None, max_bytes: int
) -> tuple[str, npt.NDArray[Any], list[Named]]:
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        schema = file.schema_arrow
        time_name = _time_column(schema.names)
        chosen = _chosen(schema.names, columns)
        if columns is None:
            chosen = [name for name in chosen if _holds_numbers(schema.field(name).type)]
        for name in (time_name, *chosen):
            if not _holds_numbers(schema.field(name).type):
                raise _BadSignalError(
                    f"column {name} must be numbers or lists of numbers, got {schema.field(name).type}"
                )
        batches, num_bytes = [], 0
        wanted = list(dict.fromkeys((time_name, *chosen)))
        for batch in file.iter_batches(1 << 14, columns=wanted, use_threads=False):  # a confined process starts none
            num_bytes += batch.nbytes
            if num_bytes > max_bytes:
                raise _BadSignalError(f"more than {max_bytes} bytes of content; split it, or store fewer channels")
            batches.append(batch)
    except _BadSignalError:
        raise
    except Exception as error:  # a damaged file makes Arrow raise whatever its bytes lead to
        raise _BadSignalError(f"not readable as Parquet: {_words(error)}; write it again") from error
    if not batches:
        raise _BadSignalError("no samples; leave the signal out")
    table = pa.Table.from_batches(batches)
    if table[time_name].null_count:
        raise _BadSignalError(f"column {time_name} has missing times; leave those samples out")
    return time_name, _numbers(time_name, table[time_name]), [(name, _numbers(name, table[name])) for name in chosen]


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _holds_numbers(kind: pa.DataType) -> bool:
    inner = kind.value_type if _is_list(kind) else kind
    return bool(pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_boolean(inner))


def _numbers(name: str, column: pa.ChunkedArray) -> npt.NDArray[Any]:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    if not _is_list(array.type):
        return cast(
            npt.NDArray[Any], array.to_numpy(zero_copy_only=False) if not array.null_count else _with_nan(array)
        )
    if array.null_count:
        raise _BadSignalError(f"column {name} has missing lists; fill them")
    flat = array.flatten()
    width, rest = divmod(len(flat), max(1, len(array)))
    if not pa.types.is_fixed_size_list(array.type) and (rest or (np.diff(array.offsets.to_numpy()) != width).any()):
        raise _BadSignalError(f"column {name} has lists of different lengths; pad them")
    values = _with_nan(flat) if flat.null_count else flat.to_numpy(zero_copy_only=False)
    return cast(npt.NDArray[Any], values.reshape(len(array), width))


def _with_nan(array: pa.Array) -> npt.NDArray[Any]:
    _as_float32("a column", array.drop_null().to_numpy(zero_copy_only=False))  # to refuse the same numbers as elsewhere
    return cast(npt.NDArray[Any], array.cast(pa.float64()).to_numpy(zero_copy_only=False))


def _npz_columns(data: bytes, max_bytes: int) -> tuple[str, npt.NDArray[Any], list[Named]]:
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for key in ("seconds", "values"):
                with archive.open(f"{key}.npy") as member:
                    content = member.read(max_bytes + 1)  # limits the content itself, whatever the directory claims
                if len(content) > max_bytes:
                    raise _BadSignalError(f"{key} has more than {max_bytes} bytes; split it, or store fewer channels")
                arrays[key] = _npy_array(content)
    except KeyError as error:
        raise _BadSignalError(
            "it must hold the arrays seconds and values; np.savez(path, seconds=, values=)"
        ) from error
    except _BadSignalError:
        raise
    except Exception as error:  # a damaged archive makes each decompressor raise something else
        raise _BadSignalError(f"not readable as .npz: {_words(error)}; write it again") from error
    return "seconds", arrays["seconds"], [(None, arrays["values"])]


def _npy_columns(array: npt.NDArray[Any], columns: Sequence[str] | None) -> tuple[str, npt.NDArray[Any], list[Named]]:
    if array.dtype.names:
        time_name = _time_column(array.dtype.names)
        return time_name, array[time_name], [(name, array[name]) for name in _chosen(array.dtype.names, columns)]
    if columns is not None:
        raise _BadSignalError("an array without fields has no columns to choose; store a structured one")
    if array.ndim != 2 or array.shape[1] < 2:
        raise _BadSignalError(f"it must be (N, 1 + D) with the times first, got {array.shape}")
    return "seconds", array[:, 0], [(None, array[:, 1:])]


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
            raise _BadSignalError("it holds Python objects, which are never loaded; store numbers")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize > len(data) - file.tell():
            raise _BadSignalError(f"its header claims {dtype} {shape}, more than there is; write it again")
        if not dtype.itemsize:
            raise _BadSignalError(f"it must be numbers, got {dtype}")
        file.seek(0)
        return cast(npt.NDArray[Any], np.load(file, allow_pickle=False))
    except _BadSignalError:
        raise
    except Exception as error:  # NumPy parses the header as Python source: SyntaxError, TokenError, RecursionError ...
        raise _BadSignalError(f"not readable as .npy: {_words(error)}; write it again") from error


# Aligning.


def align(signal: Signal, frame_seconds: Seconds, rule: Rule, until_seconds: float) -> Aligned:
    """Align a signal with the frames of a clip.

    ``previous`` takes the last sample at or before the frame, ``nearest`` the closest one (the earlier of two), and
    ``linear`` interpolates between the samples around it. They give NaN before the first sample (``nearest``: more
    than half a median step before it) and after the last (``previous``: more than a median step, ``nearest``: more
    than half of one, ``linear``: at once). ``window`` takes all samples from this frame (inclusive) to the next
    (exclusive), so that consecutive clips share out the samples, each once. The last of several frames with the same
    time gets them.

    Args:
        signal: the samples.
        frame_seconds: float64 (T,), non-decreasing, in seconds after the video's first frame.
        rule: see above.
        until_seconds: end of the last frame's window: the first time of the next clip.

    Raises:
        ValueError: frame times run backwards, or lie after ``until_seconds``.
    """
    times = np.asarray(frame_seconds, np.float64)
    if times.ndim != 1 or (np.diff(times) < 0).any() or (len(times) and until_seconds < times[-1]):
        raise ValueError("frame times must be (T,), non-decreasing and not after until_seconds")
    if rule == "window":
        bounds = np.searchsorted(signal.seconds, np.append(times, until_seconds), side="left")
        if not len(times):
            bounds = np.zeros(1, np.int64)
        return Aligned(
            values=signal.values[bounds[0] : bounds[-1]],
            seconds=signal.seconds[bounds[0] : bounds[-1]],
            offsets=(bounds - bounds[0]).astype(np.int64),
        )
    num_samples = len(signal.seconds)
    if not num_samples:
        return Aligned(values=np.full((len(times), signal.values.shape[1]), np.nan, np.float32))
    before = np.searchsorted(signal.seconds, times, side="right") - 1
    left, right = np.maximum(before, 0), np.minimum(before + 1, num_samples - 1)
    first, last = signal.seconds[0], signal.seconds[-1]
    if rule == "previous":
        values, slack = signal.values[left], (0.0, signal.median_step)
    elif rule == "nearest":
        later = signal.seconds[right] - times < times - signal.seconds[left]
        later |= before < 0
        values = signal.values[np.where((before < num_samples - 1) & later & (before >= 0), right, left)]
        slack = (signal.median_step / 2,) * 2
    else:
        gap = signal.seconds[right] - signal.seconds[left]
        share = np.divide(times - signal.seconds[left], gap, out=np.zeros_like(times), where=gap > 0)[:, None]
        mixed = signal.values[left] * (1 - share) + signal.values[right] * share
        values, slack = np.where(share > 0, mixed, signal.values[left]).astype(np.float32), (0.0, 0.0)
    covered = (times >= first - slack[0]) & (times <= last + slack[1])
    return Aligned(values=np.where(covered[:, None], values, np.float32(np.nan)))


def align_clip(signal: Signal, clip: Clip, rule: Rule, *, first_seconds: float, fps: float) -> Aligned:
    """Align a signal with a clip.

    Samples are chosen by the times at which the source shows the frames. Windows are cut at the grid times, so that
    they neither overlap nor leave gaps from one clip to the next. Copies that pad a tail have the last frame's sample,
    and no window.

    Args:
        signal: the samples.
        clip: its frames' times are the source's.
        rule: as in :func:`align`.
        first_seconds: presentation time of the video's first frame.
        fps: frames per second of the grid.
    """
    if rule != "window":
        times = clip.frame_pts_seconds - first_seconds
        return align(signal, times, rule, float(times[-1]))
    steps = np.minimum(np.arange(len(clip.frame_pts_seconds) + 1), clip.num_valid_frames)
    times = clip.start_seconds - first_seconds + steps / fps
    return align(signal, times[:-1], rule, float(times[-1]))


# Arrow.


def signal_fields(name: str, rule: Rule) -> list[pa.Field]:
    """Arrow columns of a signal, a row for each clip: (T, D), or for ``window`` (T, samples, D) and sample times."""
    frames = pa.list_(pa.list_(pa.float32()))
    if rule != "window":
        return [pa.field(name, frames)]
    return [pa.field(name, pa.list_(frames)), pa.field(f"{name}_seconds", pa.list_(pa.list_(pa.float64())))]


def signal_arrays(name: str, rule: Rule, clips: Sequence[Aligned]) -> list[pa.Array]:
    """The columns of :func:`signal_fields`, a row for each clip."""
    width = clips[0].values.shape[1] if clips else 0
    samples = np.concatenate([clip.values for clip in clips]) if clips else np.empty((0, 0), np.float32)
    offsets = np.arange(len(samples) + 1, dtype=np.int64) * width
    inner = _lists(offsets, pa.array(samples.reshape(-1)))
    if rule != "window":
        return [_lists(_starts([len(clip.values) for clip in clips]), inner)]
    counts, times = [], []
    for clip in clips:
        assert clip.offsets is not None
        assert clip.seconds is not None, f"{name} was not aligned by windows"
        counts.append(np.diff(clip.offsets))
        times.append(clip.seconds)
    per_frame = _starts(np.concatenate(counts) if counts else [])
    per_clip = _starts([len(count) for count in counts])
    seconds = pa.array(np.concatenate(times) if times else np.empty(0, np.float64))
    return [_lists(per_clip, _lists(per_frame, inner)), _lists(per_clip, _lists(per_frame, seconds))]


def _starts(counts: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(counts, np.int64))])


def _lists(offsets: npt.NDArray[np.int64], values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
