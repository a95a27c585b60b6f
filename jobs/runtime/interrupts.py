"""Ending a job in order: the first Ctrl-C or SIGTERM is noted, a second one ends it at once."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

from vidshard.jobs.runtime.errors import Terminated

Item = TypeVar("Item")


class Interrupts:
    """Notes the first SIGINT or SIGTERM while it is entered; the second is raised as before.

    Outside the main thread, where signals cannot be caught, it notes nothing.
    """

    def __init__(self) -> None:
        self.first: KeyboardInterrupt | None = None
        """What the first one would have raised."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        interrupt = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        if self.first is not None:
            raise interrupt
        self.first = interrupt


class Feed(Generic[Item]):
    """Items of an iterator that a thread runs, one ahead, so that they can be waited for with a time limit."""

    _END = object()

    def __init__(self, items: Iterable[Item]) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._stopped = threading.Event()
        threading.Thread(target=self._run, args=(iter(items),), name="feed", daemon=True).start()

    def _run(self, items: Iterator[Item]) -> None:
        try:
            for item in items:
                self._put((item, None))
                if self._stopped.is_set():
                    return
            self._put((self._END, None))
        except BaseException as error:  # noqa: BLE001  raised again where the items are taken
            self._put((self._END, error))

    def _put(self, entry: tuple[Any, BaseException | None]) -> None:
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(entry, timeout=0.2)
                return

    def take(self, seconds: float) -> Item | None:
        """The next item, or None if there is none yet after so long.

        Raises:
            StopIteration: there are no more.
            BaseException: what the iterator raised.
        """
        try:
            item, error = self._queue.get(timeout=seconds)
        except queue.Empty:
            return None
        if error is not None:
            raise error
        if item is self._END:
            raise StopIteration
        return item  # type: ignore[no-any-return]

    def stop(self) -> None:
        """Take no more; the iterator is left at its next item."""
        self._stopped.set()
