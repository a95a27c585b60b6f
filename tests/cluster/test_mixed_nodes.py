"""A run on nodes of several kinds: two kinds of GPUs without CPUs for decoding, and CPUs without GPUs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch
from ray.cluster_utils import Cluster as RayCluster

from tests.support.killed_runs import SlowDecoder, SlowEncoder, span_of
from tests.support.outputs import listed_spans
from vidshard.jobs.runtime.cluster import ray_cluster
from vidshard.jobs.runtime.executor import ClusterExecutor
from vidshard.jobs.tokenization.collect import SpanCounter
from vidshard.jobs.tokenization.resources import plan_resources
from vidshard.pipeline.output.commit import Committer, SpanAccount
from vidshard.pipeline.output.shard_writer import ShardSettings
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.rows import WORK_NUMBER, WORK_SCHEMA, span_row
from vidshard.schemas.runs import TokenizeRun

NUM_SPANS = 48
KINDS = {"H200", "L4"}


@dataclass(frozen=True)
class NotedEncoder(SlowEncoder):
    """Encoder that leaves a file with the name of its kind of node, and waits for one of the other kind."""

    folder: str

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Encode rows, and note where."""
        node = ray.get_runtime_context().get_node_id()
        [kind] = [
            name.partition(":")[2]
            for each in ray.nodes()
            if each["NodeID"] == node
            for name in each["Resources"]
            if name.startswith("accelerator_type:")
        ]
        (Path(self.folder) / kind).touch()
        while len(list(Path(self.folder).iterdir())) < len(KINDS):  # an encoder that starts late gets the others' queue
            time.sleep(0.05)
        return super().__call__(rows)

    def encoder(self) -> NotedEncoder:
        """Make an encoder."""
        return self


@pytest.fixture
def mixed() -> Iterator[str]:
    """Address of a Ray with one GPU of a kind, two of another, and a node of CPUs alone."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    memory = {"object_store_memory": 100 << 20}
    cluster.add_node(num_cpus=0, num_gpus=1, resources={"accelerator_type:H200": 1}, **memory)
    cluster.add_node(num_cpus=0, num_gpus=2, resources={"accelerator_type:L4": 1}, **memory)
    cluster.add_node(num_cpus=2, **memory)
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
def test_gpus_of_two_kinds_share_the_work_and_frames_from_nodes_without_gpus_are_counted(
    mixed: str, tmp_path: Path
) -> None:
    given = {"inputs": ["-"], "out": str(tmp_path / "out"), "tokenizer": "tiny", "fps": 8, "frames": 17, "size": 64}
    run = TokenizeRun.model_validate(given)
    resolved = ResolvedRun.of(run).placed(device="cuda", precision="float32")
    spec = resolved.largest
    rows = pa.Table.from_pylist([span_row(span_of(n), spec, None) for n in range(NUM_SPANS)], schema=WORK_SCHEMA)
    rows = rows.append_column(WORK_NUMBER, pa.array(range(NUM_SPANS), pa.int64()))
    settings = ShardSettings(
        out=run.out,
        buckets=((spec, resolved.payload),),
        provenance=resolved.provenance,
        shard_bytes=run.shard_size,
        commit_seconds=60,
    )
    account, counter = SpanAccount(NUM_SPANS), SpanCounter(is_awaited=np.ones(NUM_SPANS, np.bool_))
    notes = tmp_path / "notes"
    notes.mkdir()
    with ray_cluster(address=mixed, object_store_bytes=None, verbose=False) as cluster:
        executor = ClusterExecutor(cluster=cluster)
        resources, _ = plan_resources(resolved, NUM_SPANS, 1.0, executor)
        assert (resources.encode_workers, resources.cpus_per_worker) == (3, 0)
        encoder: Any = NotedEncoder(resolved.payload, str(notes))
        decoder: Any = SlowDecoder(spec)
        committer = Committer(settings, executor.open_writers(settings), account)
        for receipts in executor.run(
            rows, decoder=decoder, encoder=encoder, resources=resources, writers=committer.writers
        ):
            counter.take(receipts)
        committer.finish()
        committer.close()
    assert account.num_open == 0
    assert len(listed_spans(run.out)) == NUM_SPANS
    assert {path.name for path in notes.iterdir()} == KINDS
    assert counter.frame_bytes == counter.moved_frame_bytes == NUM_SPANS * spec.clip_bytes
