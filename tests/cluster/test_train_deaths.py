"""Trainings whose workers are killed, or which diverge: they end, go on, and give what an undisturbed one gives."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.support.held_status import HeldStatus
from tests.support.processes import processes_below
from tests.support.training import FIRST_STAGE, lines_of, resume, run_of, train, write_motion
from vidshard.jobs.training.resolve import read_record
from vidshard.pipeline.training_data.checkpoints import Checkpoints

pytestmark = [pytest.mark.deaths, pytest.mark.usefixtures("quick_controller")]

KILLED_AT = (15, 25)


@contextmanager
def workers_killed(folder: Path) -> Iterator[list[int]]:
    """One training worker is killed at each of the steps ``KILLED_AT``; gives the ids of what was killed."""
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        for step in KILLED_AT:
            while not (folder / f"waits-at-{step}").exists():
                if over.wait(0.01):
                    return
            workers = [pid for pid, title in processes_below(os.getpid()).items() if "RayTrainWorker" in title]
            os.kill(workers[-1], signal.SIGKILL)
            killed.append(workers[-1])
            (folder / f"goes-on-at-{step}").touch()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vidshard.jobs.training.job.RunStatus", partial(HeldStatus, folder, KILLED_AT))
            yield killed
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module")
def killed(videos: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, list[str]]:
    """Two workers, one of which is killed twice in the first stage: the second time ends the command, and another goes
    on. The run's folder, and what each printed."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    run = run_of(videos, out, ("stage1", "stage2"), **FIRST_STAGE, max_failures=1, stage2=["steps=4", "gan_start=2"])
    with workers_killed(tmp_path_factory.mktemp("kills")) as pids:
        code, text = train(run)
        assert code == 1, text
        assert len(pids) == 2
        text_again = io.StringIO()
        newer = write_motion(videos / "newer.mp4", 99)  # would come between the others, and each clip be another
        assert resume(str(out), {}, Console(file=text_again, width=200)) == 0, text_again.getvalue()
        newer.unlink()
    return out, [text, text_again.getvalue()]


@pytest.fixture(scope="module")
def undisturbed(videos: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, str]:
    """The same first stage whose workers live; but for its last step, which is one of divergence."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, text = train(run_of(videos, out, **FIRST_STAGE, divergence_after=39, divergence_l1=0.05))
    assert code == 1, text
    return out, text


def test_a_run_whose_workers_are_killed_ends_with_a_remedy_and_goes_on(killed: tuple[Path, list[str]]) -> None:
    out, (text, text_again) = killed
    assert "stage1 stopped after 1 restarts" in text
    assert "vidshard train resume" in text
    assert "stage1: 40 steps" in text_again
    assert "stage1: goes on with the videos that it began with" in text_again
    assert [line["step"] for line in lines_of(out)] == list(range(1, 41))  # none twice, none missing
    assert [line["step"] for line in lines_of(out, "stage2")] == [1, 2, 3, 4]


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    killed: tuple[Path, list[str]],
    undisturbed: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out_killed, whole = killed[0], undisturbed[0]
    for group in ("train", "held_out"):
        lines = lines_of(whole, group=group)
        assert lines[-1]["step"] == (39 if group == "train" else 20)
        assert lines_of(out_killed, group=group)[: len(lines)] == lines
    results = [json.loads((out / "stage1" / "result.json").read_text()) for out in (out_killed, whole)]
    assert [result["restarts"] for result in results] == [1, 0]
    mirrored = [line["clips_mirrored"] for line in lines_of(out_killed)]
    assert results[0]["made"] == {"mirrored": sum(mirrored)}
    assert 0.3 < sum(mirrored) / (40 * 4) < 0.7
    states: list[list[torch.Tensor]] = []
    for out in (out_killed, whole):
        checkpoints = Checkpoints(str(out / "stage1"), read_record(str(out))["run_id"])
        [info] = [info for info in checkpoints.infos() if info.step == 30]
        state = checkpoints.load(info)["state"]
        del state["rng"]  # with which numbers a process begins is its own affair, and FSQ draws none
        states.append(tensors_of(state))
    assert len(states[0]) > 200  # weights, averages, and what the optimizers keep
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
    # checkpoints of one run are nothing to another
    shutil.copytree(whole, tmp_path / "whole")
    shutil.copytree(
        out_killed / "stage1" / "checkpoints", tmp_path / "whole" / "stage1" / "checkpoints", dirs_exist_ok=True
    )
    capsys.readouterr()
    assert resume(str(tmp_path / "whole"), {}, Console(file=io.StringIO())) == 2
    assert "holds checkpoints of another run" in capsys.readouterr().err


def tensors_of(state: Any) -> list[torch.Tensor]:
    """All that a nest of mappings and sequences holds."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def test_divergence_ends_the_run_names_the_terms_and_keeps_the_last_checkpoint(undisturbed: tuple[Path, str]) -> None:
    out, text = undisturbed
    assert "training diverges" in text
    assert "nll" in text
    assert "1 restarts" not in text  # starting again would only repeat it
    assert "**Not finished:**" in (out / "summary.md").read_text()
    checkpoints = Checkpoints(str(out / "stage1"), read_record(str(out))["run_id"])
    assert checkpoints.infos()[-1].step == 30
