"""WebDataset: tar files of samples, for its readers and those that read its tars.

A clip is the members KEY.json, with all columns but the payload, and KEY.COLUMN.npy for each payload column and for
each signal with a row of numbers per frame. KEY is the clip's id.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from vidshard.jobs.export.layout import Clips, Field, Source, Written
from vidshard.jobs.runtime.terminal import finite
from vidshard.pipeline.output.names import safe_name
from vidshard.schemas.errors import UserError
from vidshard.schemas.text import readable

_NAME = re.compile(r"[a-z][a-z0-9_]{0,99}", re.ASCII)
"""Names that a member of a tar may have: WebDataset turns them to small letters, and splits at dots."""


class WebDataset:
    """Layout of tar files, ``000000.tar`` on; see `Layout`."""

    name = "webdataset"
    meaning = "tar files of samples (KEY.json, KEY.tokens.npy ...), for WebDataset and its relatives"
    fields: Sequence[Field] = ()
    whole_runs = False

    def check(self, source: Source) -> list[str]:
        """Check the names of the columns that become members."""
        names = [column.name for column in source.payload]
        for name in names:
            if not _NAME.fullmatch(name) or name == "json":
                raise UserError(
                    f"--to webdataset names files after payload columns, and '{readable(name, 80)}' is no name of one"
                )
        return []

    def write(self, source: Source, clips: Clips, _before: Sequence[Written], /) -> Written:
        """Write one tar file."""
        written = Written()
        signals = [f.name for f in clips.table.schema if _is_signal(f.type) and _NAME.fullmatch(f.name)]
        signals = [name for name in signals if name not in clips.payload and name != "json"]
        made = {"tokenizer": source.tokenizer, "weights_sha256": source.provenance.weights_sha256}
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
            for at, values in enumerate(_values(clips.table)):
                key = safe_name(values["clip_id"])
                arrays = {name: payload[at] for name, payload in clips.payload.items()}
                for name in signals:
                    array = _rows_of_numbers(values[name])
                    if array is not None:
                        arrays[name] = array
                        del values[name]
                _add(
                    tar,
                    f"{key}.json",
                    json.dumps(finite({**values, "vidshard": made}), allow_nan=False, default=_as_text).encode(),
                )
                for name, array in arrays.items():
                    _add(tar, f"{key}.{name}.npy", _npy(array))
                written.num_clips += 1
        written.put(source, f"{clips.number:06d}.tar", out.getbuffer())
        return written

    def finish(self, _source: Source, _batches: Sequence[Written], /) -> dict[str, int]:
        """Write nothing: each tar stands for itself."""
        return {}


def _values(table: pa.Table) -> Any:
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _is_signal(kind: pa.DataType) -> bool:
    """Whether a column holds a list of numbers for each frame."""
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    inner = kind.value_type
    if not (pa.types.is_list(inner) or pa.types.is_large_list(inner) or pa.types.is_fixed_size_list(inner)):
        return False
    return bool(pa.types.is_floating(inner.value_type) or pa.types.is_integer(inner.value_type))


def _rows_of_numbers(value: Any) -> np.ndarray | None:
    """A matrix of numbers; None where rows are missing or of several lengths."""
    if not value or any(row is None or None in row for row in value) or len({len(row) for row in value}) > 1:
        return None
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.kind == "f" and _fits_float32(array) else array


def _fits_float32(array: np.ndarray) -> bool:
    return bool(np.array_equal(array.astype(np.float32).astype(np.float64), array, equal_nan=True))


def _as_text(value: Any) -> str:
    """Text of a value that JSON has no type for, such as a time; bytes as hexadecimal digits."""
    return value.hex() if isinstance(value, bytes) else str(value)


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(array), allow_pickle=False)
    return out.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time, owner and mode are constants: a tar written again is the same
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
