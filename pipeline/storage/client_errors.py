"""Exceptions of storage clients by library: which come from a storage, may pass, or say that no server answers.

Classes are looked up among the loaded modules. Nothing is imported here: a library that is not loaded raises nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

_HTTPX = ("HTTPError", "InvalidURL", "StreamError", "CookieConflict")

_Table = Mapping[str, tuple[str, ...]]
"""Names of classes, by the module that they are looked up in."""

_STORAGE: _Table = {
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "aiohttp": ("ClientError",),
    "httpx": _HTTPX,
    "httpx2": _HTTPX,
    "requests.exceptions": ("RequestException",),
    "urllib3.exceptions": ("HTTPError",),
    "http.client": ("HTTPException",),
    "huggingface_hub.errors": ("HfHubHTTPError", "HfUriError", "HFValidationError", "EntryNotFoundError"),
    "gcsfs.retry": ("HttpError", "ChecksumError"),
    "google.api_core.exceptions": ("GoogleAPIError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "azure.core.exceptions": ("AzureError",),
    "paramiko.ssh_exception": ("SSHException",),
    "smbprotocol.exceptions": ("SMBException",),
    "ftplib": ("Error",),
}
"""Base classes of the clients' errors."""
_PASSING: _Table = {
    "botocore.exceptions": (
        "HTTPClientError",
        "ConnectionError",
        "IncompleteReadError",
        "FlexibleChecksumError",
        "CredentialRetrievalError",
        "MetadataRetrievalError",
    ),
    "botocore.parsers": ("ResponseParserError",),
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
    "httpx": ("TransportError",),
    "httpx2": ("TransportError",),
    "requests.exceptions": ("ConnectionError", "Timeout", "ChunkedEncodingError"),
    "urllib3.exceptions": ("TimeoutError", "ProtocolError", "MaxRetryError", "NewConnectionError"),
    "gcsfs.retry": ("ChecksumError",),
    "google.auth.exceptions": ("TransportError",),
    "azure.core.exceptions": ("ServiceRequestError", "ServiceResponseError"),
    "ftplib": ("error_temp",),
}
"""Those of trouble of the network or the server."""
_UNREACHABLE: _Table = {
    "botocore.exceptions": ("EndpointConnectionError", "ConnectTimeoutError"),
    "aiohttp": ("ClientConnectorError", "ConnectionTimeoutError"),
    "httpx": ("ConnectError", "ConnectTimeout"),
    "httpx2": ("ConnectError", "ConnectTimeout"),
    "requests.exceptions": ("ConnectTimeout",),
    "urllib3.exceptions": ("NewConnectionError", "ConnectTimeoutError"),
    "google.auth.exceptions": ("TransportError",),
    "azure.core.exceptions": ("ServiceRequestError",),
    "paramiko.ssh_exception": ("NoValidConnectionsError",),
}
"""Those that say that no connection was made."""
_LASTING: _Table = {
    "huggingface_hub.errors": ("OfflineModeIsEnabled",),
    "httpx": ("UnsupportedProtocol",),
    "httpx2": ("UnsupportedProtocol",),
    "requests.exceptions": ("InvalidSchema", "InvalidURL", "MissingSchema"),
}
"""Subclasses of passing errors that are about a setting or the address."""

_TROUBLE = re.compile("Connect|Timeout|TimedOut|Network|Unavailable|Disconnect|Transport")
"""Words in the names that libraries give to errors of the network or of a server."""


def client_errors() -> tuple[type[BaseException], ...]:
    """Base classes of the errors of the storage clients that are loaded."""
    return _loaded(_STORAGE)


def says_it_may_pass(error: BaseException) -> bool | None:
    """Whether the class of a client's error says that the network or the server had trouble; None if it does not say.

    An error of an unknown library is judged by the names of its classes.
    """
    if isinstance(error, _loaded(_LASTING)):
        return False
    if isinstance(error, _loaded(_PASSING)):
        return True
    if isinstance(error, (OSError, *client_errors())):
        return None
    names = [kind.__name__ for kind in type(error).__mro__ if not _is_ours_or_builtin(kind)]
    return True if any(map(_TROUBLE.search, names)) else None


def says_unreachable(error: BaseException) -> bool:
    """Whether a client's error says that no connection was made at all."""
    return isinstance(error, _loaded(_UNREACHABLE))


def _is_ours_or_builtin(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("builtins", "vidshard")


def _loaded(table: _Table) -> tuple[type[BaseException], ...]:
    found = []
    for module, names in table.items():
        loaded = sys.modules.get(module)
        found += [kind for name in names if isinstance(kind := getattr(loaded, name, None), type)]
    return tuple(found)
