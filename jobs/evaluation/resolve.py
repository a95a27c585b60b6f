"""Resolved evaluation: tokenizers looked up, their clips decided, and the metrics that can be taken."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.console import Console

from vidshard.jobs.runtime.progress import warn
from vidshard.jobs.runtime.run_record import refuse_unasked
from vidshard.models.frechet import I3D
from vidshard.models.tokenizer import PRESETS
from vidshard.models.training.perceptual import load_perceptual
from vidshard.models.weights import weights_digest
from vidshard.pipeline import storage
from vidshard.pipeline.clip_metrics import MetricsSpec
from vidshard.pipeline.evaluation.scorer import Measured
from vidshard.pipeline.named_tokenizer import PREFIX
from vidshard.pipeline.open_output import Output
from vidshard.pipeline.output.shard_reader import open_shard
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.schemas.errors import UserError
from vidshard.schemas.evaluation import PROTOCOLS, EvaluateRun
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.tokenizers import TokenizerConfig
from vidshard.schemas.training import WEIGHT_SUFFIXES
from vidshard.schemas.uris import typed_hosts

DEFAULT_FPS = Fraction(8)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tokenizers that are measured on the same clips."""

    resolved: ResolvedRun
    """Run of the first of them, which says how videos become clips."""
    tokenizers: tuple[Measured, ...]


@dataclass(frozen=True, kw_only=True)
class ResolvedEvaluation:
    """An evaluation whose tokenizers, clips and metrics are decided."""

    run: EvaluateRun
    groups: tuple[Group, ...]
    """Groups that are encoded and decoded; with stored tokens one group of one tokenizer."""
    stored: Output | None
    """Output whose tokens are evaluated; None where videos are encoded."""
    metrics: MetricsSpec
    not_measured: Mapping[str, str]
    """Reason by metric that is not taken."""
    identity: Mapping[str, Any]
    """Identity: the settings that decide the scores, as JSON values; a folder holds scores of one identity."""

    @property
    def measured(self) -> dict[str, TokenizerConfig]:
        """Config of each tokenizer by its label, in the order in which they were named."""
        return {measured.label: measured.source.config for group in self.groups for measured in group.tokenizers}


def resolve(run: EvaluateRun, console: Console) -> ResolvedEvaluation:
    """Look up what the settings name, and refuse what cannot work.

    Raises:
        UserError: a tokenizer is unknown or does not take the clips, or a file of metric networks cannot be used.
        ShardError: ``--from`` names no output.
    """
    run = run.model_copy(
        update={
            "out": storage.absolute(run.out),
            **{
                name: storage.absolute(value)
                for name in ("vgg_weights", "i3d", "tokens")
                if (value := getattr(run, name)) is not None
            },
        }
    )
    stored = None if run.tokens is None else Output(run.tokens)
    groups = _groups(run) if stored is None else (_stored_group(run, stored),)
    for measured in {m.label: m for group in groups for m in group.tokenizers}.values():
        if measured.notice is not None:
            warn(console, f"{measured.label}: {measured.notice}")
    metrics, digests, missing = _metrics(run)
    for name, reason in missing.items():
        console.print(f"{name} is not measured: {reason}", highlight=False, markup=False)
    identity = {
        "tokenizers": [
            [m.label, m.source.config.identity, m.source.sha256] for group in groups for m in group.tokenizers
        ],
        "clips": [[spec.digest() for spec in group.resolved.clip_specs] for group in groups],
        "precision": run.precision,
        "tokens": None if stored is None else stored.provenance.identity,
        **digests,
    }
    return ResolvedEvaluation(
        run=run, groups=groups, stored=stored, metrics=metrics, not_measured=missing, identity=identity
    )


# Tokenizers and clips


def _groups(run: EvaluateRun) -> tuple[Group, ...]:
    """Resolve each tokenizer at each frame rate, and put those with the same clips together."""
    names = list(run.tokenizer) or [""]
    if len(set(names)) < len(names):
        raise UserError("the same --tokenizer is named twice")
    protocol = PROTOCOLS[run.protocol] if run.protocol else None
    rates = run.fps or [protocol.fps if protocol else DEFAULT_FPS]
    resolved = [[_resolved(run, name, rate) for rate in rates] for name in names]
    labels = _labels([(of_rates[0], name) for of_rates, name in zip(resolved, names, strict=True)])
    groups: dict[tuple[str, ...], tuple[ResolvedRun, list[Measured]]] = {}
    for label, of_rates in zip(labels, resolved, strict=True):
        for one in of_rates:
            measured = Measured(
                label=label, source=one.source, padding=one.padding, tiling=one.tiling, notice=one.notice
            )
            key = tuple(spec.digest() for spec in one.clip_specs)
            groups.setdefault(key, (one, []))[1].append(measured)
    return tuple(Group(resolved=one, tokenizers=tuple(found)) for one, found in groups.values())


def _resolved(run: EvaluateRun, name: str, rate: Fraction) -> ResolvedRun:
    preset, weights = _split(name)
    settings: dict[str, Any] = {
        "inputs": run.inputs,
        "allow_private": run.allow_private,
        "out": run.out,
        "tokenizer": preset,
        "weights": weights,
        "ema": run.ema and weights is not None,
        "precision": run.precision,
        "fps": rate,
        "resize": "crop",
        "tail": "drop",
        "clips_per_video": run.clips_per_video,
        "clip_placement": "even",
    }
    config = ResolvedRun.of(TokenizeRun(**settings)).config
    protocol = PROTOCOLS[run.protocol] if run.protocol else None
    frames, size = run.frames, run.size
    if protocol is not None:
        frames = frames or (protocol.causal_frames if config.is_causal else protocol.noncausal_frames)
        size = size or protocol.size
    chosen = {"frames": frames, "size": size}
    settings |= {key: value for key, value in chosen.items() if value is not None}
    try:
        return ResolvedRun.of(TokenizeRun(**settings))
    except UserError as error:
        raise UserError(f"{config.name}: {error}") from error


def _split(name: str) -> tuple[str | None, str | None]:
    """Preset and weights of a ``--tokenizer``; None for what it does not name."""
    if name.startswith(PREFIX):
        return name, None
    preset, equals, weights = name.partition("=")
    if equals and preset in PRESETS:
        return preset, weights
    if name.endswith(WEIGHT_SUFFIXES):
        return None, name
    return name or None, None


def _labels(named: Sequence[tuple[ResolvedRun, str]]) -> list[str]:
    """Name of each tokenizer in the tables: its preset, with the file of its weights where that is not enough."""
    count = Counter(one.config.name for one, _ in named)
    labels = []
    for one, name in named:
        stem = Path(_split(name)[1] or "no file").stem
        labels.append(one.config.name if count[one.config.name] == 1 else f"{one.config.name} ({stem})")
    again = Counter(labels)
    return [f"{label} #{number}" if again[label] > 1 else label for number, label in enumerate(labels, start=1)]


def _stored_group(run: EvaluateRun, stored: Output) -> Group:
    if not run.fetch_sources:
        _refuse_remote_sources(stored)
    hosts = None if run.allow_private else typed_hosts([stored.path])
    resolved = ResolvedRun.from_provenance(stored.provenance, source_hosts=hosts)
    measured = Measured(
        label=resolved.config.name, source=resolved.source, padding=resolved.padding, notice=resolved.notice
    )
    return Group(resolved=resolved, tokenizers=(measured,))


def _refuse_remote_sources(stored: Output) -> None:
    """Refuse an output that names a remote source.

    Raises:
        UserError: there is one.
    """
    for path in stored.shards:
        with open_shard(path) as (parquet, _):
            for group in range(parquet.metadata.num_row_groups):
                for uri in parquet.group(group, ["uri"])["uri"].unique().to_pylist():
                    refuse_unasked(uri)


# Metrics


def _metrics(run: EvaluateRun) -> tuple[MetricsSpec, dict[str, str | None], dict[str, str]]:
    """Metrics that can be taken, digests of their networks, and why the others are not taken."""
    missing: dict[str, str] = {}
    lpips_digest = i3d_digest = None
    if not run.lpips:
        missing["LPIPS"] = "--no-lpips"
    else:
        try:
            with storage.local_copy(run.vgg_weights) as path:
                lpips_digest = weights_digest(load_perceptual(path).state_dict())
        except (ValueError, storage.StorageError) as error:
            if run.vgg_weights is not None:
                raise UserError(f"--vgg-weights: {error}; --no-lpips leaves LPIPS out") from error
            missing["LPIPS"] = f"{error}; --vgg-weights FILE names the file, --no-lpips leaves LPIPS out"
    if run.i3d is None:
        missing["FVD"] = (
            "give --i3d FILE, I3D as TorchScript; StyleGAN-V's repository says where to get i3d_torchscript.pt"
        )
    else:
        try:
            with storage.local_copy(run.i3d) as path:
                assert path is not None
                I3D(path)
                i3d_digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except (ValueError, storage.StorageError) as error:
            raise UserError(f"--i3d: {error}") from error
    spec = MetricsSpec(lpips=lpips_digest is not None, vgg_weights=run.vgg_weights, i3d=run.i3d)
    return spec, {"lpips_sha256": lpips_digest, "i3d_sha256": i3d_digest}, missing
