"""Transfers to a GPU: their order, with a stand-in for CUDA that records it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.encoding import CONFIG
from vidshard.models.tokenizer import get_preset
from vidshard.models.weights import load_tokenizer
from vidshard.pipeline import encode
from vidshard.pipeline.encode import encode_clips
from vidshard.pipeline.transfer import CpuTransfer, GpuTransfer

SHAPE = (5, 16, 16, 3)


class RecordedStreams:
    """`Streams` on a CPU: a copy out holds nonsense until it is waited for, and a copy in is late."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self._late: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._out: list[tuple[Tensor, Tensor]] = []
        self._number = 0

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.full(shape, 77, dtype=torch.uint8).to(dtype)

    def copy_in(self, buffer: Tensor) -> tuple[Tensor, str]:
        self._number += 1
        self.log.append(f"in {self._number} of {buffer.data_ptr()}")
        return buffer.clone(), f"in {self._number}"

    def copy_out(self, values: Tensor, into: Tensor) -> None:
        self._out.append((values.clone(), into))

    def event(self) -> str:
        name = f"out {self._number}"
        self._late[name], self._out = self._out, []
        self.log.append(f"computed {self._number}")
        return name

    def wait(self, event: str) -> None:
        for values, into in self._late.pop(event, []):
            into.numpy()[...] = values.numpy()  # not by torch, as one of both may be an inference tensor
        self.log.append(f"wait for {event}")


@pytest.mark.parametrize("num_clips", [1, 2, 5, 8])
def test_a_batch_is_launched_before_the_results_of_the_one_before_are_waited_for(
    num_clips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = RecordedStreams()
    tokenizer = load_tokenizer(CONFIG, None, seed=0)
    payload = CONFIG.payload(*SHAPE[:3])
    random = np.random.default_rng(0)
    clips = [random.integers(0, 256, SHAPE, np.uint8) for _ in range(num_clips)]
    expected = encode_clips(tokenizer, clips, payload, batch_size=2)
    monkeypatch.setattr(encode, "transfer_to", lambda device: GpuTransfer(streams))
    encoded = encode_clips(tokenizer, clips, payload, batch_size=2)
    assert {name: values.tolist() for name, values in encoded.items()} == {
        name: values.tolist() for name, values in expected.items()
    }
    batches = range(1, -(-num_clips // 2) + 1)
    waits = [line for line in streams.log if line.startswith("wait for out")]
    assert waits == [f"wait for out {number}" for number in batches]  # once a batch
    for number, following in pairwise(batches):
        assert streams.log.index(f"computed {following}") < streams.log.index(f"wait for out {number}")


def test_two_buffers_take_turns_and_none_is_refilled_before_its_copy_has_ended() -> None:
    streams = RecordedStreams()
    transfer = GpuTransfer(streams)
    for number in range(5):
        uploaded = transfer.upload([np.full(SHAPE, number, np.uint8)])
        assert (uploaded == number).all()
    copies = [line.split(" of ") for line in streams.log if line.startswith("in")]
    buffers = [buffer for _, buffer in copies]
    assert len(set(buffers)) == 2
    assert buffers[0] == buffers[2] == buffers[4] != buffers[1] == buffers[3]
    for number in (1, 2, 3):
        waited = streams.log.index(f"wait for in {number}")
        assert waited < streams.log.index(" of ".join(copies[number + 1]))


def test_latents_are_rounded_on_the_device_as_on_the_cpu() -> None:
    values = torch.randn(2, 40) * 10
    payload = get_preset("tiny_kl").payload(5, 16, 16)
    here = CpuTransfer().download({payload[0].name: values}, payload).wait()
    there = GpuTransfer(RecordedStreams()).download({payload[0].name: values}, payload).wait()
    assert here[payload[0].name].dtype == np.float16
    np.testing.assert_array_equal(here[payload[0].name], there[payload[0].name])
