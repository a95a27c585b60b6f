"""Batches from workers: what came out is what went in, and stays so while the worker goes on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

import vidshard
from tests.support.token_outputs import write_output
from vidshard.pipeline.reader.transport import Slots

BATCHES: list[dict[str, Any]] = [
    {
        "tokens": torch.arange(at, at + 600, dtype=torch.int32).reshape(2, 300),
        "latents": torch.full((3, 2), at, dtype=torch.float16),
        "empty": torch.empty((0, 4)),
        "scalar": torch.tensor(at),
        "flags": torch.tensor([True, False]),
        "texts": ["a", None, "b"],
        "lists": [torch.arange(at), None, torch.arange(2.0)],
    }
    for at in range(9)
]


def listed() -> Iterator[Any]:
    """Batches by turns of two."""
    for at, batch in enumerate(BATCHES):
        yield at // 2, at, batch


def equal(a: Any, b: Any) -> bool:
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype is b.dtype and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[name], b[name]) for name in a)
    return all(map(equal, a, b)) and len(a) == len(b) if isinstance(a, list) else a == b


@pytest.mark.parametrize("num_bytes", [1 << 16, 700, 0])
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_every_kind_of_value_comes_as_it_was_whether_it_fits_or_not(num_bytes: int, start: str) -> None:
    if start == "spawn" and num_bytes != 700:
        pytest.skip("once is enough: a process that is spawned imports torch anew")
    slots = Slots(listed, num_workers=1, ahead=2, num_bytes=num_bytes, convert=None)
    loader: Any = torch.utils.data.DataLoader(
        slots, batch_size=None, num_workers=1, collate_fn=unchanged, multiprocessing_context=start
    )
    messages = [list(slots.take(sent, pin=False)) for sent in loader]
    assert list(map(len, messages)) == [2, 2, 2, 2, 1]
    taken = [pair for message in messages for pair in message]
    assert [mark for mark, _ in taken] == list(range(9))
    assert all(equal(batch, BATCHES[mark]) for mark, batch in taken), "earlier batches are not written over"


def frozen(_batch: Any) -> int:
    return gc.get_freeze_count()


def test_a_worker_never_collects_what_its_parent_made() -> None:
    slots = Slots(listed, num_workers=1, ahead=2, num_bytes=0, convert=frozen)
    loader: Any = torch.utils.data.DataLoader(
        slots, batch_size=None, num_workers=1, collate_fn=unchanged, multiprocessing_context="fork"
    )
    gc.unfreeze()  # tests begin frozen
    try:
        counts = [count for sent in loader for _, count in slots.take(sent, pin=False)]
        assert min(counts) > 10_000
        assert not gc.get_freeze_count(), "and the parent goes on as before"
    finally:
        gc.freeze()


def unchanged(value: Any) -> Any:
    return value


def sums(batch: dict[str, Any]) -> dict[str, Any]:
    return {"sum": batch["tokens"].sum(), "extra": batch["caption"]}


def test_workers_give_the_batches_of_one_process_with_the_options_of_a_loader(tmp_path: Any) -> None:
    write_output(tmp_path, num_shards=3, signals=True)
    shards = vidshard.TokenShards(
        str(tmp_path), columns=["tokens", "caption", "fps"], signals=["actions", "poses"], batch_size=4, shuffle=True
    )
    plain = list(shards.loader())
    assert len(plain) > 8

    def again(workers: int, **options: Any) -> list[Any]:
        loader = shards.loader(workers, **({"multiprocessing_context": "fork"} if workers else {}), **options)
        loader.load_state_dict({**loader.state_dict(), "samples": 0})
        return list(loader)

    assert equal(plain, again(2, prefetch_factor=3))
    for workers in (0, 1):
        reduced = again(workers, collate_fn=sums)
        assert [int(batch["sum"]) for batch in reduced] == [int(batch["tokens"].sum()) for batch in plain]


@pytest.mark.parametrize(("workers", "ahead", "together", "total"), [(1, 1, 1, 40), (2, 2, 3, 121), (2, 1, 2, 83)])
def test_workers_that_are_faster_than_the_loop_write_over_no_batch_that_is_waiting(
    workers: int, ahead: int, together: int, total: int
) -> None:
    """Workers make batches as fast as they can, and the loop looks at every value of each."""
    slots = Slots(
        partial(numbered, total, together),
        num_workers=workers,
        ahead=ahead,
        num_bytes=together << 17,
        convert=None,
    )
    loader: Any = torch.utils.data.DataLoader(
        slots, batch_size=None, num_workers=workers, collate_fn=unchanged, prefetch_factor=ahead
    )
    taken = (pair for sent in loader for pair in slots.take(sent, pin=False))
    for number, (mark, batch) in enumerate(taken):
        assert mark == number
        assert (batch["values"] == number).all()
    assert number == total - 1


def numbered(total: int, together: int) -> Iterator[Any]:
    worker = torch.utils.data.get_worker_info()
    assert worker is not None
    for number in range(total):
        if number // together % worker.num_workers == worker.id:
            yield number // together, number, {"values": torch.full((30_000,), number, dtype=torch.int32)}


def test_a_loader_that_loses_the_order_is_refused(tmp_path: Any) -> None:
    write_output(tmp_path, num_shards=1)
    with pytest.raises(vidshard.VidshardError, match="in_order"):
        vidshard.TokenShards(str(tmp_path), batch_size=2).loader(2, in_order=False)
