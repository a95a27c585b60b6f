"""Resolved training run: settings looked up and checked before any video is opened; and its record, ``run.json``."""

from __future__ import annotations

import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import ray
import torch
import yaml
from pydantic import ValidationError
from rich.console import Console

from vidshard.jobs.runtime.cluster import Cluster
from vidshard.jobs.runtime.progress import warn
from vidshard.jobs.training.start import Start, begins_discriminator, describe_start, last_state, read_start
from vidshard.models.codebook_use import MAX_CODEBOOK
from vidshard.models.metrics import SSIM_WINDOW
from vidshard.models.tokenizer import FAMILIES, TokenizerConfig, get_preset, parse_config
from vidshard.models.training.families import check_stages
from vidshard.models.training.generator import Generator
from vidshard.models.training.perceptual import load_perceptual
from vidshard.models.training.state import check_stage
from vidshard.models.training.step import learning_rate
from vidshard.models.weights import UnstatedModelError, count_parameters, load_weights, network_differences
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import RUN
from vidshard.pipeline.training_data.checkpoints import CheckpointError, Checkpoints
from vidshard.pipeline.versions import code_version
from vidshard.schemas.errors import UserError, one_line
from vidshard.schemas.fields import differences
from vidshard.schemas.training import WEIGHT_SUFFIXES, Metric, StageConfig, TrainRun, join_weight

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ResolvedTraining:
    """A training run whose settings are checked, with absolute paths and the tokenizer's configuration."""

    run: TrainRun
    tokenizer: TokenizerConfig
    run_id: str
    """Id of the run in its folder; empty until `begin_run`."""
    previous: tuple[str, str] | None
    """Folder and run id of the stage that ``--init-from`` names; None without one."""
    weights: str | None
    """Weights file that ``--init-from`` names; None without one."""
    start_note: str = ""
    """Parts of the file that the first stage starts from, as far as it takes them; empty without one."""
    new_discriminator_at_once: bool = False
    """Whether the first stage begins with an untrained discriminator at step 0 though it starts from weights."""
    longer: str | None = None
    """Stage that was given more steps than its record has; None without one."""


def resolve(run: TrainRun) -> ResolvedTraining:
    """Look up what the settings name, and refuse what cannot work.

    Raises:
        UserError: an unknown tokenizer, clips that it does not accept, a start (``--init-from``) that is missing or of
            another architecture, losses that cannot be loaded, or URLs with credentials.
    """
    _refuse_credentials(run)
    if run.checkpoint_steps % run.evaluate_steps and run.evaluate_steps % run.checkpoint_steps:
        raise UserError(
            f"one of --checkpoint-steps {run.checkpoint_steps} and --evaluate-steps {run.evaluate_steps} must be a "
            "multiple of the other: the best checkpoint is one that was measured"
        )
    run = _with_absolute_paths(run)
    run = _with_own_model(run)
    previous, weights, tokenizer, start = _look_up_start(run)
    if run.tokenizer_is_default:
        kept = run.tokenizer if weights is None or tokenizer.name == run.tokenizer else None
        run = run.model_copy(update={"tokenizer": kept, "tokenizer_is_default": False})
    try:
        check_stages(tokenizer, {name: stage.trainable for name, stage in run.stages.items()})
    except ValueError as error:
        raise UserError(f"{error}") from error
    for name, stage in run.stages.items():
        try:
            check_stage(stage, tokenizer)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        _check_metric(run.best_by, name, stage, tokenizer)
    first = next(iter(run.stages.values()))
    if first.trainable == "decoder" and previous is None and weights is None:
        raise UserError(
            "a stage that trains the decoder alone needs a trained encoder: give --init-from RUN/stage1 or weights"
        )
    _check_losses(run)
    if run.wandb is not None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UserError("--wandb needs the package wandb: pip install wandb, or leave --wandb out") from error
    note, new_at_once = "", False
    if start is not None:
        assert weights is not None
        note = f"{storage.public_uri(weights)}: {describe_start(start, tokenizer, first)}"
        new_at_once = first.gan_start == 0 and begins_discriminator(start, first)
    return ResolvedTraining(
        run=run,
        tokenizer=tokenizer,
        run_id="",
        previous=previous,
        weights=weights,
        start_note=note,
        new_discriminator_at_once=new_at_once,
    )


def _with_absolute_paths(run: TrainRun) -> TrainRun:
    """The run as it can be resumed from any folder."""
    stages = {
        name: stage.model_copy(update={"vgg_weights": storage.absolute(stage.vgg_weights)})
        if stage.vgg_weights
        else stage
        for name, stage in run.stages.items()
    }
    return run.model_copy(
        update={
            "stages": stages,
            "videos": [join_weight(storage.absolute(path), weight) for path, weight in run.corpora],
            "out": run.out if "://" in run.out else storage.absolute(run.out),
            "cache": None if run.cache is None else storage.absolute(run.cache),
            "init_from": None if run.init_from is None else storage.absolute(run.init_from),
        }
    )


def _refuse_credentials(run: TrainRun) -> None:
    """Refuse URLs with credentials: ``run.json`` stores all paths, and whoever has the folder can read it."""
    vgg = [stage.vgg_weights for stage in run.stages.values()]
    for uri in (run.out, run.cache, run.init_from, *vgg, *(path for path, _ in run.corpora)):
        if uri is not None and uri != storage.public_uri(uri):
            raise UserError(
                f"{storage.public_uri(uri)}: the URL carries credentials, which no record of a training may hold; put "
                "them into the environment"
            )


def _check_metric(metric: Metric, name: str, stage: StageConfig, tokenizer: TokenizerConfig) -> None:
    reason = None
    if metric == "lpips" and not stage.perceptual_weight:
        reason = "LPIPS is measured only where --perceptual-weight is not 0"
    elif metric == "ssim" and min(stage.size) < SSIM_WINDOW:
        reason = f"SSIM takes frames of {SSIM_WINDOW}x{SSIM_WINDOW} and more"
    elif metric.startswith("codebook") and not 0 < (tokenizer.codebook_size or 0) <= MAX_CODEBOOK:
        reason = f"{tokenizer.name} has no codebook that is counted"
    if reason is not None:
        raise UserError(f"{name}: no checkpoint would be the best by {metric}: {reason}; give another --best-by")


MODEL_FILES = (".yaml", ".yml")
"""Suffixes of files that describe a network for ``--tokenizer``."""
_ALIASES = {"base_channels": "base_width"}
"""Other names of settings of networks."""


def _with_own_model(run: TrainRun) -> TrainRun:
    """Read a network that ``--tokenizer`` names by a YAML file: the run then holds its preset and its settings.

    Raises:
        UserError: the file cannot be read, or names no preset.
    """
    given: dict[str, Any] = {
        name: yaml.safe_load(value) if isinstance(value, str) else value for name, value in run.model.items()
    }
    if run.tokenizer is None or not run.tokenizer.endswith(MODEL_FILES):
        return run.model_copy(update={"model": given})
    path = storage.absolute(run.tokenizer)
    try:
        described = yaml.safe_load(storage.read_bytes(path, max_bytes=1 << 20))
    except (yaml.YAMLError, OSError, storage.StorageError) as error:
        raise UserError(f"--tokenizer {storage.public_uri(path)}: {one_line(error, 300)}") from error
    if not isinstance(described, dict) or not isinstance(described.get("preset"), str):
        raise UserError(
            f"--tokenizer {storage.public_uri(path)}: the file names a preset, such as 'preset: tiny', and the "
            "settings that differ from it"
        )
    preset = described.pop("preset")
    return run.model_copy(update={"tokenizer": preset, "model": described | given})


def _own_model(preset: TokenizerConfig, changes: Mapping[str, Any]) -> TokenizerConfig:
    """A preset with some settings of its network changed; its name then ends in ``_own`` unless one is given.

    Raises:
        ValueError: a setting is unknown or impossible.
    """
    if not changes:
        return preset
    renamed = {_ALIASES.get(name, name): value for name, value in changes.items()}
    known = type(preset).model_fields
    unknown = [name for name in renamed if name not in known or name == "family"]
    if unknown:
        raise ValueError(f"--model {unknown[0]}: {preset.name} has {', '.join(n for n in known if n != 'family')}")
    try:
        return parse_config({**preset.model_dump(mode="json"), "name": f"{preset.name}_own", **renamed})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the network"
        raise ValueError(f"--model: {where}: {first['msg']}") from error


def _look_up_start(
    run: TrainRun,
) -> tuple[tuple[str, str] | None, str | None, TokenizerConfig, Start | None]:
    """Look up ``--init-from`` and ``--tokenizer``.

    Returns:
        Folder and run id of the earlier stage, the weights file, the configuration of the tokenizer to train, and what
        the file holds. One of the first two at most is not None.
    """
    try:
        named = None if run.tokenizer is None else _own_model(get_preset(run.tokenizer), run.model)
        if run.init_from is None:
            if named is None:
                raise UserError("--tokenizer is missing: name a model (see `vidshard tokenizers`)")
            return None, None, named, None
        source = run.init_from
        if source.endswith(WEIGHT_SUFFIXES):
            source = storage.pinned(source)
            if named is None or run.tokenizer_is_default:
                with storage.local_copy(source) as local:
                    assert local is not None
                    named = _stated_model(local, named)
            return None, source, named, read_start(source, named)
        folder, record = _stage_folder(source)
        there = parse_config(record["tokenizer"])
        if named is not None and (differing := network_differences(there, named)):
            raise UserError(
                f"--init-from {run.init_from} is of {there.name}, not {named.name} ({differing}): a stage goes on with "
                "the tokenizer of the one before it"
            )
        Checkpoints(folder, record["run_id"]).latest() or last_state(folder, record["run_id"])
    except (ValueError, FileNotFoundError, storage.StorageError, CheckpointError) as error:
        raise UserError(f"{error}") from error
    return (folder, record["run_id"]), None, there, None


def _stated_model(path: Path, default: TokenizerConfig | None) -> TokenizerConfig:
    """Configuration that a weights file states, or the default if it states none.

    Raises:
        UnstatedModelError: it states none, and there is no default.
    """
    try:
        return load_weights(path)[0]
    except UnstatedModelError:
        if default is None:
            raise
        return default


def _stage_folder(source: str) -> tuple[str, dict[str, Any]]:
    """Folder of an earlier stage, and the record of its run.

    Args:
        source: folder of the stage, or of its run, whose last stage is meant.
    """
    if storage.exists(storage.join(source, RUN)):
        record = read_record(source)
        return storage.join(source, list(record["run"]["stages"])[-1]), record
    run_folder, _, _ = source.rstrip("/").rpartition("/")
    if not storage.exists(storage.join(run_folder, RUN)):
        raise UserError(
            f"--init-from {storage.public_uri(source)} is neither a stage of a run, such as runs/mine/stage1, nor "
            f"weights ({', '.join(WEIGHT_SUFFIXES)})"
        )
    return source.rstrip("/"), read_record(run_folder)


def _check_losses(run: TrainRun) -> None:
    """Load LPIPS once where it is used, so that a missing file is noticed before the first step."""
    for vgg in {stage.vgg_weights for stage in run.stages.values() if stage.perceptual_weight}:
        try:
            with storage.local_copy(vgg) as local:
                load_perceptual(local)
        except (ValueError, storage.StorageError) as error:
            raise UserError(f"{error}: --vgg-weights FILE, or --perceptual-weight 0") from error


def plan_resources(training: ResolvedTraining, cluster: Cluster) -> int:
    """Number of training workers on a cluster.

    Raises:
        UserError: batches do not divide among the workers, there are too few GPUs, or the training does not fit into
            memory.
    """
    run = training.run
    workers = run.workers or int(cluster.num_gpus) or 1
    if cluster.num_gpus and workers > cluster.num_gpus:
        raise UserError(f"--workers {workers}, and there are {cluster.num_gpus:g} GPUs: one for each worker")
    for name, stage in run.stages.items():
        micro_batches = workers * stage.gradient_accumulation
        if stage.batch_size % micro_batches:
            raise UserError(
                f"{name}: --batch-size {stage.batch_size} does not divide among {workers} workers with "
                f"--gradient-accumulation {stage.gradient_accumulation}: take a multiple of {micro_batches}"
            )
        if not cluster.num_gpus and cluster.num_nodes == 1:
            _check_memory(training.tokenizer, name, stage, workers)
    return workers


def _check_memory(tokenizer: TokenizerConfig, name: str, stage: StageConfig, workers: int) -> None:
    """Refuse a stage whose weights, optimizer state, averages and activations exceed this machine's memory."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # float32: weights, gradients, two moments and averages
    fixed = 4 * 5 * count_parameters(tokenizer)
    clips = stage.batch_size // workers // stage.gradient_accumulation
    kept = 0 if fixed < 64 << 20 or stage.activation_checkpointing else clips * activation_bytes(tokenizer, stage)
    if workers * (fixed + kept) > total:
        raise UserError(
            f"{name} does not fit this machine: {workers} workers take about {workers * fixed / 2**30:.1f} GiB for "
            f"weights and {workers * kept / 2**30:.1f} GiB for {clips} clips each at a time, and it has "
            f"{total / 2**30:.1f} GiB. Take a GPU, --activation-checkpointing, more --gradient-accumulation, or a "
            "smaller --tokenizer or --size"
        )


def activation_bytes(tokenizer: TokenizerConfig, stage: StageConfig) -> int:
    """Bytes that one clip's forward pass keeps for its gradients, measured with tensors that have no storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes seconds to load

    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode():
        generator = Generator(FAMILIES[tokenizer.family].build(tokenizer), stage)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=stage.precision == "bfloat16"),
        ):
            generator(torch.empty(1, 3, stage.frames, *stage.size))
    return sum(kept.values())


# A longer run


def lengthened(
    training: ResolvedTraining, steps: int, is_finished: Callable[[str], bool], console: Console
) -> ResolvedTraining:
    """Give the stage that a run has come to more steps: the first that is not finished, or else the last.

    Args:
        is_finished: whether a stage is finished, by its name.

    Raises:
        UserError: the stage has as many steps already, or no checkpoint to go on from.
    """
    run = training.run
    name = next((name for name in run.stages if not is_finished(name)), list(run.stages)[-1])
    stage = run.stages[name]
    if steps <= stage.steps:
        raise UserError(
            f"--steps {steps}: {name} has {stage.steps} steps already, and a run is made longer only; give more"
        )
    folder = storage.join(run.out, name)
    try:
        checkpoint = Checkpoints(folder, training.run_id).latest()
    except CheckpointError as error:
        raise UserError(str(error)) from error
    if checkpoint is None:
        raise UserError(
            f"--steps {steps}: {storage.public_uri(folder)} has no checkpoint to go on from; start a new run with "
            f"--init-from and other --out"
        )
    longer = stage.model_copy(update={"steps": steps})
    if stage.schedule == "cosine":
        before, now = (learning_rate(config, checkpoint.step) for config in (stage, longer))
        warn(
            console,
            f"{name}: the cosine schedule now ends at step {steps}, so the learning rate goes from {before:.3g} to "
            f"{now:.3g} at step {checkpoint.step}",
        )
    console.print(f"{name}: {steps} steps instead of {stage.steps}, on from step {checkpoint.step}", highlight=False)
    return replace(training, run=run.model_copy(update={"stages": {**run.stages, name: longer}}), longer=name)


# The record.


def read_record(out: str) -> dict[str, Any]:
    """Read the record of the run in a folder; settings with former names get their present ones.

    Raises:
        UserError: there is no record, or it is not that of a training run.
        StorageError: it cannot be read.
    """
    path = storage.join(out, RUN)
    if not storage.exists(path):
        raise UserError(f"there is no run in {storage.public_uri(out)}: it has no {RUN}")
    try:
        record: dict[str, Any] = json.loads(storage.read_bytes(path))
        TrainRun.model_validate(record["run"])
        parse_config(record["tokenizer"])
        known = isinstance(record["run_id"], str) and isinstance(record["starts"], list)
        known = known and bool(record["run"]["stages"])
        if not known or not isinstance(record["identity"]["stages"], dict) or record["format"] != _FORMAT:
            raise ValueError
        record["identity"] = _with_present_names(record["identity"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise UserError(f"{path} is not the record of a training run: choose another --out") from error
    return record


def _with_present_names(identity: dict[str, Any]) -> dict[str, Any]:
    stages = {name: StageConfig.completed(stage) for name, stage in identity["stages"].items()}
    return {**TrainRun.current_names(identity), "stages": stages}


def begin_run(training: ResolvedTraining) -> ResolvedTraining:
    """Write ``run.json``, with the run id: that of the folder's run if its identity is the same, or a new one.

    A folder whose run has no checkpoint yet may be taken by another run.

    Raises:
        UserError: the folder belongs to another run; the message lists the differences.
    """
    run = training.run
    path = storage.join(run.out, RUN)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record: dict[str, Any] | None = None
    if storage.exists(path):
        record = read_record(run.out)
        if training.longer is not None:
            record["identity"]["stages"][training.longer]["steps"] = run.stages[training.longer].steps
        changed = differences(record["identity"], _identity(run))
        if changed and _has_checkpoint(run.out, record):
            lines = "\n".join(f"  {line}" for line in changed)
            raise UserError(
                f"{storage.public_uri(run.out)} is the run of other settings:\n{lines}\nchoose another --out, or go on "
                f"with it: vidshard train resume {storage.public_uri(run.out)}"
            )
        if changed:
            record = None
    if record is None:
        record = {
            "format": _FORMAT,
            "run_id": uuid.uuid4().hex[:12],
            "identity": _identity(run),
            "tokenizer": training.tokenizer.model_dump(mode="json"),
            "libraries": {
                "python": platform.python_version(),
                "torch": str(torch.__version__),
                "ray": ray.__version__,
                "pyarrow": pa.__version__,
                "av": av.__version__,
            },
            "starts": [],
        }
    record["starts"].append({"at": now, "code_version": code_version()})
    record["run"] = run.model_dump(mode="json")
    storage.write_atomic(path, json.dumps(record, indent=2).encode())
    return replace(training, run_id=record["run_id"])


def _has_checkpoint(out: str, record: dict[str, Any]) -> bool:
    return any(
        Checkpoints(storage.join(out, name), record["run_id"]).latest() is not None
        for name in record["identity"]["stages"]
    )


def _identity(run: TrainRun) -> dict[str, Any]:
    identity: dict[str, Any] = json.loads(json.dumps(run.identity))
    return identity


def print_run(training: ResolvedTraining, cluster: Cluster, workers: int, console: Console) -> None:
    """Print the complete resolved run, with warnings."""
    record = training.run.model_dump(mode="json")
    console.print(yaml.safe_dump(record, sort_keys=False).rstrip(), highlight=False, markup=False)
    config = training.tokenizer
    console.print(
        f"{config.name}: {count_parameters(config) / 1e6:.3g} million weights; {workers} workers on {cluster}; run "
        f"{training.run_id}",
        highlight=False,
    )
    for name, stage in training.run.stages.items():
        if stage.gan_weight and not stage.has_discriminator:
            warn(
                console,
                f"{name} has no discriminator: it would start at step {stage.gan_start}, and there are {stage.steps}. "
                "Give a lower --gan-start, or --gan-weight 0 if none is wanted",
            )
    if training.start_note:
        console.print(f"start: {training.start_note}", highlight=False, markup=False)
    if training.new_discriminator_at_once:
        name = next(iter(training.run.stages))
        warn(
            console,
            f"{name} begins an untrained discriminator at step 0: give a --gan-start of some thousand steps, in which "
            "the tokenizer settles, or a checkpoint that holds a trained one",
        )
    if training.previous is not None:
        folder, run_id = training.previous
        record = read_record(folder.rpartition("/")[0])
        checkpoint = Checkpoints(folder, run_id).latest()
        steps = record["run"]["stages"][folder.rpartition("/")[2]]["steps"]
        if checkpoint is not None and checkpoint.step < steps:
            warn(
                console,
                f"{storage.public_uri(folder)} is not finished: this begins at step {checkpoint.step} of {steps}",
            )
