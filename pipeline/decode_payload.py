"""Decoding of stored payloads to frames: their tensors, and a clip within its continuous sequence."""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from vidshard.models.tokenizer import Tokenizer
from vidshard.schemas.tokenizers import TokenizerConfig


def to_tensors(payload: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """Convert the payload of one clip to a batch of one: int64 tokens, float32 latents, each (1, *shape)."""
    return {
        name: torch.from_numpy(values.astype(np.int64 if values.dtype.kind == "u" else np.float32))[None].to(
            tokenizer.device
        )
        for name, values in payload.items()
    }


def clips_before(config: TokenizerConfig, payload: Mapping[str, np.ndarray]) -> int:
    """Number of clips before one with this payload that its frames can depend on, in a continuous sequence."""
    return -(-config.history_latents // _num_latents(payload))


def decode_in_sequence(
    before: Sequence[Mapping[str, np.ndarray]],
    own: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray] | None,
    tokenizer: Tokenizer,
) -> torch.Tensor:
    """Decode a clip of a continuous sequence: floating (1, 3, T, H, W), of which frames beyond the clip's follow it.

    Args:
        before: payloads of the clips before it, in order; the sequence starts with the first of them.
        own: payload of the clip.
        after: payload of the clip after it, for a model that interpolates; None if the sequence ends.
    """
    config = tokenizer.config
    payloads = [*before, own]
    if config.lookahead_latents and after is not None:
        payloads.append({k: np.take(v, range(config.lookahead_latents), axis=-3) for k, v in after.items()})
    joined = {name: np.concatenate([payload[name] for payload in payloads], axis=-3) for name in own}
    decoded = tokenizer.decode_payload(to_tensors(joined, tokenizer), config.decoded_frames(_num_latents(joined)))
    return decoded[:, :, config.decoded_frames(len(before) * _num_latents(own)) if before else 0 :]


def _num_latents(payload: Mapping[str, np.ndarray]) -> int:
    return int(next(iter(payload.values())).shape[-3])
