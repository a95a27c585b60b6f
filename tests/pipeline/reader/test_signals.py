"""Signals of a batch: by frame or by latent, padded, with a mask."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import vidshard
from tests.support.token_outputs import FRAMES, Made, provenance, write_shard
from vidshard.pipeline.reader.frames import FrameCells
from vidshard.schemas.errors import UserError

VIDEOS = [Made(video="a", count=2), Made(video="b", count=1, signal=False)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("signals") / "0.parquet"
    write_shard(file, VIDEOS, signals=True)
    return str(file)


def batch(path: str, **options: object) -> dict[str, Any]:
    [found] = vidshard.TokenShards(path, columns=["clip_id"], batch_size=3, **options)  # type: ignore[arg-type]
    return found


def test_a_signal_has_a_value_for_each_frame(path: str) -> None:
    found = batch(path, signals=["actions"])
    times = np.arange(2 * FRAMES).reshape(2, FRAMES) / 4
    assert np.array_equal(found["actions"][:2], np.stack([times, -times], -1))
    assert found["actions_mask"].tolist() == [[True] * 5, [True] * 5, [False] * 5]
    assert not found["actions"][2].any()


def test_frames_are_grouped_by_latent(path: str) -> None:
    """A causal tokenizer of stride 4: the first latent is the first frame, the second the four after it."""
    found = batch(path, signals="actions", signals_per="latent")
    assert found["actions"].shape == (3, 2, 4, 2)
    assert found["actions_mask"][0].tolist() == [[True, False, False, False], [True] * 4]
    assert found["actions"][1, :, :, 0].tolist() == [[1.25, 0, 0, 0], [1.5, 1.75, 2.0, 2.25]]


def test_windows_of_samples_are_padded(path: str) -> None:
    found = batch(path, signals="poses")
    assert found["poses"].shape == (3, 5, 2, 1)
    assert found["poses_mask"][0].sum(dim=1).tolist() == [0, 1, 2, 0, 1]
    assert found["poses_seconds"][0, 2].tolist() == [0.5, 0.5]
    grouped = batch(path, signals="poses", signals_per="latent")
    assert grouped["poses_mask"].sum(dim=2).tolist() == [[0, 4], [0, 4], [0, 0]]
    assert grouped["poses"][0, 1, :, 0].tolist() == [0.25, 0.5, 0.5, 1.0]


def test_times_of_frames_can_be_read_as_a_signal(path: str) -> None:
    found = batch(path, signals="frame_pts_seconds", signals_per="latent")
    assert found["frame_pts_seconds"].shape == (3, 2, 4)
    assert found["frame_pts_seconds_mask"].sum() == 15


def test_copies_of_the_last_frame_and_nan_are_masked(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    file = tmp_path / "0.parquet"
    write_shard(file, [Made(video="a", count=1)], signals=True)
    table = pq.read_table(file)
    at, valid = (table.schema.get_field_index(name) for name in ("actions", "num_valid_frames"))
    values = pa.array([[[1, 2], [float("nan"), 2], [3, 4], [5, 6], [7, 8]]], table.schema.field(at).type)
    table = table.set_column(at, table.schema.field(at), values)
    table = table.set_column(valid, table.schema.field(valid), pa.array([3], pa.int32()))
    pq.write_table(table, file)
    [found] = vidshard.TokenShards(str(file), signals="actions", batch_size=1)
    assert found["actions_mask"].tolist() == [[True, False, True, False, False]]
    assert found["actions"][0, :, 0].tolist() == [1, 0, 3, 0, 0]


@pytest.mark.parametrize("bad", [[[1.0, 2.0]] * 4, [[1.0]] * 5, [[1.0, 2.0]] * 4 + [None]])
def test_a_signal_that_does_not_fit_its_clip_names_the_shard(tmp_path: Path, bad: list[object]) -> None:
    import pyarrow.parquet as pq

    file = tmp_path / "0.parquet"
    write_shard(file, [Made(video="a", count=2)], signals=True)
    table = pq.read_table(file)
    at = table.schema.get_field_index("actions")
    good = [[1.0, 2.0]] * 5
    table = table.set_column(at, table.schema.field(at), pa.array([good, bad], table.schema.field(at).type))
    pq.write_table(table, file)
    with pytest.raises(vidshard.VidshardError, match=str(file)):
        list(vidshard.TokenShards(str(file), signals="actions"))


def test_a_signal_that_no_row_has_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean actions"):
        batch(path, signals="action")
    file = tmp_path / "0.parquet"
    write_shard(file, VIDEOS[1:], signals=True)
    with pytest.raises(UserError, match="no row has it"):
        batch(str(file), signals="actions")
    for wrong in ("caption", "clip_index", "geometry"):
        with pytest.raises(UserError, match="no signal"):
            batch(path, signals=wrong)
    with pytest.raises(UserError, match="in columns and in signals"):
        batch(path, signals="clip_id")


CAUSAL = FrameCells(num_frames=17, num_latents=5, time_stride=4, num_encoded=17, copies_first=False)


@pytest.mark.parametrize(
    ("cells", "num_frames", "counts"),
    [
        (CAUSAL, 17, [1, 4, 4, 4, 4]),
        (replace(CAUSAL, num_frames=20, num_encoded=None), 17, [1, 4, 4, 4, 4]),
        (replace(CAUSAL, num_frames=20, num_encoded=None), 20, [4, 4, 4, 4, 4]),
        (replace(CAUSAL, num_frames=16), 16, [1, 4, 4, 4, 3]),
        (replace(CAUSAL, num_frames=15, copies_first=True), 15, [0, 3, 4, 4, 4]),
        (replace(CAUSAL, num_frames=18, num_encoded=18), 18, [2, 4, 4, 4, 4]),
        (FrameCells(num_frames=16, num_latents=4, time_stride=4, num_encoded=16, copies_first=False), 16, [4] * 4),
        (FrameCells(num_frames=4, num_latents=4, time_stride=1, num_encoded=4, copies_first=False), 4, [1] * 4),
    ],
)
def test_each_frame_belongs_to_the_latent_that_stands_for_it(
    cells: FrameCells, num_frames: int, counts: list[int]
) -> None:
    rows = pa.StructArray.from_arrays(
        [pa.array([[0.0] * num_frames] * 2), pa.array([num_frames] * 2, pa.int32())], list(FrameCells.reads)
    )
    cell, inside, _, num_cells = cells.of(rows, per_latent=True)
    assert np.bincount(cell, minlength=2 * num_cells).tolist() == counts * 2
    assert inside.all()


def test_latents_of_an_unknown_tokenizer_cannot_be_aligned(tmp_path: Path) -> None:
    file = tmp_path / "0.parquet"
    write_shard(file, VIDEOS, signals=True, metadata=provenance(tokenizer={"family": "other"}))
    with pytest.raises(UserError, match="unknown tokenizer family"):
        batch(str(file), signals="actions", signals_per="latent")
