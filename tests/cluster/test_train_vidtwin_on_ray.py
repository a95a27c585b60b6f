"""VidTwin trained by the real job: log, pictures, what the pipeline takes, and the split of structure and dynamics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks import twin_split
from tests.support.cli import vidshard_exits
from tests.support.training import run_of, train, write_motion
from vidshard.models.tokenizer import PRESETS
from vidshard.pipeline.output.layout import shard_paths

LATENTS = ("structure", "dynamics_x", "dynamics_y")


def lines_of(out: Path, group: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "one_stage" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["group"] == group]


def tokenized(weights: Path, video: Path, out: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the payload columns of a run with trained weights, which takes the clips of the model by itself."""
    code, printed = vidshard_exits("tokenize", video, "--out", out, "--weights", weights, "--local")
    assert code == 0, printed
    [shard] = shard_paths(str(out))
    table = pq.read_table(shard)
    assert table.num_rows >= 2
    shapes = {f.name: f.metadata[b"shape"] for f in table.schema if f.metadata and b"shape" in f.metadata}
    return {name: tuple(json.loads(shape)) for name, shape in shapes.items()}


@pytest.mark.usefixtures("quick_controller")
def test_vidtwin_trains_shows_its_parts_and_tokenizes(tmp_path: Path, ray_session: None) -> None:
    videos, out = tmp_path / "videos", tmp_path / "run"
    videos.mkdir()
    for number in range(6):
        write_motion(videos / f"v{number}.mp4", number)
    changes = {"size": "64", "steps": 4, "checkpoint_steps": 2, "evaluate_steps": 2, "gan_start": 2}
    code, text = train(run_of(videos, out, ("one_stage",), preset="vidtwin_tiny", **changes))
    assert code == 0, text
    assert "psnr_structure_only" in text
    for line in lines_of(out, "train"):
        assert all(np.isfinite(line[f"kl_{name}"]) for name in LATENTS)
    assert {"psnr", "psnr_structure_only", "psnr_dynamics_only"} <= lines_of(out, "held_out")[-1].keys()
    # a clip of 8 frames, its reconstruction, structure and dynamics, for each held-out clip that is drawn
    width, height = Image.open(out / "one_stage" / "pictures" / "step-00000004.png").size
    assert 0 < width - 8 * 128 < 200, "frames of 64 pixels are doubled, and a margin names the rows"
    assert height % (4 * 128) == 0
    shapes = tokenized(out / "one_stage" / "tokenizer.safetensors", videos / "v0.mp4", tmp_path / "tokens")
    columns = PRESETS["vidtwin_tiny"].payload(*PRESETS["vidtwin_tiny"].default_clip)
    assert shapes == {column.name: column.shape for column in columns}


@pytest.mark.slow
def test_structure_and_dynamics_split(tmp_path: Path) -> None:
    weights = twin_split.train(tmp_path, twin_split.write_corpus(tmp_path / "videos", 200), [])
    figures = twin_split.measure(weights, tmp_path / "split.png")
    whole, structure, dynamics = (figures[f"PSNR, {what}"] for what in twin_split.WAYS)
    assert whole > structure > dynamics, figures
    assert figures["crossed: share of clips nearer to that of the structure"] > 0.9, figures
    by_step = {line["step"]: line for line in lines_of(tmp_path / "run", "held_out")}
    last = by_step[max(by_step)]
    assert last["psnr"] > last["psnr_structure_only"] > last["psnr_dynamics_only"]
    shapes = tokenized(weights, tmp_path / "videos" / "00000.mp4", tmp_path / "tokens")
    assert set(shapes) == set(LATENTS)
