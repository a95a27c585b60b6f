"""Environment of a Ray that a job starts for itself: private files, a token of its own, loopback ports, few processes.

Ray's own defaults keep the token in the user's home, where others may read it, open the session's folder to everybody,
and listen on every network interface. Whoever has the token runs code as this user.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray._private import parameter, ray_constants, services
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

LONGEST_FOLDER = (103 if sys.platform == "darwin" else 107) - len(
    "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
)
"""Longest path of Ray's temp folder in bytes: its sockets lie below, and a socket's path has 107 bytes at most."""
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108  a private folder is made in one of them


@contextmanager
def private_ray(*, keep_files: bool) -> Iterator[dict[str, Any]]:
    """Prepare the environment for a Ray of our own, and restore it after Ray has stopped.

    Args:
        keep_files: leave Ray's logs where they are, rather than removing them at the end, and print those of workers.

    Yields:
        Arguments of ``ray.init``.

    Raises:
        OSError: no folder for Ray's files can be made.
    """
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # the name says another thing, but it is what lets Ray keep 127.0.0.1 rather than look for an outer address
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    }
    with (
        _private_folder(keep=keep_files) as folder,
        _environment(environment),
        without_idle_processes(log_monitor=keep_files),
        _out_of_reach_of_signals(),
    ):
        yield {"_temp_dir": str(folder), "_node_ip_address": "127.0.0.1"}


@contextmanager
def without_idle_processes(*, log_monitor: bool) -> Iterator[None]:
    """Let ``ray.init`` start no process that has nothing to do on one machine; it has no arguments for them.

    These are the autoscaler's monitor, as there are no machines to add, and the log monitor where nothing is printed.
    Together they take 1.3 of the 21 s of CPU time of the smallest run, and 190 MB.
    """
    usual = parameter.RayParams

    def made(**settings: Any) -> Any:
        params = usual(**settings)
        params.no_monitor = True
        params.include_log_monitor = log_monitor
        return params

    parameter.RayParams = made
    try:
        yield
    finally:
        parameter.RayParams = usual


@contextmanager
def _out_of_reach_of_signals() -> Iterator[None]:
    """Let ``ray.init`` start its processes in groups of their own.

    ``timeout``, a scheduler or a closed terminal signals the whole group of the command, and the raylet would end at
    once. So the command alone hears it, and finishes what is begun. Ray's processes still die with the command, by the
    kernel's parent-death signal that Ray sets.
    """
    usual = services.ConsolePopen

    class InItsOwnGroup(usual):  # type: ignore[misc, valid-type]  # Ray has no types here
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options, process_group=0)

    services.ConsolePopen = InItsOwnGroup
    try:
        yield
    finally:
        services.ConsolePopen = usual


@contextmanager
def _private_folder(*, keep: bool) -> Iterator[Path]:
    """Make Ray's temp folder inside one that only this user may enter.

    It lies in ``$RAY_TMPDIR``, or where temporary files lie. If that path is too long for sockets, Ray gets a short
    link to it.
    """
    made = [Path(tempfile.mkdtemp(prefix="vidshard-", dir=os.environ.get("RAY_TMPDIR") or None)).resolve()]
    try:
        folder = made[0] / "ray"  # Ray opens its own folder to everybody, so the outer one has to be closed
        folder.mkdir()
        if len(os.fsencode(folder)) > LONGEST_FOLDER:
            made.append(_make_short_folder())
            link = made[1] / "ray"
            link.symlink_to(folder)
            folder = link
        yield folder
    finally:
        for path in () if keep else made:
            shutil.rmtree(path, ignore_errors=True)


def _make_short_folder() -> Path:
    problems = []
    for base in _SHORT_FOLDERS:
        try:
            return Path(tempfile.mkdtemp(prefix="vidshard-", dir=base))
        except OSError as error:
            problems.append(str(error))
    raise OSError(f"no folder with a path short enough for sockets can be made: {'; '.join(problems)}")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for this process and those that it starts; Ray has read some of them when it was imported."""
    before = {name: os.environ.get(name) for name in values}
    enabled = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(values)
    ray_constants.ENABLE_RAY_CLUSTER = False
    _read_again()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        _read_again()


def _read_again() -> None:
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")
