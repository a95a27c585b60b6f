"""A function run by two processes that form a group of training workers."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessExitedException, spawn


def in_two_processes(work: Callable[[int, str], None], folder: Path) -> None:
    try:
        spawn(joined, (work, str(folder)), nprocs=2)  # type: ignore[no-untyped-call]
    except ProcessExitedException as error:
        said = "\n".join(path.read_text() for path in sorted(folder.glob("stderr*")))
        raise AssertionError(f"{error}:\n{said}") from None


def joined(rank: int, work: Callable[[int, str], None], folder: str) -> None:
    with open(f"{folder}/stderr{rank}", "w") as stderr:
        os.dup2(stderr.fileno(), sys.stderr.fileno())
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    work(rank, folder)
    dist.barrier()
    dist.destroy_process_group()
    # Not through the interpreter's end: gloo's threads live as long as the cycles of DDP do, and one that lets go of a
    # tensor while the interpreter is taken down aborts the process (https://github.com/pytorch/pytorch/pull/179291).
    os._exit(0)
