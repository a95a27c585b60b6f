"""URIs in the form that may be shown: in logs, errors, shards and rejects."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote, unquote_plus, urlsplit

from vidshard.schemas.locations import map_locations, split_options
from vidshard.schemas.text import readable

_LINKS = re.compile(r"::(?![^/?#\[\]]{0,99}\])")
"""Separator of the links of a chained URL; not the ``::`` of an IPv6 address in brackets."""
_WEB_TYPO = re.compile(r"(?:https?|ftps?):/", re.IGNORECASE)
"""Beginning of a web address with too few slashes, which counts as a local path."""
# Both patterns take time in proportion to the text: the first begins only where a run of letters does, the second at no
# letter before its words. Begun at every letter, 20,000 characters took 18 s.
_IN_TEXT = re.compile(r"(?<![a-z0-9+.-])([0-9+.-]*)([a-z][a-z0-9+.-]*:/?/[^\s'\"<>`]+)", re.IGNORECASE)
_QUERY_IN_TEXT = re.compile(r"(?<=[\w/.%-])[?;&][\w.%~+-]+=[^\s'\"<>`]*")
_SECRET_IN_TEXT = re.compile(
    r"(?i)((?:sig|signature|token|secret|password|passwd|credentials?|account_?key|access_?key|api_?key"
    r"|sharedaccesskey|authorization|pwd)[\"']?\s*[=:]\s*[\"']?)(?:(?:bearer|basic)\s+)?[^\s'\"<>&;,)}\]]+"
)


def is_remote(uri: str) -> bool:
    """Whether the text is a URL of another place than this machine's file system."""
    return "://" in uri and ("::" in uri or not uri.startswith(("file://", "local://")))


def is_web(uri: str) -> bool:
    """Whether the text is a URL of a web server."""
    return uri[:8].lower().startswith(("http://", "https://"))


def public_uri(uri: str) -> str:
    """The URI without user, password, parameters (``;``), query and fragment.

    Each link of a chained URL is stripped, whatever its scheme and the case of its letters: any of these parts may
    carry a secret, and so may those of an object store's URL. Options of ``schemas.locations`` stay, with the locations
    in them stripped. Local paths are returned unchanged.
    """
    if "#" in uri and split_options(uri)[1]:
        return map_locations(uri, public_uri)
    if not is_remote(uri):
        return uri if _WEB_TYPO.match(uri) is None else re.split("[?#;]", uri, maxsplit=1)[0]
    return "::".join(map(_bare_link, _LINKS.split(uri)))


def _bare_link(link: str) -> str:
    scheme, separator, rest = link.partition("://")
    if not separator:
        return re.split("[?#;]", link, maxsplit=1)[0]
    authority = re.split(r"[/?#\\]", rest, maxsplit=1)[0]
    if "@" not in authority and "@" in rest and not _is_host(authority):
        at = rest.rindex("@")  # a password with a slash in it: no client takes what stands before it for a host
        rest = rest[at + 1 :]
    elif "@" in authority:
        rest = rest[authority.rindex("@") + 1 :]
        if "@" in rest and not _is_host(re.split(r"[/?#\\]", rest, maxsplit=1)[0]):
            rest = rest[rest.rindex("@") + 1 :]
    bare = re.split("[?#;]", rest, maxsplit=1)[0]
    host, slash, path = bare.partition("/")
    if not _is_host(host):
        host = host.split(":", 1)[0]
    return f"{scheme}://{host}{slash}{path}"


def _is_host(authority: str) -> bool:
    """Whether an authority without user is a host with, at most, a possible port."""
    host, _, port = authority.rpartition(":") if "]" not in authority else authority.rpartition("]")
    if "]" in authority:
        port = port.removeprefix(":")
    elif not host and ":" not in authority:
        host, port = port, ""
    if not re.fullmatch(r"[\w.~%-]*|\[[0-9a-fA-F:.%\w]*", host):
        return False
    return re.fullmatch(r"0*[0-9]{0,5}", port) is not None and int(port[-5:] or 0) < 1 << 16


_MARKS = 30
"""Delimiters of a URL's hidden parts that are looked at: any two may bound a value that a client quotes by itself."""


def without_secrets(text: str, *uris: str) -> str:
    """The text with every URL in it stripped, and with the secret parts of some URIs taken out.

    Clients quote a URL in many ways: whole, its query alone, or decoded.

    Args:
        text: such as the message of an exception.
        uris: complete URIs that the text may be about.
    """
    for uri in uris:
        bare = public_uri(uri)
        if bare != uri:
            text = text.replace(uri, bare)
            for secret in _secrets(uri):
                text = text.replace(secret, "***")
    text = _IN_TEXT.sub(lambda found: found[1] + public_uri(found[2]), text)
    text = _QUERY_IN_TEXT.sub("", text)
    return _SECRET_IN_TEXT.sub(r"\1***", text)


def _secrets(uri: str) -> list[str]:
    """The parts of a URI that are not shown, and their values, as they stand there and decoded; the longest first."""
    pieces: set[str] = set()
    for link in _LINKS.split(uri):
        rest = link.partition("://")[2] or link
        shown = public_uri(link if "://" in link else f"x://{link}").partition("://")[2]
        at = rest.rfind(f"@{shown}")
        before, _, after = rest.partition(shown) if at < 0 and shown else (rest[:at], "", rest[at + 1 + len(shown) :])
        for hidden in (before, after):
            marks = [found.start() for found in re.finditer("[?#;&@=:]", hidden)][:_MARKS]
            for start in (0, *(mark + 1 for mark in marks)):
                for end in (len(hidden), *(mark for mark in marks if mark > start)):
                    piece = hidden[start:end]
                    pieces |= {piece, unquote(piece), unquote_plus(piece)}
    return sorted((piece for piece in pieces if len(piece) >= 4), key=len, reverse=True)


def shown_uri(uri: str) -> str:
    """The URI as it is printed: stripped of secrets, on one line, without control characters."""
    return readable(public_uri(uri))


def typed_hosts(inputs: Sequence[str]) -> tuple[str, ...]:
    """Names of the web servers that inputs name."""
    hosts = set()
    for uri in inputs:
        if is_web(uri):
            try:
                hosts.add((urlsplit(uri).hostname or "").lower())
            except ValueError:
                continue
    return tuple(sorted(hosts - {""}))
