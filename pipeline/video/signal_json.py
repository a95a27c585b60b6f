"""Samples in JSON: one object a line, a list of them, or an object keyed by frame number.

    {"mouse": {"dx": 3.0}, "keyboard": {"keys": ["key.keyboard.w"]}}         VPT: line n of a .jsonl file is frame n
    {"biome": "plains", "actions": {"0": {"ws": 1, "pos": [0, 1, 2]}}}       GameFactory: frames by their number

A field is named by its path, ``mouse.dx``. ``keyboard.keys=key.keyboard.w`` is 1 where a list holds that item, or a
text is equal to it, and 0 elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from vidshard.schemas.errors import one_line
from vidshard.schemas.text import readable

MAX_JSON_BYTES = 256 << 20
"""Largest ``.json`` file; its objects take some ten times as much memory. Lines of ``.jsonl`` are read one by one."""

_MAX_LINE_BYTES = 16 << 20
_MAX_FIELDS = 4096
_EXACT_INTEGER = 1 << 24


class BadSignalError(ValueError):
    """The content is not a signal; the message says why and what would be one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonColumns:
    """Fields of the samples of a file."""

    columns: list[list[tuple[str | None, npt.NDArray[Any]]]]
    """For each choice of columns their names and values, float64 (N,) or (N, width), NaN where a sample has none."""
    times: dict[str, npt.NDArray[Any]]
    """Fields of times, of those that every sample has."""


def json_columns(
    data: bytes, wanted: Sequence[Sequence[str] | None], *, lines: bool, key: str | None, time_names: Sequence[str]
) -> JsonColumns:
    """Read fields of samples.

    Args:
        data: the file.
        wanted: fields of each choice; None for all numbers, which must then be the same fields in each sample.
        lines: whether each line is a sample.
        key: path of the member that holds the samples; None to find it.
        time_names: names of fields that are times.

    Raises:
        BadSignalError: it is something else.
    """
    samples = _lines(data) if lines else iter(_samples(data, key))
    names = list(dict.fromkeys(name for columns in wanted for name in columns or ()))
    collected: list[dict[str, Any]] = []
    times: dict[str, list[Any]] = {name: [] for name in time_names}
    with_all = any(columns is None for columns in wanted)
    fields: list[str] = []
    for number, sample in enumerate(samples):
        row = {name: _value(sample, name) for name in names}
        if with_all and sample is not None:
            flat = dict(_numbers_in(sample, ""))
            own = [name for name in flat if name not in time_names]
            if not fields:
                fields = own
            elif set(own) != set(fields):
                odd = min(set(own) ^ set(fields))
                raise BadSignalError(
                    f"sample {number} has other fields than the first one, such as {readable(odd, 80)}: choose fields "
                    "with #columns="
                )
            row |= flat
        for name in list(times):
            time = sample.get(name) if isinstance(sample, dict) else None
            if isinstance(time, bool) or not isinstance(time, (int, float)):
                del times[name]
            else:
                times[name].append(time)
        collected.append(row)
    if not collected:
        raise BadSignalError("no samples; leave the signal out")
    arrays = {name: _array(name, [row.get(name) for row in collected]) for name in [*names, *fields]}
    columns = [[(name or None, arrays[name]) for name in (fields if each is None else each)] for each in wanted]
    return JsonColumns(columns=columns, times={name: np.array(values) for name, values in times.items()})


def _lines(data: bytes) -> Iterator[Any]:
    """The sample on each line; empty lines may stand at the end."""
    at, number = 0, 0
    end_of_text = len(data.rstrip())
    while at < end_of_text:
        end = data.find(b"\n", at)
        end = len(data) if end < 0 else end
        if end - at > _MAX_LINE_BYTES:
            raise BadSignalError(f"line {number + 1} has more than {_MAX_LINE_BYTES} bytes")
        yield _parsed(data[at:end], f"line {number + 1}")
        at, number = end + 1, number + 1


def _parsed(text: bytes, what: str) -> Any:
    try:
        return json.loads(text.removeprefix(b"\xef\xbb\xbf"))
    except RecursionError as error:
        raise BadSignalError(f"{what} is nested too deep") from error
    except ValueError as error:
        raise BadSignalError(f"{what} is no JSON: {one_line(error, 120)}") from error


def _samples(data: bytes, key: str | None) -> list[Any]:
    """The samples of a ``.json`` file; None for a frame that has none."""
    if len(data) > MAX_JSON_BYTES:
        raise BadSignalError(f"more than {MAX_JSON_BYTES} bytes of JSON; write one object a line into a .jsonl file")
    value = _parsed(data, "it")
    if key is not None:
        value = _at(value, key)
        if value is None:
            raise BadSignalError(f"no member {readable(key, 80)!r}")
    found = _as_samples(value)
    if found is not None:
        return found
    if isinstance(value, dict):
        held = {name: samples for name, each in value.items() if (samples := _as_samples(each)) is not None}
        if len(held) == 1:
            return next(iter(held.values()))
        if held and len({len(samples) for samples in held.values()}) == 1:  # a list for each field
            return [dict(zip(held, values, strict=True)) for values in zip(*held.values(), strict=True)]
        if held:
            raise BadSignalError(f"{', '.join(map(readable, list(held)[:8]))} all hold samples: choose one with #key=")
    raise BadSignalError("it holds neither a list of samples nor an object keyed by frame number")


def _as_samples(value: Any) -> list[Any] | None:
    """A list of samples, or an object keyed by frame number from 0, as a list; None for something else."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or not value or not all(name.isascii() and name.isdigit() for name in value):
        return None
    numbers = {int(name): each for name, each in value.items() if len(name) < 10}
    count = max(numbers, default=0) + 1
    if len(numbers) != len(value) or count > 10 * len(value) + 1000:
        raise BadSignalError("its keys are no frame numbers from 0 on")
    return [numbers.get(number) for number in range(count)]


def _at(value: Any, path: str) -> Any:
    """The member at a path; names may hold dots themselves. None where there is none."""
    if not isinstance(value, dict):
        return None
    if path in value:
        return value[path]
    for at, character in enumerate(path):
        if character == "." and path[:at] in value:
            found = _at(value[path[:at]], path[at + 1 :])
            if found is not None:
                return found
    return None


def _value(sample: Any, name: str) -> Any:
    """A field of a sample: a number, a list of numbers, or None."""
    path, equals, item = name.partition("=")
    found = _at(sample, path)
    if found is None:
        return None
    if equals:
        items = found if isinstance(found, list) else [found]
        return float(any(_text(each) == item for each in items))
    kept = dict(_numbers_in(found, name))
    if name not in kept:
        raise BadSignalError(f"{readable(name, 80)} is no number and no list of numbers; NAME=ITEM asks for an item")
    return kept[name]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _numbers_in(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Paths and values of the numbers, and lists of numbers, in a sample."""
    if depth > 64:
        raise BadSignalError("a sample is nested too deep")
    if isinstance(value, (bool, int, float)):
        yield name, value
    elif isinstance(value, list):
        flat = _flattened(value)
        if flat:
            yield name, flat
    elif isinstance(value, dict):
        if len(value) > _MAX_FIELDS:
            raise BadSignalError(f"a sample has more than {_MAX_FIELDS} fields")
        for key, below in value.items():
            yield from _numbers_in(below, f"{name}.{key}" if name else key, depth + 1)


def _flattened(values: list[Any], depth: int = 0) -> list[Any] | None:
    """The numbers of a list, or of lists in it, in order; None where it holds something else."""
    if depth > 8:
        return None
    flat: list[Any] = []
    for value in values:
        if isinstance(value, (bool, int, float)):
            flat.append(value)
        elif isinstance(value, list) and (below := _flattened(value, depth + 1)) is not None:
            flat += below
        else:
            return None
    return flat


def _array(name: str, values: Sequence[Any]) -> npt.NDArray[np.float64]:
    """float64 (N,), or (N, width) of lists, NaN where there is no value."""
    shown = readable(name, 80) or "values"
    first = next((value for value in values if value is not None), None)
    if first is None:
        raise BadSignalError(f"no sample has {shown}")
    width = len(first) if isinstance(first, list) else None
    rows = np.full((len(values), 1 if width is None else width), math.nan)
    for number, value in enumerate(values):
        if value is None:
            continue
        if (len(value) if isinstance(value, list) else None) != width:
            raise BadSignalError(f"{shown} of sample {number} is of another length than that of the first one")
        for at, each in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(each, int) and abs(each) > _EXACT_INTEGER:
                raise BadSignalError(
                    f"{shown} has integers beyond 2**24, which float32 would round; store differences or floats, or "
                    "choose other fields with #columns="
                )
            rows[number, at] = each
    return rows[:, 0] if width is None else rows
