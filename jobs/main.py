"""Start of the ``vidshard`` command: what has to hold before anything else is imported.

The imports of `vidshard.jobs.cli` take a second. This module imports the standard library alone, so that a Ctrl-C in
that second ends with one line rather than a traceback.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from types import FrameType

from vidshard.jobs import INTERRUPTED

_THREADS_SLEEP = ("OMP_WAIT_POLICY", "passive")
"""Environment variable that OpenMP reads when torch is loaded. By default a thread that waits for the others spins, and
takes the core that these or another program need. On two cores with a load of 9 a 17x128x128 clip of the tiny model
then takes 1.03 s of CPU time instead of 0.22 (medians of 20)."""


def main() -> None:
    """Entry point of the console command."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _end_at_once)
    os.environ.setdefault(*_THREADS_SLEEP)
    end = _End()
    atexit.register(end)  # the first one is called last
    from vidshard.jobs import cli

    try:
        cli.main()
    except SystemExit as exit_:
        end.code = exit_.code
        raise


class _End:
    """Ends the process, once exit handlers have run, without taking the interpreter apart.

    Threads of libraries may come back to Python in that time, as those of Arrow and PyTorch do. The interpreter ends
    such a thread, which aborts the process where the library does not foresee it.
    """

    def __init__(self) -> None:
        self.code: object = None

    def __call__(self) -> None:
        if not isinstance(self.code, int):
            return
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except (OSError, ValueError):
            return  # the interpreter has an exit code for this
        os._exit(self.code)


def _end_at_once(number: int, _frame: FrameType | None) -> None:
    """Signal handler while nothing is begun that would have to be given back."""
    try:
        os.write(2, f"{INTERRUPTED}\n".encode())
    finally:
        os._exit(128 + number)


if __name__ == "__main__":
    main()
