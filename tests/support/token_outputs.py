"""Outputs of many small clips, written without a tokenizer: every value of a payload says which clip it is of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vidshard.schemas.tokens import (
    CLIP_FIELDS,
    Payload,
    PayloadColumn,
    Provenance,
    latents_payload,
    shard_schema,
    tokens_payload,
)

TOKENS = tokens_payload((2, 2, 3), 1 << 18)
LATENTS = latents_payload((4, 2, 2, 2), keep_logvar=True)
TWIN: Payload = tuple(
    PayloadColumn(name=name, shape=shape, dtype="float16")
    for name, shape in (("structure", (3, 2, 2, 4)), ("dynamics_x", (5, 2, 4)), ("dynamics_y", (5, 2, 4)))
)
TOKENIZER = {
    "name": "tiny", "family": "vidtok", "variant": "causal-v1.0", "architecture": "released", "head": "fsq",
    "latent_channels": 5, "fsq_levels": [8, 8, 8, 8, 8], "base_width": 8, "width_multipliers": [1, 2, 4, 4],
    "encoder_pairs": 1, "decoder_pairs": 1, "encoder_space_levels": [0, 1, 2], "encoder_time_levels": [1, 2],
    "decoder_space_levels": [1, 2, 3], "decoder_time_levels": [1, 2],
}  # fmt: skip
FPS, FRAMES = 4.0, 5
GEOMETRY = {"policy": "crop", "scaled_width": 43, "scaled_height": 32, "left": 5, "top": 0}


@dataclass(frozen=True, kw_only=True)
class Made:
    """Clips of one video in a shard."""

    video: str
    first: int = 0
    count: int = 4
    missing: tuple[int, ...] = ()
    """Clip indices that are not there."""
    part: tuple[float, float] | None = None
    signal: bool = True
    continuous: bool = False


def provenance(payload: Payload = TOKENS, **changes: Any) -> Provenance:
    """Provenance of such an output; ``run`` has further settings."""
    settings = {"fps": "4", "frames": FRAMES, "size": "32x32", "resize": "crop", **changes.pop("run", {})}
    made = Provenance(
        tokenizer=TOKENIZER,
        weights_sha256="ab" * 32,
        weights_source="seed:0",
        payload=payload,
        run=settings,
        identity=settings,
        code_version="0",
        libraries={},
    )
    return replace(made, **changes)


def write_shard(
    path: Path,
    videos: Sequence[Made],
    *,
    first_id: int = 0,
    payload: Payload = TOKENS,
    rows_per_group: int = 3,
    metadata: Provenance | None = None,
    signals: bool = False,
) -> int:
    """Write a shard whose payload counts clips from ``first_id`` on; returns the number after its last clip."""
    rows: list[dict[str, Any]] = []
    for made in videos:
        for index in range(made.first, made.first + made.count):
            if index in made.missing:
                continue
            start = (made.part or (0.0, 0.0))[0] + index * FRAMES / FPS
            num_frames = FRAMES
            if made.continuous and index:
                start, num_frames = (FRAMES + (index - 1) * 8) / FPS, 8
            times = [start + at / FPS for at in range(num_frames)]
            rows.append(
                {
                    "clip_id": f"{made.video}-00000000-{index:06d}",
                    "video_id": made.video,
                    "uri": f"/videos/{made.video}.mp4",
                    "clip_index": index,
                    "part_start_seconds": made.part and made.part[0],
                    "part_end_seconds": made.part and made.part[1],
                    "start_seconds": start,
                    "fps": FPS,
                    "frame_pts_seconds": times,
                    "num_valid_frames": num_frames,
                    "continues_previous": made.continuous and index > 0,
                    "decode_errors": 0,
                    "source_width": 64,
                    "source_height": 48,
                    "source_codec": "h264",
                    "source_fps": 25.0 if made.video < "m" else 12.5,
                    "source_rotation": 0,
                    "geometry": GEOMETRY,
                    "bucket": "32x32",
                    "actions": [[t, -t] for t in times] if made.signal else None,
                    "poses": [[[t]] * (at % 3) for at, t in enumerate(times)] if made.signal else None,
                    "poses_seconds": [[t] * (at % 3) for at, t in enumerate(times)] if made.signal else None,
                    "caption": f"clip {index} of {made.video}",
                }
            )
    real = metadata or provenance(payload)
    frames = pa.list_(pa.list_(pa.float32()))
    more = [pa.field("caption", pa.string())]
    if signals:
        seconds = pa.field("poses_seconds", pa.list_(pa.list_(pa.float64())))
        more += [pa.field("actions", frames), pa.field("poses", pa.list_(frames)), seconds]
    schema = shard_schema(more, replace(real, payload=payload))
    columns = {f.name: [row[f.name] for row in rows] for f in [*CLIP_FIELDS, *more]}
    number = first_id + np.arange(len(rows))
    for column in payload:
        values = np.repeat(number.astype(column.dtype), column.num_values)
        if column.is_logvar:
            values = np.zeros(len(rows) * column.num_values, np.float16)
        columns[column.name] = pa.FixedSizeListArray.from_arrays(pa.array(values), type=column.arrow_type)
    table = pa.table(
        {
            f.name: pa.array(columns[f.name], f.type) if isinstance(columns[f.name], list) else columns[f.name]
            for f in schema
        },
        schema=schema,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    encodings = {
        f"{column.name}.list.element": "PLAIN" if column.codebook_size is None else "BYTE_STREAM_SPLIT"
        for column in payload
    }
    pq.write_table(
        table,
        path,
        row_group_size=rows_per_group,
        compression="zstd",
        use_dictionary=["video_id", "uri"],
        column_encoding=encodings,
        write_page_checksum=True,
    )
    return first_id + len(rows)


def write_output(out: Path, *, num_shards: int = 5, videos_per_shard: int = 4, **options: Any) -> int:
    """Write an output of several shards; returns its number of clips. Clip n of the files' order holds n everywhere."""
    (out / "shards").mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text("{}")
    number = 0
    for shard in range(num_shards):
        videos = [
            Made(
                video=f"{chr(97 + (shard * videos_per_shard + at) % 26)}{shard:03d}{at:03d}", count=2 + (shard + at) % 4
            )
            for at in range(videos_per_shard)
        ]
        number = write_shard(out / "shards" / f"{shard:04d}.parquet", videos, first_id=number, **options)
    return number
