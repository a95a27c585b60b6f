"""Speed and accuracy of rendering decoded frames: scaling, color conversion and deinterlacing.

    python -m benchmarks.picture VIDEO... [--json PATH]

The first frame of each video is used. Scaling is compared with torch's antialiased resize of a floating-point
conversion. Deinterlacing is compared with the true frame, from fields cut out of a window that pans over the picture.
FFmpeg's bwdif and yadif see neighboring frames, the others a single frame.
"""

from __future__ import annotations

import argparse
import statistics
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
import torch
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import ColorTrc
from av.video.stream import VideoStream

from benchmarks.report import Row, report
from vidshard.pipeline.video.frame_order import TimedFrame
from vidshard.pipeline.video.render import Renderer
from vidshard.schemas.video import ClipSpec

REPEATS = 25


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="+", metavar="VIDEO")
    parser.add_argument("--json", metavar="PATH", help="also write the figures here")
    arguments = parser.parse_args()
    frames = {Path(video).stem: first_frame(video) for video in arguments.videos}
    rows = speed(next(iter(frames.values())))
    for name, frame in frames.items():
        rows += scaling(name, frame)
        rows += interlacing(name, frame)
    report("picture", rows, arguments.json)


def first_frame(video: str) -> VideoFrame:
    """Decode the first frame."""
    with av.open(video) as container:
        return next(container.decode(video=0))


def picture(frame: VideoFrame, width: int, height: int, renderer: Renderer | None = None) -> npt.NDArray[np.uint8]:
    """Render a frame as the pipeline does, but for aspect ratios."""
    stream = SimpleNamespace(sample_aspect_ratio=None, container=SimpleNamespace(format=SimpleNamespace(name="mp4")))
    spec = ClipSpec(fps=Fraction(1), num_frames=1, height=height, width=width, resize="stretch")
    shown = TimedFrame(frame=frame, pts=0, end_pts=1, stream=cast(VideoStream, stream))
    return (renderer or Renderer(spec)).render(shown)[0]


def row(what: str, value: float, unit: str) -> Row:
    """Make one row of the table."""
    return {"what": what, "value": round(value, 1), "unit": unit}


def psnr(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Compute PSNR in dB for levels from 0 to 255."""
    error = float(np.mean((one.astype(float) - other.astype(float)) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


# Speed.


def speed(source: VideoFrame) -> list[Row]:
    """Measure milliseconds from a 1080-line frame to 256x256, and unscaled."""
    cases: dict[str, VideoFrame] = {}
    for pixel_format in ("yuv420p", "yuv420p10le", "yuv444p", "rgba"):
        cases[pixel_format] = source.reformat(1920, 1080, pixel_format)
    cases["interlaced yuv420p"] = filtered([source.reformat(1920, 1080, "yuv420p")], "setfield=tff")[0]
    for name, trc in (("PQ", ColorTrc.SMPTE2084), ("HLG", ColorTrc.ARIB_STD_B67)):
        cases[f"{name} yuv420p10le"] = source.reformat(1920, 1080, "yuv420p10le")
        cases[f"{name} yuv420p10le"].color_trc = trc
    rows = []
    sizes = [(name, frame, 256, 256) for name, frame in cases.items()]
    for name, frame, width, height in [*sizes, ("yuv420p", cases["yuv420p"], 1920, 1080)]:
        renderer = Renderer(ClipSpec(fps=Fraction(1), num_frames=1, height=height, width=width, resize="stretch"))
        seconds = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            picture(frame, width, height, renderer)
            seconds.append(time.perf_counter() - started)
        rows.append(row(f"1920x1080 to {width}x{height}, {name}", 1000 * statistics.median(seconds), "ms"))
    seconds = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        filtered([cases["yuv420p"]], "setfield=tff,estdif=mode=frame")
        seconds.append(time.perf_counter() - started)
    rows.append(row("1920x1080, the filter estdif alone", 1000 * statistics.median(seconds), "ms"))
    return rows


# Scaling.


def scaling(name: str, frame: VideoFrame) -> list[Row]:
    """Measure PSNR against torch's resize of 4:4:4, so that only scaling and rounding differ."""
    whole = frame.reformat(format="gbrp")
    tensor = torch.from_numpy(whole.to_ndarray(format="rgb24").copy()).permute(2, 0, 1)[None].float()
    rows = []
    for height in (256, 128, 96):
        width = round(frame.width * height / frame.height)
        ours = picture(whole, width, height)
        for mode in ("bilinear", "bicubic"):
            resized = torch.nn.functional.interpolate(tensor, (height, width), mode=mode, antialias=True)
            reference = resized.clamp(0, 255)[0].permute(1, 2, 0).numpy()
            rows.append(row(f"{name} {frame.height} to {height} lines, against {mode}", psnr(ours, reference), "dB"))
    return rows


# Interlacing.


def interlacing(name: str, frame: VideoFrame) -> list[Row]:
    """Measure PSNR against the true frame, at its own size and at half its lines."""
    luma = frame.reformat(format="gray").to_ndarray().astype(np.uint8, copy=False)
    height, width = (luma.shape[0] - 40) // 4 * 4, (luma.shape[1] - 100) // 4 * 4
    rows = []
    for motion, (right, down) in {"still": (0, 0), "panning 3, 1 a field": (3, 1)}.items():
        fields = [luma[8 + down * n :, 4 + right * n :][:height, :width] for n in range(10)]
        woven = [fields[2 * n].copy() for n in range(5)]
        for n in range(5):
            woven[n][1::2] = fields[2 * n + 1][1::2]
        frames = [VideoFrame.from_ndarray(picture, format="gray") for picture in woven]
        truth = VideoFrame.from_ndarray(np.ascontiguousarray(fields[4]), format="gray")
        flagged = filtered([frames[2]], "setfield=tff")[0]
        shown = {
            "as it is": frames[2],
            "ours": flagged,
            "estdif": filtered([frames[2]], "setfield=tff,estdif=mode=frame")[0],
            "bwdif": filtered(frames, "setfield=tff,bwdif=mode=send_frame")[2],
            "yadif": filtered(frames, "setfield=tff,yadif=mode=send_frame")[2],
        }
        for lines in (height, height // 2):
            size = (width * lines // height, lines)
            target = picture(truth, *size)
            rows += [
                row(f"{name} {motion}, {lines} lines, {way}", psnr(picture(result, *size), target), "dB")
                for way, result in shown.items()
            ]
    return rows


def filtered(frames: list[VideoFrame], filters: str) -> list[VideoFrame]:
    """Run frames through FFmpeg's filters, a comma-separated list."""
    graph = Graph()
    source = graph.add_buffer(
        width=frames[0].width, height=frames[0].height, format=frames[0].format, time_base=Fraction(1, 25)
    )
    chain = [graph.add(*text.split("=", 1)) for text in filters.split(",")]
    graph.link_nodes(source, *chain, graph.add("buffersink")).configure()
    for number, frame in enumerate(frames):
        frame.pts, frame.time_base = number, Fraction(1, 25)
        graph.vpush(frame)
    graph.vpush(None)
    return [graph.vpull() for _ in frames]


if __name__ == "__main__":
    main()
