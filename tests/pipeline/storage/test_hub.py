"""Files of the Hugging Face Hub, from a server of our own that speaks its protocol, to processes as users start them.

The library reads its environment when it is imported, so every test that fetches does it in a process of its own.
"""

from __future__ import annotations

import json
import sys
from fractions import Fraction
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests.support.file_hub import NEW, OLD, TOKEN, Hub, run
from tests.support.videos import Recipe, write_video
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.weights import seeded_weights, weights_digest
from vidshard.pipeline.output.layout import shard_paths

VIDSHARD = str(Path(sys.executable).with_name("vidshard"))
REFERENCE = "hf://owner/models/checkpoints/tiny.ckpt"

FETCH = """
import json, sys, time
time.sleep = lambda seconds: None  # the library waits between its attempts
from vidshard.pipeline import storage
refused = False
for reference in sys.argv[1:]:
    try:
        with storage.local_copy(reference) as path:
            print(json.dumps([path.name, path.read_text(), storage.pinned(reference)]))
    except storage.StorageError as error:
        print(f"refused: {error}", file=sys.stderr)
        refused = True
sys.exit(refused)
"""


def fetch(hub: Hub, home: Path, reference: str, **environment: str) -> list[str]:
    """[file name, content, reference by commit]."""
    result = run(hub, home, sys.executable, "-c", FETCH, reference, **environment)
    assert result.returncode == 0, result.stderr
    name, content, pinned = json.loads(result.stdout)
    return [name, content, pinned]


def test_a_file_is_downloaded_once_and_pinned_to_its_commit(hub: Hub, tmp_path: Path) -> None:
    expected = ["tiny.ckpt", "old weights", f"hf://owner/models@{OLD}/checkpoints/tiny.ckpt"]
    assert fetch(hub, tmp_path, REFERENCE) == expected
    assert fetch(hub, tmp_path, REFERENCE) == expected
    assert hub.asked("GET") == ["/owner/models/resolve/main/checkpoints/tiny.ckpt"]
    assert hub.tokens == {f"Bearer {TOKEN}"}


def test_a_branch_that_moved_on_gives_the_new_file_and_its_commit_the_old_one(hub: Hub, tmp_path: Path) -> None:
    pinned = fetch(hub, tmp_path, REFERENCE)[2]
    hub.files["owner/models", NEW, "checkpoints/tiny.ckpt"] = b"new weights"
    hub.branches["main"] = NEW
    assert fetch(hub, tmp_path, REFERENCE)[1:] == ["new weights", f"hf://owner/models@{NEW}/checkpoints/tiny.ckpt"]
    asked = len(hub.requests)
    assert fetch(hub, tmp_path, pinned)[1:] == ["old weights", pinned]
    assert len(hub.requests) == asked  # a commit in the cache asks nobody
    assert fetch(hub, tmp_path / "empty", pinned)[1:] == ["old weights", pinned]


def test_a_large_file_comes_from_another_host_that_sees_no_token(hub: Hub, tmp_path: Path) -> None:
    hub.storage["/a-signed-address"] = b"old weights"
    assert fetch(hub, tmp_path, REFERENCE)[1:] == ["old weights", f"hf://owner/models@{OLD}/checkpoints/tiny.ckpt"]
    assert hub.asked("GET") == []


def test_a_download_that_breaks_off_leaves_nothing_behind(hub: Hub, tmp_path: Path) -> None:
    hub.cut_off = True
    result = run(hub, tmp_path, sys.executable, "-c", FETCH, REFERENCE)
    assert result.returncode == 1
    assert f"refused: cannot read {REFERENCE}: the connection to the Hub fails (RemoteProtocolError)" in result.stderr
    hub.cut_off = False
    assert fetch(hub, tmp_path, REFERENCE)[1] == "old weights"


@pytest.mark.parametrize("reference", [REFERENCE, REFERENCE.replace("/checkpoints", "@main/checkpoints")])
def test_offline_the_cache_is_used_and_nobody_asked(hub: Hub, tmp_path: Path, reference: str) -> None:
    online = fetch(hub, tmp_path, REFERENCE)
    asked = len(hub.requests)
    assert fetch(hub, tmp_path, reference, HF_HUB_OFFLINE="1") == online
    assert len(hub.requests) == asked


def test_a_hub_that_is_down_leaves_what_is_cached(hub: Hub, tmp_path: Path) -> None:
    online = fetch(hub, tmp_path, REFERENCE)
    assert fetch(hub, tmp_path, REFERENCE, HF_ENDPOINT="http://127.0.0.1:9") == online


REFUSED: list[tuple[dict[str, str], dict[str, str]]] = [
    (
        {},
        {
            "hf://owner/models/nothing.ckpt": "owner/models has no file nothing.ckpt at revision main: check the path",
            "hf://owner/models@v9/checkpoints/tiny.ckpt": "has no revision v9: name a branch, a tag or a full commit",
            "hf://owner/nothing/tiny.ckpt": "there is no repository owner/nothing, or it is private",
            "hf://owner/gated/tiny.ckpt": "owner/gated is gated: ask for access",
            "hf://owner/denied/tiny.ckpt": "denies access (HTTP 401): check that HF_TOKEN is valid",
            "hf://owner/forbidden/tiny.ckpt": "denies access (HTTP 403)",
            "hf://owner/broken/tiny.ckpt": "HTTP 500: try again later",
            "hf://owner/odd/tiny.ckpt": "HTTP 404: check the reference and HF_ENDPOINT",
            "hf://owner/page/tiny.ckpt": "not a Hugging Face Hub: check HF_ENDPOINT",
            "hf://tiny.ckpt": "is hf://OWNER/REPO/PATH or hf://OWNER/REPO@REVISION/PATH",
            "hf://owner/models@/tiny.ckpt": "is hf://OWNER/REPO/PATH or hf://OWNER/REPO@REVISION/PATH",
            "hf://owner/models": "names no file",
            "hf://owner/models/checkpoints/": "has no file checkpoints",
            "hf://owner/models/../tiny.ckpt": "names no file",
            "hf://datasets/owner/models/tiny.ckpt": "names a dataset",
        },
    ),
    (
        {"HF_HUB_OFFLINE": "1"},
        {
            REFERENCE: "HF_HUB_OFFLINE is set, and the cache in",
        },
    ),
    (
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        {
            REFERENCE: "connection to the Hub fails (ConnectError): check the network",
        },
    ),
    (
        {"HF_ENDPOINT": "no address"},
        {
            REFERENCE: "check the network, the proxy and HF_ENDPOINT",
        },
    ),
    (
        {"HF_HOME": "/proc/nowhere"},
        {
            REFERENCE: "the cache in /proc/nowhere/hub cannot be used",
        },
    ),
]
"""Variables of the environment, and the message for each reference then."""


@pytest.mark.parametrize(("environment", "refused"), REFUSED)
def test_what_cannot_be_had_is_named_with_the_cause_and_what_to_do(
    hub: Hub, tmp_path: Path, environment: dict[str, str], refused: dict[str, str]
) -> None:
    hub.refusals = {
        "owner/gated": (403, {"X-Error-Code": "GatedRepo"}),
        "owner/denied": (401, {}),
        "owner/forbidden": (403, {}),
        "owner/broken": (500, {}),
        "owner/odd": (404, {}),
        "owner/page": (200, {"ETag": '"page"'}),
    }
    result = run(hub, tmp_path, sys.executable, "-c", FETCH, *refused, **environment)
    assert result.returncode == 1
    assert not result.stdout
    said = [line for line in result.stderr.splitlines() if line.startswith("refused: ")]
    for (reference, words), line in zip(refused.items(), said, strict=True):
        assert line.startswith(f"refused: cannot read {reference}: ")
        assert words in line
    assert "Traceback" not in result.stderr
    assert not hub.asked("GET")


def test_a_token_written_into_a_reference_is_not_repeated(hub: Hub, tmp_path: Path) -> None:
    result = run(hub, tmp_path, sys.executable, "-c", FETCH, f"hf://{TOKEN}@owner/models/tiny.ckpt")
    assert "cannot read hf://owner/models/tiny.ckpt: a file of the Hub is hf://OWNER/REPO/PATH" in result.stderr


def publish(hub: Hub, tmp_path: Path, seed: int, commit: str) -> str:
    """Put weights of the tiny model on the main branch; gives their digest."""
    weights = seeded_weights(PRESETS["tiny"], seed)
    torch.save({"state_dict": weights}, tmp_path / "tiny.ckpt")
    hub.files["owner/models", commit, "checkpoints/tiny.ckpt"] = (tmp_path / "tiny.ckpt").read_bytes()
    hub.branches["main"] = commit
    return weights_digest(weights)


def test_convert_takes_a_checkpoint_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    digest = publish(hub, tmp_path, 0, OLD)
    target = tmp_path / "converted.safetensors"
    command = (VIDSHARD, "convert", REFERENCE, target, "--tokenizer", "tiny")
    result = run(hub, tmp_path / "home", *command)
    assert result.returncode == 0, result.stderr
    assert f"read hf://owner/models@{OLD}/checkpoints/tiny.ckpt" in result.stdout
    assert digest in result.stdout
    assert "tiny.ckpt:" not in result.stderr  # no progress bar in a pipe
    assert len(hub.asked("GET")) == 1


def test_a_run_with_weights_of_the_hub_names_their_commit_and_decodes_by_it(hub: Hub, tmp_path: Path) -> None:
    digest = publish(hub, tmp_path, 0, OLD)
    video = write_video(tmp_path / "a.mp4", Recipe(num_frames=20, rate=Fraction(10), width=64, height=64))
    out = tmp_path / "tokens"
    settings = ("--tokenizer", "tiny", "--fps", "10", "--frames", "17", "--size", "32", "--weights", REFERENCE)
    result = run(hub, tmp_path / "home", VIDSHARD, "tokenize", video, "--out", out, *settings, "--local")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(hub.asked("GET")) == 1

    pinned = f"hf://owner/models@{OLD}/checkpoints/tiny.ckpt"
    record = json.loads((out / "run.json").read_text())
    assert (record["weights_source"], record["run"]["weights"]) == (pinned, pinned)
    assert record["weights_sha256"] == digest
    (shard,) = shard_paths(str(out))
    assert pq.read_schema(shard).metadata[b"vidshard.weights_source"].decode() == pinned
    assert TOKEN not in (out / "run.json").read_text()

    publish(hub, tmp_path, 1, NEW)
    hub.requests.clear()
    command = (VIDSHARD, "decode", out, "--all", tmp_path / "videos", "--each-clip")
    result = run(hub, tmp_path / "another machine", *command)
    assert result.returncode == 2
    assert "not fetched by itself" in result.stderr
    assert not hub.asked("GET")
    result = run(hub, tmp_path / "another machine", *command, "--weights", pinned)
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(hub.asked("GET")) == {f"/owner/models/resolve/{OLD}/checkpoints/tiny.ckpt"}
    refused = run(hub, tmp_path / "home", *command, "--weights", REFERENCE)
    assert refused.returncode == 2
    assert "not those expected" in refused.stderr
