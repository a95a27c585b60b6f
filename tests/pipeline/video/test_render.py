from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import av
import numpy as np
import numpy.typing as npt
import pytest
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream

from tests.support.decoding import assert_same, decode, probe
from tests.support.videos import Recipe, write_video
from vidshard.pipeline.video.color import Color, Transfer, color_of, nits_to_pq, pq_to_nits, tone_mapped
from vidshard.pipeline.video.frame_order import TimedFrame
from vidshard.pipeline.video.render import Renderer
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import ClipSpec

Pixels = npt.NDArray[np.uint8]
Samples = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

SPEC = ClipSpec(fps=Fraction(25), num_frames=1, height=48, width=48, resize="stretch")

# Color bars, each 24 columns.
BARS = [
    (255, 255, 255), (255, 255, 0), (0, 255, 255), (0, 255, 0), (255, 0, 255), (255, 0, 0), (0, 0, 255), (0, 0, 0),
    (128, 128, 128), (64, 100, 200), (200, 100, 30), (20, 20, 20),
]  # fmt: skip
WIDTH, HEIGHT = 24 * len(BARS), 48
SIZES = [(WIDTH, HEIGHT), (WIDTH // 2, 20), (WIDTH // 3, 48), (500, 100)]

# Kr and Kb, from the recommendations: BT.709 3.2, BT.601 2.5.1, BT.2020 table 4, SMPTE 240M, FCC 73.682.
MATRICES = {1: (0.2126, 0.0722), 4: (0.30, 0.11), 5: (0.299, 0.114), 6: (0.299, 0.114), 7: (0.212, 0.087),
            9: (0.2627, 0.0593)}  # fmt: skip


def bars() -> npt.NDArray[np.float64]:
    """float64 (H, W, 3), R'G'B' from 0 to 1."""
    return np.broadcast_to(np.repeat(np.array(BARS) / 255, 24, axis=0), (HEIGHT, WIDTH, 3))


def frame_of(planes: list[Samples], pixel_format: str) -> VideoFrame:
    """A frame with these samples, whatever the strides of FFmpeg's buffers."""
    frame = VideoFrame(planes[0].shape[1], planes[0].shape[0], pixel_format)
    for plane, samples in zip(frame.planes, planes, strict=True):
        rows = np.zeros((plane.height, plane.line_size // samples.itemsize), samples.dtype)
        rows[:, : samples.shape[1]] = samples
        plane.update(rows.tobytes())
    return frame


def ycbcr_frame(
    rgb: npt.NDArray[np.float64], pixel_format: str, *, depth: int = 8, matrix: int = 1, full: bool = False
) -> VideoFrame:
    """R'G'B' from 0 to 1 in Y'CbCr, by the definitions in H.273, 8.3; chroma is the first sample of each block."""
    kr, kb = MATRICES[matrix]
    luma = rgb @ np.array([kr, 1 - kr - kb, kb])
    blue, red = (rgb[..., 2] - luma) / (2 - 2 * kb), (rgb[..., 0] - luma) / (2 - 2 * kr)
    top, step = 2**depth - 1, 2 ** (depth - 8)
    if full:
        values = [luma * top, blue * top + 128 * step, red * top + 128 * step]
    else:
        values = [(219 * luma + 16) * step, (224 * blue + 128) * step, (224 * red + 128) * step]
    dtype = np.uint8 if depth == 8 else np.uint16
    samples = [np.clip(np.round(value), 0, top).astype(dtype) for value in values]
    rows, columns = (2 if "420" in pixel_format else 1), (1 if "444" in pixel_format else 2)
    frame = frame_of([samples[0], *(chroma[::rows, ::columns] for chroma in samples[1:])], pixel_format)
    frame.colorspace, frame.color_range = matrix, ColorRange.JPEG if full else ColorRange.MPEG
    return frame


def render(frame: VideoFrame, width: int = 48, height: int = 48, renderer: Renderer | None = None) -> Pixels:
    stream = SimpleNamespace(sample_aspect_ratio=None, container=SimpleNamespace(format=SimpleNamespace(name="mp4")))
    renderer = renderer or Renderer(replace(SPEC, width=width, height=height))
    return renderer.render(TimedFrame(frame=frame, pts=0, end_pts=1, stream=cast(VideoStream, stream)))[0]


def worst_of_bars(picture: Pixels, expected: list[tuple[int, int, int]] = BARS) -> float:
    """The largest error in the middle third of each bar."""
    height, width = picture.shape[:2]
    worst = 0.0
    for number, color in enumerate(expected):
        left, right = (round((number + share) * width / len(expected)) for share in (0.34, 0.66))
        bar = picture[height // 4 : -height // 4, left : max(right, left + 1)]
        worst = max(worst, np.abs(bar.astype(float) - np.array(color)).max())
    return worst


def psnr(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    error = np.mean((one.astype(float) - other.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


# Color.


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("layout", ["420", "422", "444"])
@pytest.mark.parametrize("depth", [8, 10, 12])
def test_color_bars_come_back_within_two_levels(layout: str, depth: int, matrix: int, full: bool) -> None:
    pixel_format = f"yuv{layout}p" + ("" if depth == 8 else f"{depth}le")
    frame = ycbcr_frame(bars(), pixel_format, depth=depth, matrix=matrix, full=full)
    assert {size: worst_of_bars(render(frame, *size)) <= 2 for size in SIZES} == dict.fromkeys(SIZES, True)


@pytest.mark.parametrize("layout", ["420", "444"])
@pytest.mark.parametrize("flag", [ColorRange.UNSPECIFIED, ColorRange.MPEG, ColorRange.JPEG])
def test_the_full_range_formats_are_full_range_whatever_the_flag(layout: str, flag: ColorRange) -> None:
    frame = ycbcr_frame(bars(), f"yuvj{layout}p", full=True, matrix=5)
    frame.color_range = flag
    assert max(worst_of_bars(render(frame, *size)) for size in SIZES) <= 2


def test_a_range_that_is_not_stated_is_limited() -> None:
    frame = ycbcr_frame(bars(), "yuv444p")
    frame.color_range = ColorRange.UNSPECIFIED
    assert worst_of_bars(render(frame, WIDTH, HEIGHT)) <= 2


@pytest.mark.parametrize("pixel_format", ["rgb24", "bgr24", "rgba", "argb", "bgr0", "gbrp", "gbrp10le", "rgb48le"])
@pytest.mark.parametrize("matrix", [0, 1, 2, 9, 14])
def test_rgb_is_taken_as_it_is_whatever_matrix_and_range_it_claims(pixel_format: str, matrix: int) -> None:
    rgb = np.round(bars() * 255).astype(np.uint8)
    frame = VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=pixel_format)
    frame.colorspace, frame.color_range = matrix, ColorRange.MPEG
    assert max(worst_of_bars(render(frame, *size)) for size in SIZES) <= 1


@pytest.mark.parametrize("depth", [8, 10, 16])
@pytest.mark.parametrize("full", [False, True])
def test_gray_keeps_to_its_range(depth: int, full: bool) -> None:
    ramp = np.arange(12) / 11
    shade = ramp * (2**depth - 1) if full else (219 * ramp + 16) * 2 ** (depth - 8)
    rows = np.broadcast_to(np.repeat(np.round(shade), 24), (HEIGHT, WIDTH))
    samples: Samples = rows.astype(np.uint8) if depth == 8 else rows.astype(np.uint16)
    frame = frame_of([samples], "gray" if depth == 8 else f"gray{depth}le")
    frame.color_range = ColorRange.JPEG if full else ColorRange.MPEG
    expected = [(round(255 * value),) * 3 for value in ramp]
    assert max(worst_of_bars(render(frame, *size), expected) for size in SIZES) <= 2


@pytest.mark.parametrize(
    ("width", "height", "matrix"),
    [
        (1278, 576, Colorspace.ITU601),
        (720, 480, Colorspace.ITU601),
        (16, 578, Colorspace.ITU709),
        (1280, 16, Colorspace.ITU709),
        (1920, 1080, Colorspace.ITU709),
    ],
)
@pytest.mark.parametrize("tag", [2, 0, 3])
def test_a_matrix_that_is_not_stated_follows_from_the_size(width: int, height: int, matrix: int, tag: int) -> None:
    frame = VideoFrame(width, height, "yuv420p")
    frame.colorspace = tag
    assert color_of(frame).matrix == matrix
    frame.color_primaries = ColorPrimaries.BT2020
    assert color_of(frame).matrix == Colorspace.BT2020


def test_a_guessed_matrix_is_the_one_that_is_applied() -> None:
    tall = np.repeat(bars(), 13, axis=0)
    for rgb, matrix in ((bars(), 5), (tall, 1)):
        frame = ycbcr_frame(rgb, "yuv444p", matrix=matrix)
        frame.colorspace = 2
        assert worst_of_bars(render(frame, 144, 96)) <= 2


@pytest.mark.parametrize("matrix", [8, 10, 14, 15])
def test_color_that_is_no_matrix_of_rgb_is_refused_by_name(matrix: int) -> None:
    frame = ycbcr_frame(bars(), "yuv420p10le", depth=10)
    frame.colorspace = matrix
    with pytest.raises(VideoError, match="not supported") as caught:
        render(frame)
    assert caught.value.reason is Reason.UNSUPPORTED


# Alpha.


@pytest.mark.parametrize("pixel_format", ["rgba", "argb", "bgra", "rgba64le", "yuva420p", "yuva444p10le", "ya8"])
@pytest.mark.parametrize("size", [(96, 48), (24, 24), (120, 60)])
def test_transparent_pictures_stand_on_black(pixel_format: str, size: tuple[int, int]) -> None:
    rgba = np.zeros((48, 96, 4), np.uint8)
    rgba[:] = (200, 200, 200, 255)
    rgba[:, 32:64, 3] = 128
    rgba[:, 64:] = (255, 255, 255, 0)
    frame = VideoFrame.from_ndarray(rgba, format="rgba").reformat(format=pixel_format)
    expected = [(200, 200, 200), (100, 100, 100), (0, 0, 0)]
    assert worst_of_bars(render(frame, *size), expected) <= 2


def test_hidden_color_does_not_bleed_into_what_is_seen() -> None:
    rgba = np.zeros((48, 96, 4), np.uint8)
    rgba[:, :48] = (0, 0, 255, 255)
    rgba[:, 48:] = (255, 0, 0, 0)
    assert render(VideoFrame.from_ndarray(rgba, format="rgba"), 31, 17)[..., 0].max() == 0


def test_showing_a_transparent_frame_twice_gives_the_same() -> None:
    rgba = np.full((48, 96, 4), 128, np.uint8)
    frame = VideoFrame.from_ndarray(rgba, format="rgba").reformat(format="gbrap")
    assert np.array_equal(render(frame), render(frame))


@pytest.mark.parametrize(("pixel_format", "opaque"), [("rgba", "rgb0"), ("gbrap", "gbrp"), ("yuva420p", "yuv420p")])
def test_an_opaque_picture_is_the_same_as_without_alpha(pixel_format: str, opaque: str) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (48, 96, 3)).astype(np.uint8)
    frame = VideoFrame.from_ndarray(rgb, format="rgb24")
    without = frame.reformat(format=opaque)
    assert np.array_equal(render(frame.reformat(format=pixel_format)), render(without))


def test_transparent_colors_of_a_palette_stand_on_black() -> None:
    frame = VideoFrame(96, 48, "pal8")
    rows = np.zeros((48, frame.planes[0].line_size), np.uint8)
    rows[:, 48:96] = 1
    frame.planes[0].update(rows.tobytes())
    palette = np.zeros((256, 4), np.uint8)
    palette[:2] = [(30, 200, 10, 255), (255, 255, 255, 0)]  # blue, green, red, alpha
    frame.planes[1].update(palette.tobytes())
    assert worst_of_bars(render(frame, 64, 31), [(10, 200, 30), (0, 0, 0)]) <= 2


def test_a_transparent_gif_stands_on_black(tmp_path: Path) -> None:
    path = tmp_path / "v.gif"
    indices = np.zeros((48, 96), np.uint8)
    indices[:, 48:] = 1
    palette = np.zeros((256, 4), np.uint8)  # ARGB
    palette[0], palette[1] = (255, 10, 200, 30), (0, 255, 255, 255)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("gif", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 48, "pal8"
        frame = VideoFrame(96, 48, "pal8")
        frame.planes[0].update(indices.tobytes())
        frame.planes[1].update(palette[:, ::-1].tobytes())
        frame.pts = 0
        container.mux([*stream.encode(frame), *stream.encode(None)])
    assert worst_of_bars(decode(path, SPEC)[0].frames[0], [(10, 200, 30), (0, 0, 0)]) <= 2


# High dynamic range and wide primaries.

TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])
"""BT.2087, 4 (the inverse of its matrix): linear BT.2020 to BT.709."""


def exactly(rgb: npt.NDArray[np.float64], transfer: Transfer) -> npt.NDArray[np.float64]:
    """R'G'B' of BT.2020 as R'G'B' of BT.709 from 0 to 255: the formulas without any table."""
    if transfer is Transfer.PQ:
        nits = pq_to_nits(rgb)
    elif transfer is Transfer.HLG:
        a, b, c = 0.17883277, 0.28466892, 0.55991073  # as BT.2100 prints them
        scene = np.where(rgb <= 0.5, rgb**2 / 3, (np.exp((rgb - c) / a) + b) / 12)
        nits = 1000 * scene * (scene @ np.array([0.2627, 0.6780, 0.0593]))[..., None] ** 0.2
    else:
        nits = 203 * rgb**2.4
    if transfer is not Transfer.SDR:
        brightest = np.maximum(nits.max(axis=-1, keepdims=True), 1e-6)
        nits = nits * tone_mapped(brightest) / brightest
    return np.asarray(255 * np.clip(nits / 203 @ TO_BT709.T, 0, 1) ** (1 / 2.4))


@pytest.mark.parametrize("transfer", [Transfer.PQ, Transfer.HLG, Transfer.SDR])
@pytest.mark.parametrize(("pixel_format", "depth"), [("yuv420p10le", 10), ("yuv444p12le", 12), ("yuv422p10le", 10)])
@pytest.mark.parametrize(("full", "brightest"), [(False, 0.75), (True, 0.75), (False, 1.0)])
def test_wide_color_follows_the_formulas(
    transfer: Transfer, pixel_format: str, depth: int, full: bool, brightest: float
) -> None:
    colors = [np.array(bar) / 255 * brightest for bar in BARS]
    rgb = np.broadcast_to(np.repeat(np.array(colors), 24, axis=0), (HEIGHT, WIDTH, 3))
    frame = ycbcr_frame(rgb, pixel_format, depth=depth, matrix=9, full=full)
    frame.color_primaries = ColorPrimaries.BT2020
    frame.color_trc = {
        Transfer.PQ: ColorTrc.SMPTE2084,
        Transfer.HLG: ColorTrc.ARIB_STD_B67,
        Transfer.SDR: ColorTrc.BT2020_10,
    }[transfer]
    expected = [tuple(np.round(exactly(color[None], transfer)[0])) for color in colors]
    assert max(worst_of_bars(render(frame, *size), cast(Any, expected)) for size in SIZES) <= 2


@pytest.mark.parametrize(("pixel_format", "depth"), [("yuv420p", 8), ("yuvj444p", 8), ("yuv444p10le", 10)])
def test_white_of_wide_color_is_white(pixel_format: str, depth: int) -> None:
    frame = ycbcr_frame(np.ones((48, 48, 3)), pixel_format, depth=depth, matrix=9, full=True)
    frame.color_primaries = ColorPrimaries.BT2020
    assert render(frame).min() == render(frame, 31, 31).min() == 255


@pytest.mark.parametrize("primaries", [ColorPrimaries.BT2020, ColorPrimaries.SMPTE432])
@pytest.mark.parametrize("pixel_format", ["gbrp", "yuv444p"])
def test_wide_primaries_make_the_same_numbers_more_colorful(pixel_format: str, primaries: ColorPrimaries) -> None:
    frame = ycbcr_frame(np.full((48, 48, 3), (0.6, 0.4, 0.3)), "yuv444p").reformat(format=pixel_format)
    before = render(frame)[24, 24].astype(int)
    frame.color_primaries = primaries
    after = render(frame)[24, 24].astype(int)
    assert after[0] - after[2] > before[0] - before[2] + 5
    gray = ycbcr_frame(np.full((48, 48, 3), 0.5), "yuv444p").reformat(format=pixel_format)
    gray.color_primaries = primaries
    assert np.abs(render(gray).astype(int) - 128).max() <= 1


def test_the_tone_curve_is_that_of_bt2390() -> None:
    nits = np.geomspace(0.01, 1000, 500)
    mapped = tone_mapped(nits)
    assert (np.diff(mapped) > 0).all()
    assert mapped[-1] == pytest.approx(203)
    assert (mapped <= nits + 1e-9).all()
    knee = pq_to_nits(np.array(1.5 * nits_to_pq(np.array(203.0)) - 0.5 * nits_to_pq(np.array(1000.0))))
    assert np.allclose(mapped[nits < knee], nits[nits < knee])
    assert tone_mapped(np.array([4000.0]))[0] == pytest.approx(203)


def test_reference_white_of_pq_and_hlg_is_the_same_bright_gray() -> None:
    white = {}
    for trc, signal in ((ColorTrc.SMPTE2084, 0.5807), (ColorTrc.ARIB_STD_B67, 0.75)):  # BT.2408, table 1
        frame = ycbcr_frame(np.full((48, 48, 3), signal), "yuv420p10le", depth=10, matrix=9)
        frame.color_trc = trc
        picture = render(frame)
        white[trc] = int(picture[24, 24, 0])
        assert np.ptp(picture) <= 1
    assert abs(white[ColorTrc.SMPTE2084] - white[ColorTrc.ARIB_STD_B67]) <= 1
    assert 200 < white[ColorTrc.SMPTE2084] < 235


@pytest.mark.parametrize(("transfer", "signal"), [("smpte2084", 0.5807), ("arib-std-b67", 0.75)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_hdr_is_recognised_in_a_file(tmp_path: Path, suffix: str, transfer: str, signal: float) -> None:
    params = f"colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc"
    path = tmp_path / f"v.{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"x264-params": params})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p10le"
        for number in range(5):
            frame = ycbcr_frame(np.full((64, 96, 3), signal), "yuv420p10le", depth=10, matrix=9)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    for clip in decode(path, SPEC):
        assert np.abs(clip.frames.astype(int) - 230).max() <= 3


# Fields.


def moving(number: int, width: int, height: int) -> npt.NDArray[np.float64]:
    """A bright block with soft edges, as high as the frame, that moves 5 columns a field; R'G'B' from 0 to 1."""
    x = np.arange(width) - 10 - 5 * number
    profile = np.clip(x, 0, 3) / 3 * np.clip(24 - x, 0, 3) / 3
    return np.broadcast_to(profile[None, :, None] * 0.8 + 0.1, (height, width, 3))


def interlaced(first: int, width: int, height: int, *, bottom_first: bool = False) -> npt.NDArray[np.float64]:
    """A frame of the fields number ``first`` and the next."""
    woven = moving(first, width, height).copy()
    later = 0 if bottom_first else 1
    woven[later::2] = moving(first + 1, width, height)[later::2]
    return woven


def combing(picture: Pixels) -> float:
    """Mean difference of rows from the mean of their neighbors, in levels."""
    rows = picture.astype(float)
    return float(np.abs(rows[1:-1] - (rows[:-2] + rows[2:]) / 2).max())


def flagged(frame: VideoFrame, field: str) -> VideoFrame:
    """The frame, flagged interlaced."""
    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    graph.link_nodes(source, graph.add("setfield", field), graph.add("buffersink")).configure()
    frame.time_base = Fraction(1, 25)
    graph.vpush(frame)
    return graph.vpull()


@pytest.mark.parametrize("bottom_first", [False, True])
@pytest.mark.parametrize(
    ("pixel_format", "depth"),
    [("yuv420p", 8), ("yuv422p10le", 10), ("yuv444p12le", 12), ("nv12", 8), ("p010le", 10), ("uyvy422", 8),
     ("rgb24", 8), ("gbrp", 8), ("x2rgb10le", 10), ("rgb565le", 8), ("yuva420p", 8)],
)  # fmt: skip
@pytest.mark.parametrize(("width", "height"), [(96, 64), (95, 63)])
def test_interlaced_frames_show_their_first_field_without_combing(
    pixel_format: str, depth: int, width: int, height: int, bottom_first: bool
) -> None:
    # 4:2:0 of woven rows takes the chroma of one field only, so all pictures here are gray
    fields = interlaced(3, width, height, bottom_first=bottom_first)
    frame = VideoFrame.from_ndarray(np.round(fields * 255).astype(np.uint8), format="rgb24")
    frame = flagged(frame.reformat(format=pixel_format), "bff" if bottom_first else "tff")
    picture = render(frame, width, height)
    tolerance = 8 if "565" in pixel_format else 2
    assert combing(picture) <= tolerance
    assert np.abs(picture - 255 * moving(3, width, height)).max() <= tolerance + 1
    progressive = VideoFrame.from_ndarray(np.round(moving(3, width, height) * 255).astype(np.uint8), format="rgb24")
    for size in ((48, 30), (200, 150)):
        shown = render(frame, *size).astype(int)
        assert np.abs(shown - render(progressive.reformat(format=pixel_format), *size)).max() <= tolerance


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p10le", "nv12", "p010le", "uyvy422", "rgb24", "yuva420p"])
@pytest.mark.parametrize("field", ["tff", "bff"])
def test_progressive_pictures_that_are_flagged_interlaced_keep_all_their_rows(pixel_format: str, field: str) -> None:
    """Noise, a slanted edge and a line of one row, as letters have."""
    noise = np.random.default_rng(0).normal(0, 0.01, (64, 96))
    picture = 0.3 + 0.3 * (np.add.outer(np.arange(64) * 2, np.arange(96)) > 110) + noise
    picture[20] += 0.3
    rgb = np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)[..., None].repeat(3, axis=2)
    frame = VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=pixel_format)
    assert np.array_equal(render(flagged(frame, field), 96, 64), render(frame, 96, 64))


@pytest.mark.parametrize("height", [1, 2, 3])
@pytest.mark.parametrize("field", ["tff", "bff"])
def test_interlaced_frames_of_a_few_rows_are_shown(height: int, field: str) -> None:
    frame = flagged(ycbcr_frame(np.full((4, 4, 3), 0.5), "yuv444p").reformat(4, height), field)
    assert np.abs(render(frame).astype(int) - 128).max() <= 2


@pytest.mark.parametrize("field", ["tff", "bff"])
def test_the_rows_of_a_field_stay_where_they_are(field: str) -> None:
    ramp = np.broadcast_to(np.linspace(0, 1, 64)[:, None, None], (64, 96, 3))
    frame = ycbcr_frame(ramp, "yuv444p")
    for size in ((96, 64), (48, 31), (48, 100)):
        difference = np.abs(render(flagged(frame, field), *size).astype(int) - render(frame, *size))
        assert difference[6:-6].max() <= 2


def test_a_progressive_frame_keeps_all_its_rows() -> None:
    frame = ycbcr_frame(interlaced(0, 96, 64), "yuv444p")
    assert combing(render(frame, 96, 64)) > 100


def test_showing_an_interlaced_frame_leaves_it_as_it_is() -> None:
    frame = flagged(ycbcr_frame(interlaced(0, 96, 64), "yuv420p"), "tff")  # the decoder may still predict from it
    before = [bytes(plane) for plane in frame.planes]
    picture = render(frame, 96, 64)
    assert [bytes(plane) for plane in frame.planes] == before
    assert frame.interlaced_frame
    assert np.array_equal(render(frame, 96, 64), picture)


@pytest.mark.parametrize(
    ("codec", "suffix", "pixel_format", "options"),
    [
        ("mpeg2video", "ts", "yuv420p", {"flags": "+ildct+ilme", "qscale": "1", "g": "6"}),
        ("libx264", "mp4", "yuv420p", {"x264-params": "tff=1:keyint=6:crf=8", "preset": "ultrafast"}),
        ("libx264", "mkv", "yuv422p10le", {"x264-params": "bff=1:keyint=6:crf=8:bframes=2", "preset": "fast"}),
        ("prores_ks", "mov", "yuv422p10le", {"flags": "+ildct"}),
    ],
)
def test_interlaced_files_come_out_without_combing_and_spans_equal_the_whole(
    tmp_path: Path, codec: str, suffix: str, pixel_format: str, options: dict[str, str]
) -> None:
    path = tmp_path / f"v.{suffix}"
    bottom_first = "bff" in str(options)
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=25, options=options))
        stream.width, stream.height, stream.pix_fmt = 192, 96, pixel_format
        for number in range(14):
            woven = interlaced(2 * number, 192, 96, bottom_first=bottom_first)
            depth = 10 if "10" in pixel_format else 8
            frame = ycbcr_frame(woven, pixel_format, depth=depth, matrix=5)
            frame = flagged(frame, "bff" if bottom_first else "tff")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    spec = replace(SPEC, width=192, height=96)
    clips = decode(path, spec)
    assert len(clips) == 14
    for number, clip in enumerate(clips):
        assert combing(clip.frames[0]) < 15  # woven: over 100
        assert psnr(clip.frames[0], 255 * moving(2 * number, 192, 96)) > 30
    assert_same(decode(path, spec, clips_per_span=3), clips)


# Geometry.


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (3, 3)])
@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "rgb24", "nv12"])
def test_pictures_of_a_few_pixels_are_shown(size: tuple[int, int], pixel_format: str) -> None:
    rgb = np.full((size[1], size[0], 3), 90, np.uint8)
    frame = VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=pixel_format)
    assert np.abs(render(frame).astype(int) - 90).max() <= 2


@pytest.mark.parametrize("source", [(96, 64), (97, 65), (640, 360), (1279, 719)])
@pytest.mark.parametrize("target", [(48, 48), (33, 47), (128, 128)])
@pytest.mark.parametrize("pixel_format", ["yuv444p", "gbrp", "yuv420p", "yuv422p"])
def test_scaling_moves_nothing_by_a_tenth_of_a_pixel(
    source: tuple[int, int], target: tuple[int, int], pixel_format: str
) -> None:
    (width, height), (out_width, out_height) = source, target
    y, x = np.mgrid[:height, :width]
    u, v = (x + 0.5) / width, (y + 0.5) / height
    for centre_x, centre_y in ((0.5, 0.5), (0.35, 0.6)):
        spot = np.exp(-((u - centre_x) ** 2 + (v - centre_y) ** 2) / 0.012)
        rgb = np.repeat(np.round(spot * 200)[..., None], 3, axis=-1).astype(np.uint8)
        frame = VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=pixel_format)
        picture = render(frame, out_width, out_height).astype(float)[..., 1]
        columns, rows = picture.sum(axis=0), picture.sum(axis=1)
        found_x = (columns @ (np.arange(out_width) + 0.5)) / columns.sum()
        found_y = (rows @ (np.arange(out_height) + 0.5)) / rows.sum()
        assert abs(found_x - centre_x * out_width) < 0.1
        assert abs(found_y - centre_y * out_height) < 0.1
        if centre_x == 0.5 and pixel_format in ("yuv444p", "gbrp"):
            assert np.abs(picture - picture[::-1, ::-1]).max() <= 2


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p"])
@pytest.mark.parametrize(("width", "height"), [(97, 65), (95, 64), (96, 63)])
def test_odd_sizes_keep_their_colors_up_to_the_edge(pixel_format: str, width: int, height: int) -> None:
    rgb = np.zeros((height, width, 3), np.uint8)
    rgb[:, : width // 2], rgb[:, width // 2 :] = (200, 40, 40), (40, 40, 200)
    frame = VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=pixel_format)
    for size in ((width, height), (48, 48), (31, 17)):
        picture = render(frame, *size).astype(int)
        assert np.abs(picture[:, 0] - (200, 40, 40)).max() <= 3
        assert np.abs(picture[:, -1] - (40, 40, 200)).max() <= 3
        assert np.abs(picture[-1, -1] - (40, 40, 200)).max() <= 3


@pytest.mark.parametrize(("siting", "offset"), [(0, 0.0), (1, 0.5), (2, 0.0)])  # left, centre, top left
@pytest.mark.parametrize("width", [96, 48])
def test_chroma_stands_where_the_stream_says_it_was_sampled(
    tmp_path: Path, siting: int, offset: float, width: int
) -> None:
    path = tmp_path / "v.mp4"
    chroma = 128 + 80 * np.exp(-((2 * np.arange(48) + offset + 0.5 - 40) ** 2) / 150)
    planes: list[Samples] = [
        np.full((64, 96), 128, np.uint8),
        np.full((32, 48), 128, np.uint8),
        np.broadcast_to(np.round(chroma), (32, 48)).astype(np.uint8),
    ]
    frame = frame_of(planes, "yuv420p")
    frame.pts = 0
    with av.open(str(path), "w") as container:
        params = f"chromaloc={siting}:qp=0:range=tv"
        stream = container.add_stream("libx264", rate=25, options={"x264-params": params})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        container.mux([*stream.encode(frame), *stream.encode(None)])
    picture = decode(path, replace(SPEC, width=width, height=64))[0].frames[0].astype(float)
    red = (picture[..., 0] - picture[..., 0].min()).sum(axis=0)
    assert red @ (np.arange(width) + 0.5) / red.sum() == pytest.approx(40 * width / 96, abs=0.12)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("degrees", [0, 90])
def test_non_square_pixels_are_widened_before_the_turn(tmp_path: Path, suffix: str, degrees: int) -> None:
    recipe = Recipe(pixel_aspect=Fraction(3, 2), rotation_degrees=degrees, num_frames=2)
    path = write_video(tmp_path / f"v.{suffix}", recipe)
    source = probe(path).source
    # the shape is that of the stored pixel, so that turned by a quarter it is a tall one
    assert (source.width, source.height) == ((96, 96) if degrees else (144, 64))


@pytest.mark.parametrize("suffix", ["h264", "ts"])
def test_a_pixel_shape_that_changes_in_the_middle_is_followed(tmp_path: Path, suffix: str) -> None:
    parts = [
        write_video(tmp_path / f"{n}.{suffix}", Recipe(num_frames=25, pixel_aspect=aspect))
        for n, aspect in enumerate((Fraction(1), Fraction(4, 3)))
    ]
    path = tmp_path / f"v.{suffix}"
    if suffix == "ts":
        with av.open(str(path), "w") as container:
            packets = []
            for n, part in enumerate(parts):
                with av.open(str(part)) as source:
                    if n == 0:
                        stream = container.add_stream_from_template(source.streams.video[0])
                    for packet in source.demux(video=0):
                        if packet.size:
                            packet.stream = stream
                            packet.pts = (packet.pts or 0) + n * 90000
                            packet.dts = (packet.dts or 0) + n * 90000
                            packets.append(packet)
            container.mux(packets)
    else:
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
    clips = decode(path, replace(SPEC, resize="crop"))
    widths = [clip.geometry.scaled_width for clip in clips]
    assert widths[:20] == [72] * 20
    assert widths[-20:] == [96] * 20
    across = decode(path, replace(SPEC, resize="crop", num_frames=len(widths) * 3 // 4))[0]
    assert across.geometry.scaled_width == 72, "a clip has the geometry of its first frame"


def test_a_renderer_that_saw_other_frames_gives_the_same() -> None:
    renderer = Renderer(SPEC)
    frames = [ycbcr_frame(bars(), "yuv420p", matrix=matrix, full=full) for matrix in (1, 5) for full in (False, True)]
    frames += [ycbcr_frame(bars(), "yuv444p12le", depth=12, matrix=9)]
    for frame in [*frames, *frames[::-1]]:
        assert np.array_equal(render(frame, renderer=renderer), render(frame))


def test_a_plain_color_is_the_usual_one() -> None:
    frame = VideoFrame(1920, 1080, "yuv420p")
    frame.color_primaries = ColorPrimaries.SMPTE170M
    plain = Color(matrix=Colorspace.ITU709, full_range=False, transfer=Transfer.SDR, primaries=ColorPrimaries.BT709)
    assert color_of(frame) == plain
    assert plain.is_plain
