"""Answers of the decoding process: a fixed structure with limits, checked field by field before it is used.

A hostile video that takes over FFmpeg also writes the answer. Nothing in it is executed or believed: it is JSON of
records from a closed list whose fields have the declared types, and arrays of numbers whose shape fits the bytes that
came. Anything else is a `MalformedAnswerError`.

    value   null, true, 1, 1.5, "text"                     themselves
            ["q", 1, 25]                                   a Fraction
            ["l", ...], ["t", ...], ["d", {...}]           a list, a tuple, a dictionary
            ["a", "uint8", [17, 64, 64, 3], 0]             an array, and the number of its buffer
            ["r", "Clip", {"clip_index": 0, ...}]          a record
            ["e", "VideoError", ["truncated", "..."], "traceback"]   an error to raise
"""

from __future__ import annotations

import builtins
import json
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from fractions import Fraction
from functools import cache
from typing import Any, Literal, Union

import numpy as np

from vidshard.pipeline.video.signals import Signal
from vidshard.schemas.errors import OutageError, VidshardError
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, Geometry, SpanClips, VideoProbe, VideoSource

_MAX_WORDS, _MAX_TRACEBACK = 4 << 10, 16 << 10
"""Longest text of an error, and longest traceback, in characters."""
_DTYPES = frozenset({"bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64))}) | {
    "float16",
    "float32",
    "float64",
}
_RECORDS: dict[str, type] = {
    kind.__name__: kind for kind in (VideoProbe, VideoSource, SpanClips, Clip, Geometry, Signal)
}
_ERRORS: dict[str, type[Exception]] = {
    **{kind.__name__: kind for kind in (OutageError, VidshardError)},
    **{
        name: getattr(builtins, name)
        for name in ("TypeError", "ValueError", "KeyError", "IndexError", "OverflowError", "ArithmeticError", "OSError")
    },
    "MemoryError": MemoryError,
}
_VIDEO_ID = re.compile(r"[0-9a-f]{24}")


class MalformedAnswerError(Exception):
    """An answer is not what this program sends; the process that sent it is to be ended."""


# The child's side.


def to_text(value: object, buffers: list[memoryview]) -> bytes:
    """Encode a value; the bytes of its arrays are appended to ``buffers``.

    Raises:
        TypeError: the value holds something that no answer may hold.
    """
    return json.dumps(_plain(value, buffers)).encode()


def error_to_text(error: Exception, traceback: str) -> bytes:
    """Encode an exception. One of a type that no answer may hold becomes a RuntimeError with its traceback."""
    note = traceback[-_MAX_TRACEBACK:]
    if isinstance(error, VideoError):
        return json.dumps(["e", "VideoError", [str(error.reason), error.detail[:_MAX_WORDS]], note]).encode()
    known = next((name for name, kind in _ERRORS.items() if type(error) is kind), None)
    if known is None:
        known = next((name for name in ("OutageError", "VidshardError") if isinstance(error, _ERRORS[name])), None)
    if known is None and isinstance(error, MemoryError):  # NumPy and PyAV have kinds of their own
        known = "MemoryError"
    words = traceback[-_MAX_WORDS:] if known is None else str(error)[:_MAX_WORDS]
    return json.dumps(["e", known or "RuntimeError", [words], note]).encode()


def _plain(value: object, buffers: list[memoryview]) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, Fraction):
        return ["q", value.numerator, value.denominator]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.dtype.name in _DTYPES:
        buffers.append(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        return ["a", value.dtype.name, list(value.shape), len(buffers) - 1]
    if isinstance(value, (list, tuple)):
        return ["t" if isinstance(value, tuple) else "l", *(_plain(item, buffers) for item in value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return ["d", {key: _plain(item, buffers) for key, item in value.items()}]
    if isinstance(value, VideoError):
        return ["e", "VideoError", [str(value.reason), value.detail[:_MAX_WORDS]], ""]
    if type(value).__name__ in _RECORDS and is_dataclass(value):
        names = [field.name for field in fields(value) if field.init]
        return ["r", type(value).__name__, {name: _plain(getattr(value, name), buffers) for name in names}]
    raise TypeError(f"an answer cannot hold a {type(value).__name__}")


# The parent's side.


def from_text(text: bytes, buffers: Sequence[bytearray], *, may_claim_outages: bool = False) -> object:
    """Decode a value.

    Args:
        text: JSON, as `to_text` writes it.
        buffers: bytes of the arrays; the arrays share their memory.
        may_claim_outages: whether an OutageError, which ends a run, is believed.

    Returns:
        The value; an exception is returned, not raised.

    Raises:
        MalformedAnswerError: it is anything else.
    """
    try:
        value = _value(json.loads(text), buffers)
    except MalformedAnswerError:
        raise
    except Exception as error:
        raise MalformedAnswerError(f"{type(error).__name__} in an answer") from error
    if isinstance(value, OutageError) and not may_claim_outages:
        raise MalformedAnswerError("an outage, of which a decoder knows nothing")
    return value


def _value(plain: Any, buffers: Sequence[bytearray]) -> object:
    if plain is None or isinstance(plain, (bool, int, float, str)):
        return plain
    match plain:
        case ["q", int(numerator), int(denominator)]:
            return Fraction(numerator, denominator)
        case ["l", *items]:
            return [_value(item, buffers) for item in items]
        case ["d", dict(items)]:
            return {key: _value(item, buffers) for key, item in items.items()}
        case ["t", *items]:
            return tuple(_value(item, buffers) for item in items)
        case ["a", str(dtype), [*shape], int(number)] if dtype in _DTYPES and 0 <= number < len(buffers):
            if not all(type(size) is int and size >= 0 for size in shape):
                raise MalformedAnswerError("an array with an impossible shape")
            if math.prod(shape) * np.dtype(dtype).itemsize != len(buffers[number]):
                raise MalformedAnswerError("an array whose shape does not fit its bytes")
            return np.frombuffer(buffers[number], dtype).reshape(shape)
        case ["e", "VideoError", [str(reason), str(detail)], str(note)]:
            return _with_note(VideoError(Reason(reason), detail[:_MAX_WORDS]), note)
        case ["e", str(name), [str(words)], str(note)]:
            return _with_note(_ERRORS.get(name, RuntimeError)(words[:_MAX_WORDS]), note)
        case ["r", str(name), dict(values)] if name in _RECORDS:
            return _record(_RECORDS[name], {key: _value(value, buffers) for key, value in values.items()})
    raise MalformedAnswerError("something that no answer holds")


def _with_note(error: Exception, note: str) -> Exception:
    if note:
        error.add_note(f"in the decoding process:\n{note[-_MAX_TRACEBACK:]}")
    return error


def _record(kind: type, values: dict[str, Any]) -> object:
    hints = _hints(kind)
    for name, value in values.items():
        if name not in hints or not _fits(value, hints[name]):
            raise MalformedAnswerError(f"{kind.__name__}.{name} is a {type(value).__name__}")
    if "video_id" in values and not _VIDEO_ID.fullmatch(values["video_id"]):
        raise MalformedAnswerError("a video id that is none")
    return kind(**values)


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind) if field.init}


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a declared type: those of the records, and no more."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is Literal:
        return value in arguments
    if origin is np.ndarray or hint is np.ndarray:
        return isinstance(value, np.ndarray)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint is float:
        return isinstance(value, float) or type(value) is int
    return type(value) is hint or (hint is type(None) and value is None)
