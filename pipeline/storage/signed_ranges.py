"""Ranges of objects on S3 by plain HTTP requests, to addresses that botocore has signed.

botocore settles credentials, region, endpoint and the form of the address, as for any request of s3fs, but once for an
object and a few minutes. A range is then asked for without it, and received in the memory that holds it: a third of the
CPU time of s3fs (docs/performance.md). Whatever is no complete answer is left to s3fs, which asks again: redirects,
retries and errors are those of its requests alone.
"""

from __future__ import annotations

import asyncio
import io
import os
import select
import socket
import ssl
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from fsspec.asyn import sync

from vidshard.pipeline.storage.file_systems import time_limit
from vidshard.pipeline.storage.transient import is_transient_status, storage_errors

_VALID_SECONDS, _USED_SECONDS = 900, 300.0
"""Seconds for which a signature is valid, and for which it is used."""
_REFUSED_SECONDS = 60.0
"""Seconds for which s3fs alone asks for a bucket that has refused a signed address."""
_IDLE_SECONDS = 4.0
"""Seconds for which a connection is kept that nobody uses: less than the time after which servers close it."""
_MOST_ADDRESSES = 1024

_OPTIONS = frozenset({
    "use_listings_cache", "key", "secret", "token", "username", "password", "anon", "profile", "endpoint_url",
    "use_ssl", "client_kwargs", "config_kwargs", "cache_regions", "version_aware", "max_concurrency",
    "default_block_size", "default_cache_type", "default_fill_cache", "fixed_upload_size",
})  # fmt: skip
_CLIENT_OPTIONS = frozenset({
    "endpoint_url", "region_name", "use_ssl", "verify", "aws_access_key_id", "aws_secret_access_key",
    "aws_session_token",
})  # fmt: skip
_CONFIG_OPTIONS = frozenset({
    "connect_timeout", "read_timeout", "retries", "signature_version", "s3", "region_name", "max_pool_connections",
})  # fmt: skip
"""Options of s3fs that either are in a signed address, or are followed here, or do not matter for reading a range."""


@dataclass(frozen=True, slots=True)
class _Address:
    """A signed address, and how its server is connected to."""

    host: str
    target: str = field(repr=False)
    """Path and query; it holds the signature, and must not be shown."""
    certificates: str | None
    """File of the authorities that are trusted; None without TLS."""
    connect_seconds: float
    answer_seconds: float


# Keys hold the file system, which is equal to none of another process.
_addresses: dict[tuple[Any, str], tuple[_Address | None, Any, float]] = {}
"""Address of each object, the client that signed it, and when to sign a new one; None where s3fs has to be asked."""
_refused: dict[tuple[Any, str], float] = {}
"""Buckets that have refused a signed address, and until when they are left to s3fs."""
_idle: dict[tuple[int, str, str | None], deque[tuple[HTTPConnection, float]]] = {}
"""Connections by process, host and trust that wait for a request, and since when."""


def signed_range(fs: Any, inner: str, start: int, stop: int) -> bytearray | None:
    """Fetch a range of an object.

    Args:
        fs: the file system of the object, as from `filesystem`.
        inner: the object in the terms of the file system.
        start: first byte.
        stop: the byte after the last one.

    Returns:
        The bytes, all of them. None where the file system must be asked: it is not S3, has options that are not
        followed here, or the server gave no complete answer.
    """
    if type(fs).__module__ != "s3fs.core" or stop <= start:
        return None
    now, bucket = time.monotonic(), inner.partition("/")[0]
    if _refused.get((fs, bucket), now) > now:
        return None
    address, client, until = _addresses.get((fs, inner), (None, None, 0.0))
    if until <= now or client is not fs._s3:  # another client has other credentials
        if len(_addresses) >= _MOST_ADDRESSES:
            _addresses.clear()
        address = _signed(fs, inner)
        _addresses[fs, inner] = address, fs._s3, now + _USED_SECONDS
    if address is None:
        return None
    try:
        answer = _get(address, start, stop)
    except ssl.SSLCertVerificationError:
        answer = 0  # as lasting as a status that refuses
    except (OSError, HTTPException, UnicodeError):
        return None
    if isinstance(answer, bytearray):
        return answer
    if answer not in (404, 416) and not is_transient_status(answer):
        _refused[fs, bucket] = now + _REFUSED_SECONDS
        _addresses.pop((fs, inner), None)
    return None


# Addresses.


def _signed(fs: Any, inner: str) -> _Address | None:
    """Sign the address of an object; None where a plain request could mean something else than one of s3fs."""
    options = fs.storage_options
    known = (options.keys(), _OPTIONS), (fs.client_kwargs, _CLIENT_OPTIONS), (fs.config_kwargs, _CONFIG_OPTIONS)
    if any(not set(given) <= followed for given, followed in known):
        return None
    bucket, key, version = fs.split_path(inner)
    if ":" in bucket or bucket.endswith("--x-s3"):  # an ARN, or a bucket with credentials of its own
        return None
    wanted = {"Bucket": bucket, "Key": key} | ({"VersionId": version} if version else {})

    async def sign() -> tuple[str, Any, str | bool]:
        await fs.set_session()
        client = await fs.get_s3(bucket)
        client.meta.events.register("choose-signer.s3.GetObject", _signed_as_now, unique_id="vidshard-signer")
        client.meta.events.register("before-parameter-build.s3.GetObject", _in_region, unique_id="vidshard-region")
        url = await client.generate_presigned_url("get_object", Params=wanted, ExpiresIn=_VALID_SECONDS)
        return url, client.meta.config, _trust(fs)

    try:
        url, config, trust = sync(fs.loop, lambda: asyncio.wait_for(sign(), time_limit()))
    except storage_errors():  # such as missing credentials, which s3fs names when it is asked
        return None
    return _address(url, config, trust)


def _signed_as_now(signature_version: Any, **_: Any) -> str | None:
    """Keep the fourth version of signatures, where botocore would sign addresses alone by the second one."""
    return "s3v4-query" if signature_version in ("v4-query", "s3v4-query") else None


def _in_region(context: dict[str, Any], **_: Any) -> None:
    """Keep the endpoint of the region, where botocore would sign addresses alone for the one of all regions."""
    context["use_global_endpoint"] = False


def _trust(fs: Any) -> str | bool:
    """File of authorities, or whether to trust those of botocore, in the order in which botocore looks for it."""
    found = fs.client_kwargs.get("verify")
    if found is None:
        found = fs.session.get_config_variable("ca_bundle")
    return os.environ.get("REQUESTS_CA_BUNDLE", True) if found is None else found


def _address(url: str, config: Any, trust: str | bool) -> _Address | None:
    from botocore.httpsession import get_cert_path
    from botocore.utils import get_environ_proxies

    parts = urlsplit(url)
    if "X-Amz-Signature=" in parts.query:
        is_plain = "X-Amz-SignedHeaders=host&" in parts.query  # no other header has to be sent
    else:
        is_plain = "Signature" not in parts.query  # of an anonymous user
    proxies = config.proxies if config.proxies is not None else get_environ_proxies(url)
    if (
        not is_plain
        or "@" in parts.netloc
        or proxies.get(parts.scheme)
        or config.client_cert
        or (parts.scheme == "https" and not trust)
    ):
        return None
    return _Address(
        host=parts.netloc,
        target=f"{parts.path}?{parts.query}" if parts.query else parts.path,
        certificates=get_cert_path(trust) if parts.scheme == "https" else None,
        connect_seconds=config.connect_timeout,
        answer_seconds=config.read_timeout,
    )


# Requests.


def _get(address: _Address, start: int, stop: int) -> bytearray | int:
    """Ask for a range: its bytes, or the status of an answer that is not the range.

    Raises:
        OSError, HTTPException: no or no complete answer came.
    """
    deadline = time.monotonic() + time_limit(stop - start)
    connection = _connection(address)
    is_done = False
    try:
        assert connection.sock is not None
        connection.sock.settimeout(address.answer_seconds)
        connection.response_class = partial(_Response, deadline=deadline)  # type: ignore[assignment]
        connection.putrequest("GET", address.target, skip_accept_encoding=True)
        connection.putheader("Accept-Encoding", "identity")
        connection.putheader("User-Agent", "vidshard")
        connection.putheader("Range", f"bytes={start}-{stop - 1}")
        connection.endheaders()
        response = connection.getresponse()
        try:
            if response.status != 206:
                return response.status
            if response.getheader("Transfer-Encoding"):
                return 0  # as lasting as a status that refuses
            data = bytearray(stop - start)
            stated = response.getheader("Content-Length"), (response.getheader("Content-Range") or "").partition("/")[0]
            if stated != (str(len(data)), f"bytes {start}-{stop - 1}"):
                raise HTTPException("the answer is about other bytes")
            _receive(response, data)
        finally:
            response.close()
        is_done = True
        return data
    finally:
        if is_done:
            _keep(address, connection)
        else:
            connection.close()


class _Response(HTTPResponse):
    """An answer that is complete before a deadline, its head included."""

    def __init__(self, sock: socket.socket, *args: Any, deadline: float, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Received(sock, deadline))


class _Received(io.RawIOBase):
    """Bytes that a socket receives before a deadline."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        super().__init__()
        self._socket, self._deadline = sock, deadline
        self._raw = sock.makefile("rb", buffering=0)
        self._seconds = sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer takes too long")
        self._socket.settimeout(left if self._seconds is None else min(left, self._seconds))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _receive(response: HTTPResponse, data: bytearray) -> None:
    left = memoryview(data)
    while left:
        received = response.fp.readinto1(left)  # what has come, so that a slow server meets the deadline
        if not received:
            raise HTTPException("the answer is not complete")
        left = left[received:]


def _connection(address: _Address) -> HTTPConnection:
    """A connection that waits for a request, or a new one."""
    waiting = _waiting(address)
    while waiting:
        try:
            connection, since = waiting.pop()
        except IndexError:  # another thread took it
            break
        if connection.sock is not None and time.monotonic() - since < _IDLE_SECONDS and _is_silent(connection.sock):
            return connection
        connection.close()
    if address.certificates is None:
        connection = HTTPConnection(address.host, timeout=address.connect_seconds)
    else:
        context = _context(address.certificates)
        connection = HTTPSConnection(address.host, timeout=address.connect_seconds, context=context)
    connection.connect()
    return connection


def _is_silent(sock: socket.socket) -> bool:
    """Whether a server that was asked nothing says nothing: it has neither closed nor sent more than an answer."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():  # already taken from the socket
        return False
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)


def _keep(address: _Address, connection: HTTPConnection) -> None:
    waiting, now = _waiting(address), time.monotonic()
    waiting.append((connection, now))
    with suppress(IndexError):  # other threads take them meanwhile
        while now - waiting[0][1] > _IDLE_SECONDS:
            waiting.popleft()[0].close()


def _waiting(address: _Address) -> deque[tuple[HTTPConnection, float]]:
    return _idle.setdefault((os.getpid(), address.host, address.certificates), deque())


@lru_cache(maxsize=8)
def _context(certificates: str) -> ssl.SSLContext:
    """TLS as botocore sets it up."""
    from botocore.httpsession import create_urllib3_context

    context: ssl.SSLContext = create_urllib3_context()
    context.check_hostname = True
    context.load_verify_locations(certificates)
    return context
