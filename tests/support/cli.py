"""The command line in this process: what it prints and how it exits.

``tokenize`` runs every stage in this process (``--local``, about a second a run); what needs Ray calls
``tokenize_on_ray``.
"""

from __future__ import annotations

import torch
from click.testing import CliRunner, Result

from vidshard.jobs.cli import vidshard

SMALL = ("--tokenizer", "tiny", "--fps", "4", "--frames", "5", "--size", "32")
"""Settings of small runs."""


def run(*arguments: object) -> Result:
    """Run a command; an exception that is no exit ends the test."""
    threads = torch.get_num_threads()
    try:
        return CliRunner().invoke(vidshard, [str(argument) for argument in arguments], catch_exceptions=False)
    finally:
        torch.set_num_threads(threads)  # an encoder in this process sets its own number


def vidshard_exits(*arguments: object) -> tuple[int, str]:
    """Run a command and give its exit code and everything that it printed."""
    result = run(*arguments)
    return result.exit_code, result.output


def printed_by(*arguments: object, code: int = 0) -> str:
    """Output of a command on one line; it must exit with ``code``."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def tokenize(*arguments: object) -> Result:
    """Tokenize in this process, without Ray."""
    return run("tokenize", *arguments, "--local")


def tokenize_on_ray(*arguments: object) -> Result:
    """Tokenize on the Ray of the session: needs the fixture ``ray_session``."""
    return run("tokenize", *arguments)
