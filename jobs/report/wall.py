"""Wall of clips of a tokenization's report: original, reconstruction and their difference, the worst first.

Clips are decoded from the shards with the weights of the run, a few and within a time limit. Originals are read where
the output lies on this machine, or where they may be fetched.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from vidshard.jobs.report.media import (
    DIFFERENCE_GAIN,
    Frames,
    amplified_difference,
    psnr_of,
    video_of,
)
from vidshard.jobs.report.page import Block, Card, Note, Wall
from vidshard.jobs.report.sample import Sample
from vidshard.pipeline.output.shard_reader import StoredClip, find_clips
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.schemas.errors import VidshardError, one_line
from vidshard.schemas.rejections import VideoError
from vidshard.schemas.uris import is_remote, shown_uri, typed_hosts

WALL_SHARE = 0.05
"""Share of the time of the runs that decoding clips may take at the end of a run."""
NUM_CLIPS = 8
"""Clips that are shown."""
MAX_PIXELS = 33 * 512 * 512
"""Pixels of a clip above which none is decoded: on a CPU it would take minutes, and gigabytes of memory."""
MAX_MEDIA_BYTES = 6 << 20
"""Bytes of all videos of a page."""


@dataclass(frozen=True, kw_only=True)
class WallSettings:
    """Clips to show, and what may be done for them."""

    num_clips: int = NUM_CLIPS
    seconds: float = float("inf")
    """Time after which no further clip is decoded; the first one always is."""
    weights: str | None = None
    """Present location of the weights; None for the one that the output records."""
    fetch_sources: bool = False
    """Whether originals may be read from remote storage: the output names them, and may be foreign."""
    allow_private: bool = False
    """Whether they may lie on web servers with private addresses that the output's own address does not name."""


def wall_of(
    out: str, paths: Sequence[str], sample: Sample, worst: Sequence[Mapping[str, Any]], settings: WallSettings
) -> list[Block]:
    """Decode some clips of an output, and show them; a note says why if there is none.

    Args:
        out: output folder.
        paths: its shards.
        sample: some of its clips.
        worst: ``clip_id`` and ``psnr`` in dB of audited clips, the worst first; empty without an audit.
        settings: clips to show.
    """
    if not sample.clips.num_rows or sample.provenance is None or not settings.num_clips:
        return []
    try:
        resolved = ResolvedRun.from_provenance(
            sample.provenance,
            weights=settings.weights,
            source_hosts=None if settings.allow_private else typed_hosts([out]),
        )
        spec = resolved.largest
        if spec.num_frames * spec.height * spec.width > MAX_PIXELS and resolved.tiling is None:
            return [Note(text="Clips of this size are not decoded for a report. `vidshard decode` shows them.")]
        chosen = _chosen(paths, sample, worst, settings.num_clips)
        shown = list(_shown(out, chosen, dict(_scores(worst)), resolved, paths, settings))
    except VidshardError as error:
        return [Note(text=f"No clip could be decoded: {one_line(error, 300)}", tone="warning")]
    shown.sort(key=lambda one: (one[0] is None, one[0] or 0.0))
    how = "the worst of those that were audited" if worst else "spread evenly over the videos"
    text = (
        f"{len(shown)} clips, {how}, the one with the lowest PSNR first. They play while the pointer is on them, or "
        "after a tap."
    )
    return [Note(text=text), Wall(cards=[card for _, card in shown])]


def _scores(worst: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for clip in worst:
        yield str(clip["clip_id"]), float(clip["psnr"])


def _chosen(
    paths: Sequence[str], sample: Sample, worst: Sequence[Mapping[str, Any]], num_clips: int
) -> list[tuple[str, str]]:
    """Shard and id of the clips to show."""
    ids, places = sample.clips["clip_id"].to_pylist(), sample.clips["path"].to_pylist()
    if worst:
        place_of = dict(zip(ids, places, strict=True))
        rows: list[tuple[str, str]] = []
        for clip_id, _ in list(_scores(worst))[:num_clips]:
            found = [(place_of[clip_id], clip_id)] if clip_id in place_of else find_clips(paths, clip_id)
            rows += found[:1]  # none if a repair has removed it since
        return rows
    first: dict[str, int] = {}
    for number, video in enumerate(sample.clips["video_id"].to_pylist()):
        first.setdefault(video, number)
    starts = sorted(first.values())
    if len(starts) >= num_clips:
        numbers = [starts[n] for n in np.linspace(0, len(starts) - 1, num_clips).round().astype(int)]
    else:  # several clips of each of a few videos
        numbers = sorted(set(np.linspace(0, len(ids) - 1, min(num_clips, len(ids))).round().astype(int).tolist()))
    return [(places[number], ids[number]) for number in numbers]


def _shown(
    out: str,
    rows: Sequence[tuple[str, str]],
    audited: Mapping[str, float],
    resolved: ResolvedRun,
    paths: Sequence[str],
    settings: WallSettings,
) -> Iterator[tuple[float | None, Card]]:
    """PSNR, if it is known, and card of each clip, until the time or the bytes are used up."""
    from vidshard.pipeline.reconstruct import ClipDecoder, stored_clip  # loads torch

    decoder = ClipDecoder(resolved, paths, tiling=resolved.tiling)
    started, num_bytes = time.monotonic(), 0
    for number, row in enumerate(rows):
        if number and (time.monotonic() - started) * (number + 1) / number > settings.seconds:
            return  # the next one would not end in time
        clip = stored_clip(row)
        fake = decoder.decode(clip)
        real, why = _original(clip, resolved, settings)
        frames = {} if real is None else {"original": real}
        frames["reconstruction"] = fake
        if real is not None:
            frames[f"difference × {DIFFERENCE_GAIN}"] = amplified_difference(real, fake)
        if len(resolved.config.parts) > 1 and not resolved.run.continuous:
            frames |= {f"{part} alone": decoder.decode(clip, parts=[part]) for part in resolved.config.parts}
        num_valid = clip.values["num_valid_frames"]
        psnr = audited.get(clip.clip_id)
        if psnr is None and real is not None:
            psnr = psnr_of(real[:num_valid], fake[:num_valid])
        card = clip_card(
            out, clip, {name: shown[:num_valid] for name, shown in frames.items()}, resolved.run.fps, psnr, why
        )
        num_bytes += sum(len(one.uri) for one in card.media)
        if number and num_bytes > MAX_MEDIA_BYTES:
            return
        yield psnr, card


def clip_card(
    out: str, clip: StoredClip, frames: Mapping[str, Frames], rate: Fraction, psnr: float | None, remark: str
) -> Card:
    """Card of a stored clip.

    Args:
        out: output folder.
        clip: the clip.
        frames: what is shown of it, by title.
        rate: frames per second.
        psnr: PSNR in dB; None if it is not known.
        remark: why something is not shown; empty if all is.
    """
    values = clip.values
    times = values["frame_pts_seconds"]
    quality = "" if psnr is None else f"{psnr:.2f} dB · "
    return Card(
        title=f"{quality}{values['uri'].rsplit('/', 1)[-1]}, {times[0]:.2f} s to {times[-1]:.2f} s",
        remark=f"{shown_uri(values['uri'])}{'. ' if remark else ''}{remark}",
        command=f"vidshard decode {shlex.quote(out)} --clip {shlex.quote(clip.clip_id)} --to clip.mp4 --side-by-side",
        media=[video_of(title, shown, rate) for title, shown in frames.items()],
    )


def _original(clip: StoredClip, resolved: ResolvedRun, settings: WallSettings) -> tuple[Frames | None, str]:
    """Frames of a clip from its source, or None and the reason."""
    from vidshard.pipeline.reconstruct import source_frames

    if is_remote(clip.values["uri"]) and not settings.fetch_sources:
        return None, "The original is remote: `vidshard report --fetch-sources` shows it too"
    try:
        return source_frames(clip, resolved), ""
    except VideoError as error:
        return None, f"The original cannot be shown: {one_line(error, 200)}"
