"""Staged files: invisible until they are published, whole then, and gone for whoever was overtaken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.faulty_s3 import FaultyS3
from vidshard.pipeline import storage

CONTENT = bytes(range(256)) * 40


@pytest.fixture(params=["local", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, s3: str) -> str:
    """A folder of each kind of storage."""
    return {"local": str(tmp_path), "memory": f"memory://{tmp_path.name}", "s3": f"s3://videos/{tmp_path.name}"}[
        request.param
    ]


def staged_file(root: str, number: int = 1) -> storage.StagedFile:
    area = f"{root}/staged/{number:06d}"
    storage.open_area(area)
    return storage.stage(f"{root}/shards/a.parquet", CONTENT, area=area)


def test_a_staged_file_is_visible_and_whole_once_it_is_published(root: str) -> None:
    staged = staged_file(root)
    assert storage.list_files(f"{root}/shards", ".parquet") == []
    storage.publish(staged)
    assert storage.read_bytes(f"{root}/shards/a.parquet") == CONTENT
    assert storage.remove_areas(f"{root}/staged", f"{root}/shards") == 0


def test_a_discarded_file_is_gone(root: str) -> None:
    staged = staged_file(root)
    storage.discard(staged)
    with pytest.raises(storage.StagedFileGoneError, match="another run has taken over"):
        storage.publish(staged)
    assert storage.list_files(f"{root}/shards", ".parquet") == []


def test_what_was_staged_before_a_take_over_cannot_be_published_after_it(root: str) -> None:
    zombie = staged_file(root)
    assert storage.remove_areas(f"{root}/staged", f"{root}/shards") == 1
    ours = staged_file(root, 2)
    with pytest.raises(storage.StagedFileGoneError):
        storage.publish(zombie)
    assert storage.list_files(f"{root}/shards", ".parquet") == []
    storage.publish(ours)
    assert storage.read_bytes(f"{root}/shards/a.parquet") == CONTENT


def test_nothing_is_staged_in_an_area_that_was_removed(tmp_path: Path) -> None:
    staged_file(str(tmp_path))
    storage.remove_areas(f"{tmp_path}/staged", f"{tmp_path}/shards")
    with pytest.raises(storage.StagedFileGoneError):
        storage.stage(f"{tmp_path}/shards/b.parquet", CONTENT, area=f"{tmp_path}/staged/000001")


@pytest.mark.parametrize("kind", ["lost_answer", "reset_after", "slow_down", "internal_error", "reset_before"])
@pytest.mark.parametrize("step", ["POST uploads", "PUT partNumber", "POST uploadId"])
def test_steps_that_fail_are_repeated(kind: str, step: str, faulty_s3: FaultyS3, tmp_path: Path) -> None:
    method, path = step.split()
    faulty_s3.misbehave(kind, method=method, path=path)
    root = f"s3://videos/{tmp_path.name}"
    storage.publish(staged_file(root))
    assert storage.read_bytes(f"{root}/shards/a.parquet") == CONTENT
