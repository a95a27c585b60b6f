"""Where the workers of a training and its driver leave each other notes: how far it is, what broke, whether to stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError

# Without torch, which would take seconds and 300 MB of the board's process.


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
    """Where workers and driver leave each other notes; a process of its own that takes no CPU."""

    def __init__(self) -> None:
        self._actor: Any = ray.remote(_StatusActor).options(num_cpus=0, max_restarts=-1, max_task_retries=1).remote()

    def begin(self, is_first: bool) -> bool:
        """A worker has started, perhaps again; whether there is no use in that."""
        return bool(ray.get(self._actor.begin.remote(is_first)))

    def show(self, latest: Mapping[str, Any]) -> bool:
        """How far it is; whether the driver wants an end."""
        try:
            return bool(ray.get(self._actor.show.remote(dict(latest)), timeout=30))
        except (RayError, TimeoutError):
            return False

    def measured(self, figures: Mapping[str, float]) -> None:
        """Of held-out clips."""
        self._actor.measured.remote(dict(figures))

    def reject(self, entries: list[dict[str, Any]]) -> None:
        """Videos that were passed over."""
        self._actor.reject.remote(entries)

    def end(self, **outcome: Any) -> None:
        """How it ended, in a way that starting again would not change."""
        ray.get(self._actor.end.remote(outcome))

    def stop(self) -> None:
        """Ask the workers to end at their next look."""
        self._actor.stop.remote()

    def read(self) -> dict[str, Any]:
        """What the driver shows: latest, held_out, outcome, starts, rejected."""
        note: dict[str, Any] = ray.get(self._actor.read.remote())
        return note
