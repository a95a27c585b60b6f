"""Blocks that the pages of several kinds of runs share: settings, rejections, the use of a codebook, and units."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vidshard.jobs.report.charts import bar_chart, line_chart
from vidshard.jobs.report.page import Chart, Facts, Note, Table
from vidshard.models.codebook_use import CodebookUse

NOT_DEFAULT = "Settings other than the defaults"
MAX_EXAMPLES = 3
"""Examples of each reason for a rejection."""


def setting_value(value: Any) -> str:
    """A setting as a person writes it: a list by its first entries."""
    if isinstance(value, list):
        shown = ", ".join(str(one) for one in value[:5])
        return f"{shown} and {len(value) - 5:,} more" if len(value) > 5 else shown
    return str(value)


def rejection_blocks(rejects: Sequence[Mapping[str, Any]], place: str) -> list[Note | Chart | Table]:
    """Rejections by reason, with examples.

    Args:
        rejects: rows of ``REJECT_SCHEMA``.
        place: where all of them stand.
    """
    if not rejects:
        return [Note(text="Nothing was rejected.")]
    counts = Counter(str(row["reason"]) for row in rejects)
    rows = []
    for reason, count in counts.most_common():
        own = [row for row in rejects if row["reason"] == reason]
        for number, row in enumerate(own[:MAX_EXAMPLES]):
            at = "" if row["start_seconds"] is None else f" from {row['start_seconds']:.2f} s"
            first = [reason, f"{count:,}", str(row["remedy"])] if number == 0 else ["", "", ""]
            rows.append([*first, f"{row['uri']}{at}", str(row["detail"])])
    return [
        Chart(title="Rejections by reason", spec=bar_chart(dict(counts.most_common(12)), x="spans or whole videos")),
        Table(
            title=f"Up to {MAX_EXAMPLES} examples of each reason; all stand in {place}",
            header=["reason", "number", "what helps", "example", "detail"],
            rows=rows,
            codes=frozenset({3, 4}),
        ),
    ]


def codebook_blocks(name: str, use: CodebookUse) -> list[Facts | Chart]:
    """Figures and chart of the use of a codebook.

    Args:
        name: name of the payload column, or of the tokenizer.
        use: counts of its tokens.
    """
    counts = np.sort(use.counts[use.counts > 0])[::-1]
    if not counts.size:
        return []
    shown = np.unique(np.geomspace(1, counts.size, min(counts.size, 80)).round().astype(int))
    curve = [(float(rank), float(counts[rank - 1] / use.num_tokens), "codes") for rank in shown]
    most = math.log2(use.codebook_size)
    return [
        Facts(
            items=[
                (f"codes used by {name}", f"{use.num_used:,}", f"{use.utilization:.1%} of {use.codebook_size:,}"),
                ("of what could be", f"{use.share_of_ceiling:.1%}", f"{use.num_tokens:,} tokens counted"),
                ("perplexity", f"{use.perplexity:,.0f}", "equally frequent codes of the same entropy"),
                ("entropy", f"{use.entropy_bits:.2f} bits", f"of {most:g} at most"),
                ("dead codes", f"{use.codebook_size - use.num_used:,}", "never occurred among these"),
            ]
        ),
        Chart(
            title="Frequency of the codes",
            spec=line_chart(curve, x="rank of a code", y="share of all tokens", log_y=True),
            remark="the most frequent first",
        ),
    ]


def duration(seconds: float) -> str:
    """A time for people: seconds, minutes or hours."""
    for limit, unit in ((120, 1), (7200, 60)):
        if seconds < limit:
            return f"{seconds / unit:,.3g} {'s' if unit == 1 else 'min'}"
    return f"{seconds / 3600:,.3g} h"


def size(num_bytes: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:,.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError
