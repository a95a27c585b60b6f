"""What a token shard holds: its Arrow schema, its format version, and the provenance in its metadata.

A shard is plain Parquet with Arrow's own types, one row a clip, so that any Parquet reader understands it. What
a reader cannot see in the columns (which model, which weights, which run) stands in the file's key-value
metadata under the keys of :class:`Provenance`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

FORMAT_VERSION = 1
"""Raised when an old reader would misread a new shard."""

METADATA_PREFIX = "vidshard."

GEOMETRY_TYPE = pa.struct(
    [
        ("policy", pa.string()),
        ("scaled_width", pa.int32()),
        ("scaled_height", pa.int32()),
        ("left", pa.int32()),
        ("top", pa.int32()),
    ]
)

CLIP_FIELDS: tuple[pa.Field, ...] = (
    pa.field("clip_id", pa.string(), nullable=False),
    pa.field("video_id", pa.string(), nullable=False),
    pa.field("uri", pa.string(), nullable=False),
    pa.field("clip_index", pa.int32(), nullable=False),
    pa.field("part_start_seconds", pa.float64()),
    pa.field("part_end_seconds", pa.float64()),
    pa.field("start_seconds", pa.float64(), nullable=False),
    pa.field("fps", pa.float64(), nullable=False),
    pa.field("frame_pts_seconds", pa.list_(pa.float64()), nullable=False),
    pa.field("num_valid_frames", pa.int32(), nullable=False),
    pa.field("continues_previous", pa.bool_(), nullable=False),
    pa.field("decode_errors", pa.int32(), nullable=False),
    pa.field("source_width", pa.int32(), nullable=False),
    pa.field("source_height", pa.int32(), nullable=False),
    pa.field("source_codec", pa.string(), nullable=False),
    pa.field("source_fps", pa.float64(), nullable=False),
    pa.field("source_rotation", pa.int32(), nullable=False),
    pa.field("geometry", GEOMETRY_TYPE, nullable=False),
    pa.field("bucket", pa.string(), nullable=False),
)
"""Columns of every shard, before the payload and the manifest's own columns."""

LATER_COLUMNS = frozenset({"continues_previous", "decode_errors", "part_start_seconds", "part_end_seconds", "bucket"})
"""Those that older shards of this format version lack. Where ``continues_previous`` is missing, it is false; where
``decode_errors`` is, 0: the clip is whole, but so many damaged places were met in the stretch decoded with it; where
the times of a part are, it is the whole video; where ``bucket`` is, the run's only frame size."""

RESERVED_COLUMNS = frozenset(f.name for f in CLIP_FIELDS) | {"tokens", "latents", "latents_logvar"}

REJECT_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("video_id", pa.string()),
        pa.field("span_id", pa.string()),
        pa.field("start_seconds", pa.float64()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("remedy", pa.string(), nullable=False),
        pa.field("kept_clips", pa.int32()),
        pa.field("place", pa.string()),
    ]
)
"""One row a rejection; see :class:`vidshard.schemas.rejections.Rejection` for the meaning of each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Payload:
    """What a clip becomes: token ids, or a latent array, of one fixed shape."""

    kind: Literal["tokens", "latents"]
    shape: tuple[int, ...]
    """(T', H', W') of tokens, (C, T', H', W') of latents."""
    codebook_size: int | None
    """Token ids are below this; None for latents."""
    keep_logvar: bool = False

    @property
    def num_values(self) -> int:
        """Values per clip: the product of the shape."""
        return int(np.prod(self.shape))

    @property
    def dtype(self) -> np.dtype[Any]:
        """Smallest unsigned integer that holds the codebook; float16 for latents."""
        if self.kind == "latents":
            return np.dtype(np.float16)
        assert self.codebook_size is not None
        return np.min_scalar_type(self.codebook_size - 1)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the payload columns in a shard."""
        if self.kind == "tokens":
            return ("tokens",)
        return ("latents", "latents_logvar") if self.keep_logvar else ("latents",)

    @property
    def arrow_type(self) -> pa.FixedSizeListType:
        """One clip's values in C order. A plain fixed-size list, since some readers refuse extension types."""
        return pa.list_(pa.from_numpy_dtype(self.dtype), self.num_values)

    @property
    def clip_bytes(self) -> int:
        """Bytes of one clip's payload before compression."""
        return self.num_values * self.dtype.itemsize * len(self.columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """How the rows of a shard came about; enough to turn them into video again in years."""

    tokenizer: Mapping[str, Any]
    """The tokenizer's complete configuration."""
    weights_sha256: str
    """Digest of the weights' names, shapes and values, whatever file they came from."""
    weights_source: str
    """Where the weights were read (on the Hugging Face Hub by the commit), or ``seed:N`` for seeded random ones."""
    payload: Payload
    run: Mapping[str, Any]
    """The complete resolved run."""
    identity: Mapping[str, Any]
    """The settings that decide what a token means; outputs with different ones do not mix."""
    code_version: str
    libraries: Mapping[str, str]
    """Versions of what computed the frames and the tokens."""
    notice: str | None = None
    """A warning for readers, such as that the weights are random."""

    def to_metadata(self) -> dict[str, str]:
        """Key-value metadata for Parquet; every value is text, structured ones are JSON."""
        values: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "payload": self.payload.kind,
            "shape": list(self.payload.shape),
            "codebook_size": self.payload.codebook_size,
            "keep_logvar": self.payload.keep_logvar,
            "tokenizer": dict(self.tokenizer),
            "weights_sha256": self.weights_sha256,
            "weights_source": self.weights_source,
            "run": dict(self.run),
            "identity": dict(self.identity),
            "code_version": self.code_version,
            "libraries": dict(self.libraries),
        }
        if self.notice:
            values["notice"] = self.notice
        return {METADATA_PREFIX + k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None, *, name: str) -> Provenance:
        """Read back what :meth:`to_metadata` wrote.

        Args:
            name: the file, for the error.

        Raises:
            ValueError: not a token shard, or of a format version that this code does not know.
        """
        prefix = METADATA_PREFIX.encode()
        text = {
            k.removeprefix(prefix).decode(): v.decode() for k, v in (metadata or {}).items() if k.startswith(prefix)
        }
        if "format_version" not in text:
            raise ValueError(f"{name} is not a token shard: it has no '{METADATA_PREFIX}format_version' metadata")
        if text["format_version"] != str(FORMAT_VERSION):
            raise ValueError(
                f"{name} has format version {text['format_version']}, this vidshard reads version {FORMAT_VERSION}; "
                "use the vidshard that wrote it (metadata 'vidshard.code_version') or a newer one"
            )
        payload = Payload(
            kind="tokens" if text["payload"] == "tokens" else "latents",
            shape=tuple(json.loads(text["shape"])),
            codebook_size=json.loads(text["codebook_size"]),
            keep_logvar=json.loads(text["keep_logvar"]),
        )
        return cls(
            tokenizer=json.loads(text["tokenizer"]),
            weights_sha256=text["weights_sha256"],
            weights_source=text["weights_source"],
            payload=payload,
            run=json.loads(text["run"]),
            identity=json.loads(text["identity"]),
            code_version=text["code_version"],
            libraries=json.loads(text["libraries"]),
            notice=text.get("notice"),
        )


def shard_schema(payload: Payload, manifest_fields: Sequence[pa.Field], provenance: Provenance) -> pa.Schema:
    """Schema of a shard: the clip columns, the payload, then the manifest's own columns.

    The payload's shape stands in its field's metadata (``shape``, JSON) and in the file's
    (``vidshard.shape``).
    """
    shape = {"shape": json.dumps(list(payload.shape))}
    payload_fields = [pa.field(c, payload.arrow_type, nullable=False, metadata=shape) for c in payload.columns]
    return pa.schema([*CLIP_FIELDS, *payload_fields, *manifest_fields], metadata=provenance.to_metadata())
