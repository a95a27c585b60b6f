"""Of all runs on one output one writes: races, the dead, the sleeping, and those who are alive elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.lease import LEASES, Holder, Lease, LeaseHeldError, LeaseLostError

ELSEWHERE = "another boot pid:[1]"

HOLD = """
import sys
from pipeline.lease import Lease, LeaseHeldError, LeaseLostError
try:
    lease = Lease.acquire(sys.argv[1], ttl_seconds=float(sys.argv[2]))
except LeaseHeldError as error:
    print("refused", error, flush=True)
    sys.exit()
print("held", flush=True)
for line in sys.stdin:
    try:
        lease.check()
        print("still held", flush=True)
    except LeaseLostError as error:
        print("lost", error, flush=True)
lease.release()
"""


def holder(out: str, ttl_seconds: float = 60) -> subprocess.Popen[str]:
    """A process that takes the lease, and says each time that it is sent a line whether it still has it."""
    command = [sys.executable, "-c", HOLD, out, str(ttl_seconds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def says(process: subprocess.Popen[str], ask: bool = False) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    if ask:
        process.stdin.write("\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path, s3: str) -> str:
    return str(tmp_path / "out") if request.param == "local" else f"s3://videos/{tmp_path.name}"


def holders(out: str) -> list[Holder]:
    found = [Holder.of_bytes(storage.read_bytes(path)) for path in storage.list_files(f"{out}/{LEASES}", ".json")]
    return [one for one in found if one is not None]


def test_of_two_that_start_at_once_one_runs(out: str) -> None:
    for _ in range(3):
        both = [holder(out) for _ in range(2)]
        first = [says(process) for process in both]
        assert sorted(text.split()[0] for text in first) == ["held", "refused"]
        refused = next(text for text in first if text.startswith("refused"))
        winner = both[first.index("held")]
        assert f"process {winner.pid}) is at work on this output" in refused
        assert says(winner, ask=True) == "still held"
        for process in both:
            process.communicate()
    assert all(one.released for one in holders(out))


def test_the_place_of_a_killed_process_of_this_machine_is_taken_at_once(out: str) -> None:
    process = holder(out, 3600)
    assert says(process) == "held"
    process.kill()
    process.wait()
    waited: list[str] = []
    with Lease.acquire(out, ttl_seconds=3600, on_wait=waited.append) as lease:
        lease.check()
    assert not waited


def lease_from_elsewhere(out: str, number: int = 1, beat: int = 0) -> Holder:
    one = replace(Holder.of_this_process(), machine=ELSEWHERE, host="far-away", pid=7, beat=beat)
    storage.write_atomic(f"{out}/{LEASES}/{number:06d}.json", one.to_bytes())
    return one


def test_a_run_elsewhere_that_gives_no_sign_of_life_is_dead_after_a_while(out: str) -> None:
    lease_from_elsewhere(out)
    waited: list[str] = []
    with Lease.acquire(out, ttl_seconds=1, on_wait=waited.append) as lease:
        lease.check()
    assert "another run (far-away, process 7) was at work on this output" in waited[0]


def test_a_run_elsewhere_that_is_alive_is_left_alone(out: str) -> None:
    one = lease_from_elsewhere(out)
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(0.05):
            number += 1
            storage.write_atomic(f"{out}/{LEASES}/000001.json", replace(one, beat=number).to_bytes())

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(LeaseHeldError, match=r"far-away, process 7.* alive"):
            Lease.acquire(out, ttl_seconds=30)
    finally:
        stop.set()
        thread.join()
    assert len(holders(out)) == 1


def test_clocks_of_machines_are_not_compared(out: str) -> None:
    one = lease_from_elsewhere(out)
    for year in ("1970", "2999"):
        storage.write_atomic(
            f"{out}/{LEASES}/000001.json", replace(one, started_at=f"{year}-01-01T00:00:00Z").to_bytes()
        )
        with Lease.acquire(out, ttl_seconds=1) as lease:
            lease.check()
        storage.remove(f"{out}/{LEASES}/000002.json")


def test_who_slept_while_another_took_over_writes_nothing_more(tmp_path: Path) -> None:
    out = str(tmp_path)
    process = holder(out, 1)
    assert says(process) == "held"
    os.kill(process.pid, signal.SIGSTOP)
    path = tmp_path / LEASES / "000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"machine": ELSEWHERE}))  # as if it slept on another one
    with Lease.acquire(out, ttl_seconds=1) as lease:
        os.kill(process.pid, signal.SIGCONT)
        assert says(process, ask=True).startswith("lost another run has taken over")
        lease.check()
        process.communicate()
        lease.check()
    assert [one.released for one in holders(out)][-1] is True


def test_a_lease_that_was_removed_or_is_no_lease(out: str) -> None:
    lease = Lease.acquire(out, ttl_seconds=60)
    storage.remove(f"{out}/{LEASES}/000001.json")
    with pytest.raises(LeaseLostError, match="was removed"):
        lease.check()
    lease.release()
    storage.write_atomic(f"{out}/{LEASES}/000001.json", b"not json")
    with Lease.acquire(out, ttl_seconds=1) as other:
        other.check()


def test_it_is_renewed_and_the_old_ones_go(out: str) -> None:
    for _ in range(6):
        Lease.acquire(out).release()
    assert len(storage.list_files(f"{out}/{LEASES}", ".json")) <= 4
    with Lease.acquire(out, ttl_seconds=0.3):
        seen = {asdict(holders(out)[-1])["beat"]}
        while len(seen) < 3:
            seen.add(holders(out)[-1].beat)
    assert "secret" not in "".join(map(str, holders(out)))
