"""Charts of a report: Vega-Lite specifications, and their static SVG.

Colors are CSS variables of the page, so that a chart follows its light or dark mode. The package ``vl-convert-python``
draws, in a process of its own (`draw.py`) with neither network nor secrets. A chart is as wide as a phone's screen.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vidshard.schemas.text import readable
from vidshard.schemas.uris import without_secrets

Spec = dict[str, Any]
"""A Vega-Lite specification."""

WIDTH, HEIGHT = 330, 170
"""Size of the plotting area in pixels."""
SERIES = tuple(f"var(--s{number})" for number in range(1, 7))
"""Colors of series, defined by the page."""
DRAWING_SECONDS = 60.0
"""Longest time that drawing may take: about 1 s of a core for a report, most of it the start of V8."""
MAX_LABEL = 40
"""Characters of a label that a chart shows."""

_CONFIG: Spec = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "titleFontSize": 12,
        "labelFontSize": 11,
        "gridColor": "var(--grid)",
        "domainColor": "var(--grid)",
        "tickColor": "var(--grid)",
        "labelLimit": 130,
    },
    "legend": {
        "labelColor": "var(--ink)",
        "labelFontSize": 11,
        "labelLimit": 300,
        "orient": "top",
        "direction": "vertical",
        "title": None,
        "offset": 4,
    },
    "header": {"labelColor": "var(--ink)", "title": None},
}


class ChartError(Exception):
    """Charts cannot be drawn; the message says why and what to do."""


def label(text: object) -> str:
    """Foreign text as a label: one line, without secrets, at most `MAX_LABEL` characters."""
    return readable(without_secrets(str(text)), MAX_LABEL)


def line_chart(
    points: Iterable[tuple[float, float, str]],
    *,
    x: str,
    y: str,
    rules: Sequence[float] = (),
    fill: bool = False,
    log_y: bool = False,
) -> Spec | None:
    """Lines through points; None without two of them.

    Args:
        points: x, y and name of the series of each; values that are not finite are left out.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        rules: places of dashed vertical lines.
        fill: fill the area below the lines, which begins at 0.
        log_y: logarithmic vertical axis, without values that are not positive.
    """
    rows = [
        {"x": a, "y": b, "series": label(name)}
        for a, b, name in points
        if math.isfinite(a) and math.isfinite(b) and (b > 0 or not log_y)
    ]
    if len(rows) < 2:
        return None
    names = list(dict.fromkeys(row["series"] for row in rows))
    colors = [SERIES[number % len(SERIES)] for number in range(len(names))]
    scale = {"type": "log"} if log_y else {"zero": fill}
    mark: Spec = {"type": "area", "line": True, "fillOpacity": 0.18} if fill else {"type": "line", "strokeWidth": 2}
    if len(rows) <= 12 * len(names):
        mark["point"] = {"size": 22}
    layers: list[Spec] = [
        {
            "data": {"values": rows},
            "mark": mark,
            "encoding": {
                "x": {"field": "x", "type": "quantitative", "title": x, "axis": {"tickCount": 6, "grid": False}},
                "y": {"field": "y", "type": "quantitative", "title": y, "scale": scale, "axis": {"tickCount": 5}},
                "color": {
                    "field": "series",
                    "type": "nominal",
                    "scale": {"domain": names, "range": colors},
                    "legend": None if len(names) == 1 else {},
                },
            },
        }
    ]
    if rules:
        layers.append(
            {
                "data": {"values": [{"x": at} for at in rules]},
                "mark": {"type": "rule", "strokeDash": [3, 3], "color": "var(--muted)"},
                "encoding": {"x": {"field": "x", "type": "quantitative"}},
            }
        )
    return _chart(layer=layers)


def bar_chart(values: Mapping[str, float], *, x: str, text: Mapping[str, str] | None = None) -> Spec | None:
    """Horizontal bars in the order given, with their values written beside; None without any.

    Args:
        values: length of each bar by its label.
        x: title of the axis.
        text: text beside each bar; the value by default.
    """
    values = {name: value for name, value in values.items() if math.isfinite(value)}
    if not values:
        return None
    rows = [
        {"name": label(name), "value": value, "text": label((text or {}).get(name, f"{value:,.4g}"))}
        for name, value in values.items()
    ]
    names = [row["name"] for row in rows]
    y = {"field": "name", "type": "nominal", "sort": names, "title": None, "axis": {"ticks": False, "domain": False}}
    furthest = max(values.values())
    along = {
        "field": "value",
        "type": "quantitative",
        "title": x,
        "scale": {"domain": [0, 1.25 * furthest or 1.0], "nice": False},
        "axis": {
            "tickCount": 4,
            **({"tickMinStep": 1} if all(value == int(value) for value in values.values()) else {}),
        },
    }
    bars = {
        "mark": {"type": "bar", "color": SERIES[0], "height": {"band": 0.7}},
        "encoding": {"y": y, "x": along},
    }
    words = {
        "mark": {"type": "text", "align": "left", "dx": 4, "color": "var(--ink)", "fontSize": 11},
        "encoding": {"y": y, "x": along, "text": {"field": "text"}},
    }
    return _chart(layer=[bars, words], data={"values": rows}, width=WIDTH - 90, height={"step": 24})


def histogram(values: Sequence[float], *, x: str, count: str, bins: int = 24) -> Spec | None:
    """Histogram of values in bins of equal width; None without finite values.

    Args:
        values: values; those that are not finite are left out.
        x: title of the horizontal axis.
        count: title of the vertical axis: what is counted.
        bins: number of bins.
    """
    finite = np.asarray(values, np.float64)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return None
    low, high = float(finite.min()), float(finite.max())
    if bool((finite == np.round(finite)).all()) and high - low <= bins:
        low, high = math.floor(low) - 0.5, math.ceil(high) + 0.5  # a bin for each whole number
        bins = int(high - low)
    elif low == high:
        low, high = low - max(0.5, abs(low) / 100), high + max(0.5, abs(high) / 100)
    counts, edges = np.histogram(finite, bins=bins, range=(low, high))
    rows = [
        {"from": float(edges[n]), "to": float(edges[n + 1]), "count": int(counts[n])} for n in range(bins) if counts[n]
    ]
    return _chart(
        data={"values": rows},
        mark={"type": "bar", "color": SERIES[0], "binSpacing": 1},
        encoding={
            "x": {
                "field": "from",
                "type": "quantitative",
                "bin": {"binned": True},
                "title": x,
                "scale": {"domain": [low, high], "nice": False},
                "axis": {"tickCount": 6, "grid": False, **_whole_ticks(low, high, bins)},
            },
            "x2": {"field": "to"},
            "y": {"field": "count", "type": "quantitative", "title": count, "axis": {"tickCount": 4, "tickMinStep": 1}},
        },
    )


def _whole_ticks(low: float, high: float, bins: int) -> Spec:
    """At most eight whole numbers in the middle of bins of width 1; else nothing, and Vega chooses."""
    if high - low != bins or low % 1 != 0.5:
        return {}
    return {"values": list(range(math.ceil(low), math.floor(high) + 1, max(1, -(-bins // 8)))), "format": "d"}


def share_chart(shares: Mapping[str, Mapping[str, float]], *, x: str) -> Spec | None:
    """Stacked bars that compare parts of wholes; None without any.

    Args:
        shares: size of each part by the name of the whole, then of the part.
        x: title of the axis.
    """
    rows = [
        {"whole": label(whole), "part": label(part), "value": value}
        for whole, parts in shares.items()
        for part, value in parts.items()
        if math.isfinite(value)
    ]
    if not rows:
        return None
    parts = list(dict.fromkeys(row["part"] for row in rows))
    for row in rows:
        row["order"] = parts.index(row["part"])
    return _chart(
        data={"values": rows},
        mark={"type": "bar", "height": {"band": 0.65}},
        encoding={
            "y": {
                "field": "whole",
                "type": "nominal",
                "sort": [label(name) for name in shares],
                "title": None,
                "axis": {"ticks": False, "domain": False},
            },
            "x": {"field": "value", "type": "quantitative", "title": x, "axis": {"tickCount": 5}},
            "order": {"field": "order"},
            "color": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": parts, "range": [SERIES[number % len(SERIES)] for number in range(len(parts))]},
                "legend": {"columns": 2},
            },
        },
        width=WIDTH - 60,
        height={"step": 34},
    )


def scatter_chart(points: Iterable[tuple[float, float, str, str]], *, x: str, y: str) -> Spec | None:
    """Labeled points on a logarithmic horizontal axis; None without any.

    Args:
        points: x above 0, y, label and group of each.
        x: title of the horizontal axis.
        y: title of the vertical axis.
    """
    rows: list[dict[str, Any]] = [
        {"x": a, "y": b, "name": label(name), "group": label(group)}
        for a, b, name, group in points
        if math.isfinite(a) and a > 0 and math.isfinite(b)
    ]
    if not rows:
        return None
    groups = list(dict.fromkeys(row["group"] for row in rows))
    low, high = min(row["x"] for row in rows), max(row["x"] for row in rows)
    lowest, highest = min(row["y"] for row in rows), max(row["y"] for row in rows)
    room = ((highest - lowest) or 1.0) * _SCATTER_PADDING
    heights = (lowest - room, highest + room)
    base: Spec = {
        "x": {
            "field": "x",
            "type": "quantitative",
            "title": x,
            "scale": {"type": "log", "domain": [low / 1.5, high * 1.5], "nice": False},
            "axis": {"grid": False, "tickCount": 5, "format": "~g", "labelOverlap": True},
        },
        "y": {"field": "y", "type": "quantitative", "title": y, "scale": {"domain": heights, "nice": False}},
        "color": {
            "field": "group",
            "type": "nominal",
            "scale": {"domain": groups, "range": [SERIES[number % len(SERIES)] for number in range(len(groups))]},
            "legend": {"direction": "horizontal"},
        },
    }
    marks = {"mark": {"type": "point", "filled": True, "size": 60, "opacity": 0.9}, "encoding": base}
    names = {
        "data": {"values": _labeled([r for r in rows if r["group"] == groups[0]], (low / 1.5, high * 1.5), heights)},
        "mark": {
            "type": "text",
            "align": {"expr": "datum.align"},
            "dx": {"expr": "datum.align == 'left' ? 6 : -6"},
            "dy": {"expr": "datum.dy"},
            "fontSize": _LABEL_PIXELS,
            "limit": 200,
        },
        "encoding": {**base, "text": {"field": "name"}},
    }
    return _chart(layer=[marks, names], data={"values": rows}, height=_SCATTER_HEIGHT)


_SCATTER_HEIGHT = 230
_SCATTER_PADDING = 0.08
"""Room above and below the points, in their range."""
_LABEL_PIXELS = 10


def _labeled(
    rows: Iterable[Mapping[str, Any]], across: tuple[float, float], heights: tuple[float, float]
) -> list[dict[str, Any]]:
    """Points with a place for each label, at which it covers no other one and stays within the chart, where it can.

    Args:
        rows: points, as in `scatter_chart`.
        across: ends of the horizontal axis.
        heights: ends of the vertical axis.
    """
    labeled: list[dict[str, Any]] = []
    boxes: list[tuple[float, float, float]] = []  # left, right and middle of the labels so far, in pixels
    for row in sorted(rows, key=lambda row: -float(row["y"])):
        x = WIDTH * math.log(row["x"] / across[0]) / math.log(across[1] / across[0])
        y = _SCATTER_HEIGHT * (heights[1] - row["y"]) / (heights[1] - heights[0])
        wide = min(200.0, 0.6 * _LABEL_PIXELS * len(row["name"]))
        align = "left" if x + 6 + wide <= WIDTH else "right"
        left = x + 6 if align == "left" else x - 6 - wide
        near = [middle for start, right, middle in boxes if left <= right and start <= left + wide]
        apart = _LABEL_PIXELS + 2
        free = [
            dy
            for dy in (-6, 8, -20, 22, -34, 36, -48, 50)
            if apart / 2 <= y + dy <= _SCATTER_HEIGHT - apart / 2 and all(abs(y + dy - m) >= apart for m in near)
        ]
        dy = free[0] if free else -6
        boxes.append((left, left + wide, y + dy))
        labeled.append({**row, "align": align, "dy": dy})
    return labeled


def _chart(**spec: Any) -> Spec:
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "width": WIDTH,
        "height": HEIGHT,
        "config": _CONFIG,
        **spec,
    }


# Drawing


def draw(specs: Sequence[Spec]) -> list[str]:
    """Draw charts: an SVG text for each specification, without script, style, link or fixed size.

    Raises:
        ChartError: they cannot be drawn.
    """
    if not specs:
        return []
    kept = ("PATH", "HOME", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR", "SYSTEMROOT", "VIRTUAL_ENV")
    try:
        done = subprocess.run(  # noqa: S603  our own program
            [sys.executable, "-P", str(Path(__file__).with_name("draw.py"))],
            input=json.dumps(specs),
            capture_output=True,
            text=True,
            timeout=DRAWING_SECONDS,
            env={name: os.environ[name] for name in kept if name in os.environ},
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ChartError(f"charts could not be drawn: {type(error).__name__}") from error
    if done.returncode:
        if "No module named 'vl_convert'" in done.stderr:
            raise ChartError("charts need vl-convert-python: pip install vl-convert-python")
        raise ChartError(f"charts could not be drawn: {_reason(done.stderr)}")
    try:
        drawn = json.loads(done.stdout)
        if len(drawn) != len(specs):
            raise ValueError("some are missing")
        return [_checked(svg) for svg in drawn]
    except (ValueError, TypeError, ET.ParseError) as error:
        raise ChartError(f"charts could not be drawn: {readable(error, 200)}") from error


def _reason(text: str) -> str:
    lines = [line.strip(" #") for line in text.splitlines() if line.strip(" #")]
    return readable(
        next((line for line in lines if line.startswith("Fatal")), lines[-1] if lines else "no reason"), 200
    )


_TAGS = frozenset({"svg", "g", "path", "line", "rect", "text", "tspan", "circle", "title", "desc"})
_NAMESPACE = "{http://www.w3.org/2000/svg}"


def _checked(svg: str) -> str:
    """A chart that scales with the page.

    Raises:
        ValueError: it has an element or attribute that a chart does not need.
    """
    for element in ET.fromstring(svg).iter():  # noqa: S314  text of our own program, without a document type
        if element.tag.removeprefix(_NAMESPACE) not in _TAGS:
            raise ValueError(f"a chart has an element {element.tag!r:.60}")
        for name in element.attrib:
            if name.lower().startswith("on") or "href" in name or name == "style":
                raise ValueError(f"a chart has an attribute {name!r:.60}")
    return re.sub(r'^<svg [^>]*?width="([\d.]+)" height="([\d.]+)"', r'<svg role="img" data-width="\1"', svg, count=1)
