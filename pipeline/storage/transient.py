"""Transient errors of storages, told from lasting ones; and one line for a person that says what an error means.

The clients of storages raise what they like; here is the one place that reads their exceptions.
"""

from __future__ import annotations

import errno
import socket
from http.client import IncompleteRead

from vidshard.pipeline.storage.client_errors import client_errors, says_it_may_pass, says_unreachable
from vidshard.pipeline.storage.errors import ShortBodyError, StorageError
from vidshard.schemas.errors import one_line

_TRANSIENT_CODES = frozenset(
    [
        "BadDigest",
        "BandwidthLimitExceeded",
        "ConditionalRequestConflict",
        "IncompleteBody",
        "InternalError",
        "OperationAborted",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequests",
        "TooManyRequestsException",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
        # answers to a repeated completion or abortion of a multipart upload whose first answer was lost
        "InvalidPart",
        "NoSuchUpload",
    ]
)
"""S3 error codes (docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html), apart from those that come as a 5xx."""

_TRANSIENT_ERRNOS = frozenset(
    {
        errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH,
        errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.ENETRESET, errno.EAGAIN, errno.EIO,
    }
)  # fmt: skip


def storage_errors() -> tuple[type[BaseException], ...]:
    """Exception types that file systems raise: OSError, and those of the clients that are loaded."""
    return (OSError, TimeoutError, *client_errors())


def is_transient(error: BaseException) -> bool:
    """Whether an error of a remote file system may pass: trouble of the network or the server, not of the request."""
    return bool(_verdict(root_cause(error)))


def root_cause(error: BaseException) -> BaseException:
    """The innermost error of the chain of causes that says whether it is transient; else the error itself.

    File systems translate the errors of their clients and lose some of them: s3fs raises the same OSError for
    throttling and for a conflict, and fsspec's HTTP a FileNotFoundError for everything. They also ask again in the
    handler of an error, as s3fs lists what it does not find: trouble with that is not caused by the error before.
    """
    links = [error]
    while (below := _below(links[-1])) is not None and below not in links:
        links.append(below)
    return next((link for link in reversed(links) if _verdict(link) is not None), error)


def _below(error: BaseException) -> BaseException | None:
    """The error that caused this one, or was handled when it came and may have caused it."""
    if error.__cause__ is None and _verdict(error):
        return None
    return error.__cause__ or error.__context__


def _verdict(error: BaseException) -> bool | None:
    """Whether this error by itself is transient; None where it does not say."""
    if isinstance(error, StorageError):
        return False  # it was retried already
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return response.get("Error", {}).get("Code") in _TRANSIENT_CODES or is_transient_status(status)
    status = (
        getattr(error, "status", None) or getattr(error, "status_code", None) or getattr(response, "status_code", None)
    )
    if type(error).__module__.partition(".")[0] in ("gcsfs", "google"):  # aiohttp's parser has codes of its own
        status = getattr(error, "code", None)
    if isinstance(status, int) and status:
        return is_transient_status(status)
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    if isinstance(error, (TimeoutError, ConnectionError, EOFError, IncompleteRead, ShortBodyError, socket.gaierror)):
        return True
    may_pass = says_it_may_pass(error)
    if may_pass is not None:
        return may_pass
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS:
        return True
    return False if isinstance(error, storage_errors()) else None


def is_transient_status(status: object) -> bool:
    """Whether an HTTP status may pass: not one that says what a server cannot do, or that it is full."""
    return isinstance(status, int) and (
        status in (408, 425, 429) or (status >= 500 and status not in (501, 505, 507, 511))
    )


def is_unreachable(error: BaseException) -> bool:
    """Whether no connection was made at all."""
    cause = root_cause(error)
    return isinstance(cause, (ConnectionRefusedError, socket.gaierror)) or says_unreachable(cause)


def describe(error: BaseException, path: str = "") -> str:
    """One line for a person that says what a file system's exception means.

    Args:
        error: the exception.
        path: the path or URL that it is about; what is secret in it is taken out of the text.
    """
    error = root_cause(error)
    code = error_code(error)
    if isinstance(error, FileNotFoundError) or code in ("404", "NoSuchKey", "NoSuchBucket"):
        return "no such file or bucket"
    text = one_line(error, about=path)
    if isinstance(error, PermissionError) or code in ("403", "401", "AccessDenied"):
        return f"permission denied ({text})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}: make space, then run the same command again"
    return text


def error_code(error: BaseException) -> str | None:
    """The S3 error code or HTTP status of a client's error, as text; None where it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code"))
    status = getattr(error, "status", None)
    return str(status) if isinstance(status, int) else None
