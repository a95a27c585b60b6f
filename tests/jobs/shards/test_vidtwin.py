"""Clips of VidTwin in shards: three latents that any reader finds, decoded whole, by part and crossed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.cli import printed_by
from tests.support.markdown import ROOT, blocks_of
from tests.support.shared import SHARED
from tests.support.videos import Recipe, write_video
from vidshard.models.tokenizer import PRESETS, Tokenizer, output_to_frames
from vidshard.models.weights import load_tokenizer
from vidshard.pipeline.open_output import open_output
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.shard_reader import StoredClip, decodable

CONFIG = PRESETS["vidtwin_tiny"]
LATENTS = ("structure", "dynamics_x", "dynamics_y")
SHAPES = {column.name: list(column.shape) for column in CONFIG.payload(*CONFIG.default_clip, keep_logvar=True)}
RUN = ("--tokenizer", CONFIG.name, "--random-weights", 0, "--fps", 8, "--local")


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with log-variances: clips of two videos, the last of each padded."""
    folder = tmp_path_factory.mktemp("vidtwin")
    (folder / "videos").mkdir()
    for number in range(2):
        recipe = Recipe(num_frames=22 + number, rate=Fraction(10), width=96, height=64)
        write_video(folder / "videos" / f"{number}.mp4", recipe)
    printed_by("tokenize", folder / "videos", "--out", folder / "latents", *RUN, "--keep-logvar")
    return folder / "latents"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(CONFIG, None, seed=0)


def clips_of(out: Path) -> list[StoredClip]:
    """A clip of each video."""
    return list({clip.values["video_id"]: clip for clip in open_output(str(out)).clips()}.values())


def decoded(tokenizer: Tokenizer, payload: Mapping[str, np.ndarray], parts: tuple[str, ...] | None) -> np.ndarray:
    tensors = {name: torch.from_numpy(values.astype(np.float32))[None] for name, values in payload.items()}
    with torch.inference_mode():
        return output_to_frames(tokenizer.decode_payload(tensors, parts=parts))[0].numpy()


def test_the_parts_of_every_preset_are_its_decodable_columns_each_once() -> None:
    with_parts = [config for config in PRESETS.values() if config.parts]
    assert with_parts
    for config in with_parts:
        payload = decodable(config.payload(*config.default_clip, keep_logvar=config.has_logvar))
        assert [column for columns in config.parts.values() for column in columns] == [c.name for c in payload]


def test_the_lines_of_the_readme_find_the_latents_in_every_reader(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.chdir(latents.parent)
    pages = blocks_of(ROOT / "README.md")
    [block] = [block for block in pages if block.language == "python" and "tokens/shards" in block.text]
    read: dict[str, Any] = {}
    exec(block.text.replace("tokens/", "latents/"), read)
    stored = {clip.clip_id: clip.payload for clip in open_output(str(latents)).clips()}
    ids = read["table"]["clip_id"].to_pylist()
    assert ids == list(stored)
    assert set(read["payload"]) == {f"{name}{suffix}" for name in LATENTS for suffix in ("", "_logvar")}
    for name in LATENTS:
        values = read["payload"][name]
        assert values.dtype == np.float16
        np.testing.assert_array_equal(values, np.stack([payload[name] for payload in stored.values()]))
    relation = read["rows"]
    by_reader = {
        "duckdb": [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()],
        "polars": read["frame"].to_dicts(),
        "datasets": list(read["dataset"]),
    }
    for reader, rows in by_reader.items():
        assert [row["clip_id"] for row in rows] == ids, reader
        for name in read["payload"]:
            values = np.array([row[name] for row in rows], np.float16)
            np.testing.assert_array_equal(values, read["payload"][name].reshape(len(ids), -1), reader)


def test_every_latent_states_its_shape_and_has_its_log_variance_beside_it(latents: Path) -> None:
    [path] = shard_paths(str(latents))
    schema = pq.read_schema(path)
    shapes = {f.name: json.loads(f.metadata[b"shape"]) for f in schema if f.metadata and b"shape" in f.metadata}
    assert shapes == SHAPES
    assert list(shapes) == [f"{name}{suffix}" for name in LATENTS for suffix in ("", "_logvar")]
    assert all(shapes[name] == shapes[f"{name}_logvar"] for name in LATENTS)
    assert len(shapes["structure"]) == 4, "queries, rows, columns, channels"
    assert shapes["dynamics_x"][0] == CONFIG.default_clip.num_frames, "frames, positions, channels"


def test_clips_decode_whole_by_part_and_crossed_as_the_model_decodes_them(latents: Path, tokenizer: Tokenizer) -> None:
    output = open_output(str(latents))
    a, b = clips_of(latents)
    for parts in (None, ("structure",), ("dynamics",)):
        np.testing.assert_array_equal(output.reconstruct(a, parts=parts), decoded(tokenizer, a.payload, parts))
    crossed = {**b.payload, "structure": a.payload["structure"]}
    np.testing.assert_array_equal(output.cross(structure=a, dynamics=b), decoded(tokenizer, crossed, None))


def test_the_command_decodes_parts_crosses_and_shows_them_side_by_side(latents: Path, tmp_path: Path) -> None:
    a, b = (clip.clip_id for clip in clips_of(latents))
    file = tmp_path / "v.mp4"
    shown = {
        "whole": ("--clip", a, "--side-by-side"),
        "dynamics": ("--clip", a, "--only", "dynamics"),
        "crossed": ("--structure", a, "--dynamics", b, "--side-by-side"),
    }
    widths = {}
    for name, arguments in shown.items():
        printed_by("decode", latents, *arguments, "--to", file)
        with av.open(str(file)) as container:
            widths[name] = container.streams.video[0].width // CONFIG.default_clip.width
    assert widths == {"whole": 4, "dynamics": 1, "crossed": 3}
    refusals: dict[tuple[object, ...], str] = {
        ("--structure", a, "--to", file): "there is none for dynamics",
        ("--clip", a, "--only", "content", "--to", file): "no part 'content'; there are: structure, dynamics",
        ("--clip", a, "--tile-size", 128, "--to", file): "vidtwin_tiny decodes whole frames only",
        ("--structure", a, "--dynamics", "zzz", "--to", file): "no clip whose id begins with 'zzz'",
    }
    for refused, words in refusals.items():
        assert words in printed_by("decode", latents, *refused, code=2)


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "videos").is_dir(), reason=f"no real clips at {SHARED / 'videos'}")
def test_real_clips_decode_whole_by_part_and_crossed(tmp_path: Path) -> None:
    out, file = tmp_path / "latents", tmp_path / "v.mp4"
    printed_by("tokenize", SHARED / "videos" / "carphone_pristine.mp4", "--out", out, *RUN)
    first, second, *_ = (clip.clip_id for clip in open_output(str(out)).clips())
    for arguments in (
        ("--clip", first),
        ("--clip", first, "--only", "structure"),
        ("--clip", first, "--only", "dynamics"),
        ("--structure", first, "--dynamics", second),
    ):
        printed_by("decode", out, *arguments, "--to", file)
        with av.open(str(file)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert np.stack(frames).shape == (*CONFIG.default_clip, 3)
        file.unlink()
    assert ": 0 of" in printed_by("verify", out, "--exact", 0.2)


def test_verify_and_inspect_know_every_latent(latents: Path) -> None:
    printed = printed_by("verify", latents, "--exact", 0.5)
    assert "0 of" in printed
    printed = printed_by("inspect", latents)
    for name in LATENTS:
        assert f"{name} fixed_size_list<element: halffloat>[{np.prod(SHAPES[name])}] shape" in printed
        assert f"{name} float16 [" in printed


def changed(latents: Path, folder: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """The shard of an output, changed, in a folder of its own."""
    [path] = shard_paths(str(latents))
    pq.write_table(change(pq.read_table(path)), folder / "shard.parquet")
    return folder


def without_dynamics_y(table: pa.Table) -> pa.Table:
    return table.drop_columns(["dynamics_y"])


def without_dynamics(table: pa.Table) -> pa.Table:
    """As if software had stored the structure alone, and said so."""
    columns = [{"name": "structure", "shape": SHAPES["structure"], "dtype": "float16", "codebook_size": None}]
    kept = table.drop_columns([name for name in table.column_names if name.startswith("dynamics")])
    return kept.replace_schema_metadata({**kept.schema.metadata, b"vidshard.payloads": json.dumps(columns).encode()})


def with_nan(table: pa.Table) -> pa.Table:
    values = table["dynamics_x"].combine_chunks().flatten().to_numpy().copy()
    values[7] = np.nan
    field = table.schema.field("dynamics_x")
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), type=field.type)
    return table.set_column(table.schema.get_field_index("dynamics_x"), field, column)


def with_another_logvar(table: pa.Table) -> pa.Table:
    name = "dynamics_x_logvar"
    values = table[name].combine_chunks().flatten().to_numpy() + np.float16(0.5)
    field = table.schema.field(name)
    column = pa.FixedSizeListArray.from_arrays(pa.array(values), type=field.type)
    return table.set_column(table.schema.get_field_index(name), field, column)


def test_clips_that_are_encoded_again_have_the_stored_log_variances(latents: Path, tmp_path: Path) -> None:
    assert "0 of 6,912 values differ" in printed_by("verify", changed(latents, tmp_path, lambda t: t), "--exact", 1)
    printed = printed_by("verify", changed(latents, tmp_path, with_another_logvar), "--exact", 1, code=1)
    assert "192 of 6,912 values differ" in printed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_dynamics_y, "column 'dynamics_y' is missing"),
        (
            without_dynamics,
            f"and vidtwin_tiny decodes structure {SHAPES['structure']} + dynamics_x",
        ),
        (with_nan, "it holds dynamics_x that are not finite numbers"),
    ],
)
def test_latents_that_are_missing_or_no_numbers_are_named_and_not_decoded(
    latents: Path, tmp_path: Path, change: Callable[[pa.Table], pa.Table], words: str
) -> None:
    shards = changed(latents, tmp_path, change)
    a, b = (clip.clip_id for clip in clips_of(latents))
    for arguments in (("--clip", a), ("--clip", a, "--only", "dynamics"), ("--structure", a, "--dynamics", b)):
        assert words in printed_by("decode", shards, *arguments, "--to", tmp_path / "v.mp4", code=2)
    assert not (tmp_path / "v.mp4").exists()
    if change is with_nan:
        assert words in printed_by("verify", shards, code=1)
