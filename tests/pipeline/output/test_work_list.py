"""Order of the work list: what it keeps together, and that no worker is waited for at the end."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from vidshard.jobs.tokenization.resources import rows_per_task
from vidshard.pipeline.output import work_list
from vidshard.pipeline.output.work_list import in_order
from vidshard.pipeline.rows import WORK_SCHEMA


def spans_of(
    clips: npt.NDArray[np.int64], *, clips_per_span: int = 8, widths: tuple[int, ...] = (256,), seed: int = 0
) -> pa.Table:
    """Spans of videos with so many clips, in random order of the rows; sources have 180 to 2,160 lines."""
    random = np.random.default_rng(seed)
    columns: dict[str, list[object]] = {name: [] for name in [*WORK_SCHEMA.names, "input_row"]}
    for video, count in enumerate(clips.tolist()):
        lines, width = int(random.choice([180, 720, 2160])), int(random.choice(widths))
        for first in range(0, count, clips_per_span):
            row: dict[str, object] = {
                "span_id": f"{video}-{first}",
                "video_id": f"v{video}",
                "first_clip": first,
                "expected_clips": min(clips_per_span, count - first),
                "source_width": lines * 16 // 9,
                "source_height": lines,
                "source_fps": 30.0,
                "frame_height": 256,
                "frame_width": width,
                "input_row": video,
            }
            for name, values in columns.items():
                values.append(row.get(name))
    schema = pa.schema([*(field.with_nullable(True) for field in WORK_SCHEMA), ("input_row", pa.int64())])
    table = pa.table(columns, schema=schema)
    return table.take(random.permutation(table.num_rows))


def long_tailed(seed: int, videos: int = 400) -> npt.NDArray[np.int64]:
    """Numbers of clips with a long tail: most videos are short, a few take as long as hundreds of others."""
    return np.clip((1 + np.random.default_rng(seed).pareto(0.9, videos)).astype(np.int64), 1, 4000)


def runs_of(values: list[object]) -> list[object]:
    """Values without repeats of the one before."""
    return [value for at, value in enumerate(values) if at == 0 or values[at - 1] != value]


@pytest.mark.parametrize("seed", range(3))
def test_sizes_and_videos_stay_together_the_longest_video_first(seed: int) -> None:
    spans = spans_of(long_tailed(seed, 100), widths=(128, 256, 448), seed=seed)
    ordered = in_order(spans)
    assert sorted(ordered["span_id"].to_pylist()) == sorted(spans["span_id"].to_pylist())
    for name in ("frame_width", "video_id"):
        runs = runs_of(ordered[name].to_pylist())
        assert len(runs) == len(set(runs))
    rows = ordered.to_pylist()
    for before, after in itertools.pairwise(rows):
        if before["video_id"] == after["video_id"]:
            assert before["first_clip"] < after["first_clip"]
    cost: dict[str, float] = {}
    for row in rows:
        pixels = row["source_width"] * row["source_height"] * row["source_fps"]
        cost[row["video_id"]] = cost.get(row["video_id"], 0) + pixels * row["expected_clips"]
    for width in (128, 256, 448):
        costs = [cost[str(v)] for v in runs_of([r["video_id"] for r in rows if r["frame_width"] == width])]
        assert costs == sorted(costs, reverse=True)


def test_equally_long_videos_keep_the_order_of_the_inputs() -> None:
    spans = spans_of(np.full(20, 3, np.int64))
    same = pa.array([720] * spans.num_rows, pa.int32())
    for name in ("source_width", "source_height"):
        spans = spans.set_column(spans.schema.get_field_index(name), name, same)
    assert in_order(spans)["input_row"].to_pylist() == list(range(20))


def lost_at_the_end(spans: pa.Table, clips_per_span: int, *, workers: int = 16) -> float:
    """Time that a run takes beyond what no order could avoid, as a share; a worker takes the next task when it is free.

    No order avoids the work divided by the workers, nor the longest span.
    """
    columns = [spans[name].to_numpy() for name in ("expected_clips", "source_width", "source_height")]
    seconds = columns[0] * (0.02 + columns[1] * columns[2] / 1e7)
    rows = 1 if clips_per_span > 8 else rows_per_task(spans.num_rows, 1.0, workers)
    tasks = [seconds[at : at + rows].sum() for at in range(0, len(seconds), rows)]
    busy = [0.0] * workers
    for task in tasks:
        heapq.heapreplace(busy, busy[0] + task)
    return float(max(busy) / max(seconds.sum() / workers, seconds.max()) - 1)


@pytest.mark.parametrize("clips_per_span", [8, 1000])
def test_the_slowest_spans_do_not_hold_the_end(clips_per_span: int) -> None:
    """Long spans stand for videos that are encoded as one sequence (--continuous)."""
    now, before, largest = [], [], []
    for seed in range(8):
        spans = spans_of(np.minimum(long_tailed(seed), 1000), clips_per_span=clips_per_span, seed=seed)
        by_input = spans.sort_by([("input_row", "ascending"), ("first_clip", "ascending")])
        now.append(lost_at_the_end(in_order(spans), clips_per_span))
        before.append(lost_at_the_end(by_input, clips_per_span))
        largest.append(lost_at_the_end(in_order(spans), clips_per_span, workers=2))
    print(f"{clips_per_span} clips a span: {np.mean(now):.2%} in the mean, {max(now):.2%} at most", end="; ")
    print(f"in the order of the inputs {np.mean(before):.1%} and {max(before):.1%}")
    assert max(now) < 0.01
    assert max(largest) < 0.01  # the more spans for each worker, the more of them in a task
    assert np.mean(before) > 0.05


def test_a_long_list_ends_with_the_shortest_videos_of_its_last_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = spans_of(long_tailed(0, 1000), clips_per_span=8)
    monkeypatch.setattr(work_list, "_SORTED_ROWS", 100)
    groups = [spans.slice(at, 70).drop_columns("input_row") for at in range(0, spans.num_rows, 70)]

    def planned(*_: object) -> Iterator[tuple[int, pa.Table]]:
        at = 0
        for group in groups:
            yield at, group
            at += group.num_rows

    class Left:
        left = np.ones(spans.num_rows, np.bool_)
        input_row = spans["input_row"].to_numpy()

    monkeypatch.setattr(work_list, "planned_groups", planned)
    made = list(work_list._stretches("out", Left()))  # type: ignore[arg-type]
    assert sorted(id for part in made for id in part["span_id"].to_pylist()) == sorted(spans["span_id"].to_pylist())
    assert all(part.num_rows == 100 for part in made[:-1])
    assert 100 <= made[-1].num_rows < 200
    assert made[-1].equals(in_order(made[-1]))
