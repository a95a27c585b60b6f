"""Reading from an object store: the same batches as locally, every range once, and no more than is needed."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch

import vidshard
from tests.support.token_outputs import write_output
from vidshard.pipeline import storage
from vidshard.pipeline.reader.files import RangeFile

_lock = threading.Lock()


@pytest.fixture(scope="module")
def places(s3: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The same output in a folder and in a bucket."""
    out = tmp_path_factory.mktemp("remote") / "tokens"
    write_output(out, num_shards=3, rows_per_group=6)
    for path in sorted(out.rglob("*.*")):
        storage.write_atomic(f"s3://videos/reader/{path.relative_to(out)}", path.read_bytes())
    return str(out), "s3://videos/reader"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_object_store_gives_the_batches_of_a_folder(places: tuple[str, str], num_workers: int) -> None:
    local, remote = (
        vidshard.TokenShards(place, batch_size=5, shuffle=True, where="clip_index < 3", columns=["tokens", "caption"])
        for place in places
    )
    for mine, theirs in zip(local, remote.loader(num_workers), strict=True):
        assert torch.equal(mine["tokens"], theirs["tokens"])
        assert mine["caption"] == theirs["caption"]


def counted_fetches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """The list of ranges that are fetched from now on: path, start, stop."""
    fetched: list[tuple[str, int, int]] = []
    fetch = RangeFile._fetch

    def counted(self: RangeFile, start: int, stop: int) -> bytes | bytearray:
        with _lock:
            fetched.append((self._path, start, stop))
        return fetch(self, start, stop)

    monkeypatch.setattr(RangeFile, "_fetch", counted)
    return fetched


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("columns", "footers"), [(["tokens"], 1), (["tokens", "caption", "source_fps"], 2)])
def test_every_range_is_fetched_once_and_little_else(
    places: tuple[str, str], monkeypatch: pytest.MonkeyPatch, columns: list[str], footers: int, shuffle: bool
) -> None:
    fetched = counted_fetches(monkeypatch)
    monkeypatch.setattr("vidshard.pipeline.reader.files._TAIL_BYTES", 6000)
    monkeypatch.setattr("vidshard.pipeline.reader.files._HOLE_BYTES", 1000)
    dataset = vidshard.TokenShards(places[1], columns=columns, batch_size=5, shuffle=shuffle)
    for _ in range(2):  # the second epoch needs no footer any more
        assert sum(len(batch["tokens"]) for batch in dataset) == len(vidshard.TokenShards(places[0]))
        sizes = {path: len(storage.read_bytes(path)) for path in dataset._source.catalog.paths}
        # Arrow reads the last 64 KiB for the footer, here the whole of these small files
        tails = [read for read in fetched if read[2] == sizes[read[0]]]
        assert len(tails) == 3 * footers, "the end of each shard, once to open it and once to read other columns"
        ranges = sorted(read for read in fetched if read not in tails and read[1] > 0)
        assert len(ranges) == len(dataset._source.catalog.group_ends), "one request for each row group"
        assert all(a[0] != b[0] or a[2] <= b[1] for a, b in itertools.pairwise(ranges)), "and nothing comes twice"
        fetched[:] = tails


@pytest.mark.parametrize("columns", [["tokens"], ["tokens", "caption"]])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("most_bytes", "requests"), [(1 << 20, 3), (600, 6), (1, 9)])
def test_neighboring_row_groups_come_in_one_request(
    places: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    columns: list[str],
    shuffle: bool,
    most_bytes: int,
    requests: int,
) -> None:
    """Three shards of three row groups, of 6, 6 and 2 clips of 48 bytes; all of them are read ahead at once."""
    monkeypatch.setattr("vidshard.pipeline.reader.read_ahead._REQUEST_BYTES", most_bytes)
    dataset = vidshard.TokenShards(places[1], columns=columns, batch_size=4, shuffle=shuffle)
    list(dataset)  # the footers are known from here on
    fetched = counted_fetches(monkeypatch)
    again = list(dataset)
    local = vidshard.TokenShards(places[0], columns=columns, batch_size=4, shuffle=shuffle)
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(again, local, strict=True))
    assert len(fetched) == requests
    if most_bytes > 1 << 10:
        assert {path for path, _, _ in fetched} == set(dataset._source.catalog.paths)


def test_an_object_that_is_gone_is_named(places: tuple[str, str]) -> None:
    dataset = vidshard.TokenShards(places[1])
    victim = next(path for path in dataset._source.catalog.paths if path.endswith("0001.parquet"))
    data = storage.read_bytes(victim)
    storage.remove(victim)
    try:
        with pytest.raises(vidshard.VidshardError, match=r"0001\.parquet"):
            list(dataset)
    finally:
        storage.write_atomic(victim, data)
