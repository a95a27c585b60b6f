"""Error of tiling, and peak memory of a pass.

    python -m benchmarks.tiling [--video FILE]    encode and decode one clip whole and in tiles
    python -m benchmarks.tiling --memory          peak memory of one encode and one decode of several models

Without a video, the clip is a seeded pattern. Each memory figure comes from a fresh process, and is also given in
copies of the largest map, as `models.vidtok.tiling.pass_bytes` counts them.
"""

from __future__ import annotations

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import Row, report
from vidshard.models.tokenizer import frames_to_input, output_to_frames
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.vidtok.layers import FrameAttention
from vidshard.models.vidtok.model import VidTok
from vidshard.models.vidtok.tiling import PEAK_COPIES, Tiling, pass_bytes, tile_starts
from vidshard.models.weights import load_tokenizer
from vidshard.pipeline.storage import open_binary
from vidshard.pipeline.video.decode import decode_span
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.video import ClipSpec, VideoRef

TILES = ((128, 0), (144, 32), (160, 64), (192, 128))
"""(side, overlap) in pixels: two by two tiles on 256 x 256, so that the overlap is exact."""

MEMORY_CASES = (
    ("fsq_causal_488_32768", 17, 64),
    ("fsq_causal_488_32768", 17, 128),
    ("kl_causal_444_4chn", 9, 64),
    ("fsq_causal_888_32768_v1_1", 17, 96),
    ("fsq_causal_41616_262144", 17, 96),
    ("fsq_noncausal_488_262144", 16, 96),
)
"""(model, frames, side)."""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", help="its first clip is used; default: a pattern")
    parser.add_argument("--tokenizer", default="fsq_causal_488_32768", help="an FSQ model; default: %(default)s")
    parser.add_argument("--frames", type=int, default=5)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--json", metavar="FILE", help="write the figures here too")
    arguments = parser.parse_args()
    if arguments.memory:
        report("memory of a pass", measure_memory(), arguments.json)
        return
    num_frames, size = arguments.frames, arguments.size
    clip = first_clip(arguments.video, num_frames, size) if arguments.video else pattern(num_frames, size)
    tokenizer = load_tokenizer(PRESETS[arguments.tokenizer], None, seed=0)
    name = Path(arguments.video).name if arguments.video else "pattern"
    report(f"tiling {name}, {num_frames}x{size}x{size}", compare(tokenizer, clip), arguments.json)


def pattern(num_frames: int, size: int) -> Tensor:
    """Make a clip of seeded blobs of two scales that drift by two pixels a frame: (1, 3, T, H, W) in [-1, 1]."""
    random = torch.Generator().manual_seed(0)
    total = torch.zeros(3, size + 2 * num_frames, size + 2 * num_frames)
    for scale in (32, 8):
        side = math.ceil(total.shape[-1] / scale)
        seeds = torch.randn(1, 3, side, side, generator=random)
        total += torch.nn.functional.interpolate(seeds, size=total.shape[1:], mode="bicubic")[0]
    frames = [total[:, 2 * t : 2 * t + size, 2 * t : 2 * t + size] for t in range(num_frames)]
    return torch.stack(frames, dim=1)[None].div(2).clamp(-1, 1)


def first_clip(path: str, num_frames: int, size: int) -> Tensor:
    """Read the beginning of a video at 8 frames per second: (1, 3, T, H, W) in [-1, 1]."""
    spec = ClipSpec(fps=Fraction(8), num_frames=num_frames, height=size, width=size)
    span = plan_spans(probe_video(VideoRef(uri=path, num_bytes=-1), open_binary), spec, 1)[0]
    frames = decode_span(span, spec, path, max_clips=100)[0].frames
    return frames_to_input(torch.from_numpy(frames)[None])


@torch.inference_mode()
def compare(tokenizer: VidTok, x_BCTHW: Tensor) -> list[Row]:
    """Measure one row for each kind of tiles."""
    whole = tokenizer.encode(x_BCTHW)
    assert whole.tokens is not None
    assert whole.pre_quantized is not None
    frames = output_to_frames(tokenizer.decode(whole.latents)).float()
    size = x_BCTHW.shape[-1]
    rows: list[Row] = []
    for side, overlap in TILES:
        tiling = Tiling(height=side, width=side, overlap=overlap)
        stride = tokenizer.config.space_stride
        per_axis = len(tile_starts(size // stride, side // stride, overlap // stride))
        encoded = tokenizer.encode(x_BCTHW, tiling=tiling)
        decoded = output_to_frames(tokenizer.decode(whole.latents, tiling=tiling)).float()
        assert encoded.tokens is not None
        assert encoded.pre_quantized is not None
        rows.append(
            {
                "tile": f"{side}x{side}",
                "overlap": overlap,
                "pixels, times whole": round((per_axis * side / size) ** 2, 2),
                "tokens that differ, %": round(100 * (encoded.tokens != whole.tokens).float().mean().item(), 1),
                "error, levels": round((encoded.pre_quantized - whole.pre_quantized).square().mean().sqrt().item(), 3),
                "decoded, dB": round(psnr(decoded, frames), 1),
            }
        )
    without_attention(tokenizer)
    whole = tokenizer.encode(x_BCTHW)
    assert whole.tokens is not None
    for row, (side, overlap) in zip(rows, TILES, strict=True):
        tokens = tokenizer.encode(x_BCTHW, tiling=Tiling(height=side, width=side, overlap=overlap)).tokens
        assert tokens is not None
        row["of them without attention, %"] = round(100 * (tokens != whole.tokens).float().mean().item(), 1)
    return rows


def without_attention(tokenizer: VidTok) -> None:
    """Make attention add nothing, so that the remaining error comes from the tiles' edges."""
    for module in tokenizer.modules():
        if isinstance(module, FrameAttention):
            for parameter in module.proj_out.parameters():
                parameter.zero_()


def psnr(frames: Tensor, reference: Tensor) -> float:
    """Compute PSNR in dB between frames in [0, 255]."""
    error = (frames - reference).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


def measure_memory() -> list[Row]:
    """Measure one row for each case, encode and decode."""
    rows: list[Row] = []
    for name, num_frames, side in MEMORY_CASES:
        for action in ("encode", "decode"):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                grown = fresh.submit(grown_bytes, name, action, num_frames, side).result()
            one_map = pass_bytes(PRESETS[name], num_frames, side, side) / PEAK_COPIES
            rows.append(
                {
                    "model": name,
                    "pass": action,
                    "clip": f"{num_frames}x{side}x{side}",
                    "MiB": round(grown / 2**20),
                    "copies": round(grown / one_map, 1),
                }
            )
    return rows


@torch.inference_mode()
def grown_bytes(name: str, action: str, num_frames: int, side: int) -> int:
    """Measure by how much a pass raises this process's peak memory above what it held before."""
    config = PRESETS[name]
    tokenizer = load_tokenizer(config, None, seed=0)
    x_BCTHW = torch.zeros(1, 3, num_frames, side, side)
    latent_side = side // config.space_stride
    latents = torch.zeros(1, config.latent_channels, config.latent_frames(num_frames), latent_side, latent_side)
    before = memory_bytes("VmRSS")
    if action == "encode":
        tokenizer.encode(x_BCTHW)
    else:
        tokenizer.decode(latents)
    return memory_bytes("VmHWM") - before


def memory_bytes(key: str) -> int:
    """Read a line of /proc/self/status in bytes; getrusage would include the parent's memory at the fork."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
