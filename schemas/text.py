"""Foreign text on its way to a terminal, a log or a spreadsheet.

File names, columns, metadata of shards and messages of servers may hold escape sequences that set the clipboard or the
title, line breaks that forge lines, or marks that reorder what is read. They are shown as escapes instead.
"""

from __future__ import annotations

import unicodedata

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories of control, format (bidirectional overrides among them), surrogate, private, unassigned characters
and separators of lines and paragraphs."""
_JOINERS = frozenset("\u200c\u200d")
"""Format characters that scripts and emoji need: zero width non-joiner and joiner."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""First characters that make a spreadsheet take a cell for a formula; the last four are their full-width forms."""


def readable(text: object, limit: int | None = None) -> str:
    """Text on one line, safe to print: every character that does not show itself is written as an escape.

    Args:
        text: foreign text; other values by their ``str``.
        limit: characters at most; longer text ends in ``...``. None for all of it.
    """
    whole = str(text)
    if limit is not None and len(whole) > limit:
        whole = whole[: max(0, limit - 3)] + "..."
    return whole if _is_plain(whole) else "".join(map(_shown, whole))


def readable_lines(text: object) -> str:
    """As :func:`readable`, but line breaks and tabs stay: for text of ours that has several lines."""
    whole = str(text)
    if _is_plain(whole):
        return whole
    return "".join(c if c in "\n\t" else _shown(c) for c in whole)


def counted(number: float, noun: str) -> str:
    """A number with its noun, such as ``1 node``, ``2 nodes`` and ``0.5 GPUs``."""
    shown = f"{number:,}" if isinstance(number, int) else f"{number:,g}"
    return f"{shown} {noun}" if number == 1 else f"{shown} {noun}s"


def indented(text: object) -> str:
    """A message safe to print, its lines after the first indented."""
    first, *others = readable_lines(text).split("\n")
    return "\n".join([first, *(line if line.startswith("  ") else f"  {line}" for line in others)])


def spreadsheet_cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula: one that begins like a formula gets a ``'`` before it."""
    return f"'{text}" if text.lstrip(" \u00a0\u3000").startswith(_FORMULA) or text.startswith(_FORMULA) else text


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _shown(character: str) -> str:
    if character == " " or unicodedata.category(character) not in _HIDDEN or character in _JOINERS:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
