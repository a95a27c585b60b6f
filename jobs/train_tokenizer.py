"""The companion job: raw videos in, a trained tokenizer out that ``vidshard tokenize --weights`` takes.

Read :func:`main` for the whole of it, and ``jobs.train_worker`` for what the workers do. Everything that can be wrong
is found out before the first step. The folder of a run explains it:

    run.json                 the complete resolved run, code version, libraries, digests of what went in
    rejects.json             videos that were passed over, and why
    summary.md               what was done and what came of it, for people
    STAGE/tokenizer.safetensors     what the stage gave: averaged weights, with the model's configuration
    STAGE/checkpoints/       what it can be gone on from
    STAGE/metrics.jsonl, tensorboard/, pictures/, held_out.parquet
    STAGE/result.json        figures of the stage, and digests of its weights
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
import uuid
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import av
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
import yaml
from ray.data import Dataset, ExecutionOptions
from ray.data.exceptions import UserCodeException
from ray.exceptions import RayError
from rich.console import Console

from jobs.board import Board
from jobs.cluster import Cluster, ray_cluster
from jobs.display import RunDisplay, warn
from jobs.interrupts import Interrupts
from jobs.outcome import EXIT_FAILED, EXIT_REFUSED, UserError, exit_code_of, print_error
from jobs.request import code_version
from jobs.train_worker import EXPORT, HELD_OUT, RUN, StageJob, last_state, start_weights, train_worker
from models.config import TokenizerConfig
from models.losses import load_perceptual
from models.tokenizer import get_preset
from models.training import Generator, check_stage
from models.weights import count_parameters, differences, load_weights
from pipeline import storage
from pipeline.checkpoints import CheckpointError, Checkpoints
from pipeline.discover import InputError
from pipeline.flow import ENCODER_ENVIRONMENT
from pipeline.lease import Lease, LeaseHeldError, LeaseLostError
from pipeline.training_data import (
    ClipReader,
    Corpora,
    Draws,
    UnusableError,
    decode_held_out,
    fill_cache,
    open_corpora,
    rows_per_block,
    training_clips,
)
from schemas.training import StageConfig, TrainRun
from schemas.video import Limits, Rejection

SUMMARY = "summary.md"
REJECTS = "rejects.json"
STAGE_RESULT = "result.json"

_FORMAT = 1
_LEASE_SECONDS = 60.0
_FAILED_TO_DECODE = (RayError, UserCodeException)


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run with everything looked up that can be without its videos."""

    run: TrainRun
    tokenizer: TokenizerConfig
    run_id: str
    previous: tuple[str, str] | None
    """Folder and run id of the stage that ``--from`` names."""
    weights: str | None
    """Or the weights."""


@dataclass(kw_only=True)
class StageResult:
    """What came of one stage."""

    name: str
    steps: int = 0
    before: dict[str, float] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    restarts: int = 0
    seconds: float = 0.0
    is_finished: bool = False


@dataclass(kw_only=True)
class Result:
    """What came of the run."""

    stages: list[StageResult] = field(default_factory=list)
    problem: str | None = None
    interruption: KeyboardInterrupt | None = None


def main(training: Training, console: Console) -> Result:
    """Train the stages that are not finished yet.

    Raises:
        UserError, InputError, UnusableError, StorageError, LeaseHeldError, CheckpointError: the request cannot be
            carried out as it stands; nothing was trained.
    """
    run = training.run
    storage.check_writable(run.out)
    lease = Lease.acquire(run.out, ttl_seconds=_LEASE_SECONDS, on_wait=lambda text: console.print(text, markup=False))
    with (
        lease,
        ray_cluster(address=run.ray_address, object_store_bytes=run.object_store, verbose=run.verbose) as cluster,
    ):
        workers = place(run, cluster)
        training = begin_run(training)
        announce(training, cluster, workers, console)
        result = Result()
        for name, stage in run.stages.items():
            done = _finished(training, name)
            if done is not None:
                result.stages.append(done)
                console.print(f"{name} is finished: {storage.join(run.out, name, EXPORT)}", highlight=False)
                continue
            corpora, draws, held_out = prepare_data(training, name, stage, cluster, console)
            job = StageJob(
                run=run,
                name=name,
                run_id=training.run_id,
                tokenizer=training.tokenizer,
                epoch_length=draws.epoch_length,
                threads=run.threads or max(1, cluster.num_cpus // cluster.num_nodes // workers),
                board=Board(),
                **_start_of(training, name),
            )
            _write_held_out(job, held_out)
            lease.check()
            outcome = train_stage(job, draws, workers, cluster, lease, result, console)
            result.stages.append(outcome)
            storage.write_atomic(storage.join(job.folder, STAGE_RESULT), json.dumps(asdict(outcome), indent=1).encode())
            _write_rejects(job, corpora.rejections)
            write_summary(training, result, corpora)
            if result.problem or result.interruption or not outcome.is_finished:
                break
    return result


def run_and_report(run: TrainRun, console: Console) -> int:
    """Train, say what came of it, and give the exit code."""
    try:
        result = main(resolve(run), console)
    except (
        UserError,
        InputError,
        UnusableError,
        storage.StorageError,
        LeaseHeldError,
        LeaseLostError,
        CheckpointError,
    ) as error:
        print_error(error)
        return EXIT_REFUSED
    except KeyboardInterrupt as interrupt:
        console.print("interrupted; run the same command again to go on", highlight=False)
        return exit_code_of(interrupt)
    for stage in result.stages:
        _print_stage(stage, console)
    again = f"vidshard train resume {run.out}"
    if result.problem is not None:
        warn(console, result.problem)
        console.print(f"the last good checkpoint is kept; to go on: {again}", highlight=False)
        return EXIT_FAILED
    if result.interruption is not None:
        console.print(f"interrupted; to go on: {again}", style="bold", highlight=False)
        return exit_code_of(result.interruption)
    last = storage.join(run.out, result.stages[-1].name, EXPORT)
    console.print(f"\nnext: vidshard tokenize VIDEOS --out tokens/ --weights {last}", style="bold", highlight=False)
    return 0


def resume(out: str, changes: dict[str, Any], console: Console) -> int:
    """Go on with a run from its folder alone; gives the exit code.

    Args:
        changes: of how it is executed, such as ``workers``.
    """
    try:
        record = read_record(storage.absolute(out))
    except (UserError, storage.StorageError) as error:
        print_error(error)
        return EXIT_REFUSED
    run = TrainRun.model_validate({**record["run"], **changes, "out": storage.absolute(out)})
    return run_and_report(run, console)


def read_record(out: str) -> dict[str, Any]:
    """The record of the run in a folder.

    Raises:
        UserError: there is none.
        StorageError: it cannot be read.
    """
    path = storage.join(out, RUN)
    if not storage.exists(path):
        raise UserError(f"there is no run in {storage.public_uri(out)}: it has no {RUN}")
    try:
        record: dict[str, Any] = json.loads(storage.read_bytes(path))
        TrainRun.model_validate(record["run"])
        _ = record["run_id"], record["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the record of a training run: choose another --out") from error
    return record


# What is asked for.


def resolve(run: TrainRun) -> Training:
    """Look up what the settings name, and refuse what cannot be.

    Raises:
        UserError: unknown models, impossible clips, what a stage starts with missing or of another architecture.
    """
    if "://" not in run.out:
        run = run.model_copy(update={"out": storage.absolute(run.out)})
    if run.checkpoint_steps % run.evaluate_steps and run.evaluate_steps % run.checkpoint_steps:
        raise UserError(
            f"one of --checkpoint-steps {run.checkpoint_steps} and --evaluate-steps {run.evaluate_steps} must be a "
            "multiple of the other: the best checkpoint is one that was measured"
        )
    stages = {
        name: stage.model_copy(update={"vgg_weights": storage.absolute(stage.vgg_weights)})
        if stage.vgg_weights
        else stage
        for name, stage in run.stages.items()
    }
    texts = [storage.absolute(path) + (f"={weight:g}" if weight is not None else "") for path, weight in run.corpora]
    cache = None if run.cache is None else storage.absolute(run.cache)
    run = run.model_copy(update={"stages": stages, "videos": texts, "cache": cache})
    previous, weights, tokenizer = _look_up_start(run)
    for name, stage in run.stages.items():
        try:
            check_stage(stage, tokenizer)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
    first = next(iter(run.stages.values()))
    if first.trainable == "decoder" and previous is None and weights is None:
        raise UserError(
            "a stage that trains the decoder alone needs a trained encoder: give --from RUN/stage1 or weights"
        )
    _check_losses(run)
    if run.wandb is not None:
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UserError("--wandb needs the package wandb: pip install wandb, or leave --wandb out") from error
    return Training(run=run, tokenizer=tokenizer, run_id="", previous=previous, weights=weights)


def _look_up_start(run: TrainRun) -> tuple[tuple[str, str] | None, str | None, TokenizerConfig]:
    """What the run starts with, and the model that is trained."""
    try:
        named = None if run.tokenizer is None else get_preset(run.tokenizer)
        if run.start_from is None:
            if named is None:
                raise UserError("--tokenizer is missing: name a model (see `vidshard tokenizers`)")
            return None, None, named
        source = storage.absolute(run.start_from)
        if source.endswith((".safetensors", ".ckpt", ".pt", ".pth")):
            source = storage.pinned(source)
            with storage.local_copy(source) as local:
                assert local is not None
                if named is None:
                    named = load_weights(local)[0]
            start_weights(source, named)
            return None, source, named
        folder, record = _stage_folder(source)
        there = TokenizerConfig.model_validate(record["tokenizer"])
        if named is not None and (differing := differences(there, named)):
            raise UserError(
                f"--from {run.start_from} is of {there.name}, not {named.name} ({differing}): a stage goes on with the "
                "tokenizer of the one before it"
            )
        Checkpoints(folder, record["run_id"]).latest() or last_state(folder, record["run_id"])
    except (ValueError, FileNotFoundError, storage.StorageError, CheckpointError) as error:
        raise UserError(f"{error}") from error
    return (folder, record["run_id"]), None, there


def _stage_folder(source: str) -> tuple[str, dict[str, Any]]:
    """The folder of a finished stage, from itself or from that of its run, and the record of the run."""
    if storage.exists(storage.join(source, RUN)):
        record = read_record(source)
        return storage.join(source, list(record["run"]["stages"])[-1]), record
    run_folder, _, _ = source.rstrip("/").rpartition("/")
    if not storage.exists(storage.join(run_folder, RUN)):
        raise UserError(
            f"--from {storage.public_uri(source)} is neither a stage of a run, such as runs/mine/stage1, nor weights "
            "(.safetensors, .ckpt, .pt, .pth)"
        )
    return source.rstrip("/"), read_record(run_folder)


def _check_losses(run: TrainRun) -> None:
    """Load LPIPS once where it is wanted: better no training than one that ends at its first step."""
    for vgg in {stage.vgg_weights for stage in run.stages.values() if stage.perceptual_weight}:
        try:
            with storage.local_copy(vgg) as local:
                load_perceptual(local)
        except (ValueError, storage.StorageError) as error:
            raise UserError(f"{error}: --vgg-weights FILE, or --perceptual-weight 0") from error


def place(run: TrainRun, cluster: Cluster) -> int:
    """How many workers.

    Raises:
        UserError: batches do not divide among them, there are too few GPUs, or weights do not fit the memory.
    """
    workers = run.workers or int(cluster.num_gpus) or 1
    if cluster.num_gpus and workers > cluster.num_gpus:
        raise UserError(f"--workers {workers}, and there are {cluster.num_gpus:g} GPUs: one for each worker")
    for name, stage in run.stages.items():
        if stage.clips_per_step % (workers * stage.accumulate):
            raise UserError(
                f"{name}: --clips-per-step {stage.clips_per_step} does not divide among {workers} workers that "
                f"accumulate {stage.accumulate}: take a multiple of {workers * stage.accumulate}"
            )
        if not cluster.num_gpus and cluster.num_nodes == 1:
            _check_memory(run, name, stage, workers)
    return workers


def _check_memory(run: TrainRun, name: str, stage: StageConfig, workers: int) -> None:
    """Refuse what this machine cannot hold: weights, gradients, two moments, averages, and one clip of what is kept."""
    assert run.tokenizer is not None or run.start_from is not None
    if run.tokenizer is None:
        return
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fixed = 4 * 5 * count_parameters(get_preset(run.tokenizer))
    clips = stage.clips_per_step // workers // stage.accumulate
    kept = 0 if fixed < 64 << 20 or stage.recompute else clips * activation_bytes(get_preset(run.tokenizer), stage)
    if workers * (fixed + kept) > total:
        raise UserError(
            f"{name} does not fit this machine: {workers} workers take about {workers * fixed / 2**30:.1f} GiB for "
            f"weights and {workers * kept / 2**30:.1f} GiB for {clips} clips each at a time, and it has "
            f"{total / 2**30:.1f} GiB. Take a GPU, --recompute, more --accumulate, or a smaller --tokenizer or --size"
        )


def activation_bytes(tokenizer: TokenizerConfig, stage: StageConfig) -> int:
    """What one clip's forward pass keeps for its gradients, found by a pass over tensors without storage."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes seconds to load

    from models.tokenizer import VideoTokenizer

    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode():
        generator = Generator(VideoTokenizer(tokenizer), stage)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=stage.precision == "bfloat16"),
        ):
            generator(torch.empty(1, 3, stage.frames, *stage.size))
    return sum(kept.values())


# The record.


def begin_run(training: Training) -> Training:
    """Write ``run.json``, or find that the folder is this run's.

    Raises:
        UserError: it is that of another run; the message lists the differences.
    """
    run = training.run
    path = storage.join(run.out, RUN)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    if storage.exists(path):
        record = read_record(run.out)
        there, here = _flat(record["identity"]), _flat(_identity(run))
        changed = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
        if changed:
            lines = "\n".join(f"  {key}: {there.get(key)!r} there, {here.get(key)!r} now" for key in changed)
            raise UserError(
                f"{storage.public_uri(run.out)} is the run of other settings:\n{lines}\nchoose another --out, or go on "
                f"with it: vidshard train resume {storage.public_uri(run.out)}"
            )
        record["starts"].append({"at": now, "code_version": code_version()})
    else:
        record = {
            "format": _FORMAT,
            "run_id": uuid.uuid4().hex[:12],
            "identity": _identity(run),
            "tokenizer": training.tokenizer.model_dump(mode="json"),
            "libraries": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "ray": ray.__version__,
                "pyarrow": pa.__version__,
                "av": av.__version__,
            },
            "starts": [{"at": now, "code_version": code_version()}],
        }
    record["run"] = run.model_dump(mode="json")
    storage.write_atomic(path, json.dumps(record, indent=2).encode())
    return replace(training, run_id=record["run_id"])


def _identity(run: TrainRun) -> dict[str, Any]:
    identity: dict[str, Any] = json.loads(json.dumps(run.identity))
    return identity


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in values.items() if key != "stages"}
    return flat | {f"{name}.{key}": v for name, stage in values["stages"].items() for key, v in stage.items()}


def announce(training: Training, cluster: Cluster, workers: int, console: Console) -> None:
    """Print the complete resolved run."""
    record = training.run.model_dump(mode="json")
    console.print(yaml.safe_dump(record, sort_keys=False).rstrip(), highlight=False, markup=False)
    config = training.tokenizer
    console.print(
        f"{config.name}: {count_parameters(config) / 1e6:.3g} million weights; {workers} workers on {cluster}; run "
        f"{training.run_id}",
        highlight=False,
    )


# The videos.


def prepare_data(
    training: Training, name: str, stage: StageConfig, cluster: Cluster, console: Console
) -> tuple[Corpora, Draws, pa.Table]:
    """Open the videos, set some aside and decode a clip of each of these, and fill the cache if there is to be one.

    Raises:
        UnusableError: nothing usable, or too few videos for a batch.
    """
    run = training.run
    spec = stage.clip_spec(clips_per_video=run.clips_per_video)
    console.print(f"{name}: opening videos", highlight=False)
    try:
        corpora = open_corpora(
            [path for path, _ in run.corpora],
            spec=spec,
            held_out=run.held_out,
            seed=stage.seed,
            num_tasks=4 * cluster.num_cpus,
        )
        items, limits = corpora.train, Limits()
        if items.num_rows < stage.clips_per_step:
            raise UnusableError(
                f"{name}: {items.num_rows} clips in an epoch of {corpora.num_videos} videos "
                f"({corpora.held_out.num_rows} held out), fewer than a batch of {stage.clips_per_step}: give more "
                "videos, raise --clips-per-video, or lower --clips-per-step"
            )
        if run.cache is not None:
            folder = storage.join(run.cache, f"{spec.num_frames}x{spec.bucket}-{spec.digest()}")
            with RunDisplay(console, "caching clips", items.num_rows) as display:
                items, broken = fill_cache(
                    folder,
                    items,
                    spec,
                    limits,
                    stage.seed,
                    lambda n: display.update(n, f"{n} of {items.num_rows} clips"),
                )
            corpora.rejections.extend(broken)
        shown = corpora.held_out.slice(0, run.eval_clips)
        middle = stage.clip_spec(clips_per_video=1, placement="even")
        held_out, broken = decode_held_out(shown, middle, limits)
        corpora.rejections.extend(broken)
    except _FAILED_TO_DECODE as error:
        raise UnusableError(f"{name}: {_cause(error)}") from error
    weights = [weight for _, weight in run.corpora]
    given = [weight for weight in weights if weight is not None]
    draws = Draws(items=items, weights=tuple(given) if given else None, seed=stage.seed)
    console.print(
        f"{corpora.num_videos} videos: {draws.epoch_length} clips an epoch of {spec.num_frames}x{spec.bucket} at "
        f"{spec.fps} per second, {held_out.num_rows} held-out clips, {len(corpora.rejections)} rejections",
        highlight=False,
    )
    return corpora, draws, held_out


def _write_held_out(job: StageJob, clips: pa.Table) -> None:
    buffer = pa.BufferOutputStream()
    pq.write_table(clips, buffer, compression="lz4", row_group_size=8)
    storage.write_atomic(storage.join(job.folder, HELD_OUT), buffer.getvalue().to_pybytes())


def _write_rejects(job: StageJob, rejections: list[Rejection]) -> None:
    """What was rejected when opened, and what broke when it was to be trained on."""
    path = storage.join(job.run.out, REJECTS)
    known = json.loads(storage.read_bytes(path)) if storage.exists(path) else []
    entries = {(entry["uri"], entry["reason"]): entry for entry in known}
    for r in rejections:
        entry = {"uri": storage.public_uri(r.uri), "video_id": r.video_id, "reason": str(r.reason), "detail": r.detail}
        entries.setdefault((entry["uri"] or "", entry["reason"] or ""), entry)
    for seen in job.board.read()["rejected"]:
        entries.setdefault((seen["uri"], seen["reason"]), seen)
    storage.write_atomic(path, json.dumps(list(entries.values()), indent=1).encode())


# The training.


def _start_of(training: Training, name: str) -> dict[str, Any]:
    """What a stage starts with: the one before it, or what the run was given."""
    names = list(training.run.stages)
    at = names.index(name)
    if at == 0:
        return {"previous": training.previous, "weights": training.weights}
    return {"previous": (storage.join(training.run.out, names[at - 1]), training.run_id), "weights": None}


def _finished(training: Training, name: str) -> StageResult | None:
    """The result of a stage that is done: it has its tokenizer, and a checkpoint of its last step."""
    folder = storage.join(training.run.out, name)
    mark = Checkpoints(folder, training.run_id).latest()
    steps = training.run.stages[name].steps
    if mark is None or mark.step < steps or not storage.exists(storage.join(folder, EXPORT)):
        return None
    path = storage.join(folder, STAGE_RESULT)
    known = json.loads(storage.read_bytes(path)) if storage.exists(path) else {}
    if known.get("is_finished"):
        return StageResult(**known)
    return StageResult(name=name, steps=mark.step, measured=mark.metrics, is_finished=True)


def train_stage(
    job: StageJob,
    draws: Draws,
    workers: int,
    cluster: Cluster,
    lease: Lease,
    result: Result,
    console: Console,
) -> StageResult:
    """Have the workers train a stage, and show how far they are."""
    trainer = trainer_of(job, draws, workers, cluster)
    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001  looked at where the thread is waited for
            failure.append(error)

    mark = job.checkpoints.latest()
    start = mark.step if mark else 0
    outcome = StageResult(name=job.name, steps=start)
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    began = time.monotonic()
    with Interrupts() as interrupts, RunDisplay(console, job.name, job.stage.steps - start) as display:
        thread.start()
        asked = False
        while thread.is_alive():
            thread.join(0.5)
            note = job.board.read()
            if note["latest"]:
                display.update(note["latest"]["step"] - start, _figures(note, job.stage))
            if note["held_out"].get("step") == 0:
                outcome.before = note["held_out"]
            if interrupts.first is not None and not asked:
                job.board.stop()
                asked = True
                console.print("interrupted: keeping a checkpoint; once more to end at once", highlight=False)
            try:
                lease.check(now=False)
            except LeaseLostError as error:
                job.board.stop()
                result.problem = str(error)
        result.interruption = interrupts.first
    note = job.board.read()
    ended = note["outcome"]
    outcome.seconds = time.monotonic() - began
    outcome.restarts = max(0, note["starts"] - 1)
    outcome.is_finished = bool(ended.get("finished"))
    outcome.steps = ended.get("step", note["latest"].get("step", start))
    outcome.measured = ended.get("measured") or note["held_out"]
    outcome.metrics = ended.get("metrics") or note["latest"]
    outcome.digests = {name: ended[name] for name in ("weights_sha256", "frozen_sha256") if name in ended}
    if not outcome.before:
        outcome.before = _measured_at_first(job)
    if "failed" in ended:
        result.problem = f"{job.name} stopped: {ended['failed']}"
    elif failure and result.interruption is None:
        result.problem = f"{job.name} stopped after {outcome.restarts} restarts: {_cause(failure[0])}"
    return outcome


def _measured_at_first(job: StageJob) -> dict[str, float]:
    """What was measured before the first step, by a run before this one."""
    path = storage.join(job.folder, "metrics.jsonl")
    if not storage.exists(path):
        return {}
    lines = [json.loads(line) for line in storage.read_bytes(path).decode().splitlines()]
    return next((line for line in lines if line["group"] == "held_out" and line["step"] == 0), {})


def trainer_of(job: StageJob, draws: Draws, workers: int, cluster: Cluster) -> Any:
    """Ray Train's trainer: where workers run, what they are fed, and what happens when one dies."""
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")  # is asked for when it is imported
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")  # a minute is short where many import torch
    if cluster.is_own:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody preempts it: a process less
    from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    stage, on_gpu = job.stage, cluster.num_gpus > 0
    reader = ClipReader(spec=stage.clip_spec(clips_per_video=job.run.clips_per_video), limits=Limits())
    known = ray.put(draws)
    block = rows_per_block(stage.clips_per_step // workers, reader.spec)
    checkpoints, total = job.checkpoints, stage.steps * stage.clips_per_step

    def clips() -> Dataset:
        """Called whenever workers start: what comes after the checkpoint that they will go on from."""
        mark = checkpoints.latest()
        start = mark.step * stage.clips_per_step if mark else 0
        return training_clips(known, reader, min(start, total - 1), total, rows_per_block=block)

    resources = {"CPU": 1.0, "GPU": 1.0} if on_gpu else {"CPU": cpus_per_worker(job.threads, workers, cluster)}
    folder = storage.join(job.folder, "ray")
    where: dict[str, Any] = {"storage_path": folder}
    if not storage.is_local(folder):
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        fs, inner = storage.filesystem(folder)
        where = {"storage_path": inner, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}
    return TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=on_gpu, resources_per_worker=resources),
        run_config=RunConfig(
            name=f"start-{uuid.uuid4().hex[:8]}",
            failure_config=FailureConfig(max_failures=job.run.max_failures),
            worker_runtime_env={"env_vars": {} if on_gpu else ENCODER_ENVIRONMENT},
            **where,
        ),
        datasets={"train": clips},
        dataset_config=DataConfig(execution_options=ExecutionOptions(preserve_order=True), enable_shard_locality=False),
    )


def cpus_per_worker(threads: int, workers: int, cluster: Cluster) -> float:
    """CPUs kept from decoding for each worker; one is left however many workers there are."""
    cpus = min(max(1, threads - 1), (cluster.num_cpus - 1) / workers)
    return cpus if cpus < 1 else float(int(cpus))


def _figures(note: dict[str, Any], stage: StageConfig) -> str:
    latest, held_out = note["latest"], note["held_out"]
    parts = [f"step {latest['step']} of {stage.steps}"]
    for name in ("l1", "perceptual", "gan", "hinge"):
        if name in latest:
            parts.append(f"{name} {latest[name]:.3g}")
    if "psnr" in held_out:
        parts.append(f"PSNR {held_out['psnr']:.2f} dB")
    parts.append(f"{latest['clips_per_second']:.3g} clips/s, waiting {latest['waiting']:.0%}")
    if note["starts"] > 1:
        parts.append(f"{note['starts'] - 1} restarts")
    return " · ".join(parts)


def _cause(error: BaseException) -> str:
    """The innermost exception of a failure, in a line."""
    cause = error
    while (inner := _inner(cause)) is not None:
        cause = inner
    text = " ".join(str(cause).split()) or type(cause).__name__
    return f"{type(cause).__name__}: {text[-600:]}"


def _inner(error: BaseException) -> BaseException | None:
    failures = getattr(error, "worker_failures", None)
    if failures:
        return next(iter(failures.values()))  # type: ignore[no-any-return]
    return error.__cause__


# What came of it.


def _print_stage(stage: StageResult, console: Console) -> None:
    def change(name: str, digits: int) -> str:
        now = stage.measured.get(name)
        if now is None:
            return ""
        before = stage.before.get(name)
        return f" · {name} {f'{before:.{digits}f} → ' if before is not None else ''}{now:.{digits}f}"

    changes = change("psnr", 2) + change("ssim", 3) + change("lpips", 3) + change("codebook_utilisation", 3)
    restarts = f", {stage.restarts} restarts" if stage.restarts else ""
    console.print(f"{stage.name}: {stage.steps} steps in {stage.seconds:.0f} s{restarts}{changes}", highlight=False)


def write_summary(training: Training, result: Result, corpora: Corpora) -> None:
    """Write ``summary.md``."""
    run = training.run
    lines = [
        f"# Training run {training.run_id}",
        "",
        f"`{training.tokenizer.name}`, {count_parameters(training.tokenizer):,} weights, by vidshard {code_version()}. "
        f"The complete settings stand in `{RUN}`.",
        "",
        f"Videos: {corpora.num_videos} usable ({', '.join(storage.public_uri(text) for text in run.videos)}), "
        f"{len({row['video_id'] for row in corpora.held_out.select(['video_id']).to_pylist()})} of them held out; "
        f"rejections stand in `{REJECTS}`.",
        "",
        "| stage | trains | clips | steps | PSNR dB | SSIM | LPIPS | codebook used | clips/s | waiting | MFU "
        "| restarts |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in result.stages:
        config = run.stages[stage.name]
        cells = [
            stage.name,
            config.trainable,
            f"{config.frames}x{config.size[0]}x{config.size[1]} at {config.fps} fps, {config.clips_per_step} a step",
            f"{stage.steps} of {config.steps}",
            *(_before_and_after(stage, name, form) for name, form in _COLUMNS),
            *(f"{stage.metrics[name]:{form}}" if name in stage.metrics else "" for name, form in _SPEEDS),
            str(stage.restarts),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Held-out figures are of averaged weights, before the first step and after the last.", ""]
    for stage in result.stages:
        lines += [f"* {stage.name}: {name} `{digest}`" for name, digest in stage.digests.items()]
    if result.problem:
        lines += ["", f"**Not finished:** {result.problem}"]
    finished = [stage.name for stage in result.stages if stage.is_finished]
    if finished:
        path = storage.join(storage.public_uri(run.out), finished[-1], EXPORT)
        lines += ["", "Use it:", "", f"    vidshard tokenize VIDEOS --out tokens/ --weights {path}"]
    storage.write_atomic(storage.join(run.out, SUMMARY), ("\n".join(lines) + "\n").encode())


_COLUMNS = (("psnr", ".2f"), ("ssim", ".3f"), ("lpips", ".3f"), ("codebook_utilisation", ".1%"))
_SPEEDS = (("clips_per_second", ".3g"), ("waiting", ".0%"), ("mfu", ".1%"))


def _before_and_after(stage: StageResult, name: str, form: str) -> str:
    now, before = stage.measured.get(name), stage.before.get(name)
    if now is None:
        return ""
    return f"{now:{form}}" if before is None else f"{before:{form}} → {now:{form}}"
