"""Inspection of an output: counts, schema, codebook use, provenance, rows and rejections."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from itertools import chain
from typing import Any

import yaml
from rich.console import Console

from vidshard.jobs.runtime.progress import print_alert, warn
from vidshard.models.codebook_use import MAX_CODEBOOK, CodebookUse
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import RUN, shard_paths
from vidshard.pipeline.output.parquet import ShardError
from vidshard.pipeline.output.quality import AuditFigures, read_quality
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.pipeline.output.shard_reader import open_shard, output_shards, read_clips, read_payloads
from vidshard.schemas.text import counted, readable
from vidshard.schemas.tokens import Payload, Provenance
from vidshard.schemas.uris import shown_uri, without_secrets


def inspect_output(out: str, console: Console, *, num_rows: int) -> None:
    """Print the contents of an output folder or a single shard.

    Args:
        num_rows: number of rows of the first shard to print.

    Raises:
        ShardError, StorageError: the output does not exist, or cannot be read.
    """
    folder = storage.absolute(out)
    if not out.endswith(".parquet") and storage.exists(storage.join(folder, RUN)) and not shard_paths(folder):
        console.print("0 shards, 0 clips: the run committed nothing", highlight=False)
        _show_rejects(folder, console)
        return
    paths = output_shards(out)
    provenance = _show_counts(paths, console)
    _show_codebook_use(paths, provenance.payload, console)
    _show_audit(paths, console)
    _show_provenance(provenance, console)
    _show_rows(paths[0], num_rows, console)
    if not out.endswith(".parquet"):
        _show_rejects(folder, console)


def output_record(out: str) -> dict[str, Any]:
    """Describe an output folder or a single shard in JSON values: counts, payload, provenance, rejections by reason.

    Raises:
        ShardError, StorageError: the output does not exist, or cannot be read.
    """
    folder = storage.absolute(out)
    is_shard = out.endswith(".parquet")
    paths = [out] if is_shard else shard_paths(folder)
    if not paths and not storage.exists(storage.join(folder, RUN)):
        paths = output_shards(out)  # which says what is wrong with it
    record: dict[str, Any] = {"num_shards": len(paths), "num_clips": 0, "num_uncompressed_bytes": 0, "num_videos": 0}
    videos: set[str] = set()
    for path in paths:
        with open_shard(path) as (parquet, provenance):
            groups = [parquet.metadata.row_group(group) for group in range(parquet.metadata.num_row_groups)]
            record["num_uncompressed_bytes"] += sum(group.total_byte_size for group in groups)
            record["num_clips"] += parquet.metadata.num_rows
            for group in range(parquet.metadata.num_row_groups):
                videos.update(parquet.group(group, ["video_id"])["video_id"].unique().to_pylist())
            record["provenance"] = {
                "tokenizer": provenance.tokenizer.get("name"),
                "weights_source": without_secrets(provenance.weights_source),
                "weights_sha256": provenance.weights_sha256,
                "code_version": provenance.code_version,
                "format_version": provenance.format_version,
                "notice": provenance.notice,
                "run": dict(provenance.run),
            }
            record["payload"] = [
                {"name": column.name, "shape": list(column.shape), "codebook_size": column.codebook_size}
                for column in provenance.payload
            ]
    record["num_videos"] = len(videos)
    quality = read_quality(paths, ())
    if quality.num_shards > quality.num_without:
        record["audit"] = {
            "num_clips": quality.figures.num_clips,
            "num_failed": quality.figures.num_failed,
            "num_shards_without": quality.num_without,
            **{name: quality.figures.mean(name) for name in ("psnr", "ssim", "lpips")},
            "worst": [asdict(clip) | {"uri": shown_uri(clip.uri)} for clip in quality.figures.worst],
        }
    if not is_shard:
        record["rejects"] = dict(Counter(read_rejects(folder)["reason"].to_pylist()))
    return record


def _show_counts(paths: list[str], console: Console) -> Provenance:
    clips = size = 0
    videos: set[str] = set()
    first: Provenance | None = None
    schema = None
    for path in paths:
        with open_shard(path) as (parquet, provenance):
            clips += parquet.metadata.num_rows
            size += sum(parquet.metadata.row_group(g).total_byte_size for g in range(parquet.metadata.num_row_groups))
            for group in range(parquet.metadata.num_row_groups):
                videos.update(parquet.group(group, ["video_id"])["video_id"].unique().to_pylist())
            schema = parquet.schema_arrow
            if first is not None and provenance.identity != first.identity:
                raise ShardError(
                    f"{shown_uri(path)} was made with other settings than {shown_uri(paths[0])}: read them apart"
                )
            first = first or provenance
    assert first is not None
    assert schema is not None
    console.print(
        f"{counted(len(paths), 'shard')}, {counted(clips, 'clip')} of {counted(len(videos), 'video')}, "
        f"{size:,} bytes uncompressed",
        highlight=False,
    )
    console.print("\nschema", style="bold")
    for field in schema:
        shape = (
            f"   shape {readable(field.metadata[b'shape'].decode(errors='replace'), 80)}"
            if field.metadata and b"shape" in field.metadata
            else ""
        )
        kind = readable(field.type, 400)
        console.print(f"  {readable(field.name, 200):<20}{kind}{shape}", highlight=False, markup=False)
    return first


MAX_COUNTED_TOKENS = 1 << 27
"""Largest number of tokens read to measure codebook use, about 0.3 GB of shards, so that large outputs stay quick."""


def _show_codebook_use(paths: list[str], payload: Payload, console: Console) -> None:
    """Print how many tokens of the codebook are used, and their entropy; memory holds one row group and the counts."""
    uses = {
        column.name: CodebookUse(column.codebook_size)
        for column in payload
        if column.codebook_size is not None and column.codebook_size <= MAX_CODEBOOK
    }
    if not uses:
        return
    part = ""
    try:
        for arrays in chain.from_iterable(map(read_payloads, paths)):
            num_counted = sum(use.num_tokens for use in uses.values())
            if num_counted >= MAX_COUNTED_TOKENS:
                part = f", by the first {num_counted:,} tokens"
                break
            for name, use in uses.items():
                use.update(arrays[name])
    except ShardError as error:
        # only the first broken shard is named here; `vidshard verify` names all
        print_alert(console, f"codebook: not counted, {error}", style="bold red")
        return
    for name, use in uses.items():
        of = "" if len(uses) == 1 else f" of {readable(name)}"
        console.print(
            f"codebook{of}: {use.num_used:,} of {use.codebook_size:,} tokens used ({use.utilization:.1%}), "
            f"entropy {use.entropy_bits:.2f} bits{part}",
            highlight=False,
        )


NUM_WORST_SHOWN = 5
"""Number of clips with the lowest PSNR that are printed."""


def _show_audit(paths: list[str], console: Console) -> None:
    """Print the figures of the clips that a run with ``--audit`` measured."""
    try:
        quality = read_quality(paths, ())
    except ShardError as error:
        print_alert(console, f"audit: not counted, {error}", style="bold red")
        return
    figures = quality.figures
    if not figures.num_clips and not figures.num_failed:
        return
    means = [f"{title} {value:.{digits}f}" for title, value, digits in _audit_means(figures) if value is not None]
    failed = f", {figures.num_failed} not decoded for want of memory" if figures.num_failed else ""
    without = f"; {quality.num_without} of {quality.num_shards} shards have none" if quality.num_without else ""
    console.print(
        f"audit: {', '.join(means)} of {counted(figures.num_clips, 'clip')}{failed}{without}", highlight=False
    )
    for clip in figures.worst[:NUM_WORST_SHOWN]:
        line = f"  {clip.psnr:.1f} dB: {readable(clip.clip_id, 200)} of {shown_uri(clip.uri)}"
        console.print(line, highlight=False, markup=False)


def _audit_means(figures: AuditFigures) -> list[tuple[str, float | None, int]]:
    titles = (("mean PSNR in dB", "psnr", 2), ("SSIM", "ssim", 3), ("LPIPS", "lpips", 3))
    return [(title, figures.mean(name), digits) for title, name, digits in titles]


def _show_provenance(provenance: Provenance, console: Console) -> None:
    console.print("\nprovenance", style="bold")
    shown: dict[str, Any] = {
        "tokenizer": provenance.tokenizer.get("name"),
        "weights_source": provenance.weights_source,
        "weights_sha256": provenance.weights_sha256,
        "code_version": provenance.code_version,
        "libraries": dict(provenance.libraries),
        "run": dict(provenance.run),
    }
    text = yaml.safe_dump(shown, sort_keys=False).rstrip()
    lines = [f"  {readable(without_secrets(line))}" for line in text.split("\n")]
    console.print("\n".join(lines), highlight=False, markup=False)
    if provenance.notice:
        warn(console, readable(provenance.notice))


MAX_SHOWN = 2000
"""Characters of a value that are printed."""


def _show_rows(path: str, num_rows: int, console: Console) -> None:
    console.print("\nrows", style="bold")
    for clip, _ in zip(read_clips(path), range(num_rows), strict=False):
        values = dict(clip.values)
        times = values.pop("frame_pts_seconds")
        values["frame_pts_seconds"] = f"{len(times)} times from {times[0]:.3f} to {times[-1]:.3f}"
        for name, array in clip.payload.items():
            label = "payload" if len(clip.payload) == 1 else name
            values[label] = f"{array.dtype} {list(array.shape)}: {array.reshape(-1)[:6].tolist()} ..."
        for name, value in values.items():
            text = json.dumps(value, default=str) if isinstance(value, dict) else str(value)
            line = f"  {readable(name, 200):<20}{readable(without_secrets(text), MAX_SHOWN)}"
            console.print(line, highlight=False, markup=False)
        console.print()


def _show_rejects(out: str, console: Console) -> None:
    rejects = read_rejects(out).to_pylist()
    console.print(f"rejects: {len(rejects)}", style="bold", highlight=False)
    for (reason, remedy), count in Counter((r["reason"], r["remedy"]) for r in rejects).most_common():
        console.print(f"  {count} x {readable(reason)}: {readable(remedy)}", highlight=False, markup=False)
    for row in rejects[:10]:
        place = f"{shown_uri(row['uri'])} [{readable(row['stage'])}] {readable(row['reason'])}"
        console.print(f"    {place}: {readable(without_secrets(row['detail']))}", highlight=False, markup=False)
    if len(rejects) > 10:
        console.print(
            f"    ... and {len(rejects) - 10:,} more in {shown_uri(out)}/rejects/", highlight=False, markup=False
        )
