"""Distributed tensors: averaging over workers, and full copies of sharded states. No training rule stands here.

FSDP2 (`torch.distributed.fsdp`) keeps a shard of each parameter on every worker and gathers it while its layer
computes; DDP keeps every parameter whole on every worker. Stored states are full tensors in both cases, so a run can
resume with another number of workers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# Loaded where a run is sharded alone: they take half a second and 60 MB of each process.
if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def _is_fsdp(network: nn.Module) -> TypeGuard[FSDPModule]:
    return hasattr(network, "set_requires_gradient_sync")


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor lies in parts on several workers."""
    return hasattr(tensor, "full_tensor")


def mean_over_workers(value: Tensor) -> Tensor:
    """Average a tensor without gradient over all workers; a single worker gets the tensor itself."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def reshard(network: nn.Module) -> None:
    """Free the parameters that FSDP2 gathered for a forward pass.

    FSDP2 keeps the outermost ones gathered until a backward pass. Code that changes or reads shards in between would
    miss the change, or find full tensors where it expects shards.
    """
    for module in network.modules():
        if _is_fsdp(module):
            module.reshard()


@contextlib.contextmanager
def gradient_sync(network: nn.Module, enabled: bool) -> Iterator[None]:
    """Exchange gradients between workers in the enclosed backward pass if enabled, else accumulate them locally."""
    if _is_fsdp(network):
        network.set_requires_gradient_sync(enabled)
        yield
    elif isinstance(network, DistributedDataParallel) and not enabled:
        with network.no_sync():
            yield
    else:
        yield


def full_cpu_copy(value: Any) -> Any:
    """Copy a nested state: tensors become full tensors on the CPU, everything else stays.

    A sharded tensor is gathered from all workers, so every worker must call this.
    """
    if isinstance(value, Mapping):
        return {key: full_cpu_copy(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(full_cpu_copy(entry) for entry in value)
    if isinstance(value, Tensor):
        tensor = value.detach()
        return (tensor.full_tensor() if is_sharded(tensor) else tensor).to("cpu", copy=True)
    return value


def _sharded_like(own: Tensor, value: Tensor) -> Tensor:
    """Copy a full tensor to the device of another tensor of its shape, sharded as that one is."""
    value = value.to(own.device, copy=True)
    if not is_sharded(own):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, own.device_mesh, own.placements)


def load_full_state(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy a full state dict into a module, sharded or not.

    Raises:
        ValueError: names or shapes differ.
    """
    copy_full_tensors(module.state_dict(), values)


@torch.no_grad()
def copy_full_tensors(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy full tensors into tensors of the same names, sharded or not.

    Raises:
        ValueError: names or shapes differ.
    """
    if {name: tensor.shape for name, tensor in own.items()} != {n: tensor.shape for n, tensor in values.items()}:
        differing = sorted(own.keys() ^ values.keys()) or [n for n in own if own[n].shape != values[n].shape]
        raise ValueError(f"the checkpoint does not fit: {', '.join(differing[:10])}")
    for name, tensor in own.items():
        tensor.copy_(_sharded_like(tensor, values[name]))


def load_full_optimizer_state(optimizer: torch.optim.Adam, state: Mapping[str, Any]) -> None:
    """Copy a full optimizer state into an optimizer, sharded as its parameters are.

    The optimizer stays fused or not, whatever device stored the state.
    """
    fused = [group["fused"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    by_number = {
        number: {
            name: _sharded_like(parameters[number], value) if value.shape == parameters[number].shape else value.clone()
            for name, value in values.items()
        }
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({"state": by_number, "param_groups": state["param_groups"]})
    for group, is_fused in zip(optimizer.param_groups, fused, strict=True):
        group["fused"] = is_fused
