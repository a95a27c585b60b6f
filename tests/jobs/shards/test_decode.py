"""`vidshard decode`: stored clips back to videos."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.support.cli import run
from tests.support.shards import rows_of, tokens_by_clip
from vidshard.models.tokenizer import frames_to_input, output_to_frames
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import load_tokenizer
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.shard_reader import read_clips
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.storage import open_binary
from vidshard.pipeline.video.decode import decode_span
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.video import ClipSpec, VideoRef

SPEC = ClipSpec(fps=Fraction(4), num_frames=5, height=32, width=32)


def test_decoding_stored_tokens_equals_reconstructing_directly(output: Path, tiny: VidTok, tmp_path: Path) -> None:
    import torch

    from vidshard.pipeline.output.shard_reader import open_shard
    from vidshard.pipeline.reconstruct import load_decoder, reconstruct

    (path,) = shard_paths(str(output))
    with open_shard(path) as (_, provenance):
        loaded = load_decoder(ResolvedRun.from_provenance(provenance))
    clip = next(read_clips(path))
    source = str(clip.values["uri"])
    (span,) = plan_spans(probe_video(VideoRef(uri=source, num_bytes=-1), open_binary), SPEC, 100)
    frames = torch.from_numpy(decode_span(span, SPEC, source, max_clips=100)[0].frames)[None]
    with torch.inference_mode():
        direct = output_to_frames(tiny.decode(tiny.encode(frames_to_input(frames)).latents))[0].numpy()
    np.testing.assert_array_equal(reconstruct(clip, loaded), direct)


def test_decode_writes_a_playable_clip_beside_its_source(output: Path, tmp_path: Path) -> None:
    import av

    clip_id = rows_of(output)[0]["clip_id"]
    target = tmp_path / "clip.mp4"
    result = run("decode", output, "--clip", clip_id, "--to", target, "--side-by-side")
    assert result.exit_code == 0, result.output
    with av.open(str(target)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 4
    assert len(frames) == rows_of(output)[0]["num_valid_frames"]
    assert frames[0].shape == (32, 64, 3)


def test_decode_all_writes_every_clip(output: Path, tmp_path: Path) -> None:
    result = run("decode", output, "--all", tmp_path / "clips", "--each-clip")
    assert result.exit_code == 0, result.output
    assert {p.stem for p in (tmp_path / "clips").iterdir()} == set(tokens_by_clip(output))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--clip", "zzz", "--to", "/nowhere/a.mp4"), "no clip whose id begins with 'zzz'"),
        (("--clip", "", "--to", "/nowhere/a.mp4"), "give more of the id"),
        (("--clip", "x"), "--to FILE"),
        ((), "--all DIR"),
    ],
)
def test_decode_refuses_what_it_cannot_do(output: Path, arguments: tuple[str, ...], words: str) -> None:
    result = run("decode", output, *arguments)
    assert result.exit_code == 2
    assert words in result.output


def test_decode_refuses_other_weights_than_the_shards(output: Path, tmp_path: Path) -> None:
    from vidshard.models.weights import save_tokenizer

    other = tmp_path / "other.safetensors"
    save_tokenizer(other, load_tokenizer(PRESETS["tiny"], None, seed=1))
    clip_id = rows_of(output)[0]["clip_id"]
    result = run("decode", output, "--clip", clip_id, "--to", tmp_path / "a.mp4", "--weights", other)
    assert result.exit_code == 2
    assert "not those expected" in result.output
