"""Which tests share a process when `make test` runs in several.

A file stays in one process, as its tests share what its fixtures set up. So does all of ``tests/cluster``, and it is
begun first: its tests wait for Ray more than they compute, and two Rays at once would take each other's cores.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

CLUSTER = "tests/cluster/"


def group_of(nodeid: str) -> str:
    """Name of the group of tests that a test is handed out with: `CLUSTER`, or its file."""
    return CLUSTER if nodeid.startswith(CLUSTER) else nodeid.partition("::")[0]


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Hands out tests in the groups of `group_of`, in the order in which they are collected."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
