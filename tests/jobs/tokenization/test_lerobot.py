"""A LeRobot dataset and Wan through the whole: tokenized, killed, resumed, read for training, decoded to video."""

from __future__ import annotations

import os
import signal
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install -e '.[dev]')")

import vidshard
from tests.support.cli import printed_by, tokenize
from tests.support.held_back import held_back
from tests.support.lerobot import TASKS, TOP, WRIST, Shape, make_dataset
from tests.support.processes import COMMITTED_AT_ONCE, is_under_way, started, until
from tests.support.shards import rows_of, shard_bytes
from tests.support.vae_configs import write_vae
from tests.support.videos import Recipe, write_video

SETTINGS = ("--fps", "10", "--frames", "5", "--size", "32", "--clips-per-span", "1")


def test_a_killed_run_on_a_dataset_resumes_and_gives_actions_by_latent_and_video(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", Shape())
    wan = write_vae(tmp_path / "wan", "wan-2.1")
    out = tmp_path / "tokens"
    other = write_video(tmp_path / "other.mp4", Recipe(num_frames=10, rate=Fraction(10)))
    with held_back(other, out) as held:
        flags = ("--tokenizer", f"diffusers:{wan}", *SETTINGS, *COMMITTED_AT_ONCE, "--lease-seconds", "5")
        arguments = (f"lerobot:{root}", held.uri, "--out", out, *flags)
        with started(*arguments, "--local") as process:
            until(process, lambda: is_under_way(out) and held.is_reached)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        committed = shard_bytes(out)
        assert committed
        held.let_go()
        again = tokenize(*arguments)
    assert again.exit_code == 0, again.output
    assert committed.items() <= shard_bytes(out).items(), "what was committed is not done again"
    rows = [row for row in rows_of(out) if row["episode_index"] is not None]
    assert len({row["clip_id"] for row in rows}) == len(rows) == 2 * (3 + 2 + 2)
    assert {(row["camera"], row["episode_index"], row["task"]) for row in rows} == {
        (camera, episode, TASKS[episode % 2]) for camera in (TOP, WRIST) for episode in range(3)
    }

    shards = vidshard.TokenShards(
        str(out),
        columns=["latents", "episode_index", "clip_index", "num_valid_frames"],
        signals=["action", "observation.state"],
        signals_per="latent",
        where="episode_index >= 0",
        batch_size=4,
    )
    seen = 0
    for batch in shards:
        for at, episode in enumerate(batch["episode_index"].tolist()):
            first, valid = 5 * int(batch["clip_index"][at]), int(batch["num_valid_frames"][at])
            inside = batch["action_mask"][at]
            assert batch["latents"][at].shape[1] == len(inside) == 2, "two latents, and the actions of each"
            assert inside.sum(dim=1).tolist() in ([1, 4], [1, valid - 1], [1, 0])
            frames = batch["action"][at][inside].tolist()
            assert frames[:valid] == [[episode, first + n] for n in range(valid)], (
                "a latent has the actions of its frames"
            )
            seen += 1
    assert seen == len(rows)

    clip = next(row["clip_id"] for row in rows if row["num_valid_frames"] == 5)
    printed_by("decode", out, "--clip", clip, "--to", tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert np.array([frame.width for frame in container.decode(video=0)]).tolist() == [32] * 5
    assert "damaged" not in printed_by("verify", out)
