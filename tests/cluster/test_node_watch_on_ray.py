"""Watch of the nodes on a real Ray: each look works, a killed worker and spilling are told."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray
from rich.console import Console

from tests.support.processes import OBJECT_STORE
from vidshard.jobs.runtime.events import reported
from vidshard.jobs.runtime.node_watch import NodeWatch
from vidshard.schemas.fields import ReportSettings


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("is_own", [True, False])
def test_a_killed_worker_and_spilling_are_told(tmp_path: Path, is_own: bool) -> None:
    log, text = tmp_path / "log.json", io.StringIO()
    console = Console(file=text, width=1000)
    watch = NodeWatch(console=console, is_own=is_own)
    looks = (watch._look_at_nodes, watch._look_at_workers, watch._look_at_spilling, watch._look_at_reports)
    with reported(console, ReportSettings(log_json=str(log)), command="tokenize", out=None):
        for look in looks:
            look()  # without the net of `look`
        killed = ray.remote(max_retries=0)(lambda: os.kill(os.getpid(), signal.SIGKILL)).remote()
        with pytest.raises(ray.exceptions.WorkerCrashedError):
            ray.get(killed)
        kept = [ray.put(np.zeros(OBJECT_STORE // 8, np.uint8)) for _ in range(12)]
        for number in range(1, 100):
            watch._looks = number % 12 or 1  # each node is asked once
            for look in looks:
                look()
            is_told = "worker_lost" in log.read_text() and "write frames to disk" in text.getvalue()
            if is_told and not watch._asked:
                break
            time.sleep(0.1)  # the GCS hears of both a moment later
        del kept
    events = [json.loads(line) for line in log.read_text().splitlines()]
    [lost] = [event for event in events if event["event"] == "worker_lost"]
    assert lost["count"] == 1
    assert text.getvalue().count("Ray has begun to write frames to disk") == 1
    assert not watch._asked, "a node did not report on itself"
    assert is_own or watch._reported_nodes
