"""From a file to sampled, resized frames: ours beside the ways others take, one thread each, in one process.

A generated corpus of moving textures, sampled to 3 and to 8 frames per second at 256x256. The plain loop opens the
file with PyAV, decodes everything, and converts the frames it picks just as we do, so its pixels must equal ours, and
do. The others resize as they can: ``ffmpeg`` with its fps filter and the same scaler settings, decord frame by frame
as ``ray.data.read_videos(fps=..., resize=...)`` drives it (which rounds the rate to a whole step), torchcodec by time.
They take part where they are installed: pip install decord imageio-ffmpeg torchcodec.

Run: python -m benchmarks.decode [--quick] [--repeats N] [--json PATH]
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.video.stream import VideoStream

from benchmarks.report import Row, report
from pipeline.decode import decode_span, probe_video
from pipeline.frames import Shown
from pipeline.geometry import place
from pipeline.picture import Renderer
from pipeline.sampling import plan_spans
from pipeline.storage import open_binary
from schemas.video import ClipSpec, Span, VideoRef

SIZE = 256
X264 = (("preset", "fast"), ("crf", "23"))


@dataclass(frozen=True, kw_only=True)
class Source:
    """A video of the corpus."""

    name: str
    codec: str
    width: int
    height: int
    fps: int
    options: tuple[tuple[str, str], ...]
    suffix: str = "mp4"


CORPUS = (
    Source(name="h264 480p30", codec="libx264", width=854, height=480, fps=30, options=(*X264, ("bf", "0"))),
    Source(name="h264 480p30 B", codec="libx264", width=854, height=480, fps=30, options=(*X264, ("bf", "3"))),
    Source(name="h264 720p60 B", codec="libx264", width=1280, height=720, fps=60, options=(*X264, ("bf", "3"))),
    Source(name="h264 1080p24", codec="libx264", width=1920, height=1080, fps=24, options=(*X264, ("bf", "0"))),
    Source(name="h264 1080p30 B", codec="libx264", width=1920, height=1080, fps=30, options=(*X264, ("bf", "3"))),
    Source(
        name="hevc 720p30 B",
        codec="libx265",
        width=1280,
        height=720,
        fps=30,
        options=(("preset", "veryfast"), ("x265-params", "bframes=4:log-level=none")),
    ),
    Source(
        name="vp9 480p24",
        codec="libvpx-vp9",
        width=854,
        height=480,
        fps=24,
        options=(("deadline", "realtime"), ("cpu-used", "8"), ("crf", "32")),
        suffix="webm",
    ),
    Source(name="av1 720p30", codec="libsvtav1", width=1280, height=720, fps=30, options=(("preset", "10"),)),
    Source(name="mpeg4 480p25 B", codec="mpeg4", width=854, height=480, fps=25, options=(("bf", "2"), ("q", "5"))),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=6, help="length of each video")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, of which the median counts")
    parser.add_argument("--quick", action="store_true", help="two short videos, two repeats")
    parser.add_argument("--folder", metavar="PATH", help="keep the corpus here, and use what is there")
    parser.add_argument("--json", metavar="PATH", help="also write the figures here")
    arguments = parser.parse_args()
    corpus = CORPUS[:2] if arguments.quick else CORPUS
    seconds, repeats = (2, 2) if arguments.quick else (arguments.seconds, arguments.repeats)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="vidshard-bench-") as temporary:
        folder = Path(arguments.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for source in corpus:
            path = write_source(folder, source, seconds)
            for fps in (3, 8):
                rows.append(compare(source, path, fps, seconds, repeats))
                print(rows[-1], flush=True)
    report("decode: milliseconds for a second of video", rows, arguments.json)


def write_source(folder: Path, source: Source, seconds: int) -> Path:
    """Encode one video, unless it is there."""
    path = folder / f"{source.name.replace(' ', '-')}-{seconds}s.{source.suffix}"
    if path.exists():
        return path
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (source.height // 8, source.width // 4, 3), np.uint8)
    texture = np.kron(coarse, np.ones((12, 12, 1), np.uint8))
    texture = texture // 2 + random.integers(0, 128, texture.shape, np.uint8)
    unfinished = path.with_name(f".{path.name}")
    with av.open(str(unfinished), "w", format="webm" if source.suffix == "webm" else "mp4") as container:
        stream = cast(VideoStream, container.add_stream(source.codec, rate=source.fps))
        stream.width, stream.height, stream.pix_fmt = source.width, source.height, "yuv420p"
        stream.codec_context.gop_size = 4 * source.fps
        stream.codec_context.options = dict(source.options)
        for number in range(seconds * source.fps):
            y, x = number * 60 // source.fps % 200, number * 90 // source.fps % 300
            picture = np.ascontiguousarray(texture[y : y + source.height, x : x + source.width])
            left = number * 7 % (source.width - 100)
            picture[100:200, left : left + 100] = texture[:100, :100]  # something moves against the rest
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    unfinished.rename(path)
    return path


def compare(source: Source, path: Path, fps: int, seconds: int, repeats: int) -> Row:
    """One row: each contender's median time, interleaved runs."""
    spec = ClipSpec(fps=Fraction(fps), num_frames=8, height=SIZE, width=SIZE)
    ref = VideoRef(uri=str(path), num_bytes=path.stat().st_size)
    [span] = plan_spans(probe_video(ref, open_binary), spec, 1000)
    contenders: dict[str, Callable[[], Any] | None] = {
        "vidshard": lambda: ours(span, spec, path),
        "plain loop": lambda: plain_loop(span, spec, path),
        "ffmpeg": (lambda: command_line(path, fps)) if ffmpeg() else None,
        "decord": (lambda: by_decord(path, fps)) if importlib.util.find_spec("decord") else None,
        "torchcodec": (lambda: by_torchcodec(path, fps, seconds)) if has_torchcodec() else None,
    }
    same = np.array_equal(ours(span, spec, path), plain_loop(span, spec, path))
    assert same, "pixels differ from those of decoding everything"
    times: dict[str, list[float]] = {name: [] for name in contenders}
    said = {name: "not installed" for name, run in contenders.items() if run is None}
    for _ in range(repeats):
        for name, run in contenders.items():
            if run is None or name in said:
                continue
            start = time.perf_counter()
            try:
                run()
            except Exception as error:  # noqa: BLE001  whatever a competitor raises, it cannot
                said[name] = f"cannot: {type(error).__name__}"
            times[name].append((time.perf_counter() - start) * 1000 / seconds)
    for name in said:
        times[name].clear()
    row: Row = {"video": source.name, "fps": fps}
    for name, values in times.items():
        row[name] = round(statistics.median(values), 1) if values else said[name]
    row["of the loop"] = round(statistics.median(times["plain loop"]) / statistics.median(times["vidshard"]), 2)
    others = [statistics.median(values) for name, values in times.items() if values and name != "vidshard"]
    row["of the next best"] = round(min(others) / statistics.median(times["vidshard"]), 2)
    return row


def ours(span: Span, spec: ClipSpec, path: Path) -> np.ndarray:
    """All frames that count, uint8 (N, H, W, 3)."""
    clips = decode_span(span, spec, str(path), max_clips=1000)
    return np.concatenate([clip.frames[: clip.num_valid_frames] for clip in clips])


def plain_loop(span: Span, spec: ClipSpec, path: Path) -> np.ndarray:
    """Decode every frame, keep those on screen at a grid time."""
    frames: list[np.ndarray] = []
    renderer = Renderer(spec)
    step = 1 / spec.fps / span.time_base

    def pick(frame: av.VideoFrame | None, until_pts: Fraction | int) -> None:
        while span.grid_start_pts + len(frames) * step < until_pts:
            assert frame is not None
            assert frame.pts is not None
            shown = Shown(frame=frame, pts=frame.pts, end_pts=frame.pts, stream=stream)
            rgb, geometry = renderer.render(shown)
            frames.append(np.empty((spec.height, spec.width, 3), np.uint8))
            place(rgb, geometry, frames[-1])

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        previous: av.VideoFrame | None = None
        for frame in container.decode(stream):
            assert frame.pts is not None
            pick(previous, frame.pts)
            previous = frame
        assert previous is not None
        assert previous.pts is not None
        pick(previous, previous.pts + (previous.duration or 1))
    return np.stack(frames)


def ffmpeg() -> str | None:
    """The command, on the path or in the package imageio-ffmpeg."""
    if importlib.util.find_spec("imageio_ffmpeg"):
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    return shutil.which("ffmpeg")


def command_line(path: Path, fps: int) -> int:
    """Bytes of raw frames that come through a pipe."""
    scale = f"scale={SIZE}:{SIZE}:force_original_aspect_ratio=increase:flags=bilinear+accurate_rnd+full_chroma_int"
    filters = f"fps={fps}:round=up,{scale},crop={SIZE}:{SIZE}"
    arguments = ["-v", "error", "-threads", "1", "-i", str(path), "-vf", filters]
    output = [*arguments, "-filter_threads", "1", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    return len(subprocess.run([cast(str, ffmpeg()), *output], capture_output=True, check=True).stdout)


def by_decord(path: Path, fps: int) -> int:
    """Frames as ``ray.data.read_videos`` takes them."""
    from decord import VideoReader

    with path.open("rb") as file:
        reader = VideoReader(file, height=SIZE, width=SIZE, num_threads=1)
        stride = max(1, round(reader.get_avg_fps() / fps))
        return len([frame.asnumpy() for number, frame in enumerate(reader) if number % stride == 0])


def has_torchcodec() -> bool:
    """Whether it is installed and finds its libraries."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def by_torchcodec(path: Path, fps: int, seconds: int) -> int:
    """Frames at the grid's times, resized."""
    import torch
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1)
    frames = decoder.get_frames_played_at([n / fps for n in range(seconds * fps)]).data
    resized = torch.nn.functional.interpolate(frames.float(), (SIZE, SIZE), mode="bilinear", antialias=True)
    return len(resized.round().to(torch.uint8))


if __name__ == "__main__":
    main()
