"""Source of a tokenizer's weights; the only module that loads them for the pipeline and takes their digest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self, cast

import torch

from vidshard.models.tokenizer import FAMILIES, Tokenizer, TokenizerConfig
from vidshard.models.vidtok.prepared import prepare_passes
from vidshard.models.weights import NoAveragesError, load_tokenizer, weights_digest
from vidshard.pipeline import storage
from vidshard.schemas.errors import UserError
from vidshard.schemas.text import readable
from vidshard.schemas.tokens import Normalization

PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Dtypes of the weights and maps of a tokenizer, by name of the precision setting. In tf32 the products of a GPU take
the upper 10 of 23 bits of a float32 mantissa (`pipeline.devices.make_reproducible`); a CPU computes it in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerSource:
    """Tokenizer that any process can load: config, location of the weights, and their expected digest."""

    config: TokenizerConfig
    weights: str | None
    """Path or URL; None for seeded random weights. A file of the Hugging Face Hub is pinned to its commit, so that all
    processes load the same one."""
    ema: bool = False
    """Whether to load the averaged weights of the file."""
    seed: int | None = None
    """Seed of random weights; None with a file."""
    sha256: str = ""
    """Digest that the weights must have; empty to accept any."""
    cached_only: bool = False
    """Whether nothing is fetched over the network, as an output names the location and not the user."""
    normalization: Normalization | None = None
    """Numbers by which trainers standardize the latents, once `with_digest` has read the weights."""

    @classmethod
    def stored(
        cls, config: TokenizerConfig, *, source: str, ema: bool, sha256: str, weights: str | None = None
    ) -> TokenizerSource:
        """Make the source that an output records.

        Args:
            config: config of its tokenizer.
            source: ``weights_source`` of its provenance: a path, a URL, or ``seed:N``.
            ema: whether its run loaded averaged weights.
            sha256: digest of its weights.
            weights: present location of the weights; None for ``source``.
        """
        if weights is None and source.startswith("seed:"):
            text = source.removeprefix("seed:")
            if not (text.isascii() and text.isdigit() and len(text) <= 10):
                raise UserError(f"the output states weights of the seed {readable(text, 80)!r}, which is no number")
            return cls(config=config, weights=None, seed=int(text), sha256=sha256)
        return cls(config=config, weights=weights or source, ema=ema, sha256=sha256, cached_only=weights is None)

    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Tokenizer:
        """Load the tokenizer, ready to encode and decode.

        The digest is taken of the float32 weights, before any cast, so it is the same in every precision.

        Raises:
            UserError: there is no such file, its weights do not fit the config, or they have another digest.
        """
        try:
            tokenizer, digest = self._load()
        except (ValueError, FileNotFoundError, storage.StorageError) as error:
            raise UserError(str(error)) from error
        if self.sha256 not in ("", digest):
            remedy = "give the file that was used, or start a new output"
            if (self.weights or "").startswith(storage.SHIPPED_SCHEME):
                remedy = (
                    "this version of vidshard comes with other weights: give those of the version that wrote it, "
                    f"models/shipped/{self.config.name}.safetensors there, with --weights, or start a new output"
                )
            raise UserError(
                f"the weights in {storage.public_uri(self.weights or 'memory')} are not those expected: their SHA-256 "
                f"is {digest}, expected {self.sha256}; {remedy}"
            )
        tokenizer = tokenizer.set_precision(dtype).to(device)
        prepare_passes(cast(torch.nn.Module, tokenizer))
        return tokenizer

    def with_digest(self) -> Self:
        """Copy of this source with the digest of its present weights, and their normalization.

        Raises:
            UserError: as :meth:`load`.
        """
        try:
            tokenizer, digest = self._load()
            normalization = FAMILIES[self.config.family].normalization(self.config, tokenizer.state_dict())
            return replace(self, sha256=digest, normalization=normalization)
        except (ValueError, FileNotFoundError, storage.StorageError) as error:
            raise UserError(str(error)) from error

    def _load(self) -> tuple[Tokenizer, str]:
        with storage.local_copy(self.weights, cached_only=self.cached_only) as path:
            try:
                tokenizer = load_tokenizer(self.config, path, seed=self.seed, ema=self.ema)
            except NoAveragesError:
                if not self.sha256:
                    raise
                # `vidshard convert --ema` keeps only the averages, as plain weights; the caller checks the digest
                tokenizer = load_tokenizer(self.config, path, seed=self.seed)
        return tokenizer, weights_digest(tokenizer.state_dict())
