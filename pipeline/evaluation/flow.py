"""Flow of an evaluation on Ray Data: from the rows of spans, or of stored clips, to their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, DataContext

from vidshard.pipeline import storage
from vidshard.pipeline.attempts import MAX_ATTEMPTS, start_attempts
from vidshard.pipeline.evaluation.decoder import WindowDecoder
from vidshard.pipeline.evaluation.local import Scorer
from vidshard.pipeline.flow import ENCODER_ENVIRONMENT
from vidshard.pipeline.resources import WorkerPool


class ScorerActor:
    """A scoring stage as a Ray actor, with a limit on the attempts at rows that kill its process."""

    def __init__(self, make: Callable[[Any], Scorer], spec: Any, attempts: ActorHandle) -> None:
        self._score = make(spec)
        self._attempts = attempts

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Score rows.

        Raises:
            RuntimeError: the process or its node died in all ``MAX_ATTEMPTS`` earlier attempts at these rows.
        """
        first = rows["span_id"][0].as_py()
        if ray.get(self._attempts.begin.remote(first)) > MAX_ATTEMPTS:
            where = f" of {storage.public_uri(rows['uri'][0].as_py())}" if "uri" in rows.column_names else ""
            raise RuntimeError(
                f"the scorer's process died {MAX_ATTEMPTS} times at span {first}{where}: look for the kernel's "
                "out-of-memory killer, or faults of a GPU, in the node's log"
            )
        scored = self._score(rows)
        self._attempts.end.remote(first)
        return scored


def score_on_ray(
    blocks: Sequence[pa.Table],
    *,
    decoder: WindowDecoder | None,
    make: Callable[[Any], Scorer],
    spec: Any,
    scorers: WorkerPool,
) -> Iterator[pa.Table]:
    """Decode and score rows on the cluster; yields scores as they are finished.

    Args:
        blocks: whole windows of spans, or stored clips; each block is a task.
        decoder: decode stage; None for stored clips.
        make: class of the scoring stage.
        spec: its settings.
        scorers: workers of the scoring stage.
    """
    # otherwise Ray Data wraps an error of a stage and loses its cause, and with it the message
    DataContext.get_current().raise_original_map_exception = True
    attempts = start_attempts()
    flow = ray.data.from_blocks(list(blocks))
    if decoder is not None:
        flow = flow.map_batches(
            decoder, batch_format="pyarrow", batch_size=None, num_cpus=1, max_retries=MAX_ATTEMPTS - 1
        )
    flow = flow.map_batches(
        ScorerActor,
        fn_constructor_args=(make, spec, attempts),
        batch_format="pyarrow",
        batch_size=1,
        num_gpus=scorers.gpus_per_worker or None,
        num_cpus=scorers.cpus_per_worker,
        compute=ActorPoolStrategy(size=scorers.workers),
        runtime_env={"env_vars": ENCODER_ENVIRONMENT},
        max_restarts=-1,
        max_task_retries=-1,
    )
    yield from flow.iter_batches(batch_format="pyarrow", batch_size=None)
