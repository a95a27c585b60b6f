"""Filters of rows, as text: ``source_fps >= 24 and num_valid_frames = 17`` to an Arrow expression.

A filter is a condition of SQL: comparisons (``= == != <> < <= > >=``), ``in (...)``, ``is null``, ``is not null``,
joined by ``and``, ``or``, ``not`` and parentheses. Strings, dates and times (ISO 8601) stand in single or double
quotes, and a column whose name is no word in backquotes; ``geometry.policy`` names a field of a struct. Comparing with
null or NaN is neither true nor false.
"""

from __future__ import annotations

import datetime
import difflib
import operator
import re
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from vidshard.schemas.errors import UserError
from vidshard.schemas.text import readable

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)(?![A-Za-z_\d])"""
    r"""|(?P<text>'(?:[^']|'')*'|"(?:[^"]|"")*")"""
    r"""|(?P<word>[^\W\d]\w*(?:\.[^\W\d]\w*)*)"""
    r"""|(?P<column>`(?:[^`]|``)+`)"""
    r"""|(?P<sign>==|!=|<>|<=|>=|=|<|>|\(|\)|,))"""
)
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq, "==": operator.eq, "!=": operator.ne, "<>": operator.ne,
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_UNKNOWN = pa.scalar(None, pa.bool_())
_DEEPEST = 50


def near_names(name: str, names: Iterable[str]) -> str:
    """The columns that a wrong name may mean, for an error: the nearest ones, or all."""
    known = sorted(names)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(known)}"


def parse_where(text: str, schema: pa.Schema, *, for_statistics: bool = False) -> tuple[pc.Expression, list[str]]:
    """Parse a filter.

    Args:
        text: the condition.
        schema: columns of the rows.
        for_statistics: the expression is for choosing row groups by their statistics, which know nothing of NaN; its
            value for rows with NaN does not matter.

    Returns:
        The expression, and the columns that it reads.

    Raises:
        UserError: the text is no condition, names an unknown column, or compares values of different kinds.
    """
    parser = _Parser(text, schema, for_statistics=for_statistics)
    expression = parser.condition()
    if parser.kind is not None:
        raise parser.error(f"'{parser.value}' is not expected there")
    return expression, sorted(parser.columns)


class _Parser:
    """Recursive descent; the current token is ``kind`` and ``value``, and ``kind`` is None at the end."""

    def __init__(self, text: str, schema: pa.Schema, *, for_statistics: bool) -> None:
        if not isinstance(text, str):
            raise UserError(f"where must be a text such as 'source_fps >= 24', got {text!r:.40}")
        self._text, self._schema, self._for_statistics = text, schema, for_statistics
        self._at = self._depth = 0
        self.columns: set[str] = set()
        self.kind: str | None = None
        self.value = ""
        self._next()

    def error(self, why: str) -> UserError:
        """The error to raise, with the whole filter."""
        return UserError(f"where={readable(self._text, 200)!r}: {why}")

    def condition(self) -> pc.Expression:
        """``a or b``, which binds least."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self.error(f"it is nested more than {_DEEPEST} levels deep")
        left = self._all_of()
        while self._take("or"):
            left = left | self._all_of()
        self._depth -= 1
        return left

    def _all_of(self) -> pc.Expression:
        left = self._negated()
        while self._take("and"):
            left = left & self._negated()
        return left

    def _negated(self) -> pc.Expression:
        negated = False
        while self._take("not"):
            negated = not negated
        found = self._simple()
        return ~found if negated else found

    def _simple(self) -> pc.Expression:
        if self._take("("):
            found = self.condition()
            self._expect(")")
            return found
        field, kind = self._column()
        if self._take("is"):
            negated = self._take("not")
            self._expect("null")
            return ~field.is_null() if negated else field.is_null()
        negated = self._take("not")
        if self._take("in"):
            self._expect("(")
            values = [self._literal(kind)]
            while self._take(","):
                values.append(self._literal(kind))
            self._expect(")")
            # `isin` is false for null, where SQL says unknown: `not in` must not pass it
            found = field.isin(pa.array(values, kind)) | (self._is_unknown(field) & _UNKNOWN)
            return ~found if negated else found
        if negated:
            raise self.error("'in' is expected after 'not'")
        if self.kind is None and pa.types.is_boolean(kind):
            return field
        if self.kind == "sign" and self.value in _COMPARE:
            sign = self.value
            self._next()
            value = pa.scalar(self._literal(kind), kind)
            if self._for_statistics or not pa.types.is_floating(kind):
                return _COMPARE[sign](field, value)
            # row groups are left out without regard to NaN, so NaN must pass no comparison, negated or not
            negated = sign in ("!=", "<>")
            found = _COMPARE["=" if negated else sign](field, value) | (self._is_unknown(field) & _UNKNOWN)
            return ~found if negated else found
        if pa.types.is_boolean(kind):
            return field
        raise self.error(f"a comparison such as >= is expected after the column, got {self._shown()}")

    def _is_unknown(self, field: pc.Expression) -> pc.Expression:
        return field.is_null(nan_is_null=not self._for_statistics)

    def _column(self) -> tuple[pc.Expression, pa.DataType]:
        if self.kind not in ("word", "column"):
            raise self.error(f"a column is expected, got {self._shown()}")
        whole, kind = self.value, None
        if self.kind == "column":
            whole = whole[1:-1].replace("``", "`")
        is_name = self.kind == "column" or whole in self._schema.names
        path = (whole,) if is_name else tuple(whole.split("."))
        if path[0] in self._schema.names:
            kind = self._schema.field(path[0]).type
            for name in path[1:]:
                at = kind.get_field_index(name) if pa.types.is_struct(kind) else -1
                kind = kind.field(at).type if at >= 0 else None
                if kind is None:
                    break
        if kind is None:
            raise self.error(f"there is no column '{readable(whole, 80)}'; {near_names(whole, self._schema.names)}")
        self.columns.add(path[0])
        self._next()
        return pc.field(*path), kind

    def _literal(self, kind: pa.DataType) -> Any:
        found, text = self.kind, self.value
        value: Any = None
        if found == "number" and (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            value = float(text)
            if pa.types.is_integer(kind):
                if not value.is_integer():
                    raise self.error(f"the column holds whole numbers, got {text}")
                value = int(text) if re.fullmatch(r"[-+]?\d+", text) else int(value)
        elif found == "text" and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            value = text[1:-1].replace(text[0] * 2, text[0])
        elif found == "text" and pa.types.is_temporal(kind):
            value = self._time(text[1:-1], kind)
        elif found == "word" and text.lower() in ("true", "false") and pa.types.is_boolean(kind):
            value = text.lower() == "true"
        else:
            raise self.error(f"a value of the column's type {kind} is expected, got {self._shown()}")
        self._next()
        try:
            pa.scalar(value, kind)
        except (pa.ArrowException, OverflowError) as error:
            raise self.error(f"{text} does not fit the column's type {kind}") from error
        return value

    def _time(self, text: str, kind: pa.DataType) -> Any:
        """A date or time in ISO 8601; a time without a zone is UTC where the column has one."""
        try:
            if pa.types.is_date(kind):
                return datetime.date.fromisoformat(text)
            if pa.types.is_timestamp(kind):
                found = datetime.datetime.fromisoformat(text)
                if kind.tz is not None and found.tzinfo is None:
                    return found.replace(tzinfo=datetime.UTC)
                if kind.tz is None and found.tzinfo is not None:
                    raise self.error(f"the column has no time zone: leave it out of '{readable(text, 80)}'")
                return found
        except ValueError as error:
            such = "date such as '2026-01-31'" if pa.types.is_date(kind) else "time such as '2026-01-31 12:00:00'"
            raise self.error(f"'{readable(text, 80)}' is no {such}") from error
        raise self.error(f"columns of type {kind} cannot be compared")

    def _shown(self) -> str:
        return "the end" if self.kind is None else f"'{readable(self.value, 80)}'"

    def _take(self, wanted: str) -> bool:
        if self.kind in ("word", "sign") and self.value.lower() == wanted:
            self._next()
            return True
        return False

    def _expect(self, wanted: str) -> None:
        if not self._take(wanted):
            raise self.error(f"'{wanted}' is expected, got {self._shown()}")

    def _next(self) -> None:
        if not self._text[self._at :].strip():
            self.kind, self.value = None, ""
            return
        match = _TOKEN.match(self._text, self._at)
        if match is None or match.lastgroup is None:
            raise self.error(f"it cannot be read from '{readable(self._text[self._at :].strip(), 40)}' on")
        self._at = match.end()
        self.kind, self.value = match.lastgroup, match[match.lastgroup]
