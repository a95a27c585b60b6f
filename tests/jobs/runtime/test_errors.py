"""Causes of failures, in words."""

from __future__ import annotations

from vidshard.jobs.runtime.errors import cause_of


def test_causes_are_found_below_what_ray_puts_around_them() -> None:
    text = """ray::MapBatches(ClipReader)() (pid=1, ip=127.0.0.1)
  File "pipeline/training_data.py", line 400, in _row
    raise UnusableError(
pipeline.training_data.loader.UnusableError: none of 16 places can be decoded: a.mp4: changed.
Take these videos away

The above exception was the direct cause of the following exception:

ray.data.exceptions.UserCodeException: UDF failed to process a data block."""
    failure = RuntimeError("training failed")
    failure.__cause__ = ValueError(text)
    assert cause_of(failure) == (
        "UnusableError: none of 16 places can be decoded: a.mp4: changed. Take these videos away"
    )
    assert cause_of(OSError("no room")) == "OSError: no room"
    assert cause_of(KeyError()) == "KeyError"
