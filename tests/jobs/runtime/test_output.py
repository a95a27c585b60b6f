"""Standard output and error of a command: whatever becomes of them, the job goes on."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cli import run
from tests.support.videos import Recipe, write_video

OUTPUT = str(Path(__file__).parents[2] / "fixtures" / "format_1" / "tokens")
SCRIPT = """
import os, sys
from vidshard.jobs.runtime.output import make_output_safe
make_output_safe()
for stream in (sys.stdout, sys.stderr):
    for _ in range(2000):
        print("3 videos \\u00b7 2\\u00d73 \\u2026 \\u6f22 \\udcff", file=stream, flush=True)
os.write(1, b"")
print(open(os.devnull).fileno() > 2, file=open(sys.argv[1], "w"))
"""


def is_done(marker: Path, **streams: object) -> bool:
    """Whether a process that prints a lot comes to its end, with descriptors that are not reused."""
    command = [sys.executable, "-c", SCRIPT, str(marker)]
    ended = subprocess.run(command, timeout=60, check=False, **streams)  # type: ignore[call-overload]
    return ended.returncode == 0 and marker.read_text() == "True\n"


@pytest.mark.parametrize(
    ("encoding", "line"),
    [
        ("ascii", b"3 videos - 2x3 ... \\u6f22 \\udcff\n"),
        ("latin-1", b"3 videos \xb7 2\xd73 ... \\u6f22 \\udcff\n"),
        ("utf-8", "3 videos · 2×3 … 漢 \\udcff\n".encode()),
    ],
)
def test_characters_that_a_console_cannot_show_are_replaced(tmp_path: Path, encoding: str, line: bytes) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    with open(tmp_path / "out", "wb") as file:
        assert is_done(tmp_path / "marker", env=environment, stdout=file, stderr=subprocess.DEVNULL)
    assert (tmp_path / "out").read_bytes() == 2000 * line


def test_a_pipe_whose_reader_is_gone_ends_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert is_done(tmp_path / "marker", stdout=writer, stderr=writer)
    os.close(writer)


def test_a_full_disk_behind_the_output_ends_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        assert is_done(tmp_path / "marker", stdout=full, stderr=full)


def test_a_lost_terminal_ends_nothing(tmp_path: Path) -> None:
    keyboard, terminal = pty.openpty()
    os.close(keyboard)
    assert is_done(tmp_path / "marker", stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)


def test_descriptors_that_are_closed_are_not_given_to_the_next_file(tmp_path: Path) -> None:
    def close() -> None:
        for number in (0, 1, 2):
            os.close(number)

    assert is_done(tmp_path / "marker", preexec_fn=close)


def command(*arguments: str, **streams: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "vidshard.jobs.main", *arguments]
    ended: subprocess.CompletedProcess[str] = subprocess.run(
        line,
        timeout=120,
        check=False,
        text=True,
        stderr=subprocess.PIPE,
        **streams,  # type: ignore[call-overload]
    )
    return ended


def test_a_command_whose_result_is_what_it_prints_fails_if_that_is_lost() -> None:
    with open("/dev/full", "wb") as full:
        ended = command("inspect", OUTPUT, stdout=full)
    assert ended.returncode == 1
    assert "what this command printed is lost: No space left on device" in ended.stderr
    reader, writer = os.pipe()
    os.close(reader)  # who reads no further has what he wanted
    assert command("inspect", OUTPUT, stdout=writer).returncode == 0
    os.close(writer)


FAILING_THREAD = """
import sys, threading
from vidshard.jobs import cli
from vidshard.jobs.tokenization import job
real = job.print_run
def print_run(*arguments):
    for name, fails in (("foreign", lambda: 1 / 0), ("odd", lambda: real(None, None, None))):
        thread = threading.Thread(target=fails, name=name)
        thread.start()
        thread.join()
    real(*arguments)
job.print_run = print_run
cli.main()
"""


def test_an_exception_in_a_thread_ends_the_command_and_gives_the_lease_back(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", Recipe(num_frames=30, codec="mpeg4", width=64, height=64))
    arguments = [
        "tokenize",
        str(video),
        "--out",
        str(tmp_path / "out"),
        "--tokenizer",
        "tiny",
        "--size",
        "32",
        "--local",
    ]
    ended = subprocess.run(
        [sys.executable, "-c", FAILING_THREAD, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr  # of a thread that is none of ours: printed, and nothing else
    assert "AttributeError" in ended.stderr
    assert "a defect of vidshard (in the thread odd)" in ended.stderr
    again = run(*arguments)
    assert again.exit_code == 0, again.output
    assert "was at work on this output" not in again.output
