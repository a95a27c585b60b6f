"""Use of a codebook: tokens are counted as they arrive.

Memory is one counter for each entry of the codebook, however many tokens there are. Loads no torch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MAX_CODEBOOK = 1 << 27
"""Largest codebook whose use is counted; the counters then take 1 GiB."""


class CodebookUse:
    """Running count of tokens.

    Args:
        codebook_size: tokens are below it; 8 bytes are kept for each.
    """

    def __init__(self, codebook_size: int) -> None:
        if not 1 <= codebook_size <= MAX_CODEBOOK:
            raise ValueError(f"the use of codebooks of 1 ... {MAX_CODEBOOK} tokens is counted, got {codebook_size}")
        self.codebook_size = codebook_size
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
        # bincount ends at the largest token of this batch.
        counted = np.bincount(flat.astype(np.int64, copy=False))
        self.counts[: counted.size] += counted

    @property
    def num_tokens(self) -> int:
        """Number of tokens counted."""
        return int(self.counts.sum())

    @property
    def num_used(self) -> int:
        """Number of different tokens that occurred."""
        return int(np.count_nonzero(self.counts))

    @property
    def utilization(self) -> float:
        """Share of the codebook that occurred, in [0, 1]."""
        return self.num_used / self.counts.size

    @property
    def ceiling(self) -> int:
        """Largest number of different tokens that could have occurred: tokens counted, at most the codebook."""
        return min(self.num_tokens, self.counts.size)

    @property
    def share_of_ceiling(self) -> float:
        """Share of `ceiling` that occurred, in [0, 1]; 0 before the first token.

        Few positions cannot use a large codebook: 72 tokens of 32,768 are 0.2 % of the codebook and all that could be.
        """
        return self.num_used / max(self.ceiling, 1)

    @property
    def entropy_bits(self) -> float:
        """Entropy of the token frequencies, in [0, log2 of the codebook size]; 0 before the first token."""
        counts = self.counts[self.counts > 0]
        share = counts / max(counts.sum(), 1)
        return float(max(0.0, -(share * np.log2(share)).sum()))

    @property
    def perplexity(self) -> float:
        """2 to the power of the entropy in bits: the number of equally frequent tokens with the same entropy."""
        return float(2.0**self.entropy_bits)
