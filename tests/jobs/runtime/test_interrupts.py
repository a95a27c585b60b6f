"""Signals while work is collected: the first is recorded, the second raised."""

from __future__ import annotations

import os
import signal

import pytest

from vidshard.jobs.runtime.errors import HungUp, exit_code_of, signals_that_end
from vidshard.jobs.runtime.interrupts import Interrupts


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_first_signal_is_recorded(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        os.kill(os.getpid(), number)
    assert interrupts.first is not None
    assert exit_code_of(interrupts.first) == code
    assert signal.getsignal(number) == before


def test_a_lost_terminal_says_so_twice_and_ends_nothing_at_once() -> None:
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert isinstance(interrupts.first, HungUp)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in signals_that_end()
        with Interrupts() as interrupts:
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert interrupts.first is None
