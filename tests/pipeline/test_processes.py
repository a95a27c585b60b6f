"""Processes of a run: each one loads no library that its work does not need, as each has hundreds of megabytes."""

from __future__ import annotations

import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import pytest

from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.schemas.runs import TokenizeRun


def test_what_a_writer_is_sent_loads_no_torch(tmp_path: Path) -> None:
    resolved = ResolvedRun.of(TokenizeRun(inputs=[str(tmp_path)], out=str(tmp_path / "out")))
    sent = pickle.dumps(resolved.provenance)
    words = [str(argument) for _, argument, _ in pickletools.genops(sent) if argument is not None]
    assert "vidshard.schemas.tokens" in words
    assert not [word for word in words if word.startswith("torch.")]


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("vidshard.pipeline.node_writers", {"torch", "av"}),
        ("vidshard.pipeline.attempts", {"torch", "av"}),
        ("vidshard.pipeline.decode_stage", {"torch"}),
        ("vidshard.jobs.training.worker", {"sympy", "torch.distributed.fsdp", "tensorboard", "boto3", "lpips"}),
    ],
)
def test_the_processes_of_a_run_load_only_what_they_need(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; sys.exit(', '.join({unwanted} & sys.modules.keys()) or None)"
    process = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
