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
import pyarrow as pa
import pyarrow.compute as pc
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


def test_shards_and_rejections_are_to_the_byte_those_of_a_run_in_one_process_and_stay(
    good_videos: Path, bad_videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"  # the same for both, as a shard tells where it was written
    # scores are sums, whose last digit follows the number of threads
    command = (good_videos, bad_videos, "--out", out, *SMALL, "--audit", 0.5, "--encode-threads", 1)
    first = tokenize_on_ray(*command)
    on_ray = _shards_and_rejects(first, out)
    assert "GB from decoders to encoders, 0% of it over the network" in first.output
    again = tokenize_on_ray(*command)
    assert "finished by an earlier run" in again.output
    assert _shards_and_rejects(again, out) == on_ray
    assert json.loads((out / "summary.json").read_text())["written"]["num_clips"] == 0, "nothing is done again"
    shutil.rmtree(out)
    assert _shards_and_rejects(tokenize(*command), out) == on_ray


def _shards_and_rejects(result: Result, out: Path) -> list[dict[str, bytes]]:
    assert result.exit_code == 0, result.output
    assert len(rows_of(out)) == 10
    assert rejects_of(out) == BAD_VIDEOS
    return [files(out / name) for name in ("shards", "rejects")]


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


def test_videos_on_s3_become_the_same_tokens_on_s3_in_other_spans_and_shards(
    s3: str, output: Path, good_videos: Path
) -> None:
    for name in GOOD_VIDEOS:
        with fsspec.open(f"s3://videos/flow/{name}", "wb") as file:
            file.write((good_videos / name).read_bytes())
    other = ("--decode-workers", "1", "--clips-per-span", "1", "--shard-size", "1")
    command = ("s3://videos/flow", "--out", "s3://videos/flow-tokens", *SMALL, *other)
    result = tokenize_on_ray(*command)
    assert result.exit_code == 0, result.output
    assert len(shard_paths("s3://videos/flow-tokens")) > 1
    assert tokens_by_clip("s3://videos/flow-tokens") == tokens_by_clip(output)
    assert all(r["uri"].startswith("s3://videos/flow/") for r in rows_of("s3://videos/flow-tokens"))
    again = tokenize_on_ray(*command)
    assert "finished by an earlier run" in again.output
    for path in shard_paths("s3://videos/flow-tokens"):
        assert b"a-secret-that-must-not-be-seen" not in open_binary(path).read()


def test_several_encoders_give_the_same_tokens_and_no_credentials_of_a_video_are_stored(
    output: Path, good_videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    handler = partial(SimpleHTTPRequestHandler, directory=str(good_videos))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uris = [f"http://127.0.0.1:{server.server_port}/{name}?sig=SECRET" for name in GOOD_VIDEOS]
        result = tokenize_on_ray(*uris, "--out", out, *SMALL, "--encode-workers", "2")
        server.shutdown()
    assert result.exit_code == 0, result.output
    assert tokens_by_clip(out) == tokens_by_clip(output)
    stored = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in stored if b"SECRET" in path.read_bytes()]
    assert not [uri for uri in pq.read_table(out / "plan")["uri"].to_pylist() if "SECRET" in uri]
    assert "SECRET" not in result.stdout  # the server here logs to stderr


def test_work_is_spread_and_batches_are_filled_across_videos(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(10):
        write_video(folder / f"{number}.mp4", Recipe(num_frames=20 + number, rate=Fraction(25)))
    result = tokenize(folder, "--out", tmp_path / "tokens", *SMALL)
    assert result.exit_code == 0, result.output
    plan = str(tmp_path / "tokens" / "todo.parquet")
    small = {"tokenizer": "tiny", "fps": 4, "frames": 5, "size": 32, "batch_size": 5}
    settings = TokenizeRun.model_validate({"inputs": [str(folder)], "out": "unused", **small})
    resolved = ResolvedRun.of(settings).placed(device="cpu", precision="float32")
    cluster = Cluster(num_cpus=2, num_gpus=0, num_nodes=1, is_own=False)
    resources, encoder = plan_resources(resolved, 10, 1.0, ClusterExecutor(cluster=cluster))
    decoder = SpanDecoder(spec=settings.clip_specs[0], max_clips=10, clips_per_pass=1)
    flow = build_flow(plan, decoder=decoder, encoder=encoder, resources=resources).materialize()
    encoded = pa.concat_tables(flow.iter_batches(batch_format="pyarrow", batch_size=None))
    assert encoded.num_rows == 10
    assert pc.sum(encoded["encode_slots"]).as_py() == 10, "2 full batches"
    tasks = re.search(r"MapBatches\(DecodeTask\)[^\n]*: (\d+) tasks executed", flow.stats())
    assert tasks is not None, flow.stats()
    assert int(tasks[1]) == 10
