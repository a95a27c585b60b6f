"""Held-out clips: broken videos are replaced down the same order of hashes, and few videos give several clips each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.support.videos import Recipe, read_frame_number, write_video
from vidshard.pipeline.decode_stage import decode_clip
from vidshard.pipeline.training_data import loader
from vidshard.pipeline.training_data import videos as opening
from vidshard.pipeline.training_data.loader import ClipReader, held_out_clips
from vidshard.pipeline.training_data.variation import Variation
from vidshard.pipeline.training_data.videos import TrainingVideos, held_out_order, open_training_videos
from vidshard.schemas.rejections import Reason, Rejection, VideoError
from vidshard.schemas.training import StageConfig
from vidshard.schemas.video import Clip, ClipSpec, Limits, Span

STAGE = StageConfig(frames=3, size=(64, 64), fps=Fraction(4), batch_size=2)
EVEN = STAGE.clip_spec(clips_per_video=1, placement="even")


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def map_here(tables: Sequence[pa.Table], stage: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
        return (stage(table) for table in tables)

    def decode_here(
        items: pa.Table, spec: ClipSpec, limits: Limits, variation: Variation
    ) -> tuple[pa.Table, list[Rejection]]:
        rows = [{"sample": n, "candidates": [row | {"placement_seed": 0}]} for n, row in enumerate(items.to_pylist())]
        reader = ClipReader(spec=spec, limits=limits, required=False, variation=variation)
        table = pa.Table.from_pylist([reader._row(row) for row in rows], schema=loader.CLIP_SCHEMA)
        return table.filter(pc.is_valid(table["frames"])), loader.rejections_in(table)

    monkeypatch.setattr(opening, "map_videos", map_here)
    monkeypatch.setattr(loader, "decode_held_out", decode_here)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of five seconds and more."""
    made = tmp_path_factory.mktemp("videos")
    for n in range(6):  # another length each, as the id of a video is its content
        write_video(made / f"v{n}.mp4", Recipe(num_frames=40 + n, rate=Fraction(8), width=64, height=64))
    return made


def opened(folder: Path, share: float) -> TrainingVideos:
    spec = STAGE.clip_spec(clips_per_video=2)
    return open_training_videos([str(folder)], spec=spec, validation_share=share, num_tasks=1)


def ids_of(table: pa.Table) -> list[str]:
    return list(dict.fromkeys(table["video_id"].to_pylist()))


def break_videos(monkeypatch: pytest.MonkeyPatch, ids: Sequence[str]) -> None:
    """From now on these videos open, and none of their pictures can be decoded."""

    def decode(span: Span, *args: Any, **options: Any) -> Clip:
        if span.video_id in ids:
            raise VideoError(Reason.DECODE_ERROR, "broken on purpose")
        return decode_clip(span, *args, **options)

    monkeypatch.setattr(loader, "decode_clip", decode)


@pytest.mark.parametrize("share", [0.01, 0.4])
@pytest.mark.parametrize("num_broken", [0, 1, 2, 5])
def test_held_out_videos_that_do_not_decode_are_replaced_by_the_next_of_the_same_order(
    num_broken: int, share: float, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = opened(folder, share)
    order = sorted(ids_of(videos.held_out) + ids_of(videos.train), key=held_out_order)
    broken, working = order[:num_broken], order[num_broken:]
    break_videos(monkeypatch, broken)
    clips, after = held_out_clips(videos, EVEN, 4, Limits(), replacing=True, before=None)
    wanted = len(ids_of(videos.held_out))
    expected = working[:wanted] if len(working) > wanted else working[: max(0, len(working) - 1)]
    assert set(ids_of(after.held_out)) == set(ids_of(clips)) == set(expected)
    assert {r.video_id for r in after.rejections} <= set(broken)
    assert set(ids_of(after.held_out)).isdisjoint(ids_of(after.train))
    assert set(ids_of(after.train)) | set(ids_of(after.held_out)) | {r.video_id for r in after.rejections} == set(order)
    assert after.num_videos == 6 - len({r.video_id for r in after.rejections})
    assert clips.num_rows == (4 if expected else 0)


def test_no_video_that_was_trained_on_replaces_a_broken_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = opened(folder, 0.3)
    break_videos(monkeypatch, ids_of(before.held_out))
    clips, after = held_out_clips(before, EVEN, 4, Limits(), replacing=True, before=before)
    assert clips.num_rows == after.held_out.num_rows == 0
    clips, after = held_out_clips(before, EVEN, 4, Limits(), replacing=False, before=None)
    assert clips.num_rows == 0
    assert after.held_out.equals(before.held_out)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 10_000])
def test_as_many_clips_are_measured_as_were_asked_for_or_there_are_evenly_over_each_video(
    count: int, folder: Path
) -> None:
    videos = opened(folder, 0.4)
    clips, _ = held_out_clips(videos, EVEN, count, Limits(), replacing=True, before=None)
    rooms = {row["video_id"]: room_of(row) for row in videos.held_out.to_pylist()}
    assert clips.num_rows == min(count, sum(rooms.values()))
    numbers: dict[str, list[int]] = {}
    for row in clips.to_pylist():
        frames = np.frombuffer(row["frames"], np.uint8).reshape(3, 64, 64, 3)
        numbers.setdefault(row["video_id"], []).append(read_frame_number(frames[0]))
    for video_id, starts in numbers.items():
        assert len(set(starts)) == len(starts) == len(sorted(starts))
        if count == 7:  # three or two clips of each: the first third or half has one, and so on
            assert max(starts) - min(starts) > rooms[video_id] / 3
    assert clips["video_id"].to_pylist()[: len(numbers)] == list(numbers)  # pictures show different videos


def room_of(row: dict[str, Any]) -> int:
    """The number of grid times at which a clip of three frames can start: at 4 a second."""
    return (
        int((Fraction(row["duration_seconds_from_header"]) - STAGE.clip_spec(clips_per_video=1).clip_seconds) * 4) + 1
    )
