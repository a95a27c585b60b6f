"""The line about slow tests at the end of a test run."""

from __future__ import annotations

from dataclasses import dataclass

from tests.support.budget import OTHERS, compare, read_limits, seconds_by_test

TABLE = """
| test | why | limit |
|---|---|---|
| `tests/cluster/test_a.py::test_kills` | starts Ray three times | 60 s |
| `any other` | | 10 s |
"""


@dataclass(frozen=True)
class Report:
    """A phase of a test."""

    nodeid: str
    duration: float


def test_limits_are_read_from_the_table() -> None:
    assert read_limits(TABLE) == {"tests/cluster/test_a.py::test_kills": 60, OTHERS: 10}


def test_the_slowest_case_counts_with_its_setup() -> None:
    reports = [Report("tests/a.py::t[1]", 2.0), Report("tests/a.py::t[1]", 3.0), Report("tests/a.py::t[2]", 4.0)]
    assert seconds_by_test(reports) == {"tests/a.py::t": 5.0}


def test_what_is_over_its_limit_is_named() -> None:
    limits = read_limits(TABLE)
    assert compare({"tests/cluster/test_a.py::test_kills": 50.0, "tests/b.py::t": 9.0}, limits) == [
        "test budget: every test within its limit (CONTRIBUTING.md)"
    ]
    slow = compare({"tests/cluster/test_a.py::test_kills": 70.0, "tests/b.py::t": 11.0}, limits)
    assert slow[1:] == ["tests/cluster/test_a.py::test_kills: 70 s, limit 60 s", "tests/b.py::t: 11 s, limit 10 s"]
