"""One Ray and one S3 for the whole session, and a corpus of small videos to tokenize."""

from __future__ import annotations

import gc
import math
import os

# Else each of hundreds of processes would compile the project, and each of `make test` all of its tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# `make test` runs at least as many processes as there are cores: further threads would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# As the command does: an encoder has a thread for each core, and each would spin while it waits for another.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Ray gives its workers the niceness 15, and beside the other processes of `make test` they would get next to no time.
os.environ.setdefault("RAY_worker_niceness", "0")

# Each of hundreds of processes would read the metadata of every installed package to look for plugins of pydantic.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

# A report takes 2 core seconds a run; tests of reports ask for one.
os.environ["VIDSHARD_REPORT"] = "none"

import signal
import sys
from collections.abc import Generator, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import ray
import torch
from xdist.remote import Producer

from tests.support import budget
from tests.support.cli import SMALL, tokenize
from tests.support.corpus import GOOD_VIDEOS
from tests.support.faulty_s3 import FaultyS3
from tests.support.processes import OBJECT_STORE, PATIENCE, RUN, only_the_text_is_rejected
from tests.support.scheduling import GroupScheduling, turn_of
from tests.support.shards import Tokens, tokens_by_clip
from tests.support.videos import (
    Recipe,
    write_audio_only,
    write_damaged,
    write_truncated,
    write_video,
    write_without_frames,
)
from vidshard.jobs.runtime.private_ray import without_idle_processes
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import load_tokenizer

sys.dont_write_bytecode = False

# Started in the background, or under nohup, these processes would ignore signals, and so would those that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """URL of an S3 server of our own, with one bucket ``videos``; the environment points every client at it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "a-secret-that-must-not-be-seen",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    boto3.client("s3").create_bucket(Bucket="videos")
    yield url
    for name, value in before.items():
        if value is None:
            os.environ.pop(name)
        else:
            os.environ[name] = value
    server.stop()


@pytest.fixture(scope="session")
def s3_proxy(s3: str) -> Iterator[FaultyS3]:
    """A proxy in front of ``s3``."""
    with FaultyS3(s3).running() as proxy:
        yield proxy


@pytest.fixture
def faulty_s3(s3_proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """S3 that misbehaves when told to; what this process, or one begun now, opens is behind it.

    Its clients ask once before it is our turn to try again, as users can tell them, too, by fsspec's settings.
    """
    import fsspec.config

    patience = {"config_kwargs": {"retries": {"total_max_attempts": 1}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": s3_proxy.url, **patience})
    monkeypatch.setenv("FSSPEC_S3_ENDPOINT_URL", s3_proxy.url)
    s3_proxy.seen.clear()
    yield s3_proxy
    s3_proxy.behave()


@pytest.fixture(scope="session")
def ray_session(s3_proxy: FaultyS3) -> Iterator[None]:
    """Ray on this machine. Its workers reach S3 through the proxy, as `faulty_s3` in this process does."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # also for the driver: Ray Data has an actor for it
    environment = {
        "FSSPEC_S3_ENDPOINT_URL": s3_proxy.url,
        "VIDSHARD_STORAGE_RETRY_SECONDS": PATIENCE,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with without_idle_processes(log_monitor=False):
            ray.init(
                address="local",
                num_cpus=2,
                object_store_memory=OBJECT_STORE,
                include_dashboard=False,
                log_to_driver=False,
            )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def good_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``GOOD_VIDEOS``, a hidden file, and a file that is no video."""
    folder = tmp_path_factory.mktemp("good")
    for name, recipe in GOOD_VIDEOS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_video(folder / name, recipe)
    (folder / "notes.txt").write_text("not a video")
    (folder / ".hidden.mp4").write_bytes(b"\0")
    return folder


@pytest.fixture(scope="session")
def bad_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one file for each of ``BAD_VIDEOS``."""
    folder = tmp_path_factory.mktemp("bad")
    whole = write_video(tmp_path_factory.mktemp("whole") / "whole.mp4", Recipe(num_frames=80))
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    write_audio_only(folder / "sound.mp4")
    write_without_frames(folder / "no_frames.avi")
    write_truncated(folder / "cut.mp4", whole, 0.6)
    write_damaged(folder / "damaged.mp4", whole)
    return folder


@pytest.fixture(scope="session")
def output(good_videos: Path, bad_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and bad videos tokenized once, in this process, for the tests that only look."""
    out = tmp_path_factory.mktemp("output") / "tokens"
    result = tokenize(good_videos, bad_videos, "--out", out, *SMALL)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="session")
def many_spans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``tests.support.processes.RUN`` 36 clips in 30 spans, and a file that is no video."""
    folder = tmp_path_factory.mktemp("many")
    for number in range(3):
        write_video(folder / f"{number}.mp4", Recipe(num_frames=200 + number, rate=Fraction(25), codec="mpeg4"))
    (folder / "text.mp4").write_text("no video")
    return folder


@pytest.fixture(scope="session")
def undisturbed(many_spans: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    """Tokens of each clip of ``many_spans`` by a run in this process."""
    out = tmp_path_factory.mktemp("undisturbed") / "tokens"
    result = tokenize(many_spans, "--out", out, *RUN)
    assert result.exit_code == 0, result.output
    assert only_the_text_is_rejected(out)
    return tokens_by_clip(out)


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights under the names of torchvision's vgg16, without its classifier."""
    widths = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
    widths |= {17: (256, 512), 19: (512, 512), 21: (512, 512), 24: (512, 512), 26: (512, 512), 28: (512, 512)}
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for number, (inputs, outputs) in widths.items():
        kernel = torch.randn(outputs, inputs, 3, 3, generator=generator)
        weights[f"features.{number}.weight"] = kernel * math.sqrt(2 / (9 * inputs))
        weights[f"features.{number}.bias"] = 0.1 * torch.randn(outputs, generator=generator)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: on busy cores two that wait for each other take 0.4 s for a clip, one takes 4 ms."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> VidTok:
    """The preset ``tiny`` with the random weights of seed 0."""
    return load_tokenizer(PRESETS["tiny"], None, seed=0)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> GroupScheduling:
    """Keep what shares fixtures in one process."""
    return GroupScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest, so that none of them is left for the end."""
    items.sort(key=lambda item: turn_of(item.nodeid))


def pytest_collection_finish() -> None:
    """Let the garbage collector pass by what imports have made: a full collection takes milliseconds, not a second."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None]:
    """Leave real-time scheduling after what was set up."""
    yield
    _leave_real_time()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None]:
    """Leave real-time scheduling after each test."""
    yield
    _leave_real_time()


def _leave_real_time() -> None:
    """Schedule this thread as usual again: as root the encoder SVT-AV1 gives it real-time priority and leaves it there.

    Every other process would then wait for the tests, Ray first of all.
    """
    if hasattr(os, "sched_setscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which tests took longer than their budget."""
    for line in budget.summary(terminalreporter.stats, config.rootpath):
        terminalreporter.write_line(line)
