"""Networks that `benchmarks.ladder` compares."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from benchmarks.ladder import table_row
from benchmarks.ladder_networks import VARIANTS, WithShortcut, build, check, haar, inverse_haar, regrouped
from vidshard.models.vidtok.layers import LayerPast


def test_the_haar_transform_is_undone_exactly_and_keeps_lengths() -> None:
    frames_BTHWC = torch.randint(0, 256, (2, 3, 8, 6, 3)).double()
    bands_BTHWC = haar(frames_BTHWC)
    assert bands_BTHWC.shape == (2, 3, 4, 3, 12)
    assert torch.equal(inverse_haar(bands_BTHWC), frames_BTHWC)
    assert torch.equal(haar(inverse_haar(bands_BTHWC)), bands_BTHWC)
    assert bands_BTHWC.square().sum() == frames_BTHWC.square().sum()
    means_BTHWC = frames_BTHWC.view(2, 3, 4, 2, 3, 2, 3).mean((3, 5))
    assert torch.equal(bands_BTHWC[..., :3], 2 * means_BTHWC)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_causal_on_the_same_grid_at_the_same_cost(name: str) -> None:
    check(VARIANTS[name])


def test_shortcuts_have_no_weights() -> None:
    for name in ("baseline", "haar"):
        plain = build(VARIANTS[name], 0).state_dict()
        other = build(VARIANTS["shortcuts" if name == "baseline" else f"{name}+shortcuts"], 0).state_dict()
        assert {name: weight.shape for name, weight in plain.items()} == {
            n: weight.shape for n, weight in other.items()
        }


class Zeros:
    """Layer that gives zeros of a shape."""

    def __init__(self, *shape: int) -> None:
        self._shape = shape

    def __call__(self, x_BTHWC: Tensor, past: LayerPast = ()) -> tuple[Tensor, LayerPast]:
        return x_BTHWC.new_zeros(self._shape), past


def test_shortcuts_are_those_of_dc_ae() -> None:
    """`pixel_unshuffle` and a mean of groups of channels; repeated channels and `pixel_shuffle`."""
    x_BTHWC = torch.randn(2, 3, 4, 6, 8)
    x_FCHW = x_BTHWC.flatten(0, 1).permute(0, 3, 1, 2)
    down_BTHWC, _ = WithShortcut([Zeros(2, 3, 2, 3, 16)])(x_BTHWC)
    expected = F.pixel_unshuffle(x_FCHW, 2).view(6, 16, 2, 2, 3).mean(2)
    assert torch.equal(down_BTHWC.flatten(0, 1), expected.permute(0, 2, 3, 1))
    up_BTHWC, _ = WithShortcut([Zeros(2, 3, 8, 12, 4)])(x_BTHWC)
    expected = F.pixel_shuffle(x_FCHW.repeat_interleave(2, dim=1), 2)
    assert torch.equal(up_BTHWC.flatten(0, 1), expected.permute(0, 2, 3, 1))


def test_shortcuts_through_time_keep_frames_in_their_order() -> None:
    frames_BTHWC = torch.arange(6.0).view(1, 6, 1, 1, 1).expand(1, 6, 4, 4, 2)
    halved_BTHWC, _ = WithShortcut([Zeros(1, 3, 2, 2, 4)])(frames_BTHWC)
    assert halved_BTHWC[0, :, 0, 0].tolist() == [[0, 1, 0, 1], [2, 3, 2, 3], [4, 5, 4, 5]]
    doubled_BTHWC, _ = WithShortcut([Zeros(1, 6, 4, 4, 2)])(halved_BTHWC)
    assert torch.equal(doubled_BTHWC, frames_BTHWC)


@pytest.mark.parametrize(("before", "after"), [(6, 3), (3, 6), (6, 4), (4, 6)])
def test_regrouped_channels_keep_their_mean_and_order(before: int, after: int) -> None:
    x = torch.arange(float(before))
    assert torch.allclose(regrouped(x, after).mean(), x.mean())
    assert torch.all(regrouped(x, after).diff() >= 0)


def test_a_variant_is_compared_with_the_baseline_of_the_same_seeds() -> None:
    def row(variant: str, seed: int, psnr: float) -> dict[str, str | int | float]:
        figures = {"halfway": 1.0, "PSNR dB": psnr, "generated": psnr, "entropy bits": 14.0, "core s / step": 0.3}
        return {"variant": variant, "seed": seed, **figures}

    rows = [row("baseline", 0, 20.0), row("haar", 0, 20.5), row("baseline", 1, 23.0), row("shortcuts", 2, 21.0)]
    assert table_row("haar", rows)["to baseline"] == "+0.50"
    assert table_row("shortcuts", rows)["to baseline"] == "-"
    baseline = table_row("baseline", rows)
    assert [baseline[name] for name in ("seeds", "PSNR dB", "from", "to", "bits")] == [2, 21.5, 20.0, 23.0, 18.0]
