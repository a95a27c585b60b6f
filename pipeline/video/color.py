"""Color of a frame: matrix, range, transfer and primaries, and the mapping of HDR and wide gamut to BT.709.

Most video needs no arithmetic here: swscale converts it to RGB once it is told the matrix. PQ, HLG and wide primaries
are mapped here, on frames already scaled down: 4 ms for one of 256x256 (python -m benchmarks.picture). Players differ
in how they show HDR on an SDR display; ours is one fixed curve, so that a frame depends on itself alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cache

import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

Floats = npt.NDArray[np.float32]

REFERENCE_WHITE_NITS = 203.0
"""Luminance of SDR white, and of HDR's reference white: ITU-R BT.2408, 2.1."""
PEAK_NITS = 1000.0
"""Luminance above which shades are no longer distinguished: HLG's nominal peak (BT.2100), and most HDR10 mastering.

The peak that a header states is ignored: some streams state it only once, where a later span would not see it.
"""


_PQ_NITS = 10000.0
"""Largest luminance that PQ can code."""


class Transfer(Enum):
    """Transfer function: from code values to light."""

    SDR = "sdr"
    PQ = "pq"
    HLG = "hlg"


# Chromaticities x, y of red, green, blue; all with the white of D65: BT.709 1.3, BT.2020 table 3, SMPTE RP 431-2.
_PRIMARIES = {
    ColorPrimaries.BT709: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    ColorPrimaries.BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    ColorPrimaries.SMPTE432: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_D65 = (0.3127, 0.3290)

# Kr and Kb; H.273, table 4.
_LUMA = {
    Colorspace.ITU709: (0.2126, 0.0722),
    Colorspace.FCC: (0.30, 0.11),
    Colorspace.ITU601: (0.299, 0.114),
    Colorspace.SMPTE240M: (0.212, 0.087),
    Colorspace.BT2020: (0.2627, 0.0593),
}

# Values of H.273, table 4, which FFmpeg uses too: those that are matrices over R'G'B', and those that are not.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
_OTHER_SYSTEMS = {
    8: "YCgCo",
    10: "BT.2020 constant luminance",
    11: "SMPTE ST 2085",
    12: "chromaticity-derived",
    13: "chromaticity-derived, constant luminance",
    14: "ICtCp",
    15: "IPT-C2",
    16: "YCgCo-Re",
    17: "YCgCo-Ro",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Color:
    """Color description of a frame."""

    matrix: Colorspace
    """Matrix of Y'CbCr; without meaning for RGB and gray."""
    full_range: bool
    transfer: Transfer
    primaries: ColorPrimaries

    @property
    def is_plain(self) -> bool:
        """Whether it is SDR with primaries near enough to BT.709 to be shown as they are."""
        return self.transfer is Transfer.SDR and self.primaries is ColorPrimaries.BT709


def color_of(frame: VideoFrame) -> Color:
    """Color description of a frame; where it states none, what players assume.

    Raises:
        ValueError: a system that is no matrix over R'G'B', such as ICtCp.
    """
    transfer = {ColorTrc.SMPTE2084: Transfer.PQ, ColorTrc.ARIB_STD_B67: Transfer.HLG}.get(
        frame.color_trc,  # type: ignore[call-overload]  # an integer is what an IntEnum's key equals
        Transfer.SDR,
    )
    wide = transfer is not Transfer.SDR or frame.color_primaries == ColorPrimaries.BT2020
    primaries = next((known for known in _PRIMARIES if known == frame.color_primaries), None)
    if primaries is None:
        # the old systems' primaries differ little from BT.709's and are shown as those
        primaries = ColorPrimaries.BT2020 if transfer is not Transfer.SDR else ColorPrimaries.BT709
    if frame.format.is_rgb:
        matrix = Colorspace.ITU709
    elif frame.colorspace in _OTHER_SYSTEMS:
        raise ValueError(f"pictures in {_OTHER_SYSTEMS[frame.colorspace]} are not supported")
    else:
        matrix = _MATRICES.get(frame.colorspace) or _guessed_matrix(frame.width, frame.height, wide=wide)
    full = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj") or frame.format.is_rgb
    return Color(matrix=matrix, full_range=full, transfer=transfer, primaries=primaries)


def _guessed_matrix(width: int, height: int, *, wide: bool) -> Colorspace:
    """Guess like libplacebo (mpv, VLC): 1280 columns or more than 576 rows are HD; DXVA2 uses the rows alone."""
    if wide:
        return Colorspace.BT2020
    return Colorspace.ITU709 if width >= 1280 or height > 576 else Colorspace.ITU601


# Y'CbCr as 16-bit numbers to R'G'B'.


def rgb_from_ycbcr(ycbcr: npt.NDArray[np.uint16], color: Color, depth: int) -> Floats:
    """Convert Y'CbCr to R'G'B', by BT.2100 tables 6 and 9 and H.273 8.3.

    Args:
        ycbcr: uint16 (H, W, 3), samples widened to 16 bits as swscale does: shifted, not stretched.
        color: the matrix and range.
        depth: bits of the samples before they were widened.

    Returns:
        float32 (H, W, 3) in [0, 1].
    """
    if color.full_range:
        offset, luma_scale = 0.0, 65536 * (1 - 2.0**-depth)
        chroma_scale = luma_scale
    else:
        offset, luma_scale, chroma_scale = 16 * 256.0, 219 * 256.0, 224 * 256.0
    kr, kb = _LUMA[color.matrix]
    kg = 1 - kr - kb
    red, blue = 2 - 2 * kr, 2 - 2 * kb
    to_rgb = np.array([[1, 0, red], [1, -kb * blue / kg, -kr * red / kg], [1, blue, 0]])
    to_rgb /= np.array([luma_scale, chroma_scale, chroma_scale])
    shift = to_rgb @ np.array([offset, 32768, 32768])
    rgb: Floats = ycbcr.astype(np.float32) @ to_rgb.T.astype(np.float32) - shift.astype(np.float32)
    return np.clip(rgb, 0, 1, out=rgb)


# R'G'B' of any kind to that of BT.709.

_STEPS = (1 << 14) - 1
"""Last index of a lookup table: two bits finer than 12-bit samples."""


def to_bt709(rgb: Floats, color: Color) -> npt.NDArray[np.uint8]:
    """Map R'G'B' to an SDR display of BT.709.

    PQ and HLG are converted to the light of a display of 1000 nits. The EETF of BT.2390 compresses it to 203 nits, by
    the brightest of the three components, so that hues stay. Primaries are changed in linear light; what lies outside
    of BT.709 is clipped. The result is for a BT.1886 display with a black of 0.

    Args:
        rgb: float32 (H, W, 3) in [0, 1].
        color: transfer and primaries of ``rgb``.

    Returns:
        uint8 (H, W, 3), R'G'B'.
    """
    codes = (rgb * _STEPS + 0.5).astype(np.uint16)
    light: Floats = _light_table(color.transfer)[codes]
    if color.transfer is Transfer.PQ:
        light *= _gain_table()[_gain_index(light.max(axis=-1))][..., None]
    elif color.transfer is Transfer.HLG:
        # BT.2100 table 5: the OOTF for 1000 nits, F = Y ** 0.2 * E
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= (luminance**0.2 * (PEAK_NITS / REFERENCE_WHITE_NITS))[..., None]
        light *= _gain_table()[_gain_index(light.max(axis=-1))][..., None]
    if color.primaries is not ColorPrimaries.BT709:
        light = light @ _primaries_to_bt709(color.primaries).T
    np.sqrt(np.clip(light, 0, 1, out=light), out=light)
    return _display_table()[(light * _STEPS + 0.5).astype(np.uint16)]


@cache
def _light_table(transfer: Transfer) -> Floats:
    """Linear light of each code, relative to SDR white for SDR and PQ, to the scene's peak for HLG."""
    signal = np.arange(_STEPS + 1) / _STEPS
    if transfer is Transfer.SDR:
        light = signal**2.4  # BT.1886, with a black of 0
    elif transfer is Transfer.PQ:
        light = pq_to_nits(signal) / REFERENCE_WHITE_NITS
    else:
        light = hlg_to_scene(signal)
    return light.astype(np.float32)


def _gain_index(light: Floats) -> npt.NDArray[np.uint16]:
    """Index into ``_gain_table`` for light relative to SDR white; its square root keeps shadows precise."""
    index: Floats = np.sqrt(light * np.float32(REFERENCE_WHITE_NITS / _PQ_NITS))
    return (index * _STEPS + 0.5).astype(np.uint16)


@cache
def _gain_table() -> Floats:
    """Factor of light, by ``_gain_index``."""
    nits = (np.arange(_STEPS + 1) / _STEPS) ** 2 * _PQ_NITS
    gain = np.ones(_STEPS + 1)
    gain[1:] = tone_mapped(nits[1:]) / nits[1:]
    return gain.astype(np.float32)


@cache
def _display_table() -> npt.NDArray[np.uint8]:
    """Code for each square root of light: the inverse of BT.1886's exponent 2.4."""
    root = np.arange(_STEPS + 1) / _STEPS
    return np.round(255 * root ** (2 / 2.4)).astype(np.uint8)


@cache
def _primaries_to_bt709(primaries: ColorPrimaries) -> Floats:
    def to_xyz(which: ColorPrimaries) -> npt.NDArray[np.float64]:
        columns = np.array([(x / y, 1, (1 - x - y) / y) for x, y in _PRIMARIES[which]]).T
        x, y = _D65
        return columns * np.linalg.solve(columns, np.array([x / y, 1, (1 - x - y) / y]))

    matrix = np.linalg.solve(to_xyz(ColorPrimaries.BT709), to_xyz(primaries))
    return matrix.astype(np.float32)


# The formulas themselves, in float64.


def pq_to_nits(signal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """PQ, SMPTE ST 2084, as in BT.2100 table 4: display light in nits from R'G'B' in [0, 1]."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = signal ** (1 / m2)
    nits: npt.NDArray[np.float64] = _PQ_NITS * (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1)
    return nits


def nits_to_pq(nits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The inverse of ``pq_to_nits``."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 4096 * 128, 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32
    power = (nits / _PQ_NITS) ** m1
    signal: npt.NDArray[np.float64] = ((c1 + c2 * power) / (1 + c3 * power)) ** m2
    return signal


def hlg_to_scene(signal: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """HLG, ARIB STD-B67, as in BT.2100 table 5: scene light in [0, 1] from R'G'B' in [0, 1]."""
    a = 0.17883277
    b, c = 1 - 4 * a, 0.5 - a * np.log(4 * a)
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def tone_mapped(nits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Tone mapping: the EETF of BT.2390-10, 5.4.1, from a peak of 1000 nits to 203, both with a black of 0.

    Unchanged up to 88 nits; reference white comes out as 159 nits (level 230), the peak as 203 (255).
    """
    signal = nits_to_pq(nits)
    peak, target = nits_to_pq(np.array([PEAK_NITS, REFERENCE_WHITE_NITS]))
    e1, max_luminance = np.minimum(signal / peak, 1), target / peak
    knee = 1.5 * max_luminance - 0.5
    t = np.maximum(e1 - knee, 0) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * max_luminance
    )
    return pq_to_nits(np.where(e1 < knee, e1, spline) * peak)
