"""`vidshard decode` of a family with payload parts: by part, crossed, side by side; and from Python."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from tests.support.cli import printed_by, vidshard_exits
from tests.support.toy_family import NUM_FRAMES, SIZE, TOY, TOY_CONFIG
from tests.support.videos import Recipe, write_video
from vidshard.models import tokenizer as models
from vidshard.pipeline.open_output import open_output
from vidshard.pipeline.output.shard_reader import ShardError, StoredClip
from vidshard.schemas.errors import UserError

FIXTURE = Path(__file__).parents[2] / "fixtures" / "format_1" / "tokens"
RUN = ("--fps", "4", "--frames", NUM_FRAMES, "--size", SIZE, "--local")


@pytest.fixture(scope="module", autouse=True)
def toys() -> Iterator[None]:
    """The family of toys, with a second preset of the same shapes."""
    other = TOY_CONFIG.model_copy(update={"name": "toy_two"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.FAMILIES, "toy", TOY)
        patch.setitem(models.PRESETS, "toy", TOY_CONFIG)
        patch.setitem(models.PRESETS, "toy_two", other)
        yield


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "v.mp4", Recipe(num_frames=26, rate=Fraction(10)))
    return folder


def made(videos: Path, out: Path, *settings: object, tokenizer: str = "toy", seed: int = 0) -> Path:
    """An output of the videos."""
    weights = ("--tokenizer", tokenizer, "--random-weights", seed)
    printed_by("tokenize", videos, "--out", out, *RUN, *weights, *settings)
    return out


@pytest.fixture(scope="module")
def latents(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(videos, tmp_path_factory.mktemp("latents") / "out")


def clips_of(out: Path) -> list[StoredClip]:
    return sorted(open_output(str(out)).clips(), key=lambda clip: int(clip.values["clip_index"]))


def frames_of(file: Path) -> np.ndarray:
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def expected(*, structure: StoredClip | None = None, motion: StoredClip | None = None) -> np.ndarray:
    """Frames of the sum of these parts, by the definition of a toy: uint8 (T, H, W, 3)."""
    sum_TCHW = np.zeros((NUM_FRAMES, 3, SIZE, SIZE), np.float32)
    if structure is not None:
        picture = structure.payload["structure"].astype(np.float32)
        sum_TCHW += picture.repeat(SIZE // picture.shape[1], axis=1).repeat(SIZE // picture.shape[2], axis=2)
    if motion is not None:
        sum_TCHW += motion.payload["motion"].astype(np.float32)[:, None, None, None]
    return ((sum_TCHW.transpose(0, 2, 3, 1) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)


def test_each_part_decodes_without_the_others(latents: Path) -> None:
    output = open_output(str(latents))
    clip = next(output.clips())
    np.testing.assert_array_equal(output.reconstruct(clip), expected(structure=clip, motion=clip))
    np.testing.assert_array_equal(output.reconstruct(clip, parts=["structure"]), expected(structure=clip))
    np.testing.assert_array_equal(output.reconstruct(clip, parts="motion"), expected(motion=clip))
    both = output.reconstruct(clip, parts=["motion", "structure"])
    np.testing.assert_array_equal(both, output.reconstruct(clip))


def test_crossed_clips_take_each_part_from_its_clip(latents: Path) -> None:
    output = open_output(str(latents))
    a, b = clips_of(latents)[:2]
    crossed = output.cross(structure=a, motion=b)
    np.testing.assert_array_equal(crossed, expected(structure=a, motion=b))
    assert not np.array_equal(crossed, output.reconstruct(a))
    assert not np.array_equal(crossed, output.cross(structure=b, motion=a))
    np.testing.assert_array_equal(output.cross(motion=a, structure=a), output.reconstruct(a))


def test_clips_of_several_outputs_of_one_tokenizer_are_crossed(videos: Path, latents: Path, tmp_path: Path) -> None:
    other = made(videos, tmp_path / "out", "--start", 1)
    a, b = clips_of(latents)[0], clips_of(other)[0]
    np.testing.assert_array_equal(
        open_output(str(latents)).cross(structure=a, motion=b), expected(structure=a, motion=b)
    )


def test_the_command_writes_parts_and_crossed_clips_as_python_gives_them(latents: Path, tmp_path: Path) -> None:
    a, b = clips_of(latents)[:2]
    file = tmp_path / "v.mp4"
    printed_by("decode", latents, "--clip", a.clip_id, "--only", "structure", "--to", file)
    assert np.abs(frames_of(file).astype(int) - expected(structure=a)).mean() < 6
    printed = printed_by("decode", latents, "--cross", f"structure={a.clip_id}", "--cross", f"motion={b.clip_id}",
                         "--to", file)  # fmt: skip
    assert f"structure: {a.clip_id}" in printed
    assert f"motion: {b.clip_id}" in printed
    assert np.abs(frames_of(file).astype(int) - expected(structure=a, motion=b)).mean() < 6
    printed_by("decode", latents, "--structure", b.clip_id, "--cross", f"motion={a.clip_id}", "--to", file)
    assert np.abs(frames_of(file).astype(int) - expected(structure=b, motion=a)).mean() < 6
    printed_by("decode", latents, "--all", tmp_path / "all", "--only", "motion", "--each-clip")
    assert np.abs(frames_of(tmp_path / "all" / f"{a.clip_id}.mp4").astype(int) - expected(motion=a)).mean() < 6


def test_side_by_side_shows_source_whole_and_every_part_in_the_order_that_is_printed(
    latents: Path, tmp_path: Path
) -> None:
    a, b = clips_of(latents)[:2]
    file = tmp_path / "v.mp4"
    printed = printed_by("decode", latents, "--clip", a.clip_id, "--side-by-side", "--to", file)
    assert "from left to right: source, reconstruction, structure alone, motion alone" in printed
    panels = np.split(frames_of(file).astype(int), 4, axis=2)
    for panel, wanted in zip(
        panels[1:], (expected(structure=a, motion=a), expected(structure=a), expected(motion=a)), strict=True
    ):
        assert np.abs(panel - wanted).mean() < 8
    printed = printed_by("decode", latents, "--clip", a.clip_id, "--only", "motion", "--side-by-side", "--to", file)
    assert "from left to right: source, motion" in printed
    assert frames_of(file).shape[2] == 2 * SIZE
    crossing = ("--structure", a.clip_id, "--cross", f"motion={b.clip_id}", "--side-by-side", "--to", file)
    printed = printed_by("decode", latents, *crossing)
    assert "from left to right: source of structure, source of motion, crossed" in printed
    assert frames_of(file).shape[2] == 3 * SIZE


def test_a_crossed_clip_is_as_long_as_the_shorter_one(latents: Path, tmp_path: Path) -> None:
    *_, before, last = clips_of(latents)
    valid = last.values["num_valid_frames"]
    assert valid < before.values["num_valid_frames"], "the last clip is padded"
    crossing = ("--structure", before.clip_id, "--cross", f"motion={last.clip_id}", "--to", tmp_path / "v.mp4")
    printed_by("decode", latents, *crossing)
    assert len(frames_of(tmp_path / "v.mp4")) == valid


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ("--clip", "ID", "--only", "dynamics"),
            "toy: no part 'dynamics'; there are: structure, motion",
        ),
        (("--clip", "ID", "--only", ""), "toy: no part ''"),
        (("--structure", "ID", "--dynamics", "ID"), "no part 'dynamics'; there are: structure, motion"),
        (("--structure", "ID"), "there is none for motion"),
        (("--cross", "structure=ID", "--cross", "colour=ID"), "no part 'colour'"),
        (("--structure", "zzz", "--cross", "motion=ID"), "no clip whose id begins with 'zzz'"),
        (("--structure", "ID", "--cross", "motion="), "give PART=ID"),
        (("--structure", "ID", "--cross", "motion"), "give PART=ID"),
        (("--structure", "ID", "--cross", "structure=ID"), "'structure' is named twice"),
        (("--structure", "ID", "--cross", "motion=ID", "--only", "structure"), "--only decodes parts of one clip"),
        (("--structure", "ID", "--cross", "motion=ID", "--clip", "ID"), "give one of"),
        (("--structure", "ID", "--cross", "motion=ID", "--all", "clips"), "give one of"),
        (("--video", "v", "--only", "structure"), "--video takes an output of --continuous"),
    ],
)
def test_parts_that_cannot_be_decoded_are_refused(
    latents: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    clip_id = clips_of(latents)[0].clip_id
    named = [argument.replace("ID", clip_id) for argument in arguments]
    code, printed = vidshard_exits("decode", latents, *named, "--to", tmp_path / "v.mp4")
    assert code == 2
    assert words in " ".join(printed.split())
    assert "RANDOM WEIGHTS" not in printed, "a refusal is one message"
    assert not (tmp_path / "v.mp4").exists()


def test_crossing_needs_a_file_to_write(latents: Path) -> None:
    assert "need --to FILE" in printed_by("decode", latents, "--structure", "a", "--dynamics", "b", code=2)


def test_a_family_without_parts_says_what_its_clips_hold(tmp_path: Path) -> None:
    clip_id = next(open_output(str(FIXTURE)).clips()).clip_id
    words = "tiny has no payload parts: its clips hold tokens [2, 4, 4], and decode as a whole only"
    for arguments in (
        ("--clip", clip_id, "--only", "structure", "--to", tmp_path / "v.mp4"),
        ("--all", tmp_path, "--only", "structure", "--each-clip"),
        ("--structure", clip_id, "--dynamics", clip_id, "--to", tmp_path / "v.mp4"),
    ):
        assert words in printed_by("decode", FIXTURE, *arguments, code=2)


@pytest.fixture(scope="module")
def mixed(videos: Path, latents: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that hold the shard of ``latents`` and one more, of the video's other half."""
    folders = {}
    for name, tokenizer, seed in (("tokenizer", "toy_two", 0), ("weights", "toy", 1)):
        other = made(videos, tmp_path_factory.mktemp(name) / "out", "--start", 1, tokenizer=tokenizer, seed=seed)
        folders[name] = tmp_path_factory.mktemp("mixed")
        for out in (latents, other):
            for path in (out / "shards").glob("*.parquet"):
                shutil.copy(path, folders[name])
    return folders


@pytest.mark.parametrize("name", ["tokenizer", "weights"])
def test_clips_of_different_tokenizers_or_weights_are_not_crossed(
    mixed: dict[str, Path], name: str, tmp_path: Path
) -> None:
    clips = list(open_output(str(mixed[name])).clips())
    digests = {clip.provenance.weights_sha256: clip for clip in clips if clip.provenance}
    names = {clip.provenance.tokenizer["name"]: clip for clip in clips if clip.provenance}
    a, b = (digests if name == "weights" else names).values()
    crossing = ("--structure", a.clip_id, "--cross", f"motion={b.clip_id}", "--to", tmp_path / "v.mp4")
    printed = printed_by("decode", mixed[name], *crossing, code=2)
    assert f"cannot be crossed: they differ in the {name}" in printed
    shown = ("toy", "toy_two") if name == "tokenizer" else (digest[:12] for digest in digests)
    assert all(value in printed for value in shown)


@pytest.mark.parametrize("name", ["tokenizer", "weights"])
def test_a_clip_among_shards_of_several_tokenizers_is_decoded_by_its_own_or_refused(
    mixed: dict[str, Path], name: str, tmp_path: Path
) -> None:
    output = open_output(str(mixed[name]))
    for clip in output.clips():
        printed = printed_by("decode", mixed[name], "--clip", clip.clip_id, "--to", tmp_path / "v.mp4")
        assert clip.provenance is not None
        assert f"({clip.provenance.weights_source.replace(':', ' ')})" in printed
    assert "open the output that holds it" in printed_by(
        "decode", mixed[name], "--all", tmp_path / "all", "--each-clip", code=2
    )
    printed = printed_by("verify", mixed[name], "--exact", 1, code=2)
    assert "open the output that holds it" in printed
    with pytest.raises(ShardError, match="was made by toy"):
        [output.reconstruct(clip) for clip in output.clips()]


def test_clips_of_different_families_are_not_crossed(latents: Path, tmp_path: Path) -> None:
    for number, out in enumerate((latents, FIXTURE)):
        for path in (out / "shards").glob("*.parquet"):
            shutil.copy(path, tmp_path / f"{number}.parquet")
    toy, vidtok = (next(open_output(str(out)).clips()).clip_id for out in (latents, FIXTURE))
    for a, b in ((toy, vidtok), (vidtok, toy)):
        crossing = ("--structure", a, "--cross", f"motion={b}", "--to", tmp_path / "v.mp4")
        assert "they differ in the tokenizer" in printed_by("decode", tmp_path, *crossing, code=2)


def test_a_clip_that_two_tokenizers_encoded_is_ambiguous(videos: Path, latents: Path, tmp_path: Path) -> None:
    other = made(videos, tmp_path / "out", seed=1)
    (tmp_path / "both").mkdir()
    for number, out in enumerate((latents, other)):
        for path in (out / "shards").glob("*.parquet"):
            shutil.copy(path, tmp_path / "both" / f"{number}.parquet")
    clip_id = clips_of(latents)[0].clip_id
    printed = printed_by("decode", tmp_path / "both", "--clip", clip_id, "--to", tmp_path / "v.mp4", code=2)
    assert "shards that were made with different settings" in printed
    printed_by("decode", tmp_path / "both" / "1.parquet", "--clip", clip_id, "--to", tmp_path / "v.mp4")


def changed_shape(clip: StoredClip) -> StoredClip:
    return replace(clip, payload={**clip.payload, "structure": clip.payload["structure"][:, :2]})


def without_column(clip: StoredClip) -> StoredClip:
    return replace(clip, payload={"structure": clip.payload["structure"]})


def other_rate(clip: StoredClip) -> StoredClip:
    return replace(clip, values={**clip.values, "fps": 8.0})


def fewer_frames(clip: StoredClip) -> StoredClip:
    return replace(clip, values={**clip.values, "frame_pts_seconds": clip.values["frame_pts_seconds"][:2]})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed_shape, r"the payload shapes, structure \[3, 4, 4\].*structure \[3, 2, 4\]"),
        (without_column, "the payload shapes"),
        (other_rate, "frames per second, 4 and 8"),
        (fewer_frames, "the number of frames, 4 and 2"),
    ],
)
def test_clips_of_different_shapes_are_not_crossed(latents: Path, change: object, words: str) -> None:
    assert callable(change)
    output = open_output(str(latents))
    a, b = clips_of(latents)[:2]
    with pytest.raises(UserError, match=words):
        output.cross(structure=a, motion=change(b))


@pytest.mark.parametrize("change", [changed_shape, without_column])
def test_a_payload_that_is_not_the_tokenizers_is_named(latents: Path, change: object) -> None:
    assert callable(change)
    output = open_output(str(latents))
    clip = change(clips_of(latents)[0])
    with pytest.raises(ShardError, match=r"holds structure .* decodes structure \[3, 4, 4\] \+ motion"):
        output.reconstruct(clip)
    with pytest.raises(ShardError, match="holds structure"):
        output.cross(structure=clip, motion=clip)


def test_a_clip_with_other_frame_times_than_its_run_has_is_named(latents: Path) -> None:
    output = open_output(str(latents))
    with pytest.raises(ShardError, match="has 2 frame times, and clips of its run have 4 frames"):
        output.reconstruct(fewer_frames(clips_of(latents)[0]))


def test_no_part_is_no_part(latents: Path) -> None:
    output = open_output(str(latents))
    clip = next(output.clips())
    with pytest.raises(UserError, match="toy: no part is given; there are: structure, motion"):
        output.reconstruct(clip, parts=[])
    with pytest.raises(UserError, match="no part is given"):
        output.cross()
