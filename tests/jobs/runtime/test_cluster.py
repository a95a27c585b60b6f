"""Starting a Ray for a run, and the message once that Ray has died."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import ray
from ray._private import parameter

from vidshard.jobs.runtime import cluster as cluster_module
from vidshard.jobs.runtime.cluster import Cluster, ray_cluster
from vidshard.jobs.runtime.executor import ClusterExecutor
from vidshard.jobs.runtime.ray_watch import _report_unless_of_ray
from vidshard.pipeline.resources import StageResources
from vidshard.pipeline.storage import StorageError
from vidshard.schemas.errors import RunFailedError, UserError


def closing_fails_with(error: Exception) -> Iterator[None]:
    try:
        yield
    finally:
        raise error


@pytest.mark.parametrize(("error", "is_reported"), [(RunFailedError("Ray"), False), (ValueError("a defect"), True)])
def test_finalizers_that_miss_a_dead_ray_print_no_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception, is_reported: bool
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", partial(_report_unless_of_ray, reported.append))
    running = closing_fails_with(error)
    next(running)
    del running
    assert bool(reported) is is_reported


@pytest.mark.parametrize("verbose", [False, True])
def test_a_ray_of_our_own_has_the_object_store_that_was_asked_for_and_no_process_without_work(
    monkeypatch: pytest.MonkeyPatch, verbose: bool
) -> None:
    asked: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        params = parameter.RayParams(temp_dir=options["_temp_dir"])
        asked.append(options | {"monitor": not params.no_monitor, "log_monitor": params.include_log_monitor})
        raise OSError("enough")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with (
        pytest.raises(StorageError, match="Ray cannot be started on this machine: OSError: enough"),
        ray_cluster(address="local", object_store_bytes=80_000_000, verbose=verbose),
    ):
        pass
    [options] = asked
    assert options["object_store_memory"] == 80_000_000
    assert not options["include_dashboard"]
    assert not options["monitor"]
    assert options["log_monitor"] is verbose
    assert not parameter.RayParams(temp_dir="/tmp").no_monitor


@pytest.mark.parametrize(
    ("left", "living", "settings", "is_own", "is_too_small"),
    [
        (8, 4, {}, False, False),
        (5, 4, {}, False, False),
        (5, 5, {}, False, True),  # more than at first, as they followed the cluster
        (4, 0, {}, False, True),  # the smallest number would hold all
        (1, 1, {}, False, True),
        (0, 0, {}, False, False),  # nothing could be decoded, whatever encoders hold: it waits for nodes
        (4, 4, {"encode_workers": 8}, False, True),
        (8, 8, {"encode_workers": 8}, False, False),  # as many as before
        (4, 4, {"gpus_per_worker": 1.0}, False, False),  # each node with GPUs keeps a CPU for decoding
        (4, 4, {}, True, False),
    ],
)
def test_a_cluster_is_too_small_once_its_encoders_would_hold_every_cpu_that_is_left(
    monkeypatch: pytest.MonkeyPatch,
    left: int,
    living: int,
    settings: dict[str, Any],
    is_own: bool,
    is_too_small: bool,
) -> None:
    monkeypatch.setattr(cluster_module, "_num_living_workers", lambda: living)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(left)} if left else {})
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": float(left)}}])
    planned: dict[str, Any] = {"encode_workers": 4, "gpus_per_worker": 0.0, "cpus_per_worker": 1.0}
    planned |= {"decode_workers": None, "rows_per_task": 1, "rows_per_batch": 1} | settings
    cluster = Cluster(num_cpus=8, num_gpus=0.0, num_nodes=2, is_own=is_own)
    smaller = ClusterExecutor(cluster=cluster).shrunk_below(StageResources(**planned).encoders)
    assert (smaller is not None) == is_too_small
    assert smaller is None or (smaller.num_cpus, smaller.num_nodes) == (left, 1)


@pytest.mark.parametrize(
    ("variables", "is_sent"),
    [
        ({}, False),  # a token that lies about is for the Ray of this machine, and not for whoever is named
        ({"RAY_AUTH_TOKEN": "a" * 64}, True),
        ({"RAY_AUTH_TOKEN_PATH": "token"}, True),
        ({"RAY_AUTH_TOKEN": "a" * 64, "RAY_AUTH_MODE": "disabled"}, False),
    ],
)
def test_a_token_that_the_environment_names_is_sent_to_the_cluster_that_is_joined(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], is_sent: bool
) -> None:
    sent: list[bool] = []

    def init(**_options: Any) -> None:
        raise OSError("enough")

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cluster_module, "_enable_token_auth", lambda: sent.append(True))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with (
        pytest.raises(
            StorageError, match=r"cannot join a Ray cluster at auto: .*RAY_AUTH_TOKEN_PATH: ~/\.ray/auth_token"
        ),
        ray_cluster(address="auto", object_store_bytes=None, verbose=False),
    ):
        pass
    assert bool(sent) == is_sent


@pytest.mark.parametrize("is_in_environment", [False, True])
def test_an_address_of_ray_client_is_refused_with_the_two_ways_that_work(
    monkeypatch: pytest.MonkeyPatch, is_in_environment: bool
) -> None:
    address = "ray://head:10001"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with (
        pytest.raises(UserError, match=r"ray://head:10001 is an address of Ray Client.*HOST:6379.*ray job submit"),
        ray_cluster(address=None if is_in_environment else address, object_store_bytes=None, verbose=False),
    ):
        pass
