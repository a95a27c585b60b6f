"""Streams of Wan: any chunking gives the bits of one pass, and the network looks back as far as stated."""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install -e '.[dev]')")

from tests.support.vae_configs import CONFIGS, clips, config_of, side_of, vae_of
from vidshard.models.diffusers_vae.classes import CLASSES
from vidshard.models.diffusers_vae.derive import config_from
from vidshard.models.diffusers_vae.model import DiffusersVae
from vidshard.models.tokenizer import Past

pytestmark = pytest.mark.usefixtures("one_thread")

STREAMING = [name for name, record in CONFIGS.items() if CLASSES[record["_class_name"]].streams]


def test_wan_and_its_copy_encode_streams() -> None:
    assert STREAMING == ["wan-2.1", "wan-2.2", "qwen"]


def encoded_in(vae: DiffusersVae, x_BCTHW: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    past: Past = ()
    parts = []
    for chunk in torch.tensor_split(x_BCTHW, cuts, dim=2):
        encoded, past = vae.encode_stream(chunk, past)
        parts.append(encoded.mean)
    return torch.cat(parts, dim=2)


@pytest.mark.parametrize("name", STREAMING)
def test_one_pass_gives_what_the_class_gives(name: str) -> None:
    vae = vae_of(name)
    x_BCTHW = clips(1, 13, side_of(config_of(name)))
    with torch.inference_mode():
        theirs = vae.vae.encode(x_BCTHW).latent_dist  # type: ignore[operator]
        ours = vae.encode(x_BCTHW)
        assert ours.logvar is not None
        torch.testing.assert_close(ours.mean, theirs.mode(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.logvar, theirs.logvar, rtol=1e-5, atol=1e-5)
        decoded = vae.vae.decode(theirs.mode()).sample  # type: ignore[operator]
        torch.testing.assert_close(vae.decode_payload({"latents": theirs.mode()}), decoded, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STREAMING)
def test_any_chunking_gives_the_bits_of_one_pass(name: str) -> None:
    vae = vae_of(name)
    x_BCTHW = clips(2, 17, side_of(config_of(name)))
    with torch.inference_mode():
        whole = vae.encode(x_BCTHW)
        assert torch.equal(encoded_in(vae, x_BCTHW, [1, 9]), whole.mean)
        assert torch.equal(encoded_in(vae, x_BCTHW, [5, 9, 13]), whole.mean)
        frames = vae.decode_payload(whole.payload)
        first, past = vae.decode_payload_stream({"latents": whole.mean[:, :, :2]})
        second, _ = vae.decode_payload_stream({"latents": whole.mean[:, :, 2:]}, past, last=True)
        assert torch.equal(torch.cat([first, second], dim=2), frames)


@pytest.mark.parametrize("name", STREAMING)
def test_a_halo_of_the_stated_length_gives_the_bits_of_one_pass(name: str) -> None:
    config, vae = config_of(name), vae_of(name)
    stride = config.time_stride
    halo = -(-config.history_frames // stride)
    x_BCTHW = clips(1, 1 + stride * (halo + 3), side_of(config))
    with torch.inference_mode():
        whole = vae.encode(x_BCTHW).mean
        # a start 3 latents later: its first latent is made of one frame, as at the start of a video
        late = vae.encode(x_BCTHW[:, :, 3 * stride :].contiguous()).mean
    assert torch.equal(late[:, :, halo:], whole[:, :, 3 + halo :])


@pytest.mark.parametrize("name", STREAMING)
def test_latents_and_frames_look_back_exactly_as_far_as_stated(name: str) -> None:
    """By perturbation in float64, where no rounding hides a dependence."""
    config, vae = config_of(name), copy.deepcopy(vae_of(name)).set_precision(torch.float64)
    stride = config.time_stride
    num_latents = 3 + max(config.history_frames // stride, config.history_latents)
    x_BCTHW = clips(1, 1 + stride * (num_latents - 1), side_of(config)).double()
    changed = x_BCTHW.clone()
    changed[:, :, stride] += 0.5  # the last frame of latent 1
    with torch.inference_mode():
        z_BCTHW, other = (vae.moments(clip)[0] for clip in (x_BCTHW, changed))
        reached = torch.nonzero(_differs(z_BCTHW, other))
        last_frame = int(reached.max()) * stride  # the last frame of the last latent that it reaches
        assert int(reached.min()) == 1
        assert last_frame - stride <= config.history_frames < last_frame - stride + 2 * stride
        moved = z_BCTHW.clone()
        moved[:, :, 1] += 0.5
        frames, others = (vae.frames(z, num_latents) for z in (z_BCTHW, moved))
        reached = torch.nonzero(_differs(frames, others))
        assert int(reached.min()) == 1
        assert -(-int(reached.max()) // stride) - 1 <= config.history_latents


def _differs(one_BCTHW: torch.Tensor, other_BCTHW: torch.Tensor) -> torch.Tensor:
    """Whether frames differ: bool (T,)."""
    return (one_BCTHW != other_BCTHW).transpose(0, 2).flatten(1).any(dim=1)


def test_wan_at_its_released_depth_looks_back_112_frames() -> None:
    for more in ({}, {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2, "z_dim": 48}):
        assert config_from({"_class_name": "AutoencoderKLWan", **more}).history_frames == 112


def test_other_classes_have_a_reason_and_refuse_streams_by_name() -> None:
    assert all(row.streams != bool(row.no_streams) for row in CLASSES.values())
    for name in ("hunyuan", "taesd"):
        config, vae = config_of(name), vae_of(name)
        num_frames, side = config.valid_frames(2), side_of(config)
        with pytest.raises(ValueError, match=f"{config.class_name} cannot encode a video piece by piece: "):
            vae.encode_stream(clips(1, num_frames, side))
        latents = torch.zeros(1, *config.payload(num_frames, side, side)[0].shape)
        with pytest.raises(ValueError, match=f"{config.class_name} cannot encode a video piece by piece: "):
            vae.decode_payload_stream({"latents": latents})
