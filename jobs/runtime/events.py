"""Event log of a job (``--log-json FILE``): one JSON object on a line for each event, for schedulers and log stores.

``EVENTS`` is the whole schema. A field keeps its name and meaning; later versions may add fields and events. Each line
has ``time`` (UTC), ``run`` (random, the same for all lines of one command) and ``event``. Lines are appended, each in
one write, so that the commands that continue an output may share a file. No line holds credentials.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from rich.console import Console

from vidshard.jobs.runtime.errors import exit_code_of, print_error
from vidshard.jobs.runtime.terminal import finite
from vidshard.schemas.errors import EXIT_FAILED, UserError, VidshardError
from vidshard.schemas.fields import ProgressMode, ReportSettings
from vidshard.schemas.uris import is_remote, public_uri, without_secrets

EVENTS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "started": (
        "A command begins.",
        {"command": "such as tokenize", "version": "of vidshard", "pid": "process id", "host": "name of the machine"}
        | {"out": "the folder that it writes, or null"},
    ),
    "run_started": (
        "The machines are known, and device and precision decided.",
        {"settings": "the resolved run", "executor": "in words", "cpus": "number", "gpus": "number", "nodes": "number"}
        | {"device": "cuda or cpu", "precision": "such as float16"},
    ),
    "planned": (
        "The work of the run is known.",
        {"videos": "of the inputs", "spans": "planned, in all", "clips": "expected of them"}
        | {"reused": "spans that an earlier run finished", "rejected_before": "spans that an earlier run rejected"}
        | {"left": "spans to do now", "rejected_videos": "videos rejected while they were opened"},
    ),
    "video_rejected": (
        "A video was rejected when it was opened.",
        {"uri": "without credentials", "reason": "from the list of reasons", "detail": "text"},
    ),
    "span_finished": (
        "The clips of a span are encoded. They are saved once their shard is written.",
        {"span_id": "as in plan/, which names its video", "clips": "number", "decode_seconds": "of a core"},
    ),
    "span_rejected": (
        "A span, or with kept_clips a part of it, was rejected.",
        {"span_id": "as in plan/", "video_id": "id", "uri": "without credentials", "reason": "from the list of reasons"}
        | {"detail": "text", "kept_clips": "clips that came out all the same, or null"},
    ),
    "shard_written": (
        "A shard is committed.",
        {"path": "of the shard", "clips": "number", "spans": "number", "bytes": "of the file"},
    ),
    "progress": (
        "About every ten seconds of a phase.",
        {"phase": "title", "done": "units", "total": "units", "seconds": "since the phase began"}
        | {"left_seconds": "estimate, or null", "text": "as displayed"},
    ),
    "node_joined": (
        "A node joined the cluster.",
        {"node": "Ray's id", "host": "name", "cpus": "number", "gpus": "number"},
    ),
    "node_lost": ("A node left the cluster, or was lost.", {"node": "Ray's id", "host": "name"}),
    "worker_lost": (
        "Processes of Ray ended that should not have; their work is done again.",
        {"count": "number of processes since the last such event", "detail": "Ray's words for the last one"},
    ),
    "warning": ("Something costs time, or will fail later.", {"text": "with the remedy"}),
    "summary": ("The result, as in the files of the output.", {"result": "object; that of tokenize is summary.json"}),
    "ended": (
        "The last line of a command that was not killed.",
        {"exit_code": "as in the table of exit codes", "error": "message, or null", "seconds": "since it began"},
    ),
}
"""Meaning of each event, and of its fields."""


_LONGEST_LINE = 16 << 20
"""Bytes of the first line of a log that are read; it holds the settings of a run at most."""


class EventLog:
    """Appends events to a file; without one it does nothing. All methods may be called from any thread."""

    def __init__(self, path: str | None = None, *, out: str | None = None) -> None:
        """Open the file.

        Args:
            path: the file; None to write no events.
            out: folder that the command writes, in which no log may lie.

        Raises:
            UserError: it cannot be opened for appending, holds something else than events, or lies in ``out``.
        """
        self._path = path
        self._run = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._file: int | None = None
        self.exit_code = 0
        """Exit code that the command will have if no exception ends it."""
        self.error: str | None = None
        """Reason of that exit code; None for 0."""
        if path is None:
            return
        if is_remote(path):
            raise UserError(f"--log-json {public_uri(path)}: give a local file; a log store can collect it from there")
        if path in ("", "-"):
            raise UserError(f"--log-json {path}: name a file, such as run.jsonl")
        try:
            if out is not None and not is_remote(out) and Path(path).resolve().is_relative_to(Path(out).resolve()):
                raise UserError(f"--log-json {path}: it lies in the output; name a file outside of {out}")
            if _holds_something_else(path):
                raise UserError(
                    f"--log-json {path}: this file is no event log; name a new one, or one of an earlier run"
                )
            # without O_NONBLOCK a pipe that nobody reads would stop the command here
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self._file = os.open(path, flags, 0o644)
            os.set_blocking(self._file, True)
        except (OSError, ValueError) as error:
            problem = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"--log-json {path}: {problem}; name a file in a folder that you may write to") from error

    @property
    def is_open(self) -> bool:
        """Whether events are written, so that callers need not gather what nobody reads."""
        return self._file is not None

    def will_end(
        self, exit_code: int, problems: Iterable[str] = (), interruption: KeyboardInterrupt | None = None
    ) -> None:
        """Set the exit code of the command, and its reason: the problems, or else the interruption."""
        self.exit_code = exit_code
        self.error = "; ".join(problems) or (None if interruption is None else type(interruption).__name__)

    def emit(self, event: str, **values: Any) -> None:
        """Append an event.

        A file that can no longer be written costs one message and the later events, and never the job.

        Args:
            event: one of ``EVENTS``.
            values: JSON values of all its fields.
        """
        assert values.keys() == EVENTS[event][1].keys(), (event, sorted(values))
        if self._file is None:
            return
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        record = {"time": time, "run": self._run, "event": event} | {
            name: _clean(value) for name, value in values.items()
        }
        line = (json.dumps(finite(record), ensure_ascii=True, allow_nan=False, default=str) + "\n").encode()
        with self._lock:
            try:
                while line and self._file is not None:
                    line = line[os.write(self._file, line) :]
            except OSError as error:
                self._close()
                print_error(f"--log-json {self._path}: {error.strerror}; no more events are written, the job goes on")

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _holds_something_else(path: str) -> bool:
    """Whether a path is a file whose first line is no event; a log is appended to, and nothing else is."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return False
    with open(path, "rb") as file:
        first = file.readline(_LONGEST_LINE)
    try:
        record = json.loads(first)
    except (ValueError, RecursionError):
        return True
    return not isinstance(record, dict) or not {"time", "run", "event"} <= record.keys()


def _clean(value: Any) -> Any:
    """A value without the secrets of URLs in its texts."""
    if isinstance(value, str):
        return without_secrets(value) if ":" in value or "=" in value else value
    if isinstance(value, Mapping):
        return {name: _clean(each) for name, each in value.items()}
    return [_clean(each) for each in value] if isinstance(value, list | tuple | set) else value


_REPORTS: WeakKeyDictionary[Console, tuple[EventLog, ProgressMode | None]] = WeakKeyDictionary()
"""Event log and progress display of the job that prints on a console. All that a job tells goes through its console."""
_NOWHERE = EventLog()


def events_of(console: Console) -> EventLog:
    """Event log of the job that prints on a console; one that writes nothing if there is none."""
    return _REPORTS[console][0] if console in _REPORTS else _NOWHERE


def mode_of(console: Console) -> ProgressMode:
    """Progress display of the job that prints on a console."""
    mode = _REPORTS[console][1] if console in _REPORTS else None
    return mode or ("live" if console.is_terminal else "plain")


@contextmanager
def reported(console: Console, settings: ReportSettings, *, command: str, out: str | None) -> Iterator[EventLog]:
    """Report a job on a console as ``--progress`` and ``--log-json`` say.

    Yields:
        The event log, which `events_of` gives for the console meanwhile.

    Raises:
        UserError: the file of the log cannot be opened.
    """
    log = EventLog(settings.log_json, out=out)
    started = datetime.now(UTC)
    log.emit(
        "started",
        command=command,
        version=version("vidshard"),
        pid=os.getpid(),
        host=os.uname().nodename,
        out=None if out is None else public_uri(out),
    )
    _REPORTS[console] = log, settings.progress
    try:
        yield log
    except BaseException as raised:
        log.will_end(_exit_code(raised), [str(raised) or type(raised).__name__])
        raise
    finally:
        seconds = round((datetime.now(UTC) - started).total_seconds(), 3)
        log.emit("ended", exit_code=log.exit_code, error=log.error, seconds=seconds)
        _REPORTS.pop(console, None)
        log.close()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return exit_code_of(error)
    return error.exit_code if isinstance(error, VidshardError) else EXIT_FAILED
