"""Watch of Ray's processes: sockets that are closed, refused, silent and reopened."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from vidshard.jobs.runtime import ray_watch
from vidshard.jobs.runtime.ray_watch import ChildProcess, Listener, RayDiedError, death_noticed


class Clock:
    """The time that a watch sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def listening(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    return server


def test_a_closed_connection_is_no_death_while_the_process_still_listens(tmp_path: Path, clock: Clock) -> None:
    with listening(tmp_path / "s") as server:
        watch = Listener("raylet", partial(ray_watch._connect_local, str(tmp_path / "s")), 0.0)
        for _ in range(3):  # a server may end a connection on which nothing is said
            assert watch.death() is None
            server.accept()[0].close()
            clock.now += 100
        assert watch.death() is None
    watch.close()


def test_the_end_of_a_local_process_is_noticed_at_once(tmp_path: Path, clock: Clock) -> None:
    server = listening(tmp_path / "s")
    watch = Listener("raylet", partial(ray_watch._connect_local, str(tmp_path / "s")), 0.0)
    assert watch.death() is None
    server.close()
    assert "Ray's process raylet does not live any more" in str(watch.death())
    (tmp_path / "s").unlink()
    assert watch.death() is not None, "a socket that was removed says the same"


@pytest.mark.parametrize("patience", [ray_watch.REFUSED_SECONDS, ray_watch.RESTART_SECONDS])
def test_a_head_may_refuse_connections_for_as_long_as_it_may_take_to_restart(clock: Clock, patience: float) -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    watch = Listener("gcs_server", partial(ray_watch._connect_remote, f"127.0.0.1:{port}"), patience)
    assert watch.death() is None
    server.close()
    assert watch.death() is None
    clock.now += patience - 0.1
    assert watch.death() is None
    with socket.create_server(("127.0.0.1", port)):
        assert watch.death() is None, "it listens again"
    assert watch.death() is None, "and its time begins anew"
    clock.now += patience
    assert "gcs_server does not live any more" in str(watch.death())


def test_a_network_that_is_gone_for_a_moment_is_no_death(clock: Clock) -> None:
    def connect() -> socket.socket:
        raise TimeoutError("timed out")

    watch = Listener("gcs_server", connect, ray_watch.REFUSED_SECONDS)
    assert watch.death() is None
    clock.now += ray_watch.SILENT_SECONDS - 0.1
    assert watch.death() is None
    clock.now += 0.1
    assert "cannot be reached (timed out)" in str(watch.death())


def test_a_death_is_raised_in_the_main_thread_with_the_remedy_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_watch, "_WATCHING_SECONDS", 100)  # the kernel tells it
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(3)"])
    ended: list[int] = []
    with (
        pytest.raises(RayDiedError, match=r"Ray's process raylet ended \(with exit code 3\).*is valid\. Try again"),
        death_noticed(
            [ChildProcess("raylet", process)], remedy="Try again", patience_seconds=60, end=lambda: ended.append(1)
        ),
    ):
        threading.Event().wait(30)
    assert not ended
    os.kill(os.getpid(), 0)  # the handler is the former one again, and this process lives


def test_a_main_thread_that_does_not_answer_is_ended_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_watch, "_WATCHING_SECONDS", 0.01)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    process = subprocess.Popen([sys.executable, "-c", ""])
    ended = threading.Event()
    watched = [ChildProcess("raylet", process)]
    with death_noticed(watched, remedy="", patience_seconds=0.01, end=ended.set):
        try:
            ended.wait(30)
        except RayDiedError:
            assert ended.wait(30), "it stays in the context, as if it hung in a library"


def test_a_death_is_told_before_it_is_raised_as_ray_may_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    told: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(ray_watch, "print_error", told.put)
    process = subprocess.Popen([sys.executable, "-c", ""])
    watched = [ChildProcess("raylet", process)]

    def hear() -> None:
        with death_noticed(watched, remedy="Try again", patience_seconds=60, end=lambda: None):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})  # nothing can be raised until it is unblocked
            assert "Ray's process raylet ended (with exit code 0); what" in told.get(timeout=30)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
            threading.Event().wait(30)

    with pytest.raises(RayDiedError):
        hear()
    assert RayDiedError.is_printed, "the command prints it no second time"
