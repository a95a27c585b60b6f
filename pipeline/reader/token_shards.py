"""Training reader of outputs in an order of its own: `TokenShards`, and the loader over it."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Unpack, cast

import torch
import torch.distributed
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from vidshard.pipeline.reader.catalog import Paths
from vidshard.pipeline.reader.mixture import Mixture, Shares, check_weights
from vidshard.pipeline.reader.order import ORDER_VERSION, Order, num_steps, positions, steps, turns
from vidshard.pipeline.reader.progress import Progress
from vidshard.pipeline.reader.read_ahead import ReadAhead
from vidshard.pipeline.reader.source import Content, Plan, Source
from vidshard.pipeline.reader.transport import Slots, message_bytes
from vidshard.pipeline.reader.units import whole_number
from vidshard.schemas.errors import UserError
from vidshard.schemas.tokens import Provenance

Batch = dict[str, Any]
"""Columns by name."""
POSITION = "_position"
"""Entry of a batch: units of the epoch that are consumed once every rank has had this batch."""

_UNEVEN = ("drop", "repeat")
_AHEAD = 2
"""Default of ``prefetch_factor`` in PyTorch: messages that a worker makes ahead."""
_TOGETHER = 8
"""Batches that a worker makes in a row and sends in one message, where the order has no cycle."""


class TokenShards(IterableDataset[Batch]):
    """Clips of one or several outputs as batches of tensors, in an order that one number can resume.

    The order depends on the shards, ``where``, ``sequence``, ``shuffle``, ``seed``, ``lanes`` and the epoch alone. It
    is the same for any number of ranks, loader workers and any batch size. Each step of all ranks takes the next
    ``world_size * batch_size`` clips of it.
    """

    def __init__(
        self,
        paths: Paths | Mapping[str, float],
        *,
        batch_size: int | None = None,
        drop_last: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        uneven: str = "drop",
        lanes: int = 32,
        **content: Unpack[Content],
    ) -> None:
        """Open outputs for training; the ends of all shards are read.

        Args:
            paths: one or several output folders, folders of shards or shards; local paths or URLs. With weights, as in
                ``{"a/": 3, "b/": 1}``, they form a mixture: three of four clips are from the first one, and ``_source``
                names the path of each. An epoch has as many clips as all of them together. An output that is used up
                begins anew in another order; one that is not is continued in the next epoch.
            columns: columns of the batches; None for the payload without log-variances.
            where: condition that clips must meet, such as ``"source_fps >= 24 and num_valid_frames = 17"``.
            sequence: consecutive clips of one video that form one sequence; None for single clips.
            stride: clips from the start of a sequence to that of the next one; None for ``sequence``.
            signals: columns with a value for each frame, as ``--signals`` writes them.
            signals_per: ``frame``, or ``latent`` to group the samples by latent.
            normalize: subtract the mean of each channel of the latents and divide by its standard deviation: True for
                the numbers that the shards state (``diffusers:`` tokenizers) or else those of ``vidshard stats``, or
                ``{column: (mean, std)}``.
            sample: sample latents from mean and log-variance; the noise depends on seed, epoch and clip.
            batch_size: clips, or sequences, of a batch of each rank; None for single ones without a batch axis.
            drop_last: leave out batches with fewer clips.
            shuffle: shuffle the order; otherwise it is that of the shards.
            seed: seed of the order and of the noise.
            epoch: number of the epoch; see `set_epoch`.
            rank: number of this process; None for that of ``torch.distributed``, 0 without it.
            world_size: number of processes; None likewise.
            uneven: what is done with the last clips that cannot be shared out equally, fewer than ``world_size``:
                ``drop`` leaves them out, ``repeat`` gives some clips twice.
            allow_mixed: differences between shards that are no error: ``weights``, ``rates``, ``lengths``,
                ``geometries``, ``versions``; True for all.
            lanes: streams of row groups that are interleaved when shuffling. Up to ``lanes * 8 / batch_size`` ranks
                times workers share out the row groups; more lanes take more memory.

        Raises:
            UserError: an argument is wrong, or outputs may not be mixed; the message names the cause.
            ShardError: there are no shards, or one is damaged.
            TypeError: there is no argument of this name.
        """
        super().__init__()
        batch_size = None if batch_size is None else whole_number("batch_size", batch_size, least=1)
        lanes, seed, epoch = (
            whole_number("lanes", lanes, least=1),
            whole_number("seed", seed),
            whole_number("epoch", epoch),
        )
        if uneven not in _UNEVEN:
            raise UserError(f"uneven is 'drop' or 'repeat', got {uneven!r:.40}")
        if (rank is None) != (world_size is None):
            raise UserError("rank and world_size go together: give both or neither")
        if isinstance(paths, Mapping):
            check_weights(paths)
        self._source = Source(list(paths) if isinstance(paths, Mapping) else paths, **content)
        self._shares: Shares | None = None
        if isinstance(paths, Mapping):
            self._shares = Shares.of_weights(list(paths.values()), lanes)
            self._source.make_mixture()
        self._batch_size, self._drop_last, self._uneven = batch_size, drop_last, uneven
        self._shuffle, self._seed, self._lanes = shuffle, seed, lanes
        self._given = None
        if rank is not None and world_size is not None:
            self._given = whole_number("rank", rank), whole_number("world_size", world_size, least=1)
        self._progress = Progress(epoch, self.num_samples)
        self._check_ranks()

    def __repr__(self) -> str:
        units, left_out = self._source.units, self._source.units.num_left_out
        what = "clips" if self._source.sequence is None else f"sequences of {self._source.sequence} clips"
        more = f", {left_out:,} clips in none" if left_out else ""
        return f"TokenShards({units.atoms.num_units:,} {what} in {len(self._source.catalog.paths):,} shards{more})"

    def __len__(self) -> int:
        """Number of batches of this rank in a whole epoch; of clips or sequences without a batch size."""
        _, world_size = self._ranks()
        return num_steps(
            self._order(),
            batch_size=self._batch_size or 1,
            world_size=world_size,
            uneven=self._uneven,
            drop_last=self._drop_last,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_given": self._ranks()}  # a process that is spawned knows no torch.distributed

    @property
    def num_samples(self) -> int:
        """Clips, or sequences, of an epoch of all ranks."""
        return len(self._source)

    @property
    def provenance(self) -> Provenance:
        """Tokenizer, weights, settings and versions of the first shard."""
        return self._source.catalog.provenance

    @property
    def epoch(self) -> int:
        """Number of the epoch."""
        return self._progress.epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; another one than now starts at its first batch."""
        if epoch != self._progress.epoch:
            self._progress.begin(whole_number("epoch", epoch))

    def __iter__(self) -> Iterator[Batch]:
        """Batches of this rank, and of this loader worker, in order.

        Raises:
            UserError: there are more ranks than clips.
            ShardError: a shard is damaged; storage.StorageError: the storage failed.
        """
        worker = get_worker_info()
        is_exact = self._batch_size is not None or worker is None or worker.num_workers == 1
        for _, _, batch in self.turns(cycle=None, parts=1):
            if not is_exact:
                del batch[POSITION]
            yield batch

    def turns(self, *, cycle: int | None, parts: int) -> Iterator[tuple[int, int, Batch]]:
        """Batches of this rank, and of this loader worker, in order, by turns of the workers.

        Args:
            cycle: positions of a cycle; see `order.turns`.
            parts: parts of a cycle.

        Yields:
            The number of the turn, units of the epoch that are consumed after the batch, and the batch.

        Raises:
            UserError, ShardError, storage.StorageError: as iterating does.
        """
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        position = self._progress.enter()
        rank, world_size = self._ranks()
        order, noise = self._order(), (self._seed, self._progress.epoch)
        turn_of: deque[int] = deque()

        def plans() -> Iterator[Plan]:
            all_steps = steps(
                order,
                position,
                batch_size=self._batch_size or 1,
                rank=rank,
                world_size=world_size,
                uneven=self._uneven,
                drop_last=self._drop_last,
            )
            for turn, step in turns(all_steps, cycle=cycle, parts=parts):
                if turn % count == number:
                    turn_of.append(turn)
                    block = order.block_end(min(step.stop, step.end) - 1)
                    yield Plan(positions(order, step), noise, step.end, step.stop, block)

        for plan, batch in ReadAhead(self._source, plans()):
            if worker is None:
                self._progress.position = plan.mark
            found = batch if self._batch_size is not None else {k: v[0] for k, v in batch.items()}
            yield turn_of.popleft(), plan.mark, {**found, POSITION: plan.mark}

    def state_dict(self, batch: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """State after the last batch: one number, and a digest of the dataset.

        Args:
            batch: the last batch that was used. Needed where a `DataLoader` with workers reads this dataset, as workers
                are ahead of the training loop; `loader` needs none.

        Raises:
            UserError: the dataset is read by workers, and no batch is given.
        """
        if batch is not None:
            if POSITION not in batch:
                raise UserError(
                    "the batch has no position: give batch_size= to TokenShards, and none to the DataLoader"
                )
            self._progress.position = int(batch[POSITION])
        elif self._progress.is_read_by_workers:
            raise UserError(
                "loader workers read this dataset, ahead of the training loop: take dataset.loader(num_workers=...), "
                "or call state_dict(batch) with the last batch that was used"
            )
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {"samples": self._progress.samples, "dataset": self._digest()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken, perhaps with other ranks, workers and batches.

        Raises:
            UserError: the state is of another dataset or order, or is none.
        """
        try:
            samples, digest = whole_number("samples", state["samples"]), str(state["dataset"])
        except (KeyError, TypeError, UserError) as error:
            raise UserError(f"this is no state of TokenShards: {state!r:.200}") from error
        theirs, ours = (text.partition("-") for text in (digest, self._digest()))
        if theirs[0] not in (ours[0], self._source.digest_before):  # the latter in states of earlier versions
            raise UserError(
                f"the state is of another dataset ({theirs[0]:.40}, this one is {ours[0]}): the shards and their "
                "settings, where, sequence and stride must be those of the run that wrote it"
            )
        if theirs[2] != ours[2]:
            raise UserError(
                "the state is of another order: shuffle, seed, lanes and weights must be those of the run that wrote it"
            )
        if samples < 0:
            raise UserError(f"the state counts {samples} samples")
        self._progress.begin_at(samples)

    def loader(self, num_workers: int = 0, **options: Any) -> TokenLoader:
        """A loader over this dataset that counts epochs and knows its state.

        Args:
            num_workers: processes that read; 0 reads on threads of this process, which takes the least CPU time.
            options: further arguments of `torch.utils.data.DataLoader`, such as ``pin_memory``.
        """
        return TokenLoader(self, num_workers, options)

    @property
    def batch_bytes(self) -> int:
        """Bytes of a batch, at most."""
        return self._source.row_bytes * min(self._batch_size or 1, self.num_samples)

    def _turns_of(self, num_workers: int, num_bytes: int) -> tuple[int, int]:
        """Cycle and parts for `turns` of workers, so that they share out row groups and send large messages.

        Shuffled, each worker has its own lanes: a part of each cycle, or every n-th part where it is too large.

        Args:
            num_workers: number of workers.
            num_bytes: largest size of a message of several batches.
        """
        step = (self._batch_size or 1) * self._ranks()[1]
        most = min(num_bytes // self.batch_bytes, len(self) // (4 * num_workers))
        cycle = self._order().cycle
        num_steps = cycle // step
        if not self._shuffle or num_steps < num_workers:
            together = max(1, min(most, 1 if self._shuffle else _TOGETHER))
            return step * together, 1
        rounds = min(-(-num_steps // (num_workers * max(1, most))), num_steps // num_workers)
        return cycle, num_workers * rounds

    def _order(self) -> Order | Mixture:
        atoms = self._source.units.atoms
        if self._shares is not None:
            return Mixture(
                atoms,
                self._source.catalog.shard_output[atoms.shard],
                self._shares,
                shuffle=self._shuffle,
                seed=self._seed,
                epoch=self.epoch,
                lanes=self._lanes,
            )
        return Order(atoms, shuffle=self._shuffle, seed=self._seed, epoch=self.epoch, lanes=self._lanes)

    def _digest(self) -> str:
        seed, lanes = (self._seed, self._lanes) if self._shuffle else ("", "")
        text = f"{ORDER_VERSION}|{self._shuffle}|{seed}|{lanes}"
        if self._shares is not None:
            text += f"|{self._seed}|{self._shares.slots}"
        return f"{self._source.digest}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"

    def _ranks(self) -> tuple[int, int]:
        if self._given is not None:
            return self._given
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size())
            self._check_ranks(*ranks)
            return ranks
        return 0, 1

    def _check_ranks(self, *ranks: int) -> None:
        rank, world_size = ranks or self._given or (0, 1)
        if not 0 <= rank < world_size:
            raise UserError(f"rank must be from 0 to world_size - 1, got {rank} of {world_size}")
        if world_size > self.num_samples:
            raise UserError(f"{world_size} ranks cannot share {self.num_samples} clips or sequences: take fewer ranks")


class TokenLoader:
    """Iterates over the epochs of a `TokenShards`; its state is that of the batches it has given."""

    def __init__(self, dataset: TokenShards, num_workers: int, options: Mapping[str, Any]) -> None:
        """Wrap a dataset; see `TokenShards.loader`."""
        num_workers = whole_number("num_workers", num_workers, least=0)
        if dataset._batch_size is None and num_workers > 1:
            raise UserError("give batch_size= to TokenShards: several workers cannot share out single clips in order")
        self._dataset = dataset
        self._num_workers = num_workers
        self._options = {"batch_size": None, **options}
        for name in ("batch_size", "drop_last", "shuffle"):
            if self._options.get(name) not in (None, False):
                raise UserError(f"give {name}= to TokenShards instead of the loader")
        if not self._options.get("in_order", True):
            raise UserError("in_order=False would lose the order, and with it the state: leave it out")

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return len(self._dataset)

    def __iter__(self) -> Iterator[Batch]:
        """The rest of the epoch. When it is over, the next iteration is the next epoch."""
        progress = self._dataset._progress
        # an epoch whose last batch was used is over, also where its loop was left at that batch
        progress.begin_at(progress.samples)
        for mark, batch in self._sent() if self._num_workers else self._made():
            progress.position = mark
            yield batch
        progress.begin(progress.epoch + 1)

    def _made(self) -> Iterator[tuple[int, Batch]]:
        """Batches that this process makes."""
        options = dict(self._options)
        convert = options.pop("collate_fn", None)

        def marked(batch: Any) -> tuple[int, Any]:
            return int(batch[POSITION]), batch if convert is None else convert(batch)

        yield from DataLoader(cast("Dataset[Any]", self._dataset), collate_fn=marked, **options)

    def _sent(self) -> Iterator[tuple[int, Batch]]:
        """Batches that workers make; they come through shared memory of their own."""
        options = dict(self._options)
        convert, pin = options.pop("collate_fn", None), options.pop("pin_memory", False) and torch.cuda.is_available()
        dataset = self._dataset
        ahead = options.get("prefetch_factor") or _AHEAD
        cycle, parts = dataset._turns_of(self._num_workers, message_bytes(self._num_workers, ahead))
        most = -(-cycle // parts // (dataset._batch_size or 1) // dataset._ranks()[1]) + 1
        slots = Slots(
            partial(dataset.turns, cycle=cycle, parts=parts),
            num_workers=self._num_workers,
            ahead=ahead,
            num_bytes=dataset.batch_bytes * most,
            convert=convert,
        )
        loader: Any = DataLoader(
            cast("Dataset[Any]", slots), num_workers=self._num_workers, collate_fn=_unchanged, **options
        )
        for sent in loader:
            yield from slots.take(sent, pin=pin)

    def state_dict(self) -> dict[str, Any]:
        """State after the last batch that was given."""
        return self._dataset._state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a state was taken; see `TokenShards.load_state_dict`."""
        self._dataset.load_state_dict(state)


def _unchanged(batch: Any) -> Any:
    return batch
