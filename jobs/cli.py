"""The ``vidshard`` command: one sub-command per job.

This module is the door of every job: it turns arguments into settings, calls the job, and turns its result or its error
into output and an exit code. Errors for users, interrupts and defects are caught here and nowhere else. Exit codes:
0 done; 1 the job ran and failed, or its output is incomplete or damaged; 2 the request cannot be carried out; 130
interrupted (Ctrl-C); 143 terminated (SIGTERM); 129 the terminal was lost (SIGHUP).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from vidshard.jobs.runtime.errors import exit_code_of, interrupt_behind, print_error, signals_that_end, terminate
from vidshard.jobs.runtime.interrupts import is_feeding
from vidshard.jobs.runtime.output import lost_report, make_output_safe
from vidshard.jobs.runtime.terminal import SafeConsole
from vidshard.jobs.settings import SectionedCommand, SectionedOption, options_of, resolve_settings
from vidshard.jobs.training.settings import preset_defaults, training_run
from vidshard.schemas.errors import EXIT_FAILED, EXIT_REFUSED, VidshardError
from vidshard.schemas.fields import parse_size
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.training import TrainFlags

if TYPE_CHECKING:
    from vidshard.jobs.shards.verify import Verification
    from vidshard.jobs.tokenization.summary import Summary
    from vidshard.jobs.training.summary import Result

# Each command imports its job when it runs: `vidshard --help` must not wait seconds for torch and Ray.


_INTERRUPTED = "interrupted; run the same command again to continue"
_EXIT_SECONDS = 60.0
"""Time for threads and exit handlers after a defect, which may have left them waiting."""


def main() -> None:
    """Run a command; `vidshard.jobs.main` is what starts it.

    Raises:
        SystemExit: always.
    """
    make_output_safe()
    for number in signals_that_end():
        signal.signal(number, terminate)
    # else a thread that asks Ray for something after its end starts a second Ray
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    failed: list[str] = []
    threading.excepthook = partial(_end_for_thread, failed)
    try:
        os.getcwd()
    except OSError as error:
        print_error(f"the working directory cannot be used ({error.strerror}): change to another one, and try again")
        sys.exit(EXIT_REFUSED)
    code = _run()
    threading.excepthook = threading.__excepthook__
    if failed:
        print_error(f"a defect of vidshard (in the thread {failed[0]}); what is committed is valid. Please report it")
        code = EXIT_FAILED
    elif code == 0 and not _is_run(sys.argv[1:]) and (loss := lost_report()) is not None:
        print_error(f"what this command printed is lost: {loss}")
        code = EXIT_FAILED
    if is_feeding():
        # the interpreter ends such a thread inside of PyTorch, which aborts the process
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


_CODE = Path(__file__).parents[1]
"""Folder of the package ``vidshard``, under which all of its modules are imported."""

_RUNS = frozenset({"tokenize", "decode", "convert", "demo", "train"})
"""Commands whose result is files; what they print may be lost. The result of the others is what they print."""


def _is_run(arguments: Sequence[str]) -> bool:
    return bool(arguments) and arguments[0] in _RUNS and not {"--help", "--help-all"} & set(arguments)


def _end_for_thread(failed: list[str], failure: threading.ExceptHookArgs) -> None:
    """Hook for an exception that ends a thread: the command would go on without it, or wait for it for ever.

    It ends the command as SIGTERM does, so that what is begun is saved and the lease is given back. A thread in which
    no code of vidshard ran is its library's affair: Ray's fail when Ray dies, and the main thread is told so.
    """
    frames = traceback.extract_tb(failure.exc_traceback)
    if not any(Path(frame.filename).is_relative_to(_CODE) for frame in frames):
        threading.__excepthook__(failure)
        return
    name = failure.thread.name if failure.thread is not None else "?"
    print_error(f"exception in the thread {name}:")
    traceback.print_exception(failure.exc_value)
    failed.append(name)
    os.kill(os.getpid(), signal.SIGTERM)


def _run() -> int:
    """Run the command that the arguments name; returns the exit code of the process."""
    try:
        code = vidshard.main(standalone_mode=False)
    except SystemExit as end:
        code = end.code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except BaseException as error:  # noqa: BLE001  nobody else would end the process in order
        interrupt = interrupt_behind(error)
        if interrupt is not None:
            click.echo(_INTERRUPTED, err=True)
            return exit_code_of(interrupt)
        traceback.print_exception(error)
        print_error(
            f"a defect of vidshard ({type(error).__name__}); what is committed is valid. Please report the above"
        )
        late = threading.Timer(_EXIT_SECONDS, os._exit, (EXIT_FAILED,))
        late.daemon = True
        late.start()
        return EXIT_FAILED
    return code if isinstance(code, int) else 0


class OrderedGroup(click.Group):
    """A group whose help lists sub-commands in the order in which a newcomer meets them."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """Names of the sub-commands in the order of their definition."""
        return list(self.commands)


class ReportingGroup(OrderedGroup):
    """The root command, where every job's result, error or interrupt becomes a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the sub-command.

        Raises:
            SystemExit: always, with the exit code of the error, of the interrupt, or of the job's result.
        """
        try:
            result = super().invoke(ctx)
        except VidshardError as error:
            print_error(error)
            sys.exit(error.exit_code)
        except KeyboardInterrupt as interrupt:
            click.echo(_INTERRUPTED, err=True)
            sys.exit(exit_code_of(interrupt))
        except BrokenPipeError as error:  # of the job, as standard output has none; click would end without a word
            raise RuntimeError(f"a pipe between processes of the job broke: {error}") from error
        sys.exit(result if isinstance(result, int) else getattr(result, "exit_code", 0))


@click.group(cls=ReportingGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="vidshard")
def vidshard() -> None:
    """Turn large video corpora into Parquet shards of tokens or latents, and tokens back into video.

    \b
    Start here:
      vidshard demo                                     see it work, in a minute
      vidshard tokenize clips/ --out tokens/            videos to token shards
      vidshard verify tokens/                           check the output
      vidshard decode tokens/ --clip ID --to clip.mp4   tokens back to video

    \b
    Exit codes:
      0     done
      1     the job failed, or its output is incomplete or damaged
      2     the request cannot be carried out; nothing was done
      130   interrupted (Ctrl-C); the same command continues
      143   terminated (SIGTERM); the same command continues
      129   the terminal was lost (SIGHUP); the same command continues
    """


@vidshard.command()
@click.argument("videos", nargs=-1, metavar="[VIDEOS]...")
@click.option("--out", default="demo-out", show_default=True, metavar="FOLDER", help="Output folder.")
def demo(videos: tuple[str, ...], out: str) -> int:
    """Tokenize and reconstruct a sample corpus, or your VIDEOS.

    Takes about a minute, and shows every step on the way.
    """
    from vidshard.jobs.demo import run_demo

    return run_demo(videos, out, _console())


@vidshard.command(cls=SectionedCommand)
@click.argument("inputs", nargs=-1, metavar="VIDEOS...")
@options_of(TokenizeRun, leave_out=frozenset({"inputs"}))
@click.option(
    "--local",
    is_flag=True,
    cls=SectionedOption,
    section="Execution",
    common=True,
    help="Run every stage in this process, without Ray: for debugging and small machines.",
)
def tokenize(config_path: Path | None, local: bool, **flags: Any) -> Summary:
    """Turn videos into Parquet shards of tokens or latents.

    VIDEOS are files, folders, globs or manifests (.parquet, .csv or .jsonl with a 'uri' column), local or at any URL
    that fsspec opens. A manifest's other columns are copied to the token rows.

    Every video becomes tokens or a row in rejects/ with the reason. The same command again continues what is
    unfinished.

    \b
    vidshard tokenize clips/ --out tokens/
    vidshard tokenize s3://bucket/*.mp4 --out s3://bucket/tokens --config run.yaml
    """
    run = resolve_settings(TokenizeRun, flags, config_path)
    from vidshard.jobs.tokenization.job import tokenize as run_job

    return run_job(run, _console(), local=local)


@vidshard.command(cls=SectionedCommand)
@click.argument("inputs", nargs=-1, metavar="VIDEOS...")
@click.option(
    "--out",
    metavar="FOLDER",
    cls=SectionedOption,
    section="Output",
    common=True,
    help="Output folder of the run that will follow. The forecast is stored there, and that run compares itself.",
)
@options_of(TokenizeRun, leave_out=frozenset({"inputs", "out"}))
@click.option(
    "--local",
    is_flag=True,
    cls=SectionedOption,
    section="Execution",
    common=True,
    help="Forecast a run of `vidshard tokenize --local`.",
)
@click.option(
    "--machine",
    default="here",
    show_default=True,
    metavar="NAME",
    cls=SectionedOption,
    section="Execution",
    common=True,
    help="Machine to forecast for: here, h200, h100, a100, or a file of `python -m benchmarks.machine`.",
)
def plan(config_path: Path | None, out: str | None, local: bool, machine: str, **flags: Any) -> None:
    """Forecast the output and the cost of a run before it starts.

    Opens every video, decodes a sample and encodes a few clips, with the settings of `vidshard tokenize`. Prints
    videos, clips, hours, bytes, and the GPU-hours and core-hours of the run.

    \b
    vidshard plan clips/ --out tokens/
    vidshard plan clips/ --machine h200
    """
    run = resolve_settings(TokenizeRun, flags | {"out": out or "."}, config_path)
    from vidshard.jobs.tokenization.plan_run import plan_run

    plan_run(run, _console(), local=local, machine=machine, save=out is not None)


@vidshard.command()
@click.argument("out", metavar="OUTPUT")
@click.option("--rows", default=3, show_default=True, metavar="N", help="Number of rows to print.")
def inspect(out: str, rows: int) -> None:
    """Show what an output holds.

    Prints counts, schema, provenance, rejections and some rows. OUTPUT is the folder of a run, or a single shard.
    """
    from vidshard.jobs.shards.show import inspect_output

    inspect_output(out, _console(), num_rows=rows)


@vidshard.command()
@click.argument("out", metavar="OUTPUT")
def stats(out: str) -> None:
    """Compute mean and standard deviation of latents.

    Reads the latents of OUTPUT once, and writes the statistics of each channel to OUTPUT/stats.json. The training
    reader normalizes with them: vidshard.TokenShards(OUTPUT, normalize=True).

    \b
    vidshard stats latents/
    """
    from vidshard.jobs.shards.stats import write_output_stats

    write_output_stats(out, _console())


_moved_weights = click.option(
    "--weights",
    metavar="FILE",
    help="Weights to use: a path, a URL or hf://OWNER/REPO/PATH. Needed if they have moved since the run, or would "
    "have to be fetched.",
)
_fetch_sources = click.option(
    "--fetch-sources",
    is_flag=True,
    help="Read source videos from remote storage too. The output names them; give this only if you trust it.",
)


@vidshard.command()
@click.argument("out", metavar="OUTPUT")
@click.option(
    "--exact",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="SHARE",
    help="Share of the clips to encode again from their sources and compare, such as 0.01.",
)
@click.option("--seed", default=0, show_default=True, help="Random seed of the clips that --exact takes.")
@_moved_weights
@_fetch_sources
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
def verify(
    out: str,
    exact: float | None,
    seed: int,
    weights: str | None,
    fetch_sources: bool,
    repair: bool,
    audit_file: str | None,
    former_audit_file: str | None,
) -> Verification:
    """Check that an output is complete and undamaged.

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

    return verify_output(
        out,
        _console(),
        exact=exact,
        seed=seed,
        weights=weights,
        fetch_sources=fetch_sources,
        repair=repair,
        audit_file=audit_file,
    )


@vidshard.command()
@click.argument("out", metavar="OUTPUT")
@click.option("--clip", "clip_id", metavar="ID", help="Clip to decode; the beginning of its id is enough.")
@click.option("--video", "video_id", metavar="ID", help="Video to decode as a whole, from an output of --continuous.")
@click.option("--to", "target", metavar="FILE", help="Video file to write, such as clip.mp4. Not with --all.")
@click.option("--all", "folder", metavar="DIR", help="Decode every clip into this folder, as ID.mp4.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Decode only the first N clips of --all.")
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
@_moved_weights
@_fetch_sources
@click.option("--tile-size", metavar="SIZE", help="Decode large frames in tiles of this size. Default: as encoded.")
@click.option(
    "--tile-overlap",
    type=click.IntRange(min=0),
    metavar="PIXELS",
    help="Minimum overlap of neighboring tiles. Default: as encoded.",
)
def decode(
    out: str,
    clip_id: str | None,
    video_id: str | None,
    target: str | None,
    folder: str | None,
    limit: int | None,
    only: tuple[str, ...],
    structure: str | None,
    dynamics: str | None,
    crossed: tuple[str, ...],
    side_by_side: bool,
    weights: str | None,
    fetch_sources: bool,
    tile_size: str | None,
    tile_overlap: int | None,
) -> None:
    """Turn tokens back into video.

    The tokenizer and the weights are those that made the tokens. Weights whose digest differs from the shard's are
    refused.

    \b
    vidshard decode tokens/ --clip 3f2a --to clip.mp4 --side-by-side
    vidshard decode tokens/ --all reconstructions/
    vidshard decode latents/ --structure 3f2a --dynamics 9c01 --to crossed.mp4
    """
    parts = _crossed_parts(structure, dynamics, crossed)
    if [clip_id, video_id, folder, parts or None].count(None) != 3:
        raise click.UsageError(
            "give one of --clip ID, --video ID or --structure ID with --dynamics ID, and --to FILE; or --all DIR"
        )
    if folder is None and target is None:
        raise click.UsageError("--clip, --video and crossed clips need --to FILE, the video file to write")
    if parts and only:
        raise click.UsageError("--only decodes parts of one clip (--clip ID); a crossed video takes every part")
    try:
        tiles = None if tile_size is None else parse_size(tile_size)
    except ValueError as error:
        raise click.UsageError(f"--tile-size: {error}") from error
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
        tile_size=tiles,
        tile_overlap=tile_overlap,
    )
    decode_output(request, _console())


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


@vidshard.command()
def tokenizers() -> None:
    """List the tokenizers that vidshard knows."""
    from vidshard.jobs.shards.show import print_tokenizers

    print_tokenizers(_console())


@vidshard.command()
@click.argument("source", metavar="CHECKPOINT")
@click.argument("target", metavar="FILE.safetensors")
@click.option("--tokenizer", metavar="NAME", help="Tokenizer in the checkpoint. Needed unless the checkpoint names it.")
@click.option("--ema", is_flag=True, help="Take the averaged (EMA) weights instead of those of the last training step.")
def convert(source: str, target: str, tokenizer: str | None, ema: bool) -> None:
    """Convert a published checkpoint to safetensors.

    The new file also holds the configuration of the tokenizer: `vidshard tokenize --weights FILE.safetensors` needs no
    --tokenizer.

    CHECKPOINT is a .ckpt, .pt, .pth or .safetensors file: local, at any URL that fsspec opens, or on the Hugging Face
    Hub as hf://OWNER/REPO[@REVISION]/PATH. Nothing in it is executed. The Hub's cache and its variables HF_TOKEN,
    HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT are used as by other tools.

    Versions 1.0 and 1.1 of a published tokenizer have the same tensors: name the one that you downloaded. A file
    named after another tokenizer is refused.

    \b
    vidshard convert model.ckpt fsq.safetensors --tokenizer fsq_causal_488_32768
    vidshard convert \\
        hf://microsoft/VidTok/checkpoints/vidtok_fsq_causal_488_32768.ckpt \\
        fsq.safetensors --tokenizer fsq_causal_488_32768
    """
    from vidshard.jobs.convert_weights import convert_weights

    convert_weights(source, target, tokenizer, _console(), ema=ema)


@vidshard.group(cls=OrderedGroup)
def train() -> None:
    """Train a tokenizer on raw videos.

    A run uses one machine or a Ray cluster. The same command again, or `vidshard train resume`, continues a run where
    it stopped.

    \b
    Both stages of the VidTok paper, or a tiny tokenizer on a CPU in minutes:
      vidshard train two_stage --videos clips/ --out runs/mine
      vidshard train two_stage --videos clips/ --out runs/try --preset tiny

    \b
    VidTwin, which has a single stage, or a tiny one:
      vidshard train one_stage --videos clips/ --out runs/twin
      vidshard train one_stage --videos clips/ --out runs/a --preset vidtwin_tiny

    \b
    One stage at a time, on two corpora:
      vidshard train stage1 --videos a/=0.7 --videos b/=0.3 --out runs/one
      vidshard train stage2 --init-from runs/one/stage1 --videos a/ --out runs/two

    \b
    Adapt published weights to your videos:
      vidshard train finetune --init-from fsq.safetensors --videos a/ --out runs/a
    """


def _training_command(kind: str, preset: str, stages: tuple[str, ...], text: str) -> None:
    """Add ``vidshard train KIND``: flags and file, laid over some stages of a preset."""

    def run_command(config_path: Path | None, **flags: Any) -> Result:
        run = training_run(preset, stages, flags, config_path)
        from vidshard.jobs.training.job import train as run_job

        return run_job(run, _console())

    run_command.__doc__ = text
    own_stages = frozenset[str]() if len(stages) > 1 else frozenset({"stage1", "stage2"})
    options = options_of(TrainFlags, leave_out=own_stages, defaults=preset_defaults(preset, stages))
    train.command(kind, cls=SectionedCommand)(options(run_command))


_training_command(
    "two_stage",
    "paper",
    ("stage1", "stage2"),
    """Train both stages, one after the other.

    Stage 1 trains everything at low resolution; stage 2 trains the decoder at full resolution. A flag applies to both
    stages. --stage1 and --stage2 set values for one of them, as do the keys stage1 and stage2 of a YAML file.
    """,
)
_training_command(
    "stage1",
    "paper_stage1",
    ("stage1",),
    """Train everything at low resolution.

    This is the first stage of the VidTok paper.
    """,
)
_training_command(
    "stage2",
    "paper_stage2",
    ("stage2",),
    """Train the decoder at full resolution.

    This is the second stage of the VidTok paper. Its starting point is a first stage, given with --init-from. Encoder
    and quantizer stay as they are, so existing tokens stay valid.
    """,
)
_training_command(
    "one_stage",
    "vidtwin",
    ("one_stage",),
    """Train everything in one stage, at full resolution.

    VidTwin is trained so. The defaults are those of its paper; --preset vidtwin_tiny trains a tiny one on a CPU in
    minutes. --init-from starts from published weights or from an earlier run.
    """,
)
_training_command(
    "finetune",
    "domain",
    ("finetune",),
    """Adapt a trained tokenizer to your own videos.

    The tokenizer is given with --init-from. With --preset long_video, it is adapted to longer sequences.
    """,
)


@train.command()
@click.argument("out", metavar="RUN")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Number of training processes from now on.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Number of threads of a worker on CPUs.")
@click.option("--ray-address", metavar="ADDRESS", help="Ray cluster to run on, such as 'auto' or ray://head:10001.")
@click.option("-v", "--verbose", is_flag=True, default=None, help="Show Ray's own log and progress.")
def resume(out: str, **changes: Any) -> Result:
    """Resume a training run from its folder.

    RUN is the folder that an earlier command named with --out. The run continues at its last checkpoint, with the
    settings that the folder holds.
    """
    from vidshard.jobs.training.job import resume as run_job

    return run_job(out, {name: value for name, value in changes.items() if value is not None}, _console())


def _console() -> Console:
    if sys.stdout.isatty():
        return SafeConsole()
    return SafeConsole(width=160, soft_wrap=True)  # a pipe has no width of its own, and tables need one


if __name__ == "__main__":
    main()
