"""What a run says once its Ray has died."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from vidshard.jobs.runtime.ray_watch import _report_unless_of_ray
from vidshard.schemas.errors import RunFailedError


def closing_fails_with(error: Exception) -> Iterator[None]:
    try:
        yield
    finally:
        raise error


@pytest.mark.parametrize(("error", "is_reported"), [(RunFailedError("Ray"), False), (ValueError("a defect"), True)])
def test_finalizers_that_miss_a_dead_ray_print_no_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception, is_reported: bool
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", partial(_report_unless_of_ray, reported.append))
    running = closing_fails_with(error)
    next(running)
    del running
    assert bool(reported) is is_reported
