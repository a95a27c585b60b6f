"""`vidshard plan`: clips exactly, bytes nearly, and a comparison by the run that follows."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from tests.support.cli import printed_by
from tests.support.videos import Recipe, write_damaged, write_video
from vidshard.jobs.tokenization.calibration import SpeedWatch
from vidshard.jobs.tokenization.forecast import Forecast
from vidshard.jobs.tokenization.machines import MACHINES, decoding_seconds, find_machine
from vidshard.models.cost import encoding_cost
from vidshard.models.tokenizer import get_preset
from vidshard.schemas.errors import UserError

SMALL = ("--tokenizer", "tiny", "--fps", "4", "--frames", "5", "--size", "32", "--local")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for number in range(6):
        write_video(folder / f"{number}.mp4", Recipe(num_frames=60 + 10 * number, rate=Fraction(10)))
    whole = write_video(tmp_path_factory.mktemp("whole") / "whole.mp4", Recipe(num_frames=80))
    write_damaged(folder / "damaged.mp4", whole)
    (folder / "text.mp4").write_text("no video")
    return folder


@pytest.mark.parametrize("more", [(), ("--tokenizer", "tiny_kl")], ids=["tokens", "latents"])
def test_a_plan_agrees_with_the_run_that_follows_and_the_run_says_so(
    more: tuple[str, ...], videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    planned = printed_by("plan", videos, "--out", out, *SMALL, *more)
    forecast = json.loads((out / "forecast.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["forecast.json"]
    said = printed_by("tokenize", videos, "--out", out, *SMALL, *more)
    summary = json.loads((out / "summary.json").read_text())
    written = summary["written"]
    assert forecast["clips"] == written["num_clips"]
    assert forecast["header_clips"] == summary["expected_clips"]
    assert forecast["rejected_videos"] == summary["num_rejected_videos"] == 2
    assert forecast["output_bytes"] == pytest.approx(written["file_bytes"], rel=0.1)
    assert f"{forecast['clips']} (" in planned
    assert re.search(rf"forecast {forecast['clips']} clips, {written['num_clips']} came; .*\d s, it took \d", said)
    assert forecast["machine_speed"] > 0
    assert summary["machine_speed"] > 0
    assert "at the machine's speed of then" in said
    assert summary["usage"]["video_seconds"] == pytest.approx(forecast["video_seconds"], rel=0.1)
    assert "hours of video per CPU-hour" in said
    again = printed_by("tokenize", videos, "--out", out, *SMALL, *more)
    assert "forecast" not in again  # it did none of the work


def test_a_run_on_a_machine_that_became_slower_is_compared_at_the_speed_of_the_forecast(
    videos: Path, tmp_path: Path
) -> None:
    printed_by("plan", videos, "--out", tmp_path, *SMALL)
    forecast = Forecast.of_output(str(tmp_path))
    assert forecast is not None
    forecast = replace(forecast, run_seconds=10.0, machine_speed=2e9)
    said = forecast.compared(forecast.clips, forecast.output_bytes, 22.0, machine_speed=1e9)
    assert "10 s, it took 22 (2.20 times); at the machine's speed of then, 0.50 times, 1.10 times" in said
    for unknown in (replace(forecast, machine_speed=None), forecast):
        assert unknown.compared(1, 1, 22.0).endswith("it took 22 (2.20 times)")  # a cluster, a GPU, an older forecast


def test_a_watch_takes_the_first_sample_at_once_and_ends_with_its_block() -> None:
    with SpeedWatch(every_seconds=1000, sample_seconds=0.01) as watch:
        pass
    assert watch.speed is not None
    assert watch.speed > 1e6
    assert "vidshard-speed" not in {thread.name for thread in threading.enumerate()}


def test_a_plan_for_another_machine_needs_neither_it_nor_an_output(videos: Path) -> None:
    said = printed_by("plan", videos, *SMALL, "--machine", "h200")
    assert "GPU-hours for tiny" in said
    assert "for each GPU" in said
    assert "h200 (a roofline, not measured)" in said
    assert "s for the whole command" not in said


def test_the_table_gives_the_times_of_the_roofline() -> None:
    cost = encoding_cost(get_preset("fsq_causal_488_32768"), 17, 256, 256)
    h200 = MACHINES["h200"]
    assert h200.seconds(cost, "float16", 2) == pytest.approx(16.6e-3, rel=0.02)  # without the fused kernels 21.8 ms
    assert 0.11 < h200.seconds(cost, "float32", 4) < 0.15
    assert decoding_seconds("h264", 1280, 720, 30, 1) - decoding_seconds("h264", 1280, 720, 30, 0) == pytest.approx(
        0.061, rel=0.02
    )


def test_an_unknown_machine_is_refused_and_a_measured_one_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="known are here, h200"):
        find_machine("cray")
    path = tmp_path / "mine.json"
    path.write_text("{}")
    with pytest.raises(UserError, match="is no machine"):
        find_machine(str(path))
    record = {"name": "mine", "is_gpu": False, "flops_per_second": {"float32": 1e11}, "bytes_per_second": 1e10}
    path.write_text(json.dumps(record | {"is_measured": True, "source": "measured"}))
    assert find_machine(str(path)).name == "mine"
