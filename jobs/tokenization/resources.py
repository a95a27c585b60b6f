"""Resources of a tokenization run: number of encoders, threads of each, and the amount of work per call."""

from __future__ import annotations

import math

from vidshard.jobs.runtime.executor import Executor
from vidshard.jobs.tokenization.placement import gpu_workers, most_clips
from vidshard.pipeline.encode_stage import EncoderSpec
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.resources import StageResources, cpus_beside_decoding
from vidshard.schemas.fields import WorkerCount
from vidshard.schemas.runs import TokenizeRun

TASKS_PER_CPU = 32
"""Decode tasks of a run for each CPU, at least. With 8, 4 % of a run's time was lost at its end where sources of 180 to
2,160 lines were mixed, with 32 less than 1 % (`tests/pipeline/output/test_work_list.py`, simulated)."""


SPANS_PER_TASK = 32
"""Full spans of a decode task, at most. With 8 of them and `Dataset.iter_batches`, the driver of a run with tokens took
0.24 ms of a core for each clip, with 32 and `blocks_of` 0.11 (`python -m benchmarks.driver`): Ray Data's bookkeeping is
by task. Frames leave a task in blocks of 128 MiB whatever its size."""


def rows_per_task(num_spans: int, rows_per_span: float, num_cpus: int) -> int:
    """Number of rows of a decode task, so that each CPU gets ``TASKS_PER_CPU`` of them where there are enough rows.

    Args:
        num_spans: rows of the work list.
        rows_per_span: rows that hold as many clips as a full span, as short parts hold a clip or two each.
    """
    return max(1, min(math.ceil(SPANS_PER_TASK * rows_per_span), math.ceil(num_spans / (TASKS_PER_CPU * num_cpus))))


def plan_resources(
    resolved: ResolvedRun, num_spans: int, clips_per_row: float, executor: Executor
) -> tuple[StageResources, EncoderSpec]:
    """Choose workers and batch sizes from the settings and the executor's CPUs and GPUs.

    Args:
        num_spans: number of spans to process.
        clips_per_row: mean number of clips per row of the plan.

    Raises:
        UserError: more encoders are wanted than fit the GPUs.
    """
    run = resolved.run
    on_gpu = run.device == "cuda"
    count, threads, cpus = _encoders(run, executor)
    batch_size = run.batch_size or (8 if on_gpu else 1)
    spans_per_row = resolved.clips_per_span / max(1.0, clips_per_row)
    resources = StageResources(
        encode_workers=count.least,
        gpus_per_worker=run.gpus_per_worker if on_gpu else 0.0,
        cpus_per_worker=cpus,
        decode_workers=run.decode_workers,
        rows_per_task=1 if run.continuous else rows_per_task(num_spans, spans_per_row, executor.num_cpus),
        rows_per_batch=_rows_per_batch(resolved, num_spans, clips_per_row, batch_size, count.least),
        is_elastic=count.most != count.least,
        most_encode_workers=count.most,
    )
    limits = most_clips(resolved) if on_gpu else {}
    return resources, resolved.encoder_spec(batch_size=batch_size, num_threads=threads, most_clips=limits)


def _encoders(run: TokenizeRun, executor: Executor) -> tuple[WorkerCount, int, float]:
    """Number of encoders, and the threads and reserved CPUs of each; at least one CPU is left for decoding.

    Encoders that reserve all of them would stall the run.
    """
    if run.device == "cuda":
        count = gpu_workers(run.encode_workers, run.gpus_per_worker, executor)
        return count, run.encode_threads or 1, min(node.cpu_share(run.gpus_per_worker) for node in executor.gpu_nodes)
    default = max(1, executor.num_cpus // 4)
    count = run.encode_workers or WorkerCount(default, None if executor.can_grow else default)
    # all that may run on this machine share its CPUs
    sharing = count.least if executor.can_grow else count.most or count.least
    threads = run.encode_threads or max(1, executor.num_cpus // executor.num_nodes // sharing)
    return count, threads, cpus_beside_decoding(threads, count.least, executor.num_cpus)


def _rows_per_batch(resolved: ResolvedRun, num_spans: int, clips_per_row: float, batch_size: int, workers: int) -> int:
    """Rows of a call of an encoder, of 1 GiB at most if all spans are long."""
    if batch_size == 1:
        return 1
    span_bytes = (resolved.clips_per_span + resolved.largest.halo_clips) * resolved.largest.clip_bytes
    most = max(1, (1 << 30) // span_bytes)
    if resolved.run.continuous:  # each span is a stream, and a batch holds batch_size streams
        return min(batch_size, most)
    # A call of four batches leaves at most one of them partly filled. A GPU gets more, as the first one of a call waits
    # for its frames; but no encoder takes the work of another.
    on_gpu = resolved.run.device == "cuda"
    rows = min(math.ceil((16 if on_gpu else 4) * batch_size / max(1.0, clips_per_row)), most)
    return min(rows, max(1, math.ceil(num_spans / (4 * workers)))) if on_gpu else rows
