"""deploy/slurm.sh on a real Slurm of two nodes: runs that lose a node, are refused, stopped, continued."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.cli import vidshard_exits
from tests.support.held_back import held_back
from tests.support.markdown import ROOT
from tests.support.processes import COMMITTED_AT_ONCE, RUN, VIDSHARD, inputs, is_under_way, read_rows
from tests.support.slurm import Slurm, free_ports, programs, slurm_of_two_nodes
from tests.support.symmetric_run import install

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(programs() is None, reason="no Slurm here: install it, or name a folder with SLURM_ROOT"),
]
SCRIPT = ROOT / "deploy/slurm.sh"


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    with slurm_of_two_nodes(folder / "slurm") as running:
        tools = install(folder / "tools")
        running.environment["PATH"] = f"{tools}:{Path(VIDSHARD).parent}:{running.environment['PATH']}"
        running.environment["PYTHONPATH"] = str(ROOT)
        [port] = free_ports(1)
        running.environment["VIDSHARD_RAY_PORT"] = str(port)
        yield running


def _submit(slurm: Slurm, log: Path, *arguments: object) -> str:
    return slurm.run("sbatch", "--parsable", f"--output={log}", *arguments).strip()


@pytest.mark.timeout(600)
def test_a_run_on_two_nodes_of_slurm_is_complete(slurm: Slurm, many_spans: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "tokens", tmp_path / "log"
    job = _submit(slurm, log, "--nodes=2", SCRIPT, "tokenize", many_spans, "--out", out, *RUN)
    slurm.wait(job, "COMPLETED")
    assert "a Ray cluster of 2 nodes" in log.read_text()
    code, said = vidshard_exits("verify", out)
    assert code == 0, said


@pytest.mark.timeout(600)
def test_a_job_that_slurm_stops_is_queued_again_and_writes_every_clip_once(
    slurm: Slurm, many_spans: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "tokens", tmp_path / "log"
    with held_back(many_spans / "2.mp4", out) as held:
        arguments = (*inputs(many_spans, held), "--out", out, *RUN, *COMMITTED_AT_ONCE, "--grace-seconds", "1")
        job = _submit(slurm, log, "--nodes=1", SCRIPT, "tokenize", *arguments)
        slurm.wait(job, "RUNNING")
        while not (is_under_way(out) and held.is_reached):
            assert slurm.state(job) == "RUNNING", log.read_text()
        slurm.run("scancel", "--batch", "--signal=TERM", job)
        slurm.wait(job, "PENDING")
        before = read_rows(out)
        held.let_go()
        slurm.wait(job, "COMPLETED")
    assert "vidshard ended with 143" in log.read_text()
    rows = read_rows(out)
    assert 0 < len(before) < len(rows) == len(set(rows))
    assert set(before) <= set(rows)


@pytest.mark.timeout(600)
def test_each_task_of_an_array_has_an_output_of_its_own(slurm: Slurm, many_spans: Path, tmp_path: Path) -> None:
    # one after the other, as both nodes are this host, and have one port for Ray
    arguments = ("tokenize", many_spans / "%a.mp4", "--out", tmp_path / "tokens-%a", *RUN)
    job = _submit(slurm, tmp_path / "log-%a", "--array=0-1%1", "--nodes=1", SCRIPT, *arguments)
    slurm.wait(f"{job}_0", "COMPLETED")
    slurm.wait(f"{job}_1", "COMPLETED")
    for task in ("0", "1"):
        assert pq.read_table(next((tmp_path / f"tokens-{task}").glob("*.parquet"))).num_rows


@pytest.mark.timeout(600)
def test_a_run_that_loses_a_node_goes_on_with_the_other(slurm: Slurm, many_spans: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "tokens", tmp_path / "log"
    try:
        with held_back(many_spans / "2.mp4", out) as held:
            arguments = (*inputs(many_spans, held), "--out", out, *RUN, *COMMITTED_AT_ONCE)
            job = _submit(slurm, log, "--nodes=2", SCRIPT, "tokenize", *arguments)
            slurm.wait(job, "RUNNING")
            while not (is_under_way(out) and held.is_reached):
                assert slurm.state(job) == "RUNNING", log.read_text()
            slurm.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
            _signal(_of_node(job, "1"), signal.SIGKILL)
            while "a node left" not in log.read_text():
                assert slurm.state(job) == "RUNNING", log.read_text()
            held.let_go()
            slurm.wait(job, "COMPLETED")
    finally:
        if "State=DOWN" in slurm.run("scontrol", "show", "node", "n2"):  # it may be back, as its daemon answers
            slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    assert "vidshard ended with 0" in log.read_text()
    code, said = vidshard_exits("verify", out)
    assert code == 0, said
    assert "Restarts=0" in slurm.run("scontrol", "show", "job", job)


@pytest.mark.timeout(300)
def test_a_refused_run_fails_with_its_exit_code_and_is_not_queued_again(slurm: Slurm, tmp_path: Path) -> None:
    log = tmp_path / "log"
    job = _submit(slurm, log, "--nodes=1", SCRIPT, "tokenize", tmp_path / "missing", "--out", tmp_path / "tokens", *RUN)
    slurm.wait(job, "FAILED")
    shown = slurm.run("scontrol", "show", "job", job)
    assert "ExitCode=2:0" in shown
    assert "Restarts=0" in shown
    assert not (tmp_path / "tokens").exists()


@pytest.mark.timeout(600)
def test_a_step_that_is_ended_under_the_command_is_queued_again(slurm: Slurm, many_spans: Path, tmp_path: Path) -> None:
    # as preemption does without send_user_signal: SIGTERM to all processes of the step, Ray's too
    out, log = tmp_path / "tokens", tmp_path / "log"
    with held_back(many_spans / "2.mp4", out) as held:
        arguments = (*inputs(many_spans, held), "--out", out, *RUN, *COMMITTED_AT_ONCE, "--grace-seconds", "1")
        job = _submit(slurm, log, "--nodes=1", SCRIPT, "tokenize", *arguments)
        slurm.wait(job, "RUNNING")
        while not (is_under_way(out) and held.is_reached):
            assert slurm.state(job) == "RUNNING", log.read_text()
        _signal(_of_node(job, "0"), signal.SIGTERM)
        slurm.wait(job, "PENDING")
        held.let_go()
        slurm.wait(job, "COMPLETED")
    rows = read_rows(out)
    assert len(rows) == len(set(rows))
    assert vidshard_exits("verify", out)[0] == 0


def _of_node(job: str, node: str) -> list[int]:
    """Ids of the processes of a job's step on a node of Slurm, those of Ray among them."""
    wanted = {f"SLURM_JOB_ID={job}", f"SLURM_NODEID={node}", "SLURM_STEP_ID=0"}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted <= set((process / "environ").read_text(errors="replace").split("\0")):
                found.append(int(process.name))
    return found


def _signal(processes: list[int], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, number)
