"""Figures, pictures and speed of a training."""

from __future__ import annotations

import io
import json
import sys
import types
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vidshard.jobs.training.metrics_file import read_metrics
from vidshard.jobs.training.recorder import IntervalMeans, Recorder, labeled_strip, picture_strip
from vidshard.jobs.training.speed import Speed


def test_figures_go_on_where_a_kill_cut_them_off(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with Recorder(folder, from_step=0, run={}, name="x", wandb=None) as recorder:
        recorder.write(0, {"psnr": 8.0}, group="held_out")
        for step in range(1, 5):
            recorder.write(step, {"l1": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "gro')
    with Recorder(folder, from_step=3, run={}, name="x", wandb=None) as recorder:
        recorder.write(4, {"l1": 0.5})
    assert [(line["step"], line.get("l1")) for line in read_metrics(folder)] == [
        (0, None),
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 0.5),
    ]
    with Recorder(folder, from_step=0, run={}, name="x", wandb=None) as recorder:  # from the beginning, after all
        recorder.write(0, {"psnr": 9.0}, group="held_out")
    assert read_metrics(folder) == [{"step": 0, "group": "held_out", "psnr": 9.0}]


def test_strips_show_a_clip_above_its_reconstruction() -> None:
    real = np.arange(17, dtype=np.uint8)[None, :, None, None, None].repeat(8, 2).repeat(8, 3).repeat(3, 4)
    strip = picture_strip(real, real + 100)
    assert strip.shape == (16, 9 * 8, 3)
    assert strip[0, ::8, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert strip[8, ::8, 0].tolist() == [n + 100 for n in strip[0, ::8, 0].tolist()]


def test_the_first_steps_do_not_count_in_the_overall_speed() -> None:
    speed = Speed(flops_per_clip=1e9, peak_flops=1e12, workers=2)
    assert speed.overall() == {}
    speed.step(4, 100.0)
    assert speed.recent()["waiting"] > 1
    speed.step(4, 0.0)
    figures = speed.overall()
    assert figures["waiting"] == 0
    assert figures["mfu"] == pytest.approx(figures["clips_per_second"] * 1e9 / 2e12)


def test_figures_of_a_resumed_stage_are_those_of_all_its_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts of 100 s: 10 s until the first record, then 9 steps of 4 clips in 90 s, and 18 in the second one."""
    now = 1000.0
    monkeypatch.setattr("vidshard.jobs.training.speed.time.perf_counter", lambda: now)
    kept: dict[str, float] = {}
    for start, steps in enumerate((9, 18)):
        speed = Speed(0.0, 0.0, 1, before=kept)
        now += 10.0
        speed.step(4, 5.0)
        speed.recent()
        for _ in range(steps):
            now += 90 / steps
            speed.step(4, 1.0)
        kept = speed.record()
        now += 1000.0 * (1 - start)  # nobody trains
    assert speed.seconds == pytest.approx(200)
    assert speed.overall() == pytest.approx(
        {"clips_per_second": 27 * 4 / 180, "steps_per_second": 27 / 180, "waiting": 27 / 180}
    )


def test_counts_of_clips_are_sums_of_their_interval_and_losses_means() -> None:
    interval = IntervalMeans()
    for count in (1, 0, 3):
        interval.add({"clips_mirrored": count, "l1": float(count)})
    assert interval.take() == {"clips_mirrored": 4, "l1": pytest.approx(4 / 3)}


NAMES = ("clip", "reconstruction", "structure only", "dynamics only")
SHADES = (0, 60, 120, 180)


def shaded() -> dict[str, np.ndarray]:
    """Two clips of four frames, each kind of one shade."""
    return {name: np.full((2, 4, 8, 8, 3), shade, np.uint8) for name, shade in zip(NAMES, SHADES, strict=True)}


def test_pictures_show_every_part_of_the_latents_below_the_whole(tmp_path: Path) -> None:
    with Recorder(str(tmp_path), from_step=0, run={}, name="x", wandb=None) as recorder:
        recorder.picture(3, shaded())
        recorder.picture(4, {})
    [path] = (tmp_path / "pictures").iterdir()
    picture = np.asarray(Image.open(path))
    assert path.name == "step-00000003.png"
    strip = picture[:, -4 * 128 :]
    assert picture.shape[0] == 2 * 4 * 128  # small frames are enlarged until they can be seen
    assert strip[::128, 0, 0].tolist() == [*SHADES, *SHADES]


def test_every_row_of_a_strip_has_its_label() -> None:
    picture = labeled_strip(shaded())
    margin = picture[:, : -4 * 128]
    rows = margin.reshape(8, 128, *margin.shape[1:])
    assert all((row < 128).any() and (row[:40] == 255).all() for row in rows)
    assert np.array_equal(rows[0], rows[4])
    assert not np.array_equal(rows[0], rows[1])


def events_of(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return events


def test_tensorboard_has_the_strip_and_clips_that_move(tmp_path: Path) -> None:
    moving = np.arange(5, dtype=np.uint8)[None, :, None, None, None].repeat(8, 2).repeat(8, 3).repeat(3, 4) * 40
    with Recorder(str(tmp_path), from_step=0, run={}, name="x", wandb=None) as recorder:
        recorder.picture(7, {"clip": moving, "reconstruction": 255 - moving})
    events = events_of(tmp_path / "tensorboard")
    assert set(events.Tags()["images"]) == {"held_out/pictures", "held_out/video"}
    [video] = events.Images("held_out/video")
    film = Image.open(io.BytesIO(video.encoded_image_string))
    shades = []
    for number in range(film.n_frames):
        film.seek(number)
        frame = np.asarray(film.convert("RGB"))
        shades.append((int(frame[0, 0, 0]), int(frame[0, -1, 0])))
    assert video.step == 7
    assert shades == [(40 * n, 255 - 40 * n) for n in range(5)]


def test_weights_and_biases_gets_figures_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the calls of its API: the package is in no list of dependencies."""
    logged: list[tuple[dict[str, Any], int]] = []
    package = types.ModuleType("wandb")
    run = types.SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: None)
    package.init = lambda **_settings: run  # type: ignore[attr-defined]
    package.Image = lambda picture: ("image", picture.shape)  # type: ignore[attr-defined]
    package.Video = lambda data, format: ("video", format, data.read(3))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", package)
    with Recorder(str(tmp_path), from_step=0, run={}, name="x", wandb="project") as recorder:
        recorder.write(2, {"psnr": 20.0}, group="held_out")
        recorder.picture(2, shaded())
    assert logged[0] == ({"held_out/psnr": 20.0}, 2)
    pictures, step = logged[1]
    assert step == 2
    assert pictures["held_out/pictures"][0] == "image"
    assert pictures["held_out/video"] == ("video", "gif", b"GIF")


def test_a_record_holds_the_means_of_its_steps_and_the_last_rates() -> None:
    interval = IntervalMeans()
    interval.add({"l1": 1.0, "learning_rate": 0.1})
    interval.add({"skipped_batches": 1.0})
    interval.add({"l1": 0.5, "gan": 2.0, "learning_rate": 0.2})
    later = IntervalMeans(**json.loads(json.dumps(asdict(interval))))  # as a checkpoint keeps it
    assert later.take() == {"l1": 0.75, "learning_rate": 0.2, "skipped_batches": 1.0, "gan": 2.0}
    assert later.take() == {}
