"""An evaluation on Ray has the scores of one in a single process."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

from tests.support.cli import printed_by
from tests.support.videos import Recipe, write_video


def test_scores_on_ray_are_those_of_one_process(tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "videos").mkdir()
    for n in range(3):
        recipe = Recipe(num_frames=20 + n, rate=Fraction(8), width=64, height=64)
        write_video(tmp_path / "videos" / f"v{n}.mp4", recipe)
    flags = (
        "--tokenizer",
        "tiny",
        "--tokenizer",
        "tiny_kl",
        "--fps",
        "4",
        "--frames",
        "5",
        "--size",
        "32",
        "--no-lpips",
    )
    for out, more in (("ray", ()), ("here", ("--local",))):
        printed_by("evaluate", tmp_path / "videos", "--out", tmp_path / out, *flags, *more)
    ray, here = (json.loads((tmp_path / out / "scores.json").read_text())["rows"] for out in ("ray", "here"))
    assert len(ray) == 2
    for one, other in zip(ray, here, strict=True):
        assert one["clips"] == other["clips"] == 6
        assert one["codebook"] == other["codebook"]
        assert abs(one["psnr"] - other["psnr"]) < 1e-4  # other numbers of threads sum in another order
