"""The main job: videos in, token shards out.

Read :func:`main` for the whole of it. Everything that can be wrong with the request is found out before Ray
starts; from then on a bad video is a rejection and only bugs and lost storage end the run.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
import yaml
from ray.data.exceptions import UserCodeException
from ray.exceptions import RayError, RayTaskError
from rich.console import Console
from rich.text import Text

from jobs.cluster import Cluster, ray_cluster
from jobs.convert_weights import stated_tokenizer
from jobs.display import RunDisplay
from jobs.outcome import EXIT_FAILED, EXIT_REFUSED, UserError, exit_code_of, print_error
from models.lengths import Padding
from models.tiling import Tiling
from models.tokenizer import TokenizerConfig, get_preset
from models.weights import weights_digest
from pipeline import storage
from pipeline.discover import Discovery, InputError, discover
from pipeline.encode import EncoderSpec, clip_specs_of, open_tokenizer
from pipeline.flow import Placement, build_flow
from pipeline.plan import Plan, clips_per_span, make_plan
from pipeline.rows import INTERNAL_COLUMNS, manifest_fields, signal_source
from pipeline.shards import (
    PLAN,
    RUN,
    TODO,
    TokenShardSink,
    Written,
    finished_spans,
    read_rejects,
    write_plan,
    write_rejects,
)
from pipeline.signals import signal_fields
from pipeline.stages import SpanDecoder
from schemas.runs import TokenizeRun
from schemas.tokens import Payload, Provenance
from schemas.video import REMEDIES, ClipSpec, Reason

RANDOM_WEIGHTS_NOTICE = (
    "RANDOM WEIGHTS: this tokenizer was never trained (seed {seed}). Its tokens mean nothing and its "
    "reconstructions look like noise; they only show that the machinery works."
)


@dataclass(kw_only=True)
class Summary:
    """What a run did; printed at its end and saved as ``summary.json``."""

    out: str
    num_videos: int
    """Videos that the inputs name."""
    num_rejected_videos: int
    """Of these, rejected in whole or in part; copies of other videos are not counted."""
    planned_spans: int
    expected_clips: int
    """Of all planned spans, if the headers tell the truth."""
    reused_spans: int
    """Finished by an earlier run."""
    written: Written
    reasons: Counter[str]
    """Rejections of this run, of spans and of whole videos, by reason."""
    seconds: dict[str, float]
    """Wall time by phase, and the summed time of all workers by stage."""
    batch_fill: float
    """Share of the forward passes' room that held clips; the rest was filled up."""
    example_clip_id: str | None
    notice: str | None
    problems: list[str] = field(default_factory=list)
    """Why the run failed; empty when it did not."""
    interruption: KeyboardInterrupt | None = None
    """Ctrl-C or SIGTERM, when that ended the run."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run with everything looked up: what the settings mean for the model they name."""

    run: TokenizeRun
    tokenizer: TokenizerConfig
    payload: Payload
    weights_sha256: str
    notice: str | None

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide what a token means; an output holds one set of them."""
        run = self.run.model_dump(mode="json")
        kept = ["precision", "fps", "frames", "tail", "resize", "keep_logvar"]
        kept.append("size" if self.run.buckets is None else "buckets")
        # these only where they decide something: without them the tokens are those of an output that lacks the setting
        if self.padding is not None:
            kept.append("pad_frames")
        if self.tiling is not None:
            kept += ["tile_size", "tile_overlap"]
        if self.run.continuous:
            kept.append("continuous")
        others = ("start", "end", "stride_seconds", "clips_per_video", "signals")
        kept += [name for name in others if run[name] is not None]
        if self.run.clips_per_video is not None:
            kept += ["clip_placement", "clip_seed"]
        if self.run.min_seconds:
            kept.append("min_seconds")
        if self.run.image_fps != TokenizeRun.model_fields["image_fps"].default:
            kept.append("image_fps")
        if self.run.damaged != "reject":
            kept.append("damaged")
        tokenizer = self.tokenizer.model_dump(mode="json")
        for name in ("architecture", "vq_codebook_size"):
            if tokenizer[name] == TokenizerConfig.model_fields[name].default:
                del tokenizer[name]
        return {
            "tokenizer": tokenizer,
            "weights_sha256": self.weights_sha256,
            # units of work are what a resumed run compares: others would lose clips, or write them twice
            "clips_per_span": clips_per_span(self.largest, self.run.clips_per_span),
            **{name: run[name] for name in kept},
        }

    @property
    def clip_specs(self) -> list[ClipSpec]:
        """How videos become clips of this tokenizer, one for each frame size."""
        return clip_specs_of(self.run, self.tokenizer)

    @property
    def largest(self) -> ClipSpec:
        """That of the clips which take most memory."""
        return max(self.clip_specs, key=lambda spec: spec.clip_bytes)

    def payload_of(self, spec: ClipSpec) -> Payload:
        """What a clip of one frame size becomes."""
        num_frames = encoded_frames(self.run, self.tokenizer)
        return replace(self.payload, shape=self.tokenizer.latent_shape(num_frames, spec.height, spec.width))

    @property
    def padding(self) -> Padding | None:
        """How clips become as long as the tokenizer takes; None where they are."""
        is_valid = self.tokenizer.valid_frames(self.run.frames) == self.run.frames
        return None if is_valid or self.run.continuous else Padding(self.run.pad_frames)

    @property
    def tiling(self) -> Tiling | None:
        """The tiles in which frames are encoded; None where a frame is no larger than one."""
        tiling = tiling_of(self.run, self.tokenizer)
        return None if tiling is None or all(tiling.fits(*size) for size in self.run.sizes) else tiling

    @property
    def provenance(self) -> Provenance:
        """What every shard says of itself."""
        weights = self.run.weights
        return Provenance(
            tokenizer=self.tokenizer.model_dump(mode="json"),
            weights_sha256=self.weights_sha256,
            weights_source=storage.public_uri(weights) if weights else f"seed:{self.run.random_weights}",
            payload=self.payload,
            run=public_record(self.run),
            identity=self.identity,
            code_version=code_version(),
            libraries={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "ray": ray.__version__,
                "pyarrow": pa.__version__,
                "av": av.__version__,
                "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
                "libswscale": ".".join(map(str, av.library_versions["libswscale"])),
            },
            notice=self.notice,
        )


def main(request: Request, console: Console) -> Summary:
    """Tokenize videos.

    Raises:
        UserError, InputError, StorageError: the request cannot be carried out; nothing was started.
        KeyboardInterrupt: interrupted; what was finished until then is committed.
    """
    started = time.monotonic()
    run = request.run
    check_output(request)
    found = discover(run.inputs, signals=[name for name, _ in run.signals or []], limit=run.limit)
    announce(request, found, console)
    with ray_cluster(address=run.ray_address, object_store_bytes=run.object_store, verbose=run.verbose) as cluster:
        console.print(f"running on {cluster}", highlight=False)
        ready = time.monotonic()
        plan = probe_videos(request, found, cluster, console)
        probed = time.monotonic()
        todo, reused = unfinished(run.out, plan)
        save_start(request, plan, todo)
        summary = Summary(
            out=run.out,
            num_videos=plan.num_videos,
            num_rejected_videos=0,
            planned_spans=plan.spans.num_rows,
            expected_clips=plan.expected_clips,
            reused_spans=reused,
            written=Written(),
            reasons=Counter(str(r.reason) for r in plan.rejections),
            seconds={"start": ready - started, "probe": probed - ready},
            batch_fill=1.0,
            example_clip_id=None,
            notice=request.notice,
        )
        listed = {storage.public_uri(uri) for uri in found.videos["uri"].to_pylist()}
        rejects = read_rejects(run.out).to_pylist()
        rejected = {r["uri"] for r in rejects if r["reason"] != Reason.DUPLICATE} & listed
        check_reject_share(summary, rejected, run)
        if todo.num_rows and not summary.problems:
            tokenize_spans(request, todo, cluster, summary, rejected, console)
    summary.seconds["total"] = time.monotonic() - started
    try:
        save_summary(summary)
    except storage.StorageError as error:
        summary.problems.append(str(error))
    return summary


def run_and_report(run: TokenizeRun, console: Console) -> int:
    """Tokenize, print the summary, and give the exit code."""
    try:
        request = resolve(run)
        summary = main(request, console)
    except (UserError, InputError, storage.StorageError) as error:
        print_error(error)
        return EXIT_REFUSED
    except KeyboardInterrupt as interrupt:
        console.print("interrupted before any clip was tokenized; run the same command again", highlight=False)
        return exit_code_of(interrupt)
    print_summary(summary, request.payload, console)
    if summary.interruption is not None:
        again = "what is committed is valid; run the same command again to go on"
        console.print(Text(f"interrupted: {again}", style="bold"))
        return exit_code_of(summary.interruption)
    return EXIT_FAILED if summary.problems else 0


def resolve(run: TokenizeRun) -> Request:
    """Look up what the settings name, and refuse what cannot be.

    Raises:
        UserError: unknown tokenizer, impossible clip length or size, missing or foreign weights.
    """
    try:
        tokenizer = _tokenizer_of(run)
        shape, *_ = [tokenizer.latent_shape(encoded_frames(run, tokenizer), *size) for size in run.sizes]
        tiling_of(run, tokenizer)
        clip_specs_of(run, tokenizer)
    except ValueError as error:
        raise UserError(str(error)) from error
    if run.keep_logvar and tokenizer.head != "kl":
        raise UserError(f"--keep-logvar is for KL tokenizers; {tokenizer.name} gives tokens")
    columns = [field.name for name, rule in run.signals or [] for field in signal_fields(name, rule)]
    taken = [name for name in columns if name in INTERNAL_COLUMNS or columns.count(name) > 1]
    if taken:
        raise UserError(f"--signals: the shards have another column '{taken[0]}': rename the manifest's")
    notice = None
    if run.weights is None and run.random_weights is None:
        if not tokenizer.name.startswith("tiny"):
            raise UserError(
                f"no weights for {tokenizer.name}: give --weights FILE (.safetensors or .ckpt), or --random-weights 0 "
                "to try the machinery with random ones"
            )
        run = run.model_copy(update={"random_weights": 0})
    if run.weights is None:
        notice = RANDOM_WEIGHTS_NOTICE.format(seed=run.random_weights)
    else:
        try:
            run = run.model_copy(update={"weights": storage.pinned(storage.absolute(run.weights))})
        except storage.StorageError as error:
            raise UserError(str(error)) from error
    run = run.model_copy(update={"out": storage.absolute(run.out), "inputs": [storage.absolute(i) for i in run.inputs]})
    payload = Payload(
        kind="tokens" if tokenizer.has_tokens else "latents",
        shape=shape,
        codebook_size=tokenizer.codebook_size,
        keep_logvar=run.keep_logvar,
    )
    request = Request(run=run, tokenizer=tokenizer, payload=payload, weights_sha256="", notice=notice)
    try:
        model = open_tokenizer(encoder_spec(request, batch_size=1, num_threads=1), "cpu")
    except (ValueError, FileNotFoundError, storage.StorageError) as error:
        raise UserError(str(error)) from error
    return replace(request, weights_sha256=weights_digest(model.float().state_dict()))


def encoded_frames(run: TokenizeRun, tokenizer: TokenizerConfig) -> int:
    """Frames of a clip as the tokenizer gets it.

    Raises:
        UserError: it takes no clips so long, and they are not to be padded.
    """
    if run.pad_frames != "refuse":
        return tokenizer.valid_frames(run.frames)
    try:
        tokenizer.latent_frames(run.frames)
    except ValueError as error:
        raise UserError(f"{error}. Or fill up every clip: --pad-frames repeat-last") from error
    return run.frames


def tiling_of(run: TokenizeRun, tokenizer: TokenizerConfig) -> Tiling | None:
    """The tiles that a run asks for.

    Raises:
        ValueError: the tokenizer cannot have such tiles.
    """
    if run.tile_size is None:
        return None
    height, width = run.tile_size
    tiling = Tiling(height=height, width=width, overlap=run.tile_overlap)
    tiling.check(tokenizer)
    return tiling


def _tokenizer_of(run: TokenizeRun) -> TokenizerConfig:
    if run.tokenizer is not None:
        return get_preset(run.tokenizer)
    if run.weights is None:
        raise UserError("--tokenizer is missing: name a model (see `vidshard tokenizers`), or give --weights that do")
    return stated_tokenizer(run.weights, ema=run.ema)


def encoder_spec(request: Request, *, batch_size: int, num_threads: int) -> EncoderSpec:
    """What the encoders get to know of a request."""
    run = request.run
    return EncoderSpec(
        tokenizer=request.tokenizer,
        weights=run.weights,
        ema=run.ema,
        random_seed=run.random_weights,
        weights_sha256=request.weights_sha256,
        precision=run.precision,
        num_frames=request.largest.num_frames,
        continuous=request.largest if run.continuous else None,
        payload=request.payload,
        batch_size=batch_size,
        num_threads=num_threads,
        padding=request.padding,
        tiling=request.tiling,
    )


def check_output(request: Request) -> None:
    """Refuse a folder that holds the result of other settings.

    Raises:
        UserError: it does; the message lists the differences.
        StorageError: it cannot be reached.
    """
    storage.check_writable(request.run.out)
    path = storage.join(request.run.out, RUN)
    if not storage.exists(path):
        return
    try:
        before = json.loads(storage.read_bytes(path))["identity"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a vidshard run record ({error!r}): choose another --out") from error
    if before != request.identity:
        raise UserError(
            f"{request.run.out} holds the result of other settings:\n{_differences(before, request.identity)}\n"
            "choose another --out, or the settings of that run"
        )


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    def flat(values: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in values.items() if k != "tokenizer"} | {
            f"tokenizer.{k}": v for k, v in values.get("tokenizer", {}).items()
        }

    old, new = flat(before), flat(now)
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    return "\n".join(f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in changed)


def announce(request: Request, found: Discovery, console: Console) -> None:
    """Print the complete resolved run."""
    record = public_record(request.run)
    console.print(yaml.safe_dump(record, sort_keys=False).rstrip(), highlight=False, markup=False)
    config, payload = request.tokenizer, request.payload
    what = f"tokens below {payload.codebook_size}" if payload.kind == "tokens" else "float16 latents"
    for spec in request.clip_specs:
        shape = list(request.payload_of(spec).shape)
        text = f"{config.name}: {request.run.frames}x{spec.bucket} frames become {shape} {what}"
        console.print(text, highlight=False)
    console.print(f"weights SHA-256 {request.weights_sha256[:16]}", highlight=False)
    if request.padding is not None:
        num_frames = config.valid_frames(request.run.frames)
        console.print(f"each clip is encoded as {num_frames} frames: {request.padding}", highlight=False)
    if request.notice:
        warn(console, request.notice)
    for old, new in found.renamed_columns.items():
        console.print(f"manifest column '{old}' has the name of a shard column and is stored as '{new}'", markup=False)
    if found.num_passed_over:
        kinds = ", ".join(f"{count} {extension}" for extension, count in found.passed_over_extensions[:5])
        console.print(f"passed over {found.num_passed_over} files without a video's extension: {kinds}", markup=False)
    rows, videos = found.videos.num_rows, pc.count_distinct(found.videos["uri"]).as_py()
    console.print(f"{videos} videos" + (f", {rows} parts of them" if rows != videos else ""), highlight=False)


def public_record(run: TokenizeRun) -> dict[str, Any]:
    """The run's settings as they may be shown and stored: no credentials in any URL."""
    record = run.model_dump(mode="json")
    record["inputs"] = [storage.public_uri(uri) for uri in run.inputs]
    return record | {name: storage.public_uri(record[name]) for name in ("out", "weights") if record[name]}


def warn(console: Console, text: str) -> None:
    """Print a warning that stands out with or without colours."""
    console.print(Text(f"!! {text}", style="bold yellow"))


def probe_videos(request: Request, found: Discovery, cluster: Cluster, console: Console) -> Plan:
    """Open every video and plan its spans."""
    total = found.videos.num_rows
    opened = 0
    with RunDisplay(console, "opening videos", total) as display:

        def on_progress(more: int) -> None:
            nonlocal opened
            opened += more
            display.update(opened, f"{opened} of {total} videos")

        return make_plan(
            found.videos,
            request.clip_specs,
            part=request.run.part,
            span_clips=clips_per_span(request.largest, request.run.clips_per_span),
            num_tasks=4 * cluster.num_cpus,
            limits=request.run.limits,
            on_progress=on_progress,
        )


def unfinished(out: str, plan: Plan) -> tuple[pa.Table, int]:
    """Rows of the plan that no shard and no rejection of an earlier run accounts for, and how many do."""
    done = finished_spans(out)
    rejects = read_rejects(out)
    done |= {s for s in rejects["span_id"].to_pylist() if s is not None}
    todo = plan.spans.filter(pc.invert(pc.is_in(plan.spans["span_id"], pa.array(sorted(done), pa.string()))))
    return todo, plan.spans.num_rows - todo.num_rows


def save_start(request: Request, plan: Plan, todo: pa.Table) -> None:
    """Write the run record, the plan and the rejections of whole videos."""
    out = request.run.out
    provenance = request.provenance
    record = {**asdict(provenance), "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    storage.write_atomic(storage.join(out, RUN), json.dumps(record, indent=2, default=str).encode())
    uris = uri_columns(request.run)
    write_plan(storage.join(out, PLAN), plan.spans, uris)
    if todo.num_rows < plan.spans.num_rows:
        write_plan(storage.join(out, TODO), todo, uris)
    rejects = read_rejects(out)
    known = set(zip(rejects["uri"].to_pylist(), rejects["reason"].to_pylist(), strict=True))
    new = [r for r in plan.rejections if (r.uri, str(r.reason)) not in known]
    if new:
        write_rejects(out, new)


def uri_columns(run: TokenizeRun) -> list[str]:
    """Columns of the plan that hold paths or URLs, perhaps with credentials."""
    return ["uri", *(signal_source(name) for name, _ in run.signals or [])]


def tokenize_spans(
    request: Request, todo: pa.Table, cluster: Cluster, summary: Summary, rejected: set[str], console: Console
) -> None:
    """Run the flow into the sink, and hold what came out against the plan."""
    run = request.run
    placement, encoder = place(request, todo.num_rows, summary.expected_clips / summary.planned_spans, cluster)
    span_clips = clips_per_span(request.largest, run.clips_per_span)
    decoder = SpanDecoder(
        spec=request.largest,
        max_clips=4 * span_clips + 16,
        clips_per_pass=span_clips,
        limits=run.limits,
        keep_undamaged=run.damaged == "keep",
        signals=tuple(run.signals or ()),
    )
    stored = storage.join(run.out, PLAN if todo.num_rows == summary.planned_spans else TODO)
    uris = uri_columns(run)
    secret = any(
        uri is not None and uri != storage.public_uri(uri) for name in uris for uri in todo[name].unique().to_pylist()
    )
    flow = build_flow(todo if secret else stored, decoder=decoder, encoder=encoder, placement=placement)
    sink = TokenShardSink(
        run.out,
        buckets=[(spec, request.payload_of(spec)) for spec in request.clip_specs],
        provenance=request.provenance,
        manifest_fields=[field for field in manifest_fields(todo.schema) if field.name not in uris],
        signal_fields=[field for name, rule in run.signals or [] for field in signal_fields(name, rule)],
        shard_bytes=run.shard_size,
        commit_seconds=60 * run.commit_minutes,
    )
    account = _Account(awaited=set(todo["span_id"].to_pylist()))
    started = time.monotonic()
    try:
        with RunDisplay(console, "tokenizing", todo.num_rows) as display:
            for rows in flow.iter_batches(batch_format="pyarrow", batch_size=None):
                rejections = account.take(rows)
                sink.add(rows)
                summary.reasons.update(r["reason"] for r in rejections)
                rejected |= {r["uri"] for r in rejections}
                speed = account.clips / display.seconds
                display.update(
                    todo.num_rows - len(account.awaited),
                    f"{account.videos} videos · {account.clips} clips · {speed:.2f} clips/s · "
                    f"{summary.reasons.total()} rejects",
                )
                check_reject_share(summary, rejected, run)
                if summary.problems:
                    break
    except KeyboardInterrupt as interrupt:
        summary.interruption = interrupt
    except (RayError, UserCodeException) as error:
        summary.problems.append(_what_broke(error))
    except storage.StorageError as error:
        summary.problems.append(f"{error}; what is committed before it is valid")
    finally:
        try:
            sink.close()
        except storage.StorageError as error:
            summary.problems.append(f"{error}; the clips of that shard are not saved: run the same command again")
        summary.written = sink.committed
        summary.seconds |= {
            "tokenize": time.monotonic() - started,
            "decoding, all workers": account.seconds["decode_seconds"],
            "encoding, all workers": account.seconds["encode_seconds"],
            "encoders waiting for frames": account.seconds["encode_wait_seconds"],
            "writing shards": summary.written.seconds,
        }
        summary.batch_fill = account.clips / account.slots if account.slots else 1.0
        summary.example_clip_id = sink.last_clip_id
    if account.awaited and not summary.problems and summary.interruption is None:
        summary.problems.append(
            f"{len(account.awaited)} of {todo.num_rows} planned spans came out neither as tokens nor as rejections "
            f"(the first: {min(account.awaited)}); run the same command again, and report this with the log of -v"
        )


@dataclass(kw_only=True)
class _Account:
    """What has come out of the flow, held against what was planned."""

    awaited: set[str]
    """Spans of the plan that have not come out yet."""
    clips: int = 0
    videos: int = 0
    """Videos whose last span came out."""
    slots: int = 0
    seconds: Counter[str] = field(default_factory=Counter)

    def take(self, rows: pa.Table) -> list[dict[str, Any]]:
        """Count rows of the encoder; gives the rejections among them."""
        spans = set(rows["span_id"].to_pylist())
        assert spans <= self.awaited, "a row came out twice, or was never planned"
        self.awaited -= spans
        self.clips += pc.sum(pc.list_value_length(rows["clips"])).as_py()
        self.videos += rows["end_clip"].null_count
        self.slots += pc.sum(rows["encode_slots"]).as_py()
        for name in ("decode_seconds", "encode_seconds", "encode_wait_seconds"):
            self.seconds[name] += pc.sum(rows[name]).as_py()
        return [r for r in rows["rejection"].to_pylist() if r is not None]


def _what_broke(error: BaseException) -> str:
    """The cause of a Ray failure in a line: the innermost exception, not the layers around it."""
    cause = error.cause if isinstance(error, RayTaskError) else error  # without the worker's traceback
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split("\nFailed to apply UDF")[0].split()) or type(cause).__name__  # Ray Data's advice
    return (
        f"the run stopped: {type(cause).__name__}: {text[-600:]}; what is committed is valid. Run the same command "
        "again, with -v or --verbose for Ray's log"
    )


def check_reject_share(summary: Summary, rejected: set[str], run: TokenizeRun) -> None:
    """Note a problem when more of the videos were rejected than the user allows."""
    summary.num_rejected_videos = len(rejected)
    share = len(rejected) / summary.num_videos
    if share > run.max_reject_share:
        summary.problems = [
            f"{len(rejected)} of {summary.num_videos} videos ({share:.0%}) were rejected, more than "
            f"--max-reject-share {run.max_reject_share:g} allows; see rejects/ in {run.out}"
        ]


def place(request: Request, num_spans: int, clips_per_row: float, cluster: Cluster) -> tuple[Placement, EncoderSpec]:
    """How many encoders with how many threads, and what they are fed at once.

    Args:
        clips_per_row: in the plan, on average.
    """
    run = request.run
    on_gpu = cluster.num_gpus > 0
    if on_gpu:
        workers = run.encode_workers or max(1, int(cluster.num_gpus / run.gpus_per_worker))
        threads = run.encode_threads or 1
    else:
        workers = run.encode_workers or max(1, cluster.num_cpus // 4)
        threads = run.encode_threads or max(1, cluster.num_cpus // cluster.num_nodes // workers)
    batch_size = run.batch_size or (8 if on_gpu else 1)
    span_clips = clips_per_span(request.largest, run.clips_per_span)
    span_bytes = (span_clips + request.largest.halo_clips) * request.largest.clip_bytes
    # a call of four batches leaves at most one of them not full; 1 GiB if by chance all its spans are long ones
    rows_per_batch = max(1, min(math.ceil(4 * batch_size / max(1.0, clips_per_row)), (1 << 30) // span_bytes))
    if run.continuous:  # each span is a stream, and a batch takes as many of them
        rows_per_batch = max(1, min(batch_size, (1 << 30) // span_bytes))
    # on CPUs one is left for decoding however many encoders are asked for: a pool that takes all stops the run
    cpus = 0.0 if on_gpu else min(max(1, threads - 1), (cluster.num_cpus - 1) / workers)
    placement = Placement(
        encode_workers=workers,
        gpus_per_worker=run.gpus_per_worker if on_gpu else 0.0,
        cpus_per_worker=cpus if cpus < 1 else float(int(cpus)),
        decode_workers=run.decode_workers,
        # eight units of work at most, by their clips: rows of parts may hold a clip or two each
        rows_per_task=max(
            1, min(math.ceil(8 * span_clips / max(1.0, clips_per_row)), math.ceil(num_spans / (8 * cluster.num_cpus)))
        ),
        rows_per_batch=rows_per_batch if batch_size > 1 else 1,
    )
    return placement, encoder_spec(request, batch_size=batch_size, num_threads=threads)


def save_summary(summary: Summary) -> None:
    """Write ``summary.json`` beside the shards."""
    written = summary.written
    record = {
        **{f.name: getattr(summary, f.name) for f in fields(summary)},
        "written": {f.name: getattr(written, f.name) for f in fields(written)}
        | {"rejected_uris": sorted(written.rejected_uris)},
        "interruption": None if summary.interruption is None else type(summary.interruption).__name__,
    }
    storage.write_atomic(storage.join(summary.out, "summary.json"), json.dumps(record, indent=2).encode())


def print_summary(summary: Summary, payload: Payload, console: Console) -> None:
    """Print what a run did, and how to look at it."""
    written, seconds = summary.written, summary.seconds

    def line(name: str, text: str) -> None:
        console.print(f"  {name:<12}{text}", highlight=False, markup=False, soft_wrap=True)

    console.print()
    line("output", summary.out)
    line("videos", f"{summary.num_videos} found, {summary.num_rejected_videos} rejected in whole or in part")
    line("clips", f"{written.num_clips} written in {written.num_shards} shards")
    reused = f" + {summary.reused_spans} reused, finished by an earlier run" if summary.reused_spans else ""
    gaps = f" ({written.num_damaged_spans} of them with clips missing)" if written.num_damaged_spans else ""
    came_out = f"{written.num_spans} as tokens{gaps} + {written.num_rejected_spans} rejected{reused}"
    line("plan", f"{summary.planned_spans} spans of video = {came_out}")
    if written.num_values:
        line("values", f"{_on_disk(written, payload)}; {written.file_bytes:,} bytes in all shards")
    phases = [f"{name} {value:.1f} s" for name, value in seconds.items()]
    line("time", " · ".join(phases))
    if written.num_clips:
        rate = written.num_clips / seconds["tokenize"]
        line("speed", f"{rate:.2f} clips/s; batches {summary.batch_fill:.0%} full; {_bottleneck(seconds)}")
    for reason, count in summary.reasons.most_common():
        line("rejected", f"{count} x {reason}: {REMEDIES[Reason(reason)]}")
    if summary.reasons:
        line("", f"see {storage.join(summary.out, 'rejects')}/ or: vidshard inspect {shlex.quote(summary.out)}")
    if summary.example_clip_id:
        clip = f"--clip {summary.example_clip_id} --to clip.mp4"
        line("look at one", f"vidshard decode {shlex.quote(summary.out)} {clip}")
    if summary.notice:
        warn(console, summary.notice)
    if not written.num_clips and not summary.reused_spans:
        warn(console, "NOTHING WAS TOKENIZED")
    for problem in summary.problems:
        warn(console, problem)


def _on_disk(written: Written, payload: Payload) -> str:
    """Tokens in bits beside what their codebook needs, latents in bytes beside their raw size."""
    bits = 8 * written.payload_bytes / written.num_values
    if payload.codebook_size is not None:
        needed = math.log2(payload.codebook_size)
        return f"{written.num_values:,} tokens at {bits:.2f} bits each on disk (log2 of the codebook: {needed:g})"
    raw = written.num_values * payload.dtype.itemsize
    share = written.payload_bytes / raw
    return f"{written.num_values:,} latent values in {written.payload_bytes:,} bytes, {share:.0%} of their raw {raw:,}"


def _bottleneck(seconds: dict[str, float]) -> str:
    busy, wait = seconds["encoding, all workers"], seconds["encoders waiting for frames"]
    share = wait / (busy + wait) if busy + wait else 0.0
    advice = "decoding is the limit: add CPUs" if share > 0.2 else "encoding is the limit"
    return f"encoders waited {share:.0%} of their time for frames ({advice})"


def code_version() -> str:
    """Version of this code, with the commit where it runs from a checkout."""
    version = importlib.metadata.version("vidshard")
    commit = os.environ.get("VIDSHARD_COMMIT", "")
    root = Path(__file__).resolve().parents[1]
    if not commit and (root / ".git").exists():
        git = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        try:
            commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()  # noqa: S603
        except (OSError, subprocess.SubprocessError):
            commit = ""
    return f"{version}+{commit}" if commit else version
