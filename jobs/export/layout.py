"""Layout: the interface between the export job and the formats of other programs.

The job reads clips, counts them and resumes; a layout says what it can hold, and turns a batch of clips into files. A
new layout is a module beside this one and a line in `layouts.LAYOUTS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vidshard.pipeline import storage
from vidshard.schemas.errors import UserError
from vidshard.schemas.text import readable
from vidshard.schemas.tokens import Payload, PayloadColumn, Provenance

Integers = npt.NDArray[np.int64]

BATCH_BYTES = 128 << 20
"""Payload of a batch that is aimed at; a batch is in memory about three times."""


class Refusal(StrEnum):
    """Reason why a clip is not exported."""

    DUPLICATE = "duplicate"
    PADDED = "padded"
    NO_VALUE = "no_value"
    UNEVEN_SIGNAL = "uneven_signal"
    STARTS_INSIDE = "starts_inside"


REFUSALS: Mapping[Refusal, str] = {
    Refusal.DUPLICATE: "a clip of the same id was exported; `vidshard verify` says which shards hold both",
    Refusal.PADDED: "its last frames repeat one, which the layout cannot say; `--tail drop` makes no such clips",
    Refusal.NO_VALUE: "a column that the layout needs, or that --map names, is null in it",
    Refusal.UNEVEN_SIGNAL: "its signal has not the same number of values for each frame, or values that are no numbers",
    Refusal.STARTS_INSIDE: "it continues a clip that is missing, and the layout holds sequences from their start",
}
"""Explanation of each reason, with its remedy where there is one."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """Field of a layout that is filled from a column of the shards."""

    name: str
    kind: Literal["text", "signal", "matrix"]
    """``text``: a string. ``signal``: numbers for each frame. ``matrix``: numbers of a clip, (rows, columns)."""
    meaning: str
    is_required: bool = False
    width: int | None = None
    """Numbers for each frame; None for any number."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Facts about the clips that are exported."""

    dest: str
    """Folder to write to, local or remote."""
    provenance: Provenance
    payload: Payload
    """Payload columns, with the shape of the exported clips; the first one's where shapes differ."""
    shapes: Sequence[tuple[tuple[str, tuple[int, ...]], ...]]
    """Payload shapes that occur among the exported clips."""
    schema: pa.Schema
    """Columns of the shards."""
    columns: Mapping[str, str]
    """Column that fills a field of the layout, by field."""
    fps: Fraction
    """Frames per second of the clips."""
    is_continuous: bool
    time_stride: int
    """Frames of a latent that is not the first."""
    is_causal: bool

    @property
    def tokenizer(self) -> str:
        """Name of the tokenizer."""
        return str(self.provenance.tokenizer.get("name"))

    @cached_property
    def metadata(self) -> dict[str, str]:
        """Provenance as text by key, as a shard has it; without the settings of the run."""
        return {key: value for key, value in self.provenance.to_metadata().items() if not key.endswith(".run")}

    def only(self, layout: str, name: str) -> PayloadColumn:
        """The payload column of a layout that holds one array per clip.

        Raises:
            UserError: the clips have another payload.
        """
        columns = [column for column in self.payload if not column.is_logvar]
        if [column.name for column in columns] != [name]:
            names = ", ".join(readable(column.name, 80) for column in columns)
            raise UserError(
                f"--to {layout} holds one array of {name} per clip, and these clips of {readable(self.tokenizer, 80)} "
                f"have {names}: choose a layout that holds them, such as webdataset"
            )
        return columns[0]

    def refuse_several_shapes(self, layout: str) -> None:
        """Refuse clips of several shapes, for a layout that has one.

        Raises:
            UserError: there are several.
        """
        if len(self.shapes) > 1:
            shown = [" and ".join(f"{readable(n, 40)} {list(s)}" for n, s in shapes) for shapes in self.shapes[:3]]
            raise UserError(
                f"--to {layout} holds clips of one shape, and these have {len(self.shapes)}: {'; '.join(shown)}. "
                "Export each frame size by itself: --where \"bucket = '256x448'\""
            )


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Clips that are exported together."""

    number: int
    """Number of the batch, from 0."""
    table: pa.Table
    """Columns of the clips except the payload."""
    payload: Mapping[str, np.ndarray]
    """Payload columns by name, each (clips, *shape)."""
    runs: Integers
    """int64 (clips,): number of the sequence of consecutive clips that each is of; non-decreasing."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def take(self, rows: Sequence[int] | Integers) -> Clips:
        """Some of the clips, by position."""
        chosen = np.asarray(rows, np.int64)
        return Clips(
            number=self.number,
            table=self.table.take(pa.array(chosen)),
            payload={name: values[chosen] for name, values in self.payload.items()},
            runs=self.runs[chosen],
        )


@dataclass(kw_only=True)
class Written:
    """Files that a batch of clips became."""

    files: dict[str, int] = field(default_factory=dict)
    """Size in bytes by path below the destination."""
    num_clips: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """Clips that were not written, by reason."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts of the batch that the layout needs later, as JSON values."""

    def put(self, source: Source, path: str, data: bytes | memoryview) -> None:
        """Write a file atomically, and count it.

        Args:
            path: path below the destination, made of names of ours alone.

        Raises:
            storage.StorageError: it could not be written.
        """
        storage.write_atomic(storage.join(source.dest, path), data)
        self.files[path] = len(data)


class Layout(Protocol):
    """Format of another program."""

    name: str
    meaning: str
    """One line: the program, and what is written."""
    fields: Sequence[Field]
    """Fields that --map may name."""
    whole_runs: bool
    """Whether a batch holds whole sequences of consecutive clips, in order; else the clips of one shard."""

    def check(self, source: Source) -> list[str]:
        """Check that the layout can hold the clips; returns the columns that it leaves out.

        Raises:
            UserError: it cannot; the message names what it cannot hold.
        """
        ...

    def write(self, source: Source, clips: Clips, before: Sequence[Written], /) -> Written:
        """Write a batch of clips. The files of a batch are the same however often it is written.

        Args:
            before: the batches before this one.

        Raises:
            storage.StorageError: a file could not be written.
        """
        ...

    def finish(self, source: Source, batches: Sequence[Written], /) -> dict[str, int]:
        """Write the files that describe all batches, and make them visible; called once more after an interruption.

        Returns:
            Size in bytes by path below the destination.
        """
        ...


def padded(clips: Clips) -> npt.NDArray[np.bool_]:
    """Clips whose last frames repeat one: bool (clips,)."""
    valid = clips.table["num_valid_frames"].to_numpy()
    lengths = np.array([len(times) for times in clips.table["frame_pts_seconds"].to_pylist()])
    return np.asarray(valid < lengths)


def signal_values(value: Any, num_frames: int, width: int | None) -> np.ndarray | None:
    """Values of a signal as float32 (frames, width); None where they are missing, uneven or no numbers.

    Args:
        value: a list with an entry for each frame: a number, or a list of numbers.
        num_frames: frames of the clip.
        width: numbers for each frame; None for any number.
    """
    try:
        array = np.asarray(value, np.float32)
    except (ValueError, TypeError):
        return None
    if array.ndim == 1:
        array = array[:, None]
    fits = array.ndim == 2 and len(array) == num_frames and (width is None or array.shape[1] == width)
    return array if fits and array.shape[1] and np.isfinite(array).all() else None


def matrix_values(value: Any) -> np.ndarray | None:
    """A matrix of a clip as float32 (rows, columns); None where it is missing, ragged or holds no numbers."""
    try:
        array = np.asarray(value, np.float32)
    except (ValueError, TypeError):
        return None
    return array if array.ndim == 2 and np.isfinite(array).all() else None


def without(clips: Clips, refused: Sequence[int] | Integers) -> Clips:
    """The clips except some, by position; a sequence that one of them was inside of becomes two, numbered from 0."""
    kept = np.setdiff1d(np.arange(len(clips)), np.asarray(refused, np.int64))
    chosen = clips.take(kept)
    begins = np.ones(len(kept), bool)
    begins[1:] = (np.diff(kept) != 1) | (np.diff(chosen.runs) != 0)
    return replace(chosen, runs=np.cumsum(begins) - 1)
