"""How a codebook is used: which of its tokens occur, and how evenly.

Tokens are counted as they come by; what is kept is one number a token of the codebook, whatever their number.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MAX_CODEBOOK = 1 << 27
"""Larger codebooks are not counted: the counts would take more than 1 GiB."""


class CodebookUse:
    """A running count of tokens.

    Args:
        codebook_size: tokens are below it; 8 bytes are kept for each.
    """

    def __init__(self, codebook_size: int) -> None:
        if not 1 <= codebook_size <= MAX_CODEBOOK:
            raise ValueError(f"the use of codebooks of 1 ... {MAX_CODEBOOK} tokens is counted, got {codebook_size}")
        self.counts = np.zeros(codebook_size, np.int64)

    def update(self, tokens: npt.ArrayLike) -> None:
        """Count tokens: integers of any shape.

        Raises:
            ValueError: for other values, or a token outside the codebook; nothing is counted then.
        """
        flat = np.asarray(tokens).reshape(-1)
        if not flat.size:
            return
        if flat.dtype.kind not in "iu":
            raise ValueError(f"tokens must be integers, got {flat.dtype}")
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= self.counts.size:
            raise ValueError(f"tokens must lie in 0 ... {self.counts.size - 1}, got {low} ... {high}")
        # Beyond the largest token that came there is nothing to add.
        counted = np.bincount(flat.astype(np.int64, copy=False))
        self.counts[: counted.size] += counted

    @property
    def num_tokens(self) -> int:
        """How many were counted."""
        return int(self.counts.sum())

    @property
    def num_used(self) -> int:
        """How many different ones occurred."""
        return int(np.count_nonzero(self.counts))

    @property
    def utilisation(self) -> float:
        """Share of the codebook that occurred, in [0, 1]."""
        return self.num_used / self.counts.size

    @property
    def entropy_bits(self) -> float:
        """Entropy of the tokens' frequencies, in [0, log2 of the codebook size]; 0 before any came."""
        counts = self.counts[self.counts > 0]
        share = counts / max(counts.sum(), 1)
        return float(max(0.0, -(share * np.log2(share)).sum()))

    @property
    def perplexity(self) -> float:
        """As many equally frequent tokens would have the same entropy."""
        return float(2.0**self.entropy_bits)
