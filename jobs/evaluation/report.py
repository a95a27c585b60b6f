"""Report of an evaluation: table with published figures, rate and distortion, quality by clip, the worst clips."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from vidshard.jobs.report.blocks import NOT_DEFAULT, codebook_blocks, rejection_blocks, setting_value
from vidshard.jobs.report.charts import histogram, scatter_chart
from vidshard.jobs.report.media import DIFFERENCE_GAIN, Frames, amplified_difference, video_of
from vidshard.jobs.report.page import Block, Card, Chart, Details, Facts, Note, Page, Table, Wall
from vidshard.jobs.report.sample import read_sample
from vidshard.jobs.report.wall import MAX_MEDIA_BYTES, MAX_PIXELS, WallSettings, wall_of
from vidshard.models.codebook_use import MAX_CODEBOOK, CodebookUse
from vidshard.pipeline import storage
from vidshard.pipeline.evaluation.scores import ScoredSpans, counts_key, read_scores
from vidshard.schemas.errors import VidshardError, one_line
from vidshard.schemas.evaluation import EvaluateRun
from vidshard.schemas.rejections import VideoError
from vidshard.schemas.tokens import parse_json
from vidshard.schemas.uris import is_remote

if TYPE_CHECKING:
    from vidshard.jobs.evaluation.resolve import Group, ResolvedEvaluation

_MAX_BYTES = 64 << 20
_MEASURES = (("psnr", "PSNR", "dB"), ("ssim", "SSIM", "SSIM"), ("lpips", "LPIPS", "LPIPS, lower is better"))

Record = Mapping[str, Any]


def evaluated_page(out: str, run: Record, made: str, settings: WallSettings | None = None) -> Page:
    """Make the report of an evaluation.

    Args:
        out: folder of the evaluation.
        run: its ``run.json``.
        made: when and by what the page is made.
        settings: clips to reconstruct; None for the default number of them.

    Raises:
        VidshardError: a file is damaged, or cannot be read.
    """
    from vidshard.jobs.evaluation.tables import SCORES_JSON

    path = storage.join(out, SCORES_JSON)
    scored = read_scores(out)
    page = Page(title="Evaluation of tokenizers", place=out, status="complete", tone="good", made=made)
    if not storage.exists(path):
        page.status, page.tone = "not finished", "warning"
        page.add("overview", "Overview", Note(text=f"{len(scored.rows):,} scores so far."), *_what_ran(run))
        return page
    record = parse_json(storage.read_bytes(path, max_bytes=_MAX_BYTES), SCORES_JSON)
    page.add("overview", "Overview", *_overview(record, run))
    page.add("rate", "Rate and distortion", *_rate_charts(record))
    page.add("quality", "Quality of the clips", *_quality(scored))
    page.add("wall", "Reconstructions", *_wall(run, scored, settings or WallSettings()))
    page.add("codebook", "Codebook", *_codebooks(record, scored))
    page.add("rejects", "Rejections", *rejection_blocks(scored.rejections, "scores/"))
    return page


def _overview(record: Record, run: Record) -> list[Block]:
    from vidshard.jobs.evaluation.tables import render

    header, *lines = csv.reader(io.StringIO(render(record, "csv")))
    quiet = frozenset(number for number, line in enumerate(lines) if line[0].startswith(" "))
    rows = record["rows"]
    notes = [Note(text=f"{name}: {text}", tone="warning") for name, text in record["notices"].items()]
    notes += [Note(text=f"{name} is not measured: {why}.") for name, why in record["not_measured"].items()]
    if any(row["published"] for row in rows) and record["protocol"] is None:
        notes.append(
            Note(
                text="The published figures are of other videos and perhaps other clips: --protocol names the clips of "
                "a paper."
            )
        )
    best = max(rows, key=lambda row: row["psnr"] or 0.0)
    facts = [
        ("videos", f"{max(row['videos'] for row in rows):,}", ""),
        ("clips", f"{max(row['clips'] for row in rows):,}", "of each tokenizer and frame rate, at most"),
        ("best PSNR", f"{best['psnr']:.2f} dB", f"{best['tokenizer']} at {best['fps']:g} fps"),
        ("means over", str(record["average"]), str(record["protocol"] or "no protocol")),
    ]
    table = Table(header=header, rows=lines, title="Comparison", quiet=quiet)
    return [Facts(items=facts), table, *notes, *_what_ran(run)]


def _what_ran(run: Record) -> list[Block]:
    defaults = EvaluateRun.model_construct().model_dump(mode="json")
    settings = run.get("settings", {})
    changed = [[k, setting_value(v)] for k, v in settings.items() if k not in defaults or defaults[k] != v]
    everything = {name: run.get(name) for name in ("settings", "libraries", "code_version", "started_at")}
    lines = yaml.safe_dump(everything, sort_keys=False).splitlines()
    return [
        Table(title=NOT_DEFAULT, header=["setting", "value"], rows=changed, codes=frozenset({1})),
        Details(title="All settings and versions", lines=lines[:400]),
    ]


def _rate_charts(record: Record) -> list[Block]:
    points = sorted(record.get("rate_distortion", []), key=lambda point: str(point["source"]))
    data = sorted({str(p["data"]) for p in points if p["data"]})
    remark = f"published: on {', '.join(data)}, which are other videos unless you evaluate them" if data else ""
    charts: list[Block] = []
    for measure, title, axis in _MEASURES:
        known = [p for p in points if p.get(measure) is not None]
        if any(p["source"] == "measured" for p in known):
            spec = scatter_chart(
                [(p["bits_per_pixel"], p[measure], f"{p['tokenizer']} {p['fps']:g} fps", p["source"]) for p in known],
                x="bits per pixel",
                y=axis,
            )
            charts.append(Chart(title=f"{title} by rate", spec=spec, remark=remark))
    return charts


def _quality(scored: ScoredSpans) -> list[Block]:
    blocks: list[Block] = []
    kinds = list(dict.fromkeys((row["tokenizer"], row["fps"]) for row in scored.rows))
    for name, fps in kinds[:6]:
        own = [row for row in scored.rows if (row["tokenizer"], row["fps"]) == (name, fps)]
        for measure, title, axis in _MEASURES:
            values = [float(np.mean(row[measure])) for row in own if row[measure]]
            if values:
                blocks.append(
                    Chart(
                        title=f"{title}, {name} at {fps:g} fps",
                        spec=histogram(values, x=axis, count="clips"),
                        remark=f"lowest {min(values):.3g}, median {np.median(values):.3g}, highest {max(values):.3g}",
                    )
                )
    return blocks


def _codebooks(record: Record, scored: ScoredSpans) -> list[Block]:
    blocks: list[Block] = []
    for row in record["rows"]:
        book = row["codebook"]
        counts = scored.counts.get(counts_key(row["tokenizer"], row["fps"]), {})
        if book is not None and counts and book["size"] <= MAX_CODEBOOK:
            use = CodebookUse(book["size"])
            use.counts[np.fromiter(counts, np.int64)] = np.fromiter(counts.values(), np.int64)
            blocks += codebook_blocks(f"{row['tokenizer']} at {row['fps']:g} fps", use)
    return blocks


# Wall of clips


def _wall(run: Record, scored: ScoredSpans, settings: WallSettings) -> list[Block]:
    """Worst clips of the evaluation, reconstructed again by every tokenizer that was measured on them."""
    worst = sorted((float(np.mean(row["psnr"])), row["clip_id"], row["fps"]) for row in scored.rows)
    ids = list(dict.fromkeys((clip_id, fps) for _, clip_id, fps in worst))[: settings.num_clips]
    if not ids:
        return []
    try:
        given = EvaluateRun.model_validate(run.get("settings", {}))
        if given.tokens is not None:
            return _stored_wall(given.tokens, worst, settings)
        remote = [name for name in given.tokenizer if is_remote(name.partition("=")[2] or name)]
        if any(not name.rpartition("=")[2].startswith(storage.SHIPPED_SCHEME) for name in remote):
            return [Note(text="Clips are not shown: weights are remote, and a report fetches none.")]
        shown = list(_cards(given, scored, ids, settings))
    except (VidshardError, ValueError) as error:
        return [Note(text=f"No clip could be reconstructed: {one_line(error, 300)}", tone="warning")]
    if not shown:
        return [Note(text="No clip is shown: the originals could not be read from this machine.")]
    text = f"{len(shown)} of the clips with the lowest PSNR, by each tokenizer. They play under the pointer."
    return [Note(text=text), Wall(cards=shown)]


def _stored_wall(tokens: str, worst: Sequence[tuple[float, str, float]], settings: WallSettings) -> list[Block]:
    from vidshard.pipeline.open_output import Output

    stored = Output(tokens)
    scores = [{"clip_id": clip_id, "psnr": psnr} for psnr, clip_id, _ in worst]
    return wall_of(stored.path, stored.shards, read_sample(stored.shards), scores, settings)


def _cards(
    given: EvaluateRun, scored: ScoredSpans, ids: Sequence[tuple[str, float]], settings: WallSettings
) -> Iterator[Card]:
    """Cards of clips, until the time or the bytes are used up."""
    from rich.console import Console

    from vidshard.jobs.evaluation.resolve import resolve

    quiet = {"lpips": False, "i3d": None, "vgg_weights": None}
    evaluation = resolve(given.model_copy(update=quiet), Console(quiet=True))
    rows: dict[tuple[str, float], list[Record]] = {}
    for row in scored.rows:
        rows.setdefault((row["clip_id"], row["fps"]), []).append(row)
    networks: dict[str, Any] = {}
    started, num_bytes = time.monotonic(), 0
    for number, key in enumerate(ids):
        if number and (time.monotonic() - started) * (number + 1) / number > settings.seconds:
            return
        card = _card(evaluation, rows[key], networks, settings)
        if card is None:
            continue
        num_bytes += sum(len(one.uri) for one in card.media)
        if number and num_bytes > MAX_MEDIA_BYTES:
            return
        yield card


def _card(
    evaluation: ResolvedEvaluation, rows: Sequence[Record], networks: dict[str, Any], settings: WallSettings
) -> Card | None:
    """Card of a clip; None if its original cannot be read."""
    from vidshard.pipeline.decode_stage import decode_again

    first = rows[0]
    group = next((g for g in evaluation.groups if _makes(g, first)), None)
    if group is None or (is_remote(first["uri"]) and not settings.fetch_sources):
        return None
    spec = group.resolved.largest
    if spec.num_frames * spec.height * spec.width > MAX_PIXELS:
        return None
    try:
        limits = group.resolved.run.limits
        clip = decode_again(first["uri"], first["video_id"], first["clip_index"], spec, None, limits)[-1]
    except VideoError:
        return None
    frames: dict[str, Frames] = {"original": clip.frames}
    for row in rows:
        fake = _reconstructed(group, row["tokenizer"], clip.frames, networks)
        frames[f"{row['tokenizer']}, {np.mean(row['psnr']):.2f} dB"] = fake
        frames[f"{row['tokenizer']}, difference × {DIFFERENCE_GAIN}"] = amplified_difference(clip.frames, fake)
    lowest = min(float(np.mean(row["psnr"])) for row in rows)
    return Card(
        title=f"{lowest:.2f} dB · {first['uri'].rsplit('/', 1)[-1]} from {first['start_seconds']:.2f} s",
        remark=f"{first['uri']}, clip {first['clip_id']} at {first['fps']:g} fps",
        command="",
        media=[video_of(title, shown, spec.fps) for title, shown in frames.items()],
    )


def _makes(group: Group, row: Record) -> bool:
    labels = {measured.label for measured in group.tokenizers}
    return float(group.resolved.largest.fps) == row["fps"] and row["tokenizer"] in labels


def _reconstructed(group: Group, label: str, frames: Frames, networks: dict[str, Any]) -> Frames:
    import torch

    from vidshard.models.tokenizer import output_to_frames
    from vidshard.pipeline.evaluation.scorer import reconstruct_clips

    measured = next(one for one in group.tokenizers if one.label == label)
    if label not in networks:
        networks[label] = measured.source.load("cpu", torch.float32)
    [video], _ = reconstruct_clips(
        networks[label], [frames], batch_size=1, padding=measured.padding, tiling=measured.tiling
    )
    shown: Frames = output_to_frames(video[None])[0].cpu().numpy()
    return shown
