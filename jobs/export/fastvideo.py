"""FastVideo: Parquet rows of latents and text embeddings, as its trainers read them.

A tensor is three columns: its bytes, its shape and its dtype. The trainers read every tensor as float32, so latents are
stored in float32, which holds float16 exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.jobs.export.layout import Clips, Field, Refusal, Source, Written, matrix_values, padded, signal_values
from vidshard.schemas.errors import UserError

TEXT_WIDTH = 4096
"""Width of the text embeddings of T5-XXL and UMT5-XXL, which the models that are trained on these layouts take."""
_GROUP_BYTES = 4 << 20
"""Size of a row group: the map-style reader reads a whole one for each row."""


def _tensor(name: str) -> list[pa.Field]:
    kinds = {"bytes": pa.binary(), "shape": pa.list_(pa.int64()), "dtype": pa.string()}
    return [pa.field(f"{name}_{part}", kind) for part, kind in kinds.items()]


class FastVideo:
    """Layout of Parquet files, ``000000.parquet`` on; see `Layout`."""

    name = "fastvideo"
    meaning = "Parquet rows of latents and text embeddings, for the trainers of FastVideo"
    fields: Sequence[Field] = (
        Field(name="caption", kind="text", meaning="text of the clip"),
        Field(name="text_embedding", kind="matrix", meaning="embedding of the text, (tokens, width)"),
        Field(name="keyboard_cond", kind="signal", meaning="keys held at each frame", width=4),
        Field(name="mouse_cond", kind="signal", meaning="movement of the mouse at each frame", width=2),
    )
    whole_runs = False

    def check(self, source: Source) -> list[str]:
        """Check that clips are single arrays of latents, each of which stands alone."""
        latents = source.only(self.name, "latents")
        if len(latents.shape) != 4:
            raise UserError(f"--to fastvideo holds latents (C, T', H', W'), and these have the shape {latents.shape}")
        if source.is_continuous:
            raise UserError(
                "--to fastvideo holds clips that stand alone, and those of --continuous continue one another: tokenize "
                "without --continuous, or choose lerobot-latents, which holds whole sequences"
            )
        source.refuse_several_shapes(self.name)
        return [column.name for column in source.payload if column.is_logvar]

    def write(self, source: Source, clips: Clips, _before: Sequence[Written], /) -> Written:
        """Write one Parquet file."""
        written = Written()
        is_padded = padded(clips)
        rows: list[dict[str, Any]] = []
        for at, values in enumerate(clips.table.to_pylist()):
            row = Refusal.PADDED if is_padded[at] else self._row(source, values, clips.payload["latents"][at])
            if isinstance(row, Refusal):
                written.refused[row] += 1
            else:
                rows.append(row)
        written.num_clips = len(rows)
        if rows:
            conditions = [f.name for f in self.fields if f.kind == "signal" and f.name in source.columns]
            fields = [pa.field("id", pa.string()), *_tensor("vae_latent"), *_tensor("text_embedding")]
            fields += [field for name in conditions for field in _tensor(name)]
            schema = pa.schema([*fields, *_FACTS], metadata=source.metadata)
            out = pa.BufferOutputStream()
            group = max(1, _GROUP_BYTES // max(1, len(rows[0]["vae_latent_bytes"])))
            table = pa.Table.from_pylist(rows, schema=schema)
            pq.write_table(table, out, row_group_size=group, compression="zstd", write_page_checksum=True)
            written.put(source, f"{clips.number:06d}.parquet", memoryview(out.getvalue()))
        return written

    def finish(self, _source: Source, _batches: Sequence[Written], /) -> dict[str, int]:
        """Write nothing: each file stands for itself."""
        return {}

    def _row(self, source: Source, values: dict[str, Any], latents: np.ndarray) -> dict[str, Any] | Refusal:
        num_frames = len(values["frame_pts_seconds"])
        height, width = map(int, values["bucket"].split("x")) if values.get("bucket") else (0, 0)
        embedding: np.ndarray | None = np.zeros((0, TEXT_WIDTH), np.float32)
        if "text_embedding" in source.columns:
            embedding = matrix_values(values[source.columns["text_embedding"]])
            if embedding is None:
                return Refusal.NO_VALUE
        caption = values[source.columns["caption"]] if "caption" in source.columns else ""
        if caption is None:
            return Refusal.NO_VALUE
        tensors = {"vae_latent": latents, "text_embedding": embedding}
        for field in self.fields:
            if field.kind == "signal" and field.name in source.columns:
                value = values[source.columns[field.name]]
                array = signal_values(value, num_frames, field.width)
                if array is None:
                    return Refusal.NO_VALUE if value is None else Refusal.UNEVEN_SIGNAL
                tensors[field.name] = array
        row: dict[str, Any] = {}
        for name, tensor in tensors.items():
            assert tensor is not None
            row |= {
                f"{name}_bytes": np.ascontiguousarray(tensor, np.float32).tobytes(),
                f"{name}_shape": list(tensor.shape),
                f"{name}_dtype": "float32",
            }
        return row | {
            "id": values["clip_id"],
            "file_name": values["uri"],
            "caption": caption,
            "media_type": "video",
            "width": width,
            "height": height,
            "num_frames": num_frames,
            "duration_sec": num_frames / values["fps"],
            "fps": values["fps"],
        }


_FACTS = [
    pa.field("file_name", pa.string()),
    pa.field("caption", pa.string()),
    pa.field("media_type", pa.string()),
    pa.field("width", pa.int64()),
    pa.field("height", pa.int64()),
    pa.field("num_frames", pa.int64()),
    pa.field("duration_sec", pa.float64()),
    pa.field("fps", pa.float64()),
]
"""Columns after the tensors, in FastVideo's order."""
