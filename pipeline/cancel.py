"""A token that every worker of a run can see: begin nothing new, so that what is begun can be finished."""

from __future__ import annotations

import threading
from typing import Any, Protocol


class CancelToken(Protocol):
    """Set by the driver, looked at by workers before each piece of work."""

    def cancel(self) -> None:
        """From now on nothing new is begun."""
        ...

    def is_cancelled(self) -> bool:
        """Whether nothing new is to be begun; False where nobody can say."""
        ...


class LocalCancelToken:
    """A token for workers of this process."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """From now on nothing new is begun."""
        self._event.set()

    def is_cancelled(self) -> bool:
        """Whether nothing new is to be begun."""
        return self._event.is_set()


class _CancelActor:
    def __init__(self) -> None:
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def is_cancelled(self) -> bool:
        return self._cancelled


class ClusterCancelToken:
    """A token for workers of a Ray cluster; a look takes half a millisecond."""

    def __init__(self) -> None:
        import ray  # decoders of a local run load no Ray

        # it takes no CPU, and goes with the driver that made it; should its node be lost, another is made, not set
        self._actor: Any = ray.remote(_CancelActor).options(num_cpus=0, max_restarts=-1, max_task_retries=1).remote()

    def cancel(self) -> None:
        """From now on nothing new is begun."""
        self._actor.cancel.remote()

    def is_cancelled(self) -> bool:
        """Whether nothing new is to be begun; False where nobody can say."""
        import ray
        from ray.exceptions import RayError

        try:
            return bool(ray.get(self._actor.is_cancelled.remote(), timeout=5))
        except (RayError, TimeoutError):
            return False
