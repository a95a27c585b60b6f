"""Batch encoding: arrays of frames in, arrays of tokens or latents out.

Every forward pass has the same shape: a short last batch is filled up and the surplus dropped. The result of a clip
then does not depend on the other clips of its batch, which makes two runs equal. Compilers and graph capture also
need fixed shapes.

On a GPU the next batch is copied and launched while the one before it computes, and the process waits for the GPU once
a batch (`pipeline.transfer`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vidshard.models.tokenizer import EncodedClips, Past, Tokenizer, frames_to_input
from vidshard.models.vidtok.lengths import Padding, pad
from vidshard.models.vidtok.tiling import Tiling
from vidshard.pipeline.transfer import Download, transfer_to
from vidshard.schemas.tokens import Payload
from vidshard.schemas.video import ClipSpec


class NotFiniteError(FloatingPointError):
    """The network gave a value that is not finite: NaN, or infinity."""

    def __init__(self, index: int, what: str) -> None:
        super().__init__(index, what)
        self.index = index
        """Position of the first such clip in the results."""
        self.what = what

    def __str__(self) -> str:
        return f"clip {self.index}: {self.what}"


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
        NotFiniteError: the network gave a value that is not finite, or a latent is no finite float16.
    """
    rows = _Rows(payload, len(clips))
    transfer = transfer_to(tokenizer.device)
    for start in range(0, len(clips), batch_size):
        batch = [clips[min(start + slot, len(clips) - 1)] for slot in range(batch_size)]
        with torch.inference_mode():
            x_BCTHW = frames_to_input(transfer.upload(batch), tokenizer.dtype)
            if padding is not None:
                x_BCTHW = pad(x_BCTHW, tokenizer.config, padding).frames
            encoded = tokenizer.encode(x_BCTHW, tiling=tiling)
            download = transfer.download(_results(encoded, payload), payload)
        rows.take(download, {slot: start + slot for slot in range(min(batch_size, len(clips) - start))})
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
        NotFiniteError: as `encode_clips`.
    """
    rows = _Rows(payload, sum(counts))
    transfer = transfer_to(tokenizer.device)
    ends = np.cumsum(counts)
    numbers = [number for number, count in enumerate(counts) if count]
    for start in range(0, len(numbers), batch_size):
        group = numbers[start : start + batch_size]
        streams = [spans[number] for number in (group + group[-1:] * batch_size)[:batch_size]]
        past: Past = ()
        for step in range(max(map(len, streams))):
            batch = [stream[min(step, len(stream) - 1)] for stream in streams]
            with torch.inference_mode():
                x_BCTHW = frames_to_input(transfer.upload(batch), tokenizer.dtype)
                encoded, past = tokenizer.encode_stream(x_BCTHW if past else x_BCTHW[:, :, spec.lead_frames :], past)
                download = transfer.download(_results(encoded, payload), payload)
            places = {}
            for slot, number in enumerate(group):
                row = ends[number] - len(spans[number]) + step  # a clip of the halo lies below the span's first row
                if step < len(spans[number]) and row >= ends[number] - counts[number]:
                    places[slot] = int(row)
            rows.take(download, places)
    return rows.arrays()


_FINITE = "is_finite"


def _results(encoded: EncodedClips, payload: Payload) -> dict[str, torch.Tensor]:
    """Tensors of a pass that are read on the CPU, each (B, values)."""
    results = {column.name: encoded.payload[column.name].flatten(1) for column in payload}
    if encoded.is_finite is not None:
        results[_FINITE] = encoded.is_finite[:, None]
    return results


class _Rows:
    """Payload columns under construction: one row per clip, whose number of values depends on the frame size."""

    def __init__(self, payload: Payload, num_rows: int) -> None:
        self._payload = payload
        self._rows: dict[str, list[np.ndarray]] = {column.name: [np.empty(0)] * num_rows for column in payload}
        self._pending: tuple[Download, dict[int, int]] | None = None

    def take(self, download: Download, places: dict[int, int]) -> None:
        """Store the results of a forward pass once the next one is under way; on a CPU at once.

        Args:
            places: row by slot of the batch; other slots are dropped.

        Raises:
            NotFiniteError: the network gave a value that is not finite.
        """
        before, self._pending = self._pending, (download, places)
        if before is not None:
            self._store(*before)
        if download.is_here:
            self._store_pending()

    def _store_pending(self) -> None:
        if self._pending is not None:
            self._store(*self._pending)
        self._pending = None

    def _store(self, download: Download, places: dict[int, int]) -> None:
        values = download.wait()
        for slot, row in places.items():
            if _FINITE in values and not values[_FINITE][slot].all():
                raise NotFiniteError(row, "the network's output is not finite")
            for column in self._payload:
                self._rows[column.name][row] = values[column.name][slot]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return each column as an array (number of clips, values per clip).

        Raises:
            NotFiniteError: the network gave a value that is not finite, or a latent is no finite float16.
        """
        self._store_pending()
        columns: dict[str, np.ndarray] = {}
        for column in self._payload:
            rows = self._rows[column.name]
            values = np.stack(rows) if rows else np.empty((0, column.num_values), column.dtype)
            if column.codebook_size is None and not (finite := np.isfinite(values).all(axis=1)).all():
                raise NotFiniteError(int(np.argmin(finite)), f"its {column.name} are not finite float16 numbers")
            columns[column.name] = values
        return columns
