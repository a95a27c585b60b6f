"""Signals while work is collected: the first is recorded, the second raised."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from vidshard.jobs.runtime.errors import HungUp, exit_code_of, signals_that_end
from vidshard.jobs.runtime.interrupts import Interrupts, LastAnswer


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


def test_a_question_that_hangs_holds_nobody_up_and_is_asked_once() -> None:
    may_answer, asked = threading.Event(), list[int]()

    def ask() -> int:
        asked.append(len(asked))
        assert may_answer.wait(60)
        return 10 + asked[-1]

    answers: LastAnswer[int] = LastAnswer()
    assert [answers.take(ask) for _ in range(5)] == [None] * 5
    assert asked == [0]
    may_answer.set()
    _join(answers)
    assert answers.take(ask) == 10
    _join(answers)
    assert answers.take(ask) == 11


def test_an_error_of_a_question_is_raised_by_the_next_one() -> None:
    answers: LastAnswer[int] = LastAnswer()

    def ask() -> int:
        raise ValueError("no")

    assert answers.take(ask) is None
    _join(answers)
    with pytest.raises(ValueError, match="no"):
        answers.take(ask)


def _join(answers: LastAnswer[int]) -> None:
    assert answers._thread is not None
    answers._thread.join(60)
