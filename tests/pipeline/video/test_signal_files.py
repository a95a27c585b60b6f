"""Signals in files: slices, samples without times, JSON of game recorders, and pairs of arrays."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.videos import Recipe, write_video
from vidshard.pipeline.decode_stage import SpanDecoder
from vidshard.pipeline.discover import discover
from vidshard.pipeline.output.entries import Inputs
from vidshard.pipeline.plan import VideoPlanner
from vidshard.pipeline.row_access import RowAccess
from vidshard.pipeline.rows import signal_source
from vidshard.pipeline.storage import open_binary
from vidshard.pipeline.video.signal_files import SignalSource, read_signal, read_signals
from vidshard.schemas.locations import each_location, join_options, map_locations, split_options
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.uris import public_uri
from vidshard.schemas.video import ClipSpec, Limits, Part, SignalRule

N = 12
"""Frames of the video, at 10 per second."""


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("v") / "v.mp4", Recipe(num_frames=N, rate=Fraction(10), b_frames=2))


def row_of(video: Path, value: str, rule: SignalRule, *, fps: int = 10, start: float | None = None) -> dict[str, Any]:
    """The row of a video with a signal, as a manifest names it, after decoding."""
    manifest = video.parent / f"m{abs(hash((value, rule, fps, start)))}.jsonl"
    part = {} if start is None else {"start_seconds": start}
    manifest.write_text(json.dumps({"uri": str(video), "s": value, **part}))
    inputs = Inputs.of(discover([str(manifest)], signals=["s"]).videos, Part())
    spec = ClipSpec(fps=Fraction(fps), num_frames=4, height=32, width=32)
    rows = VideoPlanner((spec,), Part(), 100, Limits())(inputs.videos).drop_columns(["rejection"])
    rows = rows.append_column(signal_source("s"), inputs.videos[signal_source("s")].take(pa.array([0] * len(rows))))
    decoder = SpanDecoder(spec=spec, max_clips=100, clips_per_pass=100, signals=(("s", rule),))
    [table] = decoder(rows)
    row: dict[str, Any] = table.to_pylist()[0]
    return row


def values_of(row: dict[str, Any]) -> list[list[float]]:
    assert row["rejection"] is None, row["rejection"]["detail"]
    return [
        frame for clip, facts in zip(row["s"], row["clips"], strict=True) for frame in clip[: facts["num_valid_frames"]]
    ]


def refusal_of(row: dict[str, Any]) -> str:
    assert row["rejection"]["reason"] in ("bad_signal", "unsupported"), row["rejection"]
    return str(row["rejection"]["detail"])


def vpt_line(n: int) -> dict[str, Any]:
    """A line as VPT's recorder writes it: other fields on each line, lists of pressed keys, large clocks."""
    return {
        "mouse": {"x": 640.0, "dx": float(n), "dy": -1.5 * n, "buttons": [0] if n % 3 == 0 else []},
        "keyboard": {"keys": ["key.keyboard.w", "key.keyboard.space"] if n % 2 else ["key.keyboard.s"], "chars": ""},
        "isGuiOpen": n > 8,
        "milli": 1_637_000_000_000 + n,
        "stats": {f"minecraft.custom:{n}": n},
    }


VPT_COLUMNS = "mouse.dx,mouse.dy,keyboard.keys=key.keyboard.w,mouse.buttons=0,isGuiOpen"


def vpt_values(n: int) -> list[float]:
    return [n, -1.5 * n, n % 2, n % 3 == 0, n > 8]


def write_vpt(path: Path, count: int = N) -> Path:
    path.write_text("".join(json.dumps(vpt_line(n)) + "\n" for n in range(count)))
    return path


def game_factory(path: Path, numbers: Any = range(N)) -> Path:
    actions = {str(n): {"ws": n % 3, "pitch": n / 4, "pos": [n, 2 * n, 0]} for n in numbers}
    path.write_text(json.dumps({"biome": "plains", "initial_weather": "clear", "actions": actions}))
    return path


FORMS: dict[str, tuple[Callable[[Path], Any], str, Callable[[int], list[float]]]] = {
    "VPT": (lambda f: write_vpt(f / "x.jsonl"), f"x.jsonl#columns={VPT_COLUMNS}", vpt_values),
    "GameFactory": (lambda f: game_factory(f / "x.json"), "x.json", lambda n: [n % 3, n / 4, n, 2 * n, 0]),
    "GameFactory by key": (
        lambda f: game_factory(f / "x.json"),
        "x.json#key=actions&columns=pos,ws",
        lambda n: [n, 2 * n, 0, n % 3],
    ),
    "a list of lists": (
        lambda f: (f / "x.json").write_text(json.dumps([[n, -n] for n in range(N)])),
        "x.json",
        lambda n: [n, -n],
    ),
    "lists by name": (
        lambda f: (f / "x.json").write_text(json.dumps({"a": list(range(N)), "b": [[n, 1] for n in range(N)]})),
        "x.json",
        lambda n: [n, n, 1],
    ),
    "numbers a line": (
        lambda f: (f / "x.jsonl").write_text("\n".join(map(str, range(N))) + "\n\n"),
        "x.jsonl",
        lambda n: [n],
    ),
    "npy": (lambda f: np.save(f / "x.npy", np.arange(2 * N).reshape(N, 2)), "x.npy", lambda n: [2 * n, 2 * n + 1]),
    "npy of scalars": (lambda f: np.save(f / "x.npy", np.arange(N)), "x.npy", lambda n: [n]),
    "npz": (lambda f: np.savez(f / "x.npz", values=np.arange(N)), "x.npz", lambda n: [n]),
    "parquet": (
        lambda f: pq.write_table(pa.table({"a": range(N), "t": ["x"] * N}), f / "x.parquet"),
        "x.parquet",
        lambda n: [n],
    ),
    "a slice": (
        lambda f: pq.write_table(pa.table({"a": range(100)}), f / "x.parquet", row_group_size=7),
        f"x.parquet#rows=20:{20 + N}",
        lambda n: [20 + n],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_sample_n_is_that_of_frame_n(tmp_path: Path, video: Path, form: str) -> None:
    write, value, expected = FORMS[form]
    write(tmp_path)
    assert values_of(row_of(video, f"{tmp_path}/{value}", "frames")) == [expected(n) for n in range(N)]


def test_frames_are_counted_at_reduced_rates_in_parts_and_with_variable_rate(tmp_path: Path, video: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(N))
    assert values_of(row_of(video, f"{tmp_path}/x.npy", "frames", fps=5)) == [[n] for n in range(0, N, 2)]
    part = row_of(video, f"{tmp_path}/x.npy", "frames", start=0.4)
    assert values_of(part) == [[n] for n in range(4, N)], "counted from the first frame of the video"
    times = [Fraction(n * n, 90) for n in range(N)]  # the last frames are far apart
    variable = write_video(tmp_path / "variable.mp4", Recipe(times=times, rate=Fraction(10), b_frames=2))
    shown = values_of(row_of(variable, f"{tmp_path}/x.npy", "frames"))
    grid = [Fraction(k, 10) for k in range(len(shown))]
    assert shown == [[sum(time <= at for time in times) - 1] for at in grid]


def test_frames_without_a_sample_have_nan_and_surplus_samples_are_refused(tmp_path: Path, video: Path) -> None:
    np.save(tmp_path / "short.npy", np.arange(N - 3))
    values = np.array(values_of(row_of(video, f"{tmp_path}/short.npy", "frames")))
    assert values[: N - 3, 0].tolist() == list(range(N - 3))
    assert np.isnan(values[N - 3 :]).all()
    game_factory(tmp_path / "gap.json", [n for n in range(N) if n != 5])
    values = np.array(values_of(row_of(video, f"{tmp_path}/gap.json#columns=ws", "frames")))
    assert np.flatnonzero(np.isnan(values[:, 0])).tolist() == [5]
    np.save(tmp_path / "long.npy", np.arange(N + 1))
    assert "13 samples, and the video 12 frames" in refusal_of(row_of(video, f"{tmp_path}/long.npy", "frames"))


def test_frames_that_cannot_be_counted_are_refused(tmp_path: Path) -> None:
    video = write_video(tmp_path / "v.avi", Recipe(codec="wmv2", num_frames=N, rate=Fraction(10)))
    np.save(tmp_path / "x.npy", np.arange(N))
    assert "cannot be counted" in refusal_of(row_of(video, f"{tmp_path}/x.npy", "frames"))


@pytest.mark.parametrize("codec", ["hevc", "h264"])
def test_frames_of_raw_streams_are_counted(tmp_path: Path, codec: str) -> None:
    encoder = {"hevc": "libx265", "h264": "libx264"}[codec]
    video = write_video(tmp_path / f"v.{codec}", Recipe(codec=encoder, num_frames=N, rate=Fraction(25)))
    np.save(tmp_path / "x.npy", np.arange(N))
    assert values_of(row_of(video, f"{tmp_path}/x.npy", "frames", fps=25)) == [[n] for n in range(N)]


def test_a_pair_of_arrays_holds_times_and_values(tmp_path: Path, video: Path) -> None:
    folder = tmp_path / "processed_log/CAN/speed"
    folder.mkdir(parents=True)
    for name, array in (("t", 46_408.5 + np.arange(50) / 20), ("value", np.arange(50.0))):
        with (folder / name).open("wb") as file:
            np.save(file, array)
    (video.parent / "log").symlink_to(folder) if not (video.parent / "log").exists() else None
    value = f"{folder}/value#times={folder}/t&offset=-46408.5"
    assert values_of(row_of(video, value, "nearest")) == [[2 * n] for n in range(N)]
    relative = "log/value#times=log/t&offset=-46408.5"
    assert values_of(row_of(video, relative, "linear")) == [[2 * n] for n in range(N)], "from the manifest's folder"
    np.save(folder / "other.npy", np.arange(49.0))
    other = f"{folder}/value#times={folder}/other.npy"
    assert "50 samples, and times= has 49" in refusal_of(row_of(video, other, "previous"))


def test_a_slice_has_its_rows_columns_and_times_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"seconds": np.arange(60) / 4, "a": range(60), "b": range(100, 160)}), path, row_group_size=7
    )
    signal = read_signal(f"{path}#rows=20:40&offset=-5.5&columns=b,a", open_binary)
    assert signal.seconds.tolist() == [at / 4 - 5.5 for at in range(20, 40)]
    assert signal.values.tolist() == [[100 + at, at] for at in range(20, 40)]
    [first, second] = read_signals(SignalSource.of(f"{path}#rows=3:5"), [("a",), None], open_binary)
    assert (first.values.tolist(), second.channels) == ([[3], [4]], ("a", "b"))


def test_only_the_row_groups_of_a_slice_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"seconds": range(7000), "a": range(7000)}), path, row_group_size=700)
    footer = pq.read_metadata(path)
    damaged = bytearray(path.read_bytes())
    for group in range(10):
        if group != 4:
            for at in range(2):
                column = footer.row_group(group).column(at)
                start = column.dictionary_page_offset or column.data_page_offset
                damaged[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(damaged)
    assert read_signal(f"{path}#rows=2900:3000", open_binary).values[:, 0].tolist() == list(range(2900, 3000))
    with pytest.raises(VideoError):
        read_signal(f"{path}#rows=2000:2001", open_binary)


@pytest.mark.parametrize(
    "options",
    ["rows=5", "rows=5:5", "rows=-1:3", "rows=a:b", "offset=x", "offset=inf", "columns=", "columns=a,,b", "rate=0",
     "rate=nan", "episode=x", "rows=0:3&bytes=1:2", "rows=50:70"],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused_by_name(tmp_path: Path, options: str) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"seconds": range(60), "a": range(60)}), path)
    with pytest.raises(VideoError, match=r"x\.parquet") as caught:
        read_signal(f"{path}#{options}", open_binary)
    assert caught.value.reason is Reason.BAD_SIGNAL


JSON: dict[str, tuple[str, str, str]] = {
    "no JSON": ("x.jsonl", "{}\n{", "line 2 is no JSON"),
    "an empty line": ("x.jsonl", '{"a": 1}\n\n{"a": 2}', "line 2 is no JSON"),
    "other fields": ("x.jsonl", '{"a": 1}\n{"b": 1}', "choose fields with #columns="),
    "another length": ("x.jsonl", '{"a": [1]}\n{"a": [1, 2]}', "of another length"),
    "an integer too large": ("x.jsonl", '{"a": 16777217}', "integers beyond 2\\*\\*24"),
    "no samples": ("x.jsonl", "\n", "no samples"),
    "nothing but text": ("x.jsonl", '{"a": "x"}', "no channels|no sample"),
    "nested too deep": ("x.jsonl", "[" * 200_000 + "]" * 200_000, "nested too deep|no JSON|other"),
    "an object": ("x.json", '{"a": {"b": 1}}', "neither a list of samples"),
    "several lists": ("x.json", '{"a": [1], "b": [1, 2]}', "choose one with #key="),
    "a frame far away": ("x.json", '{"0": 1, "999999999": 1}', "no frame numbers"),
    "a key twice": ("x.json", '{"0": 1, "00": 2}', "no frame numbers"),
}


@pytest.mark.parametrize("kind", JSON)
def test_json_that_is_no_signal_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    name, text, said = JSON[kind]
    (tmp_path / name).write_text(text)
    with pytest.raises(VideoError, match=said) as caught:
        read_signals(SignalSource.of(str(tmp_path / name)), [None], open_binary, counted=True)
    assert caught.value.reason is Reason.BAD_SIGNAL


def test_options_of_a_location_survive_and_hide_no_secret() -> None:
    options = {"rows": "3:5", "columns": "a b,ü&#", "offset": "-1.5"}
    uri = join_options("s3://bucket/a#b.parquet", options)
    assert split_options(uri) == ("s3://bucket/a#b.parquet", options)
    assert split_options("/data/take#3.parquet") == ("/data/take#3.parquet", {})
    secret = "https://user:word@host/v.npy?sig=abc#times=https%3A//user:word@host/t.npy%3Fsig=abc&offset=1"
    assert public_uri(secret) == "https://host/v.npy#times=https://host/t.npy&offset=1"
    assert each_location(secret)[1] == "https://user:word@host/t.npy?sig=abc"
    assert map_locations("v#times=t", lambda path: f"/x/{path}") == "/x/v#times=/x/t"


def test_every_file_that_a_signal_names_is_held_against_what_a_run_allows(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for value in ("../out/a.parquet#rows=0:1", "a.npy#times=../out/t.npy", f"a.npy#times={tmp_path}/out/t.npy"):
        (tmp_path / "in/m.jsonl").write_text(json.dumps({"uri": "v.mp4", "s": value}))
        access = RowAccess(under=(str(tmp_path / "in"),))
        [text] = discover([str(tmp_path / "in/m.jsonl")], signals=["s"], access=access).videos["refusal"].to_pylist()
        assert "--allow-under" in text
    (tmp_path / "in/link.parquet").symlink_to(tmp_path / "out/a.parquet")
    (tmp_path / "in/m.jsonl").write_text(json.dumps({"uri": "v.mp4", "s": "link.parquet#rows=0:1"}))
    [text] = discover([str(tmp_path / "in/m.jsonl")], signals=["s"], access=access).videos["refusal"].to_pylist()
    assert "--allow-under" in text, "a link is followed, options or not"
