"""Waits of the process for the GPU inside a pass: none, as the results are read once a batch by `pipeline.transfer`."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidshard.models.tokenizer import FAMILIES, Tokenizer, TokenizerConfig, frames_to_input, get_preset
from vidshard.models.vidtok.constants import constant

READS_A_VALUE = frozenset(
    {
        torch.ops.aten._local_scalar_dense,
        torch.ops.aten.item,
        torch.ops.aten.is_nonzero,
        torch.ops.aten.nonzero,
        torch.ops.aten.masked_select,
        torch.ops.aten.equal,
        torch.ops.aten.unique_dim,
        torch.ops.aten._unique2,
        torch.ops.aten.repeat_interleave,
    }
)
"""Operators whose result the process waits for: a value, or a shape that depends on values."""


MADE_FROM_NUMBERS = frozenset({torch.ops.aten.lift_fresh, torch.ops.aten.detach_})
"""Ends of ``torch.tensor`` and ``Tensor.new_tensor``, which copy from pageable memory."""


class WaitFinder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lists operators that would wait for a GPU: those that read values, and copies from or to the CPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.overloadpacket in READS_A_VALUE:
            self.found.append(str(operator))
        result = operator(*args, **(kwargs or {}))
        # a tensor of no dimension counts as a number: kernels take it as an argument
        devices = {
            leaf.device.type
            for leaf in tree_leaves((args, kwargs, result))
            if isinstance(leaf, Tensor) and (leaf.ndim or leaf.device.type != "cpu")
        }
        if len(devices) > 1 or operator.overloadpacket in MADE_FROM_NUMBERS:
            self.found.append(f"{operator}: {sorted(devices)}")
        return result


TINY_VQ = get_preset("tiny").model_copy(
    update={"name": "tiny_vq", "head": "vq", "fsq_levels": (), "vq_codebook_size": 50}
)


@pytest.mark.parametrize(
    ("config", "device"),
    [
        *((get_preset(name), "meta") for name in ("tiny", "tiny_kl", "lfq_causal_488_262144", "vidtwin_tiny")),
        *((get_preset(name), "meta") for name in ("fsq_causal_888_32768_v1_1", "fsq_noncausal_488_262144")),
        (TINY_VQ, "cpu"),  # autocast knows no meta device
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_pass_neither_reads_a_value_nor_copies_between_devices(config: TokenizerConfig, device: str) -> None:
    with torch.device(device):
        model = cast(Tokenizer, FAMILIES[config.family].build(config).eval().requires_grad_(False))
    frames_BTHWC = torch.zeros(2, config.valid_frames(5), 64, 64, 3, dtype=torch.uint8, device=device)
    with torch.inference_mode():
        model.encode(frames_to_input(frames_BTHWC))  # makes the constants
        with WaitFinder() as finder:
            model.encode(frames_to_input(frames_BTHWC))
    assert finder.found == []


def test_the_finder_finds_them() -> None:
    x = torch.ones(3)
    with torch.inference_mode(), WaitFinder() as finder:  # else the dispatcher takes constructors apart
        x.sum().item()
        x.nonzero()
        x.to("meta")
        torch.tensor([1.0, 2.0], device="meta")
    assert len(finder.found) >= 4, finder.found


def test_a_constant_of_a_fake_tensor_mode_is_not_kept_for_real_passes() -> None:
    numbers = (0.125, 0.375)
    with FakeTensorMode():
        assert isinstance(constant(numbers, torch.float32, torch.device("cpu")), FakeTensor)
    assert constant(numbers, torch.float32, torch.device("cpu")).tolist() == list(numbers)
    with FakeTensorMode():
        assert isinstance(constant(numbers, torch.float32, torch.device("cpu")), FakeTensor)
