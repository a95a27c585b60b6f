"""Ranges of objects on S3 by signed addresses: what s3fs would give, and s3fs wherever that is not certain."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import ipaddress
import itertools
import logging
import math
import multiprocessing
import os
import re
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import fsspec.config
import pytest

from tests.support.faulty_s3 import FaultyS3
from vidshard.pipeline import storage
from vidshard.pipeline.reader.files import RangeFile
from vidshard.pipeline.storage import signed_ranges
from vidshard.pipeline.storage.errors import StorageError
from vidshard.pipeline.storage.signed_ranges import signed_range

PATH = "s3://videos/ranges/a b+ü.bin"
DATA = os.urandom(300_000)
SECRETS = ("a-secret-that-must-not-be-seen", "X-Amz-Signature", "X-Amz-Credential", "the-token")


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known from other tests, and a busy machine is no trouble."""
    monkeypatch.setattr(signed_ranges, "time_limit", lambda num_bytes=0: 30.0)
    monkeypatch.setattr(signed_ranges, "_IDLE_SECONDS", 600.0)
    for known in (signed_ranges._addresses, signed_ranges._refused, signed_ranges._idle):
        known.clear()
    yield
    for waiting in signed_ranges._idle.values():
        for connection, _ in waiting:
            connection.close()


@pytest.fixture
def proxy(faulty_s3: FaultyS3) -> FaultyS3:
    """The faulty server with an object."""
    storage.write_atomic(PATH, DATA)
    faulty_s3.seen.clear()
    return faulty_s3


def options(monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    """Set storage options as a user does, by fsspec's configuration."""
    monkeypatch.setitem(fsspec.config.conf, "s3", {**fsspec.config.conf.get("s3", {}), **more})


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon; a request then counts as stuck after a second."""
    monkeypatch.setattr("vidshard.pipeline.storage.retry.RETRY_SECONDS", 1.0)


def fetched(start: int, stop: int, path: str = PATH) -> bytes | None:
    data = signed_range(*storage.filesystem(path), start, stop)
    return None if data is None else bytes(data)


def asked(proxy: FaultyS3) -> list[str]:
    """Paths of the requests of parts."""
    return [path for method, path, _ in proxy.seen if method == "GET"]


def signature(url: str, host: str, secret: str) -> str:
    """Signature of an address by the rules of AWS, version 4, with no header but the host."""
    parts = urlsplit(url)
    query = "&".join(sorted(item for item in parts.query.split("&") if not item.startswith("X-Amz-Signature=")))
    canonical = "\n".join(["GET", parts.path, query, f"host:{host}\n", "host", "UNSIGNED-PAYLOAD"])
    values = {name: value[0] for name, value in parse_qs(parts.query).items()}
    scope = values["X-Amz-Credential"].split("/", 1)[1]
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    text = "\n".join(["AWS4-HMAC-SHA256", values["X-Amz-Date"], scope, digest])
    key = f"AWS4{secret}".encode()
    for part in (*scope.split("/"), text):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key.hex()


def test_ranges_come_whole_without_s3fs(proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    connects = []
    connect = HTTPConnection.connect
    own = threading.get_ident()

    def counted(self: HTTPConnection) -> None:
        if threading.get_ident() == own:  # and not the proxy's
            connects.append(1)
        connect(self)

    monkeypatch.setattr(HTTPConnection, "connect", counted)
    file = RangeFile(PATH)
    monkeypatch.setattr("s3fs.core.S3FileSystem._cat_file", None)
    for start, stop in ((0, 1), (7, 200_000), (299_999, 300_000), (0, 300_000)):
        assert fetched(start, stop) == DATA[start:stop]
        file.seek(start)
        assert file.read(stop - start) == DATA[start:stop]
    assert fetched(5, 5) is None
    assert len(asked(proxy)) == 8, "one request each"
    assert len(connects) == 1, "on one connection"
    monkeypatch.setattr(signed_ranges, "_IDLE_SECONDS", 0.0)
    assert fetched(0, 10) == DATA[:10]
    assert len(connects) == 2, "one that was idle for long is not used again"
    assert len({re.sub("X-Amz-Date=[^&]*|X-Amz-Signature=[^&]*", "", path) for path in asked(proxy)}) == 1


def test_a_signature_is_made_anew_before_it_expires(proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    sign = signed_ranges._signed

    def counted(fs: Any, inner: str) -> signed_ranges._Address | None:
        made.append(inner)
        return sign(fs, inner)

    monkeypatch.setattr(signed_ranges, "_signed", counted)
    for _ in range(3):
        assert fetched(0, 10) == DATA[:10]
    assert len(made) == 1
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + signed_ranges._USED_SECONDS)
    assert fetched(0, 10) == DATA[:10]
    assert len(made) == 2
    assert signed_ranges._USED_SECONDS < signed_ranges._VALID_SECONDS / 2


@pytest.mark.parametrize("source", ["environment", "options", "profile"])
def test_credentials_mean_what_they_mean_to_s3fs(
    proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    if source == "environment":
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY-1")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-1")
        monkeypatch.setenv("AWS_SESSION_TOKEN", "the-token")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
        options(monkeypatch, max_concurrency=3)  # a file system of its own
    elif source == "options":
        client = {"region_name": "eu-west-1"}
        options(monkeypatch, key="KEY-1", secret="secret-1", token="the-token", client_kwargs=client)
    else:
        (tmp_path / "credentials").write_text(
            "[lab]\naws_access_key_id=KEY-1\naws_secret_access_key=secret-1\naws_session_token=the-token\n"
        )
        (tmp_path / "config").write_text("[profile lab]\nregion=eu-west-1\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.delenv("AWS_DEFAULT_REGION")
        options(monkeypatch, profile="lab")
    assert fetched(3, 9) == DATA[3:9]
    [path] = asked(proxy)
    values = parse_qs(urlsplit(path).query)
    assert re.fullmatch(r"KEY-1/\d{8}/eu-west-1/s3/aws4_request", values["X-Amz-Credential"][0])
    assert values["X-Amz-Security-Token"] == ["the-token"]
    assert values["X-Amz-Signature"] == [signature(path, urlsplit(proxy.url).netloc, "secret-1")]


def test_new_credentials_are_used_at_once(proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    options(monkeypatch, max_concurrency=4)  # a file system of its own
    for number in range(3):
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", f"KEY-{number}")
        fs, _ = storage.filesystem(PATH)
        if number == 1:
            fs.connect(refresh=True)
        elif number == 2:
            fs.clear_instance_cache()
        assert fetched(3, 9) == DATA[3:9]
    keys = [parse_qs(urlsplit(path).query)["X-Amz-Credential"][0].partition("/")[0] for path in asked(proxy)]
    assert keys == ["KEY-0", "KEY-1", "KEY-2"]


@pytest.mark.parametrize("style", ["auto", "path", "virtual"])
@pytest.mark.parametrize("region", ["us-east-1", "eu-central-1", "cn-north-1"])
def test_the_endpoint_is_that_of_any_request(monkeypatch: pytest.MonkeyPatch, region: str, style: str) -> None:
    for name in ("AWS_ENDPOINT_URL", "FSSPEC_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "KEY-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-1")
    client = {"region_name": region}
    options(monkeypatch, endpoint_url=None, client_kwargs=client, config_kwargs={"s3": {"addressing_style": style}})
    fs, inner = storage.filesystem(PATH)
    address = signed_ranges._signed(fs, inner)
    assert address is not None
    urls = []

    def seen(request: Any, **_: Any) -> None:
        urls.append(request.url)
        raise InterruptedError("nothing is sent")

    fs.s3.meta.events.register("before-send.s3.GetObject", seen)
    with pytest.raises(OSError, match="nothing is sent"):
        fs.cat_file(inner, start=0, end=10)
    assert f"https://{address.host}{urlsplit(address.target).path}" == urls[0]


def test_an_address_is_shown_without_its_signature(proxy: FaultyS3) -> None:
    address = signed_ranges._signed(*storage.filesystem(PATH))
    assert address is not None
    assert "X-Amz-Signature" in address.target
    assert not [secret for secret in SECRETS if secret in repr(address)]


def test_an_anonymous_user_signs_nothing(proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, inner = storage.filesystem(PATH)
    fs.call_s3("put_object_acl", Bucket="videos", Key=inner.partition("/")[2], ACL="public-read")
    proxy.seen.clear()
    options(monkeypatch, anon=True)
    assert fetched(3, 9) == DATA[3:9]
    assert asked(proxy) == ["/videos/ranges/a%20b%2B%C3%BC.bin"]


@pytest.mark.parametrize(
    "given",
    [
        {"requester_pays": True},
        {"s3_additional_kwargs": {"ExpectedBucketOwner": "1"}},
        {"config_kwargs": {"proxies": {"http": "http://127.0.0.1:9"}}},
        {"config_kwargs": {"signature_version": "s3"}},
        {"client_kwargs": {"verify": False, "endpoint_url": "https://127.0.0.1:9"}, "endpoint_url": None},
        {"config_kwargs": {"client_cert": "client.pem"}},
        {"endpoint_url": "http://user:a-password@127.0.0.1:9"},
        {"HTTP_PROXY": "http://127.0.0.1:9"},
    ],
)
def test_options_that_are_not_followed_leave_the_range_to_s3fs(
    proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    if "HTTP_PROXY" in given:
        monkeypatch.setenv("HTTP_PROXY", given["HTTP_PROXY"])
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        options(monkeypatch, max_concurrency=3)
    else:
        options(monkeypatch, **given)
    monkeypatch.setattr(signed_ranges, "_get", None)  # nobody is connected to
    assert fetched(3, 9) is None
    assert not asked(proxy)


def test_a_version_of_an_object_is_asked_for(proxy: FaultyS3) -> None:
    fs, _ = storage.filesystem("s3://versions/a")
    fs.call_s3("create_bucket", Bucket="versions")
    fs.call_s3("put_bucket_versioning", Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    old, _ = (fs.call_s3("put_object", Bucket="versions", Key="a", Body=body) for body in (b"before", b"after"))
    assert fetched(0, 3, "s3://versions/a") == b"aft"
    assert fetched(0, 3, f"s3://versions/a?versionId={old['VersionId']}") == b"bef"


def test_other_file_systems_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    assert signed_range(*storage.filesystem(str(tmp_path / "a")), 0, 10) is None


TROUBLE = ["slow_down", "internal_error", "unavailable", "reset_before", "reset_after", "truncate", "short"]


@pytest.mark.parametrize("kind", TROUBLE)
def test_after_trouble_the_range_comes_from_s3fs(proxy: FaultyS3, kind: str) -> None:
    file = RangeFile(PATH, len(DATA))
    proxy.misbehave(kind, method="GET")
    assert file.read(200_000) == DATA[:200_000]
    assert ["X-Amz-Signature" in path for path in asked(proxy)] == [True, False], "one more request, by s3fs"
    assert file.read(100_000) == DATA[200_000:]
    assert "X-Amz-Signature" in asked(proxy)[2], "trouble that passes is no reason to leave the next one to s3fs"


def test_a_store_that_refuses_signed_addresses_is_asked_once(proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RangeFile(PATH, len(DATA))
    proxy.misbehave("denied", method="GET", path="X-Amz-Signature", times=math.inf)
    for at in range(3):
        file.seek(1000 * at)
        assert file.read(1000) == DATA[1000 * at : 1000 * at + 1000]
    assert ["X-Amz-Signature" in path for path in asked(proxy)] == [True, False, False, False]
    proxy.behave()
    monkeypatch.setattr(time, "monotonic", lambda now=time.monotonic: now() + signed_ranges._REFUSED_SECONDS)
    assert fetched(0, 10) == DATA[:10], "and again after a while"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("denied", "permission denied"), ("slow_down", "tried .* times"), ("reset_before", "tried .* times")],
)
def test_lasting_trouble_is_named_and_no_secret(
    proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str, expected: str
) -> None:
    caplog.set_level(logging.INFO)
    proxy.misbehave(kind, method="GET", times=math.inf)
    if kind != "denied":
        impatient(monkeypatch)
    with pytest.raises(StorageError, match=expected) as caught:
        RangeFile(PATH, len(DATA)).read(1000)
    text = f"{caught.value}{caught.value!r}{caught.value.__cause__!r}{caplog.text}"
    assert "cannot read s3://videos/ranges/a b+ü.bin" in text
    assert not [secret for secret in SECRETS if secret in text]


def test_an_object_that_is_gone_is_named(proxy: FaultyS3) -> None:
    file = RangeFile(PATH, len(DATA))
    storage.remove(PATH)
    with pytest.raises(StorageError, match="no such file") as caught:
        file.read(1000)
    assert not [secret for secret in SECRETS if secret in str(caught.value)]
    storage.write_atomic(PATH, DATA)
    assert fetched(0, 10) == DATA[:10], "absence says nothing about signed addresses"


def test_an_object_that_shrank_is_refused(proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    file = RangeFile(PATH, len(DATA))
    file.seek(200_000)
    storage.write_atomic(PATH, DATA[:250_000])
    impatient(monkeypatch)
    with pytest.raises(StorageError, match="cannot read s3://videos/ranges"):
        file.read(100_000)


@contextmanager
def answering(monkeypatch: pytest.MonkeyPatch, head: str, body: Iterable[bytes]) -> Iterator[threading.Event]:
    """A server that answers one request so, and then holds its connection; the event says that it did in vain."""
    over, in_vain = threading.Event(), threading.Event()

    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection, suppress(ConnectionError):
            connection.recv(1 << 16)
            connection.sendall(f"HTTP/1.1 {head}\r\n\r\n".encode())
            for part in body:
                connection.sendall(part)
                if over.wait(0.05):
                    return
            if not over.wait(60):
                in_vain.set()

    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        options(monkeypatch, endpoint_url=url, config_kwargs={"read_timeout": 600})
        monkeypatch.setattr(signed_ranges, "time_limit", lambda num_bytes=0: 600.0)
        thread = threading.Thread(target=answer, args=(server,), daemon=True)
        thread.start()
        try:
            yield in_vain
        finally:
            over.set()
            thread.join()


PART = "206 Partial Content\r\nContent-Length: 1000\r\nContent-Range: bytes 0-999/300000"


@pytest.mark.parametrize(
    ("head", "begin", "part"),
    [
        (PART, b"", b"x"),
        ("100 Continue", b"HTTP/1.1 206 Partial Content\r\nX-Long: ", b"x"),
        ("100 Continue", b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_an_answer_that_drips_ends_at_the_time_limit(
    proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch, head: str, begin: bytes, part: bytes
) -> None:
    with answering(monkeypatch, head, itertools.chain([begin], itertools.repeat(part, 400))) as in_vain:
        fs, inner = storage.filesystem(PATH)
        assert signed_ranges._signed(fs, inner) is not None
        monkeypatch.setattr(signed_ranges, "time_limit", lambda num_bytes=0: 0.4)
        assert fetched(0, 1000) is None
        assert not in_vain.is_set()


@pytest.mark.parametrize(
    ("head", "is_taken"),
    [
        (PART, True),
        (PART.replace("0-999", "1-1000"), False),
        (PART.replace("Content-Range", "X-Range"), False),
        (PART.replace("1000", "999", 1), False),
        (PART.replace("Content-Length: 1000", "Transfer-Encoding: chunked"), False),
        (f"{PART}\r\nTransfer-Encoding: chunked", False),
        (PART.replace("206 Partial Content", "200 OK"), False),
        ("307 Temporary Redirect\r\nLocation: http://127.0.0.1:9/\r\nContent-Length: 0", False),
        ("nonsense", False),
    ],
)
def test_only_the_very_range_is_taken(
    proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch, head: str, is_taken: bool
) -> None:
    with answering(monkeypatch, head, [b"x" * 1000]) as in_vain:
        assert (fetched(0, 1000) is not None) == is_taken
        assert not in_vain.is_set(), "without waiting for more"


def test_what_comes_after_an_answer_is_not_the_next_one(proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    forged = f"HTTP/1.1 {PART}\r\n\r\n".encode() + b"y" * 1000
    with answering(monkeypatch, PART, [b"x" * 1000, forged]):
        assert fetched(0, 1000) == b"x" * 1000
        [[(connection, _)]] = signed_ranges._idle.values()
        assert select.select([connection.sock], [], [], 60)[0]
        monkeypatch.setattr(signed_ranges, "time_limit", lambda num_bytes=0: 0.4)
        assert fetched(0, 1000) is None, "a new connection, on which nothing comes"


def _child(start: int, stop: int, answers: Any) -> None:
    answers.put(fetched(start, stop))


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_a_child_process_shares_no_connection(proxy: FaultyS3, how: Any) -> None:
    assert fetched(0, 10) == DATA[:10]
    context = multiprocessing.get_context(how)
    answers = context.Queue()
    child = context.Process(target=_child, args=(0, 200_000, answers))
    child.start()
    for _ in range(20):
        assert fetched(100_000, 300_000) == DATA[100_000:]
    assert answers.get(timeout=60) == DATA[:200_000]
    child.join(60)
    assert child.exitcode == 0


def _certificate(folder: Path) -> Path:
    """A key and a certificate that signs itself, for this machine, in one file."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "store")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = folder / "certificate.pem"
    text = key.private_bytes(serialization.Encoding.PEM, *form) + made.public_bytes(serialization.Encoding.PEM)
    path.write_bytes(text)
    return path


@pytest.mark.parametrize("is_trusted", [True, False])
def test_tls_trusts_whom_botocore_trusts(
    proxy: FaultyS3, s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_trusted: bool
) -> None:
    certificate = _certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    secure = FaultyS3(s3)
    secure._server.socket = context.wrap_socket(secure._server.socket, server_side=True)
    with secure.running():
        options(monkeypatch, endpoint_url=secure.url.replace("http:", "https:"))
        if is_trusted:
            monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
            assert fetched(3, 90_000) == DATA[3:90_000]
            assert "X-Amz-Signature" in asked(secure)[0]
        else:
            with pytest.raises(StorageError, match="CERTIFICATE_VERIFY_FAILED"):
                RangeFile(PATH, len(DATA)).read(10)
            assert signed_ranges._refused, "nobody connects in vain for each range"
        assert len(asked(secure)) == is_trusted


def test_what_tls_has_taken_from_the_socket_already_is_no_silence(tmp_path: Path) -> None:
    certificate = _certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    ours, theirs = socket.socketpair()

    def answer() -> None:
        with context.wrap_socket(theirs, server_side=True) as server:
            server.sendall(b"the answer and more")  # one record
            server.recv(1)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    trusting = ssl.create_default_context(cafile=str(certificate))
    trusting.check_hostname = False
    with trusting.wrap_socket(ours) as client:
        assert client.recv(10) == b"the answer"
        assert not select.select([client], [], [], 0)[0], "the socket itself has nothing more"
        assert not signed_ranges._is_silent(client)
        assert client.recv(100) == b" and more"
        assert signed_ranges._is_silent(client)
        client.sendall(b".")
    thread.join()
