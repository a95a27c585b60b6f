"""Messages about a cluster while a job runs: each one once, with its remedy."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from vidshard.jobs.runtime.events import reported
from vidshard.jobs.runtime.node_watch import NodeReport, NodeWatch, problems_of, report_node
from vidshard.schemas.fields import ReportSettings

GIB = 1 << 30
GOOD: dict[str, Any] = {
    "host": "a",
    "shm_bytes": 8 * GIB,
    "disk_bytes": 100 * GIB,
    "disk_used_bytes": 94 * GIB,
    "disk_path": "/tmp/ray",
}


def node(name: str, *, gpus: float = 0, store: float = 2.0 * GIB) -> dict[str, Any]:
    resources = {"CPU": 4.0, "object_store_memory": store} | ({"GPU": gpus} if gpus else {})
    return {"NodeID": name, "NodeManagerHostname": f"host-{name}", "Resources": resources, "Alive": True}


class Seen:
    """A watch, what it prints and its events."""

    def __init__(self, folder: Path, *, is_own: bool = False) -> None:
        self._text = io.StringIO()
        self._log = folder / "log.json"
        self.console = Console(file=self._text, width=1000)
        self.watch = NodeWatch(console=self.console, is_own=is_own)
        self.reported = reported(self.console, ReportSettings(log_json=str(self._log)), command="tokenize", out=None)

    @property
    def printed(self) -> str:
        return self._text.getvalue()

    def events(self, name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [event for event in found if event["event"] == name]


@pytest.fixture
def seen(tmp_path: Path) -> Any:
    found = Seen(tmp_path)
    with found.reported:
        yield found


def test_nodes_that_join_and_leave_are_told_and_those_of_the_start_are_not(seen: Seen) -> None:
    seen.watch.saw({"a": node("a")})
    assert seen.printed == ""
    seen.watch.saw({"a": node("a"), "b": node("b", gpus=8)})
    seen.watch.saw({"a": node("a"), "b": node("b", gpus=8)})
    seen.watch.saw({"b": node("b", gpus=8)})
    [joined], [lost] = seen.events("node_joined"), seen.events("node_lost")
    assert (joined["node"], joined["host"], joined["cpus"], joined["gpus"]) == ("b", "host-b", 4.0, 8)
    assert (lost["node"], lost["host"]) == ("a", "host-a")
    assert seen.printed.splitlines() == [
        "a node joined: host-b, 4 CPUs, 8 GPUs",
        "a node left: host-a; what it had in flight is done again",
    ]


@pytest.mark.parametrize(
    ("change", "store", "kinds"),
    [
        ({}, 2 * GIB, []),
        ({"shm_bytes": 64 << 20}, 2 * GIB, ["shm"]),
        ({"shm_bytes": 2 * GIB}, 2 * GIB, []),
        ({"shm_bytes": None}, 2 * GIB, []),
        ({"shm_bytes": 64 << 20}, 0, []),
        ({"disk_used_bytes": 95 * GIB}, 2 * GIB, ["disk"]),
        ({"disk_used_bytes": 100 * GIB, "shm_bytes": 0}, 2 * GIB, ["shm", "disk"]),
        ({"disk_bytes": 0, "disk_used_bytes": 0}, 2 * GIB, []),
    ],
)
def test_what_is_wrong_with_a_node_has_a_kind_and_a_remedy(
    change: dict[str, Any], store: float, kinds: list[str]
) -> None:
    found = list(problems_of(NodeReport(**GOOD | change), store))
    assert [kind for kind, _ in found] == kinds
    remedies = {"shm": "--shm-size", "disk": "RAY_TMPDIR"}
    assert all(remedies[kind] in text and text.startswith("a: ") for kind, text in found)


def test_each_node_is_warned_of_each_thing_once(seen: Seen) -> None:
    seen.watch.saw({"a": node("a"), "b": node("b")})
    for _ in range(3):
        seen.watch.reported("a", NodeReport(**GOOD | {"shm_bytes": 1 << 20}))
        seen.watch.reported("b", NodeReport(**GOOD | {"host": "b", "shm_bytes": 1 << 20}))
    assert len(seen.events("warning")) == 2
    assert seen.printed.count("/dev/shm has 1 MiB, and Ray's object store 2.0 GiB") == 2


@pytest.mark.parametrize(("is_own", "remedy"), [(True, "a larger --object-store,"), (False, "--object-store-memory")])
def test_spilling_is_warned_of_once_and_not_that_of_earlier_jobs(tmp_path: Path, is_own: bool, remedy: str) -> None:
    seen = Seen(tmp_path, is_own=is_own)
    with seen.reported:
        for total in (5 * GIB, 5 * GIB, 6 * GIB, 9 * GIB):
            seen.watch.spilled(total)
        [warning] = seen.events("warning")
    assert "write frames to disk, 1.0 GiB so far" in warning["text"]
    assert remedy in warning["text"]


def test_workers_that_die_are_counted_and_those_of_earlier_jobs_are_not(seen: Seen) -> None:
    seen.watch.lost_workers({b"1": "of another job"})
    seen.watch.lost_workers({b"1": "of another job"})
    seen.watch.lost_workers({b"1": "of another job", b"2": "killed\nby SIGKILL", b"3": "out of memory"})
    [lost] = seen.events("worker_lost")
    assert (lost["count"], lost["detail"]) == (2, "out of memory")


def test_work_that_fits_no_node_is_told_once_and_work_that_waits_for_its_turn_is_not(seen: Seen) -> None:
    seen.watch.saw({"a": node("a"), "b": node("b", gpus=1)})
    seen.watch.wanted([{"CPU": 4.0, "node:10.0.0.1": 0.001}, {"GPU": 1.0, "CPU": 1.0}, {}])
    assert seen.printed == "", "a node has as much, whatever runs there"
    seen.watch.wanted([{"CPU": 1.0}, {"CPU": 5.0, "GPU": 1.0}])
    seen.watch.wanted([{"CPU": 9.0}])
    [warning] = seen.events("warning")
    assert "work waits for a node with 5 CPUs, 1 GPUs, and the cluster has none" in warning["text"]


def test_a_look_that_fails_ends_nothing(seen: Seen) -> None:
    seen.watch.look()  # without Ray every step fails
    assert seen.printed == ""


def test_this_machine_reports_itself() -> None:
    report = report_node()
    assert 0 < report.disk_used_bytes <= report.disk_bytes
    assert report.shm_bytes is None or report.shm_bytes > 0
