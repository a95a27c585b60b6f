"""A video as one continuous sequence: rows that carry on from one another, whoever encodes them."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cli import vidshard_exits
from tests.support.models import small
from tests.support.shards import clips_of
from tests.support.videos import Recipe, write_video
from vidshard.models.tokenizer import frames_to_input, output_to_frames
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import load_tokenizer, save_tokenizer
from vidshard.pipeline.clip_specs import continuous_spec
from vidshard.pipeline.encode import encode_spans
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.shard_reader import read_clips
from vidshard.pipeline.reconstruct import reconstruct_row, reconstruct_video
from vidshard.pipeline.storage import open_binary
from vidshard.pipeline.video.decode import decode_span
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import ClipTimeline, plan_spans
from vidshard.schemas.video import ClipSpec, Part, VideoRef

MODELS = ("fsq_causal_488_262144", "fsq_causal_888_32768_v1_1", "kl_causal_288_8chn_v1_1")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 16
NUM_FRAMES = 9
NUM_SAMPLED = 221
"""So many that the last units of work begin with a halo and not with the video."""


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "long.mp4"
    return write_video(path, Recipe(num_frames=2 * NUM_SAMPLED - 1, rate=Fraction(16)))


def sampled_frames(video: Path) -> torch.Tensor:
    """The whole video on its grid, by the plain functions: (1, 3, T, H, W)."""
    spec = ClipSpec(fps=Fraction(8), num_frames=NUM_SAMPLED, height=SIZE, width=SIZE)
    (span,) = plan_spans(probe_video(VideoRef(uri=str(video), num_bytes=-1), open_binary), spec, 10)
    clip = decode_span(span, spec, str(video), max_clips=10)[0]
    assert clip.num_valid_frames == NUM_SAMPLED
    return frames_to_input(torch.from_numpy(clip.frames)[None])


def padded_to_rows(x_BCTHW: torch.Tensor, num_frames: int) -> torch.Tensor:
    """The last frame repeated until its row is full: row 0 has 1 + k frames, the others k more each."""
    missing = -(x_BCTHW.shape[2] + num_frames - NUM_FRAMES) % num_frames
    return torch.cat([x_BCTHW, x_BCTHW[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> VidTok:
    return load_tokenizer(small(request.param), None, seed=0)


Output = Callable[[int], Path]


@pytest.fixture(scope="module")
def outputs(model: VidTok, video: Path, tmp_path_factory: pytest.TempPathFactory) -> Output:
    """The video tokenized, by the number of rows in a unit of work."""
    folder = tmp_path_factory.mktemp("continuous")
    save_tokenizer(folder / "small.safetensors", model)

    def output(clips_per_span: int) -> Path:
        out = folder / f"out-{clips_per_span}"
        if not out.exists():
            code, printed = vidshard_exits(*command(folder, video, out), "--clips-per-span", clips_per_span)
            assert code == 0, printed
        return out

    return output


def command(folder: Path, video: Path, out: Path) -> list[Any]:
    sampling = ["--continuous", "--fps", 8, "--frames", NUM_FRAMES, "--size", SIZE]
    return ["tokenize", video, "--out", out, "--weights", folder / "small.safetensors", *sampling, "--local"]


def test_rows_of_any_units_of_work_are_those_of_the_whole_video(model: VidTok, video: Path, outputs: Output) -> None:
    config = model.config
    num_latents = config.latent_frames(NUM_FRAMES)
    x_BCTHW = padded_to_rows(sampled_frames(video), num_latents * config.time_stride)
    with torch.inference_mode():
        encoded = model.encode(x_BCTHW)
    whole = (encoded.latents if encoded.tokens is None else encoded.tokens)[0].numpy()
    for clips_per_span in (100, 3):
        rows = clips_of(outputs(clips_per_span))
        joined = np.concatenate([next(iter(row.payload.values())) for row in rows], axis=-3)
        assert [row.values["clip_index"] for row in rows] == list(range(len(rows)))
        assert [row.values["continues_previous"] for row in rows] == [False] + [True] * (len(rows) - 1)
        assert [len(row.values["frame_pts_seconds"]) for row in rows[:2]] == [
            NUM_FRAMES,
            num_latents * config.time_stride,
        ]
        assert sum(row.values["num_valid_frames"] for row in rows) == NUM_SAMPLED
        assert rows[1].values["start_seconds"] == NUM_FRAMES / 8
        times = np.concatenate([row.values["frame_pts_seconds"] for row in rows])[:NUM_SAMPLED]
        np.testing.assert_allclose(times, np.arange(NUM_SAMPLED) / 8, atol=1e-9)
        if encoded.tokens is None:
            np.testing.assert_allclose(joined.astype(np.float32), whole, rtol=2e-3, atol=1e-4)
        else:
            assert encoded.pre_quantized is not None
            near_tie = ((encoded.pre_quantized - encoded.pre_quantized.floor() - 0.5).abs() < 1e-4).any(dim=1)[0]
            assert near_tie.float().mean() < 0.01
            assert ((joined == whole) | near_tie.numpy()).all()


def test_a_whole_video_and_any_row_of_it_decode_to_the_same_frames(model: VidTok, outputs: Output) -> None:
    out = outputs(3)
    rows = clips_of(out)
    paths = shard_paths(str(out))
    stored = np.concatenate([next(iter(row.payload.values())) for row in rows], axis=-3)
    tokens = torch.from_numpy(stored.astype(np.float32 if stored.dtype.kind == "f" else np.int64))[None]
    with torch.inference_mode():
        whole = output_to_frames(model.decode(tokens))[0].numpy()
    names = [(path, clip.clip_id) for path in paths for clip in read_clips(path)]
    in_order = sorted(names, key=lambda name: name[1])
    in_pieces = np.stack(list(reconstruct_video(in_order, model)))
    assert len(in_pieces) == NUM_SAMPLED
    assert np.abs(in_pieces.astype(int) - whole[:NUM_SAMPLED]).max() <= 1
    at = 0
    for row in rows:
        count = len(row.values["frame_pts_seconds"])
        frames = reconstruct_row(row, paths, model)
        assert np.abs(frames.astype(int) - whole[at : at + count]).max() <= 1
        at += count


def test_the_command_line_writes_whole_videos_and_rows(outputs: Output, tmp_path: Path) -> None:
    out = outputs(3)
    rows = clips_of(out)
    video_id = rows[0].values["video_id"]
    for arguments, expected in (
        (("--video", video_id[:8]), NUM_SAMPLED),
        (("--clip", rows[2].clip_id, "--side-by-side"), rows[2].values["num_valid_frames"]),
    ):
        code, printed = vidshard_exits("decode", out, *arguments, "--to", tmp_path / "out.mp4")
        assert code == 0, printed
        with av.open(str(tmp_path / "out.mp4")) as container:
            assert sum(1 for _ in container.decode(video=0)) == expected


def test_a_second_run_writes_nothing_and_other_settings_are_refused(
    outputs: Output, video: Path, tmp_path: Path
) -> None:
    out = outputs(3)
    before = {path: Path(path).read_bytes() for path in shard_paths(str(out))}
    again = [*command(out.parent, video, out), "--clips-per-span", 3]
    code, printed = vidshard_exits(*again)
    assert code == 0, printed
    assert {path: Path(path).read_bytes() for path in shard_paths(str(out))} == before
    code, printed = vidshard_exits(*(argument for argument in again if argument != "--continuous"))
    assert code == 2, printed
    assert "continuous" in printed


def test_a_model_that_is_not_causal_is_refused(video: Path, tmp_path: Path) -> None:
    run = ("--tokenizer", "fsq_noncausal_488_262144", "--random-weights", 0, "--frames", 16)
    code, printed = vidshard_exits("tokenize", video, "--out", tmp_path / "out", *run, "--continuous", "--local")
    assert code == 2
    assert "fsq_noncausal_488_262144 is not causal" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_streams_beside_each_other_do_not_change_each_other(model: VidTok, batch_size: int) -> None:
    spec = continuous_spec(ClipSpec(fps=Fraction(8), num_frames=NUM_FRAMES, height=SIZE, width=SIZE), model.config)
    shape = (spec.num_frames, SIZE, SIZE, 3)
    random = np.random.default_rng(0)
    spans = [[random.integers(0, 256, shape, np.uint8) for _ in range(length)] for length in (3, 1, 0, 2)]
    payload = model.config.payload(NUM_FRAMES, SIZE, SIZE)
    counts = [2, 1, 0, 1]
    (together,) = encode_spans(model, spans, counts, payload, spec, batch_size=batch_size).values()
    apart = [
        next(iter(encode_spans(model, [span], [count], payload, spec, batch_size=1).values()))
        for span, count in zip(spans, counts, strict=True)
    ]
    np.testing.assert_array_equal(together, np.concatenate(apart))


@given(
    stride=st.sampled_from([2, 4, 8]),
    num_latents=st.integers(1, 9),
    num_rows=st.integers(2, 40),
)
def test_rows_tile_the_grid(stride: int, num_latents: int, num_rows: int) -> None:
    name = {2: "kl_causal_288_8chn", 4: "fsq_causal_488_4096", 8: "fsq_causal_888_32768_v1_1"}[stride]
    config = PRESETS[name]
    plain = ClipSpec(fps=Fraction(8), num_frames=1 + (num_latents - 1) * stride, height=SIZE, width=SIZE)
    spec = continuous_spec(plain, config)
    layout = ClipTimeline(spec=spec, part=Part(), start_pts=0, time_base=Fraction(1, 90000), placed=None)
    assert layout.start_seconds(0) <= 0
    firsts = [int(layout.start_seconds(index) * spec.fps) for index in range(1, num_rows)]
    assert firsts[0] == plain.num_frames
    assert set(np.diff(firsts)) <= {num_latents * stride}
    assert all(config.latent_frames(first) % num_latents == 0 for first in firsts)
    assert spec.halo_clips * num_latents * stride >= config.history_frames
    assert spec.digest() != plain.digest()
