"""Clips to tokens or latents: the model in a Ray actor, loaded once, fed in full batches.

The forward pass always has the same shape: a short last batch is filled up and the surplus dropped. A clip's
result then depends on the clip alone and not on which clips happened to travel with it, which is what makes two
runs equal, and fixed shapes are what compilers and graph capture want.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from models.lengths import Padding, pad
from models.tiling import Tiling
from models.tokenizer import TokenizerConfig, VideoTokenizer, frames_to_input
from models.weights import load_tokenizer, weights_digest
from pipeline import storage
from pipeline.rows import EncodeStats, add_payload, clip_frames
from schemas.tokens import Payload

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """What an encoder needs to know; small enough to travel to every actor."""

    tokenizer: TokenizerConfig
    weights: str | None
    """Path or URL; None for seeded random weights."""
    random_seed: int | None
    weights_sha256: str
    """What the weights must be: an encoder refuses to start with others. Empty before the first look."""
    precision: str
    clip_shape: tuple[int, int, int, int]
    """(T, H, W, 3) of every clip."""
    payload: Payload
    batch_size: int
    """Clips per forward pass."""
    num_threads: int
    """CPU threads of one encoder; ignored on a GPU."""
    padding: Padding | None = None
    """How clips become as long as the tokenizer takes; None where they are."""
    tiling: Tiling | None = None
    """None to encode whole frames."""


def open_tokenizer(spec: EncoderSpec, device: str) -> VideoTokenizer:
    """Load the tokenizer that the spec names, ready to encode and decode.

    Raises:
        ValueError: the weights do not fit the model, or are not the ones that the run began with.
        FileNotFoundError: there is no such file.
    """
    with storage.local_copy(spec.weights) as path:
        tokenizer = load_tokenizer(spec.tokenizer, path, seed=spec.random_seed)
    digest = weights_digest(tokenizer.state_dict())
    if spec.weights_sha256 not in ("", digest):
        raise ValueError(
            f"the weights in {storage.public_uri(spec.weights or 'memory')} are not those expected: their SHA-256 is "
            f"{digest}, expected {spec.weights_sha256}; give the file that was used, or start a new output"
        )
    return tokenizer.to(device=device, dtype=DTYPES[spec.precision])


def make_reproducible(device: str, num_threads: int) -> None:
    """Process-wide settings that make the same clip give the same bits in every run."""
    torch.set_num_threads(num_threads)
    if device == "cuda":
        torch.backends.cudnn.benchmark = False  # timing-based choice of kernels differs from run to run
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def encode_clips(
    tokenizer: VideoTokenizer,
    clips: Sequence[np.ndarray],
    payload: Payload,
    *,
    batch_size: int,
    padding: Padding | None = None,
    tiling: Tiling | None = None,
) -> dict[str, np.ndarray]:
    """Encode clips of one shape.

    Args:
        clips: each uint8 (T, H, W, 3).
        batch_size: clips per forward pass; the last one is filled up by repeating a clip.
        padding: makes clips of another length than the tokenizer takes as long as it does.
        tiling: for large frames.

    Returns:
        For each payload column an array (number of clips, values per clip), flattened in C order.

    Raises:
        FloatingPointError: a latent is not a finite float16.
    """
    device = next(tokenizer.parameters()).device
    dtype = tokenizer.dtype
    values = {name: np.empty((len(clips), payload.num_values), payload.dtype) for name in payload.columns}
    if not clips:
        return values
    staging = torch.empty((batch_size, *clips[0].shape), dtype=torch.uint8, pin_memory=device.type == "cuda")
    batch = staging.numpy()
    for start in range(0, len(clips), batch_size):
        for slot in range(batch_size):
            batch[slot] = clips[min(start + slot, len(clips) - 1)]
        with torch.inference_mode():
            x_BCTHW = frames_to_input(staging.to(device), dtype)
            if padding is not None:
                x_BCTHW = pad(x_BCTHW, tokenizer.config, padding).frames
            encoded = tokenizer.encode(x_BCTHW, tiling=tiling)
        count = min(batch_size, len(clips) - start)
        results = [encoded.tokens] if payload.kind == "tokens" else [encoded.latents, encoded.logvar]
        for name, result in zip(payload.columns, results, strict=False):
            assert result is not None
            array = result[:count].flatten(1).to(torch.float32 if payload.kind == "latents" else None).cpu().numpy()
            values[name][start : start + count] = array
    if payload.kind == "latents" and not all(np.isfinite(v).all() for v in values.values()):
        raise FloatingPointError("the encoder gave latents that are not finite float16 numbers: check the weights")
    return values


class ClipEncoder:
    """The actor of the encoding stage: rows of decoded spans in, rows with tokens out.

    Rejections pass untouched. Called by Ray Data, one batch of rows at a time.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        self._spec = spec
        device = "cuda" if torch.cuda.is_available() else "cpu"
        make_reproducible(device, spec.num_threads)
        self._tokenizer = open_tokenizer(spec, device)
        self._idle_since: float | None = None

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Encode the clips of all rows together."""
        started = time.monotonic()
        waited = started - self._idle_since if self._idle_since is not None else 0.0
        spec = self._spec
        clips = clip_frames(rows, spec.clip_shape)
        values = encode_clips(
            self._tokenizer,
            clips,
            spec.payload,
            batch_size=spec.batch_size,
            padding=spec.padding,
            tiling=spec.tiling,
        )
        self._idle_since = time.monotonic()
        stats = EncodeStats(
            seconds=self._idle_since - started,
            wait_seconds=waited,
            num_slots=-(-len(clips) // spec.batch_size) * spec.batch_size,
        )
        return add_payload(rows, values, spec.payload, stats)
