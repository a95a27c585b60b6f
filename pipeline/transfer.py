"""Transfers between the CPU and the device of a tokenizer: frames to it, results from it.

On a GPU two pinned buffers take turns. While one batch is computed, the next one is gathered in the other buffer and
copied by a stream of its own, and the results before it are read. The process waits for the GPU once a batch, when it
reads results; it also waits before it refills a buffer, whose copy has ended long before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vidshard.schemas.tokens import Payload, PayloadColumn


class Download(Protocol):
    """Results of a pass on their way to the CPU."""

    is_here: bool
    """Whether `wait` returns at once."""

    def wait(self) -> dict[str, np.ndarray]:
        """Wait for the results; returns arrays (B, values) by name, payload columns in their stored dtype."""
        ...


class Transfer(Protocol):
    """Transfers of the batches of one call."""

    def upload(self, clips: Sequence[np.ndarray]) -> Tensor:
        """Copy a batch to the device.

        Args:
            clips: each uint8 (T, H, W, 3).

        Returns:
            uint8 (B, T, H, W, 3).
        """
        ...

    def download(self, results: Mapping[str, Tensor], payload: Payload) -> Download:
        """Begin to copy the results of a pass to the CPU.

        Args:
            results: tensors (B, values) on the device; those of other names than a payload column are flags.
        """
        ...


def transfer_to(device: torch.device) -> Transfer:
    """Make the transfers for a device."""
    return GpuTransfer(CudaStreams(device)) if device.type == "cuda" else CpuTransfer()


class CpuTransfer:
    """Transfers to the memory of this process: one buffer, results at once."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def upload(self, clips: Sequence[np.ndarray]) -> Tensor:
        """Gather a batch, as `Transfer.upload`."""
        shape = (len(clips), *clips[0].shape)
        if self._buffer is None or self._buffer.shape != shape:
            self._buffer = torch.empty(shape, dtype=torch.uint8)
        _gather(self._buffer, clips)
        return self._buffer

    def download(self, results: Mapping[str, Tensor], payload: Payload) -> Download:
        """Convert results, as `Transfer.download`."""
        columns = {column.name: column for column in payload}
        return _Here({name: _to_numpy(values, columns.get(name)) for name, values in results.items()})


class _Here:
    is_here = True

    def __init__(self, values: dict[str, np.ndarray]) -> None:
        self._values = values

    def wait(self) -> dict[str, np.ndarray]:
        return self._values


class Streams(Protocol):
    """The part of CUDA that transfers use; tests replace it."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Make a tensor in pinned memory of the CPU."""
        ...

    def copy_in(self, buffer: Tensor) -> tuple[Tensor, Any]:
        """Copy a pinned buffer to the device beside the computation, which waits for it on the device.

        Returns:
            The copy, and an event that is reached when the buffer may be refilled.
        """
        ...

    def copy_out(self, values: Tensor, into: Tensor) -> None:
        """Copy values into a pinned tensor when the computation so far has ended."""
        ...

    def event(self) -> Any:
        """Make an event that is reached when all copies out so far have ended."""
        ...

    def wait(self, event: Any) -> None:
        """Wait for an event."""
        ...


class GpuTransfer:
    """Transfers to a GPU: two pinned buffers, copies beside the computation, one wait a batch."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._buffers: list[Tensor | None] = [None, None]
        self._copied: list[Any] = [None, None]
        self._turn = 0

    def upload(self, clips: Sequence[np.ndarray]) -> Tensor:
        """Copy a batch to the device, as `Transfer.upload`; returns before the copy has ended."""
        turn, self._turn = self._turn, 1 - self._turn
        if self._copied[turn] is not None:
            self._streams.wait(self._copied[turn])
        buffer = self._buffers[turn]
        shape = (len(clips), *clips[0].shape)
        if buffer is None or buffer.shape != shape:
            buffer = self._buffers[turn] = self._streams.pinned(shape, torch.uint8)
        _gather(buffer, clips)
        values, self._copied[turn] = self._streams.copy_in(buffer)
        return values

    def download(self, results: Mapping[str, Tensor], payload: Payload) -> Download:
        """Begin to copy results, as `Transfer.download`."""
        columns = {column.name: column for column in payload}
        here: dict[str, Tensor] = {}
        for name, values in results.items():
            column = columns.get(name)
            if column is not None and column.codebook_size is None:
                values = values.to(torch.float16)  # half the bytes to copy, and rounded as numpy does
            here[name] = self._streams.pinned(tuple(values.shape), values.dtype)
            self._streams.copy_out(values, here[name])
        return _OnItsWay(self._streams, self._streams.event(), here, columns)


class _OnItsWay:
    is_here = False

    def __init__(
        self, streams: Streams, event: Any, here: Mapping[str, Tensor], columns: Mapping[str, PayloadColumn]
    ) -> None:
        self._streams = streams
        self._event = event
        self._here = here
        self._columns = columns

    def wait(self) -> dict[str, np.ndarray]:
        self._streams.wait(self._event)
        return {name: _to_numpy(values, self._columns.get(name)) for name, values in self._here.items()}


class CudaStreams:
    """`Streams` of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Make a pinned tensor; PyTorch keeps freed ones for the next call."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def copy_in(self, buffer: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Copy a buffer, as `Streams.copy_in`."""
        computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._beside):
            values = buffer.to(self._device, non_blocking=True)
            copied = self._beside.record_event()
        computing.wait_event(copied)
        values.record_stream(computing)  # its memory was taken on the other stream
        return values, copied

    def copy_out(self, values: Tensor, into: Tensor) -> None:
        """Copy values, as `Streams.copy_out`, on the stream that computes: the next pass waits for some kilobytes."""
        into.copy_(values, non_blocking=True)

    def event(self) -> torch.cuda.Event:
        """Make an event, as `Streams.event`."""
        event: torch.cuda.Event = torch.cuda.current_stream(self._device).record_event()
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        """Wait for an event."""
        event.synchronize()


def _gather(buffer: Tensor, clips: Sequence[np.ndarray]) -> None:
    batch = buffer.numpy()
    for slot, clip in enumerate(clips):
        batch[slot] = clip


def _to_numpy(values: Tensor, column: PayloadColumn | None) -> np.ndarray:
    if column is None:
        return values.cpu().numpy()
    return (values.float() if column.codebook_size is None else values).cpu().numpy().astype(column.dtype)
