"""Cancellation token shared by all workers of a run: after it is set, started work is finished and none is started."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ray.actor import ActorHandle


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


class Cancellation:
    """State of a `ClusterCancelToken`, in an actor."""

    def __init__(self) -> None:
        self._cancelled = False

    def cancel(self) -> None:
        """Remember that workers must start no further work."""
        self._cancelled = True

    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled


class ClusterCancelToken:
    """Cancellation token for workers of a Ray cluster; a check takes half a millisecond."""

    def __init__(self, actor: ActorHandle) -> None:
        """Make a token that an actor holds, a `Cancellation`."""
        self._actor = actor

    def cancel(self) -> None:
        """Tell workers to start no further work."""
        self._actor.cancel.remote()

    def is_cancelled(self) -> bool:
        """Whether workers must start no further work: also once the actor is gone, as the run is then over.

        False if the actor does not answer within 5 s.
        """
        import ray  # here, so that decoders of a local run do not load Ray
        from ray.exceptions import ActorDiedError, RayError

        try:
            return bool(ray.get(self._actor.is_cancelled.remote(), timeout=5))
        except ActorDiedError:
            return True
        except (RayError, TimeoutError):
            return False
