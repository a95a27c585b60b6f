"""Local flow: the stages of a run in one process, without Ray, for debugging, small machines and most tests.

It calls the same callables as ``pipeline.flow``, one after the other. Videos are still decoded in the sandbox.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pyarrow as pa

from vidshard.pipeline import storage
from vidshard.pipeline.encode_stage import ClipEncoder, EncoderSpec


def run_locally(
    work: str | pa.Table,
    *,
    decoder: Callable[[pa.Table], Iterable[pa.Table]],
    encoder: EncoderSpec,
    rows_per_task: int,
    rows_per_batch: int,
) -> Iterator[pa.Table]:
    """Decode and encode a work list; yields encoded rows as they are finished.

    Args:
        work: path of its Parquet file, or its rows.
        decoder: decode stage.
        encoder: settings of the encoder.
        rows_per_task: spans per call of the decoder.
        rows_per_batch: spans per call of the encoder.
    """
    encode = ClipEncoder(encoder)
    waiting: list[pa.Table] = []
    for rows in _slices(work, rows_per_task):
        for decoded in decoder(rows):
            waiting.append(decoded)
            if len(waiting) >= rows_per_batch:
                yield encode(pa.concat_tables(waiting))
                waiting = []
    if waiting:
        yield encode(pa.concat_tables(waiting))


def _slices(work: str | pa.Table, size: int) -> Iterator[pa.Table]:
    for table in [work] if isinstance(work, pa.Table) else _row_groups(work):
        for start in range(0, table.num_rows, size):
            yield table.slice(start, size).combine_chunks()


def _row_groups(path: str) -> Iterator[pa.Table]:
    with storage.open_binary(path) as file:
        parquet = storage.ParquetFile(file)
        for group in range(parquet.num_row_groups):
            yield parquet.read_row_group(group)
