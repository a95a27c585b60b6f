"""Resources of a tokenization run: number of encoders, threads of each, and the amount of work per call."""

from __future__ import annotations

import math

from vidshard.jobs.runtime.executor import Executor
from vidshard.pipeline.encode_stage import EncoderSpec
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.resources import StageResources


def plan_resources(
    resolved: ResolvedRun, num_spans: int, clips_per_row: float, executor: Executor
) -> tuple[StageResources, EncoderSpec]:
    """Choose workers and batch sizes from the settings and the executor's CPUs and GPUs.

    Args:
        num_spans: number of spans to process.
        clips_per_row: mean number of clips per row of the plan.
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
    # a call of four batches leaves at most one of them partly filled; the bound of 1 GiB holds if all spans are long
    rows_per_batch = max(1, min(math.ceil(4 * batch_size / max(1.0, clips_per_row)), (1 << 30) // span_bytes))
    if run.continuous:  # each span is a stream, and a batch holds batch_size streams
        rows_per_batch = max(1, min(batch_size, (1 << 30) // span_bytes))
    # on CPUs one CPU is always left for decoding: encoders that reserve all of them would stall the run
    cpus = 0.0 if on_gpu else min(max(1, threads - 1), (executor.num_cpus - 1) / workers)
    resources = StageResources(
        encode_workers=workers,
        gpus_per_worker=run.gpus_per_worker if on_gpu else 0.0,
        cpus_per_worker=cpus if cpus < 1 else float(int(cpus)),
        decode_workers=run.decode_workers,
        # at most as many clips as eight full spans have: rows of short parts may hold only a clip or two each
        rows_per_task=max(
            1, min(math.ceil(8 * span_clips / max(1.0, clips_per_row)), math.ceil(num_spans / (8 * executor.num_cpus)))
        ),
        rows_per_batch=rows_per_batch if batch_size > 1 else 1,
    )
    return resources, resolved.encoder_spec(batch_size=batch_size, num_threads=threads)
