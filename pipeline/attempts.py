"""How often work is begun again whose process or node died under it. By itself, as every process of a run loads it."""

from __future__ import annotations

from collections import Counter

import ray

MAX_ATTEMPTS = 6
"""Times that a task is begun whose process or node dies under it. The last of these deaths ends the run.

Ray's own default is for ever, so that a row which kills every process that touches it keeps a run from ending. On
preemptible nodes that live an hour, with tasks of a minute, a task is hit once in 60 times, and six times in a row once
in 60^6 = 5e10: 1000 such nodes begin 1e7 tasks in a week. With three attempts it were some 50 of these.
"""

# How Ray counts (2.60) decides who does. A decoding task has one budget, `max_retries`, for deaths of its process, of
# its node, and for output that was lost with a node before its use; only nodes that were drained before they went are
# spared, as some autoscalers do for announced preemptions (ray-project/ray#54182). That is what MAX_ATTEMPTS is for.
#
# An encoder's `max_task_retries` cannot be limited: while a node is gone and nobody has noticed, which takes 15 s and
# more, each call of its actors is sent, fails and is sent again, and every time counts. One lost node used up five
# retries of tasks that had not begun. So Ray retries these without limit, and `Attempts` counts what was begun. Nor
# can `max_restarts`, which every preemption of a week takes from; hence the constructor that does nothing and the model
# that is loaded by the first task. A process that does not come up even that far, on all nodes, ends the run too: Ray
# Data gives up after half an hour without progress (`execution_no_progress_timeout_s`).


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)  # killed, it begins to count again
class Attempts:
    """How often each batch was begun and not ended; lives on the driver's node, as long as the driver."""

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()

    def begin(self, batch: str) -> int:
        """Count another attempt; gives its number, from 1."""
        self._begun[batch] += 1
        return self._begun[batch]

    def end(self, batch: str) -> None:
        """Forget a batch that came to its end."""
        self._begun.pop(batch, None)
