"""Decoding cost of our decoder beside a plain PyAV loop, Ray Data's reader, decord, torchcodec and ffmpeg.

    python -m benchmarks.decode                        the whole corpus, sampled at 3 and at 8 frames per second
    python -m benchmarks.decode --quick                two seconds of each video, one repeat
    python -m benchmarks.decode --repeats 5 --json decode.json

The corpus is generated once and kept in the temporary folder: moving texture in h264 with and without B-frames, hevc,
vp9, av1 and mpeg4, with a keyframe every two seconds. Each reader opens the file, samples it, and scales and crops it
to 256x256, on one thread.

* "plain loop" decodes every frame and lets PyAV convert and scale the frames it takes.
* "same scaler" is that loop with our scaling; its frames must equal ours bit for bit. Other readers scale differently.
* Figures are milliseconds of processor time for each second of video, threads and child processes included. Each is
  the least of the repeats, and repeats alternate between readers, so other work on the machine disturbs them little.
* Ray's reader runs in other processes, so it is timed by the clock, on two copies of the video, without its start.
* "cannot" marks a video on which a reader fails.

The other readers come with the extra ``bench`` (``make bench`` installs it). A reader that does not load has no
column; the reason is printed below the table.
"""

from __future__ import annotations

import importlib
import resource
import shutil
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import click
import numpy as np
import numpy.typing as npt
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from benchmarks.report import Row, report
from vidshard.models.libraries.torchvision_operators import declare_torchvision_operators
from vidshard.pipeline.storage import open_binary
from vidshard.pipeline.video.decode import decode_span
from vidshard.pipeline.video.frame_order import TimedFrame
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.render import Renderer
from vidshard.pipeline.video.sampling import Grid, plan_spans
from vidshard.pipeline.video.timestamps import Clock
from vidshard.schemas.video import ClipSpec, Span, VideoRef

Pixels = npt.NDArray[np.uint8]

SIDE = 256
RATES = (3, 8)
RAY_COPIES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """One file of the corpus."""

    name: str
    codec: str
    height: int
    fps: int
    b_frames: int
    suffix: str = "mp4"
    seconds: int = 8
    pixel_format: str = "yuv420p"

    @property
    def width(self) -> int:
        return {144: 256, 360: 640, 480: 640, 720: 1280, 1080: 1920}[self.height]


CORPUS = (
    Video(name="h264, no B-frames", codec="libx264", height=480, fps=24, b_frames=0),
    Video(name="h264, B-frames", codec="libx264", height=480, fps=30, b_frames=3),
    Video(name="h264, no B-frames", codec="libx264", height=720, fps=30, b_frames=0),
    Video(name="h264, B-frames", codec="libx264", height=720, fps=30, b_frames=3),
    Video(name="h264, B-frames", codec="libx264", height=1080, fps=60, b_frames=3, seconds=4),
    Video(name="hevc, B-frames", codec="libx265", height=720, fps=30, b_frames=4),
    Video(name="vp9", codec="libvpx-vp9", height=720, fps=30, b_frames=0, suffix="webm"),
    Video(name="av1", codec="libsvtav1", height=720, fps=30, b_frames=0),
    Video(name="mpeg4, B-frames", codec="mpeg4", height=480, fps=25, b_frames=2),
)

_OPTIONS = {
    "libx264": {"preset": "veryfast", "crf": "23"},
    "libx265": {"preset": "superfast", "crf": "26", "x265-params": "log-level=none"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "7", "crf": "34", "b": "0"},
    "libsvtav1": {"preset": "10", "crf": "35"},
    "mpeg4": {"qscale": "4"},
    "mpeg2video": {"qscale": "4"},
    "libvpx": {"deadline": "realtime", "cpu-used": "8", "b": "2M"},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A file to sample at a rate."""

    path: str
    span: Span
    spec: ClipSpec
    seconds: float


@click.command(help=__doc__.split("\n\n")[0] if __doc__ else None)
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--quick", is_flag=True, help="Two seconds of each video, one repeat.")
@click.option("--no-ray", is_flag=True, help="Leave Ray Data's reader out.")
@click.option("--json", "json_path", metavar="FILE", help="Write the table there too.")
def main(repeats: int, quick: bool, no_ray: bool, json_path: str | None) -> None:
    """Print the table."""
    folder = Path(tempfile.gettempdir()) / "vidshard-bench-decode"
    folder.mkdir(exist_ok=True)
    readers, left_out = available_readers(no_ray)
    rows = []
    for video in CORPUS:
        seconds = 2 if quick else video.seconds
        path = make_video(folder, video, seconds)
        for fps in RATES:
            task = make_task(path, fps, seconds)
            rows.append(describe(video, fps) | figures(task, readers, 1 if quick else repeats))
    report("decode, ms of processor time for each second of video", rows, json_path)
    for name, reason in left_out.items():
        click.echo(f"{name} is left out: {reason}")


def describe(video: Video, fps: int) -> Row:
    """The first columns of a row."""
    return {"video": video.name, "lines": video.height, "fps": video.fps, "at": fps}


def make_video(folder: Path, video: Video, seconds: int) -> Path:
    """The file, encoded unless it is there."""
    path = folder / f"{video.codec}-{video.height}-{video.fps}-{video.b_frames}-{seconds}s.{video.suffix}"
    if path.exists():
        return path
    unfinished = path.with_name(f"unfinished-{path.name}")
    rng = np.random.default_rng(0)
    texture = np.kron(rng.integers(40, 200, (80, 140)), np.ones((24, 24))).astype(np.int16)
    texture += rng.integers(-12, 13, texture.shape, dtype=np.int16)
    with av.open(str(unfinished), "w") as container:
        stream = cast(VideoStream, container.add_stream(video.codec, rate=video.fps))
        stream.width, stream.height, stream.pix_fmt = video.width, video.height, video.pixel_format
        stream.gop_size, stream.max_b_frames = 2 * video.fps, video.b_frames
        stream.codec_context.options = _OPTIONS.get(video.codec, {})
        for number in range(seconds * video.fps):
            picture = moving_picture(texture, video, number / video.fps, rng)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="yuv420p")))
        container.mux(stream.encode(None))
    unfinished.replace(path)
    return path


def moving_picture(texture: npt.NDArray[np.int16], video: Video, seconds: float, rng: np.random.Generator) -> Pixels:
    """Planes of yuv420p: a texture that pans, another that crosses it, and a little of a sensor's noise."""
    height, width = video.height, video.width
    luma = np.roll(texture, (-int(37 * seconds), -int(90 * seconds)), (0, 1))[:height, :width].copy()
    left = int(seconds * 160) % (width - height // 2)
    luma[height // 4 : height * 3 // 4, left : left + height // 2] = texture[: height // 2, -(height // 2) :]
    luma += rng.integers(-2, 3, luma.shape, dtype=np.int16)
    planes = np.empty((height * 3 // 2, width), np.uint8)
    planes[:height] = luma
    chroma = luma[::2, ::2] // 2 + 64
    planes[height:] = np.concatenate([chroma.ravel(), (255 - chroma).ravel()]).reshape(height // 2, width)
    return planes


def make_task(path: Path, fps: int, seconds: int) -> Task:
    """The whole file as one span, its header read beforehand."""
    spec = ClipSpec(fps=Fraction(fps), num_frames=17, height=SIDE, width=SIDE)
    probe = probe_video(VideoRef(uri=str(path), num_bytes=-1), open_binary)
    [span] = plan_spans(probe, spec, 1000)
    return Task(path=str(path), span=span, spec=spec, seconds=seconds)


def figures(task: Task, readers: dict[str, Callable[[Task], float]], repeats: int) -> Row:
    """Measure milliseconds for each second of video: one column a reader, then ratios to ours."""
    same = np.array_equal(decode_ours(task), decode_with_our_scaler(task))
    assert same, f"{task.path}: frames differ from those of decoding everything"
    times: dict[str, list[float]] = defaultdict(list)
    failed: set[str] = set()
    for repeat in range(repeats + 1):
        for name, reader in readers.items():
            if name in failed:
                continue
            try:
                seconds = reader(task)
            except Exception:  # what others raise has no common base
                if name in ("ours", "plain loop", "same scaler"):
                    raise
                failed.add(name)
                continue
            if repeat:  # the first round warms the caches
                times[name].append(seconds)
    least = {name: 1000 * min(values) / task.seconds for name, values in times.items()}
    row: Row = {name: "cannot" if name in failed else round(least[name], 1) for name in readers}
    row["plain : ours"] = round(least["plain loop"] / least["ours"], 2)
    row["same scaler : ours"] = round(least["same scaler"] / least["ours"], 2)
    others = [value for name, value in least.items() if name not in ("ours", "plain loop", "same scaler")]
    if others:
        row["best other : ours"] = round(min(others) / least["ours"], 2)
    return row


def available_readers(no_ray: bool) -> tuple[dict[str, Callable[[Task], float]], dict[str, str]]:
    """Find the readers that load here: each by its column, and the reason for each that is left out."""
    readers = {
        "ours": _timed(decode_ours),
        "plain loop": _timed(decode_plainly),
        "same scaler": _timed(decode_with_our_scaler),
    }
    left_out: dict[str, str] = {}
    if program := shutil.which("ffmpeg") or _bundled_ffmpeg(left_out):
        readers["ffmpeg"] = _timed(lambda task: decode_by_command(task, program))
    if torchcodec := _module("torchcodec.decoders", "torchcodec", left_out):
        readers["torchcodec"] = _timed(lambda task: decode_by_torchcodec(task, torchcodec))
    if decord := _module("decord", "decord", left_out):
        readers["decord"] = _timed(lambda task: decode_by_decord(task, decord))
    if no_ray:
        left_out["ray"] = "--no-ray"
    elif decord:
        readers["ray"] = read_by_ray
    else:
        left_out["ray"] = "its reader needs decord"
    return readers, left_out


def _bundled_ffmpeg(left_out: dict[str, str]) -> str | None:
    imageio = _module("imageio_ffmpeg", "ffmpeg", left_out)
    return None if imageio is None else str(imageio.get_ffmpeg_exe())


def _module(name: str, column: str, left_out: dict[str, str]) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # the last two: a library that the module links to is missing
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        left_out[column] = (str(root).strip().splitlines() or [type(root).__name__])[0]
        return None


def _timed(read: Callable[[Task], Pixels]) -> Callable[[Task], float]:
    def timed(task: Task) -> float:
        started = processor_seconds()
        frames = read(task)
        seconds = processor_seconds() - started
        expected = task.seconds * float(task.spec.fps)
        assert abs(len(frames) - expected) <= 2, f"{task.path}: {len(frames)} frames instead of {expected}"
        return seconds

    return timed


def processor_seconds() -> float:
    """Processor time of this process and of the child processes that it waited for."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# The readers: each gives uint8 (N, 256, 256, 3), or as many bytes.


def decode_ours(task: Task) -> Pixels:
    """As the pipeline does."""
    clips = decode_span(task.span, task.spec, task.path, max_clips=1000)
    return np.concatenate([clip.frames[: clip.num_valid_frames] for clip in clips])


def decode_plainly(task: Task) -> Pixels:
    """The loop that one would write with PyAV: every frame decoded, the one on screen at each grid time converted."""
    short = SIDE / min(task.span.source.width, task.span.source.height)
    width, height = round(task.span.source.width * short), round(task.span.source.height * short)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    reformatter = VideoReformatter()

    def convert(shown: TimedFrame) -> Pixels:
        assert shown.frame is not None
        rgb = reformatter.reformat(shown.frame, width, height, "rgb24", interpolation=Interpolation.BILINEAR)
        return cast(Pixels, rgb.to_ndarray())[top : top + SIDE, left : left + SIDE]

    return _decode_all(task, convert)


def decode_with_our_scaler(task: Task) -> Pixels:
    """The same loop with our conversion."""
    renderer = Renderer(task.spec)

    def convert(shown: TimedFrame) -> Pixels:
        picture = np.empty((SIDE, SIDE, 3), np.uint8)
        renderer.cut(shown, picture)
        return picture

    return _decode_all(task, convert)


def _decode_all(task: Task, convert: Callable[[TimedFrame], Pixels]) -> Pixels:
    span = task.span
    grid = Grid(start_pts=span.grid_start_pts, time_base=span.time_base, fps=task.spec.fps)
    taken: list[Pixels] = []
    with av.open(task.path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        read = Clock(time_base=span.time_base, start_pts=span.grid_start_pts).converter(stream)
        previous: TimedFrame | None = None
        for frame in container.decode(stream):
            assert frame.pts is not None
            pts, end_pts, aspect = read(frame.pts), read(frame.pts + frame.duration), stream.sample_aspect_ratio
            if previous is not None:
                _take(previous, grid.first_index_at(pts), convert, taken)
            previous = TimedFrame(frame=frame, pts=pts, end_pts=end_pts, stream=stream, pixel_aspect=aspect)
        assert previous is not None
        _take(previous, grid.first_index_at(previous.end_pts), convert, taken)
    return np.stack(taken)


def _take(shown: TimedFrame, until: int, convert: Callable[[TimedFrame], Pixels], taken: list[Pixels]) -> None:
    if until > len(taken):
        taken += [convert(shown)] * (until - len(taken))


def decode_by_command(task: Task, program: str) -> Pixels:
    """The ffmpeg program, frames through a pipe."""
    scale = f"fps={task.spec.fps},scale={SIDE}:{SIDE}:force_original_aspect_ratio=increase:flags=bilinear"
    command = [program, "-v", "error", "-threads", "1", "-filter_threads", "1", "-i", task.path]
    command += ["-vf", f"{scale},crop={SIDE}:{SIDE}", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    output = subprocess.run(command, check=True, capture_output=True).stdout
    return np.frombuffer(output, np.uint8).reshape(-1, SIDE, SIDE, 3)


def decode_by_torchcodec(task: Task, decoders: Any) -> Pixels:
    """Frames by time, scaled by the library itself."""
    declare_torchvision_operators()
    transforms = importlib.import_module("torchcodec.transforms")
    source = task.span.source
    short = SIDE / min(source.width, source.height)
    size = (round(source.height * short), round(source.width * short))
    decoder = decoders.VideoDecoder(
        task.path, num_ffmpeg_threads=1, seek_mode="approximate", transforms=[transforms.Resize(size)]
    )
    times = [n / float(task.spec.fps) for n in range(round(task.seconds * float(task.spec.fps)))]
    frames: Pixels = decoder.get_frames_played_at(times).data.numpy()
    left = (size[1] - SIDE) // 2
    return frames[..., left : left + SIDE]


def decode_by_decord(task: Task, decord: Any) -> Pixels:
    """Frames by number; the library scales without keeping the shape."""
    reader = decord.VideoReader(task.path, width=SIDE, height=SIDE, num_threads=1)
    step = reader.get_avg_fps() / float(task.spec.fps)
    numbers = [int(n * step) for n in range(int(len(reader) / step))]
    frames: Pixels = reader.get_batch(numbers).asnumpy()
    return frames


def read_by_ray(task: Task) -> float:
    """Seconds a video of Ray Data's reader, on copies of it, rows counted."""
    import ray

    if not ray.is_initialized():
        ray.init(num_cpus=2, include_dashboard=False, logging_level="error", log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
    paths = [task.path] * RAY_COPIES
    started = time.perf_counter()
    ray.data.read_videos(paths, fps=int(task.spec.fps), resize=(SIDE, SIDE), override_num_blocks=1).materialize()
    return (time.perf_counter() - started) / RAY_COPIES


if __name__ == "__main__":
    main()
