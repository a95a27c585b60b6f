"""Export of a checkpoint: the tokenizer of any kept step of a run, also of one that was interrupted."""

from __future__ import annotations

from rich.console import Console

from vidshard.jobs.training.resolve import read_record
from vidshard.jobs.training.start import write_tokenizer
from vidshard.models.checkpoint_parts import own_weights
from vidshard.models.tokenizer import parse_config
from vidshard.models.training.start import check_format
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import RUN
from vidshard.pipeline.training_data.checkpoints import CheckpointInfo, Checkpoints
from vidshard.schemas.errors import UserError


def export_checkpoint(out: str, console: Console, *, step: str, target: str | None, raw: bool = False) -> None:
    """Write the tokenizer of a checkpoint as ``.safetensors`` and print the command that uses it.

    Args:
        out: folder of a run, whose last stage with a checkpoint is meant, or of a stage.
        step: number of a step, "last", or "best" by the metric of the run.
        target: file to write; None for ``tokenizer-step-N.safetensors`` in the folder of the stage.
        raw: take the weights of the step itself rather than their average.

    Raises:
        UserError: there is no run, no checkpoint, or none of that step.
        CheckpointError: the checkpoint is damaged, or of another run.
    """
    out = storage.absolute(out).rstrip("/")
    folder, checkpoints, infos = _checkpoints_of(out)
    info = _choose(folder, checkpoints, infos, step)
    state = checkpoints.load(info)["state"]
    try:
        check_format(state)
    except ValueError as error:
        raise UserError(f"{storage.public_uri(folder)}: {error}") from error
    config = parse_config(read_record(folder.rpartition("/")[0])["tokenizer"])
    averaged = bool(state["averages"]) and not raw
    path = target or storage.join(folder, f"tokenizer-step-{info.step}.safetensors")
    if not path.endswith(".safetensors"):
        raise UserError(f"--to {path}: a tokenizer is written as .safetensors")
    write_tokenizer(path, config, own_weights(state, averaged=averaged))
    measured = "".join(
        f", {name} {info.metrics[name]:.4g}" for name in ("psnr", "ssim", "lpips") if name in info.metrics
    )
    console.print(
        f"{'averaged weights' if averaged else 'weights'} of {config.name} at step {info.step}{measured}: "
        f"{storage.public_uri(path)}",
        highlight=False,
        markup=False,
    )
    console.print(f"next: vidshard tokenize VIDEOS --out tokens/ --weights {path}", highlight=False, markup=False)


def _checkpoints_of(out: str) -> tuple[str, Checkpoints, list[CheckpointInfo]]:
    """Folder of the stage, its checkpoints, and their records, of which there is at least one."""
    is_run = storage.exists(storage.join(out, RUN))
    run_folder = out if is_run else out.rpartition("/")[0]
    if not is_run and not storage.exists(storage.join(run_folder, RUN)):
        raise UserError(f"there is no run in {storage.public_uri(out)}: it has no {RUN}; name its folder, or RUN/STAGE")
    record = read_record(run_folder)
    stages = list(record["run"]["stages"])
    names = stages[::-1] if is_run else [out.rpartition("/")[2]]
    for name in names:
        folder = storage.join(run_folder, name)
        checkpoints = Checkpoints(folder, record["run_id"], best_by=record["run"]["best_by"])
        if name in stages and (infos := checkpoints.infos()):
            return folder, checkpoints, infos
    raise UserError(
        f"{storage.public_uri(out)} has no checkpoint; one is written every {record['run']['checkpoint_steps']} steps "
        f"and when a run is interrupted. Stages: {', '.join(stages)}"
    )


def _choose(folder: str, checkpoints: Checkpoints, infos: list[CheckpointInfo], step: str) -> CheckpointInfo:
    kept = ", ".join(str(info.step) for info in infos)
    if step == "last":
        return infos[-1]
    if step == "best":
        best = checkpoints.best()
        if best is None:
            raise UserError(
                f"no checkpoint of {storage.public_uri(folder)} was measured, so none is the best; it keeps the steps "
                f"{kept}"
            )
        return best
    found = [info for info in infos if str(info.step) == step]
    if not found:
        raise UserError(f"--step {step}: {storage.public_uri(folder)} keeps the steps {kept}; or give best or last")
    return found[0]
