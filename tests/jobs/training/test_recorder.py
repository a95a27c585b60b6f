"""Figures, pictures and speed of a training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vidshard.jobs.training.recorder import Recorder, picture_strip, read_metrics
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


def test_pictures_show_every_part_of_the_latents_below_the_whole(tmp_path: Path) -> None:
    names = ("clip", "reconstruction", "structure only", "dynamics only")
    shades = (0, 60, 120, 180)
    videos = {name: np.full((2, 4, 8, 8, 3), shade, np.uint8) for name, shade in zip(names, shades, strict=True)}
    with Recorder(str(tmp_path), from_step=0, run={}, name="x", wandb=None) as recorder:
        recorder.picture(3, videos)
        recorder.picture(4, {})
    [path] = (tmp_path / "pictures").iterdir()
    picture = np.asarray(Image.open(path))
    assert path.name == "step-00000003.png"
    assert picture.shape == (2 * 4 * 8, 4 * 8, 3)
    assert picture[::8, 0, 0].tolist() == [*shades, *shades]
