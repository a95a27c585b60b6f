"""Resources of a tokenization run: how many encoders, with how many threads, and how much work each gets at once."""

from __future__ import annotations

import math

from vidshard.jobs.runtime.executor import Executor
from vidshard.pipeline.encode_stage import EncoderSpec
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.resources import StageResources


def plan_resources(
    resolved: ResolvedRun, num_spans: int, clips_per_row: float, executor: Executor
) -> tuple[StageResources, EncoderSpec]:
    """How many encoders with how many threads, and what they are fed at once.

    Args:
        clips_per_row: in the plan, on average.
    """
    run = resolved.run
    on_gpu = executor.num_gpus > 0
    if on_gpu:
        workers = run.encode_workers or max(1, int(executor.num_gpus / run.gpus_per_worker))
        threads = run.encode_threads or 1
    else:
        workers = run.encode_workers or max(1, executor.num_cpus // 4)
        threads = run.encode_threads or max(1, executor.num_cpus // executor.num_nodes // workers)
    batch_size = run.batch_size or (8 if on_gpu else 1)
    span_clips = resolved.clips_per_span
    span_bytes = (span_clips + resolved.largest.halo_clips) * resolved.largest.clip_bytes
    # a call of four batches leaves at most one of them not full; 1 GiB if by chance all its spans are long ones
    rows_per_batch = max(1, min(math.ceil(4 * batch_size / max(1.0, clips_per_row)), (1 << 30) // span_bytes))
    if run.continuous:  # each span is a stream, and a batch takes as many of them
        rows_per_batch = max(1, min(batch_size, (1 << 30) // span_bytes))
    # on CPUs one is left for decoding however many encoders are asked for: a pool that takes all stops the run
    cpus = 0.0 if on_gpu else min(max(1, threads - 1), (executor.num_cpus - 1) / workers)
    resources = StageResources(
        encode_workers=workers,
        gpus_per_worker=run.gpus_per_worker if on_gpu else 0.0,
        cpus_per_worker=cpus if cpus < 1 else float(int(cpus)),
        decode_workers=run.decode_workers,
        # eight units of work at most, by their clips: rows of parts may hold a clip or two each
        rows_per_task=max(
            1, min(math.ceil(8 * span_clips / max(1.0, clips_per_row)), math.ceil(num_spans / (8 * executor.num_cpus)))
        ),
        rows_per_batch=rows_per_batch if batch_size > 1 else 1,
    )
    return resources, resolved.encoder_spec(batch_size=batch_size, num_threads=threads)
