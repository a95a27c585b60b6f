from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidshard.pipeline.storage import open_binary
from vidshard.pipeline.video.signal_files import read_signal
from vidshard.pipeline.video.signals import Rule, Signal, align, signal_arrays, signal_fields
from vidshard.schemas.fields import parse_signals
from vidshard.schemas.rejections import Reason, VideoError

SECONDS = np.arange(6) / 8
VALUES = np.arange(12, dtype=np.float32).reshape(6, 2)
grid_times = st.lists(st.integers(-20, 60), max_size=30).map(lambda ns: np.sort(np.array(ns, np.float64)) / 8)


def signal_at(seconds: np.ndarray) -> Signal:
    return Signal(seconds=seconds, values=np.arange(len(seconds), dtype=np.float32)[:, None])


def refusal(path: Path, max_bytes: int = 1 << 30) -> VideoError:
    with pytest.raises(VideoError) as caught:
        read_signal(str(path), open_binary, max_bytes=max_bytes)
    assert path.name in caught.value.detail
    assert "\n" not in caught.value.detail
    return caught.value


@given(samples=grid_times, frames=grid_times.filter(len), cut=st.integers(0, 30))
def test_windows_of_consecutive_clips_share_out_the_samples(samples: np.ndarray, frames: np.ndarray, cut: int) -> None:
    signal, clips = signal_at(samples), [part for part in (frames[:cut], frames[cut:]) if len(part)]
    ends = [part[0] for part in clips[1:]] + [10.0]
    seen: list[float] = []
    for clip, end in zip(clips, ends, strict=True):
        aligned = align(signal, clip, "window", end)
        assert aligned.seconds is not None
        assert aligned.offsets is not None
        for t, start in enumerate(clip):
            inside = aligned.seconds[aligned.offsets[t] : aligned.offsets[t + 1]]
            assert ((inside >= start) & (inside < (clip[t + 1] if t + 1 < len(clip) else end))).all()
        seen += aligned.values[:, 0].tolist()
    expected = np.flatnonzero((samples >= frames[0]) & (samples < 10.0)).tolist()
    assert seen == expected


@given(samples=grid_times.filter(len), frames=grid_times)
def test_each_frame_has_what_the_rule_says(samples: np.ndarray, frames: np.ndarray) -> None:
    signal = signal_at(samples)
    steps = np.diff(samples)
    step = float(np.median(steps[steps > 0])) if (steps > 0).any() else 0.0
    found = {rule: align(signal, frames, rule, 100.0).values[:, 0] for rule in ("previous", "nearest", "linear")}
    for t, time in enumerate(frames):
        covered = samples[0] <= time <= samples[-1]
        previous, nearest, linear = (found[rule][t] for rule in ("previous", "nearest", "linear"))
        assert np.isnan(previous) != (samples[0] <= time <= samples[-1] + step)
        assert np.isnan(nearest) != (samples[0] - step / 2 <= time <= samples[-1] + step / 2)
        assert np.isnan(linear) != covered
        if not np.isnan(previous):
            assert previous == np.flatnonzero(samples <= time)[-1]
        if not np.isnan(nearest):
            distances = np.abs(samples - time)
            assert distances[int(nearest)] == distances.min()
            assert samples[int(nearest)] == samples[np.argmin(distances)]  # of two times the earlier
        if covered:
            left, right = np.flatnonzero(samples <= time)[-1], np.flatnonzero(samples >= time)
            if samples[left] == time:
                assert linear == left
            else:
                share = (time - samples[left]) / (samples[right[0]] - samples[left])
                assert linear == pytest.approx(left + share * (right[0] - left))


def write(path: Path, form: str) -> Path:
    path = path / f"s.{form.split('-')[0]}"
    if form == "npz":
        np.savez_compressed(path, seconds=SECONDS, values=VALUES)
    elif form == "npy":
        np.save(path, np.column_stack([SECONDS, VALUES]))
    elif form == "npy-structured":
        array = np.zeros(6, [("seconds", "f8"), ("xy", "f4", (2,))])
        array["seconds"], array["xy"] = SECONDS, VALUES
        np.save(path, array)
    else:
        times = {"timestamp_us": (SECONDS * 1e6).astype(np.int64)} if form == "parquet-us" else {"seconds": SECONDS}
        kind = pa.list_(pa.float32(), 2) if form == "parquet-fixed" else pa.list_(pa.float64())
        lists = {"xy": pa.array(VALUES.tolist(), kind), "label": ["a"] * 6}
        pq.write_table(pa.table({**times, **lists}), path, row_group_size=4)
    return path


FORMS = ["npz", "npy", "npy-structured", "parquet", "parquet-us", "parquet-fixed"]


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_samples_back(tmp_path: Path, form: str) -> None:
    signal = read_signal(str(write(tmp_path, form)), open_binary)
    np.testing.assert_array_equal(signal.seconds, SECONDS)
    np.testing.assert_array_equal(signal.values, VALUES)
    assert signal.channels == (None if form in ("npz", "npy") else ("xy[0]", "xy[1]"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_cut_file_is_refused(tmp_path: Path, form: str, share: float) -> None:
    path = write(tmp_path, form)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    assert refusal(path).reason == Reason.BAD_SIGNAL


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.npy").reason == Reason.UNREADABLE


@pytest.mark.parametrize(
    ("times", "words"), [([0.0, np.nan], "finite"), ([1.0, 0.5], "backwards"), ([1.7e9, 1.8e9], "subtract")]
)
def test_bad_times_are_refused(tmp_path: Path, times: list[float], words: str) -> None:
    np.save(tmp_path / "s.npy", np.column_stack([times, times]))
    assert words in refusal(tmp_path / "s.npy").detail


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", np.array([[0, print]], object), allow_pickle=True)
    assert "Python objects" in refusal(tmp_path / "s.npy").detail


def test_an_absurd_shape_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (1 << 50, 2)})
    (tmp_path / "s.npy").write_bytes(file.getvalue())
    assert "claims" in refusal(tmp_path / "s.npy").detail


def test_a_zip_bomb_stops_at_the_limit(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "s.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("seconds.npy", bytes(1 << 22))
    assert (tmp_path / "s.npz").stat().st_size < 1 << 20
    assert "more than" in refusal(tmp_path / "s.npz", max_bytes=1 << 20).detail


def test_integers_that_float32_would_round_are_refused(tmp_path: Path) -> None:
    for value, good in ((1 << 24, True), ((1 << 24) + 1, False)):
        pq.write_table(pa.table({"seconds": [0.0], "x": [value]}), tmp_path / "s.parquet")
        if good:
            assert read_signal(str(tmp_path / "s.parquet"), open_binary).values[0, 0] == value
        else:
            assert "2**24" in refusal(tmp_path / "s.parquet").detail


@pytest.mark.parametrize("rule", ["linear", "window"])
def test_arrow_rows_hold_what_was_aligned(rule: Rule) -> None:
    signal = Signal(seconds=SECONDS, values=VALUES)
    clips = [align(signal, SECONDS[:3], rule, 0.375), align(signal, SECONDS[3:5], rule, 1.0)]
    fields, arrays = signal_fields("a", rule), signal_arrays("a", rule, clips)
    assert [field.type for field in fields] == [array.type for array in arrays]
    if rule == "linear":
        assert arrays[0].to_pylist() == [VALUES[:3].tolist(), VALUES[3:5].tolist()]
    else:
        assert arrays[0].to_pylist() == [
            [[v] for v in VALUES[:3].tolist()],
            [[VALUES[3].tolist()], VALUES[4:].tolist()],
        ]
        assert arrays[1].to_pylist() == [[[0.0], [0.125], [0.25]], [[0.375], [0.5, 0.625]]]


def test_settings_are_name_and_rule() -> None:
    assert parse_signals("actions=linear, poses=window") == [("actions", "linear"), ("poses", "window")]
    for text in ("actions", "=linear", "actions=cubic", "a b=linear", "a=linear,a=window", ""):
        with pytest.raises(ValueError, match=r"NAME=RULE|is one of|twice"):
            parse_signals(text)
