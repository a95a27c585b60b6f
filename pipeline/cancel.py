"""Cancellation token shared by all workers of a run: after it is set, started work is finished and none is started."""

from __future__ import annotations

import threading
from typing import Any, Protocol


class CancelToken(Protocol):
    """Cancellation token: the driver sets it, workers check it before each piece of work."""

    def cancel(self) -> None:
        """Tell workers to start no further work."""
        ...

    def is_cancelled(self) -> bool:
        """Whether workers must start no further work; False if the state cannot be read."""
        ...


class LocalCancelToken:
    """Cancellation token for workers in this process."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Tell workers to start no further work."""
        self._event.set()

    def is_cancelled(self) -> bool:
        """Whether workers must start no further work."""
        return self._event.is_set()


class _CancelActor:
    def __init__(self) -> None:
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def is_cancelled(self) -> bool:
        return self._cancelled


class ClusterCancelToken:
    """Cancellation token for workers of a Ray cluster; a check takes half a millisecond."""

    def __init__(self) -> None:
        import ray  # here, so that decoders of a local run do not load Ray

        # the actor reserves no CPU and ends with its driver; if its node is lost, Ray restarts it with the token unset
        self._actor: Any = ray.remote(_CancelActor).options(num_cpus=0, max_restarts=-1, max_task_retries=1).remote()

    def cancel(self) -> None:
        """Tell workers to start no further work."""
        self._actor.cancel.remote()

    def is_cancelled(self) -> bool:
        """Whether workers must start no further work; False if the actor does not answer within 5 s."""
        import ray
        from ray.exceptions import RayError

        try:
            return bool(ray.get(self._actor.is_cancelled.remote(), timeout=5))
        except (RayError, TimeoutError):
            return False
