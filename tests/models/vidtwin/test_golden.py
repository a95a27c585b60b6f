"""The network computes what the original VidTwin implementation computes, with weights and clips made from names."""

# B batch, C channels, T frames, H height, W width, S positions of a frame

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.golden import TOLERANCE, TWIN_TINY_A, TWIN_TINY_B, FloatArray, relative_error, video
from tests.support.shared import SHARED
from vidshard.models.vidtwin.config import VidTwinConfig
from vidshard.models.vidtwin.model import Moments, VidTwin
from vidshard.models.vidtwin.transformer import modulated
from vidshard.models.weights import load_tokenizer

WHOLE_SET = SHARED / "reference" / "golden"
OWN_PART = Path(__file__).parent / "golden" / "reference.npz"
TINY = {"tiny_a": TWIN_TINY_A, "tiny_b": TWIN_TINY_B}
COLUMNS = {"s": "structure", "dx": "dynamics_x", "dy": "dynamics_y"}
"""Payload columns by their names in the reference values."""

needs_whole_set = pytest.mark.skipif(not WHOLE_SET.is_dir(), reason=f"the whole set of values is not at {WHOLE_SET}")

Clips = dict[str, dict[str, Tensor]]


@lru_cache(maxsize=2)
def model_of(config: VidTwinConfig) -> VidTwin:
    return load_tokenizer(config, None, seed=0)


def clips_of(config: VidTwinConfig) -> tuple[Tensor, Tensor]:
    a, b = video(config.num_frames, config.frame_size, config.frame_size, 2).chunk(2)
    return a, b


def channels_first(moments: Moments) -> Tensor:
    """Put moments as the original does: (B, channels of mean and log-variance, ...)."""
    return torch.cat([moments.mean, moments.logvar], dim=-1).movedim(-1, 1)


def assert_near(ours: Tensor, theirs: FloatArray) -> None:
    assert relative_error(ours, theirs) < TOLERANCE


@pytest.fixture(params=list(TINY))
def tiny(request: pytest.FixtureRequest) -> tuple[VidTwin, dict[str, FloatArray]]:
    name = request.param
    with np.load(OWN_PART) as arrays:
        own = {key.removeprefix(f"{name}/"): arrays[key] for key in arrays.files if key.startswith(f"{name}/")}
    return model_of(TINY[name]), own


# The committed part of the values


def test_latents_are_those_of_the_original(tiny: tuple[VidTwin, dict[str, FloatArray]]) -> None:
    model, expected = tiny
    for clip, x_BCTHW in zip(("A", "Bv"), clips_of(model.config), strict=True):
        moments = model.encode(x_BCTHW).moments
        for short, column in COLUMNS.items():
            assert_near(channels_first(moments[column]), expected[f"{clip}/{short}/moments"])
        kl = torch.stack([latent.kl() for latent in moments.values()])
        assert_near(kl, expected[f"{clip}/kl_terms"])
    z_BTSC = model.encoder(clips_of(model.config)[0])
    grid = model.config.grid
    assert_near(z_BTSC.unflatten(2, (grid, grid)).permute(0, 4, 1, 2, 3), expected["A/enc/z"])


def test_whole_partial_and_crossed_reconstructions_are_those_of_the_original(
    tiny: tuple[VidTwin, dict[str, FloatArray]],
) -> None:
    model, expected = tiny
    a, b = (model.encode(clip).payload for clip in clips_of(model.config))
    made = {
        "A/video": model.decode_payload(a),
        "A/video_S_only": model.decode_payload(a, parts=["structure"]),
        "A/video_D_only": model.decode_payload(a, parts=["dynamics"]),
        "cross/video_S_of_A_D_of_B": model.decode_payload(b | {"structure": a["structure"]}),
        "cross/video_S_of_B_D_of_A": model.decode_payload(a | {"structure": b["structure"]}),
    }
    for name, x_BCTHW in made.items():
        assert_near(x_BCTHW[:, :, :, ::5, ::7], expected[name])


def test_norms_have_the_epsilon_of_the_original(tiny: tuple[VidTwin, dict[str, FloatArray]]) -> None:
    # Inputs of variance 1e-6: an epsilon of 1e-5 instead of 1e-6, or of 1e-12, would show.
    model, expected = tiny
    x_BCTHW = clips_of(model.config)[0]
    tokens_SC = model.encoder.x_embedder(x_BCTHW)[0, 0] + model.encoder.pos_embed[0].float()
    shift, scale = model.encoder.blocks[0].get_parameter("scale_shift_table")[:2]
    assert_near(modulated(1e-3 * tokens_SC, shift, scale), expected["eps/b0_attn_in"])
    qformer = model.branches["structure"].get_submodule("temporal_qformer")
    entry = qformer.get_submodule("qformer.layernorm")(1e-3 * qformer.get_parameter("query_embeds"))
    assert_near(entry, expected["eps/qf_entry"])
    layer = model.decoder.final_layer
    assert_near(layer.linear(layer(1e-3 * tokens_SC))[::4, ::5], expected["eps/dec_final"])
