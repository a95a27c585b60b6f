"""Tokenization through real Ray: the same bytes as in one process, on files and on S3, whoever does the work."""

from __future__ import annotations

import json
import re
import shutil
import threading
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
import ray
from click.testing import Result

from tests.support.cli import SMALL, tokenize, tokenize_on_ray
from tests.support.corpus import BAD_VIDEOS, GOOD_VIDEOS
from tests.support.shards import rejects_of, rows_of, tokens_by_clip
from tests.support.videos import Recipe, write_video
from vidshard.jobs.runtime.cluster import Cluster
from vidshard.jobs.runtime.executor import ClusterExecutor
from vidshard.jobs.tokenization.resources import plan_resources
from vidshard.pipeline.decode_stage import SpanDecoder
from vidshard.pipeline.flow import build_flow
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.pipeline.storage import open_binary
from vidshard.schemas.runs import TokenizeRun

pytestmark = pytest.mark.usefixtures("ray_session")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_and_rejections_are_to_the_byte_those_of_a_run_in_one_process(
    good_videos: Path, bad_videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"  # the same for both, as a shard tells where it was written
    more = ("--audit", 0.5, "--encode-threads", 1)  # scores are sums, whose last digit follows the number of threads
    on_ray, local = (
        _shards_and_rejects(tokenizing(good_videos, bad_videos, "--out", out, *SMALL, *more), out)
        for tokenizing in (tokenize_on_ray, tokenize)
    )
    assert on_ray == local


def _shards_and_rejects(result: Result, out: Path) -> list[dict[str, bytes]]:
    assert result.exit_code == 0, result.output
    assert len(rows_of(out)) == 10
    assert rejects_of(out) == BAD_VIDEOS
    found = [files(out / name) for name in ("shards", "rejects")]
    shutil.rmtree(out)
    return found


def test_a_second_run_on_ray_writes_nothing_new(good_videos: Path, bad_videos: Path, tmp_path: Path) -> None:
    command = (good_videos / "a.mp4", good_videos / "e.mp4", bad_videos, "--out", tmp_path, *SMALL)
    first = tokenize_on_ray(*command)
    assert first.exit_code == 0
    assert "GB from decoders to encoders, 0% of it over the network" in first.output
    before = [files(tmp_path / name) for name in ("shards", "rejects")]
    again = tokenize_on_ray(*command)
    assert again.exit_code == 0, again.output
    assert "finished by an earlier run" in again.output
    assert [files(tmp_path / name) for name in ("shards", "rejects")] == before


@pytest.mark.parametrize("more", [(), ("--tokenizer", "tiny_kl", "--keep-logvar")], ids=["tokens", "latents"])
def test_ray_data_reads_the_shards(good_videos: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    result = tokenize(good_videos / "a.mp4", "--out", tmp_path / "tokens", *SMALL, *more)
    assert result.exit_code == 0, result.output
    names = ["clip_id", "latents", "latents_logvar"] if more else ["clip_id", "tokens"]
    found = {row["clip_id"]: [row[name] for name in names] for row in ray_rows(tmp_path / "tokens")}
    assert found == {row["clip_id"]: [row[name] for name in names] for row in rows_of(tmp_path / "tokens")}
    assert len(found) == 2


def ray_rows(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = ray.data.read_parquet(f"{out}/shards").take_all()
    return rows


def test_videos_on_s3_become_the_same_tokens_on_s3(s3: str, output: Path, good_videos: Path) -> None:
    for name in GOOD_VIDEOS:
        with fsspec.open(f"s3://videos/flow/{name}", "wb") as file:
            file.write((good_videos / name).read_bytes())
    result = tokenize_on_ray("s3://videos/flow", "--out", "s3://videos/flow-tokens", *SMALL)
    assert result.exit_code == 0, result.output
    assert tokens_by_clip("s3://videos/flow-tokens") == tokens_by_clip(output)
    assert all(r["uri"].startswith("s3://videos/flow/") for r in rows_of("s3://videos/flow-tokens"))
    again = tokenize_on_ray("s3://videos/flow", "--out", "s3://videos/flow-tokens", *SMALL)
    assert "finished by an earlier run" in again.output
    for path in shard_paths("s3://videos/flow-tokens"):
        assert b"a-secret-that-must-not-be-seen" not in open_binary(path).read()


def test_no_credentials_of_a_video_are_stored(good_videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    handler = partial(SimpleHTTPRequestHandler, directory=str(good_videos))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = tokenize_on_ray(f"http://127.0.0.1:{server.server_port}/e.mp4?sig=SECRET", "--out", out, *SMALL)
        server.shutdown()
    assert result.exit_code == 0, result.output
    assert len(rows_of(out)) == 1
    stored = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in stored if b"SECRET" in path.read_bytes()]
    assert "SECRET" not in pq.read_table(out / "plan")["uri"][0].as_py()
    assert "SECRET" not in result.stdout  # the server here logs to stderr


@pytest.mark.parametrize(
    "workers", [("--encode-workers", "2"), ("--decode-workers", "1", "--clips-per-span", "1", "--shard-size", "1")]
)
def test_other_workers_spans_and_shards_give_the_same_bytes(
    output: Path, good_videos: Path, tmp_path: Path, workers: tuple[str, ...]
) -> None:
    result = tokenize_on_ray(good_videos, "--out", tmp_path / "tokens", *SMALL, *workers)
    assert result.exit_code == 0, result.output
    assert tokens_by_clip(tmp_path / "tokens") == tokens_by_clip(output)
    if "--shard-size" in workers:
        assert len(shard_paths(str(tmp_path / "tokens"))) > 1


def test_work_is_spread_and_batches_are_filled_across_videos(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(10):
        write_video(folder / f"{number}.mp4", Recipe(num_frames=20 + number, rate=Fraction(25)))
    result = tokenize_on_ray(folder, "--out", tmp_path / "tokens", *SMALL, "--batch-size", "5")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "tokens" / "summary.json").read_text())["batch_fill"] == 1.0  # 10 clips in 2 batches
    plan = str(tmp_path / "tokens" / "todo.parquet")
    settings = TokenizeRun.model_validate({"inputs": [str(folder)], "out": "unused", "tokenizer": "tiny", "size": 32})
    resolved = ResolvedRun.of(settings).placed(device="cpu", precision="float32")
    cluster = Cluster(num_cpus=2, num_gpus=0, num_nodes=1, is_own=False)
    resources, encoder = plan_resources(resolved, 10, 1.0, ClusterExecutor(cluster=cluster))
    decoder = SpanDecoder(spec=settings.clip_specs[0], max_clips=10, clips_per_pass=1)
    flow = build_flow(plan, decoder=decoder, encoder=encoder, resources=resources).materialize()
    assert flow.count() == 10
    tasks = re.search(r"MapBatches\(DecodeTask\)[^\n]*: (\d+) tasks executed", flow.stats())
    assert tasks is not None, flow.stats()
    assert int(tasks[1]) == 10
