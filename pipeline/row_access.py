"""Locations that the rows of a manifest may name.

An input on the command line is the user's own word, and opened whatever it is. The rows of a manifest may be somebody
else's: they are held against the schemes and the prefixes that a run allows.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from urllib.parse import unquote

from vidshard.pipeline import storage
from vidshard.schemas.text import readable

DEFAULT_SCHEMES = frozenset(
    [
        "file",
        "s3",
        "s3a",
        "gs",
        "gcs",
        "az",
        "abfs",
        "abfss",
        "adl",
        "r2",
        "oci",
        "oss",
        "hf",
        "http",
        "https",
        "memory",
    ]
)
"""Schemes of rows without ``--allow-schemes``: local files, object stores, the Hugging Face Hub, and the web."""


def scheme_of(uri: str) -> str:
    """Scheme of a URI in lower case; ``file`` for local paths."""
    return "file" if storage.is_local(uri) else uri.partition("://")[0].lower()


@dataclass(frozen=True, kw_only=True, slots=True)
class RowAccess:
    """Rules for the locations that rows name."""

    schemes: tuple[str, ...] = ()
    """Schemes that are allowed, ``file`` for local paths; empty for ``DEFAULT_SCHEMES`` and that of the manifest. Rows
    of a remote manifest then may not name local files."""
    under: tuple[str, ...] = ()
    """Folders, local or remote, one of which must hold each location; empty for any."""

    def refusal(self, uri: str, manifest: str) -> str | None:
        """Say why a row may not name a location; None if it may.

        Args:
            uri: absolute location.
            manifest: path of the manifest.
        """
        scheme, own = scheme_of(uri), scheme_of(manifest)
        if self.schemes:
            if scheme not in self.schemes:
                return f"its scheme is {readable(scheme, 80)}, and --allow-schemes allows {', '.join(self.schemes)}"
        elif scheme != own and scheme not in DEFAULT_SCHEMES:
            return f"a manifest names the scheme {readable(scheme, 80)}, which --allow-schemes must allow"
        elif scheme == "file" and own != "file":
            return "a remote manifest names a local file, which --allow-schemes file must allow"
        if self.under and not any(_is_under(uri, folder) for folder in self.under):
            folders = ", ".join(storage.public_uri(storage.absolute(folder)) for folder in self.under)
            return f"it is in no folder of --allow-under: {readable(folders, 400)}"
        return None


def _is_under(uri: str, folder: str) -> bool:
    if "\0" in uri or storage.is_local(uri) != storage.is_local(folder):
        return False
    if storage.is_local(uri):
        path, root = os.path.realpath(storage.absolute(uri)), os.path.realpath(storage.absolute(folder))
        return path == root or path.startswith(f"{root.rstrip('/')}/")
    path, root = _comparable(storage.public_uri(uri)), _comparable(storage.public_uri(folder)).rstrip("/")
    if {"..", "."} & set(unquote(path).replace("\\", "/").split("/")):
        return False
    return path == root or path.startswith(f"{root}/")


def _comparable(uri: str) -> str:
    scheme, _, rest = uri.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme.lower()}://{host.lower()}{slash}{path}"
