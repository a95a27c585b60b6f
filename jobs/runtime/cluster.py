"""Ray for the duration of a job: joins an existing cluster, or starts a local one and stops it at the end."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.authentication.authentication_token_setup import AUTH_MODE_ENV_VAR, _enable_token_auth
from ray.data import DataContext
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from vidshard.jobs.runtime.errors import cause_of, terminate
from vidshard.jobs.runtime.interrupts import feeding_threads
from vidshard.jobs.runtime.private_ray import private_ray
from vidshard.jobs.runtime.ray_watch import death_noticed, processes_of_joined_ray, processes_of_own_ray
from vidshard.pipeline.output.lease import release_held_leases
from vidshard.pipeline.resources import GpuNode
from vidshard.pipeline.storage import StorageError, StorageOutageError
from vidshard.schemas.errors import EXIT_AGAIN, EXIT_REFUSED, UserError
from vidshard.schemas.text import counted
from vidshard.schemas.uris import public_uri

_LISTENING_SECONDS = 10.0
_JOINING_SECONDS = 120.0
_STOPPING_SECONDS = 60.0
_RELEASING_SECONDS = 10.0
_ENDING_SECONDS = 5.0
_LOOKING_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Resources of a Ray cluster."""

    num_cpus: int
    num_gpus: float
    num_nodes: int
    is_own: bool
    """Whether this process started the cluster, and stops it."""
    gpu_nodes: tuple[GpuNode, ...] = ()
    """Nodes with GPUs."""
    memory_bytes: float | None = None
    """Memory that Ray counts for processes on all nodes, its object stores left out; None if it counts none."""

    def __str__(self) -> str:
        gpus = counted(self.num_gpus, "GPU") if self.num_gpus else "no GPU"
        where = "a Ray of its own" if self.is_own else f"a Ray cluster of {counted(self.num_nodes, 'node')}"
        return f"{where}: {counted(self.num_cpus, 'CPU')}, {gpus}"


@contextmanager
def ray_cluster(*, address: str | None, object_store_bytes: int | None, verbose: bool) -> Iterator[Cluster]:
    """Join a Ray cluster, or start a local one and stop it at the end.

    Args:
        address: address of a cluster, or "local" to start one; None for ``$RAY_ADDRESS`` if set, otherwise "local".
        object_store_bytes: size of the object store of a local cluster; None for Ray's default.
        verbose: show Ray's log and progress.

    Raises:
        StorageError: no cluster answers at the address, it refuses the connection, or Ray cannot be started.
        UserError: the address is one of Ray Client.
    """
    with ExitStack() as stack:
        own = False
        if not ray.is_initialized():
            where = address or os.environ.get("RAY_ADDRESS", "")
            own = where in ("", "local")
            _refuse_ray_client(where)
            _start(stack, where, own=own, object_store_bytes=object_store_bytes, verbose=verbose)
        if threading.current_thread() is threading.main_thread():
            stack.enter_context(_death_noticed(own=own))
        _quiet(verbose)
        yield _look(is_own=own)


def _look(*, is_own: bool) -> Cluster:
    """The cluster as it is at present."""
    resources = ray.cluster_resources()
    return Cluster(
        num_cpus=max(1, int(resources.get("CPU", 1))),
        num_gpus=resources.get("GPU", 0.0),
        num_nodes=sum(node["Alive"] for node in ray.nodes()),
        is_own=is_own,
        gpu_nodes=_gpu_nodes(),
        memory_bytes=resources.get("memory"),
    )


def await_gpus(cluster: Cluster, seconds: float) -> Cluster | None:
    """Wait until a cluster has a node with a GPU, and ask its autoscaler for one, if it has one.

    Returns:
        The cluster as it is then; None if no GPU has come in that time.
    """
    from ray.autoscaler.sdk import request_resources

    found = cluster
    end = time.monotonic() + seconds
    request_resources(bundles=[{"GPU": 1}])
    try:
        while not found.gpu_nodes and time.monotonic() < end:
            time.sleep(min(_LOOKING_SECONDS, max(0.0, end - time.monotonic())))
            found = _look(is_own=cluster.is_own)
    finally:
        request_resources(bundles=[])  # encoders ask for themselves from now on
    return found if found.gpu_nodes else None


def shrunk_below(cluster: Cluster, *, least_workers: int, cpus_per_worker: float) -> Cluster | None:
    """The cluster as it is, if it has lost CPUs, and encoders or scorers hold all but a part of one; else None.

    Those of lost nodes start again on the nodes that are left, and Ray Data takes none of them away while others wait
    for a place. Where no CPU is left at all, nothing could be decoded, whatever encoders hold.
    """
    left = ray.cluster_resources().get("CPU", 0.0)
    if not 1 <= left < cluster.num_cpus:
        return None
    holding = max(least_workers, _num_living_workers()) * cpus_per_worker
    return _look(is_own=cluster.is_own) if holding > left - 1 else None


def _num_living_workers() -> int:
    """Number of encoders and scorers of this process that have started, and hold what they reserve."""
    actors = ray._private.state.state.actor_table(None, ray._private.worker.global_worker.current_job_id, "ALIVE")
    names = [actor["ActorClassName"] for actor in actors.values()]
    return sum("EncoderActor" in name or "ScorerActor" in name for name in names)


def abandon_executions() -> None:
    """End what Ray Data executes, and its tasks and actors."""
    for execution in _executions():
        execution.shutdown(force=True)


def _gpu_nodes() -> tuple[GpuNode, ...]:
    """Nodes of the cluster that live and have GPUs."""
    living = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) > 0]
    return tuple(
        GpuNode(
            node_id=node["NodeID"],
            num_cpus=node["Resources"].get("CPU", 0.0),
            num_gpus=node["Resources"]["GPU"],
        )
        for node in living
    )


def _start(stack: ExitStack, where: str, *, own: bool, object_store_bytes: int | None, verbose: bool) -> None:
    """Start Ray, or join the cluster at ``where``; the stack gets what is to be undone at the end.

    Raises:
        StorageError: that failed, for whatever reason.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not verbose:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    _check_listening(where)
    try:
        options: dict[str, Any] = {"address": where}
        if own:
            options = {"address": "local", "include_dashboard": False, "object_store_memory": object_store_bytes}
            options |= stack.enter_context(private_ray(keep_files=verbose))
        else:
            _send_named_token()
        stack.callback(_stop)  # before ray.init, which may fail with some of its processes running
        with (
            _hangups_ignored(),
            nullcontext(2) if verbose else _no_chatter() as stderr,
            _not_for_ever(None if own else where, stderr),
        ):
            ray.init(
                logging_level=logging.INFO if verbose else logging.ERROR,
                log_to_driver=verbose,
                **options,
            )
    except (Exception, SystemExit) as error:  # Ray raises whatever came in its way, from PermissionError to Exception
        problem = "Ray cannot be started on this machine" if own else f"cannot join a Ray cluster at {where}"
        raise StorageError(f"{problem}: {cause_of(error)}. {_remedy(error, own=own)}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # replaces Ray's handler, which aborts the process


def _refuse_ray_client(address: str) -> None:
    """Refuse an address of Ray Client, through which Ray Data runs nothing from a driver outside of the cluster."""
    if address.startswith("ray://"):
        raise UserError(
            f"{public_uri(address)} is an address of Ray Client, through which no run can be driven: start the command "
            "on a machine of the cluster, with its address HOST:6379, or submit it: `ray job submit --address "
            "http://HOST:8265 -- vidshard ...` (docs/deploying.md)"
        )


def _send_named_token() -> None:
    """Let Ray send the token that the environment names; otherwise it does so only if ``RAY_AUTH_MODE`` is set too."""
    if AUTH_MODE_ENV_VAR not in os.environ and {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        _enable_token_auth()


def _stop() -> None:
    """Stop Ray; the process ends if that takes longer than ``_STOPPING_SECONDS``, as it holds the lease until then."""

    def give_up() -> None:
        os.write(2, b"error: Ray did not stop; what is committed is valid\n")
        _end()

    late = threading.Timer(_STOPPING_SECONDS, give_up)
    late.daemon = True
    late.start()
    try:
        _end_executions()
        ray.shutdown()
    finally:
        late.cancel()


def _end_executions() -> None:
    """End what Ray Data still executes, and wait for the threads that read from it, ``_ENDING_SECONDS`` at most.

    Where one of them gives up an object after Ray was stopped, Ray ends this process with code 1.
    """
    executions = _executions()
    for execution in executions:
        execution._shutdown = True  # `shutdown` would ask a cluster, which may be dead, to end each task
    end = time.monotonic() + _ENDING_SECONDS
    for thread in (*executions, *feeding_threads()):
        thread.join(max(0.0, end - time.monotonic()))


def _executions() -> list[StreamingExecutor]:
    return [thread for thread in threading.enumerate() if isinstance(thread, StreamingExecutor)]


def _end() -> None:
    """End the process from a thread, as the main thread hangs; its lease is given back if that is soon done."""
    last = threading.Timer(_RELEASING_SECONDS, os._exit, (EXIT_AGAIN,))
    last.daemon = True
    last.start()
    release_held_leases()
    os._exit(EXIT_AGAIN)


def _death_noticed(*, own: bool) -> AbstractContextManager[None]:
    """Raise RayDiedError in the main thread once a process of Ray has ended without which the run cannot go on."""
    remedy = (
        "Run the same command again, with -v or --verbose for Ray's log"
        if own
        else "Start the cluster again, or give the address of another one, and run the same command again"
    )
    watched = processes_of_own_ray() if own else processes_of_joined_ray()
    return death_noticed(watched, remedy=remedy, patience_seconds=_STOPPING_SECONDS, end=_end)


def _remedy(error: BaseException, *, own: bool) -> str:
    if not own:
        return (
            "`ray status --address ADDRESS` tells whether the cluster lives; its Python and Ray have to be those of "
            "this machine. If it asks for a token, put that into RAY_AUTH_TOKEN, or its file into RAY_AUTH_TOKEN_PATH: "
            "~/.ray/auth_token on the machine of `ray start`, unless another one was given there"
        )
    if isinstance(error, OSError):
        return "Its files go to RAY_TMPDIR or TMPDIR: name a folder with space that you may write to, or give --local"
    return "Try again with -v or --verbose for Ray's log, or with --local, which needs no Ray"


def _check_listening(address: str) -> None:
    """Raise StorageOutageError if nothing listens at HOST:PORT; Ray itself would retry for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not re.fullmatch("[0-9]{1,5}", port):
        return  # "auto" and other forms that Ray resolves
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LISTENING_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise StorageOutageError(
            f"cannot join a Ray cluster at {address}: nothing answers there ({error}). The address is the one that "
            "`ray start --head` printed, with port 6379 as a rule; `ray status --address` tells whether it lives"
        ) from error


@contextmanager
def _not_for_ever(address: str | None, stderr: int) -> Iterator[None]:
    """End the process if Ray has not joined the cluster after ``_JOINING_SECONDS``: its C++ code ignores signals."""

    def give_up() -> None:
        os.write(
            stderr,
            f"error: no Ray cluster answered at {address} in {_JOINING_SECONDS:.0f} s, though something listens: is it "
            f"the port of `ray start --head` (6379 as a rule, not 8265 or 10001)?\n".encode(),
        )
        os._exit(EXIT_REFUSED)  # no cleanup, as after a kill: a lease expires, and the same command resumes

    timer = threading.Timer(_JOINING_SECONDS, give_up)
    timer.daemon = True
    if address is not None:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def _hangups_ignored() -> Iterator[None]:
    """Let processes that start here ignore SIGHUP, which a lost terminal sends to all; this one ends the others."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def _no_chatter() -> Iterator[int]:
    """Redirect stderr to /dev/null while Ray's C++ core starts; exceptions still propagate.

    Yields:
        A file descriptor of the original stderr.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield kept
    finally:
        os.dup2(kept, 2)
        os.close(kept)


_print_of_ray = ray._private.worker.print_to_stdstream


def _print_unless_of_a_dead_raylet(batch: dict[str, Any], ignore_prefix: bool) -> None:
    """Print a message of Ray, unless it is the last twenty lines of a raylet's log: the death has a message of ours."""
    if not any(str(line).startswith("Raylet is terminated") for line in batch.get("lines", ())):
        _print_of_ray(batch, ignore_prefix)


def _quiet(verbose: bool) -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = verbose
    context.print_on_execution_start = verbose
    context.memory_usage_poll_interval_s = None  # for one statistic it walks every worker's page tables each second
    # retries can only be bounded by arguments that Ray 2.64 will remove, and no replacement is documented yet
    warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
    if not verbose:
        ray._private.worker.print_to_stdstream = _print_unless_of_a_dead_raylet
        logging.getLogger("ray").setLevel(logging.ERROR)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it logs tracebacks of errors that it also raises
