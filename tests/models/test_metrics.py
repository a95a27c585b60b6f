"""Counting tokens piece by piece gives what counting them at once gives; pictures are compared by the formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidshard.models.codebook_use import MAX_CODEBOOK, CodebookUse
from vidshard.models.metrics import psnr, ssim


@given(tokens=st.lists(st.integers(0, 19), min_size=1), cut=st.integers(0, 50))
def test_pieces_give_what_the_whole_gives(tokens: list[int], cut: int) -> None:
    use = CodebookUse(20)
    use.update(np.array(tokens[:cut], np.uint8))
    use.update(np.array(tokens[cut:], np.uint16))
    shares = [tokens.count(token) / len(tokens) for token in {*tokens}]
    assert use.num_tokens == len(tokens)
    assert use.num_used == len(shares)
    assert use.utilization == len(shares) / 20
    assert use.entropy_bits == pytest.approx(-sum(p * math.log2(p) for p in shares), abs=1e-9)
    assert use.perplexity == pytest.approx(2**use.entropy_bits)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.int64])
def test_an_even_use_has_the_bits_of_the_codebook(dtype: type[np.integer]) -> None:
    use = CodebookUse(64)
    use.update(np.arange(64).reshape(4, 4, 4).astype(dtype))
    assert (use.utilization, use.entropy_bits, use.perplexity) == (1.0, 6.0, 64.0)


def test_before_any_token_nothing_is_used() -> None:
    use = CodebookUse(8)
    use.update(np.zeros((0, 4), np.uint8))
    assert (use.num_tokens, use.num_used, use.utilization, use.entropy_bits) == (0, 0, 0.0, 0.0)


@pytest.mark.parametrize("tokens", [[8], [-1, 3], [0.5]])
def test_what_is_no_token_is_refused_and_leaves_no_trace(tokens: list[float]) -> None:
    use = CodebookUse(8)
    with pytest.raises(ValueError, match="tokens must"):
        use.update(np.array(tokens))
    assert use.num_tokens == 0


@pytest.mark.parametrize("size", [0, MAX_CODEBOOK + 1])
def test_a_codebook_too_large_to_count_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="codebooks of 1"):
        CodebookUse(size)


def frames(count: int, height: int, width: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_is_that_of_pictures_cut_to_their_range() -> None:
    real = torch.stack([torch.zeros(3, 4, 4), torch.full((3, 4, 4), 1.0)])
    fake = torch.stack([torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 1.7)])
    # 0.2 of a range of 2 is 0.1 of 1: 20 dB; beyond white is white
    assert psnr(real, fake).tolist() == pytest.approx([20.0, 80.0], abs=1e-3)


def test_ssim_is_the_formula_window_by_window() -> None:
    real, noise = frames(1, 13, 14, seed=0), frames(1, 13, 14, seed=1)
    fake = (real + 0.3 * noise).clamp(-1, 1)
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    x, y = (((picture[0].numpy().astype(np.float64)) + 1) / 2 for picture in (real, fake))
    values = []
    for color in range(3):
        for row in range(3):
            for column in range(4):
                a, b = (picture[color, row : row + 11, column : column + 11] for picture in (x, y))
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                cab = (window * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + 1e-4) * (2 * cab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    assert ssim(real, fake).item() == pytest.approx(float(np.mean(values)), abs=1e-5)


def test_ssim_of_equal_frames_is_one_and_large_frames_are_averaged_first() -> None:
    large, other = frames(2, 384, 386, seed=2), frames(2, 384, 386, seed=3)
    torch.testing.assert_close(ssim(large, large), torch.ones(2))
    halves = [torch.nn.functional.avg_pool2d(picture, 2) for picture in (large, other)]
    torch.testing.assert_close(ssim(large, other), ssim(*halves), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(frames(1, 10, 20, seed=0), frames(1, 10, 20, seed=1))
