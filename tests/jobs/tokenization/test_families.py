"""A family of tokenizers that the pipeline never saw, with three payloads a clip, through every command."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch import Tensor

from tests.support.cli import vidshard_exits
from tests.support.toy_family import LEVELS, NUM_FRAMES, SIZE, TOY, TOY_CONFIG, Toy, ToyEncoded
from tests.support.videos import Recipe, write_video
from vidshard.models import tokenizer as models
from vidshard.models.tokenizer import parse_config
from vidshard.models.vidtok.tiling import Tiling
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.shard_reader import open_shard, read_clips
from vidshard.schemas.tokens import FORMAT_VERSIONS, PayloadColumn, latents_payload, parse_payload, tokens_payload
from vidshard.schemas.tokens import payload_record as record_of

RUN = ("--tokenizer", "toy", "--random-weights", "0", "--fps", "4", "--frames", NUM_FRAMES, "--size", SIZE, "--local")


@pytest.fixture(autouse=True)
def toy_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.FAMILIES, "toy", TOY)
    monkeypatch.setitem(models.PRESETS, "toy", TOY_CONFIG)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "v.mp4", Recipe(num_frames=30, rate=Fraction(10)))
    code, printed = vidshard_exits("tokenize", tmp_path / "videos", "--out", tmp_path / "out", *RUN)
    assert code == 0, printed
    assert "[3, 4, 4] float16 structure, [4] float16 motion, [4] tokens below 300" in printed
    return tmp_path / "out"


def test_every_payload_is_a_column_with_its_own_type_and_shape(output: Path) -> None:
    [path] = shard_paths(str(output))
    schema = pq.read_schema(path)
    expected = {"structure": (pa.float16(), [3, 4, 4]), "motion": (pa.float16(), [4]), "tokens": (pa.uint16(), [4])}
    for name, (kind, shape) in expected.items():
        assert schema.field(name).type == pa.list_(kind, int(np.prod(shape)))
        assert json.loads(schema.field(name).metadata[b"shape"]) == shape
    assert schema.metadata[b"vidshard.format_version"] == str(FORMAT_VERSIONS[-1]).encode()
    with open_shard(path) as (_, provenance):
        assert provenance.payload == TOY_CONFIG.payload(NUM_FRAMES, SIZE, SIZE)
        assert parse_config(provenance.tokenizer) == TOY_CONFIG
    for clip in read_clips(path):
        assert {name: values.shape for name, values in clip.payload.items()} == {
            "structure": (3, 4, 4),
            "motion": (4,),
            "tokens": (4,),
        }
        # motion is what tokens are beside their mean: the columns belong to one another
        bright = clip.payload["tokens"] / (LEVELS - 1) * 2 - 1
        np.testing.assert_allclose(clip.payload["motion"], bright - bright.mean(), atol=0.01)


def test_all_commands_work_on_several_payloads(output: Path, tmp_path: Path) -> None:
    before = {path: Path(path).read_bytes() for path in shard_paths(str(output))}
    code, printed = vidshard_exits("tokenize", tmp_path / "videos", "--out", output, *RUN)
    assert code == 0, printed
    assert {path: Path(path).read_bytes() for path in shard_paths(str(output))} == before
    code, printed = vidshard_exits("verify", output, "--exact", 1)
    assert code == 0, printed
    assert "encoded 3 clips again" in printed
    assert ": 0 of" in printed
    code, printed = vidshard_exits("inspect", output)
    assert code == 0, printed
    assert all(f"{name} " in printed for name in ("structure", "motion", "tokens"))
    assert "of 300 tokens used" in printed
    code, printed = vidshard_exits("decode", output, "--all", tmp_path / "clips", "--each-clip")
    assert code == 0, printed
    clips = sorted((tmp_path / "clips").glob("*.mp4"))
    assert len(clips) == 3
    with av.open(str(clips[0])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == NUM_FRAMES
    assert frames[0].shape == (SIZE, SIZE, 3)


def test_a_changed_payload_of_any_name_is_found(output: Path) -> None:
    [path] = shard_paths(str(output))
    table = pq.read_table(path)
    flat = table["motion"].combine_chunks().flatten().to_numpy().copy()
    flat[0] += 0.5
    column = pa.FixedSizeListArray.from_arrays(pa.array(flat), type=table.schema.field("motion").type)
    changed = table.set_column(table.schema.get_field_index("motion"), table.schema.field("motion"), column)
    pq.write_table(changed, path)
    code, printed = vidshard_exits("verify", output, "--exact", 1)
    assert code == 1, printed
    assert "1 of" in printed


def test_a_family_that_is_not_there_is_named(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(models.FAMILIES, "toy")
    code, printed = vidshard_exits("decode", output, "--all", output / "clips", "--each-clip")
    assert code == 2
    assert "unknown tokenizer family 'toy'" in printed


def test_refusals_of_a_family_reach_the_user(tmp_path: Path) -> None:
    code, printed = vidshard_exits("tokenize", "v.mp4", "--out", tmp_path, *RUN, "--frames", 5)
    assert code == 2
    assert "toy: clips have 4 frames, got 5" in printed
    code, printed = vidshard_exits("tokenize", "v.mp4", "--out", tmp_path, *RUN, "--continuous")
    assert code == 2
    assert "toy is not causal" in printed


@pytest.mark.parametrize(
    "payload",
    [
        tokens_payload((2, 4, 4), 32768),
        latents_payload((4, 2, 4, 4), keep_logvar=False),
        latents_payload((4, 2, 4, 4), keep_logvar=True),
        (PayloadColumn(name="structure", shape=(3, 4), dtype="float16"),),
        TOY_CONFIG.payload(NUM_FRAMES, SIZE, SIZE),
    ],
)
def test_a_payload_comes_back_from_its_record(payload: tuple[PayloadColumn, ...]) -> None:
    record = json.loads(json.dumps(record_of(payload)))
    assert parse_payload(record) == payload
    assert ("payloads" in record) == (payload[0].name not in ("tokens", "latents"))


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"payload": "tokens", "shape": [2], "codebook_size": None},
        {"payloads": []},
        {"payloads": [{"name": "a"}]},
        {"payloads": [{"name": "a", "shape": [0], "dtype": "float16"}]},
        {"payloads": [{"name": "a", "shape": [1], "dtype": "uint8"}]},
        {"payloads": [{"name": "a", "shape": [1], "dtype": "float16"}] * 2},
    ],
)
def test_a_record_that_describes_no_payload_is_refused(record: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_payload(record)


def test_a_local_run_takes_no_cluster(tmp_path: Path) -> None:
    code, printed = vidshard_exits("tokenize", "v.mp4", "--out", tmp_path / "out", *RUN, "--ray-address", "auto")
    assert code == 2
    assert "--local runs without Ray" in printed
    assert not (tmp_path / "out").exists()


def test_a_defect_in_a_local_run_is_named_and_what_is_committed_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Toy, x_BCTHW: Tensor, *, tiling: Tiling | None = None) -> ToyEncoded:
        raise RuntimeError("a layer is missing")

    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "v.mp4", Recipe(num_frames=30, rate=Fraction(10)))
    monkeypatch.setattr(Toy, "encode", broken)
    code, printed = vidshard_exits("tokenize", tmp_path / "videos", "--out", tmp_path / "out", *RUN)
    assert code == 1
    assert "the run stopped: RuntimeError: a layer is missing; what is committed is valid" in printed
    monkeypatch.undo()
    monkeypatch.setitem(models.FAMILIES, "toy", TOY)
    monkeypatch.setitem(models.PRESETS, "toy", TOY_CONFIG)
    code, printed = vidshard_exits("tokenize", tmp_path / "videos", "--out", tmp_path / "out", *RUN)
    assert code == 0, printed
    assert "3 written in 1 shard" in printed
