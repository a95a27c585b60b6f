"""A network on several workers: what is whole, what is a shard of a whole, and what is averaged. No training in here.

FSDP2 (`torch.distributed.fsdp`) keeps each parameter as a shard on every worker, and gathers it while its layer
computes; DDP keeps all of it everywhere. What is stored is whole in either case, so that a run may go on with another
number of workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from vidshard.models.vidtok.heads import alone


def mean_over_workers(value: Tensor) -> Tensor:
    """The mean over all workers of a tensor without gradient; itself where there is one worker."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return alone(value)
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def shards_alone(network: nn.Module) -> None:
    """Let go of what FSDP2 gathered for a forward pass: it keeps the outermost weights until a backward pass.

    They would be taken for the weights after these have changed, and are no shards to those who look for such.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def gradients_reduced(network: nn.Module, now: bool) -> Iterator[None]:
    """Whether workers exchange gradients in the backward pass within, or keep them until the batch's last piece."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(now)
        yield
    elif isinstance(network, DistributedDataParallel) and not now:
        with network.no_sync():
            yield
    else:
        yield


def whole(value: Any) -> Any:
    """A copy of a nested state with whole tensors on the CPU."""
    if isinstance(value, Mapping):
        return {key: whole(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(entry) for entry in value)
    if isinstance(value, Tensor):
        tensor = value.detach()
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).to("cpu", copy=True)
    return value


def _sharded_like(own: Tensor, value: Tensor) -> Tensor:
    """A copy of a whole tensor, sharded as another of its shape is, on its device."""
    value = value.to(own.device, copy=True)
    return distribute_tensor(value, own.device_mesh, own.placements) if isinstance(own, DTensor) else value


def fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy a whole state dict into a module, sharded or not.

    Raises:
        ValueError: where names or shapes differ.
    """
    fill_all(module.state_dict(), values)


@torch.no_grad()
def fill_all(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy whole tensors into those of the same names, sharded or not; raises as `fill`."""
    if {name: tensor.shape for name, tensor in own.items()} != {n: tensor.shape for n, tensor in values.items()}:
        differing = sorted(own.keys() ^ values.keys()) or [n for n in own if own[n].shape != values[n].shape]
        raise ValueError(f"the checkpoint does not fit: {', '.join(differing[:10])}")
    for name, tensor in own.items():
        tensor.copy_(_sharded_like(tensor, values[name]))


def fill_optimizer(optimizer: torch.optim.Adam, state: Mapping[str, Any]) -> None:
    """Copy a whole optimizer state into an optimizer, sharded as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_number = {
        number: {
            name: _sharded_like(parameters[number], value) if value.shape == parameters[number].shape else value.clone()
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({"state": by_number, "param_groups": state["param_groups"]})
