"""Charts: static SVG of data, in which foreign text stays text; a reason where they cannot be drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from vidshard.jobs.report.charts import (
    ChartError,
    bar_chart,
    draw,
    histogram,
    line_chart,
    scatter_chart,
    share_chart,
)

HOSTILE = '</text></svg><script>alert("1")</script><a href="javascript:alert(2)" onload=alert(3)>'


def test_every_kind_of_chart_is_drawn_and_foreign_text_stays_text() -> None:
    pytest.importorskip("vl_convert")
    specs = [
        line_chart([(x, x % 3, HOSTILE) for x in range(9)], x=HOSTILE, y=HOSTILE, rules=[4.0]),
        line_chart([(1, 1, "a"), (2, 0.5, "b")], x="x", y="y", log_y=True),
        bar_chart({HOSTILE: 1.0, "b": 2.0}, x=HOSTILE, text={"b": HOSTILE}),
        histogram([1.5, 2.5, float("nan")], x=HOSTILE, count=HOSTILE),
        share_chart({HOSTILE: {HOSTILE: 1.0, "b": 2.0}}, x=HOSTILE),
        scatter_chart([(0.1, 30.0, HOSTILE, HOSTILE), (0.2, 31.0, "b", "c")], x=HOSTILE, y=HOSTILE),
    ]
    drawn = draw([spec for spec in specs if spec is not None])
    assert len(drawn) == len(specs)
    for svg in drawn:
        assert svg.startswith("<svg ")
        assert "<script" not in svg
        assert "<a " not in svg
        assert 'width="' not in svg.split(">")[0].replace("data-width", "")


def test_what_has_no_data_has_no_chart() -> None:
    nan = float("nan")
    assert line_chart([(1, nan, "a"), (2, 3, "a")], x="", y="") is None
    assert line_chart([(1, 0, "a"), (2, -1, "a")], x="", y="", log_y=True) is None
    assert bar_chart({"a": nan}, x="") is None
    assert histogram([nan], x="", count="") is None
    assert share_chart({"a": {"b": nan}}, x="") is None
    assert scatter_chart([(0, 1, "a", "b")], x="", y="") is None
    assert draw([]) == []


@pytest.mark.parametrize("values", [[3, 3, 3], [1, 2, 2, 9], [0.1], [0.1, 0.7, 1e9], [5, 400]])
def test_a_histogram_counts_each_value_once_and_whole_numbers_apart(values: list[float]) -> None:
    spec = histogram(values, x="", count="")
    assert spec is not None
    rows = spec["data"]["values"]
    assert sum(row["count"] for row in rows) == len(values)
    assert all(row["from"] < row["to"] for row in rows)
    if all(isinstance(value, int) for value in values) and max(values) < 24:
        assert len(rows) == len(set(values))


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("echo \"No module named 'vl_convert'\" >&2; exit 1", "pip install vl-convert-python"),
        ("echo '# Fatal process out of memory: Oilpan' >&2; kill -ABRT $$", "Fatal process out of memory"),
        ("echo nonsense", "charts could not be drawn"),
        ("echo '[]'", "some are missing"),
        ("""echo '["<svg xmlns=\\"http://www.w3.org/2000/svg\\"><script/></svg>"]'""", "element"),
        ("""echo '["<svg xmlns=\\"http://www.w3.org/2000/svg\\"><g onclick=\\"x\\"/></svg>"]'""", "attribute"),
    ],
)
def test_a_chart_that_cannot_be_drawn_is_said_with_its_reason(
    program: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = tmp_path / "python"
    stub.write_text(f"#!/bin/sh\ncat >/dev/null\n{program}\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    with pytest.raises(ChartError, match=words):
        draw([{}])


def test_the_program_that_draws_gets_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub, seen = tmp_path / "python", tmp_path / "seen"
    stub.write_text(f"#!/bin/sh\nenv > {seen}\ncat >/dev/null\necho '[]'\n")
    stub.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stub))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-to-be-seen")
    with pytest.raises(ChartError):
        draw([{}])
    assert "not-to-be-seen" not in seen.read_text()


def test_a_specification_is_json() -> None:
    spec = bar_chart({"a": 1.0}, x="")
    assert json.loads(json.dumps(spec)) == spec


def test_labels_of_points_that_lie_together_do_not_cover_one_another() -> None:
    points = [(0.06, 26 + number / 10, f"model {number}", "measured") for number in range(4)]
    spec = scatter_chart(
        [*points, (2.0, 33.0, "at the right edge", "measured"), (0.1, 20.0, "", "published")], x="", y=""
    )
    assert spec is not None
    low, high = spec["layer"][0]["encoding"]["y"]["scale"]["domain"]
    labels = spec["layer"][1]["data"]["values"]
    assert {label["name"]: label["align"] for label in labels}["at the right edge"] == "right"
    down = sorted(spec["height"] * (high - label["y"]) / (high - low) + label["dy"] for label in labels)
    assert min(np.diff(down)) >= 12
    assert down[0] > 0
    assert down[-1] < spec["height"]
