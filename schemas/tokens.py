"""Shard format: Arrow schema, payload columns, format version, and provenance in the metadata.

A shard is plain Parquet with Arrow's own types, one row per clip, so that any Parquet reader can read it. The model,
the weights and the run are recorded in the file's key-value metadata, under the keys of :class:`Provenance`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

FORMAT_VERSION = 1
"""Format version of shards whose payload is tokens, or latents with or without log-variances."""

FORMAT_VERSIONS = (FORMAT_VERSION, 2)
"""Format versions that this code reads. Version 2 adds payloads of several arrays. The version is raised when an old
reader would misread a new shard."""

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
"""Columns of every shard, before the payload and the manifest columns."""

LATER_COLUMNS = frozenset({"continues_previous", "decode_errors", "part_start_seconds", "part_end_seconds", "bucket"})
"""Columns that older shards of these format versions may lack. Their values are then: ``continues_previous`` false;
``decode_errors`` 0; times of the part null, which is the whole video; ``bucket`` the run's only frame size.
``decode_errors`` counts damaged places in the stretch that was decoded with the clip; the clip itself is whole."""

QUALITY_FIELDS: tuple[pa.Field, ...] = (
    pa.field("audit_psnr", pa.float32()),
    pa.field("audit_ssim", pa.float32()),
    pa.field("audit_lpips", pa.float32()),
)
"""Columns of shards that were made with ``--audit``: means over the frames of a clip that was decoded again. They are
null for clips that were not chosen, and where a metric could not be taken. PSNR is in dB."""

PAYLOAD_COLUMNS = frozenset({"tokens"}) | {
    f"{latent}{suffix}"
    for latent in ("latents", "structure", "dynamics", "dynamics_x", "dynamics_y")
    for suffix in ("", "_logvar")
}
"""Names of the payload columns of all families."""

_CLIP_COLUMNS = frozenset(f.name for f in CLIP_FIELDS)

RESERVED_COLUMNS = _CLIP_COLUMNS | PAYLOAD_COLUMNS | {field.name for field in QUALITY_FIELDS}

PAYLOAD_DTYPES = ("uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
"""Dtypes of payload columns."""

_MAX_DEPTH = 32
"""Deepest nesting of JSON values in a shard's metadata; vidshard writes at most four levels."""

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
"""Schema of ``rejects/``, one row per rejection; columns as in :class:`vidshard.schemas.rejections.Rejection`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PayloadColumn:
    """Payload column: one array per clip, token ids or latents, of a fixed shape."""

    name: str
    """Name of the column, such as ``tokens``, ``latents`` or ``latents_logvar``."""
    shape: tuple[int, ...]
    """Shape of one clip's array, which is stored flat in C order."""
    dtype: str
    """Name of the numpy dtype: an unsigned integer for tokens, ``float16`` for latents."""
    codebook_size: int | None = None
    """Codebook size: token ids lie in [0, codebook_size); None for latents."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or len(self.name) > 255 or self.name in _CLIP_COLUMNS:
            raise ValueError(f"a payload column has a name of its own, got {self.name!r:.80}")
        if self.dtype not in PAYLOAD_DTYPES:
            raise ValueError(f"{self.name}: the dtype is one of {', '.join(PAYLOAD_DTYPES)}, got {self.dtype!r:.80}")
        if not all(type(size) is int for size in self.shape):
            raise ValueError(f"{self.name}: a shape has whole numbers, got {self.shape!r:.80}")
        if self.codebook_size is not None and not (type(self.codebook_size) is int and self.codebook_size >= 1):
            raise ValueError(f"{self.name}: a codebook has a positive size, got {self.codebook_size!r:.80}")
        if (np.dtype(self.dtype).kind == "u") != (self.codebook_size is not None):
            raise ValueError(f"{self.name}: {self.dtype} does not go with a codebook of {self.codebook_size}")
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"{self.name}: a shape has positive sizes, got {self.shape}")
        if math.prod(self.shape) >= 1 << 31:
            raise ValueError(f"{self.name}: a clip has fewer than 2**31 values, got the shape {self.shape}")

    @property
    def num_values(self) -> int:
        """Number of values per clip: the product of the shape."""
        return math.prod(self.shape)

    @property
    def is_logvar(self) -> bool:
        """Whether the column holds log-variances, which decoding does not need."""
        return self.name.endswith("_logvar")

    @property
    def arrow_type(self) -> pa.FixedSizeListType:
        """Arrow type of one clip's values: a plain fixed-size list, because some readers refuse extension types."""
        return pa.list_(pa.from_numpy_dtype(np.dtype(self.dtype)), self.num_values)

    @property
    def num_bytes(self) -> int:
        """Size of one clip's values in bytes, before compression."""
        return self.num_values * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """Numbers by which the trainers of a tokenizer standardize its latents: ((x - mean) / std - shift) * scale."""

    mean: tuple[tuple[float, ...], ...]
    """Mean of each channel: one number, or with ``per_latent_frame`` one for each latent frame."""
    std: tuple[tuple[float, ...], ...]
    """Standard deviation of each channel, as ``mean``; positive."""
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        frames = {len(values) for values in (*self.mean, *self.std)}
        numbers = [*(value for values in (*self.mean, *self.std) for value in values), self.scale, self.shift]
        if not self.mean or len(self.mean) != len(self.std) or len(frames) != 1 or 0 in frames:
            raise ValueError("a normalization has as many means as standard deviations, one or several a channel")
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise ValueError("the numbers of a normalization are finite")
        if min(value for values in self.std for value in values) <= 0 or self.scale == 0:
            raise ValueError("the standard deviations of a normalization are positive, and its scale is not 0")

    @property
    def per_latent_frame(self) -> bool:
        """Whether each latent frame has numbers of its own."""
        return len(self.mean[0]) > 1

    @classmethod
    def of(
        cls,
        *,
        channels: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> Normalization:
        """Make one from flat lists, one number a channel, or all latent frames of the first channel first.

        Raises:
            ValueError: the lists do not fit the channels, or have numbers that are impossible.
        """
        mean = [0.0] * channels if mean is None else mean
        std = [1.0] * len(mean) if std is None else std
        if len(mean) != len(std) or not mean or len(mean) % channels:
            raise ValueError(f"{len(mean)} means and {len(std)} standard deviations do not fit {channels} channels")
        each = len(mean) // channels
        rows = [tuple(tuple(flat[c * each : (c + 1) * each]) for c in range(channels)) for flat in (mean, std)]
        return cls(mean=rows[0], std=rows[1], scale=scale, shift=shift)

    def record(self) -> dict[str, Any]:
        """JSON values; means and standard deviations are plain lists unless each latent frame has its own."""
        lists = [[list(v) if self.per_latent_frame else v[0] for v in values] for values in (self.mean, self.std)]
        return {
            "mean": lists[0],
            "std": lists[1],
            "scale": self.scale,
            "shift": self.shift,
            "per_latent_frame": self.per_latent_frame,
        }

    @classmethod
    def parse(cls, record: Mapping[str, Any]) -> Normalization:
        """Inverse of `record`.

        Raises:
            ValueError: the values are no normalization.
        """
        try:
            mean, std = (
                tuple(tuple(v) if isinstance(v, list) else (v,) for v in record[name]) for name in ("mean", "std")
            )
            return cls(mean=mean, std=std, scale=record["scale"], shift=record["shift"])
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"its metadata describes no normalization: {error!r:.200}") from error


Payload = tuple[PayloadColumn, ...]
"""Payload of a clip: one entry per payload column of a shard."""


def tokens_payload(shape: tuple[int, ...], codebook_size: int) -> Payload:
    """Payload of token ids (T', H', W'), in the smallest unsigned integer dtype that holds ``codebook_size - 1``."""
    dtype = str(np.min_scalar_type(codebook_size - 1))
    return (PayloadColumn(name="tokens", shape=shape, dtype=dtype, codebook_size=codebook_size),)


def latents_payload(shape: tuple[int, ...], *, keep_logvar: bool) -> Payload:
    """Payload of float16 latents (C, T', H', W'): the mean and, with ``keep_logvar``, the log-variance."""
    names = ("latents", "latents_logvar") if keep_logvar else ("latents",)
    return tuple(PayloadColumn(name=name, shape=shape, dtype="float16") for name in names)


def payload_bytes(payload: Payload) -> int:
    """Size of one clip's payload in bytes, before compression."""
    return sum(column.num_bytes for column in payload)


def payload_record(payload: Payload) -> dict[str, Any]:
    """Convert a payload to JSON values, for shard metadata and ``run.json``.

    Tokens, or latents with or without log-variances, are written as in format version 1. Other payloads are written
    as a list of columns, which is format version 2.
    """
    first = payload[0]
    kind = "tokens" if first.codebook_size is not None else "latents"
    simple: dict[str, Any] = {
        "payload": kind,
        "shape": list(first.shape),
        "codebook_size": first.codebook_size,
        "keep_logvar": len(payload) > 1,
    }
    if payload == _simple_payload(simple):
        return simple
    return {"payloads": [{**asdict(column), "shape": list(column.shape)} for column in payload]}


def parse_payload(record: Mapping[str, Any]) -> Payload:
    """Convert JSON values to a payload; inverse of :func:`payload_record`.

    Raises:
        ValueError: the values describe no valid payload.
    """
    try:
        if "payloads" not in record:
            return _simple_payload(record)
        columns = tuple(PayloadColumn(**{**column, "shape": tuple(column["shape"])}) for column in record["payloads"])
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"its metadata describes no payload: {error!r:.200}") from error
    if not columns or len({column.name for column in columns}) < len(columns):
        raise ValueError("its metadata names no payload column, or one twice")
    return columns


def _simple_payload(record: Mapping[str, Any]) -> Payload:
    shape, size = tuple(record["shape"]), record["codebook_size"]
    if size is not None and not (type(size) is int and 1 <= size <= 1 << 63):
        raise ValueError(f"its metadata states a codebook of {size!r:.80}")
    if record["payload"] not in ("tokens", "latents") or type(record["keep_logvar"]) is not bool:
        raise ValueError(f"its metadata states the payload {record['payload']!r:.80}")
    if record["payload"] == "tokens":
        if size is None:
            raise ValueError("its metadata states tokens without a codebook")
        return tokens_payload(shape, size)
    return latents_payload(shape, keep_logvar=record["keep_logvar"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Provenance of a shard's rows: complete enough to decode them years later."""

    tokenizer: Mapping[str, Any]
    """Complete configuration of the tokenizer."""
    weights_sha256: str
    """Digest of the names, shapes and values of the weights, independent of their file."""
    weights_source: str
    """Path or URL of the weights (with the commit on the Hugging Face Hub), or ``seed:N`` for seeded random ones."""
    payload: Payload
    run: Mapping[str, Any]
    """Settings of the complete resolved run."""
    identity: Mapping[str, Any]
    """Settings that decide what a token means; an output holds one identity."""
    code_version: str
    libraries: Mapping[str, str]
    """Versions of the libraries that computed the frames and the tokens."""
    notice: str | None = None
    """Warning for readers, such as that the weights are random."""
    normalization: Normalization | None = None
    """Numbers by which readers standardize the latents, which are stored raw; None if the tokenizer has none."""

    @property
    def format_version(self) -> int:
        """Lowest format version that can hold these rows, so that older readers keep working."""
        return FORMAT_VERSIONS[-1] if "payloads" in payload_record(self.payload) else FORMAT_VERSION

    def to_metadata(self) -> dict[str, str]:
        """Key-value metadata for Parquet; every value is text, and structured values are JSON."""
        values: dict[str, Any] = {
            "format_version": self.format_version,
            **payload_record(self.payload),
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
        if self.normalization is not None:
            values["normalization"] = self.normalization.record()
        return {METADATA_PREFIX + k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[bytes, bytes] | None, *, name: str) -> Provenance:
        """Parse the metadata of a shard; inverse of :meth:`to_metadata`.

        Args:
            metadata: key-value metadata of the Parquet file.
            name: name of the file for the error.

        Raises:
            ValueError: the file is not a token shard, has an unknown format version, or its values are not those of
                a shard.
        """
        prefix = METADATA_PREFIX.encode()
        text = {
            k.removeprefix(prefix).decode(): v.decode() for k, v in (metadata or {}).items() if k.startswith(prefix)
        }
        if "format_version" not in text:
            raise ValueError(f"{name} is not a token shard: it has no '{METADATA_PREFIX}format_version' metadata")
        if text["format_version"] not in map(str, FORMAT_VERSIONS):
            raise ValueError(
                f"{name} has format version {text['format_version']}, this vidshard reads versions "
                f"{' and '.join(map(str, FORMAT_VERSIONS))}; use the vidshard that wrote it (metadata "
                "'vidshard.code_version') or a newer one"
            )
        described = {k: text[k] for k in ("shape", "codebook_size", "keep_logvar", "payloads") if k in text}
        missing = [key for key in _METADATA if key not in text]
        if missing:
            raise ValueError(f"its metadata lacks '{METADATA_PREFIX}{missing[0]}'")
        payload = parse_payload(
            {key: parse_json(value, key) for key, value in described.items()} | {"payload": text.get("payload")}
        )
        return cls(
            tokenizer=_json_object(text, "tokenizer"),
            weights_sha256=text["weights_sha256"],
            weights_source=text["weights_source"],
            payload=payload,
            run=_json_object(text, "run"),
            identity=_json_object(text, "identity"),
            code_version=text["code_version"],
            libraries={name: str(version) for name, version in _json_object(text, "libraries").items()},
            notice=text.get("notice"),
            normalization=(
                Normalization.parse(_json_object(text, "normalization")) if "normalization" in text else None
            ),
        )


_METADATA = ("tokenizer", "weights_sha256", "weights_source", "run", "identity", "code_version", "libraries")


def parse_json(text: str | bytes, key: str) -> Any:
    """Parse a JSON value of a shard's metadata.

    Args:
        text: the JSON.
        key: name of the value, for the error.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    try:
        value = json.loads(text)
        level = [value]
        for _ in range(_MAX_DEPTH):
            level = [
                v for c in level for v in (c.values() if isinstance(c, dict) else c if isinstance(c, list) else ())
            ]
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata '{key}' is no JSON: {error!r:.200}") from error
    if level:
        raise ValueError(f"its metadata '{key}' is nested more than {_MAX_DEPTH} levels deep")
    return value


def _json_object(text: Mapping[str, str], key: str) -> dict[str, Any]:
    value = parse_json(text[key], key)
    if not isinstance(value, dict):
        raise ValueError(f"its metadata '{key}' is a {type(value).__name__} where an object should be")
    return value


def shard_schema(manifest_fields: Sequence[pa.Field], provenance: Provenance) -> pa.Schema:
    """Schema of a shard: the clip columns, the payload columns, then the manifest columns.

    The shape of each payload column is JSON in its field's metadata, under ``shape``, and also in the file's metadata.
    """
    payload_fields = [
        pa.field(column.name, column.arrow_type, nullable=False, metadata={"shape": json.dumps(list(column.shape))})
        for column in provenance.payload
    ]
    return pa.schema([*CLIP_FIELDS, *payload_fields, *manifest_fields], metadata=provenance.to_metadata())
