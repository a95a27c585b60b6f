"""Retry limits: counts how often each batch was started, to bound retries after crashes.

This is a module of its own because every process of a run loads it.
"""

from __future__ import annotations

from collections import Counter

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MAX_ATTEMPTS = 6
"""Number of attempts at a task whose process or node dies. The run fails when the last one dies too.

Ray Data retries without limit by default, so a row that kills every process would keep a run from ending. Six is
enough for preemptible nodes: with nodes that live an hour and tasks of a minute, a task is hit once in 60 times.
Six hits in a row then happen once in 60^6 = 5e10 tasks, and 1000 such nodes start 1e7 tasks in a week. With three
attempts about 50 of these tasks would fail.
"""

# Ray's own counters (2.60) limit the decode stage, but cannot limit the encode stage.
#
# Decode tasks: `max_retries` is one budget for crashes of the process, loss of the node, and output that is lost with
# a node before its use. Only nodes that are drained before they go are exempt, as some autoscalers do for announced
# preemptions (ray-project/ray#54182). MAX_ATTEMPTS sets this budget.
#
# Encoder actors: neither counter can be limited.
# - `max_task_retries`: until the loss of a node is noticed, which takes 15 s or more, each call of its actors is sent,
#   fails and is sent again, and each time counts. One lost node used up five retries of tasks that had not started.
#   Ray therefore retries without limit, and `Attempts` counts the calls that really started.
# - `max_restarts`: every preemption takes one, and a week has many. The constructor therefore does nothing and the
#   first task loads the model. If processes cannot even start on any node, the run still ends: Ray Data stops after
#   half an hour without progress (`execution_no_progress_timeout_s`).


class Attempts:
    """Counter of the attempts at each unfinished batch; all encoders of a flow ask the same one, an actor."""

    def __init__(self) -> None:
        self.begin_pass()

    def begin_pass(self) -> None:
        """Count from 0 again, as another flow begins."""
        self._begun: Counter[str] = Counter()
        self._faults: dict[str, str] = {}

    def begin(self, batch: str) -> int:
        """Count another attempt; returns its number, from 1."""
        self._begun[batch] += 1
        return self._begun[batch]

    def fault(self, batch: str, message: str) -> None:
        """Keep the reason for which a process ends itself at a batch; the last one counts."""
        self._faults[batch] = message

    def last_fault(self, batch: str) -> str | None:
        """Reason that the last process gave; None if none did."""
        return self._faults.get(batch)

    def end(self, batch: str) -> None:
        """Forget a finished batch."""
        self._begun.pop(batch, None)
        self._faults.pop(batch, None)


def start_attempts() -> ActorHandle:
    """Start a counter as an actor on the driver's node, which ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # after a restart the counts begin again at 0
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(Attempts).options(**options).remote()
