"""The script of deploy/sky.yaml as SkyPilot runs it: once on each machine, here two of them on one host."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from tests.support.cli import vidshard_exits
from tests.support.markdown import ROOT
from tests.support.processes import VIDSHARD
from tests.support.slurm import free_ports

pytestmark = pytest.mark.slow


@contextmanager
def _machines(folder: Path, **variables: object) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Both machines, the first one is the head; what is left of them is ended at the end."""
    script = yaml.safe_load((ROOT / "deploy/sky.yaml").read_text())["run"]
    assert "/opt/venv/bin" in script
    (folder / "bin").mkdir()
    ray = folder / "bin" / "ray"  # Ray makes a folder "ray" in RAY_TMPDIR
    ray.write_text(f'#!/bin/sh\nexec {sys.executable} -m ray.scripts.scripts "$@"\n')
    ray.chmod(0o755)
    [port] = free_ports(1)
    environment = os.environ | {
        "PATH": f"{ray.parent}:{Path(VIDSHARD).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
        "SKYPILOT_NUM_GPUS_PER_NODE": "0",
        "RAY_AUTH_TOKEN": "a" * 64,
        "VIDSHARD_RAY_PORT": str(port),
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",  # Ray's minute
        "RAY_TMPDIR": str(folder),
        **{name: str(value) for name, value in variables.items()},
    }
    bash = shutil.which("bash")
    assert bash is not None
    running = []
    try:
        for rank in ("0", "1"):
            own = environment | {"SKYPILOT_NODE_RANK": rank}
            running.append(
                subprocess.Popen([bash, "-c", script], env=own, stdin=subprocess.DEVNULL, start_new_session=True)
            )
        yield running
    finally:
        for process in running:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short path, as Ray's sockets need one."""
    folder = Path("/tmp") / f"sky{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(400)
def test_the_task_ends_on_every_machine_once_the_run_is_over(many_spans: Path, tmp_path: Path, short: Path) -> None:
    with _machines(short, INPUTS=many_spans / "0.mp4", OUT=tmp_path / "tokens") as machines:
        assert [machine.wait(300) for machine in machines] == [0, 0]
    code, said = vidshard_exits("verify", tmp_path / "tokens")
    assert code == 0, said


@pytest.mark.timeout(400)
def test_a_refusal_is_the_exit_code_of_the_first_machine_and_leaves_no_folder(tmp_path: Path, short: Path) -> None:
    with _machines(short, INPUTS=tmp_path / "missing", OUT=tmp_path / "tokens") as machines:
        assert [machine.wait(300) for machine in machines] == [2, 0]
    assert not (tmp_path / "tokens").exists()
