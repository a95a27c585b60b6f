"""Status of a running stage: an actor through which workers report progress and the driver asks them to stop.

The module loads neither torch nor the models, which would take seconds and 300 MB of the actor's process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError


class _StatusActor:
    def __init__(self) -> None:
        self.latest: dict[str, Any] = {}
        self.held_out: dict[str, float] = {}
        self.outcome: dict[str, Any] = {}
        self.starts = 0
        self.rejected: dict[tuple[str, str], dict[str, Any]] = {}
        self.stopping = False

    def begin(self, count: bool) -> bool:
        self.starts += count
        return "failed" in self.outcome

    def show(self, latest: dict[str, Any]) -> bool:
        self.latest = latest
        return self.stopping

    def measured(self, figures: dict[str, float]) -> None:
        self.held_out = figures

    def reject(self, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            kept = self.rejected.setdefault((entry["uri"], entry["reason"]), entry | {"count": 0})
            kept["count"] += 1

    def end(self, outcome: dict[str, Any]) -> None:
        self.outcome = outcome

    def stop(self) -> None:
        self.stopping = True

    def read(self) -> dict[str, Any]:
        return {
            "latest": self.latest,
            "held_out": self.held_out,
            "outcome": self.outcome,
            "starts": self.starts,
            "rejected": list(self.rejected.values()),
        }


class RunStatus:
    """Handle of a stage's status actor, for the driver and every worker; the actor takes no CPU of the cluster."""

    def __init__(self) -> None:
        self._actor: Any = ray.remote(_StatusActor).options(num_cpus=0, max_restarts=-1, max_task_retries=1).remote()

    def begin(self, is_first: bool) -> bool:
        """Report that a worker has started, perhaps again.

        Args:
            is_first: whether it is the first worker, whose starts are counted.

        Returns:
            Whether the stage has failed for good, so that the worker must return.
        """
        return bool(ray.get(self._actor.begin.remote(is_first)))

    def show(self, latest: Mapping[str, Any]) -> bool:
        """Report the figures of the latest step.

        Returns:
            Whether the driver asks to stop. False if the actor does not answer within 30 s.
        """
        try:
            return bool(ray.get(self._actor.show.remote(dict(latest)), timeout=30))
        except (RayError, TimeoutError):
            return False

    def measured(self, figures: Mapping[str, float]) -> None:
        """Report metrics of held-out clips, with their ``step``."""
        self._actor.measured.remote(dict(figures))

    def reject(self, entries: list[dict[str, Any]]) -> None:
        """Report clips that could not be decoded: uri, video_id, reason and detail of each."""
        self._actor.reject.remote(entries)

    def end(self, **outcome: Any) -> None:
        """Report how the stage ended: ``finished`` and its figures, or ``failed`` with what a restart would repeat."""
        ray.get(self._actor.end.remote(outcome))

    def stop(self) -> None:
        """Ask the workers to stop at their next report."""
        self._actor.stop.remote()

    def read(self) -> dict[str, Any]:
        """Everything reported so far: latest, held_out, outcome, starts, rejected."""
        note: dict[str, Any] = ray.get(self._actor.read.remote())
        return note
