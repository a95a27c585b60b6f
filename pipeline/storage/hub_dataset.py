"""Dataset repositories of the Hugging Face Hub that are written to: ``hf://datasets/OWNER/NAME[@REVISION]``.

`huggingface_hub` uploads, retries and finds its token (HF_TOKEN, HF_ENDPOINT, ``hf auth login`` ...). Error messages
are written here, as in `storage.hub`: they never quote a request or an answer, which might repeat the token.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, parse_hf_uri
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HfUriError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars

from vidshard.pipeline.storage.hub import SCHEME, HubError
from vidshard.schemas.errors import EXIT_FAILED, UserError

_FORM = f"{SCHEME}datasets/OWNER/NAME or {SCHEME}datasets/OWNER/NAME@BRANCH"


class HubPushError(HubError):
    """A push began and failed; the same command continues."""

    exit_code = EXIT_FAILED


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """File of a repository."""

    num_bytes: int
    sha256: str | None
    """Digest of a large file; None for a small one, which the repository keeps otherwise."""


class HubDataset:
    """A dataset repository of the Hub."""

    def __init__(self, reference: str) -> None:
        """Parse the reference and find the token; nothing is asked.

        Raises:
            UserError: the reference is malformed, or there is no token.
        """
        try:
            uri = parse_hf_uri(reference)
        except HfUriError as error:
            raise UserError(f"a dataset of the Hub is {_FORM}") from error
        if uri.type != "dataset" or uri.path_in_repo or uri.id.count("/") != 1:
            raise UserError(f"a dataset of the Hub is {_FORM}")
        self.id = uri.id
        """OWNER/NAME."""
        self._revision = uri.revision or constants.DEFAULT_REVISION
        if constants.HF_HUB_OFFLINE:
            raise UserError("HF_HUB_OFFLINE is set: unset it to push")
        token = get_token()
        if not token:
            raise UserError(
                "the Hub needs a token to push: set HF_TOKEN to a token with write permission, or run `hf auth login`"
            )
        disable_progress_bars()
        self._api = HfApi(token=token, library_name="vidshard")

    def files(self) -> dict[str, RemoteFile] | None:
        """All files by path; None where there is no such repository, or the token cannot see it.

        Raises:
            HubError: the Hub refuses or cannot be reached.
        """
        with self._errors_named():
            try:
                tree = list(
                    self._api.list_repo_tree(self.id, recursive=True, revision=self._revision, repo_type="dataset")
                )
            except RevisionNotFoundError as error:
                raise HubError(f"{self.id} has no branch {self._revision}: make it on its page on the Hub") from error
            except EntryNotFoundError:
                return {}
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401:
                    raise
                return None
        found: dict[str, RemoteFile] = {}
        for file in tree:
            if hasattr(file, "size"):
                lfs = getattr(file, "lfs", None)
                found[file.path] = RemoteFile(num_bytes=int(file.size), sha256=lfs.sha256 if lfs else None)
        return found

    def create(self, *, private: bool) -> None:
        """Make the repository; one that is there stays as it is.

        Raises:
            HubError: the Hub refuses or cannot be reached.
        """
        with self._errors_named():
            self._api.create_repo(self.id, repo_type="dataset", private=private, exist_ok=True)

    def read_text(self, path: str) -> str:
        """Content of a small text file.

        Raises:
            HubError: the Hub refuses or cannot be reached.
        """
        with self._errors_named():
            return Path(
                self._api.hf_hub_download(self.id, path, repo_type="dataset", revision=self._revision)
            ).read_text()

    def commit(self, added: Mapping[str, Path | bytes], deleted: Collection[str], message: str) -> None:
        """Upload files and commit them together. Content that was uploaded before an interruption is not sent again.

        Args:
            added: file, or its content, by path in the repository.
            deleted: paths in the repository.
            message: title of the commit.

        Raises:
            HubPushError: the Hub refuses or cannot be reached.
        """
        operations: list[Any] = [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in added.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=path) for path in deleted]
        with self._errors_named(HubPushError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._api.create_commit(
                self.id, operations, commit_message=message, repo_type="dataset", revision=self._revision
            )

    @contextmanager
    def _errors_named(self, kind: type[HubError] = HubError) -> Iterator[None]:
        try:
            yield
        except HubError:
            raise
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError, RuntimeError) as error:
            raise kind(self._explain(error)) from error

    def _explain(self, error: BaseException) -> str:
        """One sentence that says what went wrong and what to do; it quotes nothing of the request or the answer."""
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HfHubHTTPError | OfflineModeIsEnabled | httpx2.HTTPError):
            cause = cause.__cause__  # of an upload in a thread
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set: unset it to push"
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if status == 401:
                return "the Hub does not accept the token (HTTP 401): check HF_TOKEN, or run `hf auth login`"
            if status == 403:
                return (
                    f"the token may not write to {self.id} (HTTP 403): take one with write permission there, from an "
                    "account that is the owner or a member of the organization"
                )
            if status == 404:
                return (
                    f"there is no dataset {self.id}, or the token cannot see it: check the name, or make it: --create"
                )
            if status == 413 or status == 402:
                return f"the Hub takes no more data of this account (HTTP {status}): see its storage limits"
            remedy = (
                "try the same command later" if status in (408, 409, 412, 429) or status >= 500 else "check HF_ENDPOINT"
            )
            return f"the Hub answers with HTTP {status}: {remedy}; what is committed stays"
        if isinstance(cause, httpx2.HTTPError) or isinstance(error, httpx2.InvalidURL | ConnectionError | TimeoutError):
            name = type(cause or error).__name__
            return (
                f"the connection to the Hub fails ({name}): check the network, the proxy and HF_ENDPOINT, and try again"
            )
        return f"the push failed ({type(error).__name__}): try the same command again"
