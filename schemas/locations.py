"""Locations with options behind a ``#``: the slice of a signal's file, or a member of an archive.

    data.parquet#rows=120:180&offset=4.5&columns=action     60 rows of one column, from 4.5 s on
    speed/value#times=speed/t                               values and times in two .npy files
    clips.tar#bytes=1536:90210&member=a%2Fb.mp4             a file in an archive, and where it lies

Options count only if every one is of the list below. Otherwise the ``#`` belongs to the name of a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from urllib.parse import quote, unquote

SIGNAL_OPTIONS = ("rows", "offset", "columns", "rate", "episode", "times", "key")
"""Options of signals: rows of the file, seconds to add to its times, its columns, samples per second in place of times,
the LeRobot episode that all rows must be of, a file of times, and the member of a JSON object with the samples."""
MEMBER_OPTIONS = ("bytes", "zip", "row", "column", "member")
"""Options of members: their bytes in a tar, their place in a zip, the row and the column of a Parquet file, and their
name."""

_OPTION = re.compile(rf"(?:{'|'.join((*SIGNAL_OPTIONS, *MEMBER_OPTIONS))})=[^&#]*")
_PATHS = frozenset({"times"})
_PLACE = re.compile("[0-9:]+")


def split_options(uri: str) -> tuple[str, dict[str, str]]:
    """The location without its options, and the options, decoded; none where what follows ``#`` is something else."""
    path, mark, text = uri.rpartition("#")
    if not mark or not path or not all(_OPTION.fullmatch(part) for part in text.split("&")):
        return uri, {}
    return path, {name: unquote(value) for name, _, value in (part.partition("=") for part in text.split("&"))}


def join_options(path: str, options: Mapping[str, str]) -> str:
    """The location with options; inverse of :func:`split_options`."""
    if not options:
        return path
    return f"{path}#" + "&".join(f"{name}={quote(value, safe='/:,+-_.~')}" for name, value in options.items())


def bare(uri: str) -> str:
    """The location of the file itself."""
    return split_options(uri)[0]


def split_member(uri: str) -> tuple[str, dict[str, str]]:
    """The location of an archive, and the options that say which member of it; none for any other file."""
    path, options = split_options(uri)
    places = [options[name] for name in ("bytes", "zip", "row") if name in options]
    if places and set(options) <= set(MEMBER_OPTIONS) and all(map(_PLACE.fullmatch, places)):
        return path, options
    return uri, {}


def each_location(uri: str) -> list[str]:
    """Every file that a location names."""
    path, options = split_options(uri)
    return [path, *(value for name, value in options.items() if name in _PATHS)]


def map_locations(uri: str, change: Callable[[str], str]) -> str:
    """The location with a function applied to every file that it names."""
    path, options = split_options(uri)
    changed = {name: change(value) if name in _PATHS else value for name, value in options.items()}
    changed_path = change(path)
    return uri if (changed_path, changed) == (path, options) else join_options(changed_path, changed)
