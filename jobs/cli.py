"""The ``vidshard`` command: one sub-command per job.

The sub-commands are in `vidshard.jobs.commands`: each turns arguments into settings and calls its job. This module
turns a job's result or its error into output and an exit code. Errors for users, interrupts and defects are caught here
and nowhere else. Exit codes: 0 done; 1 the job failed, or its output is incomplete or damaged; 2 the request cannot be
carried out; 75 something outside failed that may pass; 130 interrupted (Ctrl-C); 143 terminated (SIGTERM); 129 the
terminal was lost (SIGHUP).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from vidshard.jobs import INTERRUPTED
from vidshard.jobs.commands.evaluating import evaluate
from vidshard.jobs.commands.exporting import export, push
from vidshard.jobs.commands.outputs import debug, decode, inspect, stats, verify
from vidshard.jobs.commands.reporting import report
from vidshard.jobs.commands.tokenizing import demo, plan, tokenize
from vidshard.jobs.commands.training import train
from vidshard.jobs.commands.weights import convert, tokenizers
from vidshard.jobs.runtime.errors import exit_code_of, interrupt_behind, print_error, signals_that_end, terminate
from vidshard.jobs.runtime.output import lost_report, make_output_safe
from vidshard.jobs.runtime.settings import OrderedGroup
from vidshard.schemas.errors import EXIT_FAILED, EXIT_REFUSED, VidshardError

_EXIT_SECONDS = 60.0
"""Time for threads and exit handlers after a defect, which may have left them waiting."""


def main() -> None:
    """Run a command; `vidshard.jobs.main` is what starts it.

    Raises:
        SystemExit: always.
    """
    make_output_safe()
    for number in signals_that_end():
        signal.signal(number, terminate)
    # else a thread that asks Ray for something after its end starts a second Ray
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    failed: list[str] = []
    threading.excepthook = partial(_end_for_thread, failed)
    try:
        os.getcwd()
    except OSError as error:
        print_error(f"the working directory cannot be used ({error.strerror}): change to another one, and try again")
        sys.exit(EXIT_REFUSED)
    code = _run()
    threading.excepthook = threading.__excepthook__
    if failed:
        print_error(f"a defect of vidshard (in the thread {failed[0]}); what is committed is valid. Please report it")
        code = EXIT_FAILED
    elif code == 0 and not _is_run(sys.argv[1:]) and (loss := lost_report()) is not None:
        print_error(f"what this command printed is lost: {loss}")
        code = EXIT_FAILED
    sys.exit(code)


_CODE = Path(__file__).parents[1]
"""Folder of the package ``vidshard``, under which all of its modules are imported."""

_RUNS = frozenset({"tokenize", "decode", "export", "push", "convert", "demo", "train", "report"})
"""Commands whose result is files; what they print may be lost. The result of the others is what they print."""


def _is_run(arguments: Sequence[str]) -> bool:
    return bool(arguments) and arguments[0] in _RUNS and not {"--help", "--help-all"} & set(arguments)


def _end_for_thread(failed: list[str], failure: threading.ExceptHookArgs) -> None:
    """Hook for an exception that ends a thread: the command would go on without it, or wait for it for ever.

    It ends the command as SIGTERM does, so that what is begun is saved and the lease is given back. A thread in which
    no code of vidshard ran is its library's affair: Ray's fail when Ray dies, and the main thread is told so.
    """
    frames = traceback.extract_tb(failure.exc_traceback)
    if not any(Path(frame.filename).is_relative_to(_CODE) for frame in frames):
        threading.__excepthook__(failure)
        return
    name = failure.thread.name if failure.thread is not None else "?"
    print_error(f"exception in the thread {name}:")
    traceback.print_exception(failure.exc_value)
    failed.append(name)
    os.kill(os.getpid(), signal.SIGTERM)


def _run() -> int:
    """Run the command that the arguments name; returns the exit code of the process."""
    try:
        code = vidshard.main(standalone_mode=False)
    except SystemExit as end:
        code = end.code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except BaseException as error:  # noqa: BLE001  nobody else would end the process in order
        interrupt = interrupt_behind(error)
        if interrupt is not None:
            click.echo(INTERRUPTED, err=True)
            return exit_code_of(interrupt)
        traceback.print_exception(error)
        print_error(
            f"a defect of vidshard ({type(error).__name__}); what is committed is valid. Please report the above"
        )
        late = threading.Timer(_EXIT_SECONDS, os._exit, (EXIT_FAILED,))
        late.daemon = True
        late.start()
        return EXIT_FAILED
    return code if isinstance(code, int) else 0


class ReportingGroup(OrderedGroup):
    """The root command, where every job's result, error or interrupt becomes a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the sub-command.

        Raises:
            SystemExit: always, with the exit code of the error, of the interrupt, or of the job's result.
        """
        try:
            result = super().invoke(ctx)
        except VidshardError as error:
            if not error.is_printed:
                print_error(error)
            sys.exit(error.exit_code)
        except KeyboardInterrupt as interrupt:
            click.echo(INTERRUPTED, err=True)
            sys.exit(exit_code_of(interrupt))
        except BrokenPipeError as error:  # of the job, as standard output has none; click would end without a word
            raise RuntimeError(f"a pipe between processes of the job broke: {error}") from error
        sys.exit(result if isinstance(result, int) else getattr(result, "exit_code", 0))


@click.group(cls=ReportingGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="vidshard")
def vidshard() -> None:
    """Turn large video corpora into Parquet shards of tokens or latents, and tokens back into video.

    \b
    Start here:
      vidshard demo                                     see it work, in a minute
      vidshard tokenize clips/ --out tokens/            videos to token shards
      vidshard verify tokens/                           check the output
      vidshard decode tokens/ --clip ID --to clip.mp4   tokens back to video

    \b
    Exit codes:
      0     done
      1     the job failed, or its output is incomplete or damaged
      2     the request cannot be carried out; nothing was done
      75    storage or cluster was gone for a while; the same command continues
      130   interrupted (Ctrl-C); the same command continues
      143   terminated (SIGTERM); the same command continues
      129   the terminal was lost (SIGHUP); the same command continues
      137   killed (SIGKILL); the same command continues
    """


_COMMANDS = (
    demo,
    tokenize,
    plan,
    inspect,
    stats,
    verify,
    debug,
    report,
    decode,
    evaluate,
    export,
    push,
    tokenizers,
    convert,
    train,
)
"""In the order in which ``--help`` lists them."""

for _command in _COMMANDS:
    vidshard.add_command(_command)


if __name__ == "__main__":
    main()
