"""A tokenizer that takes time without taking a core, for tests of what piles up before an encoder."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidshard.models.tokenizer import Tokenizer
from vidshard.models.vidtok.heads import Encoded
from vidshard.pipeline.tokenizer_source import TokenizerSource

CLIP_SECONDS = 0.08


@dataclass(frozen=True, kw_only=True, slots=True)
class SlowSource(TokenizerSource):
    """Source of a tokenizer whose clips take ``CLIP_SECONDS`` each, and whose tokens are zeros."""

    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Tokenizer:
        tokenizer = TokenizerSource.load(self, device, dtype)

        def encode(x_BCTHW: Tensor, **_: Any) -> Encoded:
            time.sleep(CLIP_SECONDS * len(x_BCTHW))
            [column] = tokenizer.config.payload(*x_BCTHW.shape[2:])
            tokens = torch.zeros(len(x_BCTHW), *column.shape, dtype=torch.int32)
            return Encoded(latents=tokens[:, None].float(), tokens=tokens)

        tokenizer.encode = encode  # type: ignore[method-assign]
        return tokenizer
