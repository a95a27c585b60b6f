"""Pushing to a Hub of our own, by the real client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pyarrow.parquet as pq
import pytest
import yaml

import vidshard
from tests.support.cli import printed_by, vidshard_exits
from tests.support.exports import made_output
from tests.support.hub_server import HubServer
from vidshard.jobs.export.card import MEANINGS, with_card
from vidshard.pipeline import storage
from vidshard.schemas.tokens import CLIP_FIELDS

DATASET = "hf://datasets/me/tokens"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that this process uses, without repositories."""
    with HubServer().running() as server:
        template = hub_constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub_constants.ENDPOINT, server.url)
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr("time.sleep", lambda _seconds: None)
        yield server


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of two shards."""
    return made_output(tmp_path_factory.mktemp("push") / "tokens", "fsq15", num_shards=2, videos_per_shard=3)


def shards_of(out: Path) -> dict[str, bytes]:
    return {f"shards/{path.name}": path.read_bytes() for path in (out / "shards").iterdir()}


def pushed_shards(hub: HubServer) -> dict[str, bytes]:
    files = hub.repositories["me/tokens"]
    return {path: data for path, data in files.items() if path.startswith("shards/")}


def test_a_push_sends_every_shard_and_a_card_and_the_next_one_nothing(hub: HubServer, tokens: Path) -> None:
    assert "2 shards, 21 clips; 2 of them sent now" in printed_by("push", tokens, DATASET, "--create")
    assert pushed_shards(hub) == shards_of(tokens)
    assert hub.private == {"me/tokens": True}
    commits = len(hub.commits)
    assert "nothing new was sent" in printed_by("push", tokens, DATASET)
    assert len(hub.commits) == commits, "an empty commit is none"
    assert len(hub.put()) == 2


def test_python_pushes_as_the_command_does(hub: HubServer, tokens: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = vidshard.push(str(tokens), DATASET, create=True)
    assert (result.num_shards, result.num_sent) == (2, 2)
    assert pushed_shards(hub) == shards_of(tokens)
    assert vidshard.push(str(tokens), DATASET).num_sent == 0
    assert capfd.readouterr() == ("", "")
    with pytest.raises(vidshard.VidshardError, match="give create=True too"):
        vidshard.push(str(tokens), DATASET, public=True)


def test_what_was_pushed_reads_as_an_output(hub: HubServer, tokens: Path, tmp_path: Path) -> None:
    printed_by("push", tokens, DATASET, "--create", "--public")
    assert hub.private == {"me/tokens": False}
    for path, data in hub.repositories["me/tokens"].items():
        (tmp_path / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / path).write_bytes(data)
    assert "21 clips" in printed_by("inspect", tmp_path / "data")
    front = yaml.safe_load((tmp_path / "data/README.md").read_text().split("---")[1])
    pattern = front["configs"][0]["data_files"]
    assert len(list((tmp_path / "data").glob(pattern))) == 2


def test_the_card_says_what_is_there_and_how_to_decode_it(hub: HubServer, tokens: Path) -> None:
    printed_by("push", tokens, DATASET, "--create")
    card = hub.repositories["me/tokens"]["README.md"].decode()
    for text in (
        "21 clips of 6 videos",
        "`tiny`",
        "ab" * 32,
        "vidshard decode data --clip ID",
        "| `caption` | `string` |",
    ):
        assert text in card, text
    seconds = 21 * 5 / 4
    assert f"| hours | {seconds / 3600:,.2f} |" in card
    assert "32768" in card
    front = yaml.safe_load(card.split("---")[1])
    assert "license" not in front, "that is the owner's to state"


def test_each_column_of_every_output_has_a_meaning() -> None:
    assert {field.name for field in CLIP_FIELDS} < set(MEANINGS)


def test_the_owners_text_and_front_matter_stay(hub: HubServer, tokens: Path) -> None:
    printed_by("push", tokens, DATASET, "--create")
    files = hub.repositories["me/tokens"]
    mine = files["README.md"].decode().replace("---\npretty", "---\nlicense: cc-by-4.0\npretty") + "\nWritten by me.\n"
    files["README.md"] = mine.replace("21 clips", "9 clips").encode()
    printed_by("push", tokens, DATASET)
    assert files["README.md"].decode() == mine
    files["README.md"] = b"# All mine\n"
    assert "stays as it is" in printed_by("push", tokens, DATASET)
    assert files["README.md"] == b"# All mine\n"


@pytest.mark.parametrize("mark", ["`", "|", "<script>", "[x](javascript:a)", "\n# title", "-->", "\x1b[31m"])
def test_foreign_text_cannot_leave_its_place_in_a_card(hub: HubServer, mark: str, tmp_path: Path) -> None:
    out = made_output(tmp_path / "out", "fsq12", num_shards=1)
    path = out / "shards/0000.parquet"
    table = pq.read_table(path)
    metadata = table.schema.metadata
    table = table.rename_columns([f"a{mark}b" if name == "caption" else name for name in table.column_names])
    tokenizer = json.loads(metadata[b"vidshard.tokenizer"]) | {"name": f"t{mark}"}
    table = table.replace_schema_metadata(metadata | {b"vidshard.tokenizer": json.dumps(tokenizer).encode()})
    pq.write_table(table, path, row_group_size=3)
    printed_by("push", out, DATASET, "--create")
    card = hub.repositories["me/tokens"]["README.md"].decode()
    lines = card.splitlines()
    assert [line for line in lines if line.startswith("# ") and "shapes are in" not in line] == ["# tokens"]
    assert card.count("-->") == 2
    assert "\x1b" not in card
    for line in lines:
        outside = "".join(line.split("`")[::2])
        assert line.count("`") % 2 == 0 or line.startswith("```"), line
        assert "<script>" not in outside
        assert "javascript" not in outside
        if line.startswith("| `a"):
            assert line.count("|") == 4


def test_a_push_killed_between_commits_goes_on_and_sends_no_content_twice(
    hub: HubServer, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidshard.jobs.export.push._COMMIT_FILES", 1)
    hub.answers["POST /api/datasets/me/tokens/commit"] = 500
    code, said = vidshard_exits("push", tokens, DATASET, "--create")
    assert code == 1
    assert "try the same command later" in " ".join(said.split())
    hub.answers.clear()
    assert "2 of them sent now" in printed_by("push", tokens, DATASET)
    assert pushed_shards(hub) == shards_of(tokens)
    assert len(hub.put()) == len(set(hub.put())) == 2


def test_only_shards_that_are_finished_are_sent_and_later_ones_follow(
    hub: HubServer, tokens: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tokens, out)
    late = out / "shards/0001.parquet"
    data = late.read_bytes()
    late.rename(out / "shards/.0001.parquet.0123abcd.tmp")
    printed_by("push", out, DATASET, "--create")
    assert list(pushed_shards(hub)) == ["shards/0000.parquet"]
    late.write_bytes(data)
    (out / "shards/.0001.parquet.0123abcd.tmp").unlink()
    assert "1 of them sent now" in printed_by("push", out, DATASET)
    assert pushed_shards(hub) == shards_of(tokens)
    assert "21 clips of 6 videos" in hub.repositories["me/tokens"]["README.md"].decode()


def test_shards_of_something_else_are_refused_and_deleted_only_when_told(hub: HubServer, tokens: Path) -> None:
    printed_by("push", tokens, DATASET, "--create")
    hub.repositories["me/tokens"]["shards/old.parquet"] = b"old"
    code, said = vidshard_exits("push", tokens, DATASET)
    assert code == 2
    assert "shards/old.parquet" in said
    assert "1 shard deleted that the output has not" in printed_by("push", tokens, DATASET, "--prune")
    assert pushed_shards(hub) == shards_of(tokens)


def test_a_shard_that_changed_is_sent_anew(hub: HubServer, tokens: Path) -> None:
    printed_by("push", tokens, DATASET, "--create")
    files = hub.repositories["me/tokens"]
    files["shards/0000.parquet"] = files["shards/0000.parquet"][:-1] + b"x"
    assert "1 of them sent now" in printed_by("push", tokens, DATASET)
    assert pushed_shards(hub) == shards_of(tokens)


def test_an_output_on_an_object_store_is_pushed(hub: HubServer, s3: str, tokens: Path) -> None:
    for path in (tokens / "shards").iterdir():
        storage.write_atomic(f"s3://videos/to-push/shards/{path.name}", path.read_bytes())
    printed_by("push", "s3://videos/to-push", DATASET, "--create")
    assert pushed_shards(hub) == shards_of(tokens)


REFUSED = {
    "no such dataset": ({}, DATASET, 2, "there is no dataset me/tokens.*--create"),
    "a token that is not accepted": ({"GET /api/datasets": 401}, DATASET, 2, "does not accept the token.*HF_TOKEN"),
    "a token that may not read": ({"GET /api/datasets": 403}, DATASET, 2, "may not write to me/tokens"),
    "a token that may not write": ({"preupload": 403}, f"{DATASET} --create", 1, "may not write to me/tokens"),
    "a token that may not create": ({"create": 403}, f"{DATASET} --create", 2, "may not write to me/tokens"),
    "a Hub that fails": ({"preupload": 503}, f"{DATASET} --create", 1, "HTTP 503: try the same command later"),
    "a full account": ({"lfs": 413}, f"{DATASET} --create", 1, "no more data of this account"),
    "a model": ({}, "hf://me/tokens", 2, "a dataset of the Hub is hf://datasets/OWNER/NAME"),
    "a file": ({}, f"{DATASET}/shards", 2, "a dataset of the Hub is hf://datasets/OWNER/NAME"),
    "no reference": ({}, "me/tokens", 2, "a dataset of the Hub is hf://datasets/OWNER/NAME"),
    "public without create": ({}, f"{DATASET} --public", 2, "give --create too"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pushed_is_said_with_the_remedy_and_without_the_token(
    hub: HubServer, case: str, tokens: Path
) -> None:
    answers, target, exit_code, said = REFUSED[case]
    hub.answers |= answers
    code, text = vidshard_exits("push", tokens, *target.split())
    assert code == exit_code, text
    assert __import__("re").search(said, " ".join(text.split())), text
    assert hub.token not in text
    assert "Traceback" not in text


def test_without_a_token_nothing_is_asked(hub: HubServer, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    code, said = vidshard_exits("push", tokens, DATASET)
    assert code == 2
    assert "set HF_TOKEN to a token with write permission" in " ".join(said.split())
    assert not hub.asked


def test_a_file_that_gitignore_names_is_missed(hub: HubServer, tokens: Path) -> None:
    hub.ignored = ("shards/0001.parquet",)
    code, said = vidshard_exits("push", tokens, DATASET, "--create")
    assert code == 1
    assert "me/tokens lacks 1 shard" in " ".join(said.split())


def test_a_command_of_a_user_finds_hub_and_token_in_its_environment(
    hub: HubServer, tokens: Path, tmp_path: Path
) -> None:
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    command = [str(Path(sys.executable).with_name("vidshard")), "push", str(tokens), DATASET, "--create"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert pushed_shards(hub) == shards_of(tokens)
    assert hub.token not in done.stdout + done.stderr


def test_a_new_card_has_the_size_of_the_hubs_categories() -> None:
    for num_clips, size in ((1, "n<1K"), (1000, "1K<n<10K"), (10**12, "n>1B")):
        assert f"- {size}" in with_card("", None, num_clips)
