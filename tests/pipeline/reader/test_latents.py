"""Latents of a batch: three of VidTwin, normalization, and samples; what may not be mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import vidshard
from tests.support.cli import vidshard_exits
from tests.support.token_outputs import LATENTS, TWIN, Made, provenance, write_output, write_shard
from vidshard.pipeline.reader.stats import ChannelStats
from vidshard.schemas.errors import UserError


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "out"
    write_output(folder, num_shards=2, payload=LATENTS)
    return folder


def test_all_latents_of_a_family_are_read_by_name(tmp_path: Path) -> None:
    write_output(tmp_path, num_shards=2, payload=TWIN)
    for at, row in enumerate(vidshard.TokenShards(str(tmp_path))):
        assert {name: tuple(row[name].shape) for name in row if name[0] != "_"} == {c.name: c.shape for c in TWIN}
        assert all(row[c.name].dtype is torch.float16 and (row[c.name] == at).all() for c in TWIN)


def test_log_variances_are_read_if_they_are_named(out: Path) -> None:
    row = next(iter(vidshard.TokenShards(str(out), columns=["latents_logvar"])))
    assert row["latents_logvar"].shape == LATENTS[0].shape
    assert "latents_logvar" not in next(iter(vidshard.TokenShards(str(out))))


def test_statistics_are_those_of_all_values_by_channel(out: Path) -> None:
    code, printed = vidshard_exits("stats", out)
    assert code == 0, printed
    values = np.concatenate([batch["latents"] for batch in vidshard.TokenShards(str(out), batch_size=9)]).astype(float)
    record = json.loads((out / "stats.json").read_text())["columns"]["latents"]
    assert np.allclose(record["mean"], values.mean(axis=(0, 2, 3, 4)))
    assert np.allclose(record["std"], values.std(axis=(0, 2, 3, 4)))
    batches = list(vidshard.TokenShards(str(out), batch_size=9, normalize=True))
    normal = torch.cat([batch["latents"] for batch in batches])
    assert normal.dtype is torch.float32
    assert abs(float(normal.mean())) < 1e-4
    assert abs(float(normal.std(unbiased=False)) - 1) < 1e-4


def test_statistics_that_are_missing_or_of_other_shards_are_named(out: Path, tmp_path: Path) -> None:
    write_output(tmp_path, num_shards=1, payload=LATENTS)
    with pytest.raises(UserError, match=f"vidshard stats {tmp_path}"):
        vidshard.TokenShards(str(tmp_path), normalize=True)
    assert vidshard_exits("stats", tmp_path)[0] == 0
    write_shard(tmp_path / "shards" / "more.parquet", [Made(video="z")], payload=LATENTS)
    with pytest.raises(UserError, match="the output has changed"):
        vidshard.TokenShards(str(tmp_path), normalize=True)
    for content in (b"", b"[]", b'{"shards": 1}', b"\xff"):
        (tmp_path / "stats.json").write_bytes(content)
        with pytest.raises(vidshard.VidshardError, match=r"stats\.json"):
            vidshard.TokenShards(str(tmp_path), normalize=True)


def test_statistics_of_tokens_and_of_a_single_shard_are_refused(tmp_path: Path) -> None:
    write_output(tmp_path / "a", num_shards=1)
    assert vidshard_exits("stats", tmp_path / "a")[0] == 2
    write_output(tmp_path / "b", num_shards=1, payload=LATENTS)
    code, printed = vidshard_exits("stats", tmp_path / "b" / "shards" / "0000.parquet")
    assert code == 2
    assert "single shard" in printed


def test_statistics_of_several_outputs_are_joined() -> None:
    values = np.random.default_rng(0).normal(3, 2, (2, 50))
    parts = [values[:, :10], values[:, 10:]]
    stats = [ChannelStats(count=p.shape[1], mean=p.mean(axis=1).tolist(), std=p.std(axis=1).tolist()) for p in parts]
    joined = stats[0].joined(stats[1])
    assert np.allclose(joined.mean, values.mean(axis=1))
    assert np.allclose(joined.std, values.std(axis=1))


def test_numbers_can_be_given(out: Path) -> None:
    plain = next(iter(vidshard.TokenShards(str(out), batch_size=9)))["latents"].float()
    given: dict[str, Any] = {"latents": ([1, 2, 3, 4], 2.0)}
    found = next(iter(vidshard.TokenShards(str(out), batch_size=9, normalize=given)))["latents"]
    assert torch.allclose(found[:, 3], (plain[:, 3] - 4) / 2)
    for wrong in ({"latents": ([1, 2], 1)}, {"latents": 3}, {"latents": (0, 0)}, {"tokens": (0, 1)}):
        with pytest.raises(UserError, match="normalize"):
            vidshard.TokenShards(str(out), normalize=wrong)


def test_samples_depend_on_seed_epoch_and_clip_alone(out: Path) -> None:
    def sampled(**options: Any) -> dict[float, torch.Tensor]:
        dataset = vidshard.TokenShards(str(out), columns=["latents", "clip_index", "clip_id"], sample=True, **options)
        return {
            name: latents for batch in dataset for name, latents in zip(batch["clip_id"], batch["latents"], strict=True)
        }

    first = sampled(batch_size=9)
    again = sampled(batch_size=4, shuffle=True)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[next(iter(first))], sampled(batch_size=9, seed=1)[next(iter(first))])
    assert not torch.equal(first[next(iter(first))], sampled(batch_size=9, epoch=1)[next(iter(first))])
    plain = vidshard.TokenShardsMap(str(out), columns=["latents", "clip_id"])
    noise = torch.cat(
        [(first[row["clip_id"]] - row["latents"].float()).flatten() for row in (plain[at] for at in range(len(plain)))]
    )
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 1) < 0.1


def test_samples_need_log_variances(tmp_path: Path) -> None:
    write_output(tmp_path / "tokens", num_shards=1)
    write_output(tmp_path / "twin", num_shards=1, payload=TWIN)
    with pytest.raises(UserError, match="latents"):
        vidshard.TokenShards(str(tmp_path / "tokens"), sample=True)
    with pytest.raises(UserError, match="structure_logvar"):
        vidshard.TokenShards(str(tmp_path / "twin"), sample=True)


# mixing


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("weights", {"weights_sha256": "cd" * 32}),
        ("rates", {"run": {"fps": "8"}}),
        ("lengths", {"run": {"frames": 9}}),
        ("geometries", {"run": {"resize": "pad"}}),
    ],
)
def test_what_should_not_be_mixed_is_refused_by_name_unless_allowed(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    write_shard(tmp_path / "a.parquet", [Made(video="a")])
    write_shard(tmp_path / "b.parquet", [Made(video="b")], metadata=provenance(**changes))
    both = [str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")]
    with pytest.raises(UserError, match=rf"a\.parquet and .*b\.parquet differ in .*allow_mixed=\['{kind}'\]"):
        vidshard.TokenShards(both)
    assert len(vidshard.TokenShards(both, allow_mixed=[kind])) == 8
    assert len(vidshard.TokenShards(both, allow_mixed=kind)) == 8
    assert len(vidshard.TokenShards(both, allow_mixed=True)) == 8


def test_format_versions_are_refused_by_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [Made(video="a")], payload=LATENTS)
    write_shard(tmp_path / "b.parquet", [Made(video="b")], payload=TWIN)
    for paths in ([str(tmp_path)], {str(tmp_path / "a.parquet"): 1, str(tmp_path / "b.parquet"): 2}):
        with pytest.raises(UserError, match=r"a\.parquet and .*b\.parquet differ in format version: 1; 2"):
            vidshard.TokenShards(paths)


def test_outputs_with_other_payloads_cannot_be_mixed(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.parquet", [Made(video="a")])
    write_shard(tmp_path / "b.parquet", [Made(video="b")], payload=TWIN)
    with pytest.raises(UserError, match="payload"):
        vidshard.TokenShards(str(tmp_path), allow_mixed=True)
    with pytest.raises(UserError, match="there is no kind 'weight'"):
        vidshard.TokenShards(str(tmp_path), allow_mixed=["weight"])


# outputs that cannot be read


def test_outputs_without_finished_shards_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty" / "shards").mkdir(parents=True)
    (tmp_path / "empty" / "run.json").write_text("{}")
    with pytest.raises(vidshard.VidshardError, match="committed nothing"):
        vidshard.TokenShards(str(tmp_path / "empty"))
    with pytest.raises(vidshard.VidshardError, match="there is no such folder"):
        vidshard.TokenShards(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="nothing to read"):
        vidshard.TokenShards([])


def test_more_ranks_than_clips_and_wrong_ranks_are_refused(out: Path) -> None:
    for rank, world_size, words in ((0, 999, "999 ranks cannot share"), (3, 3, "from 0"), (None, 2, "go together")):
        with pytest.raises(UserError, match=words):
            vidshard.TokenShards(str(out), rank=rank, world_size=world_size)
    wrong_options: list[dict[str, Any]] = [{"uneven": "pad"}, {"batch_size": 0}, {"lanes": 0}, {"signals_per": "clip"}]
    for wrong in wrong_options:
        with pytest.raises(UserError, match=next(iter(wrong))):
            vidshard.TokenShards(str(out), **wrong)


def test_damaged_shards_are_named_whenever_the_damage_is_met(tmp_path: Path) -> None:
    write_output(tmp_path, num_shards=2, rows_per_group=50)
    victim = tmp_path / "shards" / "0001.parquet"
    dataset = vidshard.TokenShards(str(tmp_path))
    data = bytearray(victim.read_bytes())
    metadata = pq.read_metadata(victim)
    names = [metadata.schema.column(at).path.split(".")[0] for at in range(metadata.num_columns)]
    chunk = metadata.row_group(0).column(names.index("tokens"))
    at = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 3
    data[at] ^= 0xFF
    victim.write_bytes(data)
    with pytest.raises(vidshard.VidshardError, match=r"0001\.parquet"):
        list(dataset)
    victim.write_bytes(b"PAR1 no")
    with pytest.raises(vidshard.VidshardError, match=r"0001\.parquet"):
        vidshard.TokenShards(str(tmp_path))


def test_a_token_beyond_the_codebook_is_damage(tmp_path: Path) -> None:
    file = tmp_path / "0.parquet"
    write_shard(file, [Made(video="a", count=4)], first_id=(1 << 18) - 2)
    with pytest.raises(vidshard.VidshardError, match=f"{file}.*codebook"):
        list(vidshard.TokenShards(str(file)))


def test_an_output_that_is_replaced_meanwhile_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "0.parquet"
    write_shard(file, [Made(video="a", count=6)])
    dataset = vidshard.TokenShards(str(file))
    write_shard(file, [Made(video="a", count=2)])
    with pytest.raises(vidshard.VidshardError, match="replaced"):
        list(dataset)


def test_columns_with_nulls_are_read_as_nan_or_named(tmp_path: Path) -> None:
    file = tmp_path / "0.parquet"
    write_shard(file, [Made(video="a", count=2)])
    row = next(iter(vidshard.TokenShards(str(file), columns=["part_start_seconds"])))
    assert torch.isnan(row["part_start_seconds"])


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint16(), pa.uint64(), pa.bool_()], ids=str)
def test_nulls_that_where_passes_by_are_no_error_beside_other_rows_of_their_row_group(
    tmp_path: Path, kind: pa.DataType
) -> None:
    file = tmp_path / "0.parquet"
    write_shard(file, [Made(video="a", count=12)])
    numbers = [None, 1, 0, 3, None, None, 6, 7, 8, None, 0, 11]
    values = [None if n is None else bool(n) if kind == pa.bool_() else n for n in numbers]
    table = pq.read_table(file)
    pq.write_table(table.append_column("n", pa.array(values, kind)), file, row_group_size=3)
    expected = [(at, value) for at, value in enumerate(values) if value is not None]

    content: dict[str, Any] = {"columns": ["clip_index", "n"], "where": "n is not null"}
    by_number = vidshard.TokenShardsMap(str(file), **content)
    for rows in (
        vidshard.TokenShards(str(file), **content),
        vidshard.TokenShards(str(file), shuffle=True, **content),
        [by_number[at] for at in range(len(by_number))],
    ):
        assert sorted((int(row["clip_index"]), row["n"].item()) for row in rows) == expected
    with pytest.raises(UserError, match="where='n is not null'"):
        list(vidshard.TokenShards(str(file), columns=["n"]))
