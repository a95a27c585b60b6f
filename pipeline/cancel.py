"""A sign that every worker of the cluster can see: begin nothing new, so that what is begun can be finished."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import RayError


class _CancelActor:
    def __init__(self) -> None:
        self._raised = False

    def cancel(self) -> None:
        self._raised = True

    def is_cancelled(self) -> bool:
        return self._raised


class CancelToken:
    """Raised by the driver, looked at by workers before each piece of work: half a millisecond."""

    def __init__(self) -> None:
        # it takes no CPU, and goes with the driver that made it; should its node be lost, another is made, not raised
        self._sign: Any = ray.remote(_CancelActor).options(num_cpus=0, max_restarts=-1, max_task_retries=1).remote()

    def cancel(self) -> None:
        """From now on nothing new is begun."""
        self._sign.cancel.remote()

    def is_cancelled(self) -> bool:
        """Whether nothing new is to be begun; False where nobody can say."""
        try:
            return bool(ray.get(self._sign.is_cancelled.remote(), timeout=5))
        except (RayError, TimeoutError):
            return False
