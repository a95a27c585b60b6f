"""Training as a job: two workers, both stages, a tokenizer that the pipeline takes; bad input ends early."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.cli import printed_by
from tests.support.training import FIRST_STAGE, SMALL, lines_of, resume, run_of, train
from tests.support.videos import Recipe, write_damaged, write_video
from vidshard.jobs.runtime.cluster import Cluster
from vidshard.jobs.shards.decode import DecodeRun, decode_output
from vidshard.jobs.tokenization.job import tokenize
from vidshard.jobs.training.job import prepare_data
from vidshard.jobs.training.resolve import read_record, resolve
from vidshard.jobs.training.settings import training_run
from vidshard.models.weights import load_weights, weights_digest
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.training_data.checkpoints import Checkpoints
from vidshard.schemas.errors import UserError
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.training import TrainRun

pytestmark = pytest.mark.usefixtures("quick_controller")


@pytest.fixture(scope="module")
def trained(videos: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """Folder of a run of both stages by two workers."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    stage2 = ["size=48", "steps=14", "gan_start=10", "learning_rate=0.001"]  # the rate of the preset
    code, text = train(run_of(videos, out, ("stage1", "stage2"), **FIRST_STAGE, stage2=stage2))
    assert code == 0, text
    return out


def test_two_workers_train_both_stages(trained: Path) -> None:
    train_lines = lines_of(trained)
    assert [line["step"] for line in train_lines] == list(range(1, 41))
    begun = np.mean([line["l1"] for line in train_lines[:5]])
    ended = np.mean([line["l1"] for line in train_lines[-5:]])
    assert ended < 0.5 * begun
    before, *_, after = lines_of(trained, group="held_out")
    assert (before["step"], after["step"]) == (0, 40)
    assert after["psnr"] > before["psnr"] + 4
    second = lines_of(trained, "stage2", "held_out")
    assert second[-1]["psnr"] > second[0]["psnr"]
    assert "hinge" in train_lines[-1]
    assert "hinge" not in train_lines[20]


def test_the_second_stage_leaves_encoder_and_head_alone(trained: Path) -> None:
    out = trained
    _, first = load_weights(out / "stage1" / "tokenizer.safetensors")
    _, second = load_weights(out / "stage2" / "tokenizer.safetensors")
    for name in first:
        same = bool((first[name] == second[name]).all())
        assert same or name.startswith("decoder."), name
    assert weights_digest(first) != weights_digest(second)
    digests = json.loads((out / "stage2" / "result.json").read_text())["digests"]
    assert digests["start_sha256"] == weights_digest(first)
    assert digests["weights_sha256"] == weights_digest(second)


def test_the_folder_of_a_run_explains_it(trained: Path) -> None:
    out = trained
    record = read_record(str(out))
    assert TrainRun.model_validate(record["run"]).stages["stage2"].size == (48, 48)
    assert record["starts"][0]["code_version"].startswith("0.")
    summary = (out / "summary.md").read_text()
    for words in (
        "| stage1 | all | 5x32x32",
        "| stage2 | decoder | 5x48x48",
        "40 of 40",
        "--weights",
        "weights_sha256",
    ):
        assert words in summary
    [rejected] = json.loads((out / "rejects.json").read_text())
    assert rejected["reason"] == "not_a_video"
    events = EventAccumulator(str(out / "stage1" / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"]
    for tag in ("train/l1", "rates/learning_rate", "gradients/grad_norm_generator", "speed/clips_per_second"):
        assert tag in tags
    for tag in ("held_out/psnr", "held_out/ssim", "held_out/codebook_utilization", "speed/waiting", "speed/mfu"):
        assert tag in tags
    picture = Image.open(out / "stage1" / "pictures" / "step-00000040.png")
    assert picture.height == 2 * 2 * 128  # two clips above their reconstructions, frames of 32 pixels enlarged
    assert 0 < picture.width - 5 * 128 < 200, "a margin names the rows"
    infos = Checkpoints(str(out / "stage1"), record["run_id"], keep_last=2).infos()
    assert [info.step for info in infos][-1] == 40
    assert len(infos) <= 3  # and the best


def test_the_pipeline_takes_what_was_trained(trained: Path, videos: Path, tmp_path: Path) -> None:
    weights = trained / "stage2" / "tokenizer.safetensors"
    settings = ("--weights", weights, "--fps", 3, "--frames", 5, "--size", 48)
    printed_by("tokenize", videos / "v03.mp4", "--out", tmp_path / "tokens", *settings, "--local")
    [shard] = shard_paths(str(tmp_path / "tokens"))
    assert pq.read_table(shard).num_rows >= 2
    console = Console(file=io.StringIO(), width=200)
    decode_output(DecodeRun(out=str(tmp_path / "tokens"), folder=str(tmp_path / "videos")), console)
    assert list((tmp_path / "videos").glob("*.mp4"))


def test_the_same_command_again_trains_nothing_and_other_settings_are_refused(
    trained: Path, videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trained
    before = (out / "stage2" / "tokenizer.safetensors").stat().st_mtime_ns
    assert resume(str(out), {}, Console(file=io.StringIO())) == 0
    assert (out / "stage2" / "tokenizer.safetensors").stat().st_mtime_ns == before
    code, _ = train(run_of(videos, out, steps=77))
    error = capsys.readouterr().err
    assert code == 2
    assert "is the run of other settings" in error
    assert "stage1.steps: 40 there, 77 now" in error


def test_a_finished_run_needs_no_checkpoints(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mine"
    shutil.copytree(trained, copy)
    for stage in ("stage1", "stage2"):
        shutil.rmtree(copy / stage / "checkpoints")
    before = (copy / "stage1" / "tokenizer.safetensors").stat().st_mtime_ns
    assert resume(str(copy), {}, Console(file=io.StringIO())) == 0
    assert (copy / "stage1" / "tokenizer.safetensors").stat().st_mtime_ns == before


def test_damaged_results_are_never_trained_over(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "mine"
    shutil.copytree(trained, copy)
    before = (copy / "stage2" / "tokenizer.safetensors").read_bytes()
    for damage in ("{", "[]", '{"name": "stage2", "steps": "many"}'):
        (copy / "stage2" / "result.json").write_text(damage)
        assert resume(str(copy), {}, Console(file=io.StringIO())) == 0  # the checkpoint tells
    shutil.rmtree(copy / "stage2" / "checkpoints")
    assert resume(str(copy), {}, Console(file=io.StringIO())) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(r"stage2/result.json is damaged, and there is no checkpoint .* take \S+/stage2 away", error), error
    assert (copy / "stage2" / "tokenizer.safetensors").read_bytes() == before


def test_a_damaged_list_of_rejections_is_named(
    videos: Path, tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "rejects.json").write_text('[{"uri": ')
    assert train(run_of(videos, out))[0] == 2
    assert "rejects.json is damaged" in capsys.readouterr().err


def test_a_second_stage_of_another_architecture_is_refused(trained: Path, videos: Path) -> None:
    out = trained
    start = str(out / "stage1")
    flags = {"videos": [str(videos)], "out": str(out) + "2", "init_from": start, "preset": "tiny"}
    with pytest.raises(Exception, match=r"is of tiny, not tiny_kl .*head: 'fsq' there, 'kl' now"):
        resolve(training_run("tiny", ("stage2",), flags | {"tokenizer": "tiny_kl"}))
    training = resolve(training_run("tiny", ("stage2",), flags))
    assert training.previous == (start, read_record(str(out))["run_id"])
    usual = training_run("paper_stage2", ("stage2",), {**flags, "preset": None, "perceptual_weight": 0, "frames": 5})
    assert resolve(usual).tokenizer.name == "tiny"  # that of the stage, as no other one was asked for


@pytest.mark.slow
def test_a_sharded_run_with_lpips_on_an_object_store(
    videos: Path, vgg_file: Path, s3: str, tmp_path: Path, ray_session: None
) -> None:
    out = "s3://videos/runs/sharded"
    asked: dict[str, Any] = {
        "workers": 2,
        "parallel": "fsdp",
        "gradient_accumulation": 2,
        "activation_checkpointing": True,
        "perceptual_weight": 0.1,
        "vgg_weights": str(vgg_file),
        "steps": 4,
        "gan_start": 2,
        "checkpoint_steps": 2,
        "evaluate_steps": 2,
    }
    code, text = train(run_of(videos, out, **asked))
    assert code == 0, text
    made = weights_digest(load_weights_from(out + "/stage1/tokenizer.safetensors"))
    for name in ("tokenizer.safetensors", "result.json"):  # as of a run killed between its last checkpoint and these
        storage.remove(f"{out}/stage1/{name}")
    code, text = train(run_of(videos, out, **asked))
    assert code == 0, text
    assert weights_digest(load_weights_from(out + "/stage1/tokenizer.safetensors")) == made
    code, text = train(run_of(videos, out + "2", ("stage2",), **asked, init_from=out + "/stage1"))
    assert code == 0, text
    lines = [json.loads(line) for line in storage.read_bytes(out + "/stage1/metrics.jsonl").decode().splitlines()]
    assert [line["step"] for line in lines if line["group"] == "held_out"] == [0, 2, 4]
    assert all(line["perceptual"] > 0 for line in lines if line["group"] == "train")
    assert all(line["lpips"] > 0 for line in lines if line["group"] == "held_out")
    fs, folder = storage.filesystem(out)
    names = {name.rpartition("/")[2] for name in fs.find(folder)}
    assert {"run.json", "summary.md", "metrics.jsonl", "tokenizer.safetensors"} <= names
    weights = out + "2/stage2/tokenizer.safetensors"
    tokens = TokenizeRun(inputs=[str(videos)], out=str(tmp_path / "tokens"), size=(32, 32), weights=weights)
    assert tokenize(tokens, Console(file=io.StringIO())).exit_code == 0
    [encoder, decoder] = [load_weights_from(path) for path in (out + "/stage1/tokenizer.safetensors", weights)]
    frozen = [name for name in encoder if name.startswith("encoder.")]
    assert frozen
    assert all(torch.equal(encoder[name], decoder[name]) for name in frozen)


def load_weights_from(path: str) -> dict[str, torch.Tensor]:
    with storage.local_copy(path) as local:
        assert local is not None
        return load_weights(local)[1]


def test_a_cache_is_filled_before_the_first_step(videos: Path, tmp_path: Path, ray_session: None) -> None:
    training = resolve(run_of(videos, tmp_path / "run", cache=str(tmp_path / "cache")))
    cluster = Cluster(num_cpus=2, num_gpus=0, num_nodes=1, is_own=False)
    console = Console(file=io.StringIO())
    corpora, draws = prepare_data(training, "stage1", training.run.stages["stage1"], cluster, console)
    cached = pa.concat_tables([pq.read_table(path) for path in (tmp_path / "cache").rglob("*.parquet")])
    assert cached.num_rows == corpora.train.num_rows == draws.epoch_length


def test_a_run_that_can_measure_nothing_says_so(tmp_path: Path, ray_session: None) -> None:
    for number in range(4):
        video = write_video(tmp_path / f"{number}.mp4", Recipe(num_frames=96 + number, rate=Fraction(24), gop=4))
        write_damaged(video, video, share=0.3, num_bytes=video.stat().st_size // 3)
    training = resolve(run_of(tmp_path, tmp_path / "run", batch_size=1))
    cluster = Cluster(num_cpus=2, num_gpus=0, num_nodes=1, is_own=False)
    text = io.StringIO()
    corpora, _ = prepare_data(training, "stage1", training.run.stages["stage1"], cluster, Console(file=text, width=200))
    assert "stage1: nothing will be measured: no held-out video can be decoded; see rejects.json" in text.getvalue()
    assert corpora.held_out.num_rows == 0  # one after the other was held out, and none decodes
    tried = {rejection.uri for rejection in corpora.rejections}
    assert len(tried) == len(corpora.rejections) == 3
    assert tried.isdisjoint(corpora.train["uri"].to_pylist())


def test_a_discriminator_that_never_begins_is_warned_of(videos: Path, tmp_path: Path, ray_session: None) -> None:
    code, text = train(run_of(videos, tmp_path / "out", steps=40, gan_start=40, batch_size=400))
    assert code == 2
    assert "stage1 has no discriminator: it would start at step 40, and there are 40" in " ".join(text.split())


def test_a_record_that_is_none_is_refused(trained: Path, tmp_path: Path) -> None:
    whole = json.loads((trained / "run.json").read_text())
    spoilers: list[Callable[[dict[str, Any]], object]] = [
        lambda record: record.pop("starts"),
        lambda record: record.pop("tokenizer"),
        lambda record: record["tokenizer"].update(head="none"),
        lambda record: record["identity"].pop("stages"),
        lambda record: record.update(format=99),
        lambda record: record["run"].update(videos=3),
    ]
    for spoil in spoilers:
        record = json.loads(json.dumps(whole))
        spoil(record)
        (tmp_path / "run.json").write_text(json.dumps(record))
        with pytest.raises(UserError, match="is not the record of a training run: choose another --out"):
            read_record(str(tmp_path))


def test_too_few_videos_batches_that_do_not_divide_and_unreachable_storage_are_refused(
    videos: Path, tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    for changes, message in (
        ({"batch_size": 400}, "fewer than a batch of 400: give more videos, raise --clips-per-video"),
        ({"batch_size": 3, "workers": 2}, "does not divide among 2 workers"),
        ({"out": str(blocked / "run")}, "cannot write"),
        ({"videos": [str(tmp_path / "nothing")]}, "no such file, or the folder is empty"),
    ):
        flags = {"videos": [str(videos)], "out": str(tmp_path / f"out-{len(message)}"), **SMALL, **changes}
        run = training_run("tiny", ("stage1",), flags)
        assert train(run)[0] == 2
        assert message in " ".join(capsys.readouterr().err.split())
