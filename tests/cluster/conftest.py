"""Videos to train on, and a Ray Train that looks often."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.training import write_motion


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos to train on, and one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(12):
        write_motion(folder / f"v{number:02d}.mp4", number)
    (folder / "junk.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def quick_controller() -> Iterator[None]:
    """Ray Train looks every two seconds whether its workers live, and ended; here it shall not be waited for.

    Nor shall it start a process to learn of preemptions, and one that frees placement groups when a driver dies, as
    the session's Ray ends with its driver.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_V2_ENABLED", "1")  # read at the import
        from ray.train.torch import TorchTrainer

        usual = TorchTrainer._create_default_callbacks

        def callbacks(trainer: TorchTrainer) -> list[Any]:
            return [each for each in usual(trainer) if type(each).__name__ != "PlacementGroupCleanerCallback"]

        patch.setattr(TorchTrainer, "_create_default_callbacks", callbacks)
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        yield
