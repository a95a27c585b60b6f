"""Files of Hugging Face Hub repositories: ``hf://OWNER/REPO[@REVISION]/PATH``.

`huggingface_hub` downloads and caches, and all of its environment variables (HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT,
HF_TOKEN ...) apply. This module adds the commit, which identifies the file for ever, and errors that a person can act
on. Error messages are written here and never quote a server's answer, which might repeat a credential.
"""

from __future__ import annotations

from pathlib import Path

import httpx2
from huggingface_hub import HfUri, constants, hf_hub_download, parse_hf_uri, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HfUriError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vidshard.schemas.errors import VidshardError

SCHEME = "hf://"


class HubError(VidshardError):
    """A file of the Hub cannot be fetched; the message says why and what to do. The caller adds the reference."""


def fetch(reference: str, *, cached_only: bool = False) -> tuple[Path, str]:
    """Download a file of the Hub unless it is cached; a cached file named by its commit needs no request.

    Args:
        reference: the file.
        cached_only: send no request at all.

    Returns:
        Its path in the cache, under its own name, and the reference with the commit it was found at.

    Raises:
        HubError: the reference is malformed, there is no such file, access is denied, or no server can be reached.
    """
    uri = _parse(reference)
    if cached_only:
        cached = try_to_load_from_cache(uri.id, uri.path_in_repo, revision=uri.revision)
        if not isinstance(cached, str):
            raise HubError(f"the cache in {constants.HF_HUB_CACHE} does not have it")
        return _pinned(Path(cached), uri)
    try:
        path = Path(hf_hub_download(uri.id, uri.path_in_repo, revision=uri.revision, library_name="vidshard"))
    # ValueError: what the library does not accept; RuntimeError: hf_xet, which downloads large files
    except (httpx2.HTTPError, httpx2.InvalidURL, EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise HubError(_explain(error, uri)) from error
    return _pinned(path, uri)


def _pinned(path: Path, uri: HfUri) -> tuple[Path, str]:
    """A cached file, and its reference with the commit: the cache keeps it as ``snapshots/COMMIT/PATH``."""
    commit = path.parents[uri.path_in_repo.count("/")].name
    return path, f"{SCHEME}{uri.id}@{commit}/{uri.path_in_repo}"


def _parse(reference: str) -> HfUri:
    try:
        uri = parse_hf_uri(reference)
    except HfUriError as error:
        raise HubError("a file of the Hub is hf://OWNER/REPO/PATH or hf://OWNER/REPO@REVISION/PATH") from error
    if uri.type != "model":
        raise HubError(f"it names a {uri.type}, and weights are taken from model repositories: hf://OWNER/REPO/PATH")
    if not {"", ".", ".."}.isdisjoint(uri.path_in_repo.split("/")):
        raise HubError(f"it names no file: give the path of one, such as hf://{uri.id}/checkpoints/NAME.ckpt")
    return uri


def _explain(error: Exception, uri: HfUri) -> str:
    """One sentence that says what went wrong and what to do; it quotes nothing of the request or the answer."""
    revision = uri.revision or constants.DEFAULT_REVISION
    cause: BaseException = error
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__  # why there was nothing left but the cache, which does not have it
    if isinstance(cause, OfflineModeIsEnabled):
        return (
            f"HF_HUB_OFFLINE is set, and the cache in {constants.HF_HUB_CACHE} does not have it: unset HF_HUB_OFFLINE "
            "to download it, or set HF_HOME to where it is cached"
        )
    if isinstance(cause, GatedRepoError):
        return (
            f"{uri.id} is gated: ask for access on its page on the Hub, then set HF_TOKEN to a token of that account "
            "(or `hf auth login`)"
        )
    if isinstance(cause, RepositoryNotFoundError):
        return (
            f"there is no repository {uri.id}, or it is private: check the name; for a private one set HF_TOKEN "
            "(or `hf auth login`)"
        )
    if isinstance(cause, RevisionNotFoundError):
        return f"{uri.id} has no revision {revision}: name a branch, a tag or a full commit of it"
    if isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError):
        return f"{uri.id} has no file {uri.path_in_repo} at revision {revision}: check the path on its page on the Hub"
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        if status in (401, 403):
            return f"the Hub denies access (HTTP {status}): check that HF_TOKEN is valid and may read {uri.id}"
        remedy = "try again later" if status in (408, 429) or status >= 500 else "check the reference and HF_ENDPOINT"
        return f"the Hub answers with HTTP {status}: {remedy}; what is cached can be used with HF_HUB_OFFLINE=1"
    if isinstance(cause, FileMetadataError):
        return "what answers is not a Hugging Face Hub: check HF_ENDPOINT, proxy and firewall"
    if isinstance(cause, (httpx2.HTTPError, httpx2.InvalidURL, ConnectionError, TimeoutError)):
        return (
            f"the connection to the Hub fails ({type(cause).__name__}): check the network, the proxy and HF_ENDPOINT; "
            "what is cached can be used with HF_HUB_OFFLINE=1"
        )
    if isinstance(cause, OSError) and cause.strerror:
        return f"the cache in {constants.HF_HUB_CACHE} cannot be used ({cause.strerror}): set HF_HOME to another place"
    return f"the download failed ({type(cause).__name__}): try again"
