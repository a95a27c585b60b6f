"""Report of a training run: losses and held-out figures over steps, speed, and the latest reconstructions."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from vidshard.jobs.report.blocks import duration
from vidshard.jobs.report.charts import line_chart
from vidshard.jobs.report.media import picture_of
from vidshard.jobs.report.page import Block, Chart, Details, Facts, Note, Page, Pictures, Table
from vidshard.jobs.report.wall import WallSettings
from vidshard.jobs.training.metrics_file import read_metrics
from vidshard.pipeline import storage
from vidshard.schemas.tokens import parse_json
from vidshard.schemas.training import MADE, current_metrics

MAX_POINTS = 400
"""Steps of a curve that are drawn, evenly spread over all."""
MAX_PICTURE_BYTES = 3 << 20
"""Bytes of a picture above which it is left out."""
_MAX_BYTES = 16 << 20

Record = Mapping[str, Any]

_SPEED = ("clips_per_second", "waiting", "mfu", "steps_per_second")
_COUNTS = frozenset(f"clips_{way}" for way in MADE)
_OTHER = frozenset({"step", "group", "epoch", "learning_rate", "learning_rate_discriminator", *_SPEED, *_COUNTS})


def trained_page(out: str, run: Record, made: str, _wall: WallSettings | None = None) -> Page:
    """Make the report of a training run.

    Args:
        out: folder of the run.
        run: its ``run.json``.
        made: when and by what the page is made.
        _wall: without effect: the pictures are those that the training wrote.

    Raises:
        VidshardError: a file is damaged, or cannot be read.
    """
    stages = [str(name) for name in run["run"]["stages"]]
    results = {name: _result(storage.join(out, name)) for name in stages}
    title = f"Training of {run.get('tokenizer', {}).get('name', 'a tokenizer')}"
    page = Page(title=title, place=out, status="complete", tone="good", made=made)
    if not all(result.get("is_finished") for result in results.values()):
        page.status, page.tone = "not finished", "warning"
    page.add("overview", "Overview", *_overview(run, results))
    for name in stages:
        folder = storage.join(out, name)
        lines = read_metrics(folder)
        if lines or results[name]:
            page.add(name, name, *_stage(lines, results[name]), *_pictures(folder))
    page.add("rejects", "Rejections", *_rejections(out))
    return page


def _result(folder: str) -> dict[str, Any]:
    path = storage.join(folder, "result.json")
    if not storage.exists(path):
        return _so_far(read_metrics(folder))
    found = parse_json(storage.read_bytes(path, max_bytes=_MAX_BYTES), "result.json")
    return found if isinstance(found, dict) else {}


def _so_far(lines: Sequence[Record]) -> dict[str, Any]:
    """Steps and held-out figures of a stage that has records and no result, as it runs or was killed."""
    held_out = [line for line in lines if line["group"] == "held_out"]
    if not lines:
        return {}
    first, last = (held_out[0], held_out[-1]) if held_out else ({}, {})
    return {"steps": lines[-1]["step"], "before": first if first.get("step") == 0 else {}, "measured": last}


def _overview(run: Record, results: Mapping[str, Record]) -> list[Block]:
    header = ["stage", "steps", "time", "PSNR dB", "SSIM", "LPIPS", "codebook used", "restarts"]
    rows = []
    for name, result in results.items():
        steps = run["run"]["stages"][name].get("steps", "?")
        cells = [_change(result, metric, digits) for metric, digits in _MEASURED]
        took = duration(result["seconds"]) if "seconds" in result else "no result yet" if result else "not begun"
        rows.append([name, f"{result.get('steps', 0):,} of {steps:,}", took, *cells, str(result.get("restarts", 0))])
    notes = [
        Note(text=f"{name}: nothing was measured: {result['unmeasured']}.", tone="warning")
        for name, result in results.items()
        if result.get("unmeasured")
    ]
    text = yaml.safe_dump(json.loads(json.dumps(run, default=str)), sort_keys=False)
    return [
        Table(title="Held-out clips before the first and after the last step", header=header, rows=rows),
        *notes,
        Details(title="All settings, tokenizer and versions", lines=text.splitlines()[:600]),
    ]


_MEASURED = (("psnr", 2), ("ssim", 3), ("lpips", 3), ("codebook_utilization", 3))


def _change(result: Record, metric: str, digits: int) -> str:
    before, now = (current_metrics(result.get(moment, {})).get(metric) for moment in ("before", "measured"))
    if now is None:
        return ""
    return f"{now:.{digits}f}" if before is None else f"{before:.{digits}f} → {now:.{digits}f}"


def _stage(lines: Sequence[Record], result: Record) -> list[Block]:
    blocks: list[Block] = []
    metrics = result.get("metrics", {})
    facts = [
        (title, f"{metrics[name]:{form}}", "")
        for name, title, form in (
            ("clips_per_second", "clips/s", ".3g"),
            ("waiting", "waiting for clips", ".0%"),
            ("mfu", "MFU", ".1%"),
        )
        if isinstance(metrics.get(name), (int, float))
    ]
    made = result.get("made", {})
    facts += [(f"clips {words}", f"{made[way]:,}", "") for way, words in MADE.items() if _is_number(made.get(way))]
    if facts:
        blocks.append(Facts(items=facts))
    for group, title in (("held_out", "held-out clips"), ("train", "training")):
        own = [line for line in lines if line["group"] == group]
        names = list(dict.fromkeys(name for line in own for name in line if name not in _OTHER))
        names += [name for name in _SPEED if group == "train" and any(name in line for line in own)]
        for name in names[:16]:
            points = [(float(li["step"]), float(li[name]), name) for li in own if _is_number(li.get(name))]
            points = points[:: max(1, -(-len(points) // MAX_POINTS))]
            shown = name.replace("_", " ")
            blocks.append(Chart(title=shown, spec=line_chart(points, x="step", y=shown), remark=title))
    return [block for block in blocks if not (isinstance(block, Chart) and block.spec is None)]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _pictures(folder: str) -> list[Block]:
    """The latest picture of held-out clips and their reconstructions."""
    paths = storage.list_files(storage.join(folder, "pictures"), ".png")
    if not paths:
        return []
    try:
        png = storage.read_bytes(paths[-1], max_bytes=MAX_PICTURE_BYTES)
        if png[:8] != b"\x89PNG\r\n\x1a\n":
            return []
        width, height = struct.unpack(">II", png[16:24])
    except (storage.StorageError, struct.error):
        return [Note(text=f"The pictures are in {folder}/pictures.")]
    step = paths[-1].rsplit("-", 1)[-1].removesuffix(".png").lstrip("0") or "0"
    title = f"Held-out clips at step {step}: each clip above its reconstruction, frames from left to right"
    return [Pictures(pictures=[picture_of(title, png, width=width, height=height)])]


def _rejections(out: str) -> list[Block]:
    path = storage.join(out, "rejects.json")
    if not storage.exists(path):
        return []
    found = parse_json(storage.read_bytes(path, max_bytes=_MAX_BYTES), "rejects.json")
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    if not rows:
        return [Note(text="Nothing was rejected.")]
    counts = Counter(str(row.get("reason")) for row in rows)
    shown = [[str(r.get("reason")), str(r.get("uri")), str(r.get("detail"))] for r in rows[:20]]
    text = ", ".join(f"{count:,} x {reason}" for reason, count in counts.most_common())
    return [
        Note(text=text),
        Table(title="The first of them", header=["reason", "video", "detail"], rows=shown, codes=frozenset({1, 2})),
    ]
