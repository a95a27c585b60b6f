"""Batch encoding: arrays of frames in, arrays of tokens or latents out.

Every forward pass has the same shape: a short last batch is filled up and the surplus dropped. The result of a clip
then does not depend on the other clips of its batch, which makes two runs equal. Compilers and graph capture also
need fixed shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vidshard.models.tokenizer import EncodedClips, Past, Tokenizer, frames_to_input
from vidshard.models.vidtok.lengths import Padding, pad
from vidshard.models.vidtok.tiling import Tiling
from vidshard.schemas.tokens import Payload, PayloadColumn
from vidshard.schemas.video import ClipSpec


def make_reproducible(device: str, num_threads: int) -> None:
    """Set process-wide options so that the same clip gives the same bits in every run on the same hardware.

    Args:
        device: "cpu" or "cuda".
        num_threads: CPU threads of PyTorch.
    """
    torch.set_num_threads(num_threads)
    if device == "cuda":
        torch.backends.cudnn.benchmark = False  # it chooses kernels by timing, which differs between runs
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def encode_clips(
    tokenizer: Tokenizer,
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
        payload: payload columns to return.
        batch_size: clips per forward pass; the last batch is filled up by repeating a clip.
        padding: placement of frames that pad clips to a valid length; None if their length is valid.
        tiling: tiles for large frames; None for whole frames.

    Returns:
        By payload column, an array (number of clips, values per clip), flattened in C order.

    Raises:
        FloatingPointError: a latent is not a finite float16.
    """
    rows = _Rows(payload, len(clips))
    if not clips:
        return rows.arrays()
    staging = torch.empty((batch_size, *clips[0].shape), dtype=torch.uint8, pin_memory=tokenizer.device.type == "cuda")
    batch = staging.numpy()
    for start in range(0, len(clips), batch_size):
        for slot in range(batch_size):
            batch[slot] = clips[min(start + slot, len(clips) - 1)]
        with torch.inference_mode():
            x_BCTHW = frames_to_input(staging.to(tokenizer.device), tokenizer.dtype)
            if padding is not None:
                x_BCTHW = pad(x_BCTHW, tokenizer.config, padding).frames
            encoded = tokenizer.encode(x_BCTHW, tiling=tiling)
        rows.take(encoded, {slot: start + slot for slot in range(min(batch_size, len(clips) - start))})
    return rows.arrays()


def encode_spans(
    tokenizer: Tokenizer,
    spans: Sequence[Sequence[np.ndarray]],
    counts: Sequence[int],
    payload: Payload,
    spec: ClipSpec,
    *,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Encode spans of continuous sequences as parallel streams, in which each clip continues the previous one.

    Args:
        spans: clips of each span, uint8 (T, H, W, 3), halo first.
        counts: number of clips of each span without the halo.
        payload: payload columns to return.
        spec: clip settings from `continuous_spec`.
        batch_size: streams per forward pass; the last batch is filled up by repeating a stream.

    Returns:
        As `encode_clips`, for the clips without halos.

    Raises:
        FloatingPointError: as `encode_clips`.
    """
    rows = _Rows(payload, sum(counts))
    ends = np.cumsum(counts)
    numbers = [number for number, count in enumerate(counts) if count]
    for start in range(0, len(numbers), batch_size):
        group = numbers[start : start + batch_size]
        streams = [spans[number] for number in (group + group[-1:] * batch_size)[:batch_size]]
        past: Past = ()
        for step in range(max(map(len, streams))):
            batch = torch.from_numpy(np.stack([stream[min(step, len(stream) - 1)] for stream in streams]))
            x_BCTHW = frames_to_input(batch.to(tokenizer.device), tokenizer.dtype)
            with torch.inference_mode():
                encoded, past = tokenizer.encode_stream(x_BCTHW if past else x_BCTHW[:, :, spec.lead_frames :], past)
            places = {}
            for slot, number in enumerate(group):
                row = ends[number] - len(spans[number]) + step  # a clip of the halo lies below the span's first row
                if step < len(spans[number]) and row >= ends[number] - counts[number]:
                    places[slot] = int(row)
            rows.take(encoded, places)
    return rows.arrays()


class _Rows:
    """Payload columns under construction: one row per clip, whose number of values depends on the frame size."""

    def __init__(self, payload: Payload, num_rows: int) -> None:
        self._payload = payload
        self._rows: dict[str, list[np.ndarray]] = {column.name: [np.empty(0)] * num_rows for column in payload}

    def take(self, encoded: EncodedClips, places: dict[int, int]) -> None:
        """Store the results of a forward pass.

        Args:
            places: row by slot of the batch; other slots are dropped.
        """
        for column in self._payload:
            values = _to_numpy(encoded.payload[column.name], column)
            for slot, row in places.items():
                self._rows[column.name][row] = values[slot]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return each column as an array (number of clips, values per clip).

        Raises:
            FloatingPointError: a latent is not a finite float16.
        """
        columns: dict[str, np.ndarray] = {}
        for column in self._payload:
            rows = self._rows[column.name]
            values = np.stack(rows) if rows else np.empty((0, column.num_values), column.dtype)
            if column.codebook_size is None and not np.isfinite(values).all():
                raise FloatingPointError(
                    f"the encoder gave {column.name} that are not finite float16 numbers: check the weights"
                )
            columns[column.name] = values
        return columns


def _to_numpy(values: Tensor, column: PayloadColumn) -> np.ndarray:
    flat = values.flatten(1)
    return (flat.float() if column.codebook_size is None else flat).cpu().numpy().astype(column.dtype)
