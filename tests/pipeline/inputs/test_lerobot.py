"""LeRobot datasets, read frame by frame: counts, times, pictures and actions against an independent reading."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.hub_server import HubServer
from tests.support.lerobot import TASKS, TOP, WRIST, Shape, frames_of, make_dataset, rows_of_episode
from tests.support.planning import planned
from tests.support.videos import read_frame_number
from vidshard.pipeline import decode_stage
from vidshard.pipeline.decode_stage import SpanDecoder
from vidshard.pipeline.discover import Discovery, discover
from vidshard.pipeline.inputs.lerobot import Dataset
from vidshard.pipeline.inputs.manifest import InputError
from vidshard.pipeline.output.entries import Inputs
from vidshard.pipeline.row_access import RowAccess
from vidshard.schemas.video import ClipSpec, Part, SignalRule

SIGNALS: tuple[tuple[str, SignalRule], ...] = (
    ("action", "nearest"),
    ("observation.state", "nearest"),
    ("next.reward", "nearest"),
)


def found_in(root: Path, **options: Any) -> Discovery:
    return discover([f"lerobot:{root}"], signals=[name for name, _ in SIGNALS], **options)


def clips_of(found: Discovery, spec: ClipSpec) -> list[dict[str, Any]]:
    """Every clip with its episode, camera, pictures' numbers, times and signals."""
    rows, rejections = planned(found, spec)
    assert not rejections
    clips = []
    for table in SpanDecoder(spec=spec, max_clips=1000, clips_per_pass=1000, signals=SIGNALS)(rows):
        [row] = table.to_pylist()
        assert row["rejection"] is None, row["rejection"]
        pictures = np.frombuffer(row["frames"], np.uint8).reshape(len(row["clips"]), -1, spec.height, spec.width, 3)
        for at, clip in enumerate(row["clips"]):
            names = ("episode_index", "camera", "task")
            clips.append(
                {name: row[name] for name in names}
                | clip
                | {"numbers": [read_frame_number(picture) for picture in pictures[at]]}
                | {name: np.array(row[name][at]) for name, _ in SIGNALS}
            )
    return clips


def place_of(shape: Shape, root: Path, camera: str, episode: int) -> tuple[Path, Fraction]:
    """File and start of an episode, from the shape alone."""
    if shape.version[1] == "2":
        return root / f"videos/chunk-000/{camera}/episode_{episode:06d}.mp4", Fraction(0)
    files = shape.files[camera]
    before = sum(shape.lengths[at] for at in range(episode) if files[at] == files[episode])
    return root / f"videos/{camera}/chunk-000/file-{files[episode]:03d}.mp4", Fraction(before, shape.fps)


ODD = Shape(fps=7, lost={(WRIST, 1): (3,), (TOP, 2): (6, 9)})
SHAPES = {"steady": Shape(fps=30, lengths=(31, 17, 24)), "odd": ODD}


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
@pytest.mark.parametrize("rate", ["own", "reduced"])
@pytest.mark.parametrize("kind", SHAPES)
def test_counts_times_pictures_and_actions_are_those_of_plain_decoding(
    tmp_path: Path, version: str, rate: str, kind: str
) -> None:
    shape = SHAPES[kind]
    shape = Shape(version=version, fps=shape.fps, lengths=shape.lengths, lost=shape.lost)
    root = make_dataset(tmp_path / "data", shape)
    fps = Fraction(shape.fps) if rate == "own" else Fraction(shape.fps, 3)
    spec = ClipSpec(fps=fps, num_frames=4, height=32, width=32)
    clips = clips_of(found_in(root), spec)
    seen = Counter((clip["camera"], clip["episode_index"]) for clip in clips)
    assert set(seen) == {(camera, episode) for camera in shape.files for episode in range(len(shape.lengths))}
    frames = {}
    for clip in clips:
        camera, episode = clip["camera"], clip["episode_index"]
        path, start = place_of(shape, root, camera, episode)
        if path not in frames:
            frames[path] = frames_of(path)
        end = start + Fraction(shape.lengths[episode], shape.fps)
        assert clip["task"] == TASKS[episode % 2]
        rows = rows_of_episode(shape, episode)
        for slot in range(clip["num_valid_frames"]):
            time = start + (clip["clip_index"] * 4 + slot) / fps
            assert time < end
            shown, number = [each for each in frames[path] if each[0] <= float(time) + 2e-3][-1]
            assert clip["frame_pts_seconds"][slot] == pytest.approx(shown, abs=1e-4)
            assert clip["numbers"][slot] == number
            row = round((shown - float(start)) * shape.fps)
            for name, _ in SIGNALS:
                value = clip[name][slot]
                np.testing.assert_array_equal(value, np.atleast_1d(np.array(rows[name][row].as_py(), np.float32)))
    for (camera, episode), count in seen.items():
        slots = -(-shape.lengths[episode] * fps // shape.fps)
        assert count == -(-slots // 4), (camera, episode)


def test_all_cameras_of_an_episode_lie_on_one_grid(tmp_path: Path) -> None:
    shape = Shape(fps=30, lengths=(31, 17, 24), lost={(WRIST, 1): (3, 16)})
    root = make_dataset(tmp_path / "data", shape)
    for spec in (
        ClipSpec(fps=Fraction(30), num_frames=4, height=32, width=32),
        ClipSpec(fps=Fraction(8), num_frames=3, height=32, width=32, stride_seconds=Fraction(1, 8)),
        ClipSpec(fps=Fraction(30), num_frames=4, height=32, width=32, clips_per_video=2),
    ):
        times: dict[str, list[tuple[int, int, float]]] = {TOP: [], WRIST: []}
        for clip in clips_of(found_in(root), spec):
            _, start = place_of(shape, root, clip["camera"], clip["episode_index"])
            inside = round(clip["start_seconds"] - float(start), 6)
            times[clip["camera"]].append((clip["episode_index"], clip["clip_index"], inside))
        assert sorted(times[TOP]) == sorted(times[WRIST])


def test_rows_of_one_file_are_decoded_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_dataset(tmp_path / "data")
    spec = ClipSpec(fps=Fraction(10), num_frames=4, height=32, width=32)
    calls: list[int] = []
    decode = decode_stage._decode_spans

    def counted(spans: Sequence[Any], *args: Any, **options: Any) -> Any:
        calls.append(len(spans))
        return decode(spans, *args, **options)

    monkeypatch.setattr(decode_stage, "_decode_spans", counted)
    assert len(clips_of(found_in(root), spec)) == 2 * (4 + 2 + 3)
    assert sorted(calls) == [1, 2, 3]  # top: two files, wrist: one


def test_cameras_and_episodes_are_chosen_by_name(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data")
    videos = found_in(root, cameras=["wrist"], episodes=[(1, 3)]).videos
    assert list(zip(videos["camera"].to_pylist(), videos["episode_index"].to_pylist(), strict=True)) == [
        (WRIST, 1),
        (WRIST, 2),
    ]
    for options, said in (
        ({"cameras": ["left"]}, "has no camera left; its cameras are observation.images.top"),
        ({"episodes": [(3, 4)]}, "has no episode 3; it has 3, up to 2"),
    ):
        with pytest.raises(InputError, match=said):
            found_in(root, **options)
    with pytest.raises(InputError, match="are for LeRobot datasets"):
        discover([str(root)], cameras=["top"])


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


BROKEN_INFO: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an older version": (lambda i: i.update(codebase_version="v1.6"), "codebase_version is v1.6"),
    "a version that is no text": (lambda i: i.update(codebase_version=3), "codebase_version is 3"),
    "no rate": (lambda i: i.pop("fps"), "fps is None"),
    "an impossible rate": (lambda i: i.update(fps=0), "fps is 0"),
    "no features": (lambda i: i.pop("features"), "features is no object"),
    "no videos": (
        lambda i: [f.update(dtype="image") for f in i["features"].values()],
        "none of its features is a video",
    ),
    "another storage": (lambda i: i.update(storage_format="lance"), "storage_format is lance"),
    "no template": (lambda i: i.pop("video_path"), "video_path is None"),
    "a count": (lambda i: i.update(total_episodes=5), "3 episodes are listed, and info.json states 5"),
    "a camera outside": (lambda i: i["features"].update({"../x": {"dtype": "video"}}), "leads out of the folder"),
}


@pytest.mark.parametrize("kind", BROKEN_INFO)
def test_a_broken_info_is_refused_by_the_name_of_its_field(tmp_path: Path, kind: str, dataset: Path) -> None:
    change, said = BROKEN_INFO[kind]
    root = linked(tmp_path, dataset)
    edit(root / "meta/info.json", change)
    with pytest.raises(InputError, match=said):
        found_in(root)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("lerobot") / "v3")


def linked(folder: Path, dataset: Path) -> Path:
    """A dataset with metadata of its own and the videos and data of another."""
    root = folder / "copy"
    root.mkdir()
    for name in ("videos", "data"):
        (root / name).symlink_to(dataset / name)
    for path in sorted((dataset / "meta").rglob("*")):
        target = root / path.relative_to(dataset)
        target.mkdir(parents=True) if path.is_dir() else None
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    return root


@pytest.mark.parametrize("name", ["meta/info.json", "meta/episodes/chunk-000/file-000.parquet"])
@pytest.mark.parametrize("how", ["missing", "cut", "noise"])
def test_damaged_metadata_is_refused_by_the_name_of_its_file(
    tmp_path: Path, dataset: Path, name: str, how: str
) -> None:
    root = linked(tmp_path, dataset)
    data = (root / name).read_bytes()
    (root / name).unlink() if how == "missing" else (root / name).write_bytes(
        data[: len(data) // 2] if how == "cut" else b"\0" * len(data)
    )
    with pytest.raises(InputError, match=r"meta/(info.json|episodes)"):
        found_in(root)


def changed_episodes(root: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path)


BROKEN_EPISODES: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "another length": (lambda r: r[1].update(length=9), "its length is 9 frames"),
    "no length": (lambda r: r[1].update(length=None), "length is None"),
    "other rows": (lambda r: r[1].update(dataset_to_index=19), "its length is 7, and its rows are 13 to 19"),
    "no time": (lambda r: r[1].update({f"videos/{TOP}/to_timestamp": None}), "to_timestamp is None"),
    "a time that is none": (lambda r: r[1].update({f"videos/{TOP}/from_timestamp": float("nan")}), "is nan"),
    "no file": (lambda r: r[1].update({f"videos/{TOP}/file_index": None}), "file_index is None"),
}


@pytest.mark.parametrize("kind", BROKEN_EPISODES)
def test_a_broken_episode_is_a_rejection_of_its_rows_alone(tmp_path: Path, dataset: Path, kind: str) -> None:
    change, said = BROKEN_EPISODES[kind]
    root = linked(tmp_path, dataset)
    changed_episodes(root, change)
    found = found_in(root)
    faults = dict(zip(found.videos["episode_index"].to_pylist(), found.videos["fault"].to_pylist(), strict=True))
    bad = Inputs.of(found.videos, Part(), found.manifests).bad_rows
    assert bad
    assert all(one.reason == "bad_row" and "episode 1" in one.detail and said in one.detail for one in bad)
    assert faults[0] is None
    assert faults[2] is None


def shifted(rows: list[dict[str, Any]]) -> None:
    for row in rows[1:]:
        row["dataset_from_index"] -= 1
        row["dataset_to_index"] -= 1


DATA: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rows of another episode": (lambda root: changed_episodes(root, shifted), "is of episode 0"),
    "a gap in frame_index": (
        lambda root: rewrite_data(root, lambda t: set_column(t, "frame_index", [*range(13), 0, 1, 3, 4, 5, 6, 7])),
        "has frame_index 3",
    ),
    "a row too few": (lambda root: rewrite_data(root, lambda t: t.slice(0, 19)), "it has 19 rows"),
    "no such file": (lambda root: (root / "data/chunk-000/file-000.parquet").unlink(), "file-000.parquet"),
    "a missing column": (lambda root: rewrite_data(root, lambda t: t.drop_columns("action")), "no column 'action'"),
}


def set_column(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    at = table.column_names.index(name)
    return table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))


def rewrite_data(root: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    path = root / "data/chunk-000/file-000.parquet"
    pq.write_table(change(pq.read_table(path)), path)


@pytest.mark.parametrize("kind", DATA)
def test_data_that_is_not_what_the_metadata_says_is_a_rejection(tmp_path: Path, dataset: Path, kind: str) -> None:
    change, said = DATA[kind]
    root = linked(tmp_path, dataset)
    (root / "data").unlink()
    (root / "data/chunk-000").mkdir(parents=True)
    for path in (dataset / "data/chunk-000").iterdir():
        (root / "data/chunk-000" / path.name).write_bytes(path.read_bytes())
    change(root)
    spec = ClipSpec(fps=Fraction(10), num_frames=4, height=32, width=32)
    rows, _ = planned(found_in(root, cameras=[TOP], episodes=[(1, 2)]), spec)
    [table] = SpanDecoder(spec=spec, max_clips=100, clips_per_pass=100, signals=SIGNALS)(rows)
    [rejection] = table["rejection"].to_pylist()
    assert rejection["reason"] in ("bad_signal", "unreadable")
    assert said in rejection["detail"]


@pytest.mark.parametrize(
    "template",
    [
        "../{video_key}/{chunk_index:03d}-{file_index:03d}.mp4",
        "/etc/{video_key}/{chunk_index}{file_index}",
        "{video_key.__class__}/{chunk_index}",
        "{video_key}/{chunk_index:0999999999d}.mp4",
        "s3://bucket/{video_key}.mp4",
        "~/{video_key}.mp4",
        "videos/{nothing}.mp4",
    ],
)
def test_a_template_names_no_file_outside_of_the_dataset(tmp_path: Path, dataset: Path, template: str) -> None:
    root = linked(tmp_path, dataset)
    edit(root / "meta/info.json", lambda info: info.update(video_path=template))
    videos = found_in(root).videos
    assert all("the template" in fault for fault in videos["fault"].to_pylist())


def test_a_dataset_is_held_against_the_folders_that_a_run_allows(tmp_path: Path, dataset: Path) -> None:
    (tmp_path / "other").mkdir()
    access = RowAccess(under=(str(tmp_path / "other"),))
    assert all("--allow-under" in text for text in found_in(dataset, access=access).videos["refusal"].to_pylist())
    (tmp_path / "data").symlink_to(dataset / "data")  # a link leads out of the folder, options or not
    access = RowAccess(under=(str(dataset / "videos"),))
    assert all("--allow-under" in text for text in found_in(dataset, access=access).videos["refusal"].to_pylist())


@pytest.mark.parametrize(("lost", "reason"), [((0,), "truncated"), ((9, 10, 11, 12), "truncated"), ((12,), None)])
def test_a_video_with_other_times_than_its_dataset_is_a_rejection(
    tmp_path: Path, lost: tuple[int, ...], reason: str | None
) -> None:
    root = make_dataset(tmp_path / "data", Shape(version="v2.1", lengths=(13,), lost={(TOP, 0): lost}))
    spec = ClipSpec(fps=Fraction(10), num_frames=4, height=32, width=32)
    rows, rejections = planned(found_in(root), spec)
    assert [row["reason"] for row in rejections] == ([] if reason is None else [reason])
    assert set(rows["camera"].to_pylist()) == ({TOP, WRIST} if reason is None else {WRIST})


def test_an_episode_that_would_begin_with_a_frame_of_the_one_before_is_a_rejection(tmp_path: Path) -> None:
    root = make_dataset(tmp_path / "data", Shape(lost={(TOP, 1): (0,)}))
    spec = ClipSpec(fps=Fraction(10), num_frames=4, height=32, width=32)
    rows, _ = planned(found_in(root, cameras=[TOP]), spec)
    tables = list(SpanDecoder(spec=spec, max_clips=100, clips_per_pass=100, signals=SIGNALS)(rows))
    reasons = {t["episode_index"][0].as_py(): t["rejection"][0].as_py() for t in tables}
    assert reasons[0] is None
    assert reasons[2] is None
    assert reasons[1]["reason"] == "truncated"
    assert "the first frame is missing" in reasons[1]["detail"]


@pytest.mark.parametrize("version", ["v3.0", "v2.1"])
def test_a_dataset_in_an_object_store_is_read_as_a_local_one(tmp_path: Path, version: str, s3: str) -> None:
    import s3fs

    assert s3
    shape = Shape(version=version)
    root = make_dataset(tmp_path / "data", shape)
    s3fs.S3FileSystem().put(str(root), f"videos/{version}", recursive=True)
    spec = ClipSpec(fps=Fraction(10), num_frames=4, height=32, width=32)
    there = discover([f"lerobot:s3://videos/{version}"], signals=[name for name, _ in SIGNALS])
    assert _told(clips_of(there, spec)) == _told(clips_of(found_in(root), spec))


def test_a_dataset_of_the_hub_is_read_as_a_local_one(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfFileSystem
    from huggingface_hub import constants as hub_constants

    spec = ClipSpec(fps=Fraction(10), num_frames=4, height=32, width=32)
    local = _told(clips_of(found_in(dataset), spec))
    with HubServer().running() as hub:
        files = {str(path.relative_to(dataset)): path for path in dataset.rglob("*") if path.is_file()}
        hub.repositories["me/pusht"] = {name: path.read_bytes() for name, path in files.items()}
        template = hub_constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub_constants.ENDPOINT, hub.url)
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        for name, value in (("HF_ENDPOINT", hub.url), ("HF_TOKEN", hub.token), ("HF_HUB_DISABLE_XET", "1")):
            monkeypatch.setenv(name, value)
        HfFileSystem.clear_instance_cache()
        try:
            there = discover(["lerobot:hf://datasets/me/pusht"], signals=[name for name, _ in SIGNALS])
            assert _told(clips_of(there, spec)) == local
        finally:
            HfFileSystem.clear_instance_cache()


def _told(clips: list[dict[str, Any]]) -> list[str]:
    return [str({name: value for name, value in clip.items() if name != "geometry"}) for clip in clips]


def test_every_numeric_feature_is_a_signal_and_no_bookkeeping(dataset: Path) -> None:
    assert [name for name, _ in Dataset.open(f"lerobot:{dataset}").signals] == [
        "action",
        "observation.state",
        "next.reward",
        "next.done",
    ]
