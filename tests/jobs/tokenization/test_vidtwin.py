"""VidTwin through the commands: its default clip, its columns, resuming, verifying, and what it refuses."""

from __future__ import annotations

import os
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.cli import vidshard_exits
from tests.support.golden import TWIN_TINY_B
from tests.support.videos import Recipe, write_video
from vidshard.models import tokenizer as models
from vidshard.models.tokenizer import frames_to_input, parse_config
from vidshard.models.vidtwin.config import PRESETS
from vidshard.models.vidtwin.model import checkpoint_name
from vidshard.models.weights import load_tokenizer, seeded_weights
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.shard_reader import open_shard, read_clips
from vidshard.pipeline.reconstruct import source_frames
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.schemas.runs import TokenizeRun

RUN = ("--tokenizer", TWIN_TINY_B.name, "--local")
RELEASED = "vidtwin_structure_7_7_8_dynamics_7_8"


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.PRESETS, TWIN_TINY_B.name, TWIN_TINY_B)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "v.mp4", Recipe(num_frames=14, rate=Fraction(10)))
    return folder


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_each_latent_is_a_column_with_its_log_variance(videos: Path, tmp_path: Path, precision: str) -> None:
    out = tmp_path / "out"
    flags = (*RUN, "--keep-logvar", "--precision", precision)
    code, printed = vidshard_exits("tokenize", videos, "--out", out, *flags)
    assert code == 0, printed
    assert "4x64x64 frames become [5, 2, 2, 6] float16 structure" in printed
    [path] = shard_paths(str(out))
    with open_shard(path) as (_, provenance):
        assert parse_config(provenance.tokenizer) == TWIN_TINY_B
        assert (provenance.run["frames"], provenance.run["size"], provenance.run["fps"]) == (4, "64x64", "8")
        resolved = ResolvedRun.from_provenance(provenance)
    tokenizer = resolved.load_tokenizer("cpu")
    clips = list(read_clips(path))
    assert len(clips) == 3
    columns = [f"{name}{suffix}" for name in TWIN_TINY_B.latent_shapes for suffix in ("", "_logvar")]
    rows = pq.read_table(path, columns=columns).to_pylist()
    for clip, row in zip(clips, rows, strict=True):
        frames = torch.from_numpy(source_frames(clip, resolved))[None]
        expected = tokenizer.encode(frames_to_input(frames, tokenizer.dtype)).payload
        assert {name: values.shape for name, values in clip.payload.items()} == TWIN_TINY_B.latent_shapes
        for name, values in row.items():
            stored = np.array(values, np.float16)
            np.testing.assert_array_equal(stored, expected[name].flatten().numpy().astype(np.float16))

    before = Path(path).read_bytes()
    code, printed = vidshard_exits("tokenize", videos, "--out", out, *flags)
    assert code == 0, printed
    assert "0 written in 0 shards" in printed
    assert [Path(p).read_bytes() for p in shard_paths(str(out))] == [before]
    code, printed = vidshard_exits("verify", out, "--exact", 1)
    assert code == 0, printed
    assert ": 0 of" in printed
    code, printed = vidshard_exits("inspect", out)
    assert code == 0, printed
    assert "shape [5, 2, 2, 6]" in printed
    assert "dynamics_y_logvar" in printed


def test_signals_lie_beside_the_latents_and_rejected_videos_leave_none(videos: Path, tmp_path: Path) -> None:
    seconds = np.arange(200) / 100
    np.savez(tmp_path / "a.npz", seconds=seconds, values=seconds[:, None].astype(np.float32))
    (tmp_path / "text.mp4").write_text("no video")
    manifest = tmp_path / "m.csv"
    manifest.write_text(f"uri,actions\n{videos / 'v.mp4'},a.npz\ntext.mp4,a.npz\n")
    out = tmp_path / "out"
    code, printed = vidshard_exits("tokenize", manifest, "--out", out, *RUN, "--signals", "actions=linear")
    assert code == 0, printed
    [path] = shard_paths(str(out))
    rows = pq.read_table(path).to_pylist()
    assert len(rows) == 3
    for row in rows:
        times = row["frame_pts_seconds"]
        np.testing.assert_allclose(np.ravel(row["actions"]), times, atol=1e-6)
        assert len(row["structure"]) == np.prod(TWIN_TINY_B.latent_shapes["structure"])
    assert "1 rejected" in printed


def test_a_run_in_one_precision_is_not_continued_in_another(videos: Path, tmp_path: Path) -> None:
    assert vidshard_exits("tokenize", videos, "--out", tmp_path / "out", *RUN)[0] == 0
    code, printed = vidshard_exits("tokenize", videos, "--out", tmp_path / "out", *RUN, "--precision", "bfloat16")
    assert code == 2
    assert "precision" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--frames", 17), f"{RELEASED}: clips have 16 frames, no other length; got 17"),
        (("--frames", 12), "clips have 16 frames, no other length; got 12. Or fill up every clip: --pad-frames"),
        (("--frames", 20, "--pad-frames", "repeat-last"), f"{RELEASED}: clips have 16 frames, and shorter ones"),
        (("--size", 256), f"{RELEASED}: frames are 224x224, no other size; got 256x256"),
        (("--size", "224x256"), f"{RELEASED}: frames are 224x224, no other size; got 224x256"),
        (("--buckets", "224x224,256x256"), f"{RELEASED}: frames are 224x224, no other size; got 256x256"),
        (("--continuous",), f"{RELEASED} is not causal"),
        (("--tile-size", 128), f"{RELEASED} takes whole frames of 224x224 only, no tiles"),
        (("--tile-size", 224), f"{RELEASED} takes whole frames of 224x224 only, no tiles"),
    ],
)
def test_clips_streams_and_tiles_that_the_model_does_not_take_are_refused(
    tmp_path: Path, flags: tuple[object, ...], message: str
) -> None:
    run = ("--tokenizer", RELEASED, "--random-weights", 0, "--local")
    code, printed = vidshard_exits("tokenize", "v.mp4", "--out", tmp_path / "out", *run, *flags)
    assert code == 2
    assert message in " ".join(printed.split())
    assert not (tmp_path / "out").exists()


class Executes:
    """A pickled object whose loading would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("tokenize", "another setting"),
        ("tokenize", "another size"),
        ("tokenize", "pickle that executes"),
        ("tokenize", "bytes"),
        ("convert", "another setting"),
        ("convert", "pickle that executes"),
    ],
)
def test_weights_that_do_not_fit_or_would_execute_end_in_one_message(
    videos: Path, tmp_path: Path, command: str, kind: str
) -> None:
    config = TWIN_TINY_B
    if kind.startswith("another"):
        change = {"structure_channels": 2} if kind == "another setting" else {"width": 32}
        config = TWIN_TINY_B.model_copy(update=change)
    published = {checkpoint_name(n, config): t for n, t in seeded_weights(config, 0).items()}
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": published, "callbacks": Executes(tmp_path / "made") if "pickle" in kind else {}}, path)
    if kind == "bytes":
        path.write_bytes(bytes(range(256)) * 9)
    words = {
        "another setting": "structure 5x2x2x6, dynamics_x 4x4x4, dynamics_y 4x4x4; the file's are structure 5x2x2x2,",
        "another size": "does not fit vidtwin_tiny_b",
        "pickle that executes": "mkdir",
        "bytes": "weights.ckpt",
    }
    arguments: tuple[object, ...] = ("tokenize", videos, "--out", tmp_path / "out", *RUN, "--weights", path)
    if command == "convert":
        arguments = ("convert", path, tmp_path / "out", "--tokenizer", TWIN_TINY_B.name)
    code, printed = vidshard_exits(*arguments)
    assert code == 2, printed
    assert words[kind] in " ".join(printed.split())
    assert "Traceback" not in printed
    assert not (tmp_path / "made").exists()
    assert not (tmp_path / "out").exists()


def test_a_run_without_length_and_size_takes_the_default_clip_of_its_tokenizer(tmp_path: Path) -> None:
    assert PRESETS[RELEASED].default_clip == (16, 224, 224)
    for name, clip in {"vidtwin_tiny": (8, 64, 64), "tiny": (17, 256, 256)}.items():
        run = TokenizeRun(inputs=["v.mp4"], out=str(tmp_path / "out"), tokenizer=name)
        resolved = ResolvedRun.of(run)
        assert (resolved.run.frames, *resolved.run.size) == clip
        given = ResolvedRun.of(TokenizeRun.model_validate(run.model_dump() | {"frames": clip[0], "size": clip[1:]}))
        assert given.identity == resolved.identity


def test_short_clips_can_be_padded(videos: Path, tmp_path: Path) -> None:
    run = (*RUN, "--frames", 3, "--pad-frames", "repeat-last")
    code, printed = vidshard_exits("tokenize", videos, "--out", tmp_path / "out", *run)
    assert code == 0, printed
    assert load_tokenizer(TWIN_TINY_B, None, seed=0).config.valid_frames(3) == 4
    [path] = shard_paths(str(tmp_path / "out"))
    assert [clip.payload["dynamics_x"].shape for clip in read_clips(path)] == [(4, 4, 4)] * 4


def test_the_list_of_tokenizers_states_parameters_latents_and_rate() -> None:
    code, printed = vidshard_exits("tokenizers")
    assert code == 0
    [line] = [line for line in printed.splitlines() if line.startswith(f"{RELEASED} ")]
    assert "312.70 M" in line
    assert "0.335%" in line
    assert "16x224x224" in line
    assert line.rstrip().endswith("structure 16x7x7x8 + dynamics_x 16x7x8 + dynamics_y 16x7x8")
