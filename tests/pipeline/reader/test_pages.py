"""Payload pages: the values that Arrow reads, or None; never other values, whatever the bytes are."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vidshard.pipeline.output.parquet_footer import column_ranges
from vidshard.pipeline.reader.pages import Spare, _is_regular, decoded

DTYPES = ("uint8", "uint16", "uint32", "float16", "float32")


def made(dtype: str, rows: int, width: int, largest: int = 1 << 31) -> np.ndarray:
    random = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return random.standard_normal((rows, width)).astype(dtype)
    return random.integers(0, min(np.iinfo(dtype).max, largest), (rows, width), endpoint=True).astype(dtype)


def written(values: np.ndarray, *, null: bool = False, **options: Any) -> bytes:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    if null:
        flat = pa.array([None, *flat.to_pylist()[1:]], flat.type)
    sink = io.BytesIO()
    pq.write_table(pa.table({"more": ["x"] * len(values), "v": flat}), sink, use_dictionary=False, **options)
    return sink.getvalue()


def groups(data: bytes, dtype: str) -> list[tuple[np.ndarray | None, pa.Table]]:
    """Values decoded from each row group, and those that Arrow reads."""
    file = pq.ParquetFile(io.BytesIO(data))
    ranges = column_ranges(io.BytesIO(data), "v.list.element", file.num_row_groups)
    assert ranges is not None
    found = []
    for number in range(file.num_row_groups):
        pages = memoryview(data)[int(ranges.starts[number]) : int(ranges.stops[number])]
        rows = file.metadata.row_group(number).num_rows
        width = file.schema_arrow.field("v").type.list_size
        spare = Spare(1 << 20)
        spare.give(np.full(rows * width, 99, dtype).reshape(rows, width))  # what was there before does not matter
        mine = decoded(pages, codec=ranges.codec, dtype=dtype, num_rows=rows, width=width, spare=spare)
        found.append((mine, file.read_row_group(number, columns=["v"])))
    return found


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 40),
    width=st.integers(1, 30),
    largest=st.sampled_from([1, 255, 70_000, 1 << 31]),
    encoding=st.sampled_from(["PLAIN", "BYTE_STREAM_SPLIT"]),
    options=st.fixed_dictionaries(
        {
            "row_group_size": st.sampled_from([3, 50]),
            "compression": st.sampled_from(["zstd", "none"]),
            "data_page_size": st.sampled_from([1, 64, 1 << 20]),
            "write_batch_size": st.sampled_from([1, 7, 1024]),
            "write_page_checksum": st.booleans(),
        }
    ),
)
def test_any_values_in_our_encodings_are_those_that_arrow_reads(
    dtype: str, rows: int, width: int, largest: int, encoding: str, options: dict[str, Any]
) -> None:
    values = made(dtype, rows, width, largest)
    data = written(values, column_encoding={"v.list.element": encoding, "more": "PLAIN"}, **options)
    start = 0
    for mine, arrow in groups(data, dtype):
        assert mine is not None
        assert mine.dtype == np.dtype(dtype)
        assert np.array_equal(mine, values[start : start + len(mine)])
        assert np.array_equal(mine.reshape(-1), arrow["v"].combine_chunks().flatten().to_numpy())
        start += len(mine)
    assert start == rows


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "snappy"},
        {"use_dictionary": True},
        {"data_page_version": "2.0"},
        {"null": True},
        {"column_encoding": {"v.list.element": "DELTA_BINARY_PACKED", "more": "PLAIN"}},
        {"version": "1.0"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_other_writers_write_is_left_to_arrow(options: dict[str, Any]) -> None:
    null = options.pop("null", False)
    values = made("uint32", 20, 5)
    sink = io.BytesIO(written(values, null=null)) if null else io.BytesIO()
    if not null:
        flat = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 5)
        table = pa.table({"more": ["x"] * 20, "v": flat})
        pq.write_table(table, sink, **{"use_dictionary": False, **options})
    [(mine, arrow)] = groups(sink.getvalue(), "uint32")
    assert mine is None
    assert arrow.num_rows == 20


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 10_000), flip=st.integers(1, 255), encoding=st.sampled_from(["PLAIN", "BYTE_STREAM_SPLIT"]))
def test_no_changed_byte_of_a_page_gives_other_values(at: int, flip: int, encoding: str) -> None:
    values = made("uint16", 30, 40)
    data = written(values, write_page_checksum=True, column_encoding={"v.list.element": encoding, "more": "PLAIN"})
    ranges = column_ranges(io.BytesIO(data), "v.list.element", 1)
    assert ranges is not None
    pages = bytearray(data[int(ranges.starts[0]) : int(ranges.stops[0])])
    pages[at % len(pages)] ^= flip
    mine = decoded(memoryview(bytes(pages)), codec=ranges.codec, dtype="uint16", num_rows=30, width=40)
    assert mine is None or np.array_equal(mine, values)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(1, 50), st.integers(1, 9))
def test_any_bytes_give_none_or_values(data: bytes, rows: int, width: int) -> None:
    assert decoded(memoryview(data), codec=6, dtype="uint16", num_rows=rows, width=width) is None


def test_lists_of_other_lengths_are_noticed() -> None:
    def levels(lengths: list[int]) -> bytes:
        bits = [int(at > 0) for length in lengths for at in range(length)]
        packed = np.packbits(np.array(bits, np.uint8), bitorder="little").tobytes()
        return bytes([len(packed) << 1 | 1]) + packed

    assert _is_regular(levels([4, 4, 4]), 12, 4, 0)
    assert not _is_regular(levels([4, 5, 3]), 12, 4, 0)
    assert not _is_regular(levels([4, 4, 4]), 12, 4, 1)
    assert _is_regular(levels([3, 4])[:2], 7, 4, 1) is False


def test_a_column_is_found_in_the_footer_though_a_text_looks_like_its_path() -> None:
    flat = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(40, dtype=np.uint16)), 4)
    trap = "\x38\x01v\x04list\x07element"
    sink = io.BytesIO()
    pq.write_table(pa.table({"more": [trap] * 10, "v": flat}), sink, row_group_size=5)
    assert column_ranges(sink, "v.list.element", 2) is None


def test_spare_arrays_are_used_again_and_bounded() -> None:
    spare = Spare(max_bytes=4000)
    first = spare.take(1000, "uint16")
    spare.give(first.reshape(10, 100))
    assert spare.take(1000, "uint32") is not first, "another dtype"
    assert spare.take(999, "uint16") is not first, "another size"
    assert spare.take(1000, "uint16") is first
    assert spare.take(1000, "uint16") is not first, "it is in use"
    spare.give(first.reshape(10, 100))
    for size in (500, 1500):
        spare.give(np.empty(size, np.uint16).reshape(-1, 1))
    assert spare.take(1000, "uint16") is not first, "the oldest one is dropped"
    view = np.frombuffer(b"12345678", np.uint16)
    spare.give(view.reshape(2, 2))
    assert spare.take(4, "uint16").flags.writeable, "memory of others is left alone"
