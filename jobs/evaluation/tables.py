"""Tables of an evaluation: text, Markdown, CSV and JSON, with the published figures beside ours."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from vidshard.jobs.evaluation.published import PUBLISHED, Published
from vidshard.jobs.evaluation.resolve import ResolvedEvaluation
from vidshard.models.tokenizer import PRESETS
from vidshard.pipeline.evaluation.scores import Figures
from vidshard.schemas.evaluation import PROTOCOLS, Average
from vidshard.schemas.tokenizers import TokenizerConfig

SCORES_JSON, SCORES_MARKDOWN, SCORES_CSV = "scores.json", "scores.md", "scores.csv"
"""Files of the tables in the folder of an evaluation."""

Format = Literal["text", "markdown", "csv", "json"]

_DIGITS = {"psnr": 2, "ssim": 3, "lpips": 3, "fvd": 1}
_TITLES = {"psnr": "PSNR dB", "ssim": "SSIM", "lpips": "LPIPS", "fvd": "FVD"}
NOT_MEASURED = "not measured"
_POINT = ("fps", "bits_per_pixel", "bits_per_second", "psnr", "ssim", "lpips")


def record_of(
    evaluation: ResolvedEvaluation, figures: Sequence[Figures], rejections: Mapping[str, int]
) -> dict[str, Any]:
    """Everything that was measured, as JSON values: the content of ``scores.json``."""
    average, data = evaluation.run.shown_average, _data(evaluation)
    rows = [_row(one, evaluation, average, data) for one in figures]
    return {
        "average": average,
        "protocol": evaluation.run.protocol,
        "identity": evaluation.identity,
        "not_measured": dict(evaluation.not_measured),
        "rejections": dict(rejections),
        "notices": {m.label: m.notice for g in evaluation.groups for m in g.tokenizers if m.notice is not None},
        "rows": rows,
        "rate_distortion": rate_distortion(rows, data),
    }


def rate_distortion(rows: Sequence[Mapping[str, Any]], data: str) -> list[dict[str, Any]]:
    """Points of a rate-distortion plot: what was measured, and the published models on a data set, by rate.

    Each has ``source`` (``measured`` or ``published``), ``tokenizer``, ``preset``, ``data`` (None if measured),
    ``fps``, ``clip`` (frames, height, width), ``bits_per_pixel``, ``bits_per_second``, ``psnr``, ``ssim``, ``lpips``.
    """
    points: list[dict[str, Any]] = [
        {"source": "measured", "data": None} | {name: row[name] for name in ("tokenizer", "preset", "clip", *_POINT)}
        for row in rows
    ]
    for name, found in PUBLISHED[data].items():
        config = PRESETS[name]
        protocol = PROTOCOLS["vidtwin" if config.family == "vidtwin" else "mcl_jcv"]
        frames = protocol.causal_frames if config.is_causal else protocol.noncausal_frames
        clip, fps = (frames, *protocol.size), float(protocol.fps)
        points.append(
            {
                "source": "published",
                "data": data,
                "tokenizer": name,
                "preset": name,
                "clip": list(clip),
                "fps": fps,
                **bits_of(config, clip, fps),
                **{metric: value for metric, value in asdict(found).items() if metric != "fvd"},
            }
        )
    return sorted(points, key=lambda p: (p["bits_per_pixel"], p["source"], p["tokenizer"], p["fps"]))


def _data(evaluation: ResolvedEvaluation) -> str:
    """Data set whose published figures are shown."""
    protocol = evaluation.run.protocol
    return PROTOCOLS[protocol].data if protocol and PROTOCOLS[protocol].data in PUBLISHED else "MCL-JCV"


def _row(one: Figures, evaluation: ResolvedEvaluation, average: Average, data: str) -> dict[str, Any]:
    config = evaluation.measured[one.tokenizer]
    clip = _clip_of(evaluation, one)
    found = PUBLISHED[data].get(config.name)
    shown: dict[str, float | None] = {name: values[average] for name, values in one.means.items()}
    shown["fvd"] = one.fvd
    return {
        "tokenizer": one.tokenizer,
        "preset": config.name,
        "fps": one.fps,
        "videos": one.num_videos,
        "clips": one.num_clips,
        "frames": one.num_frames,
        "clip": list(clip),
        **{name: shown.get(name) for name in _DIGITS},
        "means": {name: dict(values) for name, values in one.means.items()},
        "fvd_clips": one.num_clips if one.fvd is not None else None,
        "codebook": None if one.use is None else codebook_of(one),
        **bits_of(config, clip, one.fps),
        "published": None if found is None else {"data": data, **asdict(found)},
        "difference": None if found is None else _difference(shown, found),
        "worst": [{"clip_id": clip, "uri": uri, "psnr": value} for clip, uri, value in one.worst],
    }


def codebook_of(one: Figures) -> dict[str, float | int]:
    """Use of the codebook over all clips of a tokenizer."""
    use = one.use
    assert use is not None
    return {
        "size": use.codebook_size,
        "tokens": use.num_tokens,
        "used": use.num_used,
        "ceiling": use.ceiling,
        "used_of_ceiling": use.share_of_ceiling,
        "utilisation": use.utilization,
        "dead": use.codebook_size - use.num_used,
        "perplexity": use.perplexity,
        "entropy_bits": use.entropy_bits,
    }


def bits_of(config: TokenizerConfig, clip: tuple[int, int, int], fps: float) -> dict[str, float]:
    """Bits per pixel and per second: log2 of the codebook for a token, 16 for a value of a latent, which is float16.

    Args:
        clip: frames, height and width in pixels.
        fps: frames per second.
    """
    frames, height, width = clip
    payload = config.payload(config.valid_frames(frames), height, width)
    bits = sum(
        column.num_values * (math.log2(column.codebook_size) if column.codebook_size else 16.0)
        for column in payload
        if not column.name.endswith("logvar")
    )
    return {"bits_per_pixel": bits / (frames * height * width), "bits_per_second": bits * fps / frames}


def _clip_of(evaluation: ResolvedEvaluation, one: Figures) -> tuple[int, int, int]:
    """Frames, height and width of the clips of a tokenizer at a frame rate; with several buckets, of the largest."""
    [spec] = [
        group.resolved.largest
        for group in evaluation.groups
        if float(group.resolved.largest.fps) == one.fps and any(m.label == one.tokenizer for m in group.tokenizers)
    ]
    return spec.num_frames, spec.height, spec.width


def _difference(shown: Mapping[str, float | None], found: Published) -> dict[str, float | None]:
    there = asdict(found)
    differences: dict[str, float | None] = {}
    for name in _DIGITS:
        value = shown.get(name)
        differences[name] = None if value is None else value - there[name]
    return differences


# Formats


def render(record: Mapping[str, Any], form: Format) -> str:
    """Render the record of an evaluation as a table."""
    if form == "json":
        return json.dumps(record, indent=2, default=str) + "\n"
    header, lines = _cells(record)
    if form == "csv":
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerows([header, *lines])
        return buffer.getvalue()
    if form == "markdown":
        points = ["## Rate and distortion", _markdown(*_point_cells(record)), POINTS_NOTE]
        return "\n\n".join([_markdown(header, lines), *_notes(record), *points]) + "\n"
    widths = [max(len(line[n]) for line in [header, *lines]) for n in range(len(header))]
    rows = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *lines]
    ]
    return "\n".join([*rows, "", *_notes(record)]) + "\n"


POINTS_NOTE = (
    "By bits per pixel of the clips. The published figures are of other videos, unless --protocol and its data are "
    "given. A value of a latent counts 16 bits, as it is stored in float16."
)


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table)


def _point_cells(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = ["tokenizer", "source", "clip", "fps", "bits/pixel", "kbit/s", "PSNR dB", "SSIM", "LPIPS"]
    lines = [
        [
            point["tokenizer"],
            "measured" if point["data"] is None else f"published, {point['data']}",
            "x".join(map(str, point["clip"])),
            f"{point['fps']:g}",
            f"{point['bits_per_pixel']:.4f}",
            f"{point['bits_per_second'] / 1000:.1f}",
            *(
                NOT_MEASURED if point[name] is None else f"{point[name]:.{_DIGITS[name]}f}"
                for name in ("psnr", "ssim", "lpips")
            ),
        ]
        for point in record["rate_distortion"]
    ]
    return header, lines


def _cells(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    header = [
        "tokenizer", "fps", *_TITLES.values(), "codes used", "of what could be", "perplexity", "dead codes",
        "bits/pixel", "kbit/s", "videos", "clips",
    ]  # fmt: skip
    lines = []
    for row in record["rows"]:
        codebook = row["codebook"]
        codes = ["", "", "", ""]
        if codebook is not None:
            codes = [
                f"{codebook['used']:,} of {codebook['size']:,}",
                f"{codebook['used_of_ceiling']:.1%} of {codebook['ceiling']:,}",
                f"{codebook['perplexity']:,.0f}",
                f"{codebook['dead']:,}",
            ]
        lines.append(
            [
                row["tokenizer"],
                f"{row['fps']:g}",
                *(NOT_MEASURED if row[name] is None else f"{row[name]:.{digits}f}" for name, digits in _DIGITS.items()),
                *codes,
                f"{row['bits_per_pixel']:.4f}",
                f"{row['bits_per_second'] / 1000:.1f}",
                str(row["videos"]),
                str(row["clips"]),
            ]
        )
        if row["published"] is not None:
            empty = [""] * (len(header) - 6)
            published, difference = row["published"], row["difference"]
            figures = [f"{published[name]:.{digits}f}" for name, digits in _DIGITS.items()]
            lines.append([f"  published, {published['data']}", "", *figures, *empty])
            changes = ["" if difference[n] is None else f"{difference[n]:+.{digits}f}" for n, digits in _DIGITS.items()]
            lines.append(["  difference", "", *changes, *empty])
    return header, lines


def _notes(record: Mapping[str, Any]) -> list[str]:
    notes = [f"Means over {record['average']}."]
    notes += [f"{label}: {notice}" for label, notice in record["notices"].items()]
    notes += [f"{name} is not measured: {reason}." for name, reason in record["not_measured"].items()]
    clips = [row["fvd_clips"] for row in record["rows"] if row["fvd_clips"] is not None]
    if clips:
        notes.append(
            f"FVD is of {min(clips)} clips. It falls with their number, so compare it only at equal numbers of clips; "
            "the papers do not state theirs."
        )
    if any(row["published"] for row in record["rows"]) and record["protocol"] is None:
        notes.append(
            "The published figures are of other videos and perhaps other clips: --protocol names the clips of a paper, "
            "and its videos have to be given."
        )
    if record["rejections"]:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in sorted(record["rejections"].items()))
        notes.append(f"Rejected: {reasons}.")
    return notes
