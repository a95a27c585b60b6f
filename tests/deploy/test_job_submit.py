"""``ray job submit`` with a runtime environment, on a Ray cluster of two nodes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.cli import vidshard_exits
from tests.support.held_back import held_back
from tests.support.markdown import ROOT
from tests.support.processes import COMMITTED_AT_ONCE, RUN, inputs, is_under_way, read_rows

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp_cors") is None, reason="no ray[default] here: pip install 'vidshard[cluster]'"
    ),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of the job server of a cluster of two nodes."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_JOB_STOP_WAIT_TIME_S"] = "60"
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": 0, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=1, object_store_memory=200_000_000)
        yield f"http://{cluster.head_node.webui_url}"
    finally:
        del os.environ["RAY_JOB_STOP_WAIT_TIME_S"]
        cluster.shutdown()


def _ray(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "ray.scripts.scripts", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=dict(os.environ))


def _submit(cluster: str, name: str, *arguments: object, wait: bool = True) -> str:
    environment = f'{{"env_vars": {{"PYTHONPATH": "{ROOT}"}}}}'
    flags = ["--address", cluster, "--submission-id", name, "--runtime-env-json", environment]
    command = [sys.executable, "-m", "vidshard.jobs.main", "tokenize", *arguments]
    done = _ray("job", "submit", *flags, *([] if wait else ["--no-wait"]), "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)
def test_a_job_uses_the_cluster_that_it_is_submitted_to(cluster: str, many_spans: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    said = _submit(cluster, "whole", many_spans, "--out", out, *RUN)
    assert "a Ray cluster of 2 nodes" in said
    code, said = vidshard_exits("verify", out)
    assert code == 0, said


@pytest.mark.timeout(600)
def test_a_job_that_is_stopped_and_submitted_again_writes_every_clip_once(
    cluster: str, many_spans: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    with held_back(many_spans / "2.mp4", out) as held:
        arguments = (*inputs(many_spans, held), "--out", out, *RUN, *COMMITTED_AT_ONCE, "--grace-seconds", "1")
        _submit(cluster, "first", *arguments, wait=False)
        while not (is_under_way(out) and held.is_reached):
            status = _ray("job", "status", "--address", cluster, "first").stdout
            assert "FAILED" not in status, _ray("job", "logs", "--address", cluster, "first").stdout
        _ray("job", "stop", "--address", cluster, "first")
        before = read_rows(out)
        held.let_go()
        _submit(cluster, "second", *arguments)
    rows = read_rows(out)
    assert 0 < len(before) < len(rows) == len(set(rows))
    assert set(before) <= set(rows)


@pytest.mark.timeout(600)
def test_the_hook_of_a_head_that_is_deleted_waits_until_the_run_has_committed(
    cluster: str, many_spans: Path, tmp_path: Path
) -> None:
    job = yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text())
    [head] = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    [_, flag, hook] = head["lifecycle"]["preStop"]["exec"]["command"]
    assert "http://127.0.0.1:8265" in hook
    out = tmp_path / "tokens"
    with held_back(many_spans / "2.mp4", out) as held:
        arguments = (*inputs(many_spans, held), "--out", out, *RUN, "--grace-seconds", "5")
        _submit(cluster, "deleted", *arguments, wait=False)
        while not held.is_reached:
            status = _ray("job", "status", "--address", cluster, "deleted").stdout
            assert "FAILED" not in status, _ray("job", "logs", "--address", cluster, "deleted").stdout
        _ray("job", "stop", "--no-wait", "--address", cluster, "deleted")  # as KubeRay does before it deletes the pod
        asked = hook.replace("http://127.0.0.1:8265", cluster)
        done = subprocess.run([sys.executable, flag, asked], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        said = _ray("job", "logs", "--address", cluster, "deleted").stdout
        assert "interrupted" in said
        assert read_rows(out), "clips that were begun are committed"
        assert "was stopped" in _ray("job", "status", "--address", cluster, "deleted").stdout
        held.let_go()
        _submit(cluster, "continued", *arguments)
    rows = read_rows(out)
    assert len(rows) == len(set(rows))
