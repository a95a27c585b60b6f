"""Groups of tests that share a process when `make test` runs in several, and the groups that begin.

A file stays in one process, as its tests share what its fixtures set up. The files of ``tests/cluster`` share a Ray and
form two groups, one that trains and one that does not: their tests wait for Ray more than they compute, so that one
group alone would be at work when all else is done. They begin, as they take longest, and then the files of `NEXT`.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

CLUSTER, TRAINING = "tests/cluster/", "tests/cluster/test_train"
NEXT = ("tests/test_wheel.py", "tests/models/training/", "tests/models/vidtok/test_golden.py")


def group_of(nodeid: str) -> str:
    """Name of the group of tests that a test is handed out with: `TRAINING`, `CLUSTER`, or its file."""
    return next((group for group in (TRAINING, CLUSTER) if nodeid.startswith(group)), nodeid.partition("::")[0])


def turn_of(nodeid: str) -> int:
    """Turn of a test, counted from 0; tests of one turn keep their order."""
    return next((turn for turn, begin in enumerate((TRAINING, CLUSTER, *NEXT)) if nodeid.startswith(begin)), 9)


class GroupScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Hands out tests in the groups of `group_of`, in the order in which they are collected."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)
