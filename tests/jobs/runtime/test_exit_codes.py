"""Exit codes: 75 where the same command may go on by itself, 1 and 2 where a person must act."""

from __future__ import annotations

from typing import Any

import pytest

from vidshard.jobs.runtime.executor import StageFailedError, ray_failures_named
from vidshard.jobs.runtime.ray_watch import RayDiedError
from vidshard.jobs.tokenization.placement import NoGpuError
from vidshard.jobs.tokenization.summary import Summary
from vidshard.pipeline.output.lease import LeaseHeldError, LeaseLostError
from vidshard.pipeline.output.shard_writer import WriteStats
from vidshard.pipeline.storage import StorageError, StorageOutageError
from vidshard.schemas.errors import (
    EXIT_AGAIN,
    EXIT_FAILED,
    EXIT_REFUSED,
    OutageError,
    RunFailedError,
    UserError,
    VidshardError,
)


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (OutageError, EXIT_AGAIN),
        (StorageOutageError, EXIT_AGAIN),
        (RayDiedError, EXIT_AGAIN),
        (LeaseLostError, EXIT_AGAIN),
        (NoGpuError, EXIT_AGAIN),
        (RunFailedError, EXIT_FAILED),
        (StageFailedError, EXIT_FAILED),
        (UserError, EXIT_REFUSED),
        (StorageError, EXIT_REFUSED),  # of a run that has begun it is 1, as `Summary.fail` says
        (LeaseHeldError, EXIT_REFUSED),
    ],
)
def test_an_error_says_whether_its_cause_may_pass(kind: type[VidshardError], code: int) -> None:
    assert kind.exit_code == code


def _ray_errors() -> list[tuple[Exception, int]]:
    from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

    def task(cause: Exception) -> Exception:
        wrapped: Any = RayTaskError("encode", "traceback", cause)
        return wrapped  # type: ignore[no-any-return]

    return [
        (RayActorError(), EXIT_AGAIN),
        (WorkerCrashedError(), EXIT_AGAIN),
        (ObjectLostError("00" * 28, None, ""), EXIT_AGAIN),
        (OutOfMemoryError("killed"), EXIT_FAILED),
        (task(ValueError("a defect")), EXIT_FAILED),
        (task(RunFailedError("not finite")), EXIT_FAILED),
        (task(OutageError("S3 does not answer")), EXIT_AGAIN),
        (task(StorageOutageError("S3 does not answer")), EXIT_AGAIN),
        (task(StorageError("no space left")), EXIT_FAILED),
    ]


@pytest.mark.parametrize("number", range(9))
def test_a_failure_of_ray_may_pass_where_machines_or_a_storage_were_gone(number: int) -> None:
    error, code = _ray_errors()[number]
    with pytest.raises(StageFailedError) as raised, ray_failures_named():
        raise error
    assert raised.value.exit_code == code


@pytest.mark.parametrize(
    ("errors", "code"),
    [
        ([], 0),
        ([None], EXIT_FAILED),
        ([OutageError("S3")], EXIT_AGAIN),
        ([OutageError("S3"), LeaseLostError("lost")], EXIT_AGAIN),
        ([OutageError("S3"), None], EXIT_FAILED),
        ([None, OutageError("S3")], EXIT_FAILED),
        ([StorageError("no space left")], EXIT_FAILED),
    ],
)
def test_a_run_with_several_problems_ends_with_the_code_of_the_worst(
    errors: list[VidshardError | None], code: int
) -> None:
    names = ("out", "num_videos", "num_rejected_videos", "planned_spans", "expected_clips", "reused_spans")
    values: dict[str, Any] = dict.fromkeys(names, 0) | {"rejected_before": 0, "written": WriteStats(), "reasons": {}}
    summary = Summary(**values, seconds={}, batch_fill=1.0, example_clip_id=None, notice=None)
    for number, error in enumerate(errors):
        summary.fail(f"problem {number}", error)
    assert summary.exit_code == code
