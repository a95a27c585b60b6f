"""State of an export: what is written, and by which settings; ``vidshard-export/export.json`` at the destination.

The files of a batch are the same however often it is written, so the state may be older than the files. It is saved
every few seconds and at the end.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vidshard.jobs.export.layout import Written
from vidshard.pipeline import storage
from vidshard.schemas.errors import UserError
from vidshard.schemas.uris import shown_uri

FOLDER = "vidshard-export"
"""Folder of the state and of the lease, below the destination."""
_FILE = "export.json"
_VERSION = 1
_MAX_BYTES = 1 << 30
_SAVE_SECONDS = 5.0


@dataclass(kw_only=True)
class State:
    """Record of an export: the pieces that it has written."""

    settings: Mapping[str, Any]
    """Layout, filter and columns, and the tokenizer and weights of the clips: an export has one set of them."""
    provenance: Mapping[str, str]
    """Provenance of the clips, as in the metadata of their shards."""
    source: str
    """Output that was exported, without credentials."""
    source_digest: str = ""
    """Digest of the shards that a complete export has."""
    num_clips: int = 0
    """Clips of the output."""
    num_left_out: int = 0
    num_duplicates: int = 0
    batches: dict[str, Written] = field(default_factory=dict)
    """Batches by key, in the order of their numbers."""
    files: dict[str, int] = field(default_factory=dict)
    """Files that describe all batches, with their sizes."""
    is_complete: bool = False

    _saved: float = field(default=0.0, init=False)

    def save(self, dest: str, *, now: bool = True) -> None:
        """Save the state.

        Args:
            now: save in any case; otherwise only if it was saved more than a few seconds ago.

        Raises:
            storage.StorageError: it could not be written.
        """
        if now or time.monotonic() - self._saved > _SAVE_SECONDS:
            record = {"version": _VERSION, **{f.name: getattr(self, f.name) for f in fields(self) if f.init}}
            record["batches"] = {key: vars(batch) for key, batch in self.batches.items()}
            storage.write_atomic(_path(dest), json.dumps(record, indent=1).encode())
            self._saved = time.monotonic()

    @classmethod
    def load(cls, dest: str) -> State | None:
        """Load the state; None where nothing was exported.

        Raises:
            UserError: it is damaged, or of another version.
            storage.StorageError: it could not be read.
        """
        path = _path(dest)
        if not storage.exists(path):
            return None
        try:
            record = json.loads(storage.read_bytes(path, max_bytes=_MAX_BYTES))
            if record.pop("version") != _VERSION:
                raise ValueError("another version of vidshard wrote it")
            batches = {
                str(key): Written(**{**batch, "refused": Counter(batch["refused"])})
                for key, batch in record.pop("batches").items()
            }
            return cls(**record, batches=batches)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{shown_uri(path)} is damaged ({error!s:.200}): export to another folder") from error


def _path(dest: str) -> str:
    return storage.join(dest, FOLDER, _FILE)
