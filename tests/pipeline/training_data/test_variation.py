"""Native crops, mirrored clips and short videos: exact pixels, the same whenever and by whomever a clip is taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest

from tests.support.videos import Recipe, read_frame_number, write_video
from vidshard.pipeline.decode_stage import decode_clip
from vidshard.pipeline.rows import row_span
from vidshard.pipeline.training_data import videos as opening
from vidshard.pipeline.training_data.cache import _CacheWriter, _claim_folder
from vidshard.pipeline.training_data.loader import ClipReader
from vidshard.pipeline.training_data.sampler import ClipSampler, placement_seed
from vidshard.pipeline.training_data.variation import Variation
from vidshard.pipeline.training_data.videos import TrainingVideos, UnusableError, open_training_videos
from vidshard.pipeline.video.geometry import plan_geometry
from vidshard.schemas.rejections import Reason
from vidshard.schemas.training import ShortVideos, StageConfig
from vidshard.schemas.video import ClipSpec, Limits

STAGE = StageConfig(frames=5, size=(32, 32), fps=Fraction(4), batch_size=2)
SPEC = STAGE.clip_spec(clips_per_video=1)
LIMITS = Limits()


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def map_here(tables: Sequence[pa.Table], stage: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
        return (stage(table) for table in tables)

    monkeypatch.setattr(opening, "map_videos", map_here)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of whole clips, larger and smaller than a clip, and two shorter than one: 0.5 s and 0.25 s."""
    made = tmp_path_factory.mktemp("videos")
    for name, frames, width, height in (("large", 24, 64, 48), ("small", 25, 24, 40), ("half", 4, 64, 48)):
        write_video(made / f"{name}.mp4", Recipe(num_frames=frames, rate=Fraction(8), width=width, height=height))
    write_video(made / "quarter.mp4", Recipe(num_frames=2, rate=Fraction(8), width=64, height=48))
    return made


def opened(folder: Path, *, keep_short: bool) -> TrainingVideos:
    return open_training_videos([str(folder)], spec=SPEC, validation_share=0, num_tasks=1, keep_short=keep_short)


def items_of(folder: Path) -> dict[str, dict[str, Any]]:
    rows = opened(folder, keep_short=True).train.to_pylist()
    return {Path(row["uri"]).stem: row | {"placement_seed": placement_seed(0, 0)} for row in rows}


def reader_of(**choices: Any) -> ClipReader:
    return ClipReader(spec=SPEC, limits=LIMITS, variation=Variation(**choices))


def taken(item: dict[str, Any], **choices: Any) -> tuple[npt.NDArray[np.uint8], list[str]]:
    frames, made = reader_of(**choices).clip_of(item)
    return np.frombuffer(frames, np.uint8).reshape(5, 32, 32, 3), made


def whole_frames(item: dict[str, Any], height: int, width: int) -> npt.NDArray[np.uint8]:
    spec = replace(SPEC, height=height, width=width, resize="stretch", placement_seed=item["placement_seed"])
    clip = decode_clip(row_span(item | {"first_clip": 0, "end_clip": None}), spec, limits=LIMITS)
    return np.asarray(clip.frames)


def test_a_native_crop_is_a_part_of_the_frame_as_it_is_at_another_place_in_each_round(folder: Path) -> None:
    item = items_of(folder)["large"]
    places = set()
    for turn in range(6):
        own = item | {"placement_seed": placement_seed(0, turn)}
        frames, made = taken(own, crop="native")
        assert made == ["native"]
        whole = whole_frames(own, 48, 64)
        found = [
            (top, left)
            for top in range(48 - 32 + 1)
            for left in range(64 - 32 + 1)
            if np.array_equal(whole[:, top : top + 32, left : left + 32], frames)
        ]
        assert found
        places.add(found[0])
        assert np.array_equal(taken(own, crop="native")[0], frames)
    assert len(places) > 3


def test_a_frame_smaller_than_the_clip_is_enlarged_until_it_covers_it(folder: Path) -> None:
    frames, made = taken(items_of(folder)["small"], crop="native")
    assert made == ["enlarged"]
    assert frames.shape == (5, 32, 32, 3)


@pytest.mark.parametrize("seed", range(3))
def test_a_native_cut_lies_within_frames_of_any_size_and_reaches_every_edge(seed: int) -> None:
    random = np.random.default_rng(seed)
    for _ in range(200):
        width, height, cut_width, cut_height = (int(random.integers(1, 200)) for _ in range(4))
        for place in ((0.0, 0.0), (0.999_999_9, 0.999_999_9), tuple(random.random(2).tolist())):
            spec = ClipSpec(
                fps=Fraction(1), num_frames=1, height=cut_height, width=cut_width, resize="native", cut_place=place
            )
            plan = plan_geometry(width, height, spec)
            room = plan.scaled_width - cut_width, plan.scaled_height - cut_height
            assert 0 <= plan.left <= room[0]
            assert 0 <= plan.top <= room[1]
            if width >= cut_width and height >= cut_height:
                assert (plan.scaled_width, plan.scaled_height) == (width, height)
            if place == (0.0, 0.0):
                assert (plan.left, plan.top) == (0, 0)
            if place[0] > 0.999_999:
                assert (plan.left, plan.top) == room


def test_a_mirrored_clip_is_the_clip_with_its_columns_reversed_for_the_share_that_was_asked_for(folder: Path) -> None:
    item = items_of(folder)["large"]
    plain, made = taken(item)
    assert made == []
    mirrored, made = taken(item, flip_share=1.0)
    assert made == ["mirrored"]
    assert np.array_equal(mirrored, plain[:, :, ::-1])
    chosen = [
        Variation(flip_share=0.3).mirrors(item | {"placement_seed": placement_seed(0, turn), "number": number})
        for turn in range(50)
        for number in range(40)
    ]
    assert np.mean(chosen) == pytest.approx(0.3, abs=0.04)


def test_crops_and_mirroring_do_not_depend_on_each_other_and_none_is_the_default(folder: Path) -> None:
    item = items_of(folder)["large"]
    both, made = taken(item, crop="native", flip_share=1.0)
    assert made == ["native", "mirrored"]
    assert np.array_equal(both, taken(item, crop="native")[0][:, :, ::-1])
    stage = STAGE.model_copy(update={"crop": "native", "flip_share": 0.5, "short_videos": "repeat"})
    assert Variation.of(STAGE) == Variation() == Variation.of(STAGE, held_out=True)
    assert Variation.of(stage, held_out=True) == Variation(short_videos="repeat")


def test_rates_are_drawn_evenly_from_those_that_a_video_has_frames_and_time_for(folder: Path) -> None:
    items = items_of(folder)
    variation = Variation(more_fps=(Fraction(8), Fraction(30), Fraction(1)))
    drawn = [
        (name, int(variation.fps_of(items[name] | {"placement_seed": placement_seed(0, turn), "number": number}, SPEC)))
        for name in items
        for turn in range(50)
        for number in range(10)
    ]
    # no video has 30 frames per second, none lasts the 4 s of a clip at 1, and "half" not the 1 s of one at 4
    assert set(drawn) == {
        ("large", 4),
        ("large", 8),
        ("small", 4),
        ("small", 8),
        ("half", 4),
        ("half", 8),
        ("quarter", 4),
    }
    for name in ("large", "small", "half"):
        assert np.mean([fps == 8 for each, fps in drawn if each == name]) == pytest.approx(0.5, abs=0.08)


def test_a_clip_of_another_rate_shows_the_frames_of_that_rate_and_is_counted(folder: Path) -> None:
    item = items_of(folder)["large"]
    steps = {}
    for turn in range(12):
        frames, made = taken(item | {"placement_seed": placement_seed(0, turn)}, more_fps=(Fraction(8),))
        numbers = [read_frame_number(frame) for frame in frames]
        steps[tuple(made)] = {after - before for before, after in pairwise(numbers)}
    assert steps == {(): {2}, ("other_fps",): {1}}
    assert Variation(more_fps=(Fraction(8),)).ways == ("other_fps",)
    assert "more_fps=8" in Variation(more_fps=(Fraction(8),)).decoded
    stage = STAGE.model_copy(update={"more_fps": [Fraction(8)]})
    assert Variation.of(stage).more_fps == (Fraction(8),)
    assert Variation.of(stage, held_out=True) == Variation()


def test_short_videos_are_rejected_by_default_and_kept_when_asked(folder: Path) -> None:
    rejected = opened(folder, keep_short=False)
    assert {Path(row["uri"]).stem for row in rejected.train.to_pylist()} == {"large", "small"}
    assert {(Path(r.uri).stem, r.reason) for r in rejected.rejections} == {
        ("half", Reason.TOO_SHORT),
        ("quarter", Reason.TOO_SHORT),
    }
    kept = opened(folder, keep_short=True)
    assert {Path(row["uri"]).stem for row in kept.train.to_pylist()} == {"large", "small", "half", "quarter"}
    assert not kept.rejections


@pytest.mark.parametrize(
    ("policy", "name", "numbers", "made"),
    [
        ("repeat", "half", [0, 2, 2, 2, 2], ["repeated"]),
        ("repeat", "quarter", [0, 0, 0, 0, 0], ["repeated"]),
        ("squeeze", "half", [0, 0, 1, 2, 3], ["squeezed"]),
        ("squeeze", "quarter", [0, 0, 0, 1, 1], ["squeezed"]),
    ],
)
def test_a_short_video_repeats_its_last_frame_or_spreads_the_clip_over_all_of_it(
    policy: ShortVideos, name: str, numbers: list[int], made: list[str], folder: Path
) -> None:
    """At 8 frames a second; a clip takes frames 0, 2, 4 and so on, where there are that many."""
    frames, ways = taken(items_of(folder)[name], short_videos=policy)
    assert ways == made
    assert [read_frame_number(frame) for frame in frames] == numbers


@pytest.mark.parametrize("policy", ["repeat", "squeeze"])
def test_a_policy_for_short_videos_leaves_whole_clips_as_they_are(policy: ShortVideos, folder: Path) -> None:
    item = items_of(folder)["large"]
    frames, made = taken(item, short_videos=policy)
    assert made == []
    assert np.array_equal(frames, taken(item)[0])


def test_a_short_part_of_a_long_video_is_treated_as_a_short_video(folder: Path) -> None:
    item = items_of(folder)["large"] | {"part_start_seconds": 1.0, "part_end_seconds": 1.5}
    for policy, numbers in (("repeat", [8, 10, 10, 10, 10]), ("squeeze", [8, 8, 9, 10, 11])):
        frames, _ = taken(item, short_videos=policy)
        assert [read_frame_number(frame) for frame in frames] == numbers


def test_a_sequence_is_the_same_from_any_place_on(folder: Path) -> None:
    videos = opened(folder, keep_short=True)
    reader = reader_of(crop="native", flip_share=0.5, short_videos="squeeze")
    sampler = ClipSampler(items=videos.train, weights=None, seed=5)
    whole = reader(sampler.rows(range(12)))
    parts = [reader(ClipSampler(items=videos.train, weights=None, seed=5).rows([n])) for n in (11, 5, 7)]
    for part, at in zip(parts, (11, 5, 7), strict=True):
        assert part.to_pylist() == whole.slice(at, 1).to_pylist()
    other = reader(ClipSampler(items=videos.train, weights=None, seed=6).rows(range(12)))
    assert other["frames"] != whole["frames"]


def test_a_cache_holds_clips_before_they_are_mirrored_and_refuses_other_crops(folder: Path, tmp_path: Path) -> None:
    variation = Variation(crop="native", short_videos="repeat")
    rows = [row | {"item": n} for n, row in enumerate(opened(folder, keep_short=True).train.to_pylist())]
    reader = ClipReader(spec=SPEC, limits=LIMITS, required=False, variation=variation)
    writer = _CacheWriter(folder=str(tmp_path), reader=reader, seed=0)
    items = pa.Table.from_pylist(rows)
    written = writer(items).to_pylist()
    mirroring = replace(variation, flip_share=1.0)
    for row, cached in zip(rows, written, strict=True):
        item = row | {"placement_seed": placement_seed(0, 0)}
        there = item | {"shard": cached["shard"], "shard_row": cached["shard_row"]}
        for choices in (variation, mirroring):
            direct = ClipReader(spec=SPEC, limits=LIMITS, variation=choices)
            assert direct.clip_of(there) == direct.clip_of(item)
    _claim_folder(str(tmp_path), items, SPEC, 0, variation)
    _claim_folder(str(tmp_path), items, SPEC, 0, variation)
    for other in (Variation(), Variation(crop="native"), Variation(short_videos="squeeze")):
        with pytest.raises(UnusableError, match="variation differ"):
            _claim_folder(str(tmp_path), items, SPEC, 0, other)
