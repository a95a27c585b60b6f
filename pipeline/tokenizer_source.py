"""Where a tokenizer's weights come from, and the one place that loads them and takes their digest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch

from vidshard.models.tokenizer import Tokenizer, TokenizerConfig
from vidshard.models.weights import NoAveragesError, load_tokenizer, weights_digest
from vidshard.pipeline import storage
from vidshard.schemas.errors import UserError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes that encoders compute in, by the name of the setting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSource:
    """A tokenizer that can be loaded anywhere: its config, its weights, and what they must be."""

    config: TokenizerConfig
    weights: str | None
    """Path or URL; None for seeded random weights. A file of the Hub is named by its commit, so that all processes load
    the same one."""
    ema: bool = False
    """Whether to take the averaged weights of the file."""
    seed: int | None = None
    """Seed of random weights; None with a file."""
    sha256: str = ""
    """Digest that the weights must have; empty before they were first loaded."""

    @classmethod
    def stored(
        cls, config: TokenizerConfig, *, source: str, ema: bool, sha256: str, weights: str | None = None
    ) -> TokenizerSource:
        """The source that an output records.

        Args:
            source: ``weights_source`` of its provenance: a path, a URL, or ``seed:N``.
            weights: where the weights are now; None for where the output says.
        """
        if weights is None and source.startswith("seed:"):
            return cls(config=config, weights=None, seed=int(source.removeprefix("seed:")), sha256=sha256)
        return cls(config=config, weights=weights or source, ema=ema, sha256=sha256)

    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Tokenizer:
        """The tokenizer, ready to encode and decode.

        The digest is taken of the float32 weights, before any cast: it is the same in every precision.

        Raises:
            UserError: no such file, weights that do not fit the config, or others than expected.
        """
        try:
            tokenizer, digest = self._load()
        except (ValueError, FileNotFoundError, storage.StorageError) as error:
            raise UserError(str(error)) from error
        if self.sha256 not in ("", digest):
            raise UserError(
                f"the weights in {storage.public_uri(self.weights or 'memory')} are not those expected: their SHA-256 "
                f"is {digest}, expected {self.sha256}; give the file that was used, or start a new output"
            )
        return tokenizer.set_precision(dtype).to(device)

    def with_digest(self) -> Self:
        """The same source, bound to the weights that it holds now.

        Raises:
            UserError: as :meth:`load`.
        """
        try:
            return replace(self, sha256=self._load()[1])
        except (ValueError, FileNotFoundError, storage.StorageError) as error:
            raise UserError(str(error)) from error

    def _load(self) -> tuple[Tokenizer, str]:
        with storage.local_copy(self.weights) as path:
            try:
                tokenizer = load_tokenizer(self.config, path, seed=self.seed, ema=self.ema)
            except NoAveragesError:
                if not self.sha256:
                    raise
                # `vidshard convert --ema` keeps nothing but the averages; the digest tells whether these are they
                tokenizer = load_tokenizer(self.config, path, seed=self.seed)
        return tokenizer, weights_digest(tokenizer.state_dict())
