"""Graceful interruption: the first Ctrl-C, SIGTERM or SIGHUP is recorded, a second one ends the job at once."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Generic, TypeVar

from vidshard.jobs.runtime.errors import interrupt_of, signals_that_end

Item = TypeVar("Item")


class Interrupts:
    """Context manager that records the first SIGINT, SIGTERM or SIGHUP, and raises the second as KeyboardInterrupt.

    A SIGHUP is never the second, as the kernel and the shell may each send one when a terminal is lost. Outside the
    main thread, where signals cannot be caught, it records nothing.
    """

    def __init__(self) -> None:
        self.first: KeyboardInterrupt | None = None
        """Exception for the first signal; None before it."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in signals_that_end():
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, _kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.first is None:
            self.first = interrupt_of(number)
        elif number != signal.SIGHUP:
            raise interrupt_of(number)


_FEED = "feed"
"""Name of the threads that read ahead."""


def feeding_threads() -> list[threading.Thread]:
    """Threads that still read an item, perhaps one that nobody waits for any more."""
    return [thread for thread in threading.enumerate() if thread.name == _FEED]


class Feed(Generic[Item]):
    """Iterator that a thread reads one item ahead, so that taking an item can time out."""

    _END = object()

    def __init__(self, items: Iterable[Item]) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=1)
        self._stopped = threading.Event()
        threading.Thread(target=self._run, args=(iter(items),), name=_FEED, daemon=True).start()

    def _run(self, items: Iterator[Item]) -> None:
        try:
            for item in items:
                self._put((item, None))
                if self._stopped.is_set():
                    return
            self._put((self._END, None))
        except BaseException as error:  # noqa: BLE001  raised again by take()
            self._put((self._END, error))

    def _put(self, entry: tuple[Any, BaseException | None]) -> None:
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._queue.put(entry, timeout=0.2)
                return

    def take(self, seconds: float) -> Item | None:
        """Return the next item, or None if none came within ``seconds``.

        Raises:
            StopIteration: the iterator has ended.
            BaseException: any exception of the iterator.
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
        """Stop reading; the thread leaves the iterator after its next item."""
        self._stopped.set()


class LastAnswer(Generic[Item]):
    """Answers to a question that may hang, asked on a thread: a cluster whose head is dead answers after a minute.

    An interrupt, or the end of the run, need not wait for it.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._answer: Item | None = None
        self._error: Exception | None = None

    def take(self, ask: Callable[[], Item | None]) -> Item | None:
        """The answer to the question before, and ask again; None if there is no answer yet.

        Raises:
            Exception: the question before raised it.
        """
        if self._thread is not None and self._thread.is_alive():
            return None
        answer, error, self._answer, self._error = self._answer, self._error, None, None
        if error is not None:
            raise error
        self._thread = threading.Thread(target=self._run, args=(ask,), daemon=True, name="vidshard-asking")
        self._thread.start()
        return answer

    def _run(self, ask: Callable[[], Item | None]) -> None:
        try:
            self._answer = ask()
        except Exception as error:  # noqa: BLE001  raised again by take()
            self._error = error
