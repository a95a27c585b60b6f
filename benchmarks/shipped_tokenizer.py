"""Recipe of the weights that come with the package, and the quality of a tokenizer's reconstructions.

The recipe starts from nothing, first without Haar bands. PHOTOS, CLIPS and NATURAL are folders of material whose
licenses allow training on it. The steps before ``shipped_training`` also run without them, on generated material alone.

    python -m benchmarks.motion_corpus corpus/64 --videos 6000 --crop 64 --photos PHOTOS --clips CLIPS
    python -m benchmarks.motion_corpus corpus/128 --videos 600 --crop 128 --photos PHOTOS --clips CLIPS --seed 1
    vidshard train stage1 --preset small --tokenizer fsq_causal_488_small --videos corpus/64 --out runs/small
    python -m benchmarks.shipped_tokenizer spread runs/small/stage1/tokenizer.safetensors spread.safetensors corpus/64
    vidshard train finetune --preset small --tokenizer fsq_causal_488_small --videos corpus/64 --out runs/small17 \
        --init-from spread.safetensors
    vidshard train stage2 --preset small --tokenizer fsq_causal_488_small --videos corpus/128 --out runs/small2 \
        --init-from runs/small17/finetune
    python -m benchmarks.shipped_training runs/small3 --until 20:57 --init runs/small2/stage2/tokenizer.safetensors \
        --tokenizer fsq_causal_488_small --learning-rate 8e-5 --videos NATURAL --films CLIPS --photos PHOTOS
    python -m benchmarks.shipped_training runs/haar --until 22:20 --init runs/small3/averaged.safetensors \
        --videos NATURAL --films CLIPS --photos PHOTOS
    python -m benchmarks.shipped_training runs/lpips --until 22:40 --init runs/haar/averaged.safetensors \
        --tokenizer fsq_causal_488_small_haar_lpips --lpips 0.4 --learning-rate 3e-4 \
        --videos NATURAL --films CLIPS --photos PHOTOS
    python -m benchmarks.shipped_tokenizer write runs/haar/averaged.safetensors trained.json
    vidshard evaluate UNSEEN --tokenizer trained.safetensors --fps 8,30 --average clips

* ``spread`` scales up encoder channels that use few of FSQ's levels, see `spread`.
* ``write`` rounds the weights to float16 and writes them beside ``trained.json``, with the config, their digest and the
  content of that file.
* ``measure`` compares the clips of an output with their sources.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from benchmarks.report import Row, report
from vidshard.models.codebook_use import CodebookUse
from vidshard.models.metrics import psnr, ssim
from vidshard.models.tokenizer import frames_to_input
from vidshard.models.vidtok.config import VidTokConfig
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import load_tokenizer, load_weights, save_tokenizer, weights_digest
from vidshard.pipeline.output.shard_reader import find_clips, open_shard, output_shards
from vidshard.pipeline.reconstruct import load_decoder, reconstruct, source_frames, stored_clip
from vidshard.pipeline.resolved_run import ResolvedRun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="compare the clips of an output with their sources")
    measuring.add_argument("out", help="folder that vidshard tokenize wrote, of clips apart")
    measuring.add_argument("--json", metavar="FILE", help="also write the rows here")
    spreading = commands.add_parser("spread", help="widen FSQ's channels to their levels before more training")
    spreading.add_argument("weights", type=Path, help="what a stage of vidshard train wrote")
    spreading.add_argument("target", type=Path, help="file for the new weights")
    spreading.add_argument("videos", type=Path, help="folder of videos, as small as training clips")
    writing = commands.add_parser("write", help="round a trained tokenizer and say how it came about")
    writing.add_argument("weights", type=Path, help="what a stage of vidshard train wrote")
    writing.add_argument("summary", type=Path, help="JSON object: data, steps, figures")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure(arguments.out, arguments.json)
    elif arguments.command == "spread":
        spread(arguments.weights, arguments.target, arguments.videos)
    else:
        write(arguments.weights, arguments.summary)


def write(weights: Path, summary: Path) -> None:
    """Write ``<summary>.safetensors``: float16 weights, and what is in the JSON file with their digest."""
    config, state = load_weights(weights)
    assert isinstance(config, VidTokConfig), f"{config.name} is no VidTok"
    rounded = VidTok(config)
    rounded.load_state_dict(state)
    rounded.half()
    digest = weights_digest(rounded.state_dict())
    target = summary.with_suffix(".safetensors")
    save_tokenizer(target, rounded, summary={**json.loads(summary.read_text()), "weights_sha256": digest})
    print(f"{target}: {target.stat().st_size:,} bytes, SHA-256 of the weights {digest}")


SPREAD_LEVELS = 2.0
"""Standard deviation of a channel that uses its eight levels equally: 2.3."""


def spread(weights: Path, target: Path, videos: Path, *, most: int = 64) -> None:
    """Scale up encoder channels that use few of FSQ's levels, and scale down the decoder's input weights to match.

    The entropy's term leaves channels that nearly always give the middle level: what they could tell, rounding takes.
    With the factor undone in the decoder's first layer the picture stays about what it was, and training goes on from
    tokens that can carry more. From 10.2 bits of a token, 2,820 steps in, to 11.6, and 12.3 after 500 more.
    """
    config, _ = load_weights(weights)
    assert isinstance(config, VidTokConfig), f"{config.name} is no VidTok"
    tokenizer = load_tokenizer(config, weights)
    found = []
    for path in sorted(videos.iterdir())[:most]:
        with av.open(str(path)) as container:
            frames = np.stack(
                [
                    frame.to_ndarray(format="rgb24")
                    for frame, _ in zip(container.decode(video=0), range(17), strict=False)
                ]
            )
        with torch.inference_mode():
            encoded = tokenizer.encode(frames_to_input(torch.from_numpy(frames[None])))
        assert encoded.pre_quantized is not None, f"{config.name} has no FSQ"
        found.append(encoded.pre_quantized[0].flatten(1))
    factors = (SPREAD_LEVELS / torch.cat(found, dim=1).std(dim=1)).clamp(min=1, max=8)
    last, first = tokenizer.encoder.conv_out.conv, tokenizer.decoder.conv_in.conv
    assert last.bias is not None
    with torch.no_grad():
        last.weight.mul_(factors.view(-1, 1, 1, 1, 1))
        last.bias.mul_(factors)
        first.weight.div_(factors.view(1, -1, 1, 1, 1))
    save_tokenizer(target, tokenizer)
    print(f"{target}: channels times {', '.join(f'{factor:.2f}' for factor in factors.tolist())}")


def measure(out: str, json_path: str | None) -> None:
    """Print PSNR, SSIM and the use of the codebook, for each video of an output and over all clips alike."""
    paths = output_shards(out)
    with open_shard(paths[0]) as (_, provenance):
        resolved = ResolvedRun.from_provenance(provenance)
    tokenizer = load_decoder(resolved)
    use = CodebookUse(tokenizer.config.codebook_size or 1)
    found: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for path, clip_id in find_clips(paths, ""):
        clip = stored_clip((path, clip_id))
        frames = reconstruct(clip, tokenizer, padding=resolved.padding)[: clip.values["num_valid_frames"]]
        source = source_frames(clip, resolved)[: len(frames)]
        real, fake = _frames(source), _frames(frames)
        found[Path(clip.values["uri"]).name].append((float(psnr(real, fake).mean()), float(ssim(real, fake).mean())))
        if "tokens" in clip.payload:
            use.update(clip.payload["tokens"])
    rows: list[Row] = [_row(name, figures) for name, figures in sorted(found.items())]
    rows.append(_row("all clips", [figures for of_video in found.values() for figures in of_video]))
    report(f"reconstruction by {tokenizer.config.name}", rows, json_path)
    if tokenizer.config.codebook_size:
        used, size = int((use.counts > 0).sum()), len(use.counts)
        share = use.counts[use.counts > 0] / use.counts.sum()
        bits = float(-(share * np.log2(share)).sum())
        print(f"{int(use.counts.sum()):,} tokens: {used:,} of {size:,} in use, entropy {bits:.2f} bits")


def _row(name: str, figures: list[tuple[float, float]]) -> Row:
    mean = np.mean(figures, axis=0)
    return {"video": name, "clips": len(figures), "psnr_db": round(float(mean[0]), 2), "ssim": round(float(mean[1]), 3)}


def _frames(frames_THWC: np.ndarray) -> Tensor:
    return torch.from_numpy(frames_THWC.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


if __name__ == "__main__":
    main()
