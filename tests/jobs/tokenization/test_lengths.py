"""Clips of any length: padded as asked, stored, and reconstructed as long as they were."""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.support.cli import vidshard_exits
from tests.support.models import model_of, stored
from tests.support.videos import Recipe, write_video
from vidshard.models.tokenizer import frames_to_input, output_to_frames
from vidshard.models.weights import save_tokenizer
from vidshard.pipeline.decode_stage import decode_again
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.shard_reader import open_shard, read_clips
from vidshard.pipeline.reconstruct import reconstruct
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.schemas.runs import TokenizeRun

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "num_frames", "policy", "encoded_frames"),
    [
        ("fsq_causal_488_262144", 16, "repeat-last", 17),
        ("fsq_noncausal_488_262144", 16, "refuse", 16),
        ("kl_noncausal_41616_4chn", 3, "repeat-first", 4),
        ("fsq_causal_488_32768_v1_1", 18, "refuse", 18),
        ("lfq_causal_488_262144", 5, "refuse", 5),
        ("vq_causal_488_262144", 5, "refuse", 5),
        ("kl_causal_488_4chn_no_3d", 5, "refuse", 5),
    ],
)
def test_a_clip_of_any_length_comes_back_from_its_shard_as_long_as_it_was(
    tmp_path: Path, name: str, num_frames: int, policy: str, encoded_frames: int
) -> None:
    model = model_of(name)
    save_tokenizer(tmp_path / "small.safetensors", model)
    video = write_video(tmp_path / "v.mp4", Recipe(num_frames=2 * num_frames - 1, rate=Fraction(8)))
    run = ["--weights", tmp_path / "small.safetensors", "--frames", num_frames, "--size", "16x32"]
    code, printed = vidshard_exits(
        "tokenize", video, "--out", tmp_path / "out", *run, "--fps", 8, "--pad-frames", policy, "--local"
    )
    assert code == 0, printed
    assert (f"each clip is encoded as {encoded_frames} frames: {policy}" in printed) == (policy != "refuse")

    (path,) = shard_paths(str(tmp_path / "out"))
    with open_shard(path) as (_, provenance):
        recorded = ResolvedRun.from_provenance(provenance)
    assert recorded.run.pad_frames == policy
    assert provenance.identity.get("pad_frames", "refuse") == policy
    code, printed = vidshard_exits("decode", tmp_path / "out", "--all", tmp_path / "clips", "--each-clip")
    assert code == 0, printed
    clips = list(read_clips(path))
    assert [clip.values["num_valid_frames"] for clip in clips] == [num_frames, num_frames - 1]
    for clip in clips:
        assert len(clip.values["frame_pts_seconds"]) == num_frames
        [spec] = recorded.clip_specs
        source = decode_again(str(video), clip.values["video_id"], clip.values["clip_index"], spec)[0]
        x_BCTHW = frames_to_input(torch.from_numpy(source.frames)[None])
        copies = encoded_frames - num_frames
        first, last = (copies, 0) if policy == "repeat-first" else (0, copies)
        edges = x_BCTHW[:, :, :1].expand(-1, -1, first, -1, -1), x_BCTHW[:, :, -1:].expand(-1, -1, last, -1, -1)
        with torch.inference_mode():
            expected = stored(model.encode(torch.cat([edges[0], x_BCTHW, edges[1]], dim=2)))
            (values,) = clip.payload.values()
            np.testing.assert_array_equal(values, expected[0].numpy().astype(values.dtype))
            payload = torch.from_numpy(values.astype(expected.numpy().dtype))[None]
            frames = output_to_frames(model.decode(payload, encoded_frames))[0, first : first + num_frames]
        assert len(frames) == num_frames
        np.testing.assert_array_equal(reconstruct(clip, model, padding=recorded.padding), frames)
        with av.open(str(tmp_path / "clips" / f"{clip.clip_id}.mp4")) as container:
            assert len(list(container.decode(video=0))) == clip.values["num_valid_frames"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--frames", 16), "num_frames must be 1 + a multiple of 4 (1, 5, 9 ...), got 16; nearest: 13 or 17"),
        (("--frames", 16), "--pad-frames repeat-last"),
        (("--size", "256x100"), "width must be divisible by 8, got 100; nearest: 96 or 104"),
        (("--pad-frames", "repeat"), "repeat-last"),
    ],
)
def test_the_job_refuses_a_length_or_size_with_its_valid_neighbors(
    tmp_path: Path, arguments: tuple[object, ...], words: str
) -> None:
    preset = ("--tokenizer", "fsq_causal_488_32768", "--random-weights", 0)
    code, printed = vidshard_exits("tokenize", "v.mp4", "--out", tmp_path / "out", *preset, *arguments)
    assert code == 2
    assert words in " ".join(printed.split())
    assert not (tmp_path / "out").exists()


def test_a_policy_that_has_nothing_to_do_leaves_the_identity_of_a_run_as_it_was(tmp_path: Path) -> None:
    def identity(frames: int, policy: str) -> dict[str, object]:
        settings = {"inputs": ["v.mp4"], "out": str(tmp_path), "tokenizer": "tiny"}
        return ResolvedRun.of(TokenizeRun.model_validate({**settings, "frames": frames, "pad_frames": policy})).identity

    assert identity(17, "repeat-last") == identity(17, "repeat-first") == identity(17, "refuse")
    assert identity(16, "repeat-last") != identity(16, "repeat-first")


def test_an_output_holds_clips_of_one_policy(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.mp4", Recipe(num_frames=8, rate=Fraction(8)))
    run = ("tokenize", video, "--out", tmp_path / "out", "--tokenizer", "tiny", "--frames", 8, "--size", 16, "--local")
    assert vidshard_exits(*run, "--pad-frames", "repeat-last")[0] == 0
    code, printed = vidshard_exits(*run, "--pad-frames", "repeat-first")
    assert code == 2
    assert "pad_frames: 'repeat-last' there, 'repeat-first' now" in printed
