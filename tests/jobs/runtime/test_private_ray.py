"""A Ray of our own: what it gets from the environment, what others on the machine can reach, and how it fails."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import ray

from vidshard.jobs.runtime.cluster import ray_cluster
from vidshard.jobs.runtime.private_ray import LONGEST_FOLDER, private_ray
from vidshard.pipeline.storage import StorageError

NAMES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")


@pytest.fixture(params=[10, 120, 240], ids=lambda length: f"path of {length} characters")
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for Ray's files."""
    folder: Path = tmp_path / ("d" * request.param)
    folder.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    return folder


def test_files_of_ray_lie_in_a_folder_of_this_user_alone_with_a_path_short_enough_for_sockets(folder: Path) -> None:
    with private_ray(keep_files=False) as options:
        given = Path(options["_temp_dir"])
        assert len(os.fsencode(given)) <= LONGEST_FOLDER
        given.chmod(0o777)  # as Ray does with its own folder
        for path in (given.parent, given.resolve().parent):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
        assert given.resolve().is_relative_to(folder.resolve())  # what it spills goes where there is space
        left = (given.parent, given.resolve())
    assert not any(path.exists() for path in left)
    assert not any(folder.iterdir())


def test_each_ray_has_a_token_of_its_own_whatever_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    before = [os.environ.get(name) for name in NAMES]
    tokens = []
    for _ in range(2):
        with private_ray(keep_files=False):
            assert os.environ["RAY_AUTH_MODE"] == "token"
            tokens.append(os.environ["RAY_AUTH_TOKEN"])
        assert [os.environ.get(name) for name in NAMES] == before
    assert len(set(tokens)) == 2
    assert min(map(len, tokens)) == 64


@pytest.mark.parametrize(
    "failure",
    [
        PermissionError(13, "Permission denied", "/.ray"),
        OSError("AF_UNIX path length cannot exceed 107 bytes"),
        Exception("The current node timed out during startup."),
        AssertionError(),
        TypeError("unexpected"),
        ImportError("no module"),
        SystemExit(1),
    ],
    ids=lambda failure: type(failure).__name__,
)
@pytest.mark.parametrize("address", ["local", "auto"])
def test_whatever_ray_raises_at_its_start_is_one_line_with_a_remedy(
    failure: BaseException, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_options: object) -> None:
        raise failure

    ended = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    with (
        pytest.raises(StorageError, match=r"cannot (be started|join).*(--local|RAY_AUTH_TOKEN)") as caught,
        ray_cluster(address=address, object_store_bytes=None, verbose=False),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert ended  # what it had begun
