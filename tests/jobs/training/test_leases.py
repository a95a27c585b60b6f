"""Trainings into one folder: one runs, the other is told which, and one that was overtaken writes nothing more."""

from __future__ import annotations

import io
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from vidshard.jobs.training import job
from vidshard.jobs.training.job import _train_stages
from vidshard.pipeline.output.layout import LEASES
from vidshard.pipeline.output.lease import Lease, LeaseHeldError, LeaseLostError


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A training whose cluster, videos and workers are stand-ins; ``reached`` says how far it came."""
    reached: list[str] = []
    flags = {"ray_address": None, "object_store": None, "verbose": False, "threads": 1}
    run = SimpleNamespace(out=str(tmp_path / "run"), stages={"stage1": None}, **flags)
    made = SimpleNamespace(run=run, run_id="run", tokenizer=None, reached=reached)
    cluster = SimpleNamespace(is_own=True, num_cpus=1, num_nodes=1)
    outcome = SimpleNamespace(measured=True, digests={}, is_finished=True)

    def stand_in(name: str, result: Any) -> None:
        def called(*_: Any, **__: Any) -> Any:
            reached.append(name)
            return result

        monkeypatch.setattr(job, name, called)

    stand_in("ray_cluster", nullcontext(cluster))
    stand_in("nodes_watched", nullcontext())
    stand_in("begin_run", made)
    stand_in("prepare_data", (SimpleNamespace(rejections=[], digest=""), SimpleNamespace(epoch_length=1)))
    stand_in("StageJob", SimpleNamespace(folder=str(tmp_path / "run" / "stage1")))
    stand_in("_train_stage", outcome)
    stand_in("plan_resources", 1)
    for name in ("RunStatus", "print_run", "_finished", "_write_rejects", "write_summary"):
        stand_in(name, None)
    stand_in("_start_of", {})
    monkeypatch.setattr(job, "asdict", vars)
    return made


def test_of_two_trainings_into_one_folder_the_second_is_refused_before_it_starts_anything(
    training: Any,
) -> None:
    with Lease.acquire(training.run.out), pytest.raises(LeaseHeldError):
        _train_stages(training, Console(file=io.StringIO()))
    assert training.reached == []
    _train_stages(training, Console(file=io.StringIO()))  # given back: it may begin
    assert "write_summary" in training.reached


def test_a_training_that_was_overtaken_overwrites_nothing_of_the_other(
    training: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = Path(training.run.out) / LEASES
    result = Path(training.run.out) / "stage1" / job.STAGE_RESULT

    def overtaken(*_: Any) -> Any:
        [own] = leases.glob("*.json")
        (leases / own.name.replace("1", "2")).write_bytes(own.read_bytes())
        result.parent.mkdir(parents=True)
        result.write_text("of the other run")
        training.reached.clear()
        return SimpleNamespace(measured=True, digests={}, is_finished=True)

    monkeypatch.setattr(job, "_train_stage", overtaken)
    with pytest.raises(LeaseLostError):
        _train_stages(training, Console(file=io.StringIO()))
    assert result.read_text() == "of the other run"
    assert training.reached == []
