"""Machines with GPUs that are only declared."""

from __future__ import annotations

from dataclasses import dataclass, field

from vidshard.pipeline.devices import GpuReport
from vidshard.pipeline.resources import GpuNode

GOOD_GPU = GpuReport(
    node="node",
    torch_version="2.13.0+cu130",
    torch_cuda="13.0",
    driver="580.159.03",
    cudnn=92000,
    name="NVIDIA H200",
    memory_bytes=140 << 30,
)
"""Report on a GPU that works."""


@dataclass
class Declared:
    """An executor's machines, without the machines."""

    num_cpus: int = 2
    gpu_nodes: list[GpuNode] = field(default_factory=list)
    reports: list[GpuReport] = field(default_factory=list)
    num_nodes: int = 1
    can_grow: bool = False
    modes: frozenset[str] = frozenset({"workers", "own_ray"})
    memory_bytes: float | None = None

    @property
    def num_gpus(self) -> float:
        return sum(node.num_gpus for node in self.gpu_nodes)

    def examine_gpus(self) -> list[GpuReport]:
        return self.reports

    def __str__(self) -> str:
        return f"a Ray of its own: {self.num_cpus} CPUs, {self.num_gpus:g} GPUs"
