"""Run record, ``run.json`` of an output: identity and provenance of its run, and the code versions that wrote to it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import RUN, shard_paths
from vidshard.pipeline.output.plan_store import has_sampled_ids
from vidshard.pipeline.output.shard_reader import open_shard
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.schemas.errors import UserError, one_line
from vidshard.schemas.fields import differences
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.tokens import FORMAT_VERSIONS, Provenance, parse_json, payload_record
from vidshard.schemas.uris import is_remote, shown_uri

MAX_RECORD_BYTES = 64 << 20
"""Largest ``run.json`` that is read; that of a run with 100,000 inputs takes some 10 MB."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Contents of ``run.json`` that later runs need."""

    identity: Mapping[str, Any]
    code_version: str
    runs: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """Sets of code and library versions that wrote to the output in turn, each with times and its number of starts."""
    sampled_ids: bool = True
    """Whether ids of small files digest samples of them: earlier versions made them so, and did not record it."""


def read_run_record(out: str) -> RunRecord | None:
    """Read the run record of an output, or the provenance of a shard if it is missing; None without either.

    Raises:
        UserError: the record is damaged, or has an unknown format version.
        ShardError: there is no record, and the shard cannot be read.
    """
    path = storage.join(out, RUN)
    if not storage.exists(path):
        shards = shard_paths(out)
        if not shards:
            return None
        with open_shard(shards[0]) as (_, provenance):
            return RunRecord(
                identity=dict(provenance.identity),
                code_version=provenance.code_version,
                sampled_ids=has_sampled_ids(out),
            )
    try:
        record = parse_json(storage.read_bytes(path, max_bytes=MAX_RECORD_BYTES), RUN)
        version = int(record.get("format_version", FORMAT_VERSIONS[0]))
        found = RunRecord(
            identity=dict(record["identity"]),
            code_version=str(record.get("code_version")),
            runs=list(record.get("runs", [])),
            sampled_ids=bool(record.get("sampled_ids", True)),
        )
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{shown_uri(path)} is no run record ({one_line(error, 200)}): `vidshard verify --repair {out}` writes it "
            "anew if "
            "shards are there, or choose another --out"
        ) from error
    if version not in FORMAT_VERSIONS:
        raise UserError(
            f"{out} is of format version {version}, this vidshard writes "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}: go on with the vidshard that began it "
            f"({found.code_version}), or choose another --out"
        )
    return found


def resolved_run_of(out: str, *, weights: str | None = None, source_hosts: tuple[str, ...] | None = ()) -> ResolvedRun:
    """Resolve the run that made an output, whether or not it has shards.

    Args:
        weights: present location of its weights; None for the location that the output records.
        source_hosts: web servers with private addresses that its sources may be fetched from; None for all.

    Raises:
        UserError: there is no run record, it is damaged, or this vidshard does not know a setting or the tokenizer.
        StorageError: the output could not be read.
    """
    path = storage.join(out, RUN)
    if not storage.exists(path):
        raise UserError(f"{shown_uri(out)} is no output of vidshard: it has no {RUN}")
    try:
        record = parse_json(storage.read_bytes(path, max_bytes=MAX_RECORD_BYTES), RUN)
        provenance = Provenance(
            tokenizer=dict(record["tokenizer"]),
            weights_sha256=str(record["weights_sha256"]),
            weights_source=str(record["weights_source"]),
            payload=(),
            run=dict(record["run"]),
            identity=dict(record["identity"]),
            code_version=str(record.get("code_version")),
            libraries={},
            notice=record.get("notice"),
        )
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{shown_uri(path)} is no run record ({one_line(error, 200)})") from error
    return ResolvedRun.from_provenance(provenance, weights=weights, source_hosts=source_hosts)


def refuse_unasked(uri: str) -> None:
    """Refuse to read a source that an output names, and nobody asked for, from remote storage.

    Raises:
        UserError: it is remote.
    """
    if is_remote(uri):
        raise UserError(
            f"{shown_uri(uri)} is not fetched by itself: the output names it, and may be foreign; --fetch-sources "
            "fetches such sources"
        )


def check_output(resolved: ResolvedRun) -> RunRecord:
    """Refuse an output with another identity; returns the record of the runs before, of an empty one for a new output.

    Raises:
        UserError: the identity differs (the message lists the differences), or the run record cannot be used.
        StorageError: the output cannot be reached or written.
    """
    out = resolved.run.out
    storage.check_writable(out)
    record = read_run_record(out)
    if record is None:
        version = resolved.provenance.code_version
        return RunRecord(identity=resolved.identity, code_version=version, sampled_ids=False)
    now = resolved.identity
    if resolved.run.precision == "auto" and "precision" in record.identity:
        now = now | {"precision": record.identity["precision"]}  # which the run will take
    if record.identity != now:
        raise UserError(
            f"{out} holds the result of other settings:\n{_listed(record.identity, now)}\n"
            "choose another --out, or the settings of that run"
        )
    return record


def write_run_record(resolved: ResolvedRun, before: RunRecord) -> None:
    """Write ``run.json``.

    Args:
        before: record of the runs before, from `check_output`.
    """
    provenance = resolved.provenance
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    this = {"code_version": provenance.code_version, "libraries": dict(provenance.libraries)}
    runs = [dict(run) for run in before.runs]
    if runs and {name: runs[-1].get(name) for name in this} == this:
        runs[-1] |= {"last_started_at": now, "starts": runs[-1].get("starts", 1) + 1}
    else:
        runs.append(this | {"first_started_at": now, "last_started_at": now, "starts": 1})
    record = record_of(provenance) | {"started_at": now, "runs": runs, "sampled_ids": before.sampled_ids}
    storage.write_atomic(storage.join(resolved.run.out, RUN), json.dumps(record, indent=2, default=str).encode())


def record_of(provenance: Provenance) -> dict[str, Any]:
    """Values of ``run.json`` that follow from a provenance, for JSON."""
    described = payload_record(provenance.payload)
    payload = described.get("payloads") or {"kind": described.pop("payload"), **described}
    record = {**asdict(provenance), "payload": payload, "format_version": provenance.format_version}
    del record["normalization"]
    if provenance.normalization is not None:
        record["normalization"] = provenance.normalization.record()
    return record


def _listed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    defaults = TokenizeRun.model_construct().model_dump(mode="json")
    relevant = {name: value for name, value in defaults.items() if name in before.keys() | now.keys()}
    return "\n".join(f"  {line}" for line in differences(before, now, defaults=relevant))
