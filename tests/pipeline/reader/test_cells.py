"""Latents that stand for other numbers of frames than their stride says are not given signals per latent."""

from __future__ import annotations

import pytest

from vidshard.models.diffusers_vae.classes import CLASSES
from vidshard.pipeline.reader.frames import FrameCells
from vidshard.schemas.errors import UserError


@pytest.mark.parametrize(
    ("name", "num_frames", "stride"),
    [
        ("AutoencoderKLWan", 17, 4),
        ("AutoencoderKLCogVideoX", 16, 4),
        ("AutoencoderKLCogVideoX", 17, 4),
        ("AutoencoderKLAllegro", 40, 4),
        ("AutoencoderKL", 7, 1),
        ("AutoencoderKLMiniMaxH3", 22, 4),
        ("AutoencoderKLMiniMaxH3", 39, 4),
    ],
)
def test_signals_per_latent_need_latents_of_equally_many_frames(name: str, num_frames: int, stride: int) -> None:
    latents = CLASSES[name].lengths(num_frames, stride)
    assert latents is not None
    cells = FrameCells(
        num_frames=num_frames, num_latents=latents, time_stride=stride, num_encoded=num_frames, copies_first=False
    )
    if name == "AutoencoderKLMiniMaxH3":
        with pytest.raises(UserError, match="give signals_per='frame'"):
            cells.check_per_latent()
    else:
        cells.check_per_latent()
