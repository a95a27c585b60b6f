"""Layouts read back: every clip with its payload, its signals and its provenance, or a refusal by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.cli import printed_by, vidshard_exits
from tests.support.exports import (
    PAYLOADS,
    fastvideo_rows,
    lerobot_segments,
    made_output,
    rows_of_output,
    tar_samples,
)
from tests.support.lerobot import TASKS, TOP, WRIST, Shape, make_dataset
from tests.support.token_outputs import LATENTS, Made, provenance, write_shard

ACTIONS = ("--map", "action=actions")


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An output of each kind of payload."""
    folder = tmp_path_factory.mktemp("outputs")
    return lambda kind: folder / kind if (folder / kind).exists() else made_output(folder / kind, kind)


@pytest.mark.parametrize("kind", PAYLOADS)
def test_webdataset_holds_every_column_of_every_clip(outputs: Callable[[str], Path], kind: str, tmp_path: Path) -> None:
    out, payload = outputs(kind), PAYLOADS[kind]
    printed_by("export", out, tmp_path / "x", "--to", "webdataset")
    rows = rows_of_output(out, payload)
    samples = tar_samples(tmp_path / "x")
    assert sorted(sample["json"]["clip_id"] for sample in samples) == sorted(rows)
    for sample in samples:
        row = rows[sample["json"]["clip_id"]]
        assert sample["__key__"] == sample["json"]["clip_id"]
        for column in payload:
            exported = sample[f"{column.name}.npy"]
            assert exported.dtype == row[column.name].dtype
            assert np.array_equal(exported.view(np.uint8), row[column.name].view(np.uint8)), "bit for bit"
        assert np.array_equal(sample["actions.npy"], np.float32(row["actions"]))
        assert sample["json"]["vidshard"]["weights_sha256"] == "ab" * 32
        others = set(row) - {"actions"} - {column.name for column in payload}
        assert {name: sample["json"][name] for name in others if name != "poses"} == {
            name: row[name] for name in others if name != "poses"
        }


def test_webdatasets_own_reader_gives_the_samples(outputs: Callable[[str], Path], tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    printed_by("export", outputs("twin"), tmp_path, "--to", "webdataset")
    tars = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    read = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    mine = tar_samples(tmp_path)
    assert [sample["__key__"] for sample in read] == [sample["__key__"] for sample in mine]
    for theirs, sample in zip(read, mine, strict=True):
        assert theirs["json"] == sample["json"]
        assert all(np.array_equal(theirs[f"{c.name}.npy"], sample[f"{c.name}.npy"]) for c in PAYLOADS["twin"])


@pytest.mark.parametrize("kind", PAYLOADS)
def test_lance_gives_the_clips_of_an_episode_in_order(
    outputs: Callable[[str], Path], kind: str, tmp_path: Path
) -> None:
    lance = pytest.importorskip("lance")
    out, payload = outputs(kind), PAYLOADS[kind]
    printed_by("export", out, tmp_path / "x", "--to", "lance", *ACTIONS)
    table = lance.dataset(str(tmp_path / "x/clips.lance")).to_table()
    rows = rows_of_output(out, payload)
    assert sorted(table["clip_id"].to_pylist()) == sorted(rows)
    assert (np.diff(table["episode_idx"].to_numpy()) >= 0).all()
    before: dict[str, Any] = {}
    for at, clip in enumerate(table.drop_columns([c.name for c in payload]).to_pylist()):
        row = rows[clip["clip_id"]]
        for column in payload:
            exported = table[column.name][at].values.to_numpy(zero_copy_only=False)
            assert np.array_equal(exported.view(np.uint8), row[column.name].reshape(-1).view(np.uint8)), "bit for bit"
        assert clip["action"] == np.float32(row["actions"]).reshape(-1).tolist()
        assert (clip["caption"], clip["geometry_policy"]) == (row["caption"], "crop")
        if clip["step_idx"]:
            assert (clip["video_id"], clip["clip_index"]) == (before["video_id"], before["clip_index"] + 1)
        else:
            assert not at or clip["episode_idx"] == before["episode_idx"] + 1
        before = clip
    assert table.schema.metadata[b"vidshard.weights_sha256"] == b"ab" * 32
    assert json.loads(table.schema.field(payload[0].name).metadata[b"shape"]) == list(payload[0].shape)


def test_fastvideo_gets_latents_texts_and_conditions(outputs: Callable[[str], Path], tmp_path: Path) -> None:
    out = outputs("kl")
    said = printed_by("export", out, tmp_path / "x", "--to", "fastvideo", "--map", "mouse_cond=actions")
    assert "left out, as fastvideo has no place for it: latents_logvar" in said
    rows = rows_of_output(out, LATENTS)
    read = fastvideo_rows(tmp_path / "x")
    assert sorted(row["id"] for row in read) == sorted(rows)
    for row in read:
        mine = rows[row["id"]]
        assert np.array_equal(row["vae_latent"].numpy(), mine["latents"].astype(np.float32)), "float16 fits float32"
        assert np.array_equal(row["mouse_cond"].numpy(), np.float32(mine["actions"]))
        assert (row["caption"], row["width"], row["height"]) == (mine["caption"], 32, 32)
        assert (row["num_frames"], row["fps"], row["duration_sec"]) == (5, 4.0, 1.25)
        assert not row["text_embedding"].any()
    metadata = pq.read_schema(next((tmp_path / "x").glob("*.parquet"))).metadata
    assert json.loads(metadata[b"vidshard.tokenizer"])["name"] == "kl"


def test_lerobot_holds_consecutive_clips_as_segments_of_an_episode(
    outputs: Callable[[str], Path], tmp_path: Path
) -> None:
    out = outputs("kl")
    printed_by("export", out, tmp_path / "x", "--to", "lerobot-latents", *ACTIONS, "--map", "text=caption")
    rows = rows_of_output(out, LATENTS)
    segments = lerobot_segments(tmp_path / "x")
    seen = []
    for segment in segments:
        at = segment["start_frame"] // 5
        row = rows[segment["episode"]["clip_ids"][at]]
        seen.append(row["clip_id"])
        assert torch.equal(segment["latents"], torch.tensor(row["latents"]).to(torch.bfloat16))
        actions = np.asarray(row["actions"], np.float32)
        assert np.array_equal(segment["actions"][1:].reshape(-1, 2), actions[:4])
        assert (segment["text"], segment["fps"]) == (row["caption"], 4)
        assert segment["info"]["vidshard"]["vidshard.weights_sha256"] == "ab" * 32
    assert sorted(seen) == sorted(rows)


def test_lerobot_joins_a_continuous_sequence_and_leaves_out_what_has_no_start(tmp_path: Path) -> None:
    settings = provenance(LATENTS, run={"continuous": True})
    settings = type(settings)(**{**{n: getattr(settings, n) for n in settings.__slots__}, "tokenizer": _kl()})
    videos = [Made(video="a", count=3, continuous=True), Made(video="b", count=4, continuous=True, missing=(1,))]
    out = tmp_path / "shards"
    write_shard(out / "0.parquet", videos, payload=LATENTS, metadata=settings, signals=True)
    said = printed_by("export", out, tmp_path / "x", "--to", "lerobot-latents", *ACTIONS)
    assert "6 = 4 written + 2 refused" in said
    assert "2 x starts_inside" in said
    long, short = lerobot_segments(tmp_path / "x")
    assert (long["end_frame"], short["end_frame"]) == (5 + 8 + 8, 5)
    assert long["latents"].shape == (4, 6, 2, 2)
    assert long["latents"][0, :, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


def _kl() -> dict[str, Any]:
    from tests.support.exports import KL

    return KL | {"latent_channels": 4}


REFUSED = {
    "fastvideo takes no tokens": ("fsq18", ["fastvideo"], "holds one array of latents per clip.* have tokens"),
    "fastvideo takes one array": ("twin", ["fastvideo"], "have structure, dynamics_x, dynamics_y"),
    "lerobot-latents takes no tokens": ("fsq12", ["lerobot-latents", *ACTIONS], "holds one array of latents"),
    "lerobot-latents takes one array": ("twin", ["lerobot-latents", *ACTIONS], "have structure"),
    "lerobot-latents needs actions": ("kl", ["lerobot-latents"], "needs action at each frame.*--map action=COLUMN"),
    "an unknown field": ("kl", ["fastvideo", "--map", "text=caption"], "has no such field; it has caption"),
    "an unknown column": ("kl", ["fastvideo", "--map", "caption=capton"], "did you mean caption"),
    "a column of another type": ("kl", ["fastvideo", "--map", "caption=actions"], "caption takes text"),
    "a text for a signal": ("kl", ["lance", "--map", "action=caption"], "numbers for each frame|pylance"),
    "an unknown column in a filter": ("kl", ["webdataset", "--where", "source_fsp > 2"], "did you mean"),
    "a filter that nothing passes": ("kl", ["webdataset", "--where", "source_fps > 99"], "passes none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_layout_cannot_hold_is_refused_by_name(
    outputs: Callable[[str], Path], case: str, tmp_path: Path
) -> None:
    kind, (layout, *more), said = REFUSED[case]
    code, text = vidshard_exits("export", outputs(kind), tmp_path / "x", "--to", layout, *more)
    assert code == 2
    assert "Traceback" not in text
    assert __import__("re").search(said, " ".join(text.split())), text
    assert not (tmp_path / "x").exists(), "nothing is written"


@pytest.mark.parametrize("layout", ["fastvideo", "lerobot-latents", "lance"])
def test_several_frame_sizes_are_refused_and_one_of_them_is_exported(layout: str, tmp_path: Path) -> None:
    if layout == "lance":
        pytest.importorskip("lance")
    out = tmp_path / "out"
    wide = tuple(type(column)(name=column.name, shape=(4, 2, 2, 3), dtype="float16") for column in LATENTS)
    for name, payload in (("0", LATENTS), ("1", wide)):
        made = provenance(payload, tokenizer=_kl())
        write_shard(out / f"{name}.parquet", [Made(video=f"v{name}")], payload=payload, metadata=made, signals=True)
    arguments = ["export", out, tmp_path / "x", "--to", layout, *(() if layout == "fastvideo" else ACTIONS)]
    code, text = vidshard_exits(*arguments)
    assert code == 2
    assert "holds clips of one shape, and these have 2" in " ".join(text.split())
    assert "8 = 4 written + 4 left out by --where" in printed_by(*arguments, "--where", "video_id = 'v1'")


def test_a_clip_with_repeated_frames_is_refused_where_the_layout_cannot_say_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_shard(out / "0.parquet", [Made(video="v")], payload=LATENTS, metadata=provenance(LATENTS, tokenizer=_kl()))
    table = pq.read_table(out / "0.parquet")
    at = table.column_names.index("num_valid_frames")
    field = table.schema.field(at)
    table = table.set_column(at, field, pa.array([5, 5, 5, 3], field.type))
    pq.write_table(table, out / "0.parquet")
    said = printed_by("export", out, tmp_path / "a", "--to", "fastvideo")
    assert "4 = 3 written + 1 refused" in said
    assert "1 x padded" in said
    assert "4 = 4 written files" in printed_by("export", out, tmp_path / "b", "--to", "webdataset")


@pytest.mark.parametrize(
    "value", [None, [[1.0, 2.0]], [[1.0], [2.0, 3.0], [1.0], [1.0], [1.0]], [[float("nan")] * 2] * 5]
)
def test_a_clip_whose_signal_is_missing_or_uneven_is_refused_with_the_reason(value: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = provenance(LATENTS, tokenizer=_kl())
    write_shard(out / "0.parquet", [Made(video="v")], payload=LATENTS, metadata=made, signals=True)
    table = pq.read_table(out / "0.parquet")
    at = table.column_names.index("actions")
    values = table["actions"].to_pylist()
    values[3] = value
    table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    pq.write_table(table, out / "0.parquet")
    said = printed_by("export", out, tmp_path / "x", "--to", "lerobot-latents", *ACTIONS)
    assert "4 = 3 written + 1 refused" in said
    assert f"1 x {'no_value' if value is None else 'uneven_signal'}" in said
    assert len(lerobot_segments(tmp_path / "x")) == 3


def test_latents_of_a_lerobot_dataset_are_written_beside_it(tmp_path: Path) -> None:
    """The trainer finds each segment by episode, camera and frames, and its actions in the dataset's own rows."""
    root = make_dataset(tmp_path / "data", Shape(version="v2.1", fps=20, lengths=(21, 32)))
    files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    settings = ("--tokenizer", "tiny_kl", "--fps", "10", "--frames", "5", "--size", "32", "--tail", "drop", "--local")
    printed_by("tokenize", f"lerobot:{root}", "--out", tmp_path / "out", *settings)
    # the videos of both cameras have the same bytes, and are no copies of each other
    assert "10 = 10 written" in printed_by("export", tmp_path / "out", root, "--to", "lerobot-latents")
    changed = {path for path, data in files.items() if path.read_bytes() != data}
    assert changed == {root / "meta/episodes.jsonl"}
    episodes = [json.loads(line) for line in (root / "meta/episodes.jsonl").read_text().splitlines()]
    bounds = [[(c["start_frame"], c["end_frame"]) for c in episode["action_config"]] for episode in episodes]
    assert bounds == [[(0, 10), (10, 20)], [(0, 10), (10, 20), (20, 30)]]
    payload = {(r["episode_index"], r["camera"], r["clip_index"]): r for r in _latents_of(tmp_path / "out")}
    for episode in episodes:
        number = episode["episode_index"]
        actions = pq.read_table(root / f"data/chunk-000/episode_{number:06d}.parquet")["action"].to_pylist()
        for camera in (TOP, WRIST):
            for at, segment in enumerate(episode["action_config"]):
                start, end = segment["start_frame"], segment["end_frame"]
                path = root / f"latents/chunk-000/{camera}/episode_{number:06d}_{start}_{end}.pth"
                content = torch.load(path, weights_only=True)
                assert content["frame_ids"] == list(range(start, start + 10, 2))
                assert (content["fps"], content["ori_fps"]) == (10, 20)
                assert content["text"] == segment["action_text"] == TASKS[number % 2]
                row = payload[number, camera, at]
                assert [actions[frame] for frame in content["frame_ids"]] == row["action"]
                T, H, W = (content[f"latent_{name}"] for name in ("num_frames", "height", "width"))
                latents = content["latent"].reshape(T, H, W, -1).permute(3, 0, 1, 2)
                assert torch.equal(latents.reshape(-1), torch.tensor(row["latents"]).to(torch.bfloat16))
    again = printed_by("export", tmp_path / "out", root, "--to", "lerobot-latents")
    assert "nothing new was written" in again


def _latents_of(out: Path) -> list[dict[str, Any]]:
    return [row for path in (out / "shards").glob("*.parquet") for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize(
    ("version", "fps", "said"), [("v3.0", "10", "of version 3"), ("v2.1", "8", "divides the dataset's")]
)
def test_a_dataset_that_the_trainer_cannot_read_gets_no_latents(
    tmp_path: Path, version: str, fps: str, said: str
) -> None:
    root = make_dataset(tmp_path / "data", Shape(version=version, lengths=(10,), data_files=(0,), files={TOP: (0,)}))
    settings = ("--tokenizer", "tiny_kl", "--fps", fps, "--frames", "5", "--size", "32", "--local")
    printed_by("tokenize", f"lerobot:{root}", "--out", tmp_path / "out", *settings)
    code, text = vidshard_exits("export", tmp_path / "out", root, "--to", "lerobot-latents")
    assert code == 2
    assert said in " ".join(text.split())
    assert not (root / "latents").exists()
