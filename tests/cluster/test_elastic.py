"""A run on a cluster that has no GPU at first, grows and shrinks while the run goes on, and an account that closes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.node import Node
from ray.cluster_utils import Cluster as RayCluster

from tests.support.cli import vidshard_exits
from tests.support.held_back import held_back
from tests.support.processes import (
    COMMITTED_AT_ONCE,
    DECODING,
    ENCODER,
    RUN,
    SCORER,
    is_under_way,
    only_the_text_is_rejected,
    processes_below,
    read_rows,
    read_until,
    started,
    until,
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """A head for the driver alone, which notices a lost node in two seconds."""
    health = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}
    arguments = {"num_cpus": 0, "include_dashboard": False, "_system_config": health}
    cluster = RayCluster(initialize_head=True, head_node_args=arguments)
    yield cluster
    cluster.shutdown()


def is_used(raylet: int, *stages: str) -> bool:
    """Whether one of these stages of the run, or any, works on the node of this raylet."""
    titles = tuple(f"ray::{stage}" for stage in stages or (ENCODER, DECODING))
    return any(title.startswith(titles) for title in processes_below(raylet).values())


def new_nodes(cluster: RayCluster, count: int, num_cpus: int) -> list[Node]:
    """Nodes in place of those that a test before left."""
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)
    return [cluster.add_node(num_cpus=num_cpus) for _ in range(count)]


def raylet_of(node: Node) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


@pytest.mark.slow
def test_a_run_waits_for_gpus_and_its_cluster_may_grow_and_shrink(
    many_spans: Path, tmp_path: Path, cluster: RayCluster
) -> None:
    """One cluster for all of it, as its start takes most of the time."""
    out, log = tmp_path / "tokens", tmp_path / "log.json"
    joined = ("--ray-address", cluster.address)
    text = many_spans / "text.mp4"
    with started(text, "--out", tmp_path / "none", *RUN, *joined, "--wait-for-gpus", "10:00") as process:
        assert "waiting for a GPU node, for 600 s at most" in read_until(process, "waiting for a GPU node")
        first = cluster.add_node(num_cpus=2, num_gpus=1)
        printed, _ = process.communicate(timeout=200)
    assert process.returncode == 2, printed  # the GPU is only declared
    assert "has it: " in " ".join(printed.split())

    run = (*RUN, "--size", "256", "--device", "cpu", "--encode-workers", "1..", *COMMITTED_AT_ONCE)
    with (
        held_back(many_spans / "1.mp4", out) as one,
        held_back(many_spans / "2.mp4", out) as other,
        started(
            *(many_spans / "0.mp4", text, one.uri, other.uri, "--out", out, "--log-json", log),
            *(*run, *joined, "--decode-workers", "3"),  # on the first node one, beside its encoder
        ) as process,
    ):
        until(process, lambda: is_under_way(out) and (one.is_reached or other.is_reached))
        second_video, last_video = (one, other) if one.is_reached else (other, one)
        later = cluster.add_node(num_cpus=3)
        second_video.let_go()
        [raylet] = later.all_processes["raylet"]
        until(process, lambda: is_used(raylet.process.pid))
        cluster.remove_node(first, allow_graceful=False)  # with the only encoder, or one of two
        last_video.let_go()
        printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    assert len(read_rows(out)) == len(set(read_rows(out))) == 36
    assert only_the_text_is_rejected(out)
    code, said = vidshard_exits("verify", out)
    assert code == 0, said
    events = [json.loads(line) for line in log.read_text().splitlines()]
    names = [event["event"] for event in events]
    assert names.index("node_joined") < names.index("node_lost")
    assert "a node left" in printed
    assert events[-1]["exit_code"] == 0


@pytest.mark.slow
def test_encoders_give_way_where_a_lost_node_leaves_them_every_cpu(
    many_spans: Path, tmp_path: Path, cluster: RayCluster
) -> None:
    """The encoder has the CPU of one node, and decoding that of the other, which is lost."""
    out = tmp_path / "tokens"
    nodes = new_nodes(cluster, 2, num_cpus=1)
    with (
        held_back(many_spans / "2.mp4", out) as held,
        started(
            *(many_spans / "0.mp4", held.uri, "--out", out, "--device", "cpu", "--ray-address", cluster.address),
            *(*RUN, *COMMITTED_AT_ONCE),
        ) as process,
    ):
        until(process, lambda: is_under_way(out) and held.is_reached)
        [lost] = [node for node in nodes if not is_used(raylet_of(node), ENCODER)]
        cluster.remove_node(lost, allow_graceful=False)
        held.let_go()
        printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    assert "nodes left, and the encoders hold every CPU" in " ".join(printed.split())
    assert len(read_rows(out)) == len(set(read_rows(out))) == 24
    code, said = vidshard_exits("verify", out)
    assert code == 0, said


@pytest.mark.slow
def test_an_evaluation_to_which_a_lost_node_leaves_no_cpu_ends_and_goes_on_with_the_same_command(
    many_spans: Path, tmp_path: Path, cluster: RayCluster
) -> None:
    """The scorer has the CPU of one node, and decoding that of the other, which is lost."""
    out = tmp_path / "evaluation"
    nodes = new_nodes(cluster, 2, num_cpus=1)
    settings = ("--tokenizer", "tiny", "--frames", "17", "--size", "32", "--no-lpips", "--commit-clips", "1")
    with held_back(many_spans / "2.mp4", out, plan="scores") as held:  # it begins with the rejection of text.mp4
        run = (many_spans / "text.mp4", held.uri, "--out", out, *settings, "--ray-address", cluster.address)
        with started(*run, command="evaluate") as process:
            until(process, lambda: held.is_reached and any(is_used(raylet_of(node), SCORER) for node in nodes))
            [lost] = [node for node in nodes if not is_used(raylet_of(node), SCORER)]
            cluster.remove_node(lost, allow_graceful=False)
            held.let_go()
            printed, _ = process.communicate(timeout=200)
        assert process.returncode == 75, printed
        assert "nodes left, and the scorers hold every CPU" in " ".join(printed.split())
        with started(*run, command="evaluate") as process:
            printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    [row] = json.loads((out / "scores.json").read_text())["rows"]
    assert row["videos"] == 1


@pytest.mark.slow
def test_encoders_that_followed_the_cluster_give_way_where_nodes_are_lost(
    many_spans: Path, tmp_path: Path, cluster: RayCluster
) -> None:
    """Two of three nodes are lost, with an encoder at least, and the encoders start again on the third one."""
    out = tmp_path / "tokens"
    nodes = new_nodes(cluster, 3, num_cpus=2)

    def has_encoder(node: Node) -> bool:
        return is_used(raylet_of(node), ENCODER)

    with (
        held_back(many_spans / "2.mp4", out) as held,
        started(
            *(many_spans / "0.mp4", many_spans / "1.mp4", held.uri, "--out", out, "--encode-workers", "1.."),
            *("--device", "cpu", "--ray-address", cluster.address, *RUN, "--size", "384", *COMMITTED_AT_ONCE),
            *("--decode-workers", "3"),  # which wait for the video: more could leave encoders no CPU
        ) as process,
    ):
        until(process, lambda: is_under_way(out) and held.is_reached and sum(map(has_encoder, nodes)) >= 2)
        for node in sorted(nodes, key=has_encoder)[1:]:
            cluster.remove_node(node, allow_graceful=False)
        held.let_go()
        printed, _ = process.communicate(timeout=250)
    assert process.returncode == 0, printed
    assert len(read_rows(out)) == len(set(read_rows(out))) == 36
    code, said = vidshard_exits("verify", out)
    assert code == 0, said
