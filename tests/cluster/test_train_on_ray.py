"""Training as a job: two workers, a kill, both stages, a tokenizer that the pipeline takes; bad input ends early."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.held_status import HeldStatus
from tests.support.processes import processes_below
from tests.support.videos import Recipe, write_damaged, write_video
from vidshard.jobs.cli import vidshard
from vidshard.jobs.runtime.cluster import Cluster
from vidshard.jobs.runtime.errors import cause_of, print_error
from vidshard.jobs.settings import SettingsError
from vidshard.jobs.shards.decode import DecodeRun, decode_output
from vidshard.jobs.tokenization.job import tokenize
from vidshard.jobs.training import job
from vidshard.jobs.training.job import prepare_data
from vidshard.jobs.training.presets import TRAININGS
from vidshard.jobs.training.recorder import Recorder, Speed, picture_strip, read_metrics
from vidshard.jobs.training.resolve import activation_bytes, plan_resources, read_record, resolve
from vidshard.jobs.training.settings import training_run
from vidshard.jobs.training.summary import Result
from vidshard.jobs.training.worker import start_weights
from vidshard.models.training.state import start_tokenizer
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.weights import load_weights, save_tokenizer, weights_digest
from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.training_data.checkpoints import Checkpoints
from vidshard.schemas.errors import UserError, VidshardError
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.training import StageConfig, TrainRun


def write_motion(path: Path, seed: int) -> Path:
    """Four seconds at night: a dark gradient that drifts, and a disc on its orbit."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:48, :64] / 48
    waves = random.uniform(0.1, 0.5, (3, 4))
    disc = random.uniform(0.2, 0.5, 3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=6)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "18"}
        for number in range(24):
            t = number / 6
            colors = [0.15 + 0.1 * np.sin(2 * np.pi * (a * x + b * y + c) + d * t) for a, b, c, d in waves]
            picture = np.stack(colors, axis=-1)
            picture[(x - 0.7 - 0.3 * np.cos(t + seed)) ** 2 + (y - 0.5 - 0.3 * np.sin(t)) ** 2 < 0.03] = disc
            frame = av.VideoFrame.from_ndarray((picture * 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos and one that is none."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(12):
        write_motion(folder / f"v{number:02d}.mp4", number)
    (folder / "junk.mp4").write_text("no video")
    return folder


SMALL = {
    "size": "32",
    "learning_rate": 3e-3,
    "ema_decay": 0.9,
    "warmup_steps": 3,
    "discriminator_width": 4,
    "log_steps": 1,
    "threads": 1,
    "eval_clips": 8,
    "pictures": 2,
    "validation_share": 0.2,
}


def run_of(videos: Path | str, out: Path | str, stages: tuple[str, ...] = ("stage1",), **changes: Any) -> TrainRun:
    return training_run("tiny", stages, {"videos": [str(videos)], "out": str(out), **SMALL, **changes})


def exit_code_of(result: Callable[[], Result]) -> int:
    """The exit code of a job, as the command ends with it."""
    try:
        return result().exit_code
    except VidshardError as error:
        print_error(error)
        return error.exit_code


def train(run: TrainRun) -> tuple[int, str]:
    """The exit code and what was printed."""
    text = io.StringIO()
    code = exit_code_of(lambda: job.train(run, Console(file=text, width=200)))
    return code, text.getvalue()


def resume(out: str, changes: dict[str, Any], console: Console) -> int:
    """The exit code."""
    return exit_code_of(lambda: job.resume(out, changes, console))


def lines_of(out: Path, stage: str = "stage1", group: str = "train") -> list[dict[str, float]]:
    """What was measured, without what depends on the clock."""
    clock = ("clips_per_second", "steps_per_second", "waiting", "mfu")
    lines = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in clock} for line in lines if line["group"] == group]


KILLED_AT = (15, 25)


@contextmanager
def workers_killed(folder: Path) -> Iterator[list[int]]:
    """One training worker is killed at each of the steps ``KILLED_AT``; gives the ids of what was killed."""
    killed: list[int] = []
    over = threading.Event()

    def watch() -> None:
        for step in KILLED_AT:
            while not (folder / f"waits-at-{step}").exists():
                if over.wait(0.01):
                    return
            workers = [pid for pid, title in processes_below(os.getpid()).items() if "RayTrainWorker" in title]
            os.kill(workers[-1], signal.SIGKILL)
            killed.append(workers[-1])
            (folder / f"goes-on-at-{step}").touch()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("vidshard.jobs.training.job.RunStatus", partial(HeldStatus, folder, KILLED_AT))
            yield killed
    finally:
        over.set()
        thread.join()


@pytest.fixture(autouse=True, scope="module")
def quick_controller() -> Iterator[None]:
    """Ray Train looks every two seconds whether its workers live, and ended; here it shall not be waited for.

    Nor shall it start a process to learn of preemptions.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        yield


FIRST_STAGE: dict[str, Any] = {
    "workers": 2,
    "steps": 40,
    "gan_start": 30,
    "checkpoint_steps": 10,
    "evaluate_steps": 20,
    "keep_last": 2,
}


@pytest.fixture(scope="module")
def trained(videos: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, list[str]]:
    """Both stages with two workers, one of which is killed twice in the first: the second time ends the command, and
    another goes on. The run's folder, and what each printed."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    stage2 = ["size=48", "steps=30", "gan_start=25", "learning_rate=0.001"]  # the rate of the preset
    run = run_of(videos, out, ("stage1", "stage2"), **FIRST_STAGE, max_failures=1, stage2=stage2)
    with workers_killed(tmp_path_factory.mktemp("kills")) as killed:
        code, text = train(run)
        assert code == 1, text
        assert len(killed) == 2
        text_again = io.StringIO()
        newer = write_motion(videos / "newer.mp4", 99)  # would come between the others, and each clip be another
        assert resume(str(out), {}, Console(file=text_again, width=200)) == 0, text_again.getvalue()
        newer.unlink()
    return out, [text, text_again.getvalue()]


@pytest.fixture(scope="module")
def undisturbed(videos: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, str]:
    """The same first stage whose workers live; but for its last step, which is one of divergence."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, text = train(run_of(videos, out, **FIRST_STAGE, divergence_after=39, divergence_l1=0.05))
    assert code == 1, text
    return out, text


def test_two_workers_train_both_stages_though_one_is_killed(trained: tuple[Path, list[str]]) -> None:
    out, (text, text_again) = trained
    assert "stage1 stopped after 1 restarts" in text
    assert "vidshard train resume" in text
    assert "stage1: 40 steps" in text_again
    assert "stage1: goes on with the videos that it began with" in text_again
    train_lines = lines_of(out)
    assert [line["step"] for line in train_lines] == list(range(1, 41))  # none twice, none missing
    begun = np.mean([line["l1"] for line in train_lines[:5]])
    ended = np.mean([line["l1"] for line in train_lines[-5:]])
    assert ended < 0.5 * begun
    before, *_, after = lines_of(out, group="held_out")
    assert (before["step"], after["step"]) == (0, 40)
    assert after["psnr"] > before["psnr"] + 4
    second = lines_of(out, "stage2", "held_out")
    assert second[-1]["psnr"] > second[0]["psnr"]
    assert "hinge" in train_lines[-1]
    assert "hinge" not in train_lines[20]


def test_the_second_stage_leaves_encoder_and_head_alone(trained: tuple[Path, list[str]]) -> None:
    out, _ = trained
    _, first = load_weights(out / "stage1" / "tokenizer.safetensors")
    _, second = load_weights(out / "stage2" / "tokenizer.safetensors")
    for name in first:
        same = bool((first[name] == second[name]).all())
        assert same or name.startswith("decoder."), name
    assert weights_digest(first) != weights_digest(second)
    digests = json.loads((out / "stage2" / "result.json").read_text())["digests"]
    assert digests["start_sha256"] == weights_digest(first)
    assert digests["weights_sha256"] == weights_digest(second)


def test_the_folder_of_a_run_explains_it(trained: tuple[Path, list[str]]) -> None:
    out, _ = trained
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
    for tag in ("held_out/psnr", "held_out/ssim", "held_out/codebook_utilisation", "speed/waiting", "speed/mfu"):
        assert tag in tags
    picture = Image.open(out / "stage1" / "pictures" / "step-00000040.png")
    assert picture.size == (5 * 32, 2 * 2 * 32)  # two clips above their reconstructions
    marks = Checkpoints(str(out / "stage1"), record["run_id"], keep_last=2).marks()
    assert [mark.step for mark in marks][-1] == 40
    assert len(marks) <= 3  # and the best


def test_the_pipeline_takes_what_was_trained(trained: tuple[Path, list[str]], videos: Path, tmp_path: Path) -> None:
    weights = trained[0] / "stage2" / "tokenizer.safetensors"
    run = TokenizeRun(
        inputs=[str(videos / "v03.mp4")],
        out=str(tmp_path / "tokens"),
        weights=str(weights),
        fps=Fraction(3),
        frames=5,
        size=(48, 48),
    )
    console = Console(file=io.StringIO(), width=200)
    assert tokenize(run, console).exit_code == 0
    [shard] = shard_paths(str(tmp_path / "tokens"))
    assert pq.read_table(shard).num_rows >= 2
    decode_output(DecodeRun(out=str(tmp_path / "tokens"), folder=str(tmp_path / "videos")), console)
    assert list((tmp_path / "videos").glob("*.mp4"))


def test_the_same_command_again_trains_nothing_and_other_settings_are_refused(
    trained: tuple[Path, list[str]], videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = trained
    before = (out / "stage2" / "tokenizer.safetensors").stat().st_mtime_ns
    assert resume(str(out), {}, Console(file=io.StringIO())) == 0
    assert (out / "stage2" / "tokenizer.safetensors").stat().st_mtime_ns == before
    code, _ = train(run_of(videos, out, steps=77))
    error = capsys.readouterr().err
    assert code == 2
    assert "is the run of other settings" in error
    assert "stage1.steps: 40 there, 77 now" in error


def test_a_finished_run_needs_no_checkpoints(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    copy = tmp_path / "mine"
    shutil.copytree(trained[0], copy)
    for stage in ("stage1", "stage2"):
        shutil.rmtree(copy / stage / "checkpoints")
    before = (copy / "stage1" / "tokenizer.safetensors").stat().st_mtime_ns
    assert resume(str(copy), {}, Console(file=io.StringIO())) == 0
    assert (copy / "stage1" / "tokenizer.safetensors").stat().st_mtime_ns == before


def test_damaged_results_are_never_trained_over(
    trained: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "mine"
    shutil.copytree(trained[0], copy)
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


def test_a_second_stage_of_another_architecture_is_refused(trained: tuple[Path, list[str]], videos: Path) -> None:
    out, _ = trained
    start = str(out / "stage1")
    flags = {"videos": [str(videos)], "out": str(out) + "2", "init_from": start, "preset": "tiny"}
    with pytest.raises(Exception, match=r"is of tiny, not tiny_kl .*head: fsq there, kl here"):
        resolve(training_run("tiny", ("stage2",), flags | {"tokenizer": "tiny_kl"}))
    training = resolve(training_run("tiny", ("stage2",), flags))
    assert training.previous == (start, read_record(str(out))["run_id"])
    usual = training_run("paper_stage2", ("stage2",), {**flags, "preset": None, "perceptual_weight": 0, "frames": 5})
    assert resolve(usual).tokenizer.name == "tiny"  # that of the stage, as no other one was asked for


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    trained: tuple[Path, list[str]],
    undisturbed: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    killed, whole = trained[0], undisturbed[0]
    for group in ("train", "held_out"):
        lines = lines_of(whole, group=group)
        assert lines[-1]["step"] == (39 if group == "train" else 20)
        assert lines_of(killed, group=group)[: len(lines)] == lines
    states: list[list[torch.Tensor]] = []
    for out in (killed, whole):
        checkpoints = Checkpoints(str(out / "stage1"), read_record(str(out))["run_id"])
        [mark] = [mark for mark in checkpoints.marks() if mark.step == 30]
        state = checkpoints.load(mark)["state"]
        del state["rng"]  # with which numbers a process begins is its own affair, and FSQ draws none
        states.append(tensors_of(state))
    assert len(states[0]) > 200  # weights, averages, and what the optimizers keep
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
    # checkpoints of one run are nothing to another
    shutil.copytree(whole, tmp_path / "whole")
    shutil.copytree(
        killed / "stage1" / "checkpoints", tmp_path / "whole" / "stage1" / "checkpoints", dirs_exist_ok=True
    )
    capsys.readouterr()
    assert resume(str(tmp_path / "whole"), {}, Console(file=io.StringIO())) == 2
    assert "holds checkpoints of another run" in capsys.readouterr().err


def tensors_of(state: Any) -> list[torch.Tensor]:
    """All that a nest of mappings and sequences holds."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def test_divergence_ends_the_run_names_the_terms_and_keeps_the_last_checkpoint(undisturbed: tuple[Path, str]) -> None:
    out, text = undisturbed
    assert "training diverges" in text
    assert "nll" in text
    assert "1 restarts" not in text  # starting again would only repeat it
    assert "**Not finished:**" in (out / "summary.md").read_text()
    checkpoints = Checkpoints(str(out / "stage1"), read_record(str(out))["run_id"])
    assert checkpoints.marks()[-1].step == 30


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
    assert "stage1: no held-out video can be decoded, so nothing will be measured; see rejects.json" in text.getvalue()
    assert {rejection.uri for rejection in corpora.rejections} == set(corpora.held_out["uri"].to_pylist())


def test_a_discriminator_that_never_begins_is_warned_of(videos: Path, tmp_path: Path, ray_session: None) -> None:
    code, text = train(run_of(videos, tmp_path / "out", steps=40, gan_start=40, batch_size=400))
    assert code == 2
    assert "stage1 has no discriminator: it would start at step 40, and there are 40" in " ".join(text.split())


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "tiny_xl"}, "tiny_xl"),
        ({"frames": 6}, "stage1: .*frames"),
        ({"size": "30"}, "stage1: .*30"),
        ({"perceptual_weight": 1.0, "vgg_weights": "/nowhere.pth"}, "nowhere.pth.*--perceptual-weight 0"),
        ({"init_from": "/nowhere/stage1"}, "neither a stage of a run, such as runs/mine/stage1, nor weights"),
        ({"init_from": "/nowhere.safetensors"}, "nowhere.safetensors"),
        ({"checkpoint_steps": 7, "evaluate_steps": 3}, "must be a multiple of the other"),
        ({"trainable": "decoder"}, "needs a trained encoder: give --init-from"),
        ({"wandb": "project"}, "pip install wandb"),
        ({"cache": "s3://key:SECRET@bucket/x"}, r"s3://bucket/x: the URL carries credentials"),
        ({"videos": ["https://host/v.mp4?sig=SECRET"]}, r"https://host/v.mp4: the URL carries credentials"),
        ({"best_by": "lpips"}, "best by lpips: LPIPS is measured only where --perceptual-weight"),
        ({"best_by": "codebook_utilisation", "tokenizer": "tiny_kl"}, "tiny_kl has no codebook"),
        ({"discriminator": "3d", "frames": 1, "size": "8"}, "3d discriminator needs clips of more than 4 frames, or"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    changes: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    [videos] = changes.pop("videos", [tmp_path])
    code, _ = train(run_of(videos, tmp_path / "out", **changes))
    assert code == 2
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(message, error), error
    assert "SECRET" not in error
    assert not (tmp_path / "out").exists()


def test_causes_are_found_below_what_ray_puts_around_them() -> None:
    text = """ray::MapBatches(ClipReader)() (pid=1, ip=127.0.0.1)
  File "pipeline/training_data.py", line 400, in _row
    raise UnusableError(
pipeline.training_data.loader.UnusableError: none of 16 places can be decoded: a.mp4: changed.
Take these videos away

The above exception was the direct cause of the following exception:

ray.data.exceptions.UserCodeException: UDF failed to process a data block."""
    failure = RuntimeError("training failed")
    failure.__cause__ = ValueError(text)
    assert cause_of(failure) == (
        "UnusableError: none of 16 places can be decoded: a.mp4: changed. Take these videos away"
    )
    assert cause_of(OSError("no room")) == "OSError: no room"
    assert cause_of(KeyError()) == "KeyError"


def test_a_record_that_is_none_is_refused(trained: tuple[Path, list[str]], tmp_path: Path) -> None:
    whole = json.loads((trained[0] / "run.json").read_text())
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


def test_flags_and_file_are_laid_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("videos: [a/, b/]\npreset: tiny\nsteps: 50\nstage2: {size: 64, steps: 70}\nperceptual_weight: 0\n")
    flags = {"out": "x", "stage1": ("batch_size=8",), "gan_start": "20"}
    run = training_run("paper", ("stage1", "stage2"), flags, file)
    assert run.videos == ["a/", "b/"]
    assert (run.stages["stage1"].steps, run.stages["stage2"].steps) == (50, 70)
    assert (run.stages["stage1"].batch_size, run.stages["stage2"].batch_size) == (8, 4)
    assert run.stages["stage1"].gan_start == run.stages["stage2"].gan_start == 20
    assert run.stages["stage2"].trainable == "decoder"
    for changes, message in (
        ({"preset": "large"}, "no preset 'large'; these are: tiny"),
        ({"stage1": ("steps",)}, "give KEY=VALUE"),
        ({"stage1": ("stepz=1",)}, "stage1: stepz: unknown setting 'stepz'; did you mean 'steps'"),
        ({"steps": "many"}, "--steps: .*integer"),
        ({"preset": "domain"}, "has no stage1; it has finetune"),
        ({"best_by": "wombat"}, "--best-by"),
    ):
        with pytest.raises(SettingsError, match=message):
            training_run("paper", ("stage1", "stage2"), {"out": "x", **changes}, file)
    with pytest.raises(SettingsError, match="stage2: settings of one stage of several are for `vidshard train two_"):
        training_run("paper_stage1", ("stage1",), {"out": "x"}, file)


def test_help_states_the_defaults_of_the_command() -> None:
    for command, words in (
        ("stage2", ["[default: 256x256]", "[default: decoder]", "[default: paper_stage2]"]),
        ("two_stage", ["[default: 128x128, then 256x256]", "[default: 50000, then 30000]"]),
        ("finetune", ["[default: cosine]", "[default: 10000]"]),
    ):
        result = CliRunner().invoke(vidshard, ["train", command, "--help-all"], terminal_width=200)
        assert all(word in " ".join(result.output.split()) for word in words), result.output


@pytest.mark.parametrize("name", TRAININGS)
def test_presets_are_complete_runs(name: str) -> None:
    run = TRAININGS[name](["videos"], "out")
    assert run.tokenizer in PRESETS
    for stage in run.stages.values():
        PRESETS[run.tokenizer or ""].latent_shape(stage.frames, *stage.size)
    assert TrainRun.model_validate_json(run.model_dump_json()) == run


def test_the_presets_of_the_paper_are_its_stages() -> None:
    run = TRAININGS["paper"](["videos"], "out")
    first, second = run.stages.values()
    assert (first.size, first.frames, first.fps, first.steps, first.batch_size) == (
        (128, 128),
        17,
        Fraction(3),
        50_000,
        16,
    )
    assert (second.size, second.steps, second.batch_size, second.trainable) == ((256, 256), 30_000, 8, "decoder")


# Its parts


def test_weights_of_another_version_of_the_network_may_start_a_training(tmp_path: Path) -> None:
    old, new = PRESETS["tiny"], PRESETS["tiny"].model_copy(update={"name": "new", "variant": "causal-v1.1"})
    path = tmp_path / "old.safetensors"
    save_tokenizer(path, start_tokenizer(old, 0))
    weights = start_weights(str(path), new)
    start_tokenizer(new, 1).load_state_dict(weights)
    with pytest.raises(ValueError, match="is of tiny, not tiny_kl"):
        start_weights(str(path), PRESETS["tiny_kl"])


def test_what_a_pass_keeps_in_memory_is_known_without_making_it() -> None:
    stage = StageConfig(frames=5, size=(32, 32))
    one = activation_bytes(PRESETS["tiny"], stage)
    assert one > 5 << 20
    larger = activation_bytes(PRESETS["tiny"], stage.model_copy(update={"size": (64, 64)}))
    assert 3 < larger / one < 4.5


def test_what_cannot_fit_the_machine_is_refused_before_it_starts() -> None:
    cpus = Cluster(num_cpus=2, num_gpus=0, num_nodes=1, is_own=True)
    run = TRAININGS["paper_stage1"](["clips"], "out")
    batch = {"stage1": run.stages["stage1"].model_copy(update={"batch_size": 4096, "perceptual_weight": 0})}
    with pytest.raises(
        UserError, match=r"stage1 does not fit this machine: .* 4096 clips each .* --activation-checkpointing"
    ):
        plan_resources(resolve(run.model_copy(update={"stages": batch})), cpus)
    many = run.model_copy(update={"workers": 1024, "stages": batch})
    with pytest.raises(UserError, match=r"1024 workers take about \d{4}\.\d GiB for weights"):
        plan_resources(resolve(many), cpus)
    assert plan_resources(resolve(TRAININGS["tiny"](["clips"], "out")), cpus) == 1


def test_figures_go_on_where_a_kill_cut_them_off(tmp_path: Path) -> None:
    folder = str(tmp_path)
    with Recorder(folder, from_step=0, run={}, name="x", wandb=None) as recorder:
        recorder.write(0, {"psnr": 8.0}, group="held_out")
        for step in range(1, 5):
            recorder.write(step, {"l1": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "gro')
    with Recorder(folder, from_step=3, run={}, name="x", wandb=None) as recorder:
        recorder.write(4, {"l1": 0.5})
    assert [(line["step"], line.get("l1")) for line in read_metrics(folder)] == [
        (0, None),
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
        (4, 0.5),
    ]
    with Recorder(folder, from_step=0, run={}, name="x", wandb=None) as recorder:  # from the beginning, after all
        recorder.write(0, {"psnr": 9.0}, group="held_out")
    assert read_metrics(folder) == [{"step": 0, "group": "held_out", "psnr": 9.0}]


def test_strips_show_a_clip_above_its_reconstruction() -> None:
    real = np.arange(17, dtype=np.uint8)[None, :, None, None, None].repeat(8, 2).repeat(8, 3).repeat(3, 4)
    strip = picture_strip(real, real + 100)
    assert strip.shape == (16, 9 * 8, 3)
    assert strip[0, ::8, 0].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert strip[8, ::8, 0].tolist() == [n + 100 for n in strip[0, ::8, 0].tolist()]


def test_the_first_steps_do_not_count_in_the_overall_speed() -> None:
    speed = Speed(flops_per_clip=1e9, peak_flops=1e12, workers=2)
    assert speed.overall() == {}
    speed.step(4, 100.0)
    assert speed.recent()["waiting"] > 1
    speed.step(4, 0.0)
    figures = speed.overall()
    assert figures["waiting"] == 0
    assert figures["mfu"] == pytest.approx(figures["clips_per_second"] * 1e9 / 2e12)
