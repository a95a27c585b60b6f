"""Counting tokens piece by piece gives what counting them at once gives."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.metrics import MAX_CODEBOOK, CodebookUse


@given(tokens=st.lists(st.integers(0, 19), min_size=1), cut=st.integers(0, 50))
def test_pieces_give_what_the_whole_gives(tokens: list[int], cut: int) -> None:
    use = CodebookUse(20)
    use.update(np.array(tokens[:cut], np.uint8))
    use.update(np.array(tokens[cut:], np.uint16))
    shares = [tokens.count(token) / len(tokens) for token in {*tokens}]
    assert use.num_tokens == len(tokens)
    assert use.num_used == len(shares)
    assert use.utilisation == len(shares) / 20
    assert use.entropy_bits == pytest.approx(-sum(p * math.log2(p) for p in shares), abs=1e-9)
    assert use.perplexity == pytest.approx(2**use.entropy_bits)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.int64])
def test_an_even_use_has_the_bits_of_the_codebook(dtype: type[np.integer]) -> None:
    use = CodebookUse(64)
    use.update(np.arange(64).reshape(4, 4, 4).astype(dtype))
    assert (use.utilisation, use.entropy_bits, use.perplexity) == (1.0, 6.0, 64.0)


def test_before_any_token_nothing_is_used() -> None:
    use = CodebookUse(8)
    use.update(np.zeros((0, 4), np.uint8))
    assert (use.num_tokens, use.num_used, use.utilisation, use.entropy_bits) == (0, 0, 0.0, 0.0)


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
