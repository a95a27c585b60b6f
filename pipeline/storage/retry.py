"""Retries of remote operations: how long to keep trying, and the message at the end.

Transient errors (throttling, server errors, broken connections) are retried with exponential backoff and full jitter
for two minutes. Every operation of this package may be repeated without harm.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from vidshard.pipeline.storage.clients import answers
from vidshard.pipeline.storage.errors import ShortBodyError, StorageError, StorageOutageError
from vidshard.pipeline.storage.paths import is_local
from vidshard.pipeline.storage.transient import describe, is_transient, is_unreachable, storage_errors
from vidshard.schemas.errors import UserError
from vidshard.schemas.uris import is_web, shown_uri

Result = TypeVar("Result")

_log = logging.getLogger("vidshard.pipeline.storage")

RETRY_SECONDS_VARIABLE = "VIDSHARD_STORAGE_RETRY_SECONDS"


def _retry_seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise UserError(f"{RETRY_SECONDS_VARIABLE} must be a number of seconds such as 120, got {text!r:.80}")
    return seconds


RETRY_SECONDS = _retry_seconds(os.environ.get(RETRY_SECONDS_VARIABLE, "120"))
"""Seconds for which an operation on remote storage is retried before it counts as failed."""

_FIRST_PAUSE_SECONDS = 0.5
"""Longest pause before the second attempt; the bound doubles with each attempt."""

_MIN_ATTEMPTS = 3
"""Attempts made even when one attempt takes longer than the limit, such as a long listing."""

_FIRST_CONTACT_SHARE = 0.25
"""Share of the limit for a host that never accepted a connection: its name may well be wrong."""


def whole(data: bytes, num_bytes: int) -> bytes:
    """The data, checked to be all of it.

    Raises:
        ShortBodyError: fewer than ``num_bytes`` bytes arrived.
    """
    if len(data) < num_bytes:
        raise ShortBodyError(f"{len(data)} of {num_bytes} bytes came")
    return data


def _host(path: str) -> str:
    return "/".join(path.split("/", 3)[:3])


# Retrying.

_reached: set[str] = set()
"""Hosts, buckets among them, that have answered this process."""

_down: dict[str, float] = {}
"""Web servers that did not answer this process though they were asked again, and when that was."""

_DOWN_SECONDS = 300.0
"""Time for which a web server that was down is asked once and not again: each of its many files would take minutes."""


def with_retries(path: str, operation: Callable[[], Result], retry_seconds: float | None = None) -> Result:
    """Call an operation; on remote storage, repeat it while it fails with a transient error.

    Args:
        path: the file or folder the operation is about; its host decides the limit.
        operation: may be repeated without harm.
        retry_seconds: the limit; None for ``RETRY_SECONDS``.

    Raises:
        BaseException: the error of the last attempt, with notes of how often it was tried and what to check.
    """
    if is_local(path):
        return operation()
    return _Attempts(path, RETRY_SECONDS if retry_seconds is None else retry_seconds).call(operation)


class _Attempts:
    """The attempts at one operation on remote storage."""

    def __init__(self, path: str, limit_seconds: float) -> None:
        self._path, self._host = path, _host(path)
        self._started = time.monotonic()
        was_down = self._started - _down.get(self._host, -math.inf) < _DOWN_SECONDS
        self._limit = 0.0 if was_down else limit_seconds

    def call(self, operation: Callable[[], Result]) -> Result:
        """The operation's result, or the error of its last attempt."""
        retrying = Retrying(
            stop=self._is_over,
            # anything up to a bound that doubles, which spreads many workers best (Brooker, "Exponential Backoff And
            # Jitter", AWS Architecture Blog 2015, "full jitter")
            wait=wait_random_exponential(
                multiplier=min(_FIRST_PAUSE_SECONDS, self._limit / 20), max=min(20.0, max(0.1, self._limit / 6))
            ),
            retry=retry_if_exception(is_transient),
            before_sleep=self._warn,
            reraise=True,
        )
        try:
            return retrying(lambda: self._once(operation))
        except storage_errors() as error:
            if is_transient(error):
                tries = retrying.statistics.get("attempt_number", 1)
                error.add_note(f"tried {tries} times in {time.monotonic() - self._started:.0f} s")
                longer = f"; {RETRY_SECONDS_VARIABLE}={2 * self._limit:g} tries for longer" if self._limit else ""
                error.add_note(f"check the network, the endpoint and whether the store is up{longer}")
                if is_web(self._path) and is_unreachable(error):
                    _down.setdefault(self._host, time.monotonic())
            raise

    def _once(self, operation: Callable[[], Result]) -> Result:
        try:
            result = operation()
        except storage_errors() as error:
            if not is_unreachable(error):
                _reached.add(self._host)
            raise
        _reached.add(self._host)
        _down.pop(self._host, None)
        return result

    def _is_over(self, state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        elapsed = time.monotonic() - self._started
        if error is not None and self._host not in _reached and is_unreachable(error):
            return elapsed >= self._limit * _FIRST_CONTACT_SHARE
        return elapsed >= self._limit and (state.attempt_number >= _MIN_ATTEMPTS or self._limit == 0)

    def _warn(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        pause = state.next_action.sleep if state.next_action else 0.0
        text = describe(error, self._path) if error is not None else ""
        _log.warning("%s: %s; attempt %d, again in %.1f s", shown_uri(self._path), text, state.attempt_number, pause)


# Messages.


@contextmanager
def errors_named(verb: str, path: str, kind: type[StorageError] = StorageError) -> Iterator[None]:
    """Turn the exceptions of file systems into a StorageError: "cannot VERB PATH: ...".

    An error that may pass, and did not while it was retried, becomes a StorageOutageError, unless it is a web server's
    that answers otherwise.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        may_pass = is_transient(error)
        if not may_pass and not isinstance(error, storage_errors()):
            raise
        text = "; ".join([describe(error, path), *getattr(error, "__notes__", ())])
        if may_pass and not is_local(path) and not (is_web(path) and not is_unreachable(error) and answers(path)):
            kind = StorageOutageError
            if is_web(path):
                _down.setdefault(_host(path), time.monotonic())
        raise kind(f"cannot {verb} {shown_uri(path)}: {text}") from error
