"""Deaths while a run goes on, in a real Ray: of nodes, encoders and decoders; and clusters that cannot be joined."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import ray
from ray.actor import ActorHandle
from ray.cluster_utils import Cluster as RayCluster
from ray.data import Dataset
from ray.exceptions import RayTaskError

from tests.support.cli import tokenize
from tests.support.encoding import clip_spec, decoded_row, encoder_spec
from tests.support.held_back import held_back
from tests.support.outputs import PROVENANCE
from tests.support.processes import (
    COMMITTED_AT_ONCE,
    DECODING,
    ENCODING,
    RUN,
    busy_with,
    inputs,
    is_held_up,
    is_under_way,
    kill_one,
    only_the_text_is_rejected,
    started,
    until,
)
from tests.support.shards import Tokens, tokens_by_clip
from vidshard.jobs.runtime.errors import cause_of
from vidshard.pipeline.attempts import MAX_ATTEMPTS, start_attempts
from vidshard.pipeline.decode_stage import SpanDecoder
from vidshard.pipeline.encode_stage import EncoderSpec
from vidshard.pipeline.flow import EncoderActor, build_flow
from vidshard.pipeline.node_writers import Coordinator
from vidshard.pipeline.output.committed import committed_spans
from vidshard.pipeline.output.lease import Lease
from vidshard.pipeline.output.shard_writer import ShardSettings
from vidshard.pipeline.resources import StageResources
from vidshard.pipeline.rows import DECODED_ON, WORK_SCHEMA
from vidshard.schemas.errors import EXIT_AGAIN, EXIT_REFUSED


@pytest.mark.slow
@pytest.mark.parametrize("work", [ENCODING, DECODING])
def test_a_killed_worker_costs_no_clip(many_spans: Path, undisturbed: Tokens, tmp_path: Path, work: str) -> None:
    out = tmp_path / "tokens"
    with (
        held_back(many_spans / "2.mp4", out) as held,
        started(*inputs(many_spans, held), "--out", out, *RUN, *COMMITTED_AT_ONCE) as process,
    ):
        until(process, lambda: is_under_way(out) and is_held_up(process, held))
        if work == ENCODING:
            held.let_go()  # or it might have nothing to do
        kill_one(process, work)
        assert len(committed_spans(str(out))) < len(undisturbed)
        held.let_go()
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert tokens_by_clip(out) == undisturbed
    assert only_the_text_is_rejected(out)


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    """A head without CPUs for the driver; Ray's own settings, so that a lost node is noticed as late as anywhere."""
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_a_lost_node_costs_no_clip(many_spans: Path, undisturbed: Tokens, tmp_path: Path, cluster: RayCluster) -> None:
    out = tmp_path / "tokens"
    node = cluster.add_node(num_cpus=2)  # all decoders, the encoder and all blocks are there
    arguments: tuple[str | Path, ...] = ("--out", out, *RUN, *COMMITTED_AT_ONCE, "--ray-address", cluster.address)
    with held_back(many_spans / "2.mp4", out) as held, started(*inputs(many_spans, held), *arguments) as process:
        until(process, lambda: is_under_way(out) and held.is_reached)
        cluster.remove_node(node, allow_graceful=False)
        assert len(committed_spans(str(out))) < len(undisturbed)
        cluster.add_node(num_cpus=2)
        held.let_go()
        printed, _ = process.communicate(timeout=400)
    assert process.returncode == 0, printed
    assert tokens_by_clip(out) == undisturbed
    assert only_the_text_is_rejected(out)


@pytest.mark.slow
def test_an_encoder_that_always_dies_ends_the_run_and_the_same_command_goes_on_later(
    many_spans: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    # frames so large that a batch takes seconds: it is begun, and then killed
    arguments: tuple[str | Path, ...] = (many_spans / "0.mp4", "--out", out, *RUN, *COMMITTED_AT_ONCE, "--size", "512")
    with started(*arguments) as process:
        until(process, lambda: is_under_way(out))
        since: dict[int, float] = {}
        killed = 0
        while process.poll() is None:
            busy = busy_with(process.pid, ENCODING)
            since = {number: since.get(number, time.monotonic()) for number in busy}
            for number in [number for number, moment in since.items() if time.monotonic() - moment > 1]:
                os.kill(number, signal.SIGKILL)
                killed += 1
                del since[number]
        printed, _ = process.communicate()
    assert process.returncode == 1, printed
    assert f"the encoder's process died {MAX_ATTEMPTS} times at span" in printed
    assert "what is committed is valid" in printed
    assert "Traceback" not in printed
    assert killed >= MAX_ATTEMPTS
    assert 0 < len(tokens_by_clip(out)) < 12
    with started(*arguments) as process:
        printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert len(tokens_by_clip(out)) == 12


def test_a_cluster_that_is_not_there_is_named(good_videos: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
    refused = refusal(
        good_videos / "a.mp4", "--out", tmp_path / "tokens", *RUN, "--ray-address", nobody, code=EXIT_AGAIN
    )
    assert f"error: cannot join a Ray cluster at {nobody}: nothing answers there ([Errno 111]" in refused


def test_something_else_that_listens_is_not_waited_for_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        soon = f"""
from vidshard.jobs.runtime import cluster
cluster._JOINING_SECONDS = 1.0
with cluster.ray_cluster(address="{address}", object_store_bytes=None, verbose=False):
    pass
"""
        ended = subprocess.run([sys.executable, "-c", soon], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(f"error: no Ray cluster answered at {address} in 1 s, though something listens: ")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_cluster_that_lets_nobody_in_is_named(
    good_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    locked = ray.get_runtime_context().gcs_address
    refused = refusal(good_videos / "a.mp4", "--out", tmp_path / "tokens", *RUN, "--ray-address", locked)
    assert f"error: cannot join a Ray cluster at {locked}: AuthenticationError: RPC error: Inval" in refused


def refusal(*arguments: str | Path, code: int = EXIT_REFUSED) -> str:
    """Output of a command that cannot be carried out."""
    with started(*arguments) as process:
        printed, _ = process.communicate(timeout=120)
    assert process.returncode == code, printed
    assert "Traceback" not in printed
    return printed


@pytest.mark.usefixtures("ray_session")
def test_attempts_that_came_to_their_end_do_not_count() -> None:
    rows = decoded_row(0, clip_spec(32), 1)
    rows = rows.append_column(DECODED_ON, pa.array(["a node"]))
    attempts = start_attempts()
    encode = EncoderActor(encoder_spec(1), attempts)
    for _ in range(MAX_ATTEMPTS + 1):
        encode(rows)
    span = rows["span_id"][0].as_py()
    for _ in range(MAX_ATTEMPTS - 1):
        ray.get(attempts.begin.remote(span))
    encode(rows)
    for _ in range(MAX_ATTEMPTS):
        ray.get(attempts.begin.remote(span))
    with pytest.raises(RuntimeError, match=rf"{MAX_ATTEMPTS} times at span {span}, of video https://host/0\.mp4: "):
        encode(rows)


def flow_of_one_row(encoder: EncoderSpec, coordinator: ActorHandle | None = None) -> Dataset:
    """Flow over a row whose video nobody tries to reach for long."""
    spec = clip_spec(32)
    plan = decoded_row(0, spec, 1).select(WORK_SCHEMA.names)
    nowhere = pa.array(["/nowhere/0.mp4"], plan.schema.field("uri").type)
    plan = plan.set_column(plan.schema.get_field_index("uri"), "uri", nowhere)
    resources = StageResources(
        encode_workers=1, gpus_per_worker=0, cpus_per_worker=1, decode_workers=1, rows_per_task=1, rows_per_batch=1
    )
    decoder = SpanDecoder(spec=spec, max_clips=4, clips_per_pass=4)
    return build_flow(plan, decoder=decoder, encoder=encoder, resources=resources, coordinator=coordinator)


@pytest.mark.usefixtures("ray_session")
def test_attempts_of_an_abandoned_pass_do_not_count_in_the_next_one() -> None:
    settings = ShardSettings(out="/nowhere", buckets=(), provenance=PROVENANCE, shard_bytes=1, commit_seconds=1)
    coordinator = ray.remote(Coordinator).options(num_cpus=0).remote(settings)
    assert [ray.get(coordinator.begin.remote("span")) for _ in range(2)] == [1, 2]
    flow_of_one_row(encoder_spec(1), coordinator)
    assert ray.get(coordinator.begin.remote("span")) == 1


@pytest.mark.usefixtures("ray_session")
def test_weights_that_are_not_those_of_the_run_end_it_with_their_own_message() -> None:
    encoder = replace(encoder_spec(1), source=replace(encoder_spec(1).source, sha256="0" * 64))
    flow = flow_of_one_row(encoder)
    with pytest.raises(RayTaskError) as caught:
        list(flow.iter_batches(batch_format="pyarrow", batch_size=None))
    assert cause_of(caught.value).startswith("the weights in memory are not those expected")


@pytest.mark.deaths
@pytest.mark.parametrize("killed", [pytest.param("raylet", marks=pytest.mark.slow), "gcs_server"])
def test_the_death_of_a_joined_clusters_process_ends_the_run_with_a_remedy_and_another_cluster_goes_on(
    many_spans: Path, undisturbed: Tokens, tmp_path: Path, killed: str
) -> None:
    out = tmp_path / "tokens"
    joined = RayCluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        arguments: tuple[str | Path, ...] = ("--out", out, *RUN, *COMMITTED_AT_ONCE, "--ray-address", joined.address)
        with held_back(many_spans / "2.mp4", out) as held, started(*inputs(many_spans, held), *arguments) as process:
            until(process, lambda: is_under_way(out) and held.is_reached)
            [info] = joined.head_node.all_processes[killed]
            os.kill(info.process.pid, signal.SIGKILL)
            printed, _ = process.communicate(timeout=50)  # Ray itself takes 61 s to notice
            assert process.returncode == EXIT_AGAIN, printed
            words = " ".join(printed.split())
            assert f"the run stopped: Ray's process {killed}" in words
            assert (
                "Start the cluster again, or give the address of another one, and run the same command again" in words
            )
            assert "Traceback" not in printed
            assert "[state-dump]" not in printed
            assert 0 < len(tokens_by_clip(out)) < len(undisturbed)
            Lease.acquire(str(out), ttl_seconds=600, on_wait=lambda text: pytest.fail(text)).release()
            held.let_go()
            finished = tokenize(*inputs(many_spans, held), "--out", out, *RUN)
    finally:
        joined.shutdown()
    assert finished.exit_code == 0, finished.output
    assert tokens_by_clip(out) == undisturbed
