"""Columns of a batch: from Arrow to tensors of their true shape, without a Python loop over rows.

Each kind of column has a `load` from the table of a row group, which copies nothing where Arrow's memory can be used,
and a `gather` of rows from several row groups into one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from vidshard.pipeline.reader.catalog import Catalog
from vidshard.pipeline.reader.frames import FrameCells
from vidshard.schemas.errors import UserError
from vidshard.schemas.text import readable
from vidshard.schemas.tokens import PayloadColumn

Integers = npt.NDArray[np.int64]
Picks = Sequence[tuple[Any, Integers, Integers]]
"""Rows of a batch by row group: what was loaded, rows in the row group, and rows in the batch."""


class Column(Protocol):
    """A column of a batch."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Columns of the shards that it is made of."""

    @property
    def names(self) -> tuple[str, ...]:
        """Entries of a batch that it gives."""

    def load(self, table: pa.Table) -> Any:
        """Convert the columns of a row group.

        Raises:
            ValueError: they hold what cannot be.
        """

    def gather(self, picks: Picks, num_rows: int) -> dict[str, Any]:
        """Entries of the batch, each with ``num_rows`` rows."""


@dataclass(frozen=True)
class PayloadValues:
    """A payload column: int32 token ids (int64 above 2**31), or floating values as they are stored."""

    column: PayloadColumn

    @property
    def reads(self) -> tuple[str, ...]:
        """The column itself."""
        return (self.column.name,)

    @property
    def names(self) -> tuple[str, ...]:
        """The column itself."""
        return (self.column.name,)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype in a batch."""
        size = self.column.codebook_size
        if size is None:
            return np.dtype(self.column.dtype)
        return np.dtype(np.int32 if size <= 1 << 31 else np.int64)

    def load(self, table: pa.Table) -> np.ndarray:
        """A view of Arrow's memory: (rows, values); token ids are checked against the codebook."""
        name, width = self.column.name, table.schema.field(self.column.name).type.list_size
        chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[name].chunks]
        flat = chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, self.column.dtype), *chunks])
        if len(flat) != table.num_rows * width:
            raise ValueError(f"column '{name}' lacks values")
        return self.checked(flat.reshape(table.num_rows, width))

    def checked(self, values: np.ndarray) -> np.ndarray:
        """The same values, (rows, values); token ids are checked against the codebook."""
        size = self.column.codebook_size
        if size is not None and values.size and int(values.max()) >= size:
            raise ValueError(f"it holds token {int(values.max())}, the codebook ends at {size - 1}")
        return values

    def gather(self, picks: Picks, num_rows: int) -> dict[str, Any]:
        """``{name: (rows, values)}``; all rows have one payload shape."""
        width = picks[0][0].shape[1]
        out = np.empty((num_rows, width), self.dtype)
        for values, rows, places in picks:
            out[places] = values[rows]
        return {self.column.name: torch.from_numpy(out)}


@dataclass(frozen=True)
class _OneColumn:
    """Base of what is read from one column and keeps its name."""

    name: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The column itself."""
        return (self.name,)

    @property
    def names(self) -> tuple[str, ...]:
        """The column itself."""
        return (self.name,)


@dataclass(frozen=True)
class NumberValues(_OneColumn):
    """A column of numbers or booleans; null floats become NaN."""

    def load(self, table: pa.Table) -> tuple[np.ndarray, npt.NDArray[np.bool_] | None]:
        """Values (rows,), and which of them are null; None if none is, or if NaN stands for it."""
        column, is_null = table[self.name], None
        if column.null_count and not pa.types.is_floating(column.type):
            is_null = column.is_null().to_numpy()
            column = column.fill_null(pa.scalar(0).cast(column.type))
        array: np.ndarray = column.to_numpy()
        return array.astype(_torch_dtype(array.dtype), copy=False), is_null

    def gather(self, picks: Picks, num_rows: int) -> dict[str, Any]:
        """``{name: (rows,)}``.

        Raises:
            UserError: a row of the batch is null.
        """
        out = np.empty(num_rows, picks[0][0][0].dtype)
        for (values, is_null), rows, places in picks:
            if is_null is not None and is_null[rows].any():
                raise UserError(
                    f"column '{readable(self.name, 80)}' has nulls: pass them by, where='{self.name} is not null'"
                )
            out[places] = values[rows]
        return {self.name: torch.from_numpy(out)}


def _torch_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Unsigned integers as the next signed type, as PyTorch computes with few of them."""
    wider = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}
    return np.dtype(wider.get(str(dtype), dtype))


@dataclass(frozen=True)
class ObjectValues(_OneColumn):
    """Any other column: a list of Python values, such as texts; lists of numbers become a list of tensors."""

    def load(self, table: pa.Table) -> pa.Array:
        """The column in one piece."""
        return _whole(table[self.name])

    def gather(self, picks: Picks, num_rows: int) -> dict[str, Any]:
        """``{name: list}``."""
        column = _gathered(picks, num_rows)
        kind = column.type
        if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_number(kind.value_type):
            if column.null_count:
                return {self.name: [None if v is None else torch.tensor(v) for v in column.to_pylist()]}
            flat = column.flatten()
            values = flat.to_numpy(zero_copy_only=False)
            values = torch.from_numpy(np.array(values, _torch_dtype(values.dtype)))
            return {self.name: list(torch.split(values, pc.list_value_length(column).to_pylist()))}
        return {self.name: column.to_pylist()}


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _gathered(picks: Picks, num_rows: int) -> pa.Array:
    """Rows of several arrays, in the order of the batch."""
    parts = pa.concat_arrays([array.take(pa.array(rows)) for array, rows, _ in picks])
    places = np.concatenate([places for _, _, places in picks])
    order = np.empty(num_rows, np.int64)
    order[places] = np.arange(num_rows)
    return parts.take(pa.array(order))


@dataclass(frozen=True)
class SignalValues:
    """A signal: the samples of each frame, or of each latent, padded, with a mask.

    A signal with one sample per frame is (rows, T, D), by latent (rows, T', r, D); one of windows (``NAME_seconds`` is
    beside it) is (rows, T, n, D), by latent (rows, T', n, D), with n the most samples in the batch. A signal without
    channels, such as ``frame_pts_seconds``, has no D. Padding is 0. The mask ``NAME_mask`` has the same shape without
    D: False for padding, for copies of the last frame, and for samples that are NaN or null.
    """

    name: str
    cells: FrameCells
    per_latent: bool
    is_window: bool
    channels: int | None

    @property
    def reads(self) -> tuple[str, ...]:
        """The signal, its times, and what says which frames are real."""
        times = (f"{self.name}_seconds",) if self.is_window else ()
        return tuple(dict.fromkeys((self.name, *times, *self.cells.reads)))

    @property
    def names(self) -> tuple[str, ...]:
        """The signal, its mask, and the times of windows."""
        return (self.name, f"{self.name}_mask", *((f"{self.name}_seconds",) if self.is_window else ()))

    def load(self, table: pa.Table) -> pa.StructArray:
        """The columns in one piece."""
        return pa.StructArray.from_arrays([_whole(table[name]) for name in self.reads], list(self.reads))

    def gather(self, picks: Picks, num_rows: int) -> dict[str, Any]:
        """``{name: values, NAME_mask: mask}``, and ``NAME_seconds`` of windows.

        Raises:
            ValueError: the values are not those of a signal.
        """
        rows = _gathered(picks, num_rows)
        signal = rows.field(self.name)
        cell, inside, width, num_cells = self.cells.of(rows, per_latent=self.per_latent)
        of_row = cell // num_cells
        has_signal = ~signal.is_null().to_numpy(zero_copy_only=False)
        lengths = np.bincount(of_row, minlength=num_rows)
        given = _lengths(signal)
        if (given != lengths)[has_signal].any():
            raise ValueError(f"signal '{self.name}' has another number of frames than its clip")
        cell, inside = cell[has_signal[of_row]], inside[has_signal[of_row]]
        frames = signal.flatten()
        if self.is_window:
            return self._windows(rows, frames, cell, inside, (num_rows, num_cells))
        values = self._values(frames)
        place = cell * width + _counts_before(cell)
        mask = inside & ~np.isnan(values).any(axis=1)
        shape = (num_rows, num_cells, width) if self.per_latent else (num_rows, num_cells)
        return self._padded(values, place, mask, shape, self.channels)

    def _windows(
        self,
        rows: pa.StructArray,
        frames: pa.Array,
        cell: Integers,
        inside: npt.NDArray[np.bool_],
        shape: tuple[int, int],
    ) -> dict[str, Any]:
        of_sample = np.repeat(np.arange(len(cell)), _lengths(frames))
        values = self._values(frames.flatten())
        times = _numbers(rows.field(f"{self.name}_seconds").flatten().flatten(), self.name)[:, None]
        if not len(values) == len(times) == len(of_sample):
            raise ValueError(f"signal '{self.name}' has {len(values)} samples and {len(times)} times")
        rank = _counts_before(cell[of_sample])
        width = int(rank.max(initial=0)) + 1
        place = cell[of_sample] * width + rank
        mask = inside[of_sample] & ~np.isnan(values).any(axis=1)
        seconds = self._padded(times, place, mask, (*shape, width), None)[self.name]
        return {
            **self._padded(values, place, mask, (*shape, width), self.channels),
            f"{self.name}_seconds": seconds,
        }

    def _values(self, samples: pa.Array) -> np.ndarray:
        """(samples, D), D being 1 for plain numbers."""
        if self.channels is None:
            return _numbers(samples, self.name)[:, None]
        if samples.null_count or (_lengths(samples) != self.channels).any():
            raise ValueError(f"signal '{self.name}' has samples that have not {self.channels} channels")
        return _numbers(samples.flatten(), self.name).reshape(len(samples), self.channels)

    def _padded(
        self, values: np.ndarray, place: Integers, mask: np.ndarray, shape: tuple[int, ...], channels: int | None
    ) -> dict[str, Any]:
        flat = np.zeros((int(np.prod(shape)), values.shape[1]), values.dtype)
        flat[place] = np.where(mask[:, None], values, 0)
        is_real = np.zeros(len(flat), bool)
        is_real[place] = mask
        whole = flat.reshape(*shape, *(() if channels is None else (channels,)))
        return {self.name: torch.from_numpy(whole), f"{self.name}_mask": torch.from_numpy(is_real.reshape(shape))}


def signal_of(catalog: Catalog, name: str, values: pa.Array | None, *, per_latent: bool) -> SignalValues:
    """A signal, or any list with one entry per frame.

    Args:
        catalog: the shards.
        name: column of the signal.
        values: its values in some rows that have one; None if no row has one.
        per_latent: group the samples by latent, instead of by frame.

    Raises:
        UserError: there is no such column, no row has a value, or it is no signal.
    """
    if values is None:
        raise UserError(f"signal '{readable(name, 80)}': no row has it; it is null in every row")
    kind, depth = values.type, 0
    while pa.types.is_list(kind):
        kind, depth = kind.value_type, depth + 1
    is_window = f"{name}_seconds" in catalog.schema.names
    if not _is_number(kind) or not 1 + is_window <= depth <= 2 + is_window:
        raise UserError(f"'{readable(name, 80)}' is no signal: it holds {values.type}, and not a value for each frame")
    samples = values.flatten().flatten() if is_window else values.flatten()
    channels = None
    if depth == 2 + is_window:
        channels = int(_lengths(samples).max(initial=0))
    cells = FrameCells.of_run(catalog.provenance)
    if per_latent:
        cells.check_per_latent()
    return SignalValues(
        name=name,
        cells=cells,
        per_latent=per_latent,
        is_window=is_window,
        channels=channels,
    )


def _lengths(lists: pa.Array) -> Integers:
    """Length of each list, 0 for null."""
    if not pa.types.is_list(lists.type):
        raise ValueError(f"it holds {lists.type} where lists should be")
    return np.asarray(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(), np.int64)


def _numbers(values: pa.Array, name: str) -> np.ndarray:
    if not _is_number(values.type):
        raise ValueError(f"'{name}' is no signal: it holds {values.type}")
    if pa.types.is_integer(values.type) or values.null_count:
        values = values.cast(pa.float64() if pa.types.is_float64(values.type) else pa.float32(), safe=False)
    return np.asarray(values.to_numpy(zero_copy_only=False))


def _counts_before(cell: Integers) -> Integers:
    """For each entry how many entries before it have the same number; equal numbers stand together."""
    if not len(cell):
        return cell
    is_first = np.append(True, cell[1:] != cell[:-1])
    start = np.maximum.accumulate(np.where(is_first, np.arange(len(cell)), 0))
    return np.arange(len(cell)) - start


def column_of(catalog: Catalog, name: str) -> Column:
    """The kind of a column, by the type that it has in the shards.

    Raises:
        UserError: there is no such column; the message has the nearest names.
    """
    catalog.check_column(name, "column")
    payload = catalog.payload_column(name)
    if payload is not None:
        return PayloadValues(payload)
    kinds = {schema.field(name).type for schema in catalog.shard_schema}
    if len(kinds) > 1:
        raise UserError(f"column '{readable(name, 80)}' has several types: {', '.join(map(str, kinds))}")
    kind = kinds.pop()
    return NumberValues(name) if _is_number(kind) or pa.types.is_boolean(kind) else ObjectValues(name)


def shaped(values: Tensor, shape: tuple[int, ...], sequence: int | None, time_axis: int | None) -> Tensor:
    """Give the flat values of a payload column their shape.

    Args:
        values: (B * S, values of a row); S is 1 without a sequence.
        shape: shape of a row.
        sequence: rows of a window; None for single rows.
        time_axis: axis of ``shape`` along which the rows of a window are joined; None to keep them apart.

    Returns:
        (B, *shape); of windows (B, S, *shape), or (B, *shape) with S times as many along the time axis.
    """
    if sequence is None:
        return values.reshape(-1, *shape)
    rows = values.reshape(-1, sequence, *shape)
    if time_axis is None:
        return rows
    joined = rows.movedim(1, 1 + time_axis)
    return joined.reshape(len(joined), *shape[:time_axis], sequence * shape[time_axis], *shape[time_axis + 1 :])
