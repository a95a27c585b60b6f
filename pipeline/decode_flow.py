"""Flow of `vidshard decode --all`: the Ray Data graph from the pieces to decode to the driver, which writes the files.

    pieces ──▶ DecoderActor ──▶ mp4 files for the driver
    row each    actor pool       one writer, atomically

A row is a piece, and comes back with its file or with the reason why there is none.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence

import pyarrow as pa
import ray
from ray.actor import ActorHandle
from ray.data import ActorPoolStrategy, DataContext

from vidshard.pipeline.attempts import MAX_ATTEMPTS, start_attempts
from vidshard.pipeline.flow import ENCODER_ENVIRONMENT
from vidshard.pipeline.stitching import Decoded, Piece, PieceDecoder

_PIECE = pa.schema([pa.field("name", pa.string()), pa.field("piece", pa.large_binary())])
_DECODED = pa.schema([pa.field("decoded", pa.large_binary())])


class DecoderActor:
    """`PieceDecoder` as a Ray actor, with a limit on the attempts at a piece that kills its process."""

    def __init__(self, decoder: PieceDecoder, attempts: ActorHandle) -> None:
        self._decoder, self._attempts = decoder, attempts

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Decode pieces; a failure is a value in its row."""
        found: list[bytes] = []
        for row in rows.to_pylist():
            attempt = ray.get(self._attempts.begin.remote(row["name"]))
            if attempt > MAX_ATTEMPTS:
                why = f"the decoding process died {MAX_ATTEMPTS} times at it: too little memory, or a fault of a GPU"
                decoded = Decoded(name=row["name"], failure=why)
            else:
                decoded = self._decoder(pickle.loads(row["piece"]))  # noqa: S301  made by this run's driver
            found.append(pickle.dumps(decoded))
            self._attempts.end.remote(row["name"])
        return pa.table({"decoded": found}, schema=_DECODED)


def decode_on_ray(
    pieces: Sequence[Piece], decoder: PieceDecoder, *, workers: int, cpus_per_worker: float, gpus_per_worker: float
) -> Iterator[Decoded]:
    """Decode pieces on a pool of actors; results come in any order."""
    DataContext.get_current().raise_original_map_exception = True
    attempts = start_attempts()
    rows = [
        pa.table({"name": [piece.name], "piece": [pickle.dumps(piece)]}, schema=_PIECE) for piece in pieces
    ]  # a block each, so that one worker does not get them all
    dataset = ray.data.from_arrow(rows).map_batches(
        DecoderActor,
        fn_constructor_args=(decoder, attempts),
        batch_format="pyarrow",
        batch_size=1,
        num_cpus=cpus_per_worker,
        num_gpus=gpus_per_worker or None,
        compute=ActorPoolStrategy(size=workers),
        runtime_env={"env_vars": ENCODER_ENVIRONMENT},
        max_restarts=-1,
        max_task_retries=-1,
    )
    for table in dataset.iter_batches(batch_format="pyarrow", batch_size=None, prefetch_batches=0):
        for data in table["decoded"].to_pylist():
            yield pickle.loads(data)  # noqa: S301  made by this run's workers
