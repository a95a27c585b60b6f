"""Verify an output: reads every shard whole and compares it with the plan.

With ``--repair`` broken files and clips are removed, so that the same ``vidshard tokenize`` makes them again.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from rich.console import Console

from vidshard.jobs.runtime.progress import PhaseProgress, print_alert
from vidshard.jobs.runtime.run_record import MAX_RECORD_BYTES, record_of
from vidshard.jobs.shards.reencode import Comparison, encode_again
from vidshard.models.tokenizer import parse_config
from vidshard.pipeline import storage
from vidshard.pipeline.clip_specs import clip_specs_of
from vidshard.pipeline.output.audit import AUDIT_COLUMNS, Audit, make_audit
from vidshard.pipeline.output.committed import ShardSpans, drop_repeated_spans, drop_spans, shard_spans, spans_of_rows
from vidshard.pipeline.output.layout import PLANNED, RUN, SHARDS, remove_leftovers
from vidshard.pipeline.output.lease import Lease
from vidshard.pipeline.output.parquet import ShardError, named_if_damaged
from vidshard.pipeline.output.plan_store import has_sampled_ids
from vidshard.pipeline.output.shard_reader import check_shard, find_clips, open_shard, output_shards
from vidshard.pipeline.output.state import OutputState, damaged_files
from vidshard.pipeline.resolved_run import stored_run
from vidshard.schemas.errors import EXIT_FAILED, UserError, one_line
from vidshard.schemas.text import counted, readable, spreadsheet_cell
from vidshard.schemas.tokens import FORMAT_VERSIONS, METADATA_PREFIX, parse_json
from vidshard.schemas.uris import shown_uri, typed_hosts, without_secrets


@dataclass(kw_only=True)
class _Findings:
    """Problems found so far; printed, and repaired if asked for."""

    lease: Lease | None
    """Lease of a repair, checked before each change; None where nothing is changed."""
    console: Console
    num_repaired: int = 0
    num_mendable: int = 0
    """Number of problems that a repair would mend."""
    wrong_paths: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    num_clips: int = 0

    @property
    def num_wrong(self) -> int:
        """Number of problems found."""
        return len(self.problems)

    def wrong(self, text: str, mend: Callable[[], object] | None = None, done: str = "") -> None:
        """Report a problem; with ``--repair`` call ``mend`` and report ``done``.

        Raises:
            LeaseLostError: another run has taken over the output; nothing is changed.
        """
        self.problems.append(text)
        print_alert(self.console, f"broken: {text}", style="bold red")
        self.num_mendable += mend is not None
        if self.lease is not None and mend is not None:
            self.lease.check()
            mend()
            self.num_repaired += 1
            self.console.print(f"  repaired: {readable(done)}", highlight=False, markup=False)

    def before_write(self) -> None:
        """Check the lease.

        Raises:
            LeaseLostError: as :meth:`wrong`.
        """
        if self.lease is not None:
            self.lease.check()


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Result of a verification."""

    num_wrong: int
    """Number of problems found."""
    num_repaired: int
    comparison: Comparison | None
    """Comparison with clips encoded again; None if not requested, or if other problems were found."""
    problems: tuple[str, ...] = ()
    """The problems in words."""
    num_shards: int = 0
    """Number of shards that are whole."""
    num_clips: int = 0
    """Number of clips in them."""
    audit: Audit | None = None
    """Comparison with the plan; None for a single shard, or where the plan cannot be read."""

    @property
    def exit_code(self) -> int:
        """0 if no problem was found, otherwise 1."""
        differs = self.comparison is not None and self.comparison.is_broken
        return EXIT_FAILED if self.num_wrong or differs else 0

    @property
    def record(self) -> dict[str, Any]:
        """The result as JSON values."""
        compared = self.comparison
        return {
            "is_whole": self.exit_code == 0,
            "problems": [without_secrets(text) for text in self.problems],
            "num_repaired": self.num_repaired,
            "num_shards": self.num_shards,
            "num_clips": self.num_clips,
            "videos_by_status": None if self.audit is None else dict(self.audit.statuses),
            "num_spans": None if self.audit is None else self.audit.num_spans,
            "num_pending_spans": None if self.audit is None else self.audit.num_pending,
            "compared": None
            if compared is None
            else {
                "num_clips": compared.num_clips,
                "num_values": compared.num_values,
                "num_different": compared.num_different,
                "num_ties": compared.num_ties,
                "different_clips": compared.different_clips,
            },
        }


def verify_output(
    out: str,
    console: Console,
    *,
    exact: float | None = None,
    seed: int = 0,
    weights: str | None = None,
    fetch_sources: bool = False,
    allow_private: bool = False,
    repair: bool = False,
    audit_file: str | None = None,
) -> Verification:
    """Verify an output folder, or a single shard, and print the problems found.

    Args:
        exact: share of the clips to encode again, in (0, 1]; None for none.
        seed: random seed that selects these clips.
        weights: present location of the weights; None for the location that the shard records.
        fetch_sources: whether ``exact`` may read sources from remote storage.
        allow_private: whether these may lie on web servers with private addresses that ``out`` does not name.
        repair: remove broken files and clips.
        audit_file: path of a table with the status of each video, ``.parquet`` or ``.csv``; None for none.

    Raises:
        VidshardError: the output does not exist or cannot be reached, or, with ``repair``, a run holds its lease.
    """
    folder = storage.absolute(out)
    if audit_file and not audit_file.endswith((".parquet", ".csv")):
        raise UserError(f"--audit {audit_file}: give a name that ends in .parquet or .csv")
    is_output = not folder.endswith(".parquet") and storage.exists(storage.join(folder, RUN))
    if (repair or audit_file) and not is_output:
        raise UserError(f"{out} is no output of vidshard with a {RUN}: there is no plan to hold it against")
    with Lease.acquire(folder) if repair else nullcontext() as lease:
        findings = _Findings(lease=lease, console=console)
        paths = _paths(folder, findings) if is_output else output_shards(out)
        facts = _check_shards(paths, folder if is_output else None, findings)
        audit = _report_audit(folder, paths, facts, findings, audit_file) if is_output else None
    if findings.num_repaired:
        console.print(
            f"{findings.num_repaired} of {findings.num_wrong} repaired: the same `vidshard tokenize` fills in what "
            "is missing now",
            style="bold",
        )
    elif findings.num_mendable:
        parent, _, name = folder.rpartition(f"/{SHARDS}/")
        where = shown_uri(parent) if not is_output and name else out if is_output else "OUTPUT"
        console.print(
            f"{findings.num_mendable} of {findings.num_wrong} can be taken out: `vidshard verify {shlex.quote(where)} "
            "--repair`, and then the same `vidshard tokenize` fills in what is missing",
            style="bold",
            markup=False,
        )
    comparison = None
    if exact is not None and not findings.num_wrong:
        comparison = encode_again(
            paths,
            console,
            share=exact,
            seed=seed,
            weights=weights,
            fetch_sources=fetch_sources,
            source_hosts=None if allow_private else typed_hosts([out]),
        )
    return Verification(
        num_wrong=findings.num_wrong,
        num_repaired=findings.num_repaired,
        comparison=comparison,
        problems=tuple(findings.problems),
        num_shards=len(facts),
        num_clips=findings.num_clips,
        audit=audit,
    )


def _report_audit(
    folder: str, paths: Sequence[str], facts: Sequence[ShardSpans], findings: _Findings, audit_file: str | None
) -> Audit | None:
    audit = _check_audit(folder, paths, facts, findings)
    if audit is not None:
        print_audit(audit, findings.console)
        if audit_file:
            _write_audit(audit, audit_file, findings.console)
    return audit


def _paths(folder: str, findings: _Findings) -> list[str]:
    """List the shards of an output. Reports damaged plan and rejects files; a repair also removes unfinished files."""
    for path, why in damaged_files(folder):
        mend = partial(storage.remove, path) if why.is_damage else None
        findings.wrong(str(why), mend, f"{path} is taken out")
    left = 0
    if findings.lease is not None:
        findings.before_write()
        left = remove_leftovers(folder)
    if left:
        findings.console.print(f"{left} files that a killed run had begun are removed", highlight=False)
    return storage.list_files(storage.join(folder, SHARDS), ".parquet")


def _check_shards(paths: Sequence[str], folder: str | None, findings: _Findings) -> list[ShardSpans]:
    """Read every shard; returns the span lists of those that are whole."""
    identity = None if folder is None else _record(folder, paths, findings)["identity"]
    clips = 0
    seen: set[str] = set()
    facts: list[ShardSpans] = []
    with PhaseProgress(findings.console, "verifying", len(paths)) as display:
        for number, path in enumerate(paths, start=1):
            try:
                num_clips, found = _check_shard(path, identity)
            except ShardError as error:
                mend = partial(storage.remove, path) if error.is_damage and _is_ours(path, identity) else None
                findings.wrong(str(error), mend, f"{path} is taken out")
                continue
            ids = [clip_id for _, clip_id in find_clips([path], "")]
            twice = seen.intersection(ids)
            if twice:
                findings.wrong(
                    f"{path} repeats {counted(len(twice), 'clip')} of another shard: {readable(min(twice))} ...",
                    None
                    if folder is None
                    else partial(drop_repeated_spans, [*(shard.path for shard in facts), path], findings.before_write),
                    "they stay in the first shard alone",
                )
                if findings.lease is not None and folder is not None:
                    found = shard_spans(path) if storage.exists(path) else ShardSpans(path, [], [], [])
            seen.update(ids)
            clips += num_clips
            facts.append(found)
            display.update(number, f"{number:,} of {counted(len(paths), 'shard')} · {counted(clips, 'clip')}")
    text = f"verified {len(facts):,} of {counted(len(paths), 'shard')}, {counted(clips, 'clip')}"
    findings.console.print(text, highlight=False)
    findings.num_clips = clips
    return facts


def _is_ours(path: str, identity: dict[str, Any] | None) -> bool:
    """Whether a broken shard may be removed: it has a known format version and the run's identity, or no footer."""
    try:
        with storage.open_binary(path) as file:
            metadata = pq.read_metadata(file).metadata or {}
    except storage.StorageError:
        raise
    except (pa.ArrowException, OSError, ValueError, UnicodeDecodeError):
        return True  # the Parquet footer cannot be read
    version = metadata.get(f"{METADATA_PREFIX}format_version".encode(), b"").decode(errors="replace")
    if version not in map(str, FORMAT_VERSIONS):
        return False
    try:
        stated = parse_json(metadata.get(f"{METADATA_PREFIX}identity".encode(), b""), "identity")
    except ValueError:
        return True  # no vidshard writes this: damaged, and nobody else's
    return identity is None or not isinstance(stated, dict) or stated == identity


def _check_shard(path: str, identity: dict[str, Any] | None) -> tuple[int, ShardSpans]:
    """Read a shard whole; returns its number of clips and its spans.

    Raises:
        ShardError: the shard is damaged, or contradicts its metadata or the run.
    """
    num_clips = check_shard(path)
    with open_shard(path) as (parquet, provenance):
        names = ("video_id", "clip_index", "part_start_seconds", "part_end_seconds", "num_valid_frames", "fps")
        rows = parquet.whole([name for name in names if name in parquet.schema_arrow.names])
    if identity is not None and dict(provenance.identity) != identity:
        raise ShardError(
            f"{shown_uri(path)} was made with other settings than {RUN} says: move it away, or start a new output"
        )
    facts = shard_spans(path)
    with named_if_damaged(path):
        _check_spans(path, rows, facts)
    return num_clips, facts


def _check_spans(path: str, rows: pa.Table, facts: ShardSpans) -> None:
    """Compare the rows of a shard with the spans that it lists.

    Raises:
        ShardError: they contradict each other.
    """
    path = shown_uri(path)
    if facts.spans:
        owners = spans_of_rows(rows, facts.spans)
        counts = Counter(owners)
        if None in counts:
            raise ShardError(f"{path} holds {counts[None]} clips of no span that it lists")
        seconds: Counter[str] = Counter()
        for owner, valid, fps in zip(
            owners, rows["num_valid_frames"].to_pylist(), rows["fps"].to_pylist(), strict=True
        ):
            seconds[str(owner)] += valid / fps
        for span, number, length in zip(facts.spans, facts.num_clips, facts.seconds, strict=True):
            if number is not None and number != counts[span]:
                raise ShardError(f"{path} holds {counts[span]} clips of span {span}, and says that they are {number}")
            if length is not None and abs(length - seconds[span]) > 1e-3:
                raise ShardError(f"{path} holds {seconds[span]:.3f} s of span {span}, and says that they are {length}")


def _record(folder: str, paths: Sequence[str], findings: _Findings) -> dict[str, Any]:
    """Read ``run.json``, or restore its values from a shard's provenance if it is damaged.

    Raises:
        UserError: no shard can be read either.
    """
    path = storage.join(folder, RUN)
    try:
        record: dict[str, Any] = parse_json(storage.read_bytes(path, max_bytes=MAX_RECORD_BYTES), RUN)
        for name in ("identity", "run", "tokenizer"):
            if not isinstance(record[name], dict):
                raise TypeError(f"its '{name}' is no object")
    except (ValueError, LookupError, TypeError) as error:
        damage = f"{shown_uri(path)} is damaged ({one_line(error, 200)})"
    else:
        return record
    for shard in paths:
        with suppress(ShardError), open_shard(shard) as (_, provenance):
            record = record_of(provenance) | {"sampled_ids": has_sampled_ids(folder)}
            text = json.dumps(record, indent=2, default=str).encode()
            if path not in findings.wrong_paths:
                findings.wrong_paths.add(path)
                findings.wrong(damage, partial(storage.write_atomic, path, text), f"written anew, as {shard} says")
            return record
    raise UserError(f"{damage}, and no shard says what it was: remove it, and start the same `vidshard tokenize` anew")


def _check_audit(folder: str, paths: Sequence[str], facts: Sequence[ShardSpans], findings: _Findings) -> Audit | None:
    """Compare the spans of the shards with the plan; None if there is no plan to compare with."""
    record = _record(folder, [path for path in paths if storage.exists(path)], findings)
    try:
        specs = clip_specs_of(stored_run(record["run"]), parse_config(record["tokenizer"]))
    except (UserError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        findings.console.print(
            f"no audit: {RUN} is of another vidshard ({one_line(error)})", highlight=False, markup=False
        )
        return None
    if not storage.list_files(storage.join(folder, PLANNED), ".parquet"):
        findings.console.print(f"no audit: the output has no {PLANNED}/ (a run that goes on writes it)")
        return None
    try:
        state = OutputState.load(folder, columns=AUDIT_COLUMNS, shards=facts)
        audit = make_audit(state, {(spec.height, spec.width): spec for spec in specs})
    except ShardError as error:
        if not findings.num_wrong:
            findings.wrong(str(error))
        return None

    def drop(spans: list[str]) -> Callable[[], None]:
        def mend() -> None:
            for shard in facts:
                if not set(shard.spans).isdisjoint(spans):
                    findings.before_write()
                    drop_spans(shard.path, spans)

        return mend

    if audit.unplanned:
        findings.wrong(
            f"{len(audit.unplanned)} spans of the shards are in no plan: {audit.unplanned[0]} ... ; the same "
            "`vidshard tokenize` plans what its inputs hold"
        )
    if audit.superseded:
        findings.wrong(
            f"{len(audit.superseded)} spans are of videos that were replaced since: {audit.superseded[0]} ...",
            drop(audit.superseded),
            "their clips are taken out",
        )
    if audit.short:
        findings.wrong(
            f"{len(audit.short)} spans hold fewer clips than were planned, though their video goes on: "
            f"{audit.short[0]} ...",
            drop(audit.short),
            "their other clips are taken out",
        )
    return audit


def print_audit(audit: Audit, console: Console) -> None:
    """Print the number of videos by status, and the seconds of video by outcome."""
    statuses = audit.statuses
    order = ("tokenized", "partly", "rejected", "copy", "pending")
    named = {"copy": "copies of others", "partly": "tokenized in part"}
    parts = [f"{statuses[name]} {named.get(name, name)}" for name in order if statuses[name]]
    console.print(f"{counted(audit.videos.num_rows, 'video')} = {' + '.join(parts) or '0'}", highlight=False)
    planned, tokenized, rejected, pending, tail, header = (
        audit.seconds(name) for name in ("planned", "tokenized", "rejected", "pending", "tail", "header")
    )
    console.print(
        f"{planned:.3f} s of video planned = {tokenized:.3f} s in clips + {rejected:.3f} s rejected + {pending:.3f} s "
        f"pending + {tail:.3f} s of tails left out {'-' if header < 0 else '+'} {abs(header):.3f} s that videos differ "
        "from their headers",
        highlight=False,
    )
    if audit.num_pending:
        console.print(f"{audit.num_pending} of {audit.num_spans} planned spans are left to do", highlight=False)


def _write_audit(audit: Audit, path: str, console: Console) -> None:
    sink = pa.BufferOutputStream()
    if path.endswith(".csv"):
        pyarrow.csv.write_csv(_for_spreadsheets(audit.videos), sink)
    else:
        pq.write_table(audit.videos, sink)
    storage.write_atomic(storage.absolute(path), sink.getvalue())
    console.print(f"what became of each video: {shown_uri(path)}", highlight=False, markup=False)


def _for_spreadsheets(table: pa.Table) -> pa.Table:
    """The table with texts that no spreadsheet takes for formulas."""
    for at, column in enumerate(table.schema):
        if pa.types.is_string(column.type):
            cells = [None if text is None else spreadsheet_cell(text) for text in table[column.name].to_pylist()]
            table = table.set_column(at, column, pa.array(cells, column.type))
    return table
