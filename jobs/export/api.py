"""Functions of `import vidshard` that export and push outputs: silent, returning values, raising `VidshardError`."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from vidshard.jobs.export.job import ExportResult, ExportRun, export_output
from vidshard.jobs.export.layouts import LAYOUTS
from vidshard.jobs.export.push import PushResult, PushRun, push_output
from vidshard.schemas.errors import UserError


def export(
    out: str,
    dest: str,
    *,
    to: str,
    where: str | None = None,
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> ExportResult:
    """Write an output in the layout of another program, as ``vidshard export`` does.

    The same call again continues an interrupted export, and writes nothing twice.

    Args:
        out: output folder, folder of shards, or single shard, local or remote.
        dest: an empty folder, or that of the same export.
        to: name of the layout: webdataset, lance, fastvideo or lerobot-latents.
        where: condition of SQL that clips must pass; None exports all.
        limit: largest number of clips, at least 1; None for all.
        columns: column of the shards that fills a field of the layout, by field, as ``--map`` does.
        console: where to print the progress and the counts; None prints nothing.

    Returns:
        The counts, over all runs of this export. ``num_written`` is 0 where every clip was refused or left out.

    Raises:
        VidshardError: the layout cannot hold the clips, the destination holds something else, a shard is damaged, or a
            file cannot be written.
    """
    if to not in LAYOUTS:
        raise UserError(f"there is no layout {to!r:.80}: give one of {', '.join(sorted(LAYOUTS))}")
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, got {limit}")
    request = ExportRun(out=out, layout=to, dest=dest, where=where, limit=limit, columns=dict(columns or {}))
    return export_output(request, console or Console(quiet=True))


def push(
    out: str,
    target: str,
    *,
    create: bool = False,
    public: bool = False,
    prune: bool = False,
    console: Console | None = None,
) -> PushResult:
    """Push the finished shards of an output to the Hugging Face Hub, as ``vidshard push`` does.

    The same call again sends what is missing. The token is that of ``HF_TOKEN`` or of ``hf auth login``.

    Args:
        out: output folder, or folder of shards, local or remote.
        target: ``hf://datasets/OWNER/NAME[@BRANCH]``.
        create: make the dataset if it is missing, private unless ``public``.
        public: make the new dataset visible to everybody.
        prune: delete shards of the dataset that the output has not.
        console: where to print the progress and the result; None prints nothing.

    Returns:
        The number of shards in the dataset, and of those sent now.

    Raises:
        VidshardError: there is no token, the dataset is missing or has shards of something else, a shard is damaged,
            or the Hub refuses or cannot be reached.
    """
    if public and not create:
        raise UserError("public is for a dataset that is made: give create=True too")
    request = PushRun(out=out, target=target, create=create, public=public, prune=prune)
    return push_output(request, console or Console(quiet=True))
