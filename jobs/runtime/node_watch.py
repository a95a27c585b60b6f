"""Watch of a Ray cluster while a job runs: nodes that join or leave, workers that die, and four conditions that Ray
keeps to its own log: ``/dev/shm`` too small, spilling begun, a disk that is full, and work that fits no node. Each is
told once, with a remedy.

A thread looks every few seconds. What only a node itself can see (its ``/dev/shm`` and its disk) a task reports there
once a minute; on one machine this process looks. A look that fails is left out, as the death of Ray has its own watch
(`jobs.runtime.ray_watch`).
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private import internal_api
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.core.generated import common_pb2, gcs_pb2
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from vidshard.jobs.runtime.events import events_of
from vidshard.jobs.runtime.progress import warn
from vidshard.schemas.text import counted

LOOKING_SECONDS = 5.0
LOOKS_PER_REPORT = 12
"""Looks between two reports of each node: one a minute."""
FULL_SHARE = 0.95
"""Share of a disk from which Ray stores nothing more on it (its ``local_fs_capacity_threshold``)."""
_JOINING_SECONDS = 2.0
_LOOKS_BEFORE_DEMAND = 2
"""Looks before demand is compared with the nodes: a node that is about to join needs no warning."""
_RESOURCES = {"CPU": "CPUs", "GPU": "GPUs", "memory": "bytes of memory"}
_KILLED = (common_pb2.WorkerExitType.SYSTEM_ERROR, common_pb2.WorkerExitType.NODE_OUT_OF_MEMORY)


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """Memory and disk of a node, as the node reports them."""

    host: str
    shm_bytes: int | None
    """Size of ``/dev/shm``; None where there is none."""
    disk_bytes: int
    """Size of the file system of Ray's files."""
    disk_used_bytes: int
    disk_path: str


def report_node() -> NodeReport:
    """Report on the machine of this process, which Ray has started or which has started Ray."""
    node = ray._private.worker._global_node
    path = "/tmp" if node is None else str(node.get_session_dir_path())  # noqa: S108  only looked at
    disk = os.statvfs(path)
    size = disk.f_blocks * disk.f_frsize
    shm = None
    with suppress(OSError):
        shm = shutil.disk_usage("/dev/shm").total  # noqa: S108  only looked at
    return NodeReport(
        host=socket.gethostname(),
        shm_bytes=shm,
        disk_bytes=size,
        disk_used_bytes=size - disk.f_bavail * disk.f_frsize,
        disk_path=path,
    )


def problems_of(report: NodeReport, object_store_bytes: float) -> Iterator[tuple[str, str]]:
    """Kind and text, with the remedy, of each thing that is wrong with a node.

    Args:
        object_store_bytes: size of its object store.
    """
    if report.shm_bytes is not None and report.shm_bytes < object_store_bytes:
        sizes = f"/dev/shm has {_size(report.shm_bytes)}, and Ray's object store {_size(object_store_bytes)}"  # noqa: S108  named only
        yield (
            "shm",
            f"{report.host}: {sizes}, so frames go through a disk. Give the container 30 % of its memory as /dev/shm: "
            "docker run --shm-size, or an emptyDir of medium Memory in Kubernetes (docs/deploying.md)",
        )
    if report.disk_bytes and report.disk_used_bytes >= FULL_SHARE * report.disk_bytes:
        full = f"the disk of {report.disk_path} is {report.disk_used_bytes / report.disk_bytes:.1%} full"
        yield (
            "disk",
            f"{report.host}: {full}, and Ray stores nothing on one beyond {FULL_SHARE:.0%}. Free space there, or start "
            "Ray elsewhere: RAY_TMPDIR, or --temp-dir of `ray start`",
        )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


@dataclass(kw_only=True)
class NodeWatch:
    """State of the watch: what was seen, and what was told."""

    console: Console
    is_own: bool
    """Whether this process has started Ray, on this machine alone."""
    _nodes: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _dead_workers: set[bytes] | None = None
    _spilled_bytes: int | None = None
    _told: set[tuple[str, str]] = field(default_factory=set)
    """Node (or "") and kind of each warning."""
    _asked: dict[Any, str] = field(default_factory=dict)
    """Node by the reference of its report."""
    _looks: int = 0

    def look(self) -> None:
        """Look once, and tell what is new."""
        steps = (
            self._look_at_nodes,
            self._look_at_workers,
            self._look_at_spilling,
            self._look_at_reports,
            self._look_at_demand,
        )
        for step in steps:
            with suppress(Exception):  # of Ray, which may be starting, failing or ending
                step()
        self._looks += 1

    def saw(self, living: Mapping[str, Mapping[str, Any]]) -> None:
        """Tell which nodes joined and left since the last time; those of the first time are there from the start.

        Args:
            living: nodes by id, as `ray.nodes` describes them.
        """
        events = events_of(self.console)
        before, self._nodes = self._nodes, dict(living)
        if not before:
            return
        for node_id, node in living.items():
            if node_id not in before:
                cpus, gpus = node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)
                host = node["NodeManagerHostname"]
                events.emit("node_joined", node=node_id, host=host, cpus=cpus, gpus=gpus)
                with_gpus = f", {counted(gpus, 'GPU')}" if gpus else ""
                self.console.print(
                    f"a node joined: {host}, {counted(cpus, 'CPU')}{with_gpus}", highlight=False, markup=False
                )
        for node_id, node in before.items():
            if node_id not in living:
                host = node["NodeManagerHostname"]
                events.emit("node_lost", node=node_id, host=host)
                text = f"a node left: {host}; what it had in flight is done again"
                self.console.print(text, highlight=False, markup=False)

    def reported(self, node_id: str, report: NodeReport) -> None:
        """Warn of what is wrong with a node, of each kind once."""
        node = self._nodes.get(node_id, {})
        for kind, text in problems_of(report, node.get("Resources", {}).get("object_store_memory", 0.0)):
            if (report.host, kind) not in self._told:
                self._told.add((report.host, kind))
                warn(self.console, text)

    def spilled(self, total_bytes: int) -> None:
        """Warn once when the object stores have begun to spill.

        Args:
            total_bytes: bytes that all nodes have spilled since they were started.
        """
        before = self._spilled_bytes
        self._spilled_bytes = total_bytes if before is None else before
        if before is None or total_bytes <= before or ("", "spill") in self._told:
            return
        self._told.add(("", "spill"))
        larger = (
            "a larger --object-store" if self.is_own else "nodes with more --object-store-memory (and /dev/shm for it)"
        )
        warn(
            self.console,
            f"Ray has begun to write frames to disk, {_size(total_bytes - before)} so far, as its object stores are "
            f"full: the run goes on, slower. What helps is {larger}, fewer --decode-workers, or more encoders",
        )

    def wanted(self, requests: Iterable[Mapping[str, float]]) -> None:
        """Warn once if tasks or actors wait for resources that no node has, whatever else runs there.

        Args:
            requests: resources by name of each kind of task or actor that waits.
        """
        totals = [node["Resources"] for node in self._nodes.values()]
        for request in requests:
            asked = {name: amount for name, amount in request.items() if not name.startswith("node:") and amount > 0}
            is_somewhere = any(
                all(total.get(name, 0.0) >= amount for name, amount in asked.items()) for total in totals
            )
            if not asked or is_somewhere or ("", "demand") in self._told:
                continue
            self._told.add(("", "demand"))
            words = ", ".join(f"{amount:g} {_RESOURCES.get(name, name)}" for name, amount in sorted(asked.items()))
            warn(
                self.console,
                f"work waits for a node with {words}, and the cluster has none: the run goes on when one joins. `ray "
                "status` tells whether an autoscaler starts one; else start one, with `ray start --address ADDRESS`",
            )

    def lost_workers(self, dead: Mapping[bytes, str]) -> None:
        """Tell how many processes of Ray were killed or crashed since the last time.

        Args:
            dead: Ray's words by the id of each worker that has ended so, since Ray was started.
        """
        before, self._dead_workers = self._dead_workers, set(dead)
        new = [] if before is None else [detail for worker, detail in dead.items() if worker not in before]
        if new:
            detail = " ".join(new[-1].split())[:300]
            events_of(self.console).emit("worker_lost", count=len(new), detail=detail)

    def _look_at_nodes(self) -> None:
        self.saw({node["NodeID"]: node for node in ray.nodes() if node["Alive"]})

    def _look_at_workers(self) -> None:
        if not events_of(self.console).is_open:
            return
        dead = {}
        for data in ray._private.state.state._connect_and_get_accessor().get_worker_table():
            worker = gcs_pb2.WorkerTableData.FromString(data)
            if not worker.is_alive and worker.worker_type == common_pb2.WORKER and worker.exit_type in _KILLED:
                dead[worker.worker_address.worker_id] = worker.exit_detail
        self.lost_workers(dead)

    def _look_at_demand(self) -> None:
        if self.is_own or ("", "demand") in self._told or self._looks < _LOOKS_BEFORE_DEMAND:
            return
        state = get_cluster_resource_state(ray._private.worker.global_worker.gcs_client)
        self.wanted(dict(each.request.resources_bundle) for each in state.pending_resource_requests)

    def _look_at_spilling(self) -> None:
        if ("", "spill") in self._told:
            return
        reply = internal_api.get_memory_info_reply(ray._private.state.state, timeout_seconds=10.0)
        self.spilled(reply.store_stats.spilled_bytes_total)

    def _look_at_reports(self) -> None:
        if self.is_own:
            if self._looks % LOOKS_PER_REPORT == 0:
                for node_id in self._nodes:
                    self.reported(node_id, report_node())
            return
        answered, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        for reference in answered:
            node_id = self._asked.pop(reference)
            with suppress(Exception):  # the node is gone
                self.reported(node_id, ray.get(reference))
        waiting = set(self._asked.values())
        for node_id in self._nodes:
            is_due = self._looks % LOOKS_PER_REPORT == 0 or node_id not in self._reported_nodes
            if is_due and node_id not in waiting:
                self._reported_nodes.add(node_id)
                there = NodeAffinitySchedulingStrategy(node_id, soft=False)
                ask = ray.remote(num_cpus=0, max_retries=0)(report_node)
                self._asked[ask.options(scheduling_strategy=there).remote()] = node_id

    def __post_init__(self) -> None:
        self._reported_nodes: set[str] = set()


@contextmanager
def nodes_watched(console: Console, *, is_own: bool) -> Iterator[None]:
    """Watch the cluster that this process has joined or started, and tell on the console and in its event log."""
    watch = NodeWatch(console=console, is_own=is_own)
    is_over = threading.Event()

    def run() -> None:
        watch.look()
        while not is_over.wait(LOOKING_SECONDS):
            watch.look()

    thread = threading.Thread(target=run, name="node-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(_JOINING_SECONDS)
