"""Windows of consecutive clips: of one video, without a gap or a cut, each with its frames and signals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import vidshard
from tests.support.token_outputs import LATENTS, Made, provenance, write_shard
from vidshard.schemas.errors import UserError


def write(folder: Path, *shards: list[Made], **options: object) -> str:
    number = 0
    for at, videos in enumerate(shards):
        number = write_shard(folder / f"{at}.parquet", videos, first_id=number, **options)  # type: ignore[arg-type]
    return str(folder)


def windows(path: str, **options: object) -> list[list[str]]:
    dataset = vidshard.TokenShards(path, columns=["clip_id"], batch_size=100, **options)  # type: ignore[arg-type]
    found = [[f"{i[0]}{int(i[-6:])}" for i in ids] for batch in dataset for ids in batch["clip_id"]]
    return sorted(found)


def test_windows_stay_in_one_video_and_cross_no_gap(tmp_path: Path) -> None:
    path = write(tmp_path, [Made(video="a", count=5), Made(video="b", count=6, missing=(2,))])
    assert windows(path, sequence=2) == [["a0", "a1"], ["a2", "a3"], ["b0", "b1"], ["b3", "b4"]]
    assert windows(path, sequence=3, stride=1) == [
        ["a0", "a1", "a2"], ["a1", "a2", "a3"], ["a2", "a3", "a4"], ["b3", "b4", "b5"],
    ]  # fmt: skip


def test_windows_cross_no_cut(tmp_path: Path) -> None:
    cuts = [Made(video="a", count=2, part=(0.0, 2.5)), Made(video="a", count=3, part=(2.5, 6.25))]
    assert windows(write(tmp_path, cuts), sequence=2) == [["a0", "a1"], ["a0", "a1"]]


def test_windows_cross_row_groups_and_shards(tmp_path: Path) -> None:
    path = write(
        tmp_path, [Made(video="a", count=4), Made(video="b", first=3, count=3)],
        [Made(video="a", first=4, count=3), Made(video="b", count=3)], rows_per_group=2,
    )  # fmt: skip
    assert windows(path, sequence=6) == [[f"a{at}" for at in range(6)], [f"b{at}" for at in range(6)]]


def test_windows_hold_only_clips_that_pass_the_filter(tmp_path: Path) -> None:
    path = write(tmp_path, [Made(video="a", count=8)])
    assert windows(path, sequence=2, where="clip_index <> 3") == [["a0", "a1"], ["a4", "a5"], ["a6", "a7"]]


def test_clips_with_a_stride_are_consecutive_where_one_begins_at_the_end_of_the_other(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name, stride, expected in (("sparse", 2.5, []), ("overlap", 0.625, [["a0", "a2"], ["a1", "a3"]])):
        path = tmp_path / name / "0.parquet"
        write_shard(path, [Made(video="a", count=5)])
        table = pq.read_table(path)
        at = table.schema.get_field_index("start_seconds")
        pq.write_table(table.set_column(at, table.schema.field(at), pa.array([stride * i for i in range(5)])), path)
        if expected:
            assert windows(str(path), sequence=2) == expected
        else:
            with pytest.raises(UserError, match="the longest has 1"):
                windows(str(path), sequence=2)


def test_a_window_has_an_axis_of_clips(tmp_path: Path) -> None:
    path = write(tmp_path, [Made(video="a", count=4)])
    [batch] = vidshard.TokenShards(path, sequence=2, batch_size=2)
    assert batch["tokens"].shape == (2, 2, 2, 2, 3)
    assert batch["tokens"].flatten(2)[:, :, 0].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("kind", ["tokens", "latents"])
def test_clips_of_a_continuous_output_are_joined_in_time(tmp_path: Path, kind: str) -> None:
    metadata = provenance(run={"continuous": True})
    options = {"payload": LATENTS} if kind == "latents" else {}
    videos = [Made(video="a", count=4, continuous=True)]
    path = write(tmp_path, videos, metadata=metadata, signals=True, **options)
    [batch] = vidshard.TokenShards(
        path, columns=[kind], sequence=4, batch_size=1, signals="actions", signals_per="latent"
    )
    expected = [0, 0, 1, 1, 2, 2, 3, 3]
    if kind == "tokens":
        assert batch["tokens"].shape == (1, 8, 2, 3)
        assert batch["tokens"][0, :, 0, 0].tolist() == expected
    else:
        assert batch["latents"].shape == (1, 4, 8, 2, 2)
        assert batch["latents"][0, 1, :, 0, 0].tolist() == expected
    assert batch["actions_mask"].sum(dim=(2, 3)).tolist() == [[5, 8, 8, 8]]


def test_a_sequence_longer_than_any_video_is_refused_with_the_longest(tmp_path: Path) -> None:
    path = write(tmp_path, [Made(video="a", count=3), Made(video="b", count=5)])
    with pytest.raises(UserError, match="the longest has 5"):
        vidshard.TokenShards(path, sequence=6)
    for wrong in ({"sequence": 0}, {"sequence": 2, "stride": 0}, {"stride": 2}, {"sequence": 2.0}):
        with pytest.raises(UserError, match=r"sequence|stride"):
            vidshard.TokenShards(path, **wrong)


def test_every_window_comes_once_on_any_ranks(tmp_path: Path) -> None:
    videos = [Made(video=chr(97 + at), count=5 + at) for at in range(6)]
    path = write(tmp_path, videos[:3], videos[3:])
    expected = windows(path, sequence=3, stride=2)
    found = [w for rank in range(2) for w in windows(path, sequence=3, stride=2, shuffle=True, rank=rank, world_size=2)]
    assert sorted(found) == expected
    assert torch.equal(torch.tensor(len(expected)), torch.tensor(len(found)))


def test_a_video_that_is_in_two_outputs_gives_windows_of_each(tmp_path: Path) -> None:
    second = write_shard(tmp_path / "a" / "0.parquet", [Made(video="v", count=4)])
    write_shard(tmp_path / "b" / "0.parquet", [Made(video="v", count=4)], first_id=second)
    both = [str(tmp_path / name) for name in ("a", "b")]
    windows = [row["tokens"].flatten(1)[:, 0].tolist() for row in vidshard.TokenShards(both, sequence=2)]
    assert windows == [[0, 1], [2, 3], [4, 5], [6, 7]]
