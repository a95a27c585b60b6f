"""Checkpoints of a training stage: written atomically to any storage; the last few and the best are kept.

    checkpoints/step-00001000.pt      state, as torch saves it
    checkpoints/step-00001000.json    record: step, run, digest of the state, metrics

The record is written after the state and removed before it, so a checkpoint exists if its record does. Loading executes
no code (``weights_only``).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any

import torch

from vidshard.models.weights import WeightsError, read_pickled
from vidshard.pipeline import storage
from vidshard.schemas.errors import VidshardError, one_line
from vidshard.schemas.training import LOWER_IS_BETTER, current_metric, current_metrics

CHECKPOINTS = "checkpoints"


class CheckpointError(VidshardError):
    """A checkpoint cannot be resumed from; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """Record of a checkpoint, known without loading it."""

    step: int
    run_id: str
    """Id of the run that wrote it."""
    digest: str
    """BLAKE2b of the state's file, 16 bytes in hex."""
    metrics: dict[str, float]
    """Metrics of held-out clips at that step; empty where none were taken."""


_MAX_RECORD_BYTES = 1 << 20


def _check_record(info: CheckpointInfo) -> None:
    """Check the values of a record: its step is part of a file's name.

    Raises:
        ValueError: one is impossible.
    """
    if type(info.step) is not int or not 0 <= info.step < 10**12:
        raise ValueError(f"its step is {info.step!r:.80}")
    if not isinstance(info.run_id, str) or not isinstance(info.digest, str) or not isinstance(info.metrics, dict):
        raise ValueError("it has no run, digest or metrics")
    if not all(isinstance(value, (int, float)) for value in info.metrics.values()):
        raise ValueError("a metric is no number")


class Checkpoints:
    """The checkpoints of one stage of one run.

    Args:
        folder: folder of the stage.
        run_id: id of the run; checkpoints of other runs are refused.
        keep_last: number of most recent checkpoints to keep.
        best_by: metric that selects the best checkpoint, which is also kept.
    """

    def __init__(self, folder: str, run_id: str, *, keep_last: int = 2, best_by: str = "psnr") -> None:
        self._folder = storage.join(folder, CHECKPOINTS)
        self._run_id = run_id
        self._keep_last = keep_last
        self._best_by = current_metric(best_by)

    def infos(self) -> list[CheckpointInfo]:
        """Records of all checkpoints, by step.

        Raises:
            CheckpointError: a checkpoint belongs to another run, or its record is damaged.
            StorageError: the records cannot be listed or read.
        """
        infos = []
        for path in storage.list_files(self._folder, ".json"):
            try:
                info = CheckpointInfo(**json.loads(storage.read_bytes(path, max_bytes=_MAX_RECORD_BYTES)))
                _check_record(info)
            except (ValueError, TypeError, RecursionError) as error:
                raise CheckpointError(f"{path} is no record of a checkpoint: choose another --out") from error
            if info.run_id != self._run_id:
                raise CheckpointError(
                    f"{self._folder} holds checkpoints of another run ({info.run_id}, and this is {self._run_id}): "
                    "choose another --out"
                )
            infos.append(replace(info, metrics=current_metrics(info.metrics)))
        return sorted(infos, key=lambda info: info.step)

    def latest(self) -> CheckpointInfo | None:
        """The checkpoint of the last step; None without any."""
        return max(self.infos(), key=lambda info: info.step, default=None)

    def best(self) -> CheckpointInfo | None:
        """The best checkpoint by the metric; None where none was measured."""
        return self._best_of(self.infos())

    def _best_of(self, infos: list[CheckpointInfo]) -> CheckpointInfo | None:
        sign = -1 if self._best_by in LOWER_IS_BETTER else 1
        measured = [info for info in infos if self._best_by in info.metrics]
        return max(measured, key=lambda info: (sign * info.metrics[self._best_by], info.step), default=None)

    def load(self, info: CheckpointInfo) -> dict[str, Any]:
        """Load a checkpoint's state, on the CPU.

        Raises:
            CheckpointError: the file is damaged or gone.
            StorageError: the file cannot be read.
        """
        path, record = self._path(info.step, ".pt"), self._path(info.step, ".json")
        if not storage.exists(path):
            raise CheckpointError(f"{path} is gone: delete {record} too, then go on from the one before it")
        data = storage.read_bytes(path)
        if _digest(data) != info.digest:
            raise CheckpointError(f"{path} is damaged: delete it and {record}, then go on from the one before it")
        try:
            loaded = read_pickled(io.BytesIO(data), storage.public_uri(path))
        except WeightsError as error:
            raise CheckpointError(f"{one_line(error)} Or choose another --out") from error
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{path} is no checkpoint: it holds a {type(loaded).__name__}; choose another --out")
        tensors: list[torch.Tensor] = []
        if _num_values(loaded, tensors, {}) > _MOST_VALUES:
            raise CheckpointError(f"{path} is no checkpoint: it is nested without end, or nearly; choose another --out")
        if not all(map(_is_whole, tensors)):
            raise CheckpointError(f"{path} is no checkpoint: it holds tensors without values; choose another --out")
        return loaded

    def save(self, state: Mapping[str, Any], step: int, metrics: Mapping[str, float]) -> None:
        """Write a checkpoint, then remove those that need not be kept.

        Raises:
            StorageError: it could not be written; it then does not exist, and all others are still there.
        """
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        data = buffer.getbuffer()
        info = CheckpointInfo(step=step, run_id=self._run_id, digest=_digest(data), metrics=dict(metrics))
        storage.remove(self._path(step, ".json"))  # left by an attempt before a restart
        storage.write_atomic(self._path(step, ".pt"), data)
        storage.write_atomic(self._path(step, ".json"), json.dumps(asdict(info), indent=1).encode())
        self._prune()

    def _prune(self) -> None:
        infos = self.infos()
        kept = {info.step for info in infos[-self._keep_last :]}
        if best := self._best_of(infos):
            kept.add(best.step)
        for info in infos:
            if info.step not in kept:
                for suffix in (".json", ".pt"):
                    with suppress(storage.StorageError):  # it only takes space
                        storage.remove(self._path(info.step, suffix))

    def _path(self, step: int, suffix: str) -> str:
        return storage.join(self._folder, f"step-{step:08d}{suffix}")


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time, while training goes on; leaving the context waits for the last."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: Mapping[str, Any], step: int, metrics: Mapping[str, float]) -> None:
        """Start writing a state, which must not change any more; waits for the checkpoint before.

        Raises:
            StorageError: the checkpoint before could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(self._checkpoints.save, state, step, metrics)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the storage.

        Raises:
            StorageError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=True)


_MOST_VALUES = 10_000_000
"""Values of a checkpoint, at most; a training writes a few for each parameter."""
_DEEPEST = 32


def _num_values(value: object, tensors: list[torch.Tensor], known: dict[int, int], depth: int = 0) -> int:
    """Number of values that a walk through a nested state meets, where a list that stands at two places counts twice.

    A few bytes of a pickle can hold a list within itself, or one twice in another, and so on: a walk would not end.

    Args:
        value: the state.
        tensors: gets its tensors.
        known: numbers of the lists and mappings that were met, by id.
        depth: levels above it.
    """
    if isinstance(value, torch.Tensor):
        tensors.append(value)
    if not isinstance(value, (Mapping, list, tuple)):
        return 1
    if depth > _DEEPEST:
        return _MOST_VALUES + 1
    if id(value) not in known:
        count = 1
        for entry in value.values() if isinstance(value, Mapping) else value:
            count += _num_values(entry, tensors, known, depth + 1)
            if count > _MOST_VALUES:  # which the deepest level gives too: nothing more is looked at
                break
        known[id(value)] = count
    return known[id(value)]


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is stored value by value: an expanded one of a few bytes takes any memory where it is copied."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _digest(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
