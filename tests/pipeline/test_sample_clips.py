"""Clips as an iterator: the same as those of a run, one by one, without Ray and torch."""

from __future__ import annotations

import subprocess
import sys
import weakref
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.decoding import assert_same
from tests.support.videos import Recipe, write_audio_only, write_damaged, write_video
from vidshard.pipeline import storage
from vidshard.pipeline.sample_clips import sample_clips
from vidshard.pipeline.video.clip_builder import ClipBuilder
from vidshard.pipeline.video.decode import decode_spans
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.errors import VidshardError
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import Clip, ClipSpec, Part, VideoRef

SMALL: dict[str, Any] = {"fps": 10, "frames": 5, "size": 48}


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve seconds."""
    path = tmp_path_factory.mktemp("sampled") / "v.mp4"
    return write_video(path, Recipe(num_frames=300, gop=25, width=160, height=96))


def clips_of_a_run(path: Path, part: Part | None = None, **settings: Any) -> list[Clip]:
    spec = ClipSpec(**{"fps": Fraction(10), "num_frames": 5, "height": 48, "width": 48, **settings})
    probe = probe_video(VideoRef(uri=str(path), num_bytes=-1), storage.open_video)
    results = [
        decode_spans([span], spec, str(path), max_clips=1000, keep_undamaged=True)[0]
        for span in plan_spans(probe, spec, 3, part)
    ]
    return [clip for result in results for clip in result.clips]


@pytest.mark.parametrize(
    ("arguments", "part", "settings"),
    [
        ({}, None, {}),
        ({"fps": "7"}, None, {"fps": Fraction(7)}),
        ({"fps": 7, "tail": "drop"}, None, {"fps": Fraction(7), "tail": "drop"}),
        ({"stride_seconds": 0.2}, None, {"stride_seconds": Fraction(1, 5)}),
        ({"stride_seconds": 0.05}, None, {"stride_seconds": Fraction(1, 20)}),
        ({"stride_seconds": 2.5}, None, {"stride_seconds": Fraction(5, 2)}),
        ({"start": 1.3, "end": 3.1}, Part.of(1.3, 3.1), {}),
        ({"start": 11.9, "min_seconds": 0.1}, Part.of(11.9, None), {"min_seconds": Fraction(1, 10)}),
        ({"size": (40, 72), "resize": "pad"}, None, {"height": 40, "width": 72, "resize": "pad"}),
        (
            {"clips_per_video": 2, "clip_placement": "random", "clip_seed": 3},
            None,
            {"clips_per_video": 2, "placement": "random", "placement_seed": 3},
        ),
    ],
)
def test_the_clips_are_those_of_a_run(
    video: Path, arguments: dict[str, Any], part: Part | None, settings: dict[str, Any]
) -> None:
    clips = list(sample_clips(video, **{**SMALL, **arguments}))
    assert clips
    of_a_run = clips_of_a_run(video, part, **settings)
    assert_same(clips, of_a_run)
    assert {clip.video_id for clip in clips} == {clip.video_id for clip in of_a_run}


def test_stretches_that_no_clip_needs_are_skipped(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", Recipe(num_frames=300, rate=Fraction(5), gop=10))
    clips = list(sample_clips(path, **SMALL, stride_seconds=30))
    assert_same(clips, clips_of_a_run(path, stride_seconds=Fraction(30)))
    assert len(clips) == 2


def test_a_clip_comes_as_soon_as_it_is_complete_and_is_not_kept(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    note_frame = ClipBuilder.note_frame

    def counted(builder: ClipBuilder, pts: int) -> None:
        decoded.append(pts)
        note_frame(builder, pts)

    monkeypatch.setattr(ClipBuilder, "note_frame", counted)
    seen: list[int] = []
    alive: list[weakref.ref[Any]] = []
    for clip in sample_clips(video, **SMALL):
        seen.append(len(decoded))
        alive.append(weakref.ref(clip.frames))
        del clip
        assert sum(frames() is not None for frames in alive) <= 1
    assert len(seen) == 24
    # half a second each, of a video of which at most every frame is decoded; and one frame more to know that it lasts
    assert all(num_frames <= 25 * (number + 1) / 2 + 2 for number, num_frames in enumerate(seen))


def test_remote_videos_are_read(video: Path, s3: str, tmp_path: Path) -> None:
    url = f"s3://videos/{tmp_path.name}/v.mp4"
    storage.write_atomic(url, video.read_bytes())
    assert_same(list(sample_clips(url, **SMALL)), list(sample_clips(video, **SMALL)))


def test_damage_is_an_error_after_the_clips_before_it_or_left_out(video: Path, tmp_path: Path) -> None:
    path = write_damaged(tmp_path / "damaged.mp4", video, share=0.5, num_bytes=900)
    whole = list(sample_clips(video, **SMALL))
    clips: list[Clip] = []
    with pytest.raises(VideoError) as caught:
        clips.extend(sample_clips(path, **SMALL))
    assert caught.value.reason is Reason.DECODE_ERROR
    assert 9 <= len(clips) < 15  # those before the middle
    for clip, other in zip(clips, whole, strict=False):
        assert np.array_equal(clip.frames, other.frames)
    kept = list(sample_clips(path, **SMALL, damaged="keep"))
    assert_same(kept, clips_of_a_run(path))
    assert 15 <= len(kept) < 24


def test_a_file_that_cannot_be_used_is_an_error_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    for path, reason in [
        (tmp_path / "none.mp4", Reason.UNREADABLE),
        (tmp_path / "empty.mp4", Reason.EMPTY_FILE),
        (write_audio_only(tmp_path / "sound.mp4"), Reason.NO_VIDEO_STREAM),
        (write_video(tmp_path / "short.mp4", Recipe(num_frames=5)), Reason.TOO_SHORT),
    ]:
        with pytest.raises(VidshardError) as caught:
            list(sample_clips(path, **SMALL, tail="drop"))
        assert isinstance(caught.value, VideoError)
        assert caught.value.reason is reason


@pytest.mark.parametrize(
    "arguments",
    [{"fps": 0}, {"frames": 0}, {"size": 0}, {"start": 2, "end": 1}, {"min_seconds": 9}, {"clips_per_video": 0}],
)
def test_arguments_out_of_range_are_refused_by_the_call_itself(video: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must|a rate is|is more than"):
        sample_clips(video, **{**SMALL, **arguments})


def test_it_loads_neither_torch_nor_ray(video: Path) -> None:
    code = (
        "import sys; from vidshard.pipeline.sample_clips import sample_clips; "
        f"assert len(list(sample_clips({str(video)!r}, size=32))) == 6; "
        "sys.exit(bool({'torch', 'ray', 'pandas'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
