"""Signals beside a video (robot actions, controller input, poses): samples, and aligning them with its frames.

Pure functions: no file is opened here and nothing knows of Ray. All times are seconds after the video's first frame.
A signal is held whole: an hour at 1 kHz with 16 channels is 260 MB; aligning a clip costs a binary search.
``pipeline.video.signal_files`` reads signals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from vidshard.schemas.video import Clip, SignalRule

Rule = SignalRule

Floats = npt.NDArray[np.float32]
Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Signal:
    """Samples of D channels, each with its time."""

    seconds: Seconds
    """float64 (N,), finite, non-decreasing: seconds after the video's first frame; negative before it."""
    values: Floats
    """float32 (N, D)."""
    channels: tuple[str, ...] | None = None
    """D names; None where the file has none."""
    median_step: float = field(init=False)
    """Median of the seconds between samples, repeated times aside; 0.0 for one sample. Kept, as computing it takes
    20 ms for 3.6 million samples."""

    def __post_init__(self) -> None:
        if self.seconds.dtype != np.float64 or self.seconds.ndim != 1:
            raise ValueError(f"seconds must be float64 (N,), got {self.seconds.dtype} {self.seconds.shape}")
        if self.values.dtype != np.float32 or self.values.ndim != 2 or len(self.values) != len(self.seconds):
            raise ValueError(
                f"values must be float32 ({len(self.seconds)}, D), got {self.values.dtype} {self.values.shape}"
            )
        if self.channels is not None and len(self.channels) != self.values.shape[1]:
            raise ValueError(f"{len(self.channels)} channel names for {self.values.shape[1]} channels")
        if not np.isfinite(self.seconds).all():
            raise ValueError(f"the time of sample {int(np.argmin(np.isfinite(self.seconds)))} is not a finite number")
        backwards = np.flatnonzero(np.diff(self.seconds) < 0)
        if len(backwards):
            at = int(backwards[0])
            raise ValueError(
                f"times go backwards: {self.seconds[at]} s, then {self.seconds[at + 1]} s at sample {at + 1}"
            )
        steps = np.diff(self.seconds)
        steps = steps[steps > 0]
        object.__setattr__(self, "median_step", float(np.median(steps)) if len(steps) else 0.0)

    def __repr__(self) -> str:
        span = f", {self.seconds[0]:.3f}s to {self.seconds[-1]:.3f}s" if len(self.seconds) else ""
        return f"Signal({len(self.seconds)} samples of {self.values.shape[1]}{span})"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Aligned:
    """A signal's values during the T frames of one clip."""

    values: Floats
    """float32 (T, D), a row for each frame, NaN where the signal has no value; for ``window`` (M, D), its M samples."""
    seconds: Seconds | None = None
    """Times of the samples, for ``window`` only: float64 (M,)."""
    offsets: npt.NDArray[np.int64] | None = None
    """Bounds, for ``window`` only: int64 (T + 1,); frame t has samples ``offsets[t]`` up to ``offsets[t + 1]``."""


# Aligning.

_SAME_SECONDS = 1e-6
"""Times of one frame, computed in two ways, differ by less; different frames by far more."""


def align(signal: Signal, frame_seconds: Seconds, rule: Rule, until_seconds: float) -> Aligned:
    """Align a signal with the frames of a clip.

    ``previous`` takes the last sample at or before the frame, ``nearest`` the closest one (the earlier of two), and
    ``linear`` interpolates between the samples around it. They give NaN before the first sample (``nearest``: more
    than half a median step before it) and after the last (``previous``: more than a median step, ``nearest``: more
    than half of one, ``linear``: at once). ``window`` takes all samples from this frame (inclusive) to the next
    (exclusive), so that consecutive clips share out the samples, each once. The last of several frames with the same
    time gets them. ``frames`` takes the sample of the frame's own time, and NaN where it has none.

    Args:
        signal: the samples.
        frame_seconds: float64 (T,), non-decreasing, in seconds after the video's first frame.
        rule: see above.
        until_seconds: end of the last frame's window: the first time of the next clip.

    Raises:
        ValueError: frame times run backwards, or lie after ``until_seconds``.
    """
    times = np.asarray(frame_seconds, np.float64)
    if times.ndim != 1 or (np.diff(times) < 0).any() or (len(times) and until_seconds < times[-1]):
        raise ValueError("frame times must be (T,), non-decreasing and not after until_seconds")
    if rule == "window":
        bounds = np.searchsorted(signal.seconds, np.append(times, until_seconds), side="left")
        if not len(times):
            bounds = np.zeros(1, np.int64)
        return Aligned(
            values=signal.values[bounds[0] : bounds[-1]],
            seconds=signal.seconds[bounds[0] : bounds[-1]],
            offsets=(bounds - bounds[0]).astype(np.int64),
        )
    num_samples = len(signal.seconds)
    if not num_samples:
        return Aligned(values=np.full((len(times), signal.values.shape[1]), np.nan, np.float32))
    if rule == "frames":
        at = np.minimum(np.searchsorted(signal.seconds, times - _SAME_SECONDS), num_samples - 1)
        is_there = np.abs(signal.seconds[at] - times) <= _SAME_SECONDS
        return Aligned(values=np.where(is_there[:, None], signal.values[at], np.float32(np.nan)))
    before = np.searchsorted(signal.seconds, times, side="right") - 1
    left, right = np.maximum(before, 0), np.minimum(before + 1, num_samples - 1)
    first, last = signal.seconds[0], signal.seconds[-1]
    if rule == "previous":
        values, slack = signal.values[left], (0.0, signal.median_step)
    elif rule == "nearest":
        later = signal.seconds[right] - times < times - signal.seconds[left]
        later |= before < 0
        values = signal.values[np.where((before < num_samples - 1) & later & (before >= 0), right, left)]
        slack = (signal.median_step / 2,) * 2
    else:
        gap = signal.seconds[right] - signal.seconds[left]
        share = np.divide(times - signal.seconds[left], gap, out=np.zeros_like(times), where=gap > 0)[:, None]
        mixed = signal.values[left] * (1 - share) + signal.values[right] * share
        values, slack = np.where(share > 0, mixed, signal.values[left]).astype(np.float32), (0.0, 0.0)
    covered = (times >= first - slack[0]) & (times <= last + slack[1])
    return Aligned(values=np.where(covered[:, None], values, np.float32(np.nan)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """The clock of samples at a steady rate: sample n is at ``offset_seconds`` + n / ``per_second``."""

    offset_seconds: float
    per_second: float

    def numbers(self, seconds: Seconds) -> Seconds:
        """Times in steps after sample 0. One within a twentieth of a step of a sample is that of the sample."""
        steps = (seconds - self.offset_seconds) * self.per_second
        whole = np.round(steps)
        return np.where(np.abs(steps - whole) <= _SAME_STEP, whole, steps)

    def seconds(self, numbers: Seconds) -> Seconds:
        """Inverse of :meth:`numbers`."""
        return self.offset_seconds + numbers / self.per_second


_SAME_STEP = 0.05
"""Times of frames are rounded to the ticks of their container, up to a millisecond."""


def align_clip(
    signal: Signal, clip: Clip, rule: Rule, *, first_seconds: float, fps: float, steps: Steps | None = None
) -> Aligned:
    """Align a signal with a clip.

    Samples are chosen by the times at which the source shows the frames. Windows are cut at the grid times, so that
    they neither overlap nor leave gaps from one clip to the next. Copies that pad a tail have the last frame's sample,
    and no window.

    Args:
        signal: the samples.
        clip: its frames' times are the source's.
        rule: as in :func:`align`.
        first_seconds: presentation time of the video's first frame.
        fps: frames per second of the grid.
        steps: clock of a signal whose ``seconds`` are the numbers of samples; None where they are seconds.
    """
    if rule != "window":
        times = clip.frame_pts_seconds - first_seconds
        times = times if steps is None else steps.numbers(times)
        return align(signal, times, rule, float(times[-1]))
    frames = np.minimum(np.arange(len(clip.frame_pts_seconds) + 1), clip.num_valid_frames)
    times = clip.start_seconds - first_seconds + frames / fps
    if steps is None:
        return align(signal, times[:-1], rule, float(times[-1]))
    times = steps.numbers(times)
    aligned = align(signal, times[:-1], rule, float(times[-1]))
    assert aligned.seconds is not None
    return replace(aligned, seconds=steps.seconds(aligned.seconds))


# Arrow.


def signal_fields(name: str, rule: Rule) -> list[pa.Field]:
    """Arrow columns of a signal, a row for each clip: (T, D), or for ``window`` (T, samples, D) and sample times."""
    frames = pa.list_(pa.list_(pa.float32()))
    if rule != "window":
        return [pa.field(name, frames)]
    return [pa.field(name, pa.list_(frames)), pa.field(f"{name}_seconds", pa.list_(pa.list_(pa.float64())))]


def signal_arrays(name: str, rule: Rule, clips: Sequence[Aligned]) -> list[pa.Array]:
    """The columns of :func:`signal_fields`, a row for each clip."""
    width = clips[0].values.shape[1] if clips else 0
    samples = np.concatenate([clip.values for clip in clips]) if clips else np.empty((0, 0), np.float32)
    offsets = np.arange(len(samples) + 1, dtype=np.int64) * width
    inner = _lists(offsets, pa.array(samples.reshape(-1)))
    if rule != "window":
        return [_lists(_starts([len(clip.values) for clip in clips]), inner)]
    counts, times = [], []
    for clip in clips:
        assert clip.offsets is not None
        assert clip.seconds is not None, f"{name} was not aligned by windows"
        counts.append(np.diff(clip.offsets))
        times.append(clip.seconds)
    per_frame = _starts(np.concatenate(counts) if counts else [])
    per_clip = _starts([len(count) for count in counts])
    seconds = pa.array(np.concatenate(times) if times else np.empty(0, np.float64))
    return [_lists(per_clip, _lists(per_frame, inner)), _lists(per_clip, _lists(per_frame, seconds))]


def _starts(counts: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(counts, np.int64))])


def _lists(offsets: npt.NDArray[np.int64], values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), values)
