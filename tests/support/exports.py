"""Exports read back: by the readers of each layout, as far as this environment has them, or by the rules of their code.

The rules are those of FastVideo's ``collate_rows_from_parquet_schema`` and of LingBot-VA's ``LatentLeRobotDataset``.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tests.support.token_outputs import LATENTS, TOKENIZER, TOKENS, TWIN, provenance, write_output
from vidshard.schemas.tokens import Payload, tokens_payload

KL = {name: value for name, value in TOKENIZER.items() if name != "fsq_levels"} | {"name": "kl", "head": "kl"}
PAYLOADS: dict[str, Payload] = {
    "fsq12": tokens_payload((2, 2, 3), 1 << 12),
    "fsq15": tokens_payload((2, 2, 3), 1 << 15),
    "fsq18": TOKENS,
    "kl": LATENTS,
    "twin": TWIN,
}


def made_output(out: Path, kind: str, *, num_shards: int = 3, videos_per_shard: int = 4) -> Path:
    """Write an output of random values of a kind of `PAYLOADS`, in ``out``."""
    payload = PAYLOADS[kind]
    tokenizer = KL | {"latent_channels": 4} if kind == "kl" else TOKENIZER
    metadata = provenance(payload, tokenizer=tokenizer)
    sizes = {"num_shards": num_shards, "videos_per_shard": videos_per_shard}
    write_output(out, **sizes, payload=payload, metadata=metadata, signals=True)
    random = np.random.default_rng(0)
    for path in sorted((out / "shards").iterdir()):
        table = pq.read_table(path)
        for column in payload:
            shape = (table.num_rows * column.num_values,)
            if column.codebook_size is not None:
                values = random.integers(0, column.codebook_size, shape).astype(column.dtype)
            else:  # every exponent of float16, subnormal numbers included
                values = (random.normal(size=shape) * 2.0 ** random.integers(-24, 14, shape)).astype(np.float16)
            array = pa.FixedSizeListArray.from_arrays(pa.array(values), type=column.arrow_type)
            at = table.column_names.index(column.name)
            table = table.set_column(at, table.schema.field(at), array)
        pq.write_table(table, path, row_group_size=3, compression="zstd", write_page_checksum=True)
    return out


def rows_of_output(out: Path, payload: Payload) -> dict[str, dict[str, Any]]:
    """Rows of an output by clip id, read with pyarrow alone; payloads as arrays of their shape."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((out / "shards").iterdir()):
        table = pq.read_table(path)
        arrays = {c.name: _array(table[c.name], c.shape) for c in payload}
        for at, row in enumerate(table.drop_columns(list(arrays)).to_pylist()):
            found[row["clip_id"]] = row | {name: values[at] for name, values in arrays.items()}
    return found


def _array(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    values: np.ndarray = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, *shape)


def tar_samples(dest: Path) -> list[dict[str, Any]]:
    """Samples of tar files: JSON values and arrays by the rest of the member's name after its first dot."""
    samples: dict[str, dict[str, Any]] = defaultdict(dict)
    for path in sorted(dest.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                assert name not in samples[key], member.name
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                samples[key][name] = json.loads(data) if name == "json" else np.load(io.BytesIO(data))
    return [{"__key__": key, **sample} for key, sample in samples.items()]


def fastvideo_rows(dest: Path, text_length: int = 6) -> list[dict[str, Any]]:
    """Rows as FastVideo's trainers get them: tensors are float32 whatever their dtype says, texts are padded."""
    found = []
    for path in sorted(dest.rglob("*.parquet")):
        table = pq.read_table(path)
        tensors = [name.removesuffix("_bytes") for name in table.column_names if name.endswith("_bytes")]
        for row in table.to_pylist():
            for name in tensors:
                data, shape = row.pop(f"{name}_bytes"), row.pop(f"{name}_shape")
                assert row.pop(f"{name}_dtype") == "float32"
                row[name] = torch.from_numpy(np.frombuffer(data, np.float32).reshape(shape).copy())
            text = row["text_embedding"]
            assert text.ndim == 2
            missing = max(0, text_length - len(text))
            row["text_embedding"] = torch.cat([text, torch.zeros(missing, text.shape[1])])[:text_length]
            found.append(row)
    if found:
        torch.stack([row["vae_latent"] for row in found])
        torch.stack([row["text_embedding"] for row in found])
    return found


def lerobot_segments(dest: Path) -> list[dict[str, Any]]:
    """Segments as LingBot-VA's loader gets them, with the checks that it makes.

    ``latents`` is (C, T', H', W'), ``actions`` (T', 4, D): the actions of the frames of each
    latent, zero for the first.
    """
    assert [path.parent.parent for path in dest.rglob("info.json")] == [dest]
    info = json.loads((dest / "meta/info.json").read_text())
    lines = {
        name: [json.loads(line) for line in (dest / f"meta/{name}.jsonl").read_text().splitlines()]
        for name in ("episodes", "episodes_stats", "tasks")
    }
    assert info["codebase_version"] == "v2.1"
    assert [e["episode_index"] for e in lines["episodes"]] == list(range(info["total_episodes"]))
    assert [e["episode_index"] for e in lines["episodes_stats"]] == list(range(info["total_episodes"]))
    assert sum(e["length"] for e in lines["episodes"]) == info["total_frames"]
    tasks = {line["task_index"]: line["task"] for line in lines["tasks"]}
    assert len(tasks) == info["total_tasks"]
    found, frames = [], 0
    for episode in lines["episodes"]:
        number = episode["episode_index"]
        place = {"episode_chunk": number // info["chunks_size"], "episode_index": number}
        data = pq.read_table(dest / info["data_path"].format(**place))
        assert set(data.column_names) == set(info["features"])
        assert data.num_rows == episode["length"]
        assert data["index"].to_pylist() == list(range(frames, frames + data.num_rows))
        assert data["frame_index"].to_pylist() == list(range(data.num_rows))
        times = data["timestamp"].to_numpy()
        assert np.allclose(np.diff(times), 1 / info["fps"], atol=1e-4)
        assert {tasks[index] for index in data["task_index"].to_pylist()} == set(episode["tasks"])
        frames += data.num_rows
        actions = np.array(data["action"].to_pylist(), np.float32)
        assert actions.shape == (data.num_rows, *info["features"]["action"]["shape"])
        for segment in episode["action_config"]:
            start, end = segment["start_frame"], segment["end_frame"]
            folder = dest / f"latents/chunk-{place['episode_chunk']:03d}"
            [camera] = list(folder.iterdir())
            path = camera / f"episode_{number:06d}_{start}_{end}.pth"
            content = torch.load(path, weights_only=True)
            assert (content["start_frame"], content["end_frame"], content["text"]) == (
                start,
                end,
                segment["action_text"],
            )
            T, H, W = (content[f"latent_{name}"] for name in ("num_frames", "height", "width"))
            latents = content["latent"].reshape(T, H, W, -1).permute(3, 0, 1, 2)
            assert content["text_emb"].ndim == 2
            ids = content["frame_ids"]
            stride = ids[1] - ids[0]
            mine = np.pad(actions[start:end][ids[0] - start :], ((stride * 4, 0), (0, 0)))
            needed = ((len(ids) - 1) // 4 + 1) * stride * 4
            assert (len(ids) - 1) // 4 + 1 == T
            assert len(mine[:needed]) == needed
            found.append(
                {
                    **content,
                    "latents": latents,
                    "actions": mine[:needed].reshape(T, 4, -1),
                    "episode": episode,
                    "info": info,
                }
            )
    return found


def files_of(dest: Path) -> dict[str, bytes]:
    """Files of an export by their path below it, without its state."""
    found = {str(path.relative_to(dest)): path for path in dest.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith("vidshard-export")}
