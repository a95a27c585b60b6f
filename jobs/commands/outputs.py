"""``vidshard inspect``, ``stats``, ``verify``, ``debug`` and ``decode``: what is done with an output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from vidshard.jobs.runtime.settings import Decimal, WholeNumber, report_options, shared_option
from vidshard.jobs.runtime.terminal import json_option, output_console, print_json
from vidshard.schemas.fields import ClusterSettings, ProgressMode, ReportSettings, parse_size

if TYPE_CHECKING:
    from vidshard.jobs.shards.decode_all import DecodeResult
    from vidshard.jobs.shards.verify import Verification


@click.command()
@click.argument("out", metavar="OUTPUT")
@click.option(
    "--rows", type=WholeNumber(min=0), default=3, show_default=True, metavar="N", help="Number of rows to print."
)
@click.option("--json", "as_json", is_flag=True, help="Print counts and provenance as one JSON object instead.")
def inspect(out: str, rows: int, as_json: bool) -> None:
    """Show what an output holds.

    Prints counts, schema, provenance, rejections and some rows. OUTPUT is the folder of a run, or a single shard.
    """
    from vidshard.jobs.shards.show import inspect_output, output_record

    if as_json:
        print_json(output_record(out))
    else:
        inspect_output(out, output_console(), num_rows=rows)


@click.command()
@click.argument("out", metavar="OUTPUT")
def stats(out: str) -> None:
    """Compute mean and standard deviation of latents.

    Reads the latents of OUTPUT once, and writes the statistics of each channel to OUTPUT/stats.json. The training
    reader normalizes with them: vidshard.TokenShards(OUTPUT, normalize=True).

    \b
    vidshard stats latents/
    """
    from vidshard.jobs.shards.stats import write_output_stats

    write_output_stats(out, output_console())


moved_weights = click.option(
    "--weights",
    metavar="FILE",
    help="Weights to use: a path, a URL or hf://OWNER/REPO/PATH. Needed if they have moved since the run, or would "
    "have to be fetched.",
)
fetch_sources = click.option(
    "--fetch-sources",
    is_flag=True,
    help="Read source videos from remote storage too. The output names them; give this only if you trust it.",
)

allow_private = click.option(
    "--allow-private",
    is_flag=True,
    help="Let --fetch-sources, and redirects, reach web servers with private addresses that OUTPUT does not name.",
)


@click.command()
@click.argument("out", metavar="OUTPUT")
@click.option(
    "--exact",
    type=Decimal(0, 1, min_open=True),
    metavar="SHARE",
    help="Share of the clips to encode again from their sources and compare, such as 0.01.",
)
@click.option(
    "--seed",
    type=WholeNumber(),
    default=0,
    show_default=True,
    metavar="N",
    help="Random seed of the clips that --exact takes.",
)
@moved_weights
@fetch_sources
@allow_private
@click.option(
    "--repair",
    is_flag=True,
    help="Remove damaged shards, duplicate clips and clips of replaced videos, unless a run holds the lease. The same "
    "`vidshard tokenize` then fills the gaps.",
)
@click.option(
    "--audit",
    "audit_file",
    metavar="FILE",
    help="Write the status of each video to FILE.parquet or FILE.csv: seconds, reasons of rejections and remedies.",
)
@click.option("--account", "former_audit_file", hidden=True)
@json_option
def verify(
    out: str,
    exact: float | None,
    seed: int,
    weights: str | None,
    fetch_sources: bool,
    allow_private: bool,
    repair: bool,
    audit_file: str | None,
    former_audit_file: str | None,
    as_json: bool,
) -> Verification:
    """Check that an output is undamaged, and say what is left to do.

    Reads every shard in full and checks checksums, schema, values, duplicate ids and the settings of run.json. Then
    compares the shards with the plan: what is tokenized, rejected or left to do, in videos and in seconds.

    The exit code is 1 if anything is damaged; work that is left to do is no damage.

    With --exact, clips are decoded and encoded again, cut into other pieces than in the run. In float32 on a CPU
    every token must be equal, except where a value lies at a rounding tie. On a GPU, or in bfloat16, the share of
    different tokens is printed.

    \b
    vidshard verify tokens/
    vidshard verify tokens/ --exact 0.01
    vidshard verify tokens/ --repair
    """
    if former_audit_file is not None:
        if audit_file is not None:
            raise click.UsageError("--account is now --audit: give it once")
        click.echo("note: --account is now --audit", err=True)
        audit_file = former_audit_file
    from vidshard.jobs.shards.verify import verify_output

    result = verify_output(
        out,
        output_console(stderr=as_json),
        exact=exact,
        seed=seed,
        weights=weights,
        fetch_sources=fetch_sources,
        allow_private=allow_private,
        repair=repair,
        audit_file=audit_file,
    )
    if as_json:
        print_json(result.record)
    return result


@click.command()
@click.argument("out", metavar="OUTPUT")
@click.option("--span", "span_id", metavar="ID", help="Span to replay; the beginning of its id is enough.")
@click.option("--uri", metavar="VIDEO", help="Video whose rejected spans are replayed, or its first span if none was.")
@click.option("--pictures", metavar="DIR", help="Write the sampled frames into this folder, one PNG file per clip.")
@click.option("--no-encode", is_flag=True, help="Stop after decoding.")
@click.option(
    "--damaged",
    type=click.Choice(["reject", "keep"]),
    help="Clips of a damaged span: none, or those that are whole. Default: as in the run, but pictures show them.",
)
@moved_weights
@fetch_sources
@allow_private
def debug(
    out: str,
    span_id: str | None,
    uri: str | None,
    pictures: str | None,
    no_encode: bool,
    damaged: Literal["reject", "keep"] | None,
    weights: str | None,
    fetch_sources: bool,
    allow_private: bool,
) -> int:
    """Replay a span in this process, stage by stage.

    Opens the video, decodes the span and encodes it with the settings of the run, and prints what each stage gave. The
    output stays as it is, and signals are not read. The exit code is 1 if a stage rejected something.

    \b
    vidshard debug tokens/ --uri clips/broken.mp4 --pictures debug/
    vidshard debug tokens/ --span 3f2a
    """
    if (span_id is None) == (uri is None):
        raise click.UsageError("give one of --span ID and --uri VIDEO; rejects/ and `vidshard inspect` name both")
    from vidshard.jobs.shards.debug import debug_spans

    return debug_spans(
        out,
        output_console(),
        span_id=span_id,
        uri=uri,
        pictures=pictures,
        encode=not no_encode,
        damaged=damaged,
        weights=weights,
        fetch_sources=fetch_sources,
        allow_private=allow_private,
    )


@click.command()
@click.argument("out", metavar="OUTPUT")
@click.option("--clip", "clip_id", metavar="ID", help="Clip to decode; the beginning of its id is enough.")
@click.option("--video", "video_id", metavar="ID", help="Video to decode as a whole, from an output of --continuous.")
@click.option("--to", "target", metavar="FILE", help="Video file to write, such as clip.mp4. Not with --all.")
@click.option("--all", "folder", metavar="DIR", help="Decode every video as a whole into this folder, as ID.mp4.")
@click.option("--each-clip", is_flag=True, help="Write a file for each clip with --all, as --side-by-side does too.")
@click.option(
    "--limit", type=WholeNumber(min=1), metavar="N", help="Decode only the first N videos, or clips, of --all."
)
@click.option(
    "--only",
    metavar="PART",
    multiple=True,
    help="Decode this payload part alone, such as structure or dynamics. May be repeated.",
)
@click.option("--structure", metavar="ID", help="Clip whose structure is decoded with the --dynamics of another clip.")
@click.option("--dynamics", metavar="ID", help="Clip whose dynamics are decoded with the --structure of another clip.")
@click.option(
    "--cross",
    "crossed",
    metavar="PART=ID",
    multiple=True,
    help="Clip that gives a payload part of any name to the crossed video; repeated for every part.",
)
@click.option(
    "--side-by-side",
    is_flag=True,
    help="Show the source at the left, if it can be read, and each payload part at the right.",
)
@moved_weights
@fetch_sources
@allow_private
@click.option("--tile-size", metavar="SIZE", help="Decode large frames in tiles of this size. Default: as encoded.")
@click.option(
    "--tile-overlap",
    type=WholeNumber(min=0),
    metavar="PIXELS",
    help="Minimum overlap of neighboring tiles. Default: as encoded.",
)
@click.option("--local", is_flag=True, help="Decode the videos of --all in this process, without Ray.")
@click.option(
    "--workers",
    type=WholeNumber(min=1),
    metavar="N",
    help="Number of decoding processes of --all. Default: one per GPU, or one per four CPUs.",
)
@shared_option(ClusterSettings, "ray_address")
@report_options
@shared_option(ClusterSettings, "verbose")
def decode(
    out: str,
    clip_id: str | None,
    video_id: str | None,
    target: str | None,
    folder: str | None,
    each_clip: bool,
    limit: int | None,
    only: tuple[str, ...],
    structure: str | None,
    dynamics: str | None,
    crossed: tuple[str, ...],
    side_by_side: bool,
    weights: str | None,
    fetch_sources: bool,
    allow_private: bool,
    tile_size: str | None,
    tile_overlap: int | None,
    local: bool,
    workers: int | None,
    ray_address: str | None,
    progress: ProgressMode | None,
    log_json: str | None,
    verbose: bool | None,
) -> DecodeResult | None:
    """Turn tokens back into video.

    The tokenizer and the weights are those that made the tokens. Weights whose digest differs from the shard's are
    refused.

    With --all, the clips of each video are joined in order, on Ray or with --local in this process. The same command
    again writes what is missing. A video of which clips are missing becomes several files.

    \b
    vidshard decode tokens/ --clip 3f2a --to clip.mp4 --side-by-side
    vidshard decode tokens/ --all reconstructions/
    vidshard decode latents/ --structure 3f2a --dynamics 9c01 --to crossed.mp4
    """
    parts = _crossed_parts(structure, dynamics, crossed)
    sources = (clip_id, video_id, folder, parts or None)
    if sources.count(None) != len(sources) - 1:
        raise click.UsageError(
            "give one of --clip ID, --video ID or --structure ID with --dynamics ID, and --to FILE; or --all DIR"
        )
    if folder is None:
        _refuse_for_one_file(target, of_all=bool(each_clip or local or workers or ray_address or limit))
    if parts and only:
        raise click.UsageError("--only decodes parts of one clip (--clip ID); a crossed video takes every part")
    from vidshard.jobs.runtime.events import reported
    from vidshard.jobs.shards.decode import DecodeRun, decode_output

    request = DecodeRun(
        out=out,
        clip_ids=() if clip_id is None else (clip_id,),
        video_id=video_id,
        target=target,
        folder=folder,
        limit=limit,
        only=tuple(dict.fromkeys(only)),
        crossed=parts,
        side_by_side=side_by_side,
        weights=weights,
        fetch_sources=fetch_sources,
        allow_private=allow_private,
        tile_size=_size(tile_size),
        tile_overlap=tile_overlap,
        ray_address=ray_address,
        workers=workers,
        verbose=bool(verbose),
        reporting=ReportSettings(progress=progress, log_json=log_json),
    )
    if folder is not None and not each_clip and not side_by_side:
        from vidshard.jobs.shards.decode_all import decode_all

        return decode_all(request, output_console(), local=local)
    console = output_console()
    with reported(console, request.reporting, command="decode", out=folder or target):
        decode_output(request, console)
    return None


def _refuse_for_one_file(target: str | None, *, of_all: bool) -> None:
    """Refuse flags that make no sense where one video file is written.

    Args:
        target: the file.
        of_all: whether a flag is given that belongs to --all.

    Raises:
        click.UsageError: the file is not named, or a flag belongs to --all.
    """
    if target is None:
        raise click.UsageError("--clip, --video and crossed clips need --to FILE, the video file to write")
    if of_all:
        raise click.UsageError("--each-clip, --limit, --local, --workers and --ray-address belong to --all DIR")


def _size(text: str | None) -> tuple[int, int] | None:
    try:
        return None if text is None else parse_size(text)
    except ValueError as error:
        raise click.UsageError(f"--tile-size: {error}") from error


def _crossed_parts(structure: str | None, dynamics: str | None, crossed: tuple[str, ...]) -> dict[str, str]:
    """Clip ids by payload part, from the flags of `decode`.

    Raises:
        click.UsageError: a value is no PART=ID, or a part is named twice.
    """
    named: list[tuple[str, str | None]] = [("structure", structure), ("dynamics", dynamics)]
    for text in crossed:
        name, _, value = text.partition("=")
        if not (name and value):
            raise click.UsageError(f"--cross {text}: give PART=ID, such as structure=3f2a")
        named.append((name, value))
    parts: dict[str, str] = {}
    for part, clip_id in named:
        if clip_id is not None:
            if part in parts:
                raise click.UsageError(f"the payload part '{part}' is named twice: give one clip for it")
            parts[part] = clip_id
    return parts
