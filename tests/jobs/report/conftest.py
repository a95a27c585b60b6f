"""Runs that several tests make reports of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.training_files import write_training_files


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """Folder of a training run of two stages, of which one is finished."""
    return write_training_files(tmp_path / "training")
