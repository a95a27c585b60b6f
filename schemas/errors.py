"""The errors a person is meant to read: one base class, and the exit code each of them ends a command with.

An error that derives from :class:`VidshardError` says in its message what is wrong, where, and what to do about it, so
it is printed without a traceback. Any other exception is a defect of vidshard. Errors that belong to one room
(``StorageError``, ``ShardError``, ``LeaseHeldError`` ...) are defined there; all of them derive from this one.
"""

from __future__ import annotations

from typing import ClassVar

from vidshard.schemas.text import readable
from vidshard.schemas.uris import without_secrets

EXIT_FAILED = 1
"""The job ran, and its result is not what was asked for. A person has to mend something before it goes on."""
EXIT_REFUSED = 2
"""The request cannot be carried out as it stands; nothing was done."""
EXIT_AGAIN = 75
"""Something outside of the job failed that may pass. The same command continues (``EX_TEMPFAIL`` of sysexits.h)."""


class VidshardError(Exception):
    """Base of every error whose message is written for the user of vidshard."""

    exit_code: ClassVar[int] = EXIT_REFUSED
    """Exit code of the command that this error ends."""
    is_printed: ClassVar[bool] = False
    """Whether the message was printed when the error came up, as the process might not have lived to print it."""


class UserError(VidshardError):
    """The request cannot be carried out as it stands; the message says why and what to change."""


class RunFailedError(VidshardError):
    """The job ran and failed; the message says what broke and what to do next."""

    exit_code = EXIT_FAILED
    has_lost_workers: ClassVar[bool] = False
    """Whether no worker of the run can be asked for anything any more."""


class RunCutShortError(RunFailedError):
    """The job ran, and something outside of it ended it that may pass; the same command continues."""

    exit_code = EXIT_AGAIN


class OutageError(VidshardError):
    """A storage or the Hub does not answer, though it was asked again for a while. It is no single video's fault."""

    exit_code = EXIT_AGAIN


def one_line(error: BaseException, limit: int | None = None, *, about: str = "") -> str:
    """An error's message on one line, or its type where it has none; without credentials and control characters.

    Args:
        limit: characters at most; None for all of them.
        about: complete URI that the error is about; its secret parts are taken out wherever they stand.
    """
    words = " ".join(str(error).split()) or type(error).__name__
    return readable(without_secrets(words, about))[:limit]


def first_line(error: BaseException, limit: int) -> str:
    """First line of an error's message, or its type where it has none, without control characters.

    Args:
        limit: characters at most. Libraries such as torch add lines about their own sources.
    """
    return readable((str(error).strip().splitlines() or [type(error).__name__])[0], limit)
