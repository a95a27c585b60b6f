"""Start and end of the command's process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("code", [0, 2])
def test_the_interpreter_is_not_taken_apart_while_threads_of_libraries_may_come_back_to_it(code: int) -> None:
    script = f"""
import os
from vidshard.jobs import cli, main

class TakenApart:
    def __del__(self):
        os.write(1, b"taken apart")

kept = TakenApart()
cli._run = lambda: {code}
main.main()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", "")


def test_exit_handlers_run_and_what_was_printed_is_written(tmp_path: Path) -> None:
    script = """
import atexit
from vidshard.jobs import cli, main

def run():
    atexit.register(lambda: print("handled"))
    print("printed")
    return 3

cli._run = run
main.main()
"""
    file = tmp_path / "printed"
    with file.open("wb") as out:
        ended = subprocess.run([sys.executable, "-c", script], stdout=out, timeout=60, check=False)
    assert ended.returncode == 3
    assert file.read_text() == "printed\nhandled\n"
