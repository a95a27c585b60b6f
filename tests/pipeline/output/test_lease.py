"""One run at a time on an output: who comes second is refused, who is dead is followed, who slept finds out."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.faulty_s3 import FaultyS3
from vidshard.pipeline import storage
from vidshard.pipeline.output import lease as leases
from vidshard.pipeline.output.layout import LEASES
from vidshard.pipeline.output.lease import Holder, Lease, LeaseHeldError, LeaseLostError, release_held_leases

RUN = """
import sys
from vidshard.pipeline.output.lease import Lease, LeaseHeldError, LeaseLostError

lease = None
for line in sys.stdin:
    word, _, out = line.strip().partition(" ")
    try:
        if word == "acquire":
            lease = Lease.acquire(out, ttl_seconds=float(sys.argv[1]))
        elif word == "check":
            lease.check()
        elif word == "release":
            lease.release()
        print("done", flush=True)
    except (LeaseHeldError, LeaseLostError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
"""


class Run:
    """A process that does with leases what it is told."""

    def __init__(self, ttl_seconds: float) -> None:
        """Begin one."""
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, str(ttl_seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def tell(self, words: str) -> None:
        """Ask for something, without waiting for it."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{words}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        """Read the answer of the process to the latest command."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, words: str) -> str:
        """Both."""
        self.tell(words)
        return self.answer()


@pytest.fixture
def begin() -> Iterator[Callable[[float], Run]]:
    """Begins runs, which are dead at the end."""
    runs: list[Run] = []

    def begun(ttl_seconds: float) -> Run:
        runs.append(Run(ttl_seconds))
        return runs[-1]

    yield begun
    for run in runs:
        with suppress(ProcessLookupError):
            run.process.send_signal(signal.SIGCONT)
        run.process.kill()
        run.process.communicate()


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An output that is not there yet."""
    if request.param == "local":
        return str(tmp_path / "out")
    request.getfixturevalue("s3")
    return f"s3://videos/lease/{uuid.uuid4().hex}"


def files(out: str) -> list[dict[str, Any]]:
    paths = storage.list_files(storage.join(out, LEASES), ".json")
    return [json.loads(storage.read_bytes(path)) for path in paths]


def write(out: str, number: int = 1, **changes: Any) -> str:
    """A lease of a holder on another machine."""
    holder = Holder(
        token=uuid.uuid4().hex,
        host="far-away",
        pid=4242,
        machine="another boot pid:[1]",
        process="77",
        started_at="2026-01-01T00:00:00Z",
        ttl_seconds=0.2,
    )
    path = storage.join(out, LEASES, f"{number:06d}.json")
    storage.write_atomic(path, json.dumps(json.loads(holder.to_bytes()) | changes).encode())
    return path


def acquired(out: str, ttl_seconds: float = 60.0) -> tuple[Lease, list[str]]:
    """A lease, and what was said while it was waited for."""
    said: list[str] = []
    return Lease.acquire(out, ttl_seconds=ttl_seconds, on_wait=said.append), said


def test_of_two_that_start_at_once_one_runs_and_the_other_is_told_which(
    out: str, begin: Callable[[float], Run]
) -> None:
    runs = [begin(60), begin(60)]
    for _ in range(10):
        for run in runs:
            run.tell(f"acquire {out}")
        answers = [run.answer() for run in runs]
        assert sorted(answer.split(":")[0] for answer in answers) == ["LeaseHeldError", "done"]
        holder = runs[answers.index("done")]
        refusal = next(answer for answer in answers if answer != "done")
        assert f"process {holder.process.pid}" in refusal
        assert os.uname().nodename in refusal
        assert "wait for its end, or stop it" in refusal
        assert holder.ask("check") == "done"
        assert holder.ask("release") == "done"
    assert len(files(out)) <= 4
    assert files(out)[-1]["released"]


def test_a_killed_run_is_followed_at_once_on_its_machine(out: str, begin: Callable[[float], Run]) -> None:
    first = begin(60)
    assert first.ask(f"acquire {out}") == "done"
    with pytest.raises(LeaseHeldError, match=f"process {first.process.pid}"):
        acquired(out)
    first.process.kill()
    assert os.waitid(os.P_PID, first.process.pid, os.WEXITED | os.WNOWAIT) is not None  # it stays, as a zombie
    lease, said = acquired(out)
    with lease:
        assert said == []
        lease.check()
    first.process.wait()
    with acquired(out)[0] as again:
        again.check()


def test_another_process_with_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    this = json.loads(Holder.of_this_process().to_bytes())
    write(str(tmp_path), **this | {"process": "1"})
    lease, said = acquired(str(tmp_path))
    with lease:
        assert said == []


def test_a_run_on_another_machine_that_shows_no_life_is_followed_after_a_while(out: str) -> None:
    write(out)
    started = time.monotonic()
    lease, [said] = acquired(out, ttl_seconds=0.6)
    with lease:
        assert time.monotonic() - started >= 0.6
        assert "far-away, process 4242" in said
        lease.check()
    assert [file["host"] == "far-away" for file in files(out)] == [True, False]


@pytest.mark.parametrize("year", ["1970", "2100"])
@pytest.mark.parametrize("alive", [True, False])
def test_clocks_of_other_machines_do_not_matter(alive: bool, year: str, tmp_path: Path) -> None:
    path = Path(write(str(tmp_path), started_at=f"{year}-01-01T00:00:00Z"))
    stop = threading.Event()

    def renew() -> None:
        beat = 0
        while not stop.wait(0.05):
            write(str(tmp_path), beat=(beat := beat + 1))
            os.utime(path, ns=(0, 0) if year == "1970" else (4_102_444_800 * 10**9,) * 2)

    os.utime(path, ns=(0, 0) if year == "1970" else (4_102_444_800 * 10**9,) * 2)
    thread = threading.Thread(target=renew)
    if alive:
        thread.start()
    try:
        if alive:
            with pytest.raises(LeaseHeldError, match=r"far-away, process 4242.* and alive: wait for its end"):
                acquired(str(tmp_path), ttl_seconds=1.0)
        else:
            acquired(str(tmp_path), ttl_seconds=0.3)[0].release()
    finally:
        stop.set()
        if alive:
            thread.join()
    assert len(files(str(tmp_path))) == (1 if alive else 2)


def test_a_run_that_is_given_back_while_it_is_watched_is_followed(tmp_path: Path) -> None:
    write(str(tmp_path))
    timer = threading.Timer(0.2, write, (str(tmp_path),), {"released": True})
    timer.start()
    started = time.monotonic()
    with acquired(str(tmp_path), ttl_seconds=20)[0] as lease:
        lease.check()
    assert time.monotonic() - started < 20
    timer.join()


def test_a_holder_renews_its_lease_so_that_other_machines_see_it_alive(
    out: str, begin: Callable[[float], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert begin(0.6).ask(f"acquire {out}") == "done"
    monkeypatch.setattr(leases, "_machine", lambda: "another one")
    with pytest.raises(LeaseHeldError, match="alive"):
        acquired(out, ttl_seconds=10)


def test_a_holder_that_slept_finds_out_before_it_writes(
    out: str, begin: Callable[[float], Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = begin(0.6)
    assert sleeper.ask(f"acquire {out}") == "done"
    sleeper.process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(leases, "_machine", lambda: "another one")
    lease, [said] = acquired(out, ttl_seconds=1.0)
    with lease:
        assert f"process {sleeper.process.pid}" in said
        sleeper.process.send_signal(signal.SIGCONT)
        assert sleeper.ask("check").startswith("LeaseLostError: another run has taken over this output")
        assert sleeper.ask("release") == "done"
        lease.check()
        assert [file["released"] for file in files(out)] == [False, False]
    assert [file["released"] for file in files(out)] == [False, True]


def test_a_lease_that_somebody_removed_is_lost(out: str) -> None:
    lease, _ = acquired(out)
    lease.check()
    [path] = storage.list_files(storage.join(out, LEASES), ".json")
    storage.remove(path)
    with pytest.raises(LeaseLostError, match="was removed"):
        lease.check()
    with pytest.raises(LeaseLostError):
        lease.check(now=False)
    lease.release()
    assert files(out) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": "x"}', b"\xff\xfe"])
def test_a_lease_that_cannot_be_read_is_watched_like_any_other(content: bytes, tmp_path: Path) -> None:
    path = Path(write(str(tmp_path)))
    path.write_bytes(content)
    lease, said = acquired(str(tmp_path), ttl_seconds=0.2)
    with lease:
        assert len(said) == 1
    assert path.read_bytes() == content


def test_a_check_costs_nothing_when_one_was_made_just_now(faulty_s3: FaultyS3) -> None:
    with acquired(f"s3://videos/lease/{uuid.uuid4().hex}")[0] as lease:
        before = len(faulty_s3.seen)
        for _ in range(100):
            lease.check(now=False)
        assert len(faulty_s3.seen) == before
        lease.check()
        assert len(faulty_s3.seen) == before + 1


@pytest.mark.parametrize("kind", ["slow_down", "reset_before", "reset_after", "lost_answer"])
def test_a_lease_survives_trouble_of_the_storage(kind: str, faulty_s3: FaultyS3) -> None:
    out = f"s3://videos/lease/{uuid.uuid4().hex}"
    faulty_s3.misbehave(kind, path="lease", times=2)
    with acquired(out, ttl_seconds=0.6)[0] as lease:
        faulty_s3.misbehave(kind, method="PUT", times=2)
        with pytest.raises(LeaseHeldError):
            acquired(out)
        faulty_s3.misbehave(kind, method="GET")
        lease.check()
    assert [file["released"] for file in files(out)] == [True]


def test_a_storage_that_cannot_be_asked_is_no_reason_to_go_on(
    faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.retry, "RETRY_SECONDS", 0.5)
    with acquired(f"s3://videos/lease/{uuid.uuid4().hex}")[0] as lease:
        faulty_s3.misbehave("slow_down", times=math.inf)
        with pytest.raises(storage.StorageError, match="tried "):
            lease.check()
        faulty_s3.behave()
        lease.check()


def test_a_lease_names_its_holder_and_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-must-not-be-seen")
    with acquired(str(tmp_path))[0]:
        [file] = files(str(tmp_path))
        assert (file["host"], file["pid"]) == (os.uname().nodename, os.getpid())
        assert set(file) == {
            "token",
            "host",
            "pid",
            "machine",
            "process",
            "started_at",
            "beat",
            "released",
            "ttl_seconds",
        }
        assert "secret" not in json.dumps(file)


@pytest.mark.parametrize(
    ("stated", "own", "waits"),
    [(7.0, 0.1, 7.0), (0.1, 5.0, 5.0), (None, 0.1, leases._UNSTATED_TTL_SECONDS), (None, 90.0, 90.0)],
)
def test_the_larger_time_to_live_counts(
    stated: float | None, own: float, waits: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(str(tmp_path), ttl_seconds=stated)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    path = storage.join(str(tmp_path), LEASES, "000001.json")
    leases._make_sure_it_is_over(path, own, lambda _text: None)
    assert now[0] >= waits


def test_a_lease_states_its_time_to_live(tmp_path: Path) -> None:
    with acquired(str(tmp_path), ttl_seconds=17.0)[0]:
        assert files(str(tmp_path))[-1]["ttl_seconds"] == 17.0


def test_a_lease_without_a_time_to_live_is_still_read(tmp_path: Path) -> None:
    path = write(str(tmp_path), released=True)
    stored = json.loads(storage.read_bytes(path))
    del stored["ttl_seconds"]
    Path(path).write_text(json.dumps(stored))
    lease, said = acquired(str(tmp_path))
    with lease:
        assert said == []


def test_values_of_later_versions_do_not_hide_a_holder() -> None:
    holder = Holder.of_this_process(5.0)
    stored = json.loads(holder.to_bytes()) | {"later": [1, 2]}
    assert Holder.of_bytes(json.dumps(stored).encode()) == holder


@pytest.mark.parametrize(
    "changes",
    [
        {"pid": "1"}, {"pid": None}, {"pid": True}, {"host": 3}, {"ttl_seconds": "x"}, {"ttl_seconds": float("nan")},
        {"ttl_seconds": 1e300}, {"ttl_seconds": -1}, {"ttl_seconds": [1]}, {"released": "yes"}, {"beat": 0.5},
    ],
)  # fmt: skip
def test_a_lease_of_impossible_values_is_no_lease(changes: dict[str, Any]) -> None:
    stored = json.loads(Holder.of_this_process(5.0).to_bytes()) | changes
    assert Holder.of_bytes(json.dumps(stored).encode()) is None


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"7", b"{}", b"[" * 100_000, b"\xff"])
def test_other_files_are_no_lease(data: bytes) -> None:
    assert Holder.of_bytes(data) is None


def of_this_machine(pid: int) -> Holder:
    return Holder.of_bytes(json.dumps(json.loads(Holder.of_this_process().to_bytes()) | {"pid": pid}).encode())  # type: ignore[return-value]


def test_a_process_that_cannot_be_seen_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(self: Path, *args: Any, **kwargs: Any) -> str:
        if str(self).startswith("/proc/") and str(self).endswith("/stat"):
            raise FileNotFoundError(2, "hidepid", str(self))
        return original(self, *args, **kwargs)

    def refused(pid: int, number: int) -> None:
        raise PermissionError(1, "another user's")

    original = Path.read_text
    holder = Holder.of_this_process()
    monkeypatch.setattr(Path, "read_text", hidden)
    assert holder.is_alive is None, "the kernel says that it is there"
    monkeypatch.setattr(os, "kill", refused)
    assert holder.is_alive is None


def test_a_process_that_the_kernel_does_not_know_is_dead() -> None:
    gone = subprocess.Popen(["/bin/true"])
    gone.wait()
    assert of_this_machine(gone.pid).is_alive is False


@pytest.mark.parametrize("pid", [0, -1, 10**30])
def test_an_impossible_process_id_says_nothing(pid: int) -> None:
    assert of_this_machine(pid).is_alive is None


def test_a_process_of_another_host_or_namespace_is_not_looked_for() -> None:
    this = Holder.of_this_process()
    assert this.is_alive
    assert replace(this, host="elsewhere").is_alive is None
    assert replace(this, machine=f"{this.machine}0").is_alive is None
    assert replace(this, machine="").is_alive is None


def test_a_process_that_ends_out_of_order_gives_its_leases_back(tmp_path: Path) -> None:
    lease = Lease.acquire(str(tmp_path))
    release_held_leases()
    said: list[str] = []
    Lease.acquire(str(tmp_path), on_wait=said.append).release()
    assert not said
    lease.release()
