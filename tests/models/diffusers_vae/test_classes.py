"""Every class of the table, in a tiny configuration: what is derived of it, against the class itself."""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed (pip install -e '.[dev]')")

import diffusers

from tests.support.vae_configs import CONFIGS, clips, config_of, side_of, vae_of
from tests.support.vae_golden import golden_path, summary
from vidshard.models.diffusers_vae.classes import CLASSES, EXCLUDED
from vidshard.models.diffusers_vae.config import DiffusersConfig
from vidshard.models.diffusers_vae.derive import check_clip, config_from
from vidshard.models.diffusers_vae.library import find_network
from vidshard.models.tokenizer import FAMILIES, parse_config

pytestmark = pytest.mark.usefixtures("one_thread")

REMAKE = "tests.models.diffusers_vae.golden.remake"
LENGTHS = {
    "allegro": (24,),
    "minimax": (1, 5, 17, 22, 23),
    "kvae-video": (1, 4, 5, 17, 21),
    "cosmos": (1, 8, 9),
    "ltx": (1, 8, 9),
    "ltx-2": (1, 8, 9),
    "hunyuan": (1, 4, 5, 13),
    "cogvideox": (1, 4, 8, 9, 12, 16),
    "mochi": (1, 6, 7, 17, 19),
}
"""Lengths to try, taken or not; those of other classes are 1, r and 1 + r."""


def passes(name: str, num_frames: int) -> tuple[int, ...]:
    """Shape of what the class itself decodes from what it encodes, without the checks of ours; () if it raises."""
    config, vae = config_of(name), vae_of(name)
    x_BCTHW = clips(1, num_frames, side_of(config))
    with torch.inference_mode():
        try:
            if config.row.streams:
                z_BCTHW = vae.vae.encode(x_BCTHW).latent_dist.mode()  # type: ignore[operator]
                return tuple(vae.vae.decode(z_BCTHW).sample.shape)  # type: ignore[operator]
            z_BCTHW = vae.moments(x_BCTHW)[0]
            return tuple(vae.frames(z_BCTHW, num_frames).shape)
        except (RuntimeError, ValueError, IndexError):
            vae_of.cache_clear()  # some classes stay broken
            return ()


def test_every_class_of_the_table_has_a_tiny_configuration_and_exists() -> None:
    assert {record["_class_name"] for record in CONFIGS.values()} == set(CLASSES)
    for name in CLASSES:
        assert find_network(name).__name__ == name
    assert not set(CLASSES) & set(EXCLUDED)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_length_is_taken_if_and_only_if_the_class_gives_all_frames_back(name: str) -> None:
    config = config_of(name)
    stride, side = config.time_stride, side_of(config)
    for num_frames in LENGTHS.get(name, (1, stride, 1 + stride)):
        comes_back = passes(name, num_frames) == (1, 3, num_frames, side, side)
        try:
            shape = config.payload(num_frames, side, side)[0].shape
        except ValueError:
            assert not comes_back, num_frames
            assert num_frames not in (config.valid_frames(n) for n in range(1, 10)), num_frames
            continue
        assert comes_back, num_frames
        with torch.inference_mode():
            assert tuple(vae_of(name).moments(clips(1, num_frames, side))[0].shape[1:]) == shape
        assert config.decoded_frames(shape[1]) == num_frames
    if name in ("wan-2.2", "minimax", "taesd"):  # passes on the meta device are slow
        check_clip(config, config.valid_frames(2), side, side)


@pytest.mark.parametrize("name", CONFIGS)
def test_encoding_and_decoding_are_deterministic_and_a_clip_does_not_depend_on_its_batch(name: str) -> None:
    config, vae = config_of(name), vae_of(name)
    num_frames, side = config.valid_frames(2), side_of(config)
    two_BCTHW = clips(2, num_frames, side)
    with torch.inference_mode():
        both = vae.encode(two_BCTHW)
        alone = vae.encode(two_BCTHW[1:].clone())
        assert set(alone.payload) == {column.name for column in config.payload(num_frames, side, side)} | (
            {"latents_logvar"} if config.has_logvar else set()
        )
        for column, values in alone.payload.items():
            assert values.dtype is torch.float32
            assert torch.equal(both.payload[column][1:], values), column
        decoded = vae.decode_payload(both.payload, num_frames)
        assert decoded.shape == (2, 3, num_frames, side, side)
        assert torch.equal(vae.decode_payload(alone.payload), decoded[1:])


@pytest.mark.parametrize("name", CONFIGS)
def test_latents_and_frames_are_those_that_this_version_of_diffusers_gave(name: str) -> None:
    path = golden_path()
    if not path.is_file():
        pytest.skip(f"no golden values of diffusers {diffusers.__version__}: python -m {REMAKE}")
    with np.load(path) as golden:
        for key, values in summary(name).items():
            expected = golden[f"{name}/{key}"]
            assert values.shape == expected.shape
            error = np.sqrt(np.mean((values - expected) ** 2)) / np.sqrt(np.mean(expected**2))
            assert error < 1e-4, key


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_comes_back_from_its_record_with_the_same_identity(name: str) -> None:
    config = config_of(name)
    again = parse_config(json.loads(config.model_dump_json()))
    assert (again, again.identity, hash(again)) == (config, config.identity, hash(config))
    assert config.flags == dict(CLASSES[config.class_name].flags)
    vae = vae_of(name)
    assert {flag: getattr(vae.vae, flag) for flag in config.flags} == config.flags


@pytest.mark.parametrize(
    ("name", "num_frames", "kept", "nearest"), [("wan-2.1", 19, 17, "17 or 21"), ("mochi", 17, 13, "13 or 19")]
)
def test_lengths_of_which_the_class_drops_frames_are_refused(
    name: str, num_frames: int, kept: int, nearest: str
) -> None:
    assert passes(name, num_frames)[2] == kept
    with pytest.raises(ValueError, match=f"got {num_frames}; .* nearest: {nearest}"):
        vae_of(name).encode(clips(1, num_frames, side_of(config_of(name))))


def test_lengths_of_which_hunyuan_video_blends_pieces_are_refused() -> None:
    config, vae = config_of("hunyuan"), vae_of("hunyuan")
    x_BCTHW = clips(1, 21, side_of(config))
    with torch.inference_mode():
        blended = vae.moments(x_BCTHW)[0]
        vae.vae.use_framewise_encoding = False  # type: ignore[assignment]
        whole = vae.moments(x_BCTHW)[0]
        vae.vae.use_framewise_encoding = True  # type: ignore[assignment]
    assert (blended - whole).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"got 21; .* nearest: 13"):
        vae.encode(x_BCTHW)
    with pytest.raises(ValueError, match=r"got 17; .* nearest: 13"):
        config.payload(17, 16, 16)
    with pytest.raises(ValueError, match="the longest clip has 13 frames"):
        config.valid_frames(17)


@pytest.mark.parametrize(
    ("num_frames", "height", "width", "nearest"),
    [(24, 120, 128, "128"), (24, 128, 168, "128 or 176"), (16, 128, 128, "24"), (32, 128, 128, "24 or 40")],
)
def test_clips_of_which_allegro_leaves_out_pixels_are_refused(
    num_frames: int, height: int, width: int, nearest: str
) -> None:
    config, vae = config_of("allegro"), vae_of("allegro")
    assert (config.smallest_side, config.side_steps) == (128, (8, 48))
    x_BCTHW = torch.zeros(1, 3, num_frames, height, width)
    changed = x_BCTHW.clone()
    changed[:, :, -4:, -8:, -8:] = 1.0
    with torch.inference_mode():
        assert torch.equal(vae.moments(x_BCTHW)[0], vae.moments(changed)[0])
    with pytest.raises(ValueError, match=f"nearest: {nearest}$"):
        vae.encode(x_BCTHW)


def test_released_allegro_takes_frames_of_its_cubes_alone() -> None:
    released = config_from({"_class_name": "AutoencoderKLAllegro"})
    assert released.payload(88, 720, 1280)[0].shape == (4, 22, 90, 160)
    with pytest.raises(ValueError, match=r"height must be 320 .* got 256; nearest: 320"):
        released.payload(24, 256, 320)


def test_pixels_are_standardized_where_the_class_wants_it() -> None:
    vae = vae_of("minimax")
    x_BCTHW = clips(1, 22, side_of(config_of("minimax")))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1, 1)
    with torch.inference_mode():
        z_BCTHW = vae.vae.encode(((x_BCTHW + 1) / 2 - mean) / std).latent_dist.mode()  # type: ignore[operator]
        torch.testing.assert_close(vae.encode(x_BCTHW).mean, z_BCTHW)
        decoded: Tensor = vae.vae.decode(z_BCTHW).sample  # type: ignore[operator]
        torch.testing.assert_close(vae.decode_payload({"latents": z_BCTHW}), (decoded * std + mean) * 2 - 1)
    with pytest.raises(ValueError, match="computes in float32 only"):
        vae.set_precision(torch.bfloat16)


SCALED = {
    "wan-2.1": ([0.5, -0.25, 1.0], [2.0, 4.0, 0.5], 1.0, 0.0),
    "hunyuan": ([0.0] * 3, [1.0] * 3, 0.5, 0.0),
    "cogvideox": ([0.0] * 3, [1.0] * 3, 0.75, 0.0),
    "sd": ([0.0] * 2, [1.0] * 2, 0.18215, 0.25),
    "cosmos": (
        [[0.25, 0.5, 0.75, 1.0], [-0.25, -0.5, -0.75, -1.0]],
        [[1.0, 2.0, 3.0, 4.0], [0.5, 1.5, 2.5, 3.5]],
        1,
        0,
    ),
    "dc": None,
}


@pytest.mark.parametrize("name", SCALED)
def test_the_numbers_by_which_trainers_scale_are_known(name: str) -> None:
    found = FAMILIES["diffusers"].normalization(config_of(name), vae_of(name).state_dict())
    expected = SCALED[name]
    if expected is None:
        assert found is None
        return
    assert found is not None
    record = found.record()
    assert (record["mean"], record["std"], record["scale"], record["shift"]) == expected
    assert record["per_latent_frame"] == (name == "cosmos")


@pytest.mark.parametrize("name", ["ltx", "ltx-2"])
def test_the_numbers_of_ltx_are_those_of_its_weights(name: str) -> None:
    state = vae_of(name).state_dict()
    found = FAMILIES["diffusers"].normalization(config_of(name), state)
    assert found is not None
    assert [values[0] for values in found.mean] == state["latents_mean"].tolist()
    assert [values[0] for values in found.std] == state["latents_std"].tolist()


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "another class": ({"_class_name": "Pipeline"}, "is not a class that is taken; there are: AutoencoderKLWan"),
    "a class that is no name": ({"_class_name": ["AutoencoderKLWan"]}, "is not a class that is taken"),
    "no class": ({}, "None is not a class that is taken"),
    "remote code": ({"_class_name": "MyVae", "auto_map": {"AutoModel": "vae.MyVae"}}, "is not a class that is taken"),
    "a class of ours": ({"_class_name": "AutoencoderVidTok"}, "a family of their own"),
    "a huge network": ({"_class_name": "AutoencoderKLWan", "num_res_blocks": 60_000}, "has more than 5,000 tensors"),
    "a wide network": ({"_class_name": "AutoencoderKLWan", "base_dim": 60_000}, "has more than .* values"),
    "a huge number": ({"_class_name": "AutoencoderKLWan", "base_dim": 10**30}, "at most 65,536 are allowed"),
    "no number": ({"_class_name": "AutoencoderKLWan", "base_dim": float("nan")}, "has the number nan"),
    "many values": ({"_class_name": "AutoencoderKLWan", "dim_mult": [1] * 30_000}, "more than 20,000 values"),
    "deep values": ({"_class_name": "AutoencoderKLWan", "dim_mult": json.loads("[" * 40 + "]" * 40)}, "levels deep"),
    "a path": ({"_class_name": "AutoencoderKL", "act_fn": "../../x"}, "where a number, a name or a list should be"),
    "a wrong type": ({"_class_name": "AutoencoderKLWan", "dim_mult": "wide"}, "describes no AutoencoderKLWan"),
    "an unknown block": ({"_class_name": "AutoencoderKL", "down_block_types": ["Nothing"]}, "describes no Autoenc"),
    "a missing setting": ({"_class_name": "AutoencoderKLQwenImage21"}, "is not taken: it takes single images"),
    "gray frames": ({"_class_name": "AutoencoderKL", "in_channels": 1}, "in_channels 1 is not taken"),
    "another stride in time": (
        {"_class_name": "AutoencoderKLWan", "temperal_downsample": [True, True, True]},
        "no clip of more than one frame comes back whole",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_config_that_describes_no_class_of_the_list_is_refused_by_name(what: str) -> None:
    record, message = HOSTILE[what]
    with pytest.raises(ValueError, match=message):
        config_from(record)


def test_a_setting_that_the_class_does_not_take_is_ignored_by_name() -> None:
    config = config_from({**CONFIGS["wan-2.1"], "clip_output": False})
    assert config.ignored_settings == ("clip_output",)
    assert config.config_sha256 != config_of("wan-2.1").config_sha256
    assert "clip_output" not in config.settings


def test_released_wan_is_known_without_weights() -> None:
    wan = config_from({"_class_name": "AutoencoderKLWan"})
    assert wan.payload(81, 480, 832)[0].shape == (16, 21, 60, 104)
    assert (wan.time_stride, wan.space_stride, wan.history_frames) == (4, 8, 112)
    assert DiffusersConfig.model_validate(wan.model_dump()) == wan
