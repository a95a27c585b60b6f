"""Result of a training run: its data, the lines on the terminal, and ``summary.md``."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console

from vidshard.jobs.runtime.errors import exit_code_of
from vidshard.jobs.runtime.progress import warn
from vidshard.jobs.training.resolve import ResolvedTraining
from vidshard.jobs.training.stage_job import EXPORT
from vidshard.models.weights import count_parameters
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import RUN
from vidshard.pipeline.training_data.videos import TrainingVideos
from vidshard.pipeline.versions import code_version
from vidshard.schemas.errors import EXIT_AGAIN, EXIT_FAILED
from vidshard.schemas.training import MADE

SUMMARY = "summary.md"
REJECTS = "rejects.json"


@dataclass(kw_only=True)
class StageResult:
    """Result of one stage; ``result.json`` stores it."""

    name: str
    steps: int = 0
    """Steps done."""
    before: dict[str, float] = field(default_factory=dict)
    """Metrics of held-out clips before the first step."""
    measured: dict[str, float] = field(default_factory=dict)
    """Metrics of held-out clips after the last step."""
    unmeasured: str = ""
    """Why there are none; empty if there are."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Losses of the last step, and overall speed."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the videos and of the first, frozen and last weights."""
    restarts: int = 0
    """Restarts after a worker died, over all commands."""
    made: dict[str, int] = field(default_factory=dict)
    """Number of clips by the way that they were made: mirrored, cut at native resolution, squeezed, and so on."""
    seconds: float = 0.0
    """Seconds of training that led to ``steps``, over all commands; without what was lost to a kill."""
    is_finished: bool = False


@dataclass(kw_only=True)
class Result:
    """Result of a training run."""

    stages: list[StageResult] = field(default_factory=list)
    problem: str | None = None
    """Why the run stopped early; None if nothing went wrong."""
    may_pass: bool = False
    """Whether the problem lies outside of the run, so that the same command may go on."""
    interruption: KeyboardInterrupt | None = None
    """Ctrl-C or SIGTERM that ended the run in order."""

    @property
    def exit_code(self) -> int:
        """0; 1 after a problem, 75 after one that may pass; 130 or 143 after an interruption."""
        if self.problem is not None:
            return EXIT_AGAIN if self.may_pass else EXIT_FAILED
        return 0 if self.interruption is None else exit_code_of(self.interruption)


def why_unmeasured(validation_share: float) -> str:
    """Why no held-out clip could be measured."""
    if not validation_share:
        return "no video is held out; give --validation-share above 0"
    return f"no held-out video can be decoded; see {REJECTS}"


def print_result(result: Result, out: str, console: Console) -> None:
    """Print the result of each stage, and the command that comes next."""
    for stage in result.stages:
        _print_stage(stage, console)
        if stage.unmeasured:
            warn(console, f"{stage.name}: nothing was measured: {stage.unmeasured}")
    again = f"vidshard train resume {out}"
    if result.problem is not None:
        warn(console, result.problem)
        console.print(f"the last good checkpoint is kept; to go on: {again}", highlight=False)
    elif result.interruption is not None:
        console.print(f"interrupted; to go on: {again}", style="bold", highlight=False)
    else:
        last = storage.join(out, result.stages[-1].name, EXPORT)
        console.print(f"\nnext: vidshard tokenize VIDEOS --out tokens/ --weights {last}", style="bold", highlight=False)


def _print_stage(stage: StageResult, console: Console) -> None:
    def change(name: str, digits: int) -> str:
        now = stage.measured.get(name)
        if now is None:
            return ""
        before = stage.before.get(name)
        return f" · {name} {f'{before:.{digits}f} → ' if before is not None else ''}{now:.{digits}f}"

    parts = "".join(change(name, 2) for name in stage.measured if name.startswith("psnr_"))
    changes = change("psnr", 2) + parts + change("ssim", 3) + change("lpips", 3) + change("codebook_utilization", 3)
    restarts = f", {stage.restarts} restarts" if stage.restarts else ""
    console.print(f"{stage.name}: {stage.steps} steps in {stage.seconds:.0f} s{restarts}{changes}", highlight=False)


def write_summary(training: ResolvedTraining, result: Result, videos: TrainingVideos) -> None:
    """Write ``summary.md`` into the folder of the run."""
    run = training.run
    lines = [
        f"# Training run {training.run_id}",
        "",
        f"`{training.tokenizer.name}`, {count_parameters(training.tokenizer):,} weights, by vidshard {code_version()}. "
        f"The complete settings stand in `{RUN}`.",
        "",
        f"Videos: {videos.num_videos} usable ({', '.join(storage.public_uri(text) for text in run.videos)}), "
        f"{len({row['video_id'] for row in videos.held_out.select(['video_id']).to_pylist()})} of them held out; "
        f"rejections stand in `{REJECTS}`.",
        "",
        "| stage | trains | clips | steps | PSNR dB | SSIM | LPIPS | codebook used | of what the clips could use "
        "| seconds | clips/s | waiting | MFU | restarts |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in result.stages:
        config = run.stages[stage.name]
        cells = [
            stage.name,
            config.trainable,
            f"{config.frames}x{config.size[0]}x{config.size[1]} at {config.fps} fps, {config.batch_size} a step",
            f"{stage.steps} of {config.steps}",
            *(_before_and_after(stage, name, form) for name, form in _COLUMNS),
            f"{stage.seconds:.0f}",
            *(f"{stage.metrics[name]:{form}}" if name in stage.metrics else "" for name, form in _SPEEDS),
            str(stage.restarts),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", _HELD_OUT, ""]
    lines += [f"**{s.name}: nothing was measured:** {s.unmeasured}.\n" for s in result.stages if s.unmeasured]
    if training.start_note:
        lines += [f"Start: {training.start_note}.", ""]
    for stage in result.stages:
        if stage.made:
            counts = ", ".join(f"{count:,} {MADE[way]}" for way, count in stage.made.items())
            lines += [f"* {stage.name}: of {stage.steps * run.stages[stage.name].batch_size:,} clips {counts}"]
        lines += [f"* {stage.name}: {name} `{digest}`" for name, digest in stage.digests.items()]
    if result.problem:
        lines += ["", f"**Not finished:** {result.problem}"]
    finished = [stage.name for stage in result.stages if stage.is_finished]
    if finished:
        path = storage.join(storage.public_uri(run.out), finished[-1], EXPORT)
        lines += ["", "Use it:", "", f"    vidshard tokenize VIDEOS --out tokens/ --weights {path}"]
    storage.write_atomic(storage.join(run.out, SUMMARY), ("\n".join(lines) + "\n").encode())


_HELD_OUT = (
    "Held-out figures are before the first step and after the last: of averaged weights where averages are kept, in "
    "the stage's precision, of the mean of continuous latents. No more codes can be used than there are tokens."
)
_COLUMNS = (
    ("psnr", ".2f"),
    ("ssim", ".3f"),
    ("lpips", ".3f"),
    ("codebook_utilization", ".1%"),
    ("codebook_share_of_ceiling", ".0%"),
)
_SPEEDS = (("clips_per_second", ".3g"), ("waiting", ".0%"), ("mfu", ".1%"))


def _before_and_after(stage: StageResult, name: str, form: str) -> str:
    now, before = stage.measured.get(name), stage.before.get(name)
    if now is None:
        return ""
    return f"{now:{form}}" if before is None else f"{before:{form}} → {now:{form}}"
