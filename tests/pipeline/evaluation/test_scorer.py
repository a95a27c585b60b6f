"""Reconstructions are those of the tokenizer, whatever the batch; values that are not finite are no scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vidshard.models.metrics import psnr, ssim
from vidshard.models.tokenizer import frames_to_input
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.vidtok.lengths import Padding
from vidshard.models.weights import load_tokenizer
from vidshard.pipeline.clip_metrics import Metrics, MetricsSpec
from vidshard.pipeline.evaluation.scorer import (
    NotFiniteOutputError,
    dump,
    load,
    reconstruct_clips,
)
from vidshard.pipeline.evaluation.scores import ScoredSpans

pytestmark = pytest.mark.usefixtures("one_thread")


def clips(count: int, frames: int = 5) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, frames, 32, 32, 3), np.uint8))


@pytest.mark.parametrize("name", ["tiny", "tiny_kl"])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_a_clip_has_the_same_reconstruction_in_any_batch(name: str, batch_size: int) -> None:
    tokenizer = load_tokenizer(PRESETS[name], None, seed=0)
    videos, tokens = reconstruct_clips(tokenizer, clips(3), batch_size=batch_size, padding=None)
    assert len(videos) == 3
    for clip, video in zip(clips(3), videos, strict=True):
        with torch.inference_mode():
            encoded = tokenizer.encode(frames_to_input(torch.from_numpy(clip)[None]))
            expected = tokenizer.decode_payload(encoded.payload, 5)[0]
        torch.testing.assert_close(video, expected, atol=1e-5, rtol=0)
    assert len(tokens) == (3 if name == "tiny" else 0)


def test_padded_clips_are_compared_without_their_copies() -> None:
    tokenizer = load_tokenizer(PRESETS["tiny"], None, seed=0)
    [video], _ = reconstruct_clips(tokenizer, clips(1, frames=6), batch_size=1, padding=Padding.REPEAT_LAST)
    assert video.shape == (3, 6, 32, 32)


def test_what_is_not_finite_is_refused() -> None:
    tokenizer = load_tokenizer(PRESETS["tiny"], None, seed=0)
    next(iter(tokenizer.decoder.parameters())).fill_(float("nan"))
    with pytest.raises(NotFiniteOutputError, match="0"):
        reconstruct_clips(tokenizer, clips(1), batch_size=1, padding=None)


def test_metrics_are_those_of_each_frame(vgg_file: Path) -> None:
    real = frames_to_input(torch.from_numpy(clips(1)[0])[None])[0]
    fake = (real + 0.3).clone()
    found = Metrics(MetricsSpec(lpips=True, vgg_weights=str(vgg_file), i3d=None), "cpu").measure(real, fake)
    frames = [x.movedim(1, 0) for x in (real, fake.clamp(-1, 1))]
    assert found["psnr"] == psnr(*frames).tolist()
    assert found["ssim"] == ssim(*frames).tolist()
    assert found["lpips"] is not None
    assert len(found["lpips"]) == 5
    small = Metrics(MetricsSpec(lpips=False, vgg_weights=None, i3d=None), "cpu").measure(
        real[..., :8, :8], fake[..., :8, :8]
    )
    assert small["ssim"] is None
    assert small["lpips"] is None


def test_scores_survive_the_way_to_the_driver() -> None:
    scored = ScoredSpans(
        rows=[{"psnr": [float(np.float32(0.1))]}], spans=["s"], rejections=[{"uri": "x"}], counts={"a": {5: 2, 1: 1}}
    )
    again = load(dump(scored))
    assert (again.rows, again.spans, again.rejections, again.counts) == (
        scored.rows,
        scored.spans,
        scored.rejections,
        scored.counts,
    )
