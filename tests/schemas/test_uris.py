"""URLs and foreign text in the form that may be shown: no secret, no control character."""

from __future__ import annotations

import random
import time
import unicodedata

import pytest

from vidshard.schemas.errors import one_line
from vidshard.schemas.text import readable, readable_lines, spreadsheet_cell
from vidshard.schemas.uris import public_uri, shown_uri, without_secrets

SCHEMES = (  # noqa: SIM905
    "http https HTTPS Http ftp sftp s3 S3 s3a gs gcs az abfs abfss adl webhdfs hdfs hf smb ssh oss r2 dav memory zip "
    "tar simplecache filecache blockcache unknown x-y.z+1"
).split()
WRAPPERS = ("", "simplecache::", "zip://a.mp4::", "filecache::zip://b::", "tar://x?y::")


def secret_url(random: random.Random) -> tuple[str, list[str]]:
    """A URL with secrets in some of its parts, and these secrets."""
    alphabet = "abcXYZ019+=/%.~_-!$*,()&"
    secrets: list[str] = []

    def secret(extra: str = "") -> str:
        text = "Zq" + "".join(random.choice(alphabet + extra) for _ in range(random.randint(6, 30))) + "Qz"
        secrets.append(text)
        return text

    def link() -> str:
        user = random.choice(
            ["", "", f"{secret().replace('/', '')}@", f"u:{secret()}@", f"u:p@{secret().replace('/', '')}@"]
        )
        port = random.choice(["", ":80"])
        path = "/".join(["", *(random.choice(["a", "b.c", "d e", "f%20g", "@u"]) for _ in range(random.randint(0, 3)))])
        params = random.choice(["", f";token={secret('?#')}"])
        query = random.choice(["", f"?sig={secret('?#;')}", f"?{secret()}", f"?a=b&X-Amz-Signature={secret()}"])
        fragment = random.choice(["", f"#{secret('#')}"])
        return f"{random.choice(SCHEMES)}://{user}host{port}{path}{params}{query}{fragment}"

    url = random.choice(WRAPPERS) + "::".join(link() for _ in range(random.choice([1, 1, 2])))
    return url, [text for text in secrets if text in url]


@pytest.mark.parametrize("seed", range(4))
def test_no_secret_of_a_url_is_shown(seed: int) -> None:
    numbers = random.Random(seed)
    for _ in range(2500):
        url, secrets = secret_url(numbers)
        wrapped = random.Random(seed).choice([f"404, url='{url}'", f'Cannot open "{url}": no', f"failed {url} twice"])
        for shown in (public_uri(url), shown_uri(url), one_line(OSError(wrapped), about=url)):
            found = [s for s in secrets if s in shown or s[2:-2] in shown]
            assert not found, (url, shown, found)
        assert public_uri(public_uri(url)) == public_uri(url)
        for secret in secrets:
            if not set(secret) & set("&/%+"):
                assert secret not in without_secrets(f"no: {secret}", url), url
                assert secret not in without_secrets(f"Max retries exceeded with url: /a?x={secret}")


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://u:p/S@h/x", "https://h/x"),
        ("https://u:p?S@h/x", "https://h/x"),
        ("HTTPS://h/x?sig=S", "HTTPS://h/x"),
        ("https:/h/x?sig=S", "https:/h/x"),
        ("simplecache::https://u:S@h/x", "simplecache::https://h/x"),
        ("zip://a::https://h/z?sig=S", "zip://a::https://h/z"),
        ("https://h:9000/@user/x", "https://h:9000/@user/x"),
        ("http://[::1]:80/x?S", "http://[::1]:80/x"),
        ("http://[::1", "http://[::1"),
        ("hf://owner/repo@main/x.ckpt", "hf://owner/repo@main/x.ckpt"),
        ("s3://bucket/a::b.mp4", "s3://bucket/a::b.mp4"),
    ],
)
def test_the_rest_of_a_url_is_shown(uri: str, shown: str) -> None:
    assert public_uri(uri) == shown


@pytest.mark.parametrize("path", ["/a/b?c#d;e@f.mp4", "file:///a?b", "local:///a#b", "C:\\x?y", "a::b", "./x;y"])
def test_local_paths_are_shown_whole(path: str) -> None:
    assert public_uri(path) == path


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer S3CR3T1", "AccountKey=S3CR3T1;Endpoint=x", "{'secret': 'S3CR3T1'}",
        "sig=S3CR3T1", "SharedAccessSignature=S3CR3T1", "aws_secret_access_key = S3CR3T1", "password: S3CR3T1",
    ],
)  # fmt: skip
def test_secrets_that_clients_name_are_not_shown(text: str) -> None:
    assert "S3CR3T1" not in one_line(OSError(f"it failed ({text})"))


def test_foreign_text_cannot_steer_a_terminal() -> None:
    numbers = random.Random(0)
    for _ in range(3000):
        ranges = (0x250, 0x2070, 0x110000)
        text = "".join(chr(numbers.randrange(numbers.choice(ranges))) for _ in range(12))
        kinds = {unicodedata.category(c) for c in readable(text) if c not in "\u200c\u200d"}
        assert not kinds & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}, text
        readable(text).encode()
        assert not {"\x1b", "\r", "\x9b", "\u202e", "\u2066"} & set(readable_lines(text))


def test_plain_text_is_printed_as_it_is() -> None:
    for text in ("a b.mp4", "Ünïcödé 日本語 עברית हिन्दी.mkv", "👩\u200d🚀", ""):
        assert readable(text) == text
    assert readable("a\nb\x1b]52;c;x\x07") == "a\\nb\\x1b]52;c;x\\x07"
    assert readable("x" * 99, 10) == "xxxxxxx..."


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\t=1", "\r=1", " =1", "\uff1d1"])
def test_no_cell_is_a_formula(text: str) -> None:
    assert spreadsheet_cell(text) == f"'{text}"
    assert spreadsheet_cell(f"a{text}") == f"a{text}"


@pytest.mark.parametrize("piece", ["x", "a.", "a+-.", "9", "1a", "::", "s3://a::", "sig ", "sig=", "?a=", "http://h:"])
def test_long_foreign_text_is_shown_at_once(piece: str) -> None:
    text = piece * (200_000 // len(piece))
    before = time.process_time()
    without_secrets(text)
    shown_uri(f"s3://bucket/{text}")
    assert time.process_time() - before < 10  # in proportion to the square of the length it takes minutes


@pytest.mark.parametrize("port", ["9" * 5000, "0" * 5000 + "80", "99999", "٣"])
def test_an_impossible_port_is_shown_without_an_error(port: str) -> None:
    shown = public_uri(f"http://user:password@host:{port}/a.mp4?sig=1")
    assert shown.startswith("http://host")
    assert shown.endswith("/a.mp4")
    assert without_secrets(f"cannot open http://host:{port}/a.mp4?sig=1").startswith("cannot open http://host")
