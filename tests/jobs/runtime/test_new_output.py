"""Refused jobs: they leave none of the folders that they made, and touch none that was there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.cli import SMALL, run
from tests.support.videos import Recipe, write_video
from vidshard.jobs.runtime.new_output import no_empty_output
from vidshard.pipeline.output.layout import LEASES
from vidshard.pipeline.output.lease import Lease
from vidshard.schemas.errors import EXIT_REFUSED, UserError


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("videos") / "a.mp4", Recipe(num_frames=10, width=64, height=64))


@pytest.mark.parametrize(
    "arguments",
    [
        ("tokenize", "missing.mp4", "--local", *SMALL),
        ("tokenize", "VIDEO", "--local", "--device", "cuda", *SMALL),
        ("tokenize", "VIDEO", "--local", "--wait-for-gpus", "60", *SMALL),
        ("evaluate", "missing.mp4", "--local", "--tokenizer", "tiny", "--size", "32", "--frames", "5"),
    ],
)
def test_a_refused_job_leaves_no_folder(video: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    out = tmp_path / "new/tokens"
    words = [str(video) if word == "VIDEO" else word for word in arguments]
    result = run(*words, "--out", out)
    assert result.exit_code == EXIT_REFUSED, result.output
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_there_stays_and_gets_nothing(video: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    out.mkdir()
    assert run("tokenize", video, "--local", "--device", "cuda", *SMALL, "--out", out).exit_code == EXIT_REFUSED
    assert list(out.iterdir()) == []


def _refused(out: Path, *, writes: bool, is_followed: bool) -> Lease | None:
    """A job that takes the lease and is refused; perhaps it wrote something, or another run took the lease after it."""
    other = None
    with suppress(UserError), no_empty_output(str(out)):
        with Lease.acquire(str(out)):
            if writes:
                (out / "run.json").write_text("{}")
        other = Lease.acquire(str(out)) if is_followed else None
        raise UserError("refused")
    return other


def test_an_output_in_which_something_was_written_keeps_the_numbers_of_its_leases(tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    _refused(out, writes=True, is_followed=False)
    assert [path.name for path in (out / LEASES).iterdir()] == ["000001.json"]


def test_the_lease_of_another_run_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    other = _refused(out, writes=False, is_followed=True)
    assert other is not None
    assert sorted(path.name for path in (out / LEASES).iterdir()) == ["000001.json", "000002.json"]
    other.release()
