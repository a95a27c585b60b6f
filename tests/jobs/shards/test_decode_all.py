"""`vidshard decode --all`: whole videos, joined without seams, resumed, with their gaps named."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vidshard
from tests.support.cli import SMALL, printed_by, run, tokenize, vidshard_exits
from tests.support.outputs import Killed, counted
from tests.support.token_outputs import Made, write_shard
from tests.support.videos import Recipe, write_video
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.stitching import Piece, plan_pieces
from vidshard.pipeline.video_file import write_video as write_file

LENGTHS = {"a": 30, "b": 20}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short videos and a file that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for name, num_frames in LENGTHS.items():
        write_video(folder / f"{name}.mp4", Recipe(num_frames=num_frames, rate=Fraction(10)))
    (folder / "text.mp4").write_text("no video\n" * 100)
    return folder


@pytest.fixture(scope="module")
def outputs(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The videos tokenized in several ways."""
    folder = tmp_path_factory.mktemp("outputs")
    ways = {"clips": (), "continuous": ("--continuous",), "overlapping": ("--stride-seconds", "0.75")}
    for name, more in ways.items():
        result = tokenize(videos, "--out", folder / name, *SMALL, *more, "--max-reject-share", "1")
        assert result.exit_code == 0, result.output
    return {name: folder / name for name in ways}


def decode(output: Path, target: Path, *more: object, code: int = 0) -> str:
    return printed_by("decode", output, "--all", target, "--local", *more, code=code)


def files_in(target: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in target.glob("*.mp4")}


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def expected_frames(output: Path, piece: Piece) -> np.ndarray:
    """Frames of the clips of a piece, each decoded by itself, without those that the clips before it hold."""
    opened = vidshard.open_output(str(output))
    clips = {clip.clip_id: clip for clip in opened.clips()}
    return np.concatenate([opened.reconstruct(clips[c.clip_id])[c.first : c.end] for c in piece.clips])


@pytest.mark.parametrize("way", ["clips", "continuous", "overlapping"])
def test_a_video_is_its_clips_in_order_without_a_seam(outputs: dict[str, Path], way: str, tmp_path: Path) -> None:
    decode(outputs[way], tmp_path)
    pieces, gaps = plan_pieces(shard_paths(str(outputs[way])))
    assert not gaps
    assert set(files_in(tmp_path)) == {f"{piece.name}.mp4" for piece in pieces}
    lines = [json.loads(line) for line in (tmp_path / "decoded.jsonl").read_text().splitlines()]
    assert sorted(Path(line["uri"]).stem for line in lines) == ["a", "b"]
    for piece in pieces:
        # 4 frames a second of a video of 10: every frame time is taken once, whatever the clips share
        assert piece.num_frames == len(np.arange(0, LENGTHS[Path(piece.uri).stem] / 10, 0.25))
        decoded, expected = frames_of(tmp_path / f"{piece.name}.mp4"), expected_frames(outputs[way], piece)
        assert decoded.shape == expected.shape
        nearest = [np.abs(expected.astype(int) - frame).mean(axis=(1, 2, 3)).argmin() for frame in decoded]
        assert nearest == list(range(len(expected))), "each frame is nearest to the one of its place"


def test_the_file_says_its_rate_and_its_colors_and_has_them(tmp_path: Path) -> None:
    bars = np.zeros((3, 64, 96, 3), np.uint8)
    colors = [(200, 30, 60), (20, 180, 40), (30, 60, 220), (230, 220, 20)]
    for at, color in enumerate(colors):
        bars[:, :, 24 * at : 24 * (at + 1)] = color
    assert write_file(tmp_path / "x.mp4", bars, Fraction(30000, 1001)) == 3
    with av.open(str(tmp_path / "x.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == Fraction(30000, 1001)
        context = stream.codec_context
        tags = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
        assert tags == (1, 1, 1, 1), "BT.709 in limited range"
    for clip in vidshard.sample_clips(str(tmp_path / "x.mp4"), fps=29.97, frames=1, size=(64, 96)):
        shown = clip.frames[0].astype(int)
        for at, color in enumerate(colors):
            assert np.abs(shown[20:44, 24 * at + 8 : 24 * at + 16].mean(axis=(0, 1)) - color).max() < 4, color


def test_a_second_run_writes_nothing_and_a_missing_or_other_file_is_made_again(
    outputs: dict[str, Path], tmp_path: Path
) -> None:
    decode(outputs["clips"], tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert "nothing new was written" in decode(outputs["clips"], tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    first, second = sorted(tmp_path.glob("*.mp4"))
    first.unlink()
    assert "1 written now" in decode(outputs["clips"], tmp_path)
    assert second.stat().st_mtime_ns == before[second]


def test_a_video_that_got_more_clips_meanwhile_is_made_again(outputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(outputs["clips"], out)
    [path] = (out / "shards").iterdir()
    whole = pq.read_table(path)
    pq.write_table(whole.filter(pa.compute.not_equal(whole["clip_index"], 2)), path)
    decode(out, tmp_path / "x")
    pq.write_table(whole, path)
    decode(out, tmp_path / "x")
    pieces, _ = plan_pieces([str(path)])
    assert set(files_in(tmp_path / "x")) == {f"{piece.name}.mp4" for piece in pieces}, "none is of the earlier state"
    for piece in pieces:
        assert len(frames_of(tmp_path / f"x/{piece.name}.mp4")) == piece.num_frames


def test_a_run_killed_before_any_write_goes_on_and_no_file_is_half(outputs: dict[str, Path], tmp_path: Path) -> None:
    decode(outputs["clips"], tmp_path / "whole")
    for last in (0, 1, 2):
        with counted(last), pytest.raises(Killed):
            run("decode", outputs["clips"], "--all", tmp_path / str(last), "--local")
        assert all(len(frames_of(path)) for path in (tmp_path / str(last)).glob("*.mp4"))
        decode(outputs["clips"], tmp_path / str(last))
        assert set(files_in(tmp_path / str(last))) == set(files_in(tmp_path / "whole"))
        for name in files_in(tmp_path / "whole"):
            assert len(frames_of(tmp_path / str(last) / name)) == len(frames_of(tmp_path / "whole" / name))


@pytest.mark.parametrize("way", ["clips", "continuous"])
def test_missing_clips_are_named_and_the_video_goes_on_in_another_file(
    outputs: dict[str, Path], way: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(outputs[way], out)
    [path] = (out / "shards").iterdir()
    table = pq.read_table(path)
    last = max(table["clip_index"].to_pylist())
    pq.write_table(table.filter(pa.compute.not_equal(table["clip_index"], last - 1)), path)
    said = decode(out, tmp_path / "x")
    assert f"clip {last - 1} missing (not tokenized)" in said or f"{last - 1} to" in said
    assert "rejected 1 x not_a_video" in said
    gaps = [json.loads(line) for line in (tmp_path / "x/gaps.jsonl").read_text().splitlines()]
    assert {gap["first_missing_clip"] for gap in gaps} <= {last - 1, 0}
    pieces, _ = plan_pieces([str(path)], lost_frames=3 if way == "continuous" else 0)
    for piece in pieces:
        num_frames = len(frames_of(tmp_path / f"x/{piece.name}.mp4"))
        assert num_frames == piece.num_frames, "no frame stands in for what is missing"
    assert any(piece.name.endswith(f"-from-{last:06d}") for piece in pieces)
    shutil.copy(outputs[way] / "shards" / path.name, path)
    decode(out, tmp_path / "x")
    assert not (tmp_path / "x/gaps.jsonl").exists()


def test_payload_parts_and_a_limit_apply_to_whole_videos(outputs: dict[str, Path], tmp_path: Path) -> None:
    assert "1 video in" in decode(outputs["clips"], tmp_path, "--limit", 1)
    assert len(files_in(tmp_path)) == 1
    code, said = vidshard_exits("decode", outputs["clips"], "--all", tmp_path, "--local", "--only", "structure")
    assert code == 2
    assert "no payload parts" in said


def test_an_object_store_takes_the_videos(s3: str, outputs: dict[str, Path], tmp_path: Path) -> None:
    from vidshard.pipeline import storage

    printed_by("decode", outputs["clips"], "--all", "s3://videos/decoded", "--local")
    pieces, _ = plan_pieces(shard_paths(str(outputs["clips"])))
    for piece in pieces:
        (tmp_path / "x.mp4").write_bytes(storage.read_bytes(f"s3://videos/decoded/{piece.name}.mp4"))
        assert len(frames_of(tmp_path / "x.mp4")) == piece.num_frames
    said = printed_by("decode", outputs["clips"], "--all", "s3://videos/decoded", "--local")
    assert "nothing new was written" in said


def test_other_weights_are_refused_before_a_file_is_written(outputs: dict[str, Path], tmp_path: Path) -> None:
    from vidshard.models.vidtok.config import PRESETS
    from vidshard.models.weights import load_tokenizer, save_tokenizer

    other = tmp_path / "other.safetensors"
    save_tokenizer(other, load_tokenizer(PRESETS["tiny"], None, seed=1))
    said = decode(outputs["clips"], tmp_path / "x", "--weights", other, code=2)
    assert "not those expected" in said
    assert not (tmp_path / "x").exists() or not files_in(tmp_path / "x")


def test_a_damaged_row_group_costs_its_videos_alone(outputs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(outputs["clips"], out)
    [path] = (out / "shards").iterdir()
    table = pq.read_table(path)
    ids = table["video_id"].to_pylist()
    pq.write_table(table, path, row_group_size=ids.count(ids[0]), write_page_checksum=True)
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(at) for at in range(group.num_columns)]
    [page] = [c.data_page_offset for c in columns if c.path_in_schema.startswith("tokens.")]
    data = bytearray(path.read_bytes())
    data[page + 60] ^= 1
    path.write_bytes(data)
    said = decode(out, tmp_path / "x", code=1)
    assert "could not be made" in said
    assert path.name in said
    assert len(files_in(tmp_path / "x")) == 1


HOSTILE = ["../../../etc/passwd", "/etc/passwd", "a.b", "a/b-000001", "..-000002", "", "\x1b[2J-000003", "A-000001"]


def test_ids_of_shards_never_become_paths() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "0.parquet"
        write_shard(path, [Made(video="v", count=len(HOSTILE))])
        table = pq.read_table(path)
        for name in ("clip_id", "video_id"):
            at = table.column_names.index(name)
            table = table.set_column(at, table.schema.field(at), pa.array(HOSTILE))
        pq.write_table(table, path)
        pieces, _ = plan_pieces([str(path)])
    names = [piece.name for piece in pieces]
    assert sum(len(piece.clips) for piece in pieces) == len(HOSTILE)
    assert len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for name in names)


@pytest.mark.parametrize(
    ("start", "joins"), [(1.25, True), (1.0, True), (1.1, False), (1.5, False), (0.0, True), (2.0, False)]
)
def test_clips_join_only_on_the_grid_of_the_frames(start: float, joins: bool, tmp_path: Path) -> None:
    path = tmp_path / "0.parquet"
    write_shard(path, [Made(video="v", count=2)])
    table = pq.read_table(path)
    at = table.column_names.index("start_seconds")
    table = table.set_column(at, table.schema.field(at), pa.array([0.0, start]))
    pq.write_table(table, path)
    pieces, _ = plan_pieces([str(path)])
    assert len(pieces) == (1 if joins else 2)
    if joins:  # 5 frames, and those of the second clip that the first one has not
        assert pieces[0].num_frames == 5 + round(4 * start)


def test_flags_of_whole_videos_need_all(outputs: dict[str, Path]) -> None:
    for more in (["--local"], ["--each-clip"], ["--workers", 2], ["--limit", 1]):
        code, said = vidshard_exits("decode", outputs["clips"], "--clip", "x", "--to", "x.mp4", *more)
        assert code == 2
        assert "belong to --all DIR" in said
