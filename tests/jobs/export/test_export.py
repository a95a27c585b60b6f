"""The export job: counts that close, resuming, destinations, and hostile shards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vidshard
from tests.support.cli import printed_by, run, vidshard_exits
from tests.support.exports import files_of, lerobot_segments, made_output, tar_samples
from tests.support.outputs import Killed, counted
from tests.support.token_outputs import Made, provenance, write_shard
from vidshard.pipeline import storage
from vidshard.schemas.tokens import PayloadColumn

WAYS = {
    "webdataset": ["--to", "webdataset"],
    "fastvideo": ["--to", "fastvideo"],
    "lerobot-latents": ["--to", "lerobot-latents", "--map", "action=actions"],
}


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of 21 clips of latents with signals."""
    return made_output(tmp_path_factory.mktemp("made") / "latents", "kl", num_shards=2, videos_per_shard=3)


def state_of(dest: Path) -> Any:
    return json.loads((dest / "vidshard-export/export.json").read_text())


@pytest.mark.parametrize("way", WAYS)
def test_a_second_run_writes_nothing(way: str, latents: Path, tmp_path: Path) -> None:
    printed_by("export", latents, tmp_path / "x", *WAYS[way])
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")}
    assert "nothing new was written" in printed_by("export", latents, tmp_path / "x", *WAYS[way])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "x").rglob("*")} == stamps


@pytest.mark.parametrize("way", WAYS)
def test_an_export_killed_before_any_write_goes_on_to_what_an_undisturbed_one_gives(
    way: str, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidshard.jobs.export.selection.BATCH_BYTES", 600)  # several batches of a few clips
    with counted() as writes:
        printed_by("export", latents, tmp_path / "whole", *WAYS[way])
    num_writes = len(writes.made)
    for last in (2, num_writes // 3, 2 * num_writes // 3, num_writes - 2):
        dest = tmp_path / str(last)
        with counted(last), pytest.raises(Killed):
            run("export", latents, dest, *WAYS[way])
        shutil.rmtree(dest / "vidshard-export/lease", ignore_errors=True)  # its holder is dead
        assert not (dest / "meta/info.json").exists() or last >= num_writes - 2, "a dataset is there when it is whole"
        printed_by("export", latents, dest, *WAYS[way])
        assert state_of(dest) == state_of(tmp_path / "whole"), "with the counts of an undisturbed export"
        assert files_of(dest) == files_of(tmp_path / "whole")


def test_an_export_whose_process_is_killed_goes_on_once_its_lease_is_over(tmp_path: Path) -> None:
    out = made_output(tmp_path / "out", "kl", num_shards=12, videos_per_shard=8)
    printed_by("export", out, tmp_path / "whole", *WAYS["webdataset"])
    dest = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "vidshard.jobs.main", "export", str(out), str(dest), *WAYS["webdataset"]]
    )
    while not list(dest.glob("*.tar")):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not state_of(dest)["is_complete"]
    printed_by("export", out, dest, *WAYS["webdataset"])
    assert state_of(dest) == state_of(tmp_path / "whole")
    assert files_of(dest) == files_of(tmp_path / "whole")


def test_python_exports_as_the_command_does(latents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = vidshard.export(str(latents), str(tmp_path / "x"), to="lerobot-latents", columns={"action": "actions"})
    assert capfd.readouterr() == ("", "")
    assert (result.num_clips, result.num_written, result.num_new) == (21, 21, 21)
    again = vidshard.export(str(latents), str(tmp_path / "x"), to="lerobot-latents", columns={"action": "actions"})
    assert (again.num_written, again.num_new) == (21, 0)
    printed_by("export", latents, tmp_path / "y", *WAYS["lerobot-latents"])
    assert files_of(tmp_path / "x") == files_of(tmp_path / "y")
    for settings, words in (
        ({"to": "zarr"}, "give one of fastvideo, lance"),
        ({"to": "lance", "limit": 0}, "at least 1"),
    ):
        with pytest.raises(vidshard.VidshardError, match=words):
            vidshard.export(str(latents), str(tmp_path / "z"), **settings)


def test_shards_that_the_output_got_meanwhile_are_added(tmp_path: Path) -> None:
    out = made_output(tmp_path / "out", "fsq15")
    late = out / "shards/0000.parquet"
    late.rename(tmp_path / "late")
    printed_by("export", out, tmp_path / "x", "--to", "webdataset")
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").glob("*.tar")}
    (tmp_path / "late").rename(late)
    assert "42 = 42 written" in printed_by("export", out, tmp_path / "x", "--to", "webdataset")
    after = {path.name: path.read_bytes() for path in (tmp_path / "x").glob("*.tar")}
    assert len(after) == 3
    assert before.items() < after.items(), "what was there stays as it was"
    assert len(tar_samples(tmp_path / "x")) == 42


@pytest.mark.parametrize("way", ["webdataset", "lerobot-latents"])
def test_shards_that_are_gone_are_named(way: str, tmp_path: Path) -> None:
    out = made_output(tmp_path / "out", "kl")
    printed_by("export", out, tmp_path / "x", *WAYS[way])
    (out / "shards/0001.parquet").unlink()
    code, said = vidshard_exits("export", out, tmp_path / "x", *WAYS[way])
    assert code == 2
    assert "export to another folder" in " ".join(said.split())


def test_counts_close_over_filter_limit_and_duplicates(tmp_path: Path) -> None:
    out = made_output(tmp_path / "out", "fsq12")
    table = pq.read_table(out / "shards/0000.parquet")
    pq.write_table(table, out / "shards/copy.parquet", row_group_size=4)
    total, own = 42 + table.num_rows, 42
    said = printed_by("export", out, tmp_path / "a", "--to", "webdataset")
    assert f"{total} = {own} written + {table.num_rows} refused" in said
    assert f"{table.num_rows} x duplicate" in said
    ids = [sample["json"]["clip_id"] for sample in tar_samples(tmp_path / "a")]
    assert len(ids) == len(set(ids)) == own
    said = printed_by("export", out, tmp_path / "b", "--to", "webdataset", "--where", "clip_index = 0", "--limit", 4)
    assert f"{total} = 4 written + {total - 4} left out" in said


@pytest.mark.parametrize("way", WAYS)
def test_an_object_store_gets_what_a_folder_gets(way: str, s3: str, latents: Path, tmp_path: Path) -> None:
    printed_by("export", latents, tmp_path / "x", *WAYS[way], "--limit", 5)
    bucket = f"s3://videos/export-{way}"
    for _ in range(2):
        said = printed_by("export", latents, bucket, *WAYS[way], "--limit", 5)
    assert "nothing new was written" in said
    for name, data in files_of(tmp_path / "x").items():
        assert storage.read_bytes(f"{bucket}/{name}") == data, name


def test_lance_commits_once_and_takes_up_after_a_kill_at_any_write(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lance = pytest.importorskip("lance")
    monkeypatch.setattr("vidshard.jobs.export.selection.BATCH_BYTES", 600)
    monkeypatch.setattr("vidshard.jobs.export.state._SAVE_SECONDS", 0.0)
    with counted() as writes:
        printed_by("export", latents, tmp_path / "whole", "--to", "lance")
    whole = lance.dataset(str(tmp_path / "whole/clips.lance")).to_table()
    for last in range(0, len(writes.made), 3):
        dest = tmp_path / str(last)
        with counted(last), pytest.raises(Killed):
            run("export", latents, dest, "--to", "lance")
        shutil.rmtree(dest / "vidshard-export/lease", ignore_errors=True)
        assert "21 = 21 written" in printed_by("export", latents, dest, "--to", "lance")
        dataset = lance.dataset(str(dest / "clips.lance"))
        assert dataset.to_table() == whole
        kept = {file.path for fragment in dataset.get_fragments() for file in fragment.data_files()}
        assert {path.name for path in (dest / "clips.lance/data").iterdir()} == kept, "no file of a dead attempt"


def test_lance_reaches_the_object_store_that_the_other_files_go_to(s3: str, latents: Path) -> None:
    lance = pytest.importorskip("lance")
    printed_by("export", latents, "s3://videos/export-lance", "--to", "lance")
    options = {"aws_endpoint": os.environ["AWS_ENDPOINT_URL"], "allow_http": "true"}
    table = lance.dataset("s3://videos/export-lance/clips.lance", storage_options=options).to_table()
    assert table.num_rows == 21


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lance", None)
    code, said = vidshard_exits("export", latents, tmp_path / "x", "--to", "lance")
    assert code == 2
    assert "pip install 'vidshard[export]'" in said


def test_places_that_hold_something_else_are_refused(latents: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    shutil.copytree(latents, tmp_path / "copy")
    places = {"full": "is not empty (thesis.txt)", "copy": "an output of vidshard", "copy/shards/x": "an output"}
    for place, why in places.items():
        source = tmp_path / "copy" if "copy" in place else latents
        code, said = vidshard_exits("export", source, tmp_path / place, "--to", "webdataset")
        assert code == 2
        assert why in " ".join(said.split())
    code, said = vidshard_exits("export", latents, "s3://key:secret-word@videos/x", "--to", "webdataset")
    assert code == 2
    assert "secret-word" not in said


@pytest.mark.parametrize("more", [["--where", "clip_index = 0"], ["--limit", 3]])
def test_other_settings_need_another_folder(more: list[object], latents: Path, tmp_path: Path) -> None:
    printed_by("export", latents, tmp_path / "x", "--to", "webdataset")
    code, said = vidshard_exits("export", latents, tmp_path / "x", "--to", "webdataset", *more)
    assert code == 2
    assert "export to another folder" in " ".join(said.split())


HOSTILE = [
    "../../../etc/passwd",
    "/etc/passwd",
    "a.b.c",
    "a/b",
    "..",
    "",
    "\x1b[2Jx",
    "é",
    "clip-" + "0" * 32,
    "A" * 300,
]


@pytest.mark.parametrize("way", WAYS)
def test_ids_of_shards_never_become_paths(way: str, tmp_path: Path) -> None:
    out = tmp_path / "deep/down/out"
    made_output(out, "kl", num_shards=1)
    path = out / "shards/0000.parquet"
    table = pq.read_table(path).slice(0, len(HOSTILE))
    for name in ("clip_id", "video_id", "uri"):
        at = table.column_names.index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(HOSTILE))
    pq.write_table(table, path)
    before = set(tmp_path.rglob("*"))
    printed_by("export", out, tmp_path / "deep/x", *WAYS[way])
    made = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(tmp_path / "deep/x") for path in made)
    assert all(set(path.name) < set("abcdefghijklmnopqrstuvwxyz0123456789-_.") for path in made)
    if way == "webdataset":
        samples = tar_samples(tmp_path / "deep/x")
        assert sorted(sample["json"]["clip_id"] for sample in samples) == sorted(HOSTILE)
        assert all(set(sample["__key__"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for sample in samples)
    if way == "lerobot-latents":
        assert len(lerobot_segments(tmp_path / "deep/x")) == len(HOSTILE)


@pytest.mark.parametrize("name", ["../x", "a/b", "json", "Tokens", "a.b", "é"])
def test_a_payload_column_that_is_no_name_of_a_file_is_refused(name: str, tmp_path: Path) -> None:
    payload = (
        PayloadColumn(name="tokens", shape=(2,), dtype="uint8", codebook_size=4),
        PayloadColumn(name=name, shape=(2,), dtype="uint8", codebook_size=4),
    )
    write_shard(tmp_path / "out/0.parquet", [Made(video="v", count=2)], payload=payload, metadata=provenance(payload))
    code, said = vidshard_exits("export", tmp_path / "out", tmp_path / "x", "--to", "webdataset")
    assert code == 2
    assert "is no name of one" in " ".join(said.split())
    assert not (tmp_path / "x").exists()


def test_a_damaged_shard_ends_the_export_by_its_name_and_leaves_the_others_done(latents: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(latents, out)
    whole = (out / "shards/0001.parquet").read_bytes()
    row_group = pq.read_metadata(out / "shards/0001.parquet").row_group(1)
    columns = [row_group.column(at) for at in range(row_group.num_columns)]
    [page] = [c.data_page_offset for c in columns if c.path_in_schema.startswith("latents.")]
    at = page + 60
    (out / "shards/0001.parquet").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    code, said = vidshard_exits("export", out, tmp_path / "x", "--to", "webdataset")
    assert code == 2
    assert "0001.parquet" in said
    (out / "shards/0001.parquet").write_bytes(whole)
    assert "21 = 21 written" in printed_by("export", out, tmp_path / "x", "--to", "webdataset")
    state = state_of(tmp_path / "x")
    assert state["is_complete"]
    assert state["provenance"]["vidshard.weights_sha256"] == "ab" * 32
