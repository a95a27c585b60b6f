"""Batches from loader workers, through shared memory that is used again and again.

PyTorch makes a new piece of shared memory for each tensor of each batch, which both processes map page by page. Here
every worker has a few slots that are made once: a batch of 655 kB takes a tenth of the time. Several small batches
share a message, as a message costs more CPU time than copying such a batch (docs/performance.md).
"""

from __future__ import annotations

import gc
import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

_ALIGNMENT = 64
_MESSAGE_BYTES = 16 << 20
_SHARED_FOLDER = "/dev/shm"  # noqa: S108 - its free space is looked at


def message_bytes(num_workers: int, ahead: int) -> int:
    """Largest size of a message of several batches: a quarter of free shared memory is enough for all slots.

    Containers often have 64 MB of shared memory, and a process that writes beyond is killed.
    """
    try:
        free = shutil.disk_usage(_SHARED_FOLDER).free
    except OSError:  # other systems have no such folder
        return _MESSAGE_BYTES
    return min(_MESSAGE_BYTES, free // (4 * num_workers * (ahead + 2)))


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor in a slot."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class Sent:
    """Consecutive batches on their way from a worker."""

    worker: int
    slot: int
    batches: list[tuple[int, Any]]
    """Units of the epoch that are consumed after a batch; and the batch, with `_Stored` for each tensor in the slot."""


class Slots(IterableDataset[Sent]):
    """The batches of a dataset, packed into slots by the worker that made them."""

    def __init__(
        self,
        batches: Callable[[], Iterator[tuple[int, int, Any]]],
        *,
        num_workers: int,
        ahead: int,
        num_bytes: int,
        convert: Callable[[Any], Any] | None,
    ) -> None:
        """Make the slots; memory is taken where they are written.

        Args:
            batches: gives the batches of a worker: the number of the turn in which it makes them, units of the epoch
                that are consumed after a batch, and the batch. Those of a turn are sent in one message.
            num_workers: workers of the loader.
            ahead: messages that a worker may send before the first of them is used.
            num_bytes: size of a slot, which holds a message; tensors that do not fit are sent by PyTorch.
            convert: applied to a batch before it is sent.
        """
        super().__init__()
        self._batches, self._convert = batches, convert
        # A `DataLoader` asks a worker for another message when it gives one of its messages out. So at most ``ahead``
        # are made or wait while one is copied from its slot; one more slot is kept to spare.
        size = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self._memory = torch.empty((num_workers, ahead + 2, size), dtype=torch.uint8)
        self._memory.share_memory_()  # type: ignore[no-untyped-call]

    def __iter__(self) -> Iterator[Sent]:
        """Batches of this worker, in slots."""
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        if worker is not None and not gc.get_freeze_count():
            # Collecting what the parent made would copy its pages: 0.2 s of the start of a worker that reads from S3.
            gc.freeze()
        slots = self._memory[number]
        for at, (_, batches) in enumerate(itertools.groupby(self._batches(), itemgetter(0))):
            slot = at % len(slots)
            used = [0]
            yield Sent(number, slot, [(mark, self._packed(batch, slots[slot], used)) for _, mark, batch in batches])

    def _packed(self, batch: Any, slot: Tensor, used: list[int]) -> Any:
        return _packed(batch if self._convert is None else self._convert(batch), slot, used)

    def take(self, sent: Sent, *, pin: bool) -> Iterator[tuple[int, Any]]:
        """Copy batches out of their slot, before the next message is asked for: the worker may then write there.

        Args:
            sent: the batches.
            pin: copy them to page-locked memory, from which a GPU reads while it computes.

        Yields:
            Units of the epoch that are consumed after a batch, and the batch.
        """
        for mark, content in sent.batches:
            yield mark, _restored(content, self._memory[sent.worker, sent.slot], pin)


def _packed(value: Any, slot: Tensor, used: list[int]) -> Any:
    """A value with its tensors in a slot; ``used`` counts the bytes of the slot that are taken."""
    if type(value) is dict:
        return {name: _packed(entry, slot, used) for name, entry in value.items()}
    if type(value) is list:
        return [_packed(entry, slot, used) for entry in value] if any(map(torch.is_tensor, value)) else value
    if type(value) is not Tensor or not value.numel() or (value.layout, value.device.type) != (torch.strided, "cpu"):
        return value
    start = -(-used[0] // _ALIGNMENT) * _ALIGNMENT
    stop = start + value.nbytes
    if stop > len(slot):
        return value
    used[0] = stop
    stored = _Stored(value.dtype, tuple(value.shape), start)
    _view(stored, slot).copy_(value)
    return stored


def _restored(value: Any, slot: Tensor, pin: bool) -> Any:
    if type(value) is dict:
        return {name: _restored(entry, slot, pin) for name, entry in value.items()}
    if type(value) is list:
        return [_restored(entry, slot, pin) for entry in value]
    if type(value) is _Stored:
        value = _view(value, slot)
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=pin).copy_(value)
    return value.pin_memory() if pin and torch.is_tensor(value) else value


def _view(stored: _Stored, slot: Tensor) -> Tensor:
    num_bytes = stored.dtype.itemsize
    for size in stored.shape:
        num_bytes *= size
    return slot[stored.offset : stored.offset + num_bytes].view(stored.dtype).view(stored.shape)
