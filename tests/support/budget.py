"""The test budget: how long the slowest tests may take, compared with how long they took.

``CONTRIBUTING.md`` holds the limits as table rows that begin with a test and end with seconds. Nothing fails when a
limit is exceeded, as other machines and busy cores are slower: the summary of a test run says so in a line.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROW = re.compile(r"^\| `(?P<test>[^`]+)` \|(?:.*\|)? (?P<seconds>\d+) s \|$", re.MULTILINE)
OTHERS = "any other"
"""The row whose limit is that of every test without a row."""


def read_limits(contributing: str) -> dict[str, int]:
    """Limits in seconds by test, as ``tests/folder/file.py::test_name`` or `OTHERS`."""
    return {row["test"]: int(row["seconds"]) for row in ROW.finditer(contributing)}


def seconds_by_test(reports: Iterable[Any]) -> dict[str, float]:
    """Seconds of each test function: the slowest of its cases, with what was set up for it first."""
    cases: defaultdict[str, float] = defaultdict(float)
    for report in reports:
        cases[report.nodeid] += report.duration
    tests: defaultdict[str, float] = defaultdict(float)
    for nodeid, seconds in cases.items():
        name = nodeid.partition("[")[0]
        tests[name] = max(tests[name], seconds)
    return tests


def compare(seconds: Mapping[str, float], limits: Mapping[str, int]) -> list[str]:
    """Lines for the summary of a test run."""
    over = [
        f"{name}: {taken:.0f} s, limit {limit} s"
        for name, taken in sorted(seconds.items(), key=lambda item: -item[1])
        if taken > (limit := limits.get(name, limits[OTHERS]))
    ]
    if not over:
        return ["test budget: every test within its limit (CONTRIBUTING.md)"]
    return ["test budget: over the limit of CONTRIBUTING.md, or the machine is busy:", *over]


def summary(stats: Mapping[str, list[Any]], root: Path) -> list[str]:
    """Lines for the summary of a test run with pytest's ``stats``; none where there are no limits."""
    contributing = root / "CONTRIBUTING.md"
    limits = read_limits(contributing.read_text()) if contributing.exists() else {}
    if OTHERS not in limits:
        return []
    reports = [report for reports in stats.values() for report in reports if hasattr(report, "duration")]
    return compare(seconds_by_test(reports), limits)
