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
from vidshard.models.vidtwin.config import PRESETS, VidTwinConfig
from vidshard.models.vidtwin.model import Moments, VidTwin, sum_of
from vidshard.models.vidtwin.transformer import Block, modulated
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


# The whole set


def stages_of(model: VidTwin, x_BCTHW: Tensor) -> dict[str, Tensor]:
    """Intermediate values of encoding and decoding a clip, named and laid out as in the reference values."""
    config, structure, dynamics = model.config, model.branches["structure"], model.branches["dynamics"]
    seen: dict[str, Tensor] = {}

    def keep(module: torch.nn.Module, name: str) -> None:
        def hook(_module: torch.nn.Module, _given: object, made: Tensor) -> None:
            seen[name] = made.clone()

        hooks.append(module.register_forward_hook(hook))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    for part, transformer in (("enc", model.encoder), ("dec", model.decoder)):
        for index, block in enumerate(transformer.blocks):
            keep(block, f"{part}/b{index}/out")
    qformer = structure.get_submodule("temporal_qformer")
    keep(qformer.get_submodule("qformer.layernorm"), "qf/entry")
    for index, layer in enumerate(qformer.get_submodule("qformer.encoder.layer").children()):
        keep(layer.get_submodule("attention"), f"qf/l{index}/self")
        if index % 2 == 0:
            keep(layer.get_submodule("crossattention"), f"qf/l{index}/cross")
        keep(layer, f"qf/l{index}/out")
    for name, stage in {
        "conv_in": "s/conv_in",
        "content_downsample_blocks": "s/down",
        "bottle_down": "s/bottle_down",
        "bottle_up": "s/bottle_up",
        "content_upsample_blocks": "s/up",
        "conv_out": "s/conv_out",
    }.items():
        keep(structure.get_submodule(name), stage)
    keep(dynamics.get_submodule("motion_emb"), "emb")
    if config.dynamics_halvings:
        keep(dynamics.get_submodule("downsample_motion_module"), "d/down")
        keep(dynamics.get_submodule("up_motion"), "aligned")

    patch_BTSC = model.encoder.x_embedder(x_BCTHW)
    seen["enc/patch"] = patch_BTSC.flatten(1, 2)
    x_BTSC = patch_BTSC + model.encoder.pos_embed.float()[:, None]
    seen["enc/b0/in"] = x_BTSC
    block = model.encoder.blocks[0]
    assert isinstance(block, Block)
    shift1, scale1, gate1, shift2, scale2, _ = block.scale_shift_table
    a_BTSC = modulated(x_BTSC, shift1, scale1)
    attended = block.attn.ready().over_space(a_BTSC)
    t_BTSC = x_BTSC + gate1 * attended + model.encoder.pos_embed_temporal.float()[0][:, None]
    over_time = block.attn_temp.ready().over_time(t_BTSC)
    m_BTSC = modulated(x_BTSC + gate1 * attended + gate1 * over_time, shift2, scale2)
    seen |= {"enc/b0/attn_in": a_BTSC[0], "enc/b0/attn_out": attended[0], "enc/b0/mlp_out": block.mlp.ready()(m_BTSC)}
    seen |= {"enc/b0/temp_in": t_BTSC[0].transpose(0, 1), "enc/b0/temp_out": over_time[0].transpose(0, 1)}

    moments = model.moments(x_BCTHW)
    latents = {name: latent.mean for name, latent in moments.items()}
    aligned = model.aligned(latents)
    u_BTSC = sum_of(aligned)
    seen["s/cont_emb_out"] = aligned["structure"][0].transpose(0, 1)
    seen["dec/in"] = torch.unflatten(u_BTSC, 2, (config.grid, config.grid)).permute(0, 4, 1, 2, 3)
    features_BTSC = model.decoder.features(u_BTSC)
    seen["dec/final"] = model.decoder.final_layer.linear(features_BTSC).flatten(1, 2)[:, ::25]
    for short, emb in zip(("dx", "dy"), seen.pop("emb").chunk(2), strict=True):
        seen[f"{short}/emb"] = emb
    if config.dynamics_halvings:
        for short, up in zip(("dx", "dy"), seen.pop("aligned").chunk(2), strict=True):
            seen[f"{short}/aligned"] = up.transpose(2, 3).permute(0, 3, 1, 2)
    for short, column in COLUMNS.items():
        seen[f"{short}/moments"] = channels_first(moments[column])
        is_structure = column == "structure"
        seen[f"{short}/latent"] = latents[column] if is_structure else latents[column].movedim(-1, 1)
    for handle in hooks:
        handle.remove()
    return seen


@pytest.mark.shared
@needs_whole_set
@pytest.mark.parametrize("name", list(TINY))
def test_every_stage_agrees_with_the_whole_set(name: str) -> None:
    model = model_of(TINY[name])
    seen = stages_of(model, clips_of(model.config)[0])
    with np.load(WHOLE_SET / f"vidtwin_{name}.npz") as arrays:
        expected = {key.removeprefix("A/"): arrays[key] for key in arrays.files if key.startswith("A/")}
    compared = [key for key in expected if key in seen]
    for key in compared:
        theirs = expected[key]
        given = seen[key]
        if key == "qf/entry":  # here before it is repeated for every position
            given = given.expand(theirs.shape)
        assert given.numel() == theirs.size, key
        assert np.abs(given.reshape(theirs.shape).numpy() - theirs).max() < 1e-4, key
    left_out = {"enc/z", "dx/mean", "dy/mean", "s/cont_emb_in", "kl_terms", "kl_loss"}
    assert {key for key in expected if key not in seen and "video" not in key} == left_out


@pytest.mark.shared
@pytest.mark.slow
@needs_whole_set
@pytest.mark.parametrize(
    "name",
    [
        "vidtwin_structure_7_7_8_dynamics_7_8",
        "vidtwin_structure_7_7_4_dynamics_7_8",
        "vidtwin_structure_7_7_4_q12_dynamics_7_8",
        "vidtwin_small_structure_7_7_4_dynamics_7_8",
    ],
)
def test_models_of_full_size_agree_with_the_whole_set(name: str) -> None:
    model = model_of(PRESETS[name])
    clips = dict(zip(("A", "Bv"), clips_of(model.config), strict=True))
    with np.load(WHOLE_SET / f"{name}.npz") as arrays:
        expected = {key: arrays[key] for key in arrays.files if key != "meta_json"}
    a, b = (model.encode(clip).payload for clip in clips.values())
    seen: dict[str, Tensor] = {}
    grid = model.config.grid
    for clip, x_BCTHW in clips.items():
        z_BCTHW = torch.unflatten(model.encoder(x_BCTHW), 2, (grid, grid)).permute(0, 4, 1, 2, 3)
        seen |= {f"{clip}/z_slice": z_BCTHW[:, ::32, ::3, ::3, ::3], f"{clip}/z_stats": stats_of(z_BCTHW)}
        moments = model.moments(x_BCTHW)
        for column, short in zip(COLUMNS.values(), ("struct", "dynx", "dyny"), strict=True):
            seen[f"{clip}/{short}_moments"] = channels_first(moments[column])
        kl = torch.stack([latent.kl() for latent in moments.values()])
        seen |= {f"{clip}/kl_terms": kl, f"{clip}/kl_loss": kl.sum()}
    aligned = torch.unflatten(model.aligned(a)["structure"], 2, (grid, grid)).permute(0, 4, 1, 2, 3)
    seen["A/aligned_S_slice"] = aligned[:, ::32, ::3, ::3, ::3]
    for short, ups in zip(("x", "y"), dynamics_before_repetition(model, a).chunk(2), strict=True):
        seen[f"A/aligned_D{short}_slice"] = ups.permute(0, 3, 1, 2)[:, ::32, ::3]
    step = 8 if "A/dec_content_slice" in expected else 13
    decoded = {
        ("A/dec_slice",): model.decode_payload(a),
        ("A/dec_content_slice", "A/dec_S_only_slice"): model.decode_payload(a, parts=["structure"]),
        ("A/dec_motion_slice", "A/dec_D_only_slice"): model.decode_payload(a, parts=["dynamics"]),
        ("cross/dec_slice", "cross/dec_S_of_A_D_of_B_slice"): model.decode_payload(b | {"structure": a["structure"]}),
        ("cross/dec_S_of_B_D_of_A_slice",): model.decode_payload(a | {"structure": b["structure"]}),
        ("Bv/dec_slice",): model.decode_payload(b),
    }
    for names, x_BCTHW in decoded.items():
        seen |= dict.fromkeys(names, x_BCTHW[:, :, ::5, ::step, ::step])
    seen["A/dec_frame0"] = decoded["A/dec_slice",][:, :, 0, :112, :112]
    seen |= {f"{clip}/dec_stats": stats_of(decoded[f"{clip}/dec_slice",]) for clip in clips}
    tables = {"pos_embed": model.encoder.pos_embed[0, ::13], "pos_embed_temporal": model.encoder.pos_embed_temporal[0]}
    seen |= {f"encoder.{table}_slice": values[:, ::16] for table, values in tables.items()}
    for key, theirs in expected.items():
        assert_near(seen[key], theirs)
        if key.startswith("encoder."):
            assert seen[key].dtype is torch.float64
            np.testing.assert_allclose(seen[key].numpy(), theirs, rtol=0, atol=1e-12)


def stats_of(values: Tensor) -> Tensor:
    """Mean, population standard deviation and largest magnitude."""
    return torch.stack([values.mean(), values.std(correction=0), values.abs().max()])


def dynamics_before_repetition(model: VidTwin, payload: dict[str, Tensor]) -> Tensor:
    """Aligned dynamics by column, then by row: (2 B, T, positions, C)."""
    dynamics = model.branches["dynamics"]
    emb: Tensor = dynamics.get_submodule("motion_emb")(torch.cat([payload["dynamics_x"], payload["dynamics_y"]]))
    ups: Tensor = dynamics.get_submodule("up_motion")(emb.transpose(2, 3)).transpose(2, 3)
    return ups
