from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from vidshard.pipeline.video.sandbox import DecodeSandbox
from vidshard.schemas.rejections import Reason, VideoError


@pytest.fixture(scope="module")
def sandbox() -> Iterator[DecodeSandbox]:
    with DecodeSandbox() as sandbox:
        yield sandbox


# What runs in the child.


def process_id() -> int:
    return os.getpid()


def die_of(number: int) -> None:
    os.kill(os.getpid(), number)


def exit_with(code: int) -> None:
    os._exit(code)


def spin() -> None:
    while True:
        pass


def allocate(num_bytes: int) -> int:
    return len(bytes(num_bytes))


def refuse(reason: Reason, detail: str) -> None:
    raise VideoError(reason, detail)


class StubbornError(Exception):
    """Does not survive pickling."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_stubborn() -> None:
    raise StubbornError(1, 2)


def scaled(array: npt.NDArray[np.uint8], factor: int, *, twice: bool = False) -> list[npt.NDArray[np.uint8]]:
    return [array * np.uint8(factor)] * (2 if twice else 1)


def arrays(sizes: list[int]) -> list[npt.NDArray[np.uint8]]:
    return [np.full(size, number + 1, np.uint8) for number, size in enumerate(sizes)]


def print_much() -> str:
    print("x" * 100_000)
    return "done"


def interrupt_handler() -> object:
    return signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def modules() -> list[str]:
    return sorted(sys.modules)


# What is promised.


def test_arrays_come_back_as_they_are_and_may_be_written_to(sandbox: DecodeSandbox) -> None:
    given = np.arange(1000, dtype=np.uint8)
    [once, twice] = sandbox.run(scaled, given, 3, twice=True, timeout_seconds=60)
    assert np.array_equal(once, given * np.uint8(3))
    once[:] = 0
    assert len(twice) == 1000


def test_answers_do_not_share_memory_with_later_ones(sandbox: DecodeSandbox) -> None:
    for sizes in ([], [0], [10, 0, 100_001], [1 << 20, 3], [5], [1 << 22]):
        first = sandbox.run(arrays, sizes, timeout_seconds=60)
        sandbox.run(scaled, np.zeros(1 << 20, np.uint8), 1, timeout_seconds=60)
        for number, (array, size) in enumerate(zip(first, sizes, strict=True)):
            assert array.shape == (size,)
            assert (array == number + 1).all()


def test_one_child_serves_many_calls_and_is_not_the_caller(sandbox: DecodeSandbox) -> None:
    pids = {sandbox.run(process_id, timeout_seconds=60) for _ in range(3)}
    assert pids == {sandbox.pid}
    assert os.getpid() not in pids


def test_exceptions_come_back_as_they_are_with_the_childs_traceback(sandbox: DecodeSandbox) -> None:
    pid = sandbox.run(process_id, timeout_seconds=60)
    with pytest.raises(VideoError) as caught:
        sandbox.run(refuse, Reason.TRUNCATED, "the end is missing", timeout_seconds=60)
    assert (caught.value.reason, caught.value.detail) == (Reason.TRUNCATED, "the end is missing")
    assert "in refuse" in caught.value.__notes__[0]
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        sandbox.run(die_of, 1, 2, timeout_seconds=60)
    assert sandbox.pid == pid


def test_an_exception_that_does_not_pickle_still_says_what_it_was(sandbox: DecodeSandbox) -> None:
    with pytest.raises(RuntimeError, match="StubbornError: 1 and 2"):
        sandbox.run(raise_stubborn, timeout_seconds=60)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL, signal.SIGFPE])
def test_a_death_by_signal_is_a_rejection_that_names_it_and_costs_no_other_call(
    sandbox: DecodeSandbox, number: signal.Signals
) -> None:
    with pytest.raises(VideoError) as caught:
        sandbox.run(die_of, int(number), timeout_seconds=60)
    assert caught.value.reason is Reason.DECODER_CRASHED
    assert number.name in caught.value.detail
    assert sandbox.run(process_id, timeout_seconds=60) == sandbox.pid


def test_a_child_that_exits_is_a_rejection_too(sandbox: DecodeSandbox) -> None:
    with pytest.raises(VideoError, match="exit code 3"):
        sandbox.run(exit_with, 3, timeout_seconds=60)


def test_a_child_killed_between_calls_is_replaced_without_a_word(sandbox: DecodeSandbox) -> None:
    pid = sandbox.run(process_id, timeout_seconds=60)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, and left for its owner to notice
    assert sandbox.run(process_id, timeout_seconds=60) != pid


def test_a_hang_is_ended_at_the_time_limit(sandbox: DecodeSandbox) -> None:
    pid = sandbox.run(process_id, timeout_seconds=60)
    with pytest.raises(VideoError) as caught:
        sandbox.run(spin, timeout_seconds=0.2)
    assert caught.value.reason is Reason.DECODE_TIMEOUT
    assert "0.2 s" in caught.value.detail
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert sandbox.run(process_id, timeout_seconds=60) != pid


def test_memory_above_the_limit_is_a_rejection_and_below_it_is_none() -> None:
    with DecodeSandbox(memory_limit_bytes=512 << 20) as sandbox:
        assert sandbox.run(allocate, 64 << 20, timeout_seconds=60) == 64 << 20
        with pytest.raises(VideoError) as caught:
            sandbox.run(allocate, 1 << 30, timeout_seconds=60)
        assert caught.value.reason is Reason.DECODER_CRASHED
        assert "memory" in caught.value.detail
        assert sandbox.run(allocate, 64 << 20, timeout_seconds=60) == 64 << 20


def test_what_a_library_prints_does_not_disturb_the_answer(sandbox: DecodeSandbox) -> None:
    assert sandbox.run(print_much, timeout_seconds=60) == "done"


def test_the_child_ignores_ctrl_c_and_is_not_in_the_callers_group(sandbox: DecodeSandbox) -> None:
    assert sandbox.run(interrupt_handler, timeout_seconds=60)
    pid = sandbox.pid
    assert pid is not None
    assert os.getpgid(pid) != os.getpgid(0)


def test_calls_from_several_threads_wait_for_each_other(sandbox: DecodeSandbox) -> None:
    found: dict[int, int] = {}

    def call(number: int) -> None:
        found[number] = int(sandbox.run(arrays, [number], timeout_seconds=60)[0].sum())

    threads = [threading.Thread(target=call, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: number for number in range(1, 9)}


def test_only_what_the_function_needs_is_imported() -> None:
    with DecodeSandbox() as sandbox:
        loaded = sandbox.run(modules, timeout_seconds=60)
    assert not {"ray", "torch"} & set(loaded)


def test_functions_that_no_other_process_can_find_are_refused(sandbox: DecodeSandbox) -> None:
    with pytest.raises(ValueError, match="importable module"):
        sandbox.run(lambda: 1, timeout_seconds=60)


@pytest.mark.parametrize("busy", [False, True])
def test_the_child_ends_when_its_parent_is_killed(tmp_path: Path, busy: bool) -> None:
    """The parent is a script without a main guard, which a sandbox must not need."""
    call = "sandbox.run(spin, timeout_seconds=600)" if busy else "input()"
    script = tmp_path / "parent.py"
    script.write_text(
        "from vidshard.pipeline.video.sandbox import DecodeSandbox\n"
        "from tests.pipeline.video.test_sandbox import process_id, spin\n"
        "sandbox = DecodeSandbox()\n"
        "print(sandbox.run(process_id, timeout_seconds=60), flush=True)\n"
        f"{call}\n"
    )
    root = Path(__file__).parents[3]
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert parent.stdout is not None
    with parent:
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            assert wait_for_end(child), "the child outlived its parent by half a minute"
        finally:
            os.close(child)


def wait_for_end(pidfd: int) -> bool:
    import select

    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(30_000))


def test_closing_ends_the_child_and_a_later_call_starts_another() -> None:
    sandbox = DecodeSandbox()
    assert sandbox.pid is None
    first = sandbox.run(process_id, timeout_seconds=60)
    sandbox.close()
    assert sandbox.pid is None
    assert sandbox.run(process_id, timeout_seconds=60) != first
    sandbox.close()


def test_many_small_calls_cost_little(sandbox: DecodeSandbox) -> None:
    sandbox.run(process_id, timeout_seconds=60)
    start = time.perf_counter()
    for _ in range(200):
        sandbox.run(process_id, timeout_seconds=60)
    assert (time.perf_counter() - start) / 200 < 0.01  # 0.06 ms measured on a quiet machine


def test_the_processes_that_decode_load_no_torch() -> None:
    loaded = (
        "import sys, vidshard.pipeline.plan, vidshard.pipeline.training_data.loader; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0
