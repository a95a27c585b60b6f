"""Shards that somebody else made: whatever they hold, they are named, and touch nothing outside."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.cli import SMALL, tokenize, vidshard_exits
from tests.support.http_server import Answer, http_server
from tests.support.videos import Recipe, write_video
from vidshard.jobs.shards.decode import file_name
from vidshard.jobs.shards.verify import _check_shard, verify_output
from vidshard.pipeline import storage
from vidshard.pipeline.open_output import open_output
from vidshard.pipeline.output.committed import shard_spans
from vidshard.pipeline.output.lease import Lease, LeaseLostError
from vidshard.pipeline.output.shard_reader import ShardError, check_shard, find_clips, read_clips, read_payloads
from vidshard.pipeline.reader.token_shards import TokenShards

FIXTURE = Path(__file__).parents[2] / "fixtures" / "format_1" / "tokens"
VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 10**30, "", "x", "\x1b]52;c;x\x07", [], {}, [1], ["a"], [[]], {"a": {}}, "../../x",
    float("nan"), [None], ["a-0-1", 3], [{}], "[" * 5000, '{"a":' * 5000, "9" * 6000, [2**31, 2**31], ["x-0-end"] * 2,
]  # fmt: skip


@pytest.fixture(scope="module")
def table() -> pa.Table:
    [path] = (FIXTURE / "shards").glob("*.parquet")
    return pq.read_table(path)


def write(path: Path, table: pa.Table, **metadata: Any) -> Path:
    """A shard with other values in its metadata."""
    changed = dict(table.schema.metadata)
    for key, value in metadata.items():
        data = value if isinstance(value, bytes) else (value if isinstance(value, str) else json.dumps(value)).encode()
        changed[f"vidshard.{key}".encode()] = data
    pq.write_table(table.replace_schema_metadata(changed), path)
    return path


def failure(read: Callable[[], object]) -> Exception | None:
    try:
        read()
    except Exception as error:  # noqa: BLE001
        return error
    return None


def read_in_every_way(path: Path) -> None:
    """Everything that reads a shard; nothing but ShardError may come out."""
    for read in (
        lambda: check_shard(str(path)),
        lambda: list(read_clips(str(path))),
        lambda: list(read_payloads(str(path))),
        lambda: find_clips([str(path)], "a"),
        lambda: shard_spans(str(path)),
        lambda: _check_shard(str(path), None),
        lambda: open_output(str(path)).provenance,
        lambda: list(TokenShards(str(path), columns=["tokens", "clip_id", "frame_pts_seconds", "fps"])),
    ):
        error = failure(read)
        if error is not None:
            assert isinstance(error, ShardError), repr(error)
            assert error.is_damage, error
            assert str(path) in str(error)


def test_any_metadata_gives_a_shard_error(table: pa.Table, tmp_path: Path) -> None:
    keys = [key.decode().removeprefix("vidshard.") for key in table.schema.metadata if key.startswith(b"vidshard.")]
    for key in [*keys, "payloads", "notice"]:
        for value in [*VALUES, b"\xff\xfe"]:
            read_in_every_way(write(tmp_path / "s.parquet", table, **{key: value}))


def test_any_column_of_another_kind_gives_a_shard_error(table: pa.Table, tmp_path: Path) -> None:
    numbers = random.Random(0)
    count = table.num_rows
    for at, field in enumerate(table.schema):
        for column in (
            pa.nulls(count, field.type), pa.nulls(count), pa.array([-1] * count), pa.array(["\x1b"] * count),
            pa.array([float("nan")] * count), pa.array([[]] * count, pa.list_(pa.float64())),
            pa.array([b"\xff"] * count),
        ):  # fmt: skip
            changed = table.set_column(at, pa.field(field.name, column.type), column)
            pq.write_table(changed, tmp_path / "s.parquet")
            read_in_every_way(tmp_path / "s.parquet")
        pq.write_table(table.drop_columns([field.name]), tmp_path / "s.parquet")
        read_in_every_way(tmp_path / "s.parquet")
    whole = next((FIXTURE / "shards").glob("*.parquet")).read_bytes()
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(numbers.randint(1, 8)):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
        (tmp_path / "s.parquet").write_bytes(data)
        read_in_every_way(tmp_path / "s.parquet")


def bomb(table: pa.Table, kind: str) -> pa.Table:
    """The rows many times, with a column that packs to nothing."""
    count = 1_000
    rows = pa.concat_tables([table.slice(0, 1)] * count)
    if kind == "one text":
        dictionary = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array(["x" * 2_000_000]))
        return rows.append_column("more", dictionary)
    empty = pa.array([None] * count, pa.list_(pa.int64(), 140_000))
    return rows.append_column("more", empty)


@pytest.mark.parametrize("kind", ["one text", "empty lists"])
def test_what_takes_too_much_memory_is_refused_by_its_footer(kind: str, table: pa.Table, tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    changed = bomb(table, kind)
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    assert path.stat().st_size < 1 << 20
    for read in (lambda: check_shard(str(path)), lambda: list(read_clips(str(path)))):
        with pytest.raises(ShardError, match="bytes in memory"):
            read()


@pytest.mark.parametrize(
    "clip_id",
    [
        "../victim",
        "/abs",
        "a/b",
        "..",
        "",
        ".",
        "a\\b",
        "a\0b",
        "a" * 300,
        "-x",
        "\u202egpm",
        "CON:",
        "a\n",
        "x/../y",
        "\ud800",
    ],
)
def test_ids_of_a_shard_leave_no_folder(clip_id: str) -> None:
    name = file_name(clip_id)
    assert Path(name).name == name
    assert name.startswith("clip-")
    assert name.isascii()


def test_ids_of_vidshard_are_the_names_of_files(table: pa.Table) -> None:
    for clip_id in table["clip_id"].to_pylist():
        assert file_name(clip_id) == f"{clip_id}.mp4"
    long = f"{'0' * 24}-{'a' * 8}-{10**7}"
    assert file_name(long) == f"{long}.mp4"


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return Path(shutil.copytree(FIXTURE, tmp_path / "out"))


def test_all_broken_shards_are_named_and_repaired(output: Path, table: pa.Table) -> None:
    broken = [
        write(output / "shards" / "a1.parquet", table, identity="[" * 5000),
        write(output / "shards" / "a2.parquet", table, spans={"x": 1}),
        write(output / "shards" / "a3.parquet", table, tokenizer="7"),
        write(output / "shards" / "a4.parquet", table, shape=["x"]),
        output / "shards" / "a5.parquet",
    ]
    broken[-1].write_bytes(b"PAR1 no")
    code, printed = vidshard_exits("verify", output)
    assert code == 1
    assert all(path.name in printed for path in broken), printed
    assert "Traceback" not in printed
    code, printed = vidshard_exits("verify", output, "--repair")
    assert not any(path.exists() for path in broken), printed
    assert vidshard_exits("verify", output)[0] == 0


def test_shards_of_others_are_not_removed(output: Path, table: pa.Table) -> None:
    identity = json.loads(table.schema.metadata[b"vidshard.identity"])
    others = [
        write(output / "shards" / "a1.parquet", table, identity=identity | {"fps": "1"}),
        write(output / "shards" / "a2.parquet", table, format_version="99"),
    ]
    code, printed = vidshard_exits("verify", output, "--repair")
    assert code == 1
    assert all(path.exists() for path in others), printed


def test_a_repair_that_lost_its_lease_changes_nothing(
    output: Path, table: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.console import Console

    path = output / "shards" / "a1.parquet"
    path.write_bytes(b"PAR1 no")
    checked = Lease.check

    def taken(self: Lease, *, now: bool = True) -> None:
        storage.write_atomic(str(output / "lease" / "000099.json"), b"{}")
        checked(self, now=now)

    monkeypatch.setattr(Lease, "check", taken)
    with pytest.raises(LeaseLostError):
        verify_output(str(output), Console(quiet=True), repair=True)
    assert path.exists()


def test_escapes_in_a_shard_do_not_reach_the_terminal(output: Path, table: pa.Table) -> None:
    evil = "x\x1b]52;c;aGk=\x07\n!! forged\u202e"
    changed = table.set_column(
        table.schema.get_field_index("uri"), table.schema.field("uri"), pa.array([evil] * table.num_rows)
    ).append_column(f"col{evil}", pa.array([evil] * table.num_rows))
    path = write(output / "e.parquet", changed, weights_source=evil, notice=evil, code_version=evil)
    code, printed = vidshard_exits("inspect", path)
    assert code == 0, printed
    for forbidden in ("\x1b]", "\x07", "\u202e", "\n!! forged"):
        assert forbidden not in printed


@pytest.mark.parametrize("source", ["hf://evil/repo/x.ckpt", "URL/x.ckpt?sig=S3CR3T", "simplecache::URL/x.ckpt"])
def test_nothing_that_a_shard_names_is_fetched(
    source: str, table: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with http_server(lambda _path: b"x") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        path = write(tmp_path / "s.parquet", table, weights_source=source.replace("URL", server.url))
        for command in (["decode", path, "--all", tmp_path / "clips", "--each-clip"], ["verify", path, "--exact", 1]):
            code, printed = vidshard_exits(*command)
            assert code == 2, printed
            assert "--weights" in printed
            assert "S3CR3T" not in printed
    assert server.asked == []


def test_sources_that_a_shard_names_are_fetched_only_if_asked(table: pa.Table, tmp_path: Path) -> None:
    with http_server(lambda _path: None) as server:
        at = table.schema.get_field_index("uri")
        uris = pa.array([f"{server.url}/internal"] * table.num_rows)
        path = write(tmp_path / "s.parquet", table.set_column(at, table.schema.field("uri"), uris))
        code, printed = vidshard_exits("decode", path, "--all", tmp_path / "clips", "--side-by-side")
        assert code == 0, printed
        assert "--fetch-sources" in printed
        code, printed = vidshard_exits("verify", path, "--exact", 1)
        assert code == 2, printed
        assert server.asked == []
        fetching = ("decode", path, "--all", tmp_path / "c", "--side-by-side", "--fetch-sources")
        code, printed = vidshard_exits(*fetching)
        assert code == 0, printed
        assert "is refused: its address 127.0.0.1 is not public" in " ".join(printed.split())
        assert server.asked == []
        code, printed = vidshard_exits(*fetching, "--allow-private")
        assert code == 0, printed
        assert server.asked


@pytest.fixture(scope="module")
def small_video(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    recipe = Recipe(num_frames=16, codec="mpeg4", width=32, height=32)
    return write_video(tmp_path_factory.mktemp("source") / "v.mp4", recipe).read_bytes()


def test_sources_whose_server_turned_hostile_are_named_and_no_clip_is_compared_with_them(
    small_video: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIDSHARD_STORAGE_RETRY_SECONDS", "0.2")
    monkeypatch.setattr("vidshard.pipeline.storage.retry.RETRY_SECONDS", 0.2)
    answers: dict[str, Answer | None] = {
        "changed": small_video.replace(b"mdat", b"mdaT"),
        "cut": small_video[: len(small_video) // 2],
        "gone": None,
        "redirects for ever": (302, {"Location": "/v.mp4"}, b""),
        "redirects to a file": (302, {"Location": "file:///etc/passwd"}, b""),
        "compressed": (200, {"Content-Encoding": "gzip"}, gzip.compress(small_video[:-9] + bytes(9))),
    }
    now: list[Answer | None] = [small_video]
    with http_server(lambda _path: b"x") as other, http_server(lambda _path: now[0]) as server:
        out = tmp_path / "out"
        made = tokenize(f"{server.url}/v.mp4", "--out", out, *SMALL)
        assert made.exit_code == 0, made.output
        verify = ("verify", out, "--exact", 1, "--fetch-sources")
        code, printed = vidshard_exits(*verify, "--allow-private")
        assert code == 0, printed
        assert "encoded 1 clip again" in " ".join(printed.split())
        for name, answer in answers.items():
            now[0] = answer
            code, printed = vidshard_exits(*verify, "--allow-private")
            assert code == 1, (name, printed)
            assert "encoded 0 clips again" in " ".join(printed.split()), name
            assert f"of {server.url}/v.mp4" in printed, f"{name}: the source is named"
            assert "Traceback" not in printed, name
        monkeypatch.setattr("vidshard.jobs.shards.verify.typed_hosts", lambda _named: ("127.0.0.1",))
        elsewhere = other.url.replace("127.0.0.1", "localhost")
        now[0] = (302, {"Location": f"{elsewhere}/latest/meta-data"}, b"")
        code, printed = vidshard_exits(*verify)
        assert "localhost is refused" in " ".join(printed.split()), printed
        assert other.asked == [], "a redirect to a private address is not followed"


def test_names_of_files_cannot_steer_a_terminal(tmp_path: Path) -> None:
    evil = tmp_path / "in" / "x.\x1b]52;c;aGk=\x07\nerror: forged"
    evil.parent.mkdir()
    evil.write_bytes(b"x")
    for command in (
        ["tokenize", evil.parent, "--out", tmp_path / "o", "--local"],
        ["tokenize", evil, "--out", tmp_path / "o2", "--local"],
        ["inspect", evil],
        ["verify", evil],
        ["decode", evil, "--all", tmp_path, "--local"],
    ):
        _, printed = vidshard_exits(*command)
        assert not {"\x1b]", "\x07"} & {c for c in ("\x1b]", "\x07") if c in printed}, printed
        assert "\nerror: forged" not in printed
