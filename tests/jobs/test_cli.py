"""How a command ends: what its job returns or raises becomes output and an exit code, in one place."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from click.testing import CliRunner

from vidshard.jobs.cli import vidshard
from vidshard.jobs.runtime.errors import Terminated
from vidshard.jobs.shards import verify
from vidshard.schemas.errors import RunFailedError, UserError


@dataclass
class Outcome:
    exit_code: int


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        (None, 0, ""),
        (Outcome(0), 0, ""),
        (Outcome(1), 1, ""),
        (UserError("there is nothing there"), 2, "error: there is nothing there\n"),
        (RunFailedError("the disk is full"), 1, "error: the disk is full\n"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again to continue\n"),
        (Terminated(), 143, "interrupted; run the same command again to continue\n"),
    ],
)
def test_how_a_job_ends_is_the_exit_code_of_its_command(
    monkeypatch: pytest.MonkeyPatch, ending: object, code: int, words: str
) -> None:
    def job(*_arguments: object, **_options: object) -> object:
        if isinstance(ending, BaseException):
            raise ending
        return ending

    monkeypatch.setattr(verify, "verify_output", job)
    result = CliRunner().invoke(vidshard, ["verify", "tokens/"])
    assert result.exit_code == code
    assert result.stderr == words
    assert result.stdout == ""


def test_a_defect_is_not_taken_for_a_mistake_of_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    def job(*_arguments: object, **_options: object) -> None:
        raise ValueError("shapes do not match")

    monkeypatch.setattr(verify, "verify_output", job)
    assert isinstance(CliRunner().invoke(vidshard, ["verify", "tokens/"]).exception, ValueError)
