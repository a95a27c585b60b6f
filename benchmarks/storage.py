"""Bits per token or latent value in Parquet, under the encodings that Arrow offers.

    python -m benchmarks.storage [--json PATH]

Tokens are drawn uniformly from the codebook, the worst case, and from a Zipf law, as a trained tokenizer's are skewed.
Latents are normal.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import Row, report

CLIP_VALUES = 5 * 32 * 32
NUM_CLIPS = 400
ROW_GROUP = 100


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH", help="also write the figures here")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    rows: list[Row] = []
    for codebook in (4096, 32768, 262144):
        dtype = np.min_scalar_type(codebook - 1)
        shape = (NUM_CLIPS * CLIP_VALUES,)
        uniform = rng.integers(0, codebook, shape).astype(dtype)
        zipf = rng.permutation(codebook)[(rng.zipf(1.2, shape) - 1) % codebook].astype(dtype)
        rows += measure(f"tokens, uniform, {codebook}", uniform, math.log2(codebook))
        rows += measure(f"tokens, Zipf 1.2, {codebook}", zipf, entropy_bits(zipf))
    rows += measure("latents, normal, float16", rng.standard_normal(NUM_CLIPS * CLIP_VALUES).astype(np.float16), 16.0)
    report("storage", rows, arguments.json)


def entropy_bits(values: np.ndarray) -> float:
    """Compute the empirical entropy in bits per value, a lower bound for any code of single values."""
    counts = np.unique(values, return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum())


def measure(name: str, values: np.ndarray, bound: float) -> list[Row]:
    """Measure one row for each encoding that Arrow has for the type."""
    table = pa.table({"v": pa.FixedSizeListArray.from_arrays(pa.array(values), CLIP_VALUES)})
    rows: list[Row] = []
    for encoding in ("PLAIN", "DICTIONARY", "BYTE_STREAM_SPLIT", "DELTA_BINARY_PACKED"):
        if encoding == "DELTA_BINARY_PACKED" and values.dtype.kind == "f":
            continue
        chosen: dict[str, Any] = {"use_dictionary": True} if encoding == "DICTIONARY" else {"use_dictionary": False}
        if encoding not in ("PLAIN", "DICTIONARY"):
            chosen["column_encoding"] = {"v.list.element": encoding}
        sink = io.BytesIO()
        started = time.perf_counter()
        pq.write_table(table, sink, compression="zstd", row_group_size=ROW_GROUP, **chosen)
        written = time.perf_counter()
        pq.read_table(io.BytesIO(sink.getvalue()))
        read = time.perf_counter()
        rows.append(
            {
                "values": name,
                "bound_bits": round(bound, 2),
                "raw_bits": 8 * values.itemsize,
                "encoding": f"{encoding.lower()} + zstd",
                "bits": round(8 * len(sink.getvalue()) / len(values), 2),
                "write_MB_per_s": round(values.nbytes / 1e6 / (written - started)),
                "read_MB_per_s": round(values.nbytes / 1e6 / (read - written)),
            }
        )
    return rows


if __name__ == "__main__":
    main()
