"""Budget of a pass: FLOPs, kernels and bytes, so that a lost fusion or another copy is noticed."""

from __future__ import annotations

import pytest
import torch

from vidshard.models.cost import MOST_VALUES, CostCounter, decoding_cost, encoding_cost
from vidshard.models.tokenizer import get_preset
from vidshard.models.vidtok import fused
from vidshard.models.vidtok.layers import (
    TIME_RULES,
    ChannelNorm,
    Normed,
    SpatialUnit,
    TimeUnit,
    in_two_kernels,
    takes_two_kernels,
)


def test_the_large_encoder_costs_what_the_roofline_says() -> None:
    cost = encoding_cost(get_preset("fsq_causal_488_32768"), 17, 256, 256)
    assert cost.flops == pytest.approx(5.824e12, rel=1e-3)
    assert cost.kernels <= 152
    assert cost.traffic_bytes <= 24.9e9
    assert cost.largest_map == 22 * 256 * 256 * 128  # 17 frames become 20, and 22 with the context before them


def test_the_large_decoder_costs_what_the_roofline_says() -> None:
    cost = decoding_cost(get_preset("fsq_causal_488_32768"), 17, 256, 256)
    assert cost.flops == pytest.approx(10.706e12, rel=1e-3)
    assert cost.kernels <= 205
    assert cost.traffic_bytes <= 37.7e9


def test_without_the_fused_kernels_both_cost_far_more_memory_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "is_used", lambda x, weight: False)
    cost = encoding_cost.__wrapped__(get_preset("fsq_causal_488_32768"), 17, 256, 256)
    decoding = decoding_cost.__wrapped__(get_preset("fsq_causal_488_32768"), 17, 256, 256)
    assert 230 <= cost.kernels <= 236
    assert 41e9 <= cost.traffic_bytes <= 41.3e9
    assert 340 <= decoding.kernels <= 347
    assert 69e9 <= decoding.traffic_bytes <= 69.3e9


@pytest.mark.parametrize("taps", [3, 9])
def test_a_unit_whose_convolutions_compute_the_norms_moves_each_map_once(taps: int) -> None:
    with torch.device("meta"):
        unit = TimeUnit(128, (3,), TIME_RULES["causal-v1.0"]) if taps == 3 else SpatialUnit(128, 128)
        norm = ChannelNorm(128).half()
        x = torch.empty(1, 20, 64, 64, 128, dtype=torch.float16)
    with torch.inference_mode(), CostCounter() as counter:
        assert takes_two_kernels(unit.half(), x)
        in_two_kernels(unit, Normed(x, x), norm)
        cost = counter.cost()
    assert cost.kernels == 2
    assert cost.traffic_bytes == pytest.approx(6 * 2 * x.numel(), rel=0.01)  # 2 inputs, 2 results, residual and sum
    assert cost.flops == 2 * 2 * x.numel() * 128 * taps


def test_the_large_networks_cost_what_the_roofline_says_with_norms_in_the_convolutions() -> None:
    config = get_preset("fsq_causal_488_32768")
    encoding = encoding_cost(config, 17, 256, 256, fuses_convolutions=True)
    decoding = decoding_cost(config, 17, 256, 256, fuses_convolutions=True)
    assert encoding.flops == pytest.approx(5.824e12, rel=1e-3)
    assert decoding.flops == pytest.approx(10.706e12, rel=1e-3)
    assert (encoding.kernels, decoding.kernels) == (126, 182)
    assert encoding.traffic_bytes <= 17.4e9
    assert decoding.traffic_bytes <= 27.3e9


def test_float32_and_wide_maps_keep_their_kernels() -> None:
    config = get_preset("fsq_causal_488_32768")
    plain = encoding_cost(config, 17, 64, 64, torch.float32)
    assert encoding_cost(config, 17, 64, 64, torch.float32, fuses_convolutions=True) == plain
    with torch.device("meta"):
        assert not takes_two_kernels(SpatialUnit(512, 512).half(), torch.empty(1, 1, 8, 8, 512, dtype=torch.float16))


@pytest.mark.parametrize("size", [(128, 96), (96, 128)])
def test_cost_grows_with_the_area_of_the_frames(size: tuple[int, int]) -> None:
    config = get_preset("fsq_causal_488_small")
    one, four = (encoding_cost(config, 17, size[0] * side, size[1] * side) for side in (1, 2))
    assert four.largest_map == 4 * one.largest_map
    assert 3.8 < four.traffic_bytes / one.traffic_bytes < 4.1
    assert four.largest_map < MOST_VALUES


def test_overwritten_inputs_are_counted_as_written_and_outputs_as_not_read() -> None:
    x, y = (torch.empty(10, device="meta") for _ in range(2))
    with CostCounter() as counter:
        torch.add(x, y, out=torch.empty(10, device="meta"))
        assert counter.cost().traffic_bytes == 3 * 40
        x.add_(y)
        assert counter.cost().traffic_bytes == 6 * 40


@pytest.mark.parametrize("name", ["tiny", "tiny_kl", "vq_causal_488_262144", "lfq_causal_488_262144", "vidtwin_tiny"])
def test_the_cost_of_a_network_of_each_head_and_family_can_be_counted(name: str) -> None:
    config = get_preset(name)
    size = config.default_clip if config.parts else (5, 64, 64)
    assert encoding_cost(config, *size).flops > 0
    assert decoding_cost(config, *size).flops > 0
