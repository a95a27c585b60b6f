"""Report of a tokenization: how far it is, its speed, what was rejected, which clips came out, and some of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import yaml

from vidshard.jobs.report.blocks import NOT_DEFAULT, codebook_blocks, duration, rejection_blocks, setting_value, size
from vidshard.jobs.report.charts import bar_chart, histogram, line_chart, share_chart
from vidshard.jobs.report.page import Chart, Details, Facts, Note, Page, Table
from vidshard.jobs.report.sample import Sample, read_sample
from vidshard.jobs.report.wall import NUM_CLIPS, WALL_SHARE, WallSettings, wall_of
from vidshard.jobs.tokenization.history import read_history
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import SUMMARY, shard_paths
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.tokens import parse_json

_MAX_SUMMARY_BYTES = 16 << 20

Record = Mapping[str, Any]


def tokenized_page(out: str, record: Record, made: str, settings: WallSettings | None = None) -> Page:
    """Make the report of an output.

    Args:
        out: output folder.
        record: its ``run.json``.
        made: when and by what the page is made.
        settings: clips to decode; None to decode within a share of the time of the runs, as at the end of a run.

    Raises:
        VidshardError: the output is damaged, or cannot be read.
    """
    runs = read_history(out)
    summary = _summary(out)
    paths = shard_paths(out)
    sample = read_sample(paths)
    rejects = read_rejects(out).to_pylist()
    page = Page(title=f"Tokens of {record['tokenizer'].get('name', '?')}", place=out, status="", tone="good", made=made)
    page.status, page.tone = _status(summary)
    page.add("overview", "Overview", *_alerts(summary, record), _figures(summary, runs, sample), *_what_ran(record))
    page.add("speed", "Speed", *_speed(summary, runs))
    page.add("rejects", "Rejections", *rejection_blocks(rejects, "rejects/"))
    worst = _worst(summary, sample)
    if settings is None:
        spent = sum(run.get("seconds", {}).get("tokenize", 0.0) for run in runs or [summary])
        settings = WallSettings(seconds=WALL_SHARE * spent)
    page.add("wall", "Reconstructions", *wall_of(out, paths, sample, worst, settings))
    page.add("clips", "Clips", *_distributions(sample))
    page.add("codebook", "Codebook", *_codebook(sample))
    return page


def _summary(out: str) -> dict[str, Any]:
    path = storage.join(out, SUMMARY)
    if not storage.exists(path):
        return {}
    found = parse_json(storage.read_bytes(path, max_bytes=_MAX_SUMMARY_BYTES), SUMMARY)
    return found if isinstance(found, dict) else {}


# Overview


def _status(summary: Record) -> tuple[str, Any]:
    if not summary:
        return "no run has ended yet", "warning"
    if summary.get("interruption"):
        return "interrupted", "warning"
    if summary.get("problems"):
        return "failed", "error"
    left = summary.get("pending_spans", 0)
    return (f"{left:,} spans left to do", "warning") if left else ("complete", "good")


def _alerts(summary: Record, record: Record) -> list[Note]:
    notes = [Note(text=str(text), tone="error") for text in summary.get("problems", [])]
    notice = record.get("notice") or summary.get("notice")
    notes += [Note(text=str(text), tone="warning") for text in (summary.get("quality") or {}).get("findings", [])]
    return notes + ([Note(text=str(notice), tone="warning")] if notice else [])


def _figures(summary: Record, runs: Sequence[Record], sample: Sample) -> Facts:
    written = [run.get("written", {}) for run in runs] or [summary.get("written", {})]
    clips = sum(part.get("num_clips", 0) for part in written)
    num_bytes = sum(part.get("file_bytes", 0) for part in written)
    values = sum(part.get("num_values", 0) for part in written)
    payload = sum(part.get("payload_bytes", 0) for part in written)
    seconds = sum(run.get("seconds", {}).get("tokenize", 0.0) for run in runs or [summary])
    video = sum((run.get("usage") or {}).get("video_seconds", 0.0) for run in runs or [summary])
    rejected = summary.get("num_rejected_videos", 0)
    num_shards = sum(part.get("num_shards", 0) for part in written)
    items = [
        ("videos", f"{summary.get('num_videos', 0):,}", f"{rejected:,} rejected in whole or in part"),
        ("clips", f"{clips:,}", f"of {summary.get('expected_clips', 0):,} by the headers of the videos"),
        ("video in clips", duration(video), f"tokenized in {duration(seconds)}"),
    ]
    if seconds:
        items.append(("speed", f"{clips / seconds:,.3g} clips/s", f"{video / seconds:,.3g} s of video per second"))
    items.append(("shards", size(num_bytes), f"{num_shards:,} file{'s' * (num_shards != 1)}"))
    if sample.uses and values:
        items.append(("bits a value", f"{8 * payload / values:.2f}", "on disk, compressed"))
    if len(runs) > 1:
        items.append(("runs", f"{len(runs):,}", "of this output; a killed one leaves no figures"))
    return Facts(items=items)


def _what_ran(record: Record) -> list[Table | Details]:
    run, defaults = record.get("run", {}), TokenizeRun.model_construct().model_dump(mode="json")
    changed = {name: value for name, value in run.items() if name not in defaults or defaults[name] != value}
    rows = [[name, setting_value(value)] for name, value in changed.items()]
    rows += [["weights SHA-256", str(record.get("weights_sha256", ""))[:16]]]
    rows += [["vidshard", str(record.get("code_version", ""))]]
    everything = {key: record.get(key) for key in ("run", "tokenizer", "libraries", "weights_source", "weights_sha256")}
    text = yaml.safe_dump(json.loads(json.dumps(everything, default=str)), sort_keys=False)
    return [
        Table(title=NOT_DEFAULT, header=["setting", "value"], rows=rows, codes=frozenset({1})),
        Details(title="All settings, tokenizer and versions", lines=text.splitlines()[:400]),
    ]


def _worst(summary: Record, sample: Sample) -> list[dict[str, Any]]:
    """Audited clips with the lowest PSNR, the worst first: ``clip_id`` and ``psnr``."""
    known = [
        {"clip_id": one["clip_id"], "psnr": one["psnr"]}
        for one in (summary.get("quality") or {}).get("worst", [])
        if isinstance(one.get("psnr"), float) and isinstance(one.get("clip_id"), str)
    ]
    if known:
        return known
    scores, ids = sample.clips["audit_psnr"].to_pylist(), sample.clips["clip_id"].to_pylist()
    found = sorted((psnr, clip_id) for psnr, clip_id in zip(scores, ids, strict=True) if psnr is not None)
    return [{"clip_id": clip_id, "psnr": psnr} for psnr, clip_id in found[: 4 * NUM_CLIPS]]


# Speed


def _speed(summary: Record, runs: Sequence[Record]) -> list[Chart | Note]:
    blocks: list[Chart | Note] = []
    points, starts = _rates(runs)
    blocks.append(
        Chart(
            title="Throughput over time",
            spec=line_chart(points, x="minutes", y="clips/s", rules=starts, fill=True),
            remark="a dashed line is the start of a later run; the time between runs is left out" if starts else "",
        )
    )
    wall: Counter[str] = Counter()
    workers: Counter[str] = Counter()
    for run in runs or [summary]:
        seconds = run.get("seconds", {})
        named = {name: seconds.get(name, 0.0) for name in ("start", "plan", "tokenize")}
        wall.update({**named, "end": max(0.0, seconds.get("total", 0.0) - sum(named.values()))})
        workers.update({name: seconds.get(key, 0.0) for name, key in _WORKER_SECONDS.items()})
    blocks.append(
        Chart(
            title="Where the time went",
            spec=bar_chart(dict(wall), x="seconds", text={k: duration(v) for k, v in wall.items()}) if wall else None,
            remark="by phase, as a clock on the wall counts",
        )
    )
    blocks.append(
        Chart(
            title="What the workers did",
            spec=share_chart({"workers": dict(workers)}, x="seconds, summed over all workers")
            if any(workers.values())
            else None,
            remark="while videos were tokenized",
        )
    )
    usage = summary.get("usage")
    if usage:
        from vidshard.jobs.tokenization.usage import Usage

        known = Usage(**usage)
        blocks.append(
            Note(
                text=f"The latest run: {known.yields}; encoders busy {known.busy_share:.0%} of the phase. It "
                f"{known.verdict}."
            )
        )
    return blocks


_WORKER_SECONDS = {
    "decoding": "decoding, all workers",
    "encoding": "encoding, all workers",
    "encoders waiting": "encoders waiting for frames",
    "writing": "writing shards",
}
_BINS = 60


def _rates(runs: Sequence[Record]) -> tuple[list[tuple[float, float, str]], list[float]]:
    """Clips per second over minutes of work, and the minutes at which later runs start."""
    offset, points, starts = 0.0, [], []
    for run in runs:
        line = [(float(t), float(clips)) for t, clips, _ in run.get("timeline", [])]
        if len(line) < 2:
            continue
        times, clips = np.array([(0.0, 0.0), *line]).T
        edges = np.linspace(0, times[-1], min(_BINS, len(times)) + 1)
        done = np.interp(edges, times, clips)
        rates = np.diff(done) / np.maximum(np.diff(edges), 1e-9)
        points += [
            ((offset + (a + b) / 2) / 60, float(r), "clips") for a, b, r in zip(edges, edges[1:], rates, strict=False)
        ]
        if offset:
            starts.append(offset / 60)
        offset += times[-1]
    return points, starts


# Clips


def _distributions(sample: Sample) -> list[Note | Chart]:
    clips = sample.clips
    if not clips.num_rows:
        return [Note(text="No clip was written.")]
    videos = clips.group_by("video_id").aggregate(
        [
            ("source_fps", "min"),
            ("source_width", "min"),
            ("source_height", "min"),
            ("clip_id", "count"),
            ("source_codec", "min"),
        ]
    )
    widths, heights = videos["source_width_min"].to_pylist(), videos["source_height_min"].to_pylist()
    sizes = Counter(f"{w}x{h}" for w, h in zip(widths, heights, strict=True))
    codecs = Counter(videos["source_codec_min"].to_pylist())
    valid = pc.divide(pc.cast(clips["num_valid_frames"], "float64"), clips["fps"]).to_pylist()
    blocks: list[Note | Chart] = []
    if sample.num_clips > clips.num_rows or sample.num_shards == 48:
        blocks.append(
            Note(text=f"By {clips.num_rows:,} clips of {sample.num_shards:,} shards, evenly spread over all.")
        )
    for name, title, axis in _QUALITY:
        values = [value for value in clips[name].to_pylist() if value is not None]
        blocks.append(
            Chart(
                title=title,
                spec=histogram(values, x=axis, count="clips"),
                remark=f"mean {np.mean(values):.3g} of {len(values):,} audited clips" if values else "",
            )
        )
    blocks += [
        Chart(title="Clips of a video", spec=histogram(videos["clip_id_count"].to_pylist(), x="clips", count="videos")),
        Chart(title="Length of a clip", spec=histogram(valid, x="seconds of video", count="clips")),
        Chart(
            title="Frame rate of the sources",
            spec=histogram(videos["source_fps_min"].to_pylist(), x="frames per second", count="videos"),
        ),
        Chart(title="Frame size of the sources", spec=bar_chart(dict(sizes.most_common(8)), x="videos")),
        Chart(title="Codec of the sources", spec=bar_chart(dict(codecs.most_common(8)), x="videos")),
    ]
    buckets = Counter(value for value in clips["bucket"].to_pylist() if value is not None)
    if len(buckets) > 1:
        blocks.append(Chart(title="Bucket", spec=bar_chart(dict(buckets.most_common(8)), x="clips")))
    return blocks


_QUALITY = (
    ("audit_psnr", "PSNR", "dB"),
    ("audit_ssim", "SSIM", "SSIM"),
    ("audit_lpips", "LPIPS", "LPIPS, lower is better"),
)


def _codebook(sample: Sample) -> list[Facts | Chart]:
    blocks: list[Facts | Chart] = []
    for name, use in sample.uses.items():
        blocks += codebook_blocks(name, use)
    return blocks
