"""Progress of a training reader: its epoch, and its position in it, which loader workers share."""

from __future__ import annotations

import torch
from torch.utils.data import get_worker_info

from vidshard.schemas.errors import UserError

_MAX_WORKERS = 1 << 12


class Progress:
    """Epoch and position of a reader. Loader workers are copies of the reader, and share some of its memory."""

    def __init__(self, epoch: int, num_samples: int) -> None:
        """Begin an epoch.

        Args:
            epoch: its number.
            num_samples: units of each epoch.

        Raises:
            UserError: there is no such epoch.
        """
        self._num_samples = num_samples
        # which processes began the epoch
        self._begun = torch.zeros(_MAX_WORKERS, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        # epoch and first position, for workers that a loader keeps from one epoch to the next
        self._now = torch.zeros(2, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._is_kept = False
        self.begin(epoch)

    def begin(self, epoch: int, position: int = 0) -> None:
        """Let the next iteration begin at a position of an epoch.

        Raises:
            UserError: there is no such epoch.
        """
        if abs(epoch) >> 62:
            raise UserError(f"there is no epoch {epoch:.3g}")
        self.epoch, self._start, self.position = epoch, position, position
        self._now[0], self._now[1] = epoch, position
        self._begun.zero_()

    def begin_at(self, samples: int) -> None:
        """Let the next iteration begin after so many units of all epochs.

        Raises:
            UserError: there is no such epoch.
        """
        self.begin(*divmod(samples, self._num_samples))

    @property
    def samples(self) -> int:
        """Units of all epochs up to the position."""
        return self.epoch * self._num_samples + self.position

    @property
    def is_read_by_workers(self) -> bool:
        """Whether loader workers have begun the epoch; they are ahead of the position that this process knows."""
        return bool(self._begun[1:].any())

    def enter(self) -> int:
        """Position at which this process, or this loader worker, begins to iterate.

        It is that of the last `begin` once, and the start of the epoch after that.
        """
        worker = get_worker_info()
        slot = 0 if worker is None else min(1 + worker.id, _MAX_WORKERS - 1)
        if worker is not None and self._is_kept:
            self.epoch, self._start = map(int, self._now)
        self._is_kept = worker is not None
        position = 0 if self._begun[slot] else self._start
        self._begun[slot] = 1
        if worker is None:
            self.position = position
        return position
