"""A checkpoint is whole or absent; the last few and the best stay; those of another run are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vidshard.pipeline import storage
from vidshard.pipeline.training_data.checkpoints import CheckpointError, Checkpoints, CheckpointWriter


def state(step: int) -> dict[str, object]:
    return {"step": step, "weights": {"a": torch.full((3,), float(step))}}


def steps(checkpoints: Checkpoints) -> list[int]:
    return [info.step for info in checkpoints.infos()]


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), "run", keep_last=2, best_by="psnr")
    for step, psnr in enumerate([20.0, 25.0, 21.0, 22.0, 23.0]):
        checkpoints.save(state(step), step, {"psnr": psnr})
    assert steps(checkpoints) == [1, 3, 4]
    best, latest = checkpoints.best(), checkpoints.latest()
    assert best is not None
    assert latest is not None
    assert (best.step, latest.step) == (1, 4)
    assert torch.equal(checkpoints.load(latest)["weights"]["a"], torch.full((3,), 4.0))
    assert len(list(tmp_path.glob("checkpoints/*"))) == 6


def test_the_best_may_be_the_lowest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), "run", keep_last=1, best_by="lpips")
    for step, lpips in enumerate([0.5, 0.2, 0.4]):
        checkpoints.save(state(step), step, {"lpips": lpips})
    checkpoints.save(state(3), 3, {})  # not measured
    assert steps(checkpoints) == [1, 3]


@pytest.mark.parametrize("recorded", ["codebook_utilisation", "codebook_utilization"])
@pytest.mark.parametrize("asked", ["codebook_utilisation", "codebook_utilization"])
def test_the_best_is_found_by_former_and_present_names_of_a_metric(tmp_path: Path, recorded: str, asked: str) -> None:
    checkpoints = Checkpoints(str(tmp_path), "run", keep_last=1, best_by=asked)
    for step, share in enumerate([0.5, 0.7, 0.4]):
        checkpoints.save(state(step), step, {recorded: share})
    assert steps(checkpoints) == [1, 2]
    best = checkpoints.best()
    assert best is not None
    assert best.metrics == {"codebook_utilization": 0.7}


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), "run")
    checkpoints.save(state(1), 1, {})
    (tmp_path / "checkpoints" / "step-00000002.pt").write_bytes(b"half")
    assert steps(checkpoints) == [1]
    checkpoints.save(state(2), 2, {})
    assert steps(checkpoints) == [1, 2]


def test_a_damaged_checkpoint_and_that_of_another_run_are_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), "run")
    checkpoints.save(state(1), 1, {})
    [info] = checkpoints.infos()
    path = tmp_path / "checkpoints" / "step-00000001.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-00000001\.pt is damaged: delete it"):
        checkpoints.load(info)
    path.unlink()
    with pytest.raises(
        CheckpointError, match=r"is gone: delete .*step-00000001\.json too, then go on from the one before"
    ):
        checkpoints.load(info)
    with pytest.raises(CheckpointError, match="of another run \\(run, and this is mine\\): choose another --out"):
        Checkpoints(str(tmp_path), "mine").latest()


def test_writing_goes_on_beside_and_its_failure_is_told(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), "run")
    with CheckpointWriter(checkpoints) as writer:
        for step in range(3):
            writer.save(state(step), step, {})
    assert steps(checkpoints) == [1, 2]
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(storage.StorageError, match="cannot"),
        CheckpointWriter(Checkpoints(str(tmp_path / "file"), "run")) as writer,
    ):
        writer.save(state(0), 0, {})


def test_object_stores_hold_checkpoints_too(s3: str) -> None:
    checkpoints = Checkpoints("s3://videos/runs/a", "run", keep_last=1)
    for step in range(3):
        checkpoints.save(state(step), step, {})
    [info] = checkpoints.infos()
    assert checkpoints.load(info)["step"] == 2
