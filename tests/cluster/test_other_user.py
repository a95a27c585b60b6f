"""The main job where users run it: another user without a home, a long TMPDIR, a read-only folder, little memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cli import SMALL
from tests.support.videos import Recipe, write_video

NOBODY = 65534
PROGRAM = "from vidshard.jobs.main import main; main()"
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
SMALL_MEMORY = "mount -t tmpfs -o size=64m,mode=1777 none /dev/shm"
RUNS_PYTHON = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import vidshard'], check=True)"
IN_A_NAMESPACE = ["unshare", "--mount", "--propagation", "private", "sh", "-c"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user may enter, with a video in ``in/`` and a writable ``out/`` for another user."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become another user, with setpriv")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    for name in ("in", "out", "cwd", "d" * 120):
        (folder / name).mkdir()
    for name in ("out", "d" * 120):
        os.chown(folder / name, NOBODY, NOBODY)
    (folder / "cwd").chmod(0o555)
    write_video(folder / "in" / "a.mp4", Recipe(num_frames=60))
    yield folder
    shutil.rmtree(folder)


def open_interpreter(place: Path) -> str:
    """Shell command for a mount namespace, by which other users reach a Python in a closed home; none is changed."""
    prefix = Path(sys.base_prefix).resolve()
    closed = [folder for folder in reversed(prefix.parents) if not folder.stat().st_mode & 0o001]
    if not closed:
        return "true"
    kept = place / "python"
    kept.mkdir()
    return (
        f"mount --bind {prefix} {kept} && mount -t tmpfs -o mode=755 none {closed[0]} && mkdir -p {prefix} "
        f"&& mount --bind {kept} {prefix}"
    )


@pytest.mark.parametrize("local", [False, True], ids=["with Ray", "local"])
def test_another_user_without_a_home_tokenizes_in_a_small_and_narrow_place(place: Path, local: bool) -> None:
    arguments = ["tokenize", "../in", "--out", str(place / "out" / "tokens"), *SMALL, *(["--local"] if local else [])]
    command = [*AS_NOBODY, sys.executable, "-c", PROGRAM, *arguments]
    prepare = f"{SMALL_MEMORY} && {open_interpreter(place)}"
    can_mount = not subprocess.run([*IN_A_NAMESPACE, prepare], capture_output=True, check=False).returncode
    begin = [*IN_A_NAMESPACE, f'{prepare} && exec "$@"', "sh"] if can_mount else []
    if subprocess.run(
        [*begin, *AS_NOBODY, sys.executable, "-c", RUNS_PYTHON], capture_output=True, check=False
    ).returncode:
        pytest.skip("other users cannot run this installation")
    environment = {"PATH": os.environ["PATH"], "HOME": "/", "TMPDIR": str(place / ("d" * 120)), "OMP_NUM_THREADS": "1"}
    environment |= {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    ended = subprocess.run(
        [*begin, *command], cwd=place / "cwd", env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Traceback" not in ended.stdout + ended.stderr
    summary = json.loads((place / "out" / "tokens" / "summary.json").read_text())
    assert summary["written"]["num_clips"] > 0
    assert not any((place / ("d" * 120)).iterdir())
    assert not any((place / "cwd").iterdir())
