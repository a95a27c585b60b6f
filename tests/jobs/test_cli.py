"""End of a command: what its job returns or raises becomes output and an exit code, in one place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from vidshard.jobs import cli, main
from vidshard.jobs.cli import vidshard
from vidshard.jobs.runtime.errors import HungUp, Terminated
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
        (HungUp(), 129, "interrupted; run the same command again to continue\n"),
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


@pytest.mark.parametrize(
    "defect", [ValueError("shapes do not match"), BrokenPipeError(32, "Broken pipe"), MemoryError()]
)
def test_a_defect_ends_the_command_with_a_traceback_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], defect: Exception
) -> None:
    assert code_of_verify(defect, monkeypatch) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert f"{type(defect).__name__}" in printed
    assert "error: a defect of vidshard" in printed


@pytest.mark.parametrize(("interrupt", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143), (HungUp(), 129)])
def test_an_interrupt_that_a_library_wraps_is_an_interrupt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], interrupt: KeyboardInterrupt, code: int
) -> None:
    error = ImportError("initialization of _C failed")
    error.__cause__ = interrupt
    assert code_of_verify(error, monkeypatch) == code
    assert capsys.readouterr().err == "interrupted; run the same command again to continue\n"


def code_of_verify(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def job(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(verify, "verify_output", job)
    monkeypatch.setattr(sys, "argv", ["vidshard", "verify", "tokens/"])
    monkeypatch.setattr(cli, "_EXIT_SECONDS", 1e6)  # of what would end this process
    return cli._run()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_while_the_command_is_imported_ends_it_with_one_line(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "click.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n")
    ended = main_in_a_process(f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    assert ended.returncode == 128 + number
    assert ended.stderr == "interrupted; run the same command again to continue\n"


def test_a_deleted_working_directory_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    ended = main_in_a_process(f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r})")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: the working directory cannot be used (No such file or directory): change to")


@pytest.mark.parametrize("given", [None, "active"])
def test_waiting_threads_sleep_before_torch_is_loaded_unless_the_user_wants_otherwise(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli, "main", lambda: seen.append(os.environ["OMP_WAIT_POLICY"]))
    seen: list[str] = []
    main.main()
    assert seen == [given or "passive"]


def main_in_a_process(before: str) -> subprocess.CompletedProcess[str]:
    """Run ``vidshard tokenizers`` in a process of its own."""
    script = f"{before}\nfrom vidshard.jobs.main import main\nmain()"
    command = [sys.executable, "-c", script, "tokenizers"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
