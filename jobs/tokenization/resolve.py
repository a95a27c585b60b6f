"""What a tokenization run asks for, looked up and checked: everything that can be wrong is found out here, before
Ray starts; and the record of the run that its output keeps.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
import yaml
from rich.console import Console

from vidshard.jobs.convert_weights import stated_tokenizer
from vidshard.jobs.runtime.progress import warn
from vidshard.models.tokenizer import TokenizerConfig, get_preset
from vidshard.models.vidtok.lengths import Padding
from vidshard.models.vidtok.tiling import Tiling
from vidshard.models.weights import SHIPPED, weights_digest
from vidshard.pipeline import storage
from vidshard.pipeline.discover import Discovery
from vidshard.pipeline.encode import EncoderSpec, clip_specs_of, open_tokenizer
from vidshard.pipeline.output.layout import RUN, shard_paths
from vidshard.pipeline.output.shard_reader import open_shard
from vidshard.pipeline.plan import clips_per_span
from vidshard.pipeline.rows import INTERNAL_COLUMNS
from vidshard.pipeline.video.signals import signal_fields
from vidshard.schemas.errors import UserError
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.tokens import FORMAT_VERSION, Payload, Provenance
from vidshard.schemas.video import ClipSpec

RANDOM_WEIGHTS_NOTICE = (
    "RANDOM WEIGHTS: this tokenizer was never trained (seed {seed}). Its tokens mean nothing and its "
    "reconstructions look like noise; they only show that the machinery works."
)


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
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


def resolve(run: TokenizeRun) -> ResolvedRun:
    """Look up what the settings name, and refuse what cannot be.

    Raises:
        UserError: unknown tokenizer, impossible clip length or size, missing or foreign weights.
    """
    run = _with_shipped_weights(run)
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
                f"to try the machinery with random ones; {SHIPPED} comes with its own"
            )
        run = run.model_copy(update={"random_weights": 0})
    if run.out != storage.public_uri(run.out):
        raise UserError(f"--out {storage.public_uri(run.out)}: put the credentials into the environment, not the URL")
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
    request = ResolvedRun(run=run, tokenizer=tokenizer, payload=payload, weights_sha256="", notice=notice)
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


def _with_shipped_weights(run: TokenizeRun) -> TokenizeRun:
    """The run with the weights that come with the package, where it asks for their model or for none."""
    if run.tokenizer not in (None, SHIPPED) or run.weights is not None or run.random_weights is not None:
        return run
    return run.model_copy(update={"tokenizer": SHIPPED, "weights": f"{storage.SHIPPED_SCHEME}{SHIPPED}"})


def _tokenizer_of(run: TokenizeRun) -> TokenizerConfig:
    if run.tokenizer is not None:
        return get_preset(run.tokenizer)
    if run.weights is None:
        raise UserError("--tokenizer is missing: name a model (see `vidshard tokenizers`), or give --weights that do")
    return stated_tokenizer(run.weights, ema=run.ema)


def encoder_spec(request: ResolvedRun, *, batch_size: int, num_threads: int) -> EncoderSpec:
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


def check_output(request: ResolvedRun) -> list[dict[str, Any]]:
    """Refuse a folder that holds the result of other settings; gives the record of the runs that wrote to it.

    Raises:
        UserError: it does; the message lists the differences.
        StorageError: it cannot be reached.
    """
    storage.check_writable(request.run.out)
    path = storage.join(request.run.out, RUN)
    runs: list[dict[str, Any]] = []
    version: Any = FORMAT_VERSION
    if storage.exists(path):
        try:
            record = json.loads(storage.read_bytes(path))
            before = record["identity"]
            runs = list(record.get("runs", []))
            version = int(record.get("format_version", FORMAT_VERSION))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is no run record ({error!r}): `vidshard verify --repair {request.run.out}` writes it anew if "
                "shards are there, or choose another --out"
            ) from error
    else:
        shards = shard_paths(request.run.out)
        if not shards:
            return []
        with open_shard(shards[0]) as (_, provenance):  # they say it too
            before, record = dict(provenance.identity), {"code_version": provenance.code_version}
    if version != FORMAT_VERSION:
        raise UserError(
            f"{request.run.out} is of format version {version}, this vidshard writes version {FORMAT_VERSION}: go on "
            f"with the vidshard that began it ({record.get('code_version')}), or choose another --out"
        )
    if before != request.identity:
        raise UserError(
            f"{request.run.out} holds the result of other settings:\n{_differences(before, request.identity)}\n"
            "choose another --out, or the settings of that run"
        )
    return runs


def record_run(request: ResolvedRun, before: list[dict[str, Any]]) -> None:
    """Write ``run.json``: the run, and which versions of the code have written to the output.

    Args:
        request: of this run.
        before: the record of earlier runs.
    """
    provenance = request.provenance
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    this = {"code_version": provenance.code_version, "libraries": dict(provenance.libraries)}
    runs = [*before]
    if runs and {name: runs[-1].get(name) for name in this} == this:
        runs[-1] |= {"last_started_at": now, "starts": runs[-1].get("starts", 1) + 1}
    else:
        runs.append(this | {"first_started_at": now, "last_started_at": now, "starts": 1})
    record = {**asdict(provenance), "format_version": FORMAT_VERSION, "started_at": now, "runs": runs}
    storage.write_atomic(storage.join(request.run.out, RUN), json.dumps(record, indent=2, default=str).encode())


def _differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    both = before.keys() | now.keys()

    def flat(values: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in values.items() if k != "tokenizer"} | {
            f"tokenizer.{k}": v for k, v in values.get("tokenizer", {}).items()
        }

    defaults = TokenizeRun.model_construct().model_dump(mode="json")
    old, new = ({**{name: defaults.get(name) for name in both}, **flat(values)} for values in (before, now))
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    return "\n".join(f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in changed)


def print_run(request: ResolvedRun, found: Discovery, console: Console) -> None:
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


def code_version() -> str:
    """Version of this code, with the commit where it runs from a checkout."""
    version = importlib.metadata.version("vidshard")
    commit = os.environ.get("VIDSHARD_COMMIT", "")
    root = Path(__file__).resolve().parents[2]
    if not commit and (root / ".git").exists():
        git = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
        try:
            commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()  # noqa: S603
        except (OSError, subprocess.SubprocessError):
            commit = ""
    return f"{version}+{commit}" if commit else version
