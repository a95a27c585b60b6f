"""Page of a report: sections of blocks, rendered as one HTML file that needs no network and no other file.

Text is escaped, and stripped of secrets and control characters, where the page is rendered (`_shown`): no block has to
think of it. A Content-Security-Policy allows the one style and the one script of the page, by digest, and data URIs.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Literal

from vidshard.jobs.report.charts import ChartError, Spec, draw
from vidshard.schemas.text import readable, readable_lines
from vidshard.schemas.uris import without_secrets

MAX_TEXT = 2000
"""Characters of a text that the page shows."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Part of a section; ``kind`` selects the macro of the template."""

    kind: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Facts(Block):
    """Large figures, each with a label."""

    kind: ClassVar[str] = "facts"
    items: Sequence[tuple[str, str, str]]
    """Label, value and a remark of each; the remark may be empty."""


@dataclass(frozen=True, kw_only=True)
class Note(Block):
    """A paragraph."""

    kind: ClassVar[str] = "note"
    text: str
    tone: Literal["plain", "warning", "error"] = "plain"


@dataclass(frozen=True, kw_only=True)
class Chart(Block):
    """A chart with its title; left out if it has no data."""

    kind: ClassVar[str] = "chart"
    title: str
    spec: Spec | None
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Table(Block):
    """A table; cells are texts."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    codes: frozenset[int] = frozenset()
    """Columns of names, paths or ids, which may break anywhere."""
    quiet: frozenset[int] = frozenset()
    """Rows that stand back, such as published figures."""


@dataclass(frozen=True, kw_only=True)
class Details(Block):
    """Lines of text that are folded away."""

    kind: ClassVar[str] = "details"
    title: str
    lines: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Media:
    """A video or picture of a card."""

    title: str
    uri: str
    """A data URI that this program made."""
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """A clip: its videos, which play together, and what is known of it."""

    title: str
    remark: str
    command: str
    """Command to paste."""
    media: Sequence[Media]


@dataclass(frozen=True, kw_only=True)
class Wall(Block):
    """Clips to look at."""

    kind: ClassVar[str] = "wall"
    cards: Sequence[Card]


@dataclass(frozen=True, kw_only=True)
class Pictures(Block):
    """Still pictures, one below the other."""

    kind: ClassVar[str] = "pictures"
    pictures: Sequence[Media]


@dataclass(kw_only=True)
class Section:
    """A part of the page with a heading and an anchor."""

    anchor: str
    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(kw_only=True)
class Page:
    """A report."""

    title: str
    place: str
    """Location of the output."""
    status: str
    tone: Literal["good", "warning", "error"]
    made: str
    """When and by what the page was made."""
    sections: list[Section] = field(default_factory=list)

    def add(self, anchor: str, title: str, *blocks: Block | None) -> None:
        """Add a section, unless it has no blocks or charts without data alone."""
        kept = [b for b in blocks if b is not None and not (isinstance(b, Chart) and b.spec is None)]
        if kept:
            self.sections.append(Section(anchor=anchor, title=title, blocks=kept))


def render(page: Page) -> str:
    """Render a page as HTML; where charts cannot be drawn, it says why in their place.

    Raises:
        ModuleNotFoundError: Jinja2 is missing.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    blocks = [block for section in page.sections for block in section.blocks]
    charts = [block for block in blocks if isinstance(block, Chart) and block.spec is not None]
    missing = ""
    drawn: dict[int, Any] = {}
    try:
        # the texts of a chart are escaped by the program that draws it, and its elements are checked (`charts.draw`)
        svgs = draw([chart.spec for chart in charts if chart.spec is not None])
        drawn = {id(chart): Markup(svg) for chart, svg in zip(charts, svgs, strict=True)}  # noqa: S704
    except ChartError as error:
        missing = str(error)
    here = Path(__file__).parent
    style, script = ((here / name).read_text().strip() for name in ("page.css", "page.js"))
    environment = Environment(autoescape=True, finalize=_shown, undefined=StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    environment.filters["groupby_kind"] = lambda found: [
        (kind, list(group)) for kind, group in groupby(found, key=lambda block: block.kind)
    ]
    template = environment.from_string((here / "page.html.j2").read_text())
    return template.render(
        page=page,
        charts=drawn,
        missing=missing,
        style=Markup(style),  # noqa: S704  our own file
        script=Markup(script),  # noqa: S704  our own file
        policy=Markup(_policy(style, script)),  # noqa: S704  digests
        data=lambda uri: Markup(_data_uri(uri)),  # noqa: S704  checked
        key=id,
    )


def _shown(value: object) -> object:
    """A value as the page shows it, still to be escaped."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    text = readable_lines(without_secrets(value))
    return text if len(text) <= MAX_TEXT else readable(text, MAX_TEXT)


def _policy(style: str, script: str) -> str:
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; img-src data:; "
        "media-src data:; base-uri 'none'; form-action 'none'"
    )


def _data_uri(uri: str) -> str:
    """The URI itself.

    Raises:
        ValueError: it is not one of the kinds of data that a page holds.
    """
    head, _, data = uri.partition(",")
    known = ("data:video/webm;base64", "data:image/png;base64", "data:image/webp;base64", "data:image/jpeg;base64")
    if head not in known or not data or not all(c.isascii() and (c.isalnum() or c in "+/=") for c in data[:64]):
        raise ValueError(f"a page holds data URIs of videos and pictures alone, got {uri[:40]!r}")
    return uri
