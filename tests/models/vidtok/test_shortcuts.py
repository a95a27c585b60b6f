"""Haar bands at the ends of a network, and shortcuts around its resampling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from vidshard.models.vidtok.config import PRESETS, VidTokConfig
from vidshard.models.vidtok.haar import haar, inverse_haar
from vidshard.models.vidtok.model import VidTok
from vidshard.models.vidtok.shortcuts import regrouped, shortcut
from vidshard.models.weights import load_tokenizer


def test_the_haar_transform_is_undone_exactly_and_keeps_lengths() -> None:
    frames_BTHWC = torch.randint(0, 256, (2, 3, 8, 6, 3)).double()
    bands_BTHWC = haar(frames_BTHWC)
    assert bands_BTHWC.shape == (2, 3, 4, 3, 12)
    assert torch.equal(inverse_haar(bands_BTHWC), frames_BTHWC)
    assert torch.equal(haar(inverse_haar(bands_BTHWC)), bands_BTHWC)
    assert bands_BTHWC.square().sum() == frames_BTHWC.square().sum()
    means_BTHWC = frames_BTHWC.view(2, 3, 4, 2, 3, 2, 3).mean((3, 5))
    assert torch.equal(bands_BTHWC[..., :3], 2 * means_BTHWC)


def test_shortcuts_are_those_of_dc_ae() -> None:
    """`pixel_unshuffle` and a mean of groups of channels; repeated channels and `pixel_shuffle`."""
    x_BTHWC = torch.randn(2, 3, 4, 6, 8)
    x_FCHW = x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2)
    down_BTHWC = shortcut(x_BTHWC, torch.Size((2, 3, 2, 3, 16)))
    expected = F.pixel_unshuffle(x_FCHW, 2).view(6, 16, 2, 2, 3).mean(2)
    assert torch.equal(down_BTHWC.flatten(0, 1), expected.permute(0, 2, 3, 1))
    up_BTHWC = shortcut(x_BTHWC, torch.Size((2, 3, 8, 12, 4)))
    expected = F.pixel_shuffle(x_FCHW.repeat_interleave(2, dim=1), 2)
    assert torch.equal(up_BTHWC.flatten(0, 1), expected.permute(0, 2, 3, 1))


def test_shortcuts_through_time_keep_frames_in_their_order() -> None:
    frames_BTHWC = torch.arange(6.0).view(1, 6, 1, 1, 1).expand(1, 6, 4, 4, 2)
    halved_BTHWC = shortcut(frames_BTHWC, torch.Size((1, 3, 2, 2, 4)))
    assert halved_BTHWC[0, :, 0, 0].tolist() == [[0, 1, 0, 1], [2, 3, 2, 3], [4, 5, 4, 5]]
    assert torch.equal(shortcut(halved_BTHWC, torch.Size((1, 6, 4, 4, 2))), frames_BTHWC)


@pytest.mark.parametrize(("before", "after"), [(6, 3), (3, 6), (6, 4), (4, 6)])
def test_regrouped_channels_keep_their_mean_and_order(before: int, after: int) -> None:
    x = torch.arange(float(before))
    assert torch.allclose(regrouped(x, after).mean(), x.mean())
    assert torch.all(regrouped(x, after).diff() >= 0)


def test_a_network_adds_its_shortcuts_in_the_encoder_and_in_the_decoder() -> None:
    """Shortcuts have no weights, so the same seed gives the same weights with and without them."""
    plain, other = (
        load_tokenizer(
            VidTokConfig.model_validate(PRESETS["tiny"].model_dump() | {"shortcuts": shortcuts}), None, seed=0
        )
        for shortcuts in (False, True)
    )
    assert isinstance(plain, VidTok)
    assert isinstance(other, VidTok)
    clip = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.inference_mode():
        z_BCTHW = plain.encoder_output(clip)
        assert not torch.allclose(other.encoder_output(clip), z_BCTHW, atol=1e-2)
        assert not torch.allclose(other.decode(z_BCTHW), plain.decode(z_BCTHW), atol=1e-2)


def test_a_config_of_before_has_neither_and_is_the_same_network() -> None:
    before = {k: value for k, value in PRESETS["tiny"].model_dump().items() if k not in ("haar_bands", "shortcuts")}
    config = VidTokConfig.model_validate(before)
    assert config == PRESETS["tiny"]
    assert not config.haar_bands
    assert not config.shortcuts


def test_interpolated_frames_take_no_shortcuts() -> None:
    with pytest.raises(ValueError, match=r"shortcuts repeat frames, and causal-v1\.1 interpolates them; give variant"):
        VidTokConfig.model_validate(PRESETS["tiny"].model_dump() | {"variant": "causal-v1.1", "shortcuts": True})
