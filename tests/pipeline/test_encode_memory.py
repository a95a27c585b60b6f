"""The encoder with too little memory: smaller batches, the same tokens, and rejections of what cannot fit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from tests.support.encoding import (
    LARGE,
    clip_spec,
    decoded_row,
    encoder_spec,
    rows_of_two_sizes,
)
from vidshard.pipeline.devices import is_out_of_memory
from vidshard.pipeline.encode_stage import ClipEncoder
from vidshard.schemas.rejections import REMEDIES, Reason


def outcome(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.select(["span_id", "clips", "rejection", "tokens"]).to_pylist()
    return rows


def status(name: str) -> int:
    """A figure of this process in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(f"{name}:"))


def encode(batch_size: int, share: float, continuous: bool) -> None:
    """Encode with memory for ``share`` large clips at once beyond what the process has, and print what comes out."""
    import resource

    rows = rows_of_two_sizes(continuous=continuous)
    encoder = ClipEncoder(encoder_spec(1, continuous=continuous))
    one_row = rows.slice(0, 1)  # of two large clips, one after the other
    encoder(one_row)  # libraries and threads have what they keep
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    before = status("VmRSS")
    encoder(one_row)
    of_one = status("VmHWM") - before
    encoder = ClipEncoder(encoder_spec(batch_size, continuous=continuous))
    encoder(rows.slice(4))
    limit = status("VmSize") + int(share * of_one)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    encoded = encoder(rows)
    again = encoder(rows)
    assert encoded["tokens"] == again["tokens"]
    print(json.dumps(outcome(encoded)), flush=True)


MORE_THAN_TWO, LESS_THAN_ONE = 2.5, 0.4
"""Large clips at once that a process has memory for."""


def main(folder: Path) -> None:
    """Encode in a process for each share of memory and each mode, forked before PyTorch has threads."""
    for share in (MORE_THAN_TWO, LESS_THAN_ONE):
        for continuous in (False, True):
            pid = os.fork()
            if not pid:
                for number, name in ((1, "printed"), (2, "log")):
                    with open(folder / f"{name}-{share}-{continuous}", "w") as file:
                        os.dup2(file.fileno(), number)
                encode(8, share, continuous)
                os._exit(0)
            _, code = os.waitpid(pid, 0)
            assert code == 0, (folder / f"log-{share}-{continuous}").read_text()


@pytest.fixture(scope="module")
def with_little_memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the processes of `main` printed, and their logs."""
    folder = tmp_path_factory.mktemp("encoded")
    # freed memory goes back at once, so that the limit is one of what is in use
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "1000000",
        "MALLOC_TRIM_THRESHOLD_": "1000000",
        "MALLOC_ARENA_MAX": "1",
    }
    command = [sys.executable, "-m", "tests.pipeline.test_encode_memory", str(folder)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return folder


def encoded_with_little_memory(folder: Path, share: float, *, continuous: bool) -> tuple[list[dict[str, Any]], str]:
    """Output and log of a process that encodes with little memory."""
    printed, log = (folder / f"{name}-{share}-{continuous}" for name in ("printed", "log"))
    return json.loads(printed.read_text()), log.read_text()


@pytest.fixture(scope="module", params=[False, True], ids=["clips", "streams"])
def continuous(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def undisturbed(continuous: bool) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    encoded = ClipEncoder(encoder_spec(8, continuous=continuous))(rows_of_two_sizes(continuous=continuous))
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = json.loads(json.dumps(outcome(encoded)))
    return rows


def test_a_batch_that_does_not_fit_is_halved_once_and_for_all_and_gives_the_same_tokens(
    with_little_memory: Path, continuous: bool, undisturbed: list[dict[str, Any]]
) -> None:
    printed, log = encoded_with_little_memory(with_little_memory, MORE_THAN_TWO, continuous=continuous)
    assert printed == undisturbed
    lines = [line for line in log.splitlines() if "out of memory" in line]
    assert 1 <= len(lines) <= 3  # 8 to 4, 2, 1, though the rows were encoded twice
    num_frames = clip_spec(LARGE, continuous=continuous).num_frames
    assert all(f"clips of {num_frames}x128x128 frames at once" in line for line in lines)  # small ones keep theirs


def test_a_clip_that_does_not_fit_by_itself_rejects_its_row_alone(
    with_little_memory: Path, continuous: bool, undisturbed: list[dict[str, Any]]
) -> None:
    printed, _ = encoded_with_little_memory(with_little_memory, LESS_THAN_ONE, continuous=continuous)
    spec = clip_spec(LARGE, continuous=continuous)
    for row, expected in zip(printed, undisturbed, strict=True):
        if row["span_id"].startswith(("video2", "video3", "video4")):
            assert row == expected
            continue
        assert row["clips"] == row["tokens"] == []
        rejection = row["rejection"]
        assert (rejection["stage"], rejection["reason"]) == ("encode", "out_of_memory")
        assert rejection["remedy"] == REMEDIES[Reason.OUT_OF_MEMORY]
        assert f"{spec.num_frames}x128x128" in rejection["detail"]
        assert "allocate" in rejection["detail"]
        assert "\n" not in rejection["detail"]
        assert rejection["span_id"] == row["span_id"]
        assert rejection["start_seconds"] == pytest.approx(float(2 * spec.clip_seconds))
        assert "secret" not in rejection["uri"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_a_shortage_of_memory_counts_as_one(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_any_other_error_ends_the_call() -> None:
    spec = encoder_spec(2)
    with pytest.raises(ValueError, match="must be divisible"):
        ClipEncoder(spec)(decoded_row(0, replace(clip_spec(LARGE), width=LARGE + 1), 1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
