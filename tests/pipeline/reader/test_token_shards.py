"""Reading an output for training: rows, ranks, real loader workers, kills, and states."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

import vidshard
from tests.support.token_outputs import TOKENS, write_output
from vidshard.pipeline.reader.transport import message_bytes
from vidshard.schemas.errors import UserError
from vidshard.schemas.tokens import tokens_payload


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """98 clips in 7 shards; clip n of the files' order holds n everywhere."""
    folder = tmp_path_factory.mktemp("reader") / "tokens"
    assert write_output(folder, num_shards=7) == 98
    return folder


def numbers(batches: Iterable[dict[str, Any]]) -> list[int]:
    """Numbers of the clips of batches."""
    return [number for batch in batches for number in batch["tokens"].reshape(len(batch["tokens"]), -1)[:, 0].tolist()]


def shards(out: Path, **options: Any) -> vidshard.TokenShards:
    return vidshard.TokenShards(str(out), **{"batch_size": 4, "shuffle": True, **options})


def some(batches: Iterable[Any], count: int) -> list[Any]:
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


# rows


def test_rows_are_dictionaries_of_tensors_of_their_true_shape(out: Path) -> None:
    rows = list(vidshard.TokenShards(str(out), columns=["tokens", "clip_id", "fps", "clip_index", "frame_pts_seconds"]))
    assert [int(row["tokens"][0, 0, 0]) for row in rows] == list(range(98))
    row = rows[5]
    assert row["tokens"].shape == TOKENS[0].shape
    assert row["tokens"].dtype is torch.int32
    assert (row["tokens"] == 5).all()
    assert isinstance(row["clip_id"], str)
    assert row["fps"] == 4.0
    assert row["clip_index"].dtype is torch.int32
    assert row["frame_pts_seconds"].shape == (5,)


def test_batches_hold_what_rows_hold(out: Path) -> None:
    columns = ["caption", "tokens", "source_fps", "continues_previous", "geometry"]
    rows = list(shards(out, columns=columns, batch_size=None))
    for at, batch in enumerate(shards(out, columns=columns)):
        for inner in range(len(batch["caption"])):
            row = rows[4 * at + inner]
            assert all(
                torch.equal(batch[name][inner], row[name]) for name in ("tokens", "source_fps", "continues_previous")
            )
            assert batch["caption"][inner] == row["caption"]
            assert batch["geometry"][inner] == row["geometry"]
            assert int(row["tokens"][0, 0, 0]) == int(batch["tokens"][inner, 0, 0, 0])


def test_the_twin_reads_any_row_by_number(out: Path) -> None:
    twin = vidshard.TokenShardsMap(str(out), columns=["tokens", "caption"])
    assert len(twin) == 98
    assert int(twin[17]["tokens"][0, 0, 0]) == 17
    assert int(twin[-1]["tokens"][0, 0, 0]) == 97
    loaded = DataLoader(twin, batch_size=7, shuffle=True)
    assert sorted(numbers(loaded)) == list(range(98))
    with pytest.raises(IndexError, match="98"):
        twin[98]
    assert int(pickle.loads(pickle.dumps(twin))[3]["tokens"][0, 0, 0]) == 3


def test_several_outputs_and_any_way_to_name_them_are_read_as_one(out: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(out / "shards", tmp_path / "other"))
    whole = vidshard.TokenShards([str(out), str(other)], batch_size=50)
    assert sorted(numbers(whole)) == sorted([*range(98), *range(98)])
    assert len(vidshard.TokenShards(str(other / "0000.parquet"))) == 14
    assert len(vidshard.TokenShards(out)) == len(vidshard.TokenShards(path for path in [out])) == 98
    mixture = next(iter(vidshard.TokenShards({out: 1, other: 1}, batch_size=4)))
    assert set(mixture["_source"]) == {str(out), str(other)}


@pytest.mark.parametrize("paths", [None, 3, b"tokens", [3], [None], {3: 1}])
def test_what_is_no_path_is_refused(paths: Any) -> None:
    with pytest.raises(UserError, match="path"):
        vidshard.TokenShards(paths)


def test_the_twin_takes_no_weights(out: Path) -> None:
    with pytest.raises(UserError, match="list of paths"):
        vidshard.TokenShardsMap({str(out): 1})


@pytest.mark.parametrize("reader", [vidshard.TokenShards, vidshard.TokenShardsMap])
def test_an_argument_of_another_name_is_named_with_the_nearest_one(out: Path, reader: Any) -> None:
    with pytest.raises(TypeError, match=r"no argument 'colums': is 'columns' meant\?"):
        reader(str(out), colums=["tokens"])


# ranks, workers, states


@pytest.mark.parametrize("num_workers", [1, 2])
def test_loader_workers_give_the_order_of_one_process(out: Path, num_workers: int) -> None:
    alone = [batch["tokens"] for batch in shards(out)]
    loaded = DataLoader(shards(out), batch_size=None, num_workers=num_workers, multiprocessing_context="fork")
    for mine, theirs in zip(alone, loaded, strict=True):
        assert torch.equal(mine, theirs["tokens"])


def test_ranks_share_out_every_step_of_the_order(out: Path) -> None:
    alone = numbers(shards(out, batch_size=1))
    ranks = [list(shards(out, rank=rank, world_size=3, batch_size=5)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    steps = [numbers(batch for batches in ranks for batch in [batches[at]]) for at in range(len(ranks[0]))]
    assert [number for step in steps for number in step] == alone[: 98 - 98 % 3]
    assert [batch["_position"] for batch in ranks[0]][-1] == 98


@pytest.mark.parametrize(("before", "after"), [((0, 1), (2, 3)), ((2, 2), (0, 1)), ((1, 3), (2, 2))])
def test_a_job_goes_on_with_other_workers_ranks_and_batches(
    out: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    """(workers, ranks) before and after; the rest of the epoch is what had not been seen, then comes the next one."""
    workers, ranks = before
    seen, states = [], []
    for rank in range(ranks):
        loader = shards(out, rank=rank, world_size=ranks, batch_size=3).loader(workers)
        seen += numbers(some(loader, 4))
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert all(state == states[0] for state in states), "one state for all ranks"
    assert set(states[0]) == {"samples", "dataset"}
    workers, ranks = after
    rest, following = [], []
    for rank in range(ranks):
        loader = shards(out, rank=rank, world_size=ranks, batch_size=5).loader(workers)
        loader.load_state_dict(states[0])
        rest += numbers(loader)
        following += numbers(loader)
    assert not set(seen) & set(rest)
    assert len(set(rest)) == len(rest)
    assert len(seen) + len(rest) > 98 - ranks
    assert len(following) > 98 - ranks
    assert following != rest + seen


def test_a_plain_loader_with_workers_goes_on_from_the_last_batch_that_was_used(out: Path) -> None:
    dataset = shards(out)
    used = some(DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context="fork"), 5)
    with pytest.raises(UserError, match="workers"):
        dataset.state_dict()
    state = dataset.state_dict(used[-1])
    again = shards(out)
    again.load_state_dict(state)
    loader = DataLoader(again, batch_size=None, num_workers=2, multiprocessing_context="fork")
    rest = numbers(loader)
    assert sorted(numbers(used) + rest) == list(range(98))
    assert len(numbers(loader)) == 98, "the state is that of one epoch, also where workers are begun anew"


def test_a_killed_training_goes_on_after_its_last_saved_state(out: Path, tmp_path: Path) -> None:
    code = f"""
import json, os, vidshard
loader = vidshard.TokenShards({str(out)!r}, batch_size=4, shuffle=True, seed=5).loader(2)
for batch in loader:
    numbers = batch["tokens"].flatten(1)[:, 0].tolist()
    print(json.dumps([numbers, loader.state_dict()]), flush=True)
    if loader.state_dict()["samples"] == 44:
        os.kill(os.getpid(), 9)
"""
    with (tmp_path / "log").open("w") as log:  # a pipe would be held open by the workers for seconds after the kill
        assert subprocess.run([sys.executable, "-c", code], stdout=log, check=False).returncode == -9
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    seen = [number for numbers, _ in lines for number in numbers]
    loader = shards(out, seed=5, batch_size=7).loader()
    loader.load_state_dict(lines[-1][1])
    assert sorted(seen + numbers(loader)) == list(range(98))


def test_epochs_follow_one_another_and_each_has_its_order(out: Path) -> None:
    loader = shards(out).loader()
    epochs = [numbers(loader) for _ in range(3)]
    assert all(sorted(epoch) == list(range(98)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    dataset = shards(out)
    dataset.set_epoch(2)
    assert numbers(dataset) == epochs[2]
    assert numbers(shards(out, epoch=1)) == epochs[1]


def test_a_copy_of_an_output_has_the_same_order_and_states(out: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    first = shards(out)
    seen = numbers(some(first, 3))
    moved = shards(copy)
    moved.load_state_dict(first.state_dict())
    assert sorted(seen + numbers(moved)) == list(range(98))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 1}, "another order"),
        ({"shuffle": False}, "another order"),
        ({"lanes": 8}, "another order"),
        ({"where": "clip_index < 2"}, "another dataset"),
        ({"sequence": 2}, "another dataset"),
    ],
)
def test_a_state_of_another_dataset_or_order_is_refused(out: Path, changed: dict[str, Any], words: str) -> None:
    state = shards(out).state_dict()
    with pytest.raises(UserError, match=words):
        shards(out, **changed).load_state_dict(state)


def test_a_state_of_an_output_that_grew_is_refused(out: Path, tmp_path: Path) -> None:
    state = shards(out).state_dict()
    grown = Path(shutil.copytree(out, tmp_path / "grown"))
    (grown / "shards" / "0099.parquet").write_bytes((grown / "shards" / "0000.parquet").read_bytes())
    with pytest.raises(UserError, match="another dataset"):
        shards(grown).load_state_dict(state)


def test_a_state_of_the_same_videos_tokenized_otherwise_is_refused_and_one_of_before_is_taken(
    out: Path, tmp_path: Path
) -> None:
    dataset = shards(out)
    state = dataset.state_dict()
    before = {**state, "dataset": state["dataset"].replace(dataset._source.digest, dataset._source.digest_before)}
    assert before != state
    shards(out).load_state_dict(before)
    other = Path(shutil.copytree(out, tmp_path / "other"))
    for path in sorted((other / "shards").iterdir()):
        file = pq.ParquetFile(io.BytesIO(path.read_bytes()))
        metadata = dict(file.schema_arrow.metadata)
        metadata[b"vidshard.identity"] = json.dumps({"resize": "pad"}).encode()
        with pq.ParquetWriter(path, file.schema_arrow.with_metadata(metadata)) as writer:
            for group in range(file.num_row_groups):
                writer.write_table(file.read_row_group(group).replace_schema_metadata(metadata))
    with pytest.raises(UserError, match="another dataset"):
        shards(other).load_state_dict(state)


@pytest.mark.parametrize(
    "state",
    [{}, {"samples": "x", "dataset": "y"}, {"samples": -1}, {"samples": None, "dataset": 1},
     {"samples": float("inf"), "dataset": "y"}, {"samples": 1.5, "dataset": "y"}],
)  # fmt: skip
def test_what_is_no_state_is_refused(out: Path, state: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="state"):
        shards(out).load_state_dict(state)


# buckets


def test_batches_hold_one_frame_size_and_every_clip_comes_once(tmp_path: Path) -> None:
    count = write_output(tmp_path / "small", num_shards=3)
    write_output(tmp_path / "large", num_shards=2, payload=tokens_payload((2, 4, 4), 1 << 18))
    both = [str(tmp_path / "small"), str(tmp_path / "large")]
    dataset = vidshard.TokenShards(both, batch_size=5, shuffle=True)
    shapes = [tuple(batch["tokens"].shape[1:]) for batch in dataset]
    assert set(shapes) == {(2, 2, 3), (2, 4, 4)}
    assert len(dataset) == len(shapes)
    assert len(numbers(dataset)) == dataset.num_samples > count
    twin = vidshard.TokenShardsMap(both)
    assert {tuple(row["tokens"].shape) for row in twin.__getitems__([0, len(twin) - 1])} == {(2, 2, 3), (2, 4, 4)}


# processes that torch.distributed knows


def test_rank_and_world_size_are_those_of_torch_distributed(out: Path, tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert len(shards(out, batch_size=98)) == 1
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture
def two_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 3)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)


def test_processes_that_are_spawned_keep_the_rank(
    out: Path, two_of_three: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = pickle.dumps(shards(out))
    monkeypatch.undo()
    assert numbers(pickle.loads(pickled)) == numbers(shards(out, rank=1, world_size=3))


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("batch_size", 2.0), ("batch_size", True), ("lanes", -1), ("seed", "a"), ("seed", 1.5),
     ("epoch", None), ("epoch", 1 << 80), ("sequence", 0), ("sequence", "2")],
)  # fmt: skip
def test_what_is_no_whole_number_is_refused_by_name(out: Path, name: str, value: Any) -> None:
    with pytest.raises(vidshard.VidshardError, match=name):
        vidshard.TokenShards(str(out), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("columns", 5), ("columns", [5]), ("columns", [None]), ("signals", 5), ("signals", [True]), ("allow_mixed", 5),
     ("allow_mixed", [5]), ("where", 5), ("normalize", "latents"), ("normalize", 1)],
)  # fmt: skip
def test_what_is_no_name_or_text_is_refused_by_the_argument(out: Path, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{name} "):
        vidshard.TokenShards(str(out), **{name: value})


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"drop_last": True}, {"shuffle": True}])
def test_what_the_dataset_decides_is_refused_by_the_loader(out: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"give {next(iter(options))}= to TokenShards"):
        shards(out).loader(**options)
    unset: dict[str, Any] = dict.fromkeys(options)
    assert len(shards(out).loader(**unset)) == len(shards(out))


def test_a_process_that_ends_within_an_epoch_says_nothing(out: Path) -> None:
    code = f"""
import vidshard
batches = iter(vidshard.TokenShards({str(out)!r}, batch_size=2, shuffle=True).loader())
next(batches)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stderr == ""


@pytest.mark.parametrize("workers", [-1, 1.0, "2", None])
def test_a_wrong_number_of_workers_is_refused(out: Path, workers: Any) -> None:
    with pytest.raises(vidshard.VidshardError, match="num_workers"):
        vidshard.TokenShards(str(out), batch_size=2).loader(workers)


def test_any_integer_type_is_a_number(out: Path) -> None:
    numbers: Any = np.int64(3), np.uint8(1), np.int32(1)
    shards = vidshard.TokenShards(str(out), batch_size=numbers[0], seed=numbers[1], shuffle=True)
    assert len(next(iter(shards.loader(numbers[2])))["tokens"]) == 3
    twin: Any = vidshard.TokenShardsMap(str(out))
    assert torch.equal(twin[np.int64(1)]["tokens"], twin[torch.tensor(1)]["tokens"])
    for index in (slice(0, 2), 1.5, "1"):
        with pytest.raises(TypeError):
            twin[index]


def test_a_batch_larger_than_the_dataset_holds_all_of_it(out: Path) -> None:
    shards = vidshard.TokenShards(str(out), batch_size=10**9)
    assert [len(batch["tokens"]) for batch in shards.loader(1)] == [shards.num_samples]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_left_at_its_last_batch_is_over(out: Path, workers: int) -> None:
    shards = vidshard.TokenShards(str(out), columns=["clip_id"], batch_size=5, shuffle=True)
    whole = [ids(shards.loader()) for _ in range(2)]
    shards = vidshard.TokenShards(str(out), columns=["clip_id"], batch_size=5, shuffle=True)
    loader = shards.loader(workers)
    for at, _ in enumerate(loader):
        if at == len(loader) - 1:
            break
    assert ids(loader) == whole[1], "and not an epoch without batches"
    once = vidshard.TokenShards(str(out), columns=["clip_id"], batch_size=5, shuffle=True)
    assert len(list(once)) == len(once)
    assert ids(once.loader(workers)) == whole[1]


def test_workers_that_are_kept_learn_of_the_next_epoch(out: Path) -> None:
    shards = vidshard.TokenShards(str(out), columns=["clip_id"], batch_size=5, shuffle=True)
    loader: Any = torch.utils.data.DataLoader(shards, batch_size=None, num_workers=2, persistent_workers=True)
    found = []
    for epoch in range(3):
        shards.set_epoch(epoch)
        found.append(ids(loader))
    plain = vidshard.TokenShards(str(out), columns=["clip_id"], batch_size=5, shuffle=True).loader()
    assert found == [ids(plain) for _ in range(3)]


def ids(batches: Any) -> list[str]:
    return [clip for batch in batches for clip in batch["clip_id"]]


@pytest.mark.parametrize(("shuffle", "workers"), [(True, 2), (False, 2)])
def test_a_job_goes_on_from_the_middle_of_a_message_of_several_batches(out: Path, shuffle: bool, workers: int) -> None:
    def loader(batch_size: int, num_workers: int) -> Any:
        options: dict[str, Any] = {"columns": ["clip_id"], "shuffle": shuffle}
        return vidshard.TokenShards(str(out), batch_size=batch_size, **options).loader(num_workers)

    whole = ids(loader(1, 0))
    shards = loader(1, workers)._dataset
    cycle, parts = shards._turns_of(workers, message_bytes(workers, 2))
    assert cycle // parts > 2, "a message holds several batches"
    for cut in (1, 4, 17):
        first = loader(1, workers)
        seen = ids(itertools.islice(first, cut))
        rest = loader(3, 3 - workers)
        rest.load_state_dict(first.state_dict())
        assert seen + ids(rest) == whole
