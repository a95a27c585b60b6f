"""Push job: the shards of an output to a dataset repository of the Hugging Face Hub, with a generated card.

The same command again sends the shards that are not there yet. A run that is still writing may be pushed: its finished
shards are sent, and the next push adds the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vidshard.jobs.export.card import card_of, statistics_of, with_card
from vidshard.jobs.runtime.progress import PhaseProgress, warn
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import SHARDS
from vidshard.pipeline.output.parquet import ShardError
from vidshard.pipeline.reader.catalog import Catalog, read_catalog
from vidshard.pipeline.reader.files import ShardFiles
from vidshard.pipeline.reader.stats import ChannelStats, read_stats
from vidshard.pipeline.storage.hub_dataset import HubDataset, HubPushError, RemoteFile
from vidshard.schemas.errors import UserError
from vidshard.schemas.text import counted, readable
from vidshard.schemas.uris import shown_uri

CARD = "README.md"
_COMMIT_FILES = 50
"""Shards of a commit: the Hub takes 128 commits an hour."""
_COMMIT_BYTES = 512 << 20
"""Bytes of the shards of a commit, if they come from object storage and are in memory."""


@dataclass(frozen=True, kw_only=True)
class PushRun:
    """Request to push an output."""

    out: str
    """Output folder, or folder of shards."""
    target: str
    """``hf://datasets/OWNER/NAME[@BRANCH]``."""
    create: bool = False
    """Make the repository if it is missing."""
    public: bool = False
    """Make it visible to everybody; only where it is made."""
    prune: bool = False
    """Delete shards of the dataset that the output has not."""


@dataclass(frozen=True, kw_only=True)
class PushResult:
    """Figures of a push."""

    num_shards: int
    """Shards of the dataset now."""
    num_sent: int
    """Shards that this push committed."""
    num_deleted: int
    """Shards that the dataset had and the output has not."""
    exit_code: int = 0


def push_output(request: PushRun, console: Console) -> PushResult:
    """Push the finished shards of an output, and its card.

    Raises:
        UserError: there is no token, the repository is missing, or it has shards of something else.
        HubError: the Hub refuses or cannot be reached.
        ShardError: a shard is damaged.
    """
    hub = HubDataset(request.target)
    catalog = read_catalog(request.out)
    there = hub.files()
    if there is None:
        if not request.create:
            raise UserError(
                f"there is no dataset {hub.id}, or the token cannot see it: check the name, or make it with --create "
                "(private, unless --public is given)"
            )
        hub.create(private=not request.public)
        there = hub.files() or {}
    names = {f"{SHARDS}/{path.rsplit('/', 1)[-1]}": path for path in catalog.paths}
    if len(names) < len(catalog.paths):
        raise UserError(f"{shown_uri(request.out)} has two shards of one name: push the folder of a single run")
    others = _others(there, names, prune=request.prune, name=hub.id)
    left = [name for name in names if not _is_there(names[name], there.get(name))]
    num_sent = _send(hub, catalog, {name: names[name] for name in left}, others, console)
    _send_card(hub, request, catalog, there, console)
    now = hub.files() or {}
    missing = [name for name in names if name not in now]
    if missing:
        raise HubPushError(
            f"{hub.id} lacks {counted(len(missing), 'shard')} that were sent, such as {readable(missing[0], 80)}: "
            "does its .gitignore name them?"
        )
    new = f"{num_sent:,} of them sent now" if num_sent else "nothing new was sent"
    if others:
        new += f", and {counted(len(others), 'shard')} deleted that the output has not"
    console.print(
        f"  {'dataset':<12}{hub.id}: {counted(len(names), 'shard')}, {counted(catalog.num_rows, 'clip')}; {new}",
        highlight=False,
    )
    note = "the shards hold the locations of the source videos (column uri) and every column of the manifest"
    console.print(f"  {'note':<12}{note}", highlight=False)
    return PushResult(num_shards=len(names), num_sent=num_sent, num_deleted=len(others))


def _others(there: Mapping[str, RemoteFile], names: Mapping[str, str], *, prune: bool, name: str) -> list[str]:
    """Shards of the dataset that the output has not, to be deleted.

    Raises:
        UserError: there are some, and they are to be kept.
    """
    others = [
        path for path in there if path.startswith(f"{SHARDS}/") and path.endswith(".parquet") and path not in names
    ]
    if others and not prune:
        raise UserError(
            f"{name} has {len(others):,} shards that the output has not, such as {readable(others[0], 80)}: they are "
            "of another output, or of an earlier state of this one. Push elsewhere, or delete them with --prune"
        )
    return others


def _is_there(path: str, remote: RemoteFile | None) -> bool:
    """Whether the dataset has a shard with the same content."""
    if remote is None:
        return False
    digest = hashlib.sha256()
    num_bytes = 0
    with storage.open_binary(path) as file:
        while data := file.read(8 << 20):
            digest.update(data)
            num_bytes += len(data)
            if num_bytes > remote.num_bytes:
                return False
    return num_bytes == remote.num_bytes and remote.sha256 == digest.hexdigest()


def _send(hub: HubDataset, catalog: Catalog, left: Mapping[str, str], others: Sequence[str], console: Console) -> int:
    """Send shards in commits of several; returns their number."""
    num_bytes = dict(zip(catalog.paths, catalog.shard_bytes.tolist(), strict=True))
    total, done, num_sent = sum(num_bytes[path] for path in left.values()), 0, 0
    if not left and others:
        hub.commit({}, others, f"Delete {counted(len(others), 'shard')}")
    with PhaseProgress(console, "pushing", total) as display:
        for some in _commits(left, num_bytes):
            added = {name: Path(path) if storage.is_local(path) else storage.read_bytes(path) for name, path in some}
            hub.commit(added, [] if num_sent else others, f"Add {counted(len(some), 'shard')}")
            num_sent += len(some)
            done += sum(num_bytes[path] for _, path in some)
            display.update(done, f"{num_sent:,} of {counted(len(left), 'shard')} · {done:,} of {total:,} bytes")
    return num_sent


def _commits(left: Mapping[str, str], num_bytes: Mapping[str, int]) -> Iterator[list[tuple[str, str]]]:
    some: list[tuple[str, str]] = []
    held = 0
    for name, path in left.items():
        size = 0 if storage.is_local(path) else num_bytes[path]
        if some and (len(some) >= _COMMIT_FILES or held + size > _COMMIT_BYTES):
            yield some
            some, held = [], 0
        some.append((name, path))
        held += size
    if some:
        yield some


def _send_card(
    hub: HubDataset, request: PushRun, catalog: Catalog, there: Mapping[str, RemoteFile], console: Console
) -> None:
    """Send the card, unless it is there as it is, or is the owner's alone."""
    before = hub.read_text(CARD) if CARD in there else None
    found = statistics_of(catalog, ShardFiles(catalog.paths, catalog.shard_bytes))
    card = card_of(catalog, found, name=hub.id, stats=_latent_stats(request.out, catalog))
    text = with_card(card, before, found.num_clips)
    if text == before:
        if card.split("\n", 1)[0] not in text:
            warn(console, f"{CARD} of {hub.id} is its owner's and stays as it is: it has no generated block")
        return
    hub.commit({CARD: text.encode()}, [], "Describe the dataset")


def _latent_stats(out: str, catalog: Catalog) -> dict[str, ChannelStats]:
    """Statistics that `vidshard stats` wrote; none where it did not, or for other shards."""
    try:
        return read_stats(catalog, [out])
    except (UserError, ShardError):
        return {}
