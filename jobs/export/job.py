"""Export job: writes the clips of an output in the layout of another program, and counts them.

The same command again continues: finished batches are not written again, and shards that the output got meanwhile are
added, where the layout keeps shards apart. Every clip is written, refused with a reason, or left out by a filter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console

from vidshard.jobs.export.layout import REFUSALS, Layout, Refusal, Source
from vidshard.jobs.export.layouts import LAYOUTS
from vidshard.jobs.export.lerobot_latents import LeRobotLatents
from vidshard.jobs.export.selection import Selection, read_clips, select, source_of
from vidshard.jobs.export.state import FOLDER, State
from vidshard.jobs.runtime.progress import PhaseProgress, warn
from vidshard.jobs.runtime.terminal import print_field
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import RUN
from vidshard.pipeline.output.lease import Lease
from vidshard.pipeline.reader.catalog import Catalog, read_catalog
from vidshard.pipeline.reader.files import ShardFiles
from vidshard.pipeline.storage.file_systems import missing_is_fine
from vidshard.pipeline.storage.retry import errors_named
from vidshard.schemas.errors import EXIT_FAILED, UserError
from vidshard.schemas.text import counted, readable
from vidshard.schemas.uris import shown_uri


@dataclass(frozen=True, kw_only=True)
class ExportRun:
    """Request to export an output."""

    out: str
    """Output folder, folder of shards, or single shard."""
    layout: str
    """Name of the layout: a key of `LAYOUTS`."""
    dest: str
    """Folder to write to, local or remote."""
    where: str | None = None
    """Filter of the clips; see `pipeline.reader.where`."""
    limit: int | None = None
    """Largest number of clips; None for all."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Column of the shards that fills a field of the layout, by field."""


@dataclass(kw_only=True)
class ExportResult:
    """Figures of an export, of all its runs together."""

    num_clips: int
    """Clips of the output."""
    num_written: int
    num_left_out: int
    """Clips that the filter, or the limit, left out."""
    refused: Counter[str]
    """Clips that the layout could not hold, or that were there twice, by reason."""
    num_files: int
    num_bytes: int
    num_new: int
    """Clips that this run wrote."""

    @property
    def exit_code(self) -> int:
        """0; 1 if no clip at all was written."""
        return 0 if self.num_written else EXIT_FAILED


def export_output(request: ExportRun, console: Console) -> ExportResult:
    """Export the clips of an output.

    Raises:
        VidshardError: the layout cannot hold the clips, the destination holds something else, a shard is damaged, or a
            file cannot be written.
    """
    layout = LAYOUTS[request.layout]()
    dest = storage.absolute(request.dest)
    catalog = read_catalog(request.out)
    _check_place(dest, storage.absolute(request.out))
    state = State.load(dest)
    if state is not None:
        _check_settings(state, request, catalog)
        if state.is_complete and state.source_digest in catalog.digests:
            return _report(state, request, layout, console, num_new=0)
    files = ShardFiles(catalog.paths, catalog.shard_bytes)
    selection = select(catalog, files, layout, where=request.where, limit=request.limit)
    source = source_of(catalog, selection, layout, dest, request.columns)
    left_out = layout.check(source)
    if left_out:
        names = ", ".join(readable(name, 80) for name in left_out)
        warn(console, f"left out, as {layout.name} has no place for it: {names}")
    if state is None and not (isinstance(layout, LeRobotLatents) and layout.adds_to_dataset):
        _check_empty(dest)
    with Lease.acquire(storage.join(dest, FOLDER)) as lease:
        state = State.load(dest) or State(
            settings=_settings(request, catalog), provenance=source.metadata, source=storage.public_uri(request.out)
        )
        _check_grown(state, selection, catalog, layout)
        num_new = _write(state, catalog, files, layout, source, selection, lease, console)
    return _report(state, request, layout, console, num_new=num_new)


def _write(
    state: State,
    catalog: Catalog,
    files: ShardFiles,
    layout: Layout,
    source: Source,
    selection: Selection,
    lease: Lease,
    console: Console,
) -> int:
    """Write the batches that are not there yet, then what describes them all; returns the clips written now."""
    _remove_leftovers(source.dest)
    state.is_complete = False
    state.source_digest = catalog.digests[0]
    state.num_clips = catalog.num_rows
    state.num_left_out, state.num_duplicates = selection.num_left_out, selection.num_duplicates
    done = sum(len(batch.rows) for batch in selection.batches if batch.key in state.batches)
    num_new = 0
    state.save(source.dest)
    try:
        with PhaseProgress(console, "exporting", selection.num_clips) as display:
            for batch in selection.batches:
                if batch.key in state.batches:
                    continue
                clips = read_clips(catalog, files, source, batch, len(state.batches))
                lease.check(now=False)
                written = layout.write(source, clips, list(state.batches.values()))
                assert written.num_clips + written.refused.total() == len(clips), "each clip is written or refused"
                state.batches[batch.key] = written
                num_new += written.num_clips
                done += len(clips)
                state.save(source.dest, now=False)
                display.update(done, f"{done:,} of {counted(selection.num_clips, 'clip')}")
        state.save(source.dest)
        lease.check()
        state.files = layout.finish(source, list(state.batches.values()))
        state.is_complete = True
    finally:
        state.save(source.dest)
    return num_new


def _settings(request: ExportRun, catalog: Catalog) -> dict[str, object]:
    """Settings that all runs of an export share."""
    return {
        "layout": request.layout,
        "where": request.where,
        "limit": request.limit,
        "map": dict(sorted(request.columns.items())),
        "tokenizer": str(catalog.provenance.tokenizer.get("name")),
        "weights_sha256": catalog.provenance.weights_sha256,
    }


def _check_settings(state: State, request: ExportRun, catalog: Catalog) -> None:
    """Refuse to continue an export with other settings.

    Raises:
        UserError: they differ.
    """
    for name, now in _settings(request, catalog).items():
        before = state.settings.get(name)
        if before != now:
            what, there = name.replace("_", " "), readable(before, 200)
            raise UserError(
                f"{shown_uri(request.dest)} was exported with {what} {there}, and now it is {readable(now, 200)}: "
                "export to another folder"
            )


def _check_grown(state: State, selection: Selection, catalog: Catalog, layout: Layout) -> None:
    """Refuse to continue an export of shards that are no longer there.

    Raises:
        UserError: clips that were exported are gone, or the layout cannot take in new ones.
    """
    if layout.whole_runs and state.source_digest not in ("", *catalog.digests):
        raise UserError(
            f"the output has other shards than when this export began, and {layout.name} holds whole sequences: export "
            "to another folder"
        )
    known = {batch.key for batch in selection.batches}
    for key in state.batches:
        if key not in known:
            raise UserError(
                f"clips that were exported are no longer in the output ({readable(key, 200)}): export to another folder"
            )


def _check_place(dest: str, out: str) -> None:
    """Refuse a destination that is an output, or lies in this one.

    Raises:
        UserError: it does.
    """
    if dest != storage.public_uri(dest):
        raise UserError(f"{storage.public_uri(dest)}: put the credentials into the environment, not the URL")
    if f"{dest}/".startswith(f"{out.rstrip('/')}/") or storage.exists(storage.join(dest, RUN)):
        raise UserError(f"{shown_uri(dest)} is, or lies in, an output of vidshard: export to a folder of its own")


def _check_empty(dest: str) -> None:
    """Refuse a destination that holds files of something else.

    Raises:
        UserError: it does.
        storage.StorageError: it cannot be listed.
    """
    fs, inner = storage.filesystem(dest)

    def names() -> list[str]:
        with missing_is_fine():
            return [str(name) for name in fs.ls(inner, detail=False) if str(name).rstrip("/") != inner.rstrip("/")]
        return []

    with errors_named("list", dest):
        found = [name.rstrip("/").rsplit("/", 1)[-1] for name in storage.with_retries(dest, names)]
    if set(found) - {FOLDER}:
        raise UserError(
            f"{shown_uri(dest)} is not empty ({readable(sorted(set(found) - {FOLDER})[0], 80)}), and no export of "
            "vidshard: name another folder"
        )


def _remove_leftovers(dest: str) -> None:
    """Remove what a killed export had begun."""
    if storage.is_local(dest) and Path(dest).is_dir():
        for folder in (Path(dest), *(path for path in Path(dest).rglob("*") if path.is_dir())):
            storage.remove_leftovers(str(folder))


def _report(state: State, request: ExportRun, layout: Layout, console: Console, *, num_new: int) -> ExportResult:
    """Print what an export holds; returns its figures."""
    refused: Counter[str] = (
        Counter({Refusal.DUPLICATE.value: state.num_duplicates}) if state.num_duplicates else Counter()
    )
    files = dict(state.files)
    for batch in state.batches.values():
        refused.update(batch.refused)
        files |= batch.files
    result = ExportResult(
        num_clips=state.num_clips,
        num_written=sum(batch.num_clips for batch in state.batches.values()),
        num_left_out=state.num_left_out,
        refused=refused,
        num_files=len(files),
        num_bytes=sum(files.values()),
        num_new=num_new,
    )

    line = partial(print_field, console)
    ways = [f"{result.num_written:,} written"]
    ways += [f"{refused.total():,} refused"] if refused.total() else []
    ways += [f"{state.num_left_out:,} left out by --where or --limit"] if state.num_left_out else []
    line("clips", f"{result.num_clips:,} = {' + '.join(ways)}")
    for reason, count in refused.most_common():
        line("refused", f"{count:,} x {reason}: {REFUSALS[Refusal(reason)]}")
    new = "nothing new was written" if not num_new else f"{num_new:,} of the clips were written now"
    line("files", f"{result.num_files:,} with {result.num_bytes:,} bytes in {shown_uri(request.dest)}; {new}")
    line("layout", f"{layout.name}: {layout.meaning}")
    line("tokenizer", f"{state.settings['tokenizer']}, weights SHA-256 {str(state.settings['weights_sha256'])[:16]}")
    if not result.num_written:
        warn(console, "NO CLIP WAS EXPORTED")
    return result
