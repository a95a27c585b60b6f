"""A stage of a run as every worker gets it, and the worker's place among the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vidshard.jobs.training.status import RunStatus
from vidshard.pipeline import storage
from vidshard.pipeline.training_data.checkpoints import Checkpoints
from vidshard.schemas.tokenizers import TokenizerConfig
from vidshard.schemas.training import StageConfig, TrainRun

EXPORT = "tokenizer.safetensors"
HELD_OUT = "held_out.parquet"


@dataclass(frozen=True, kw_only=True)
class StageJob:
    """One stage of a run, as the driver sends it to the workers."""

    run: TrainRun
    name: str
    run_id: str
    tokenizer: TokenizerConfig
    previous: tuple[str, str] | None
    """Folder and run id of the stage whose last checkpoint this one starts from; None without one."""
    weights: str | None
    """Weights file that the stage starts from; None without one."""
    epoch_length: int
    """Number of clips in an epoch."""
    threads: int
    """Number of threads of a worker on CPUs."""
    status: RunStatus

    @property
    def stage(self) -> StageConfig:
        """Settings of the stage."""
        return self.run.stages[self.name]

    @property
    def folder(self) -> str:
        """Folder that the stage writes to."""
        return storage.join(self.run.out, self.name)

    @property
    def checkpoints(self) -> Checkpoints:
        """Checkpoints of the stage."""
        return Checkpoints(self.folder, self.run_id, keep_last=self.run.keep_last, best_by=self.run.best_by)


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Rank and device of this worker."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this worker writes checkpoints, metrics and the result."""
        return self.rank == 0
