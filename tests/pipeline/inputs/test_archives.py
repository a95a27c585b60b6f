"""Videos in tar, zip and Parquet files: each is read where it lies, with its columns, or is a rejection by name."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.archives import sequence, write_archive
from tests.support.planning import planned
from tests.support.videos import Recipe, read_frame_number, write_video
from vidshard.pipeline import storage
from vidshard.pipeline.decode_stage import SpanDecoder, decode_again
from vidshard.pipeline.discover import Discovery, discover
from vidshard.pipeline.inputs import archives
from vidshard.pipeline.inputs.manifest import InputError
from vidshard.pipeline.output.entries import Inputs
from vidshard.pipeline.row_access import RowAccess
from vidshard.pipeline.video import member
from vidshard.schemas.locations import split_member
from vidshard.schemas.rejections import VideoError
from vidshard.schemas.uris import public_uri
from vidshard.schemas.video import ClipSpec, Limits, Part

SPEC = ClipSpec(fps=Fraction(10), num_frames=3, height=32, width=32)
Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Three videos of 6, 7 and 8 frames."""
    folder = tmp_path_factory.mktemp("videos")
    paths = [folder / f"{n}.mp4" for n in range(3)]
    return [write_video(p, Recipe(num_frames=6 + n, rate=Fraction(10))).read_bytes() for n, p in enumerate(paths)]


def members(videos: Sequence[bytes]) -> Members:
    """A WebDataset of three samples."""
    found: Members = []
    for n, data in enumerate(videos):
        facts = {"caption": f"video {n}", "score": n / 4, "tags": ["a", "b"], "id": 2**60 + n}
        found += [(f"part/{n:06d}.mp4", data), (f"part/{n:06d}.json", json.dumps(facts).encode())]
        found.append((f"part/{n:06d}.txt", f"text {n}\n".encode()))
    return found


def write_tar(path: Path, entries: Members, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, entries: Members, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def write_parquet(path: Path, videos: Sequence[bytes], *, rows: int = 2, plain: bool = False) -> Path:
    cells = list(videos) if plain else [{"bytes": data, "path": f"{n}.mp4"} for n, data in enumerate(videos)]
    table = pa.table({"video": cells, "caption": [f"video {n}" for n in range(len(videos))], "score": [0.0, 0.25, 0.5]})
    if not plain:
        features = {"video": {"_type": "Video"}, "caption": {"dtype": "string", "_type": "Value"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows)
    return path


FORMS: dict[str, Callable[[Path, list[bytes]], Path]] = {
    "tar": lambda f, v: write_tar(f / "x.tar", members(v)),
    "gnu tar": lambda f, v: write_tar(f / "x.tar", members(v), tarfile.GNU_FORMAT),
    "stored zip": lambda f, v: write_zip(f / "x.zip", members(v)),
    "deflated zip": lambda f, v: write_zip(f / "x.zip", members(v), zipfile.ZIP_DEFLATED),
    "parquet": lambda f, v: write_parquet(f / "x.parquet", v),
    "parquet of bytes": lambda f, v: write_parquet(f / "x.parquet", v, plain=True),
}


def numbers_of(found: Discovery) -> dict[str, list[int]]:
    """Numbers of the frames of each video, by its caption, as decoding gives them."""
    rows, rejections = planned(found, SPEC)
    assert not rejections, rejections
    numbers: dict[str, list[int]] = {}
    for table in SpanDecoder(spec=SPEC, max_clips=100, clips_per_pass=100)(rows):
        [row] = table.to_pylist()
        assert row["rejection"] is None, row["rejection"]
        pictures = np.frombuffer(row["frames"], np.uint8).reshape(-1, 3, 32, 32, 3)
        for clip, frames in zip(row["clips"], pictures, strict=True):
            valid = frames[: clip["num_valid_frames"]]
            numbers.setdefault(row["caption"], []).extend(read_frame_number(frame) for frame in valid)
    return numbers


EXPECTED = {f"video {n}": list(range(6 + n)) for n in range(3)}


@pytest.mark.parametrize("form", FORMS)
def test_every_video_of_an_archive_is_a_row_with_its_columns(tmp_path: Path, videos: list[bytes], form: str) -> None:
    path = FORMS[form](tmp_path, videos)
    found = discover([str(path)])
    assert numbers_of(found) == EXPECTED
    rows = found.videos.to_pylist()
    assert [row["score"] for row in rows] == [0.0, 0.25, 0.5]
    assert {row["fingerprint"] for row in rows} == {storage.fingerprint(str(path))}
    if not form.startswith("parquet"):
        assert [(row["member"], row["txt"], row["tags"], int(row["id"])) for row in rows] == [
            (f"part/{n:06d}.mp4", f"text {n}", ["a", "b"], 2**60 + n) for n in range(3)
        ]


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_those_of_the_videos_alone_and_a_clip_is_decoded_again(
    tmp_path: Path, videos: list[bytes], form: str
) -> None:
    found = discover([str(FORMS[form](tmp_path, videos))])
    rows, _ = planned(found, SPEC)
    loose = tmp_path / "loose"
    loose.mkdir()
    for n, data in enumerate(videos):
        (loose / f"{n}.mp4").write_bytes(data)
    there, _ = planned(discover([str(loose)]), SPEC)
    assert sorted(rows["video_id"].to_pylist()) == sorted(there["video_id"].to_pylist())
    row = rows.slice(1, 1).to_pylist()[0]
    [clip] = decode_again(row["uri"], row["video_id"], 1, SPEC)
    assert [read_frame_number(frame) for frame in clip.frames] == [3, 4, 5]


@pytest.mark.parametrize("form", ["tar", "stored zip", "parquet"])
def test_an_archive_in_an_object_store_is_read_as_a_local_one(
    tmp_path: Path, videos: list[bytes], form: str, s3: str
) -> None:
    import s3fs

    assert s3
    path = FORMS[form](tmp_path, videos)
    s3fs.S3FileSystem().put(str(path), f"videos/archives/{path.name}")
    found = discover([f"s3://videos/archives/{path.name}"])
    assert numbers_of(found) == EXPECTED
    assert all(public_uri(uri) == uri for uri in found.videos["uri"].to_pylist()), (
        "a member is named in plan and shards"
    )


def test_folders_and_patterns_of_archives_are_read(tmp_path: Path, videos: list[bytes]) -> None:
    write_tar(tmp_path / "a-0.tar", members(videos)[:3])
    write_tar(tmp_path / "a-1.tar", members(videos)[3:])
    for text in (str(tmp_path), f"{tmp_path}/a-*.tar"):
        assert numbers_of(discover([text])) == EXPECTED
    cells = [write_parquet(tmp_path / f"train-{n}.parquet", [v] * 3).stat().st_size for n, v in enumerate(videos)]
    assert len(cells) * 3 == discover([f"{tmp_path}/train-*.parquet"]).videos.num_rows


def test_several_videos_of_a_sample_share_its_columns_and_parts(tmp_path: Path, videos: list[bytes]) -> None:
    part = {"caption": "both", "start_seconds": 0.2, "end_seconds": 0.5, "uri": "elsewhere"}
    entries = [("1.front.mp4", videos[0]), ("1.rear.mp4", videos[1]), ("1.json", json.dumps(part).encode())]
    found = discover([str(write_tar(tmp_path / "x.tar", entries))])
    assert numbers_of(found) == {"both": [2, 3, 4, 2, 3, 4]}
    assert found.videos["json_uri"].to_pylist() == ["elsewhere"] * 2


def test_an_archive_of_images_stays_one_video(tmp_path: Path) -> None:
    for name in ("x.tar", "x.zip"):
        path = write_archive(tmp_path / name, sequence(5))
        assert discover([str(path)]).videos["uri"].to_pylist() == [str(path)]


def test_only_the_window_of_a_member_is_read(tmp_path: Path, videos: list[bytes]) -> None:
    path = write_tar(tmp_path / "x.tar", members(videos))
    found = discover([str(path)])
    data = bytearray(path.read_bytes())
    uri = found.videos["uri"][1].as_py()
    start, size = map(int, split_member(uri)[1]["bytes"].split(":"))
    data[:start], data[start + size :] = b"\xff" * start, b"\xff" * (len(data) - start - size)
    path.write_bytes(data)
    rows, _ = planned(Discovery(**{**_fields(found), "videos": found.videos.slice(1, 1)}), SPEC)
    [table] = SpanDecoder(spec=SPEC, max_clips=100, clips_per_pass=100)(rows)
    assert table["rejection"][0].as_py() is None


def _fields(found: Discovery) -> dict[str, Any]:
    return {name: getattr(found, name) for name in Discovery.__dataclass_fields__}


def faults_of(path: Path) -> list[str]:
    found = discover([str(path)])
    return [one.detail for one in Inputs.of(found.videos, Part(), found.manifests).bad_rows]


def test_a_cut_tar_gives_its_whole_members_and_names_the_rest(tmp_path: Path, videos: list[bytes]) -> None:
    path = write_tar(tmp_path / "x.tar", members(videos))
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        tar.getmembers()
        mark = tar.offset
    for end, said in ((data.index(videos[1]) + 500, "ends inside part/000001.mp4"), (mark, "no end mark")):
        path.write_bytes(data[:end])
        assert any(said in text for text in faults_of(path)), faults_of(path)
    assert "part/000000.mp4" in discover([str(path)]).videos["member"].to_pylist()
    path.write_bytes(data[: data.index(videos[1]) - 512] + b"\x01" * 512 + data[data.index(videos[1]) :])
    assert any("damaged" in text for text in faults_of(path)), faults_of(path)


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_names_that_come_twice_or_lead_out_are_rejections(tmp_path: Path, videos: list[bytes], kind: str) -> None:
    names = ["a.mp4", "a.mp4", "../b.mp4", "/etc/c.mp4", "x/../../d.mp4", "n" * 2000 + ".mp4", "good.mp4"]
    entries = [(name, videos[0]) for name in names]
    path = tmp_path / f"x.{kind}"
    with pytest.warns(UserWarning, match="Duplicate") if kind == "zip" else _nothing():
        (write_zip if kind == "zip" else write_tar)(path, entries)
    faults = faults_of(path)
    assert sum("a.mp4 is 2 times" in text for text in faults) == 2
    assert sum("leads out of the archive" in text for text in faults) == 3
    assert sum("its name has 2,004 characters" in text for text in faults) == 1
    assert len(faults) == 6
    assert discover([str(path)]).videos.filter(pa.array([False] * 6 + [True]))["fault"].to_pylist() == [None]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_colons_in_names_are_read_and_drives_are_not(tmp_path: Path, videos: list[bytes], kind: str) -> None:
    names = ["a::b.mp4", "::a.mp4", "1:23.mp4", "C:\\x.mp4", "C:/x.mp4"]
    path = tmp_path / f"x.{kind}"
    (write_zip if kind == "zip" else write_tar)(path, [(name, videos[0]) for name in names])
    found = discover([str(path)]).videos
    faults = dict(zip(found["member"].to_pylist(), found["fault"].to_pylist(), strict=True))
    assert {name for name, fault in faults.items() if fault is None} == set(names[:3])


class _nothing:  # noqa: N801
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_links_and_devices_in_a_tar_are_rejections(tmp_path: Path, videos: list[bytes]) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("good.mp4")
        info.size = len(videos[0])
        tar.addfile(info, io.BytesIO(videos[0]))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo(f"link{kind.decode()}.mp4")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
    faults = faults_of(tmp_path / "x.tar")
    assert len(faults) == 4
    assert all("a link, a device or a pipe" in text for text in faults)


def test_bombs_and_other_compressions_in_a_zip_are_rejections(
    tmp_path: Path, videos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_HELD_BYTES", 1 << 20)
    path = write_zip(
        tmp_path / "bomb.zip", [("bomb.mp4", b"\0" * (1 << 21)), ("a.mp4", videos[0])], zipfile.ZIP_DEFLATED
    )
    [fault] = faults_of(path)
    assert "bomb.mp4 is compressed and 2,097,152 bytes large" in fault
    path = write_zip(tmp_path / "other.zip", [("a.mp4", videos[0])], zipfile.ZIP_LZMA)
    assert "compressed by zip's method 14" in faults_of(path)[0]
    path = write_zip(tmp_path / "locked.zip", [("a.mp4", videos[0])])
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    assert "a.mp4 is encrypted" in faults_of(path)[0]


def test_members_of_a_zip_that_overlap_are_rejections(tmp_path: Path, videos: list[bytes]) -> None:
    path = write_zip(tmp_path / "x.zip", [("a.mp4", videos[0]), ("b.mp4", videos[1])])
    data = bytearray(path.read_bytes())
    second = data.rindex(b"PK\1\2")
    struct.pack_into("<I", data, second + 42, 40)  # its local header, inside of the first member
    path.write_bytes(data)
    assert any("overlaps" in text for text in faults_of(path))


@pytest.mark.parametrize("said", ["more", "less"])
def test_a_member_that_unpacks_to_another_size_is_a_rejection(tmp_path: Path, videos: list[bytes], said: str) -> None:
    path = write_zip(tmp_path / "x.zip", [("a.mp4", videos[0])], zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    central = data.rindex(b"PK\1\2")
    struct.pack_into("<I", data, central + 24, len(videos[0]) + (10 if said == "more" else -10))
    path.write_bytes(data)
    _, [rejection] = planned(discover([str(path)]), SPEC)
    assert rejection["reason"] == "decode_error"
    assert "unpacks to other than" in rejection["detail"]


@pytest.mark.parametrize("kind", ["tar", "stored zip", "deflated zip", "parquet"])
def test_noise_in_an_archive_never_ends_a_run(tmp_path: Path, videos: list[bytes], kind: str) -> None:
    path = FORMS[kind](tmp_path, videos)
    data = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(12):
        damaged = bytearray(data)
        for at in random.integers(0, len(data), 20):
            damaged[at] = int(random.integers(0, 256))
        end = int(random.integers(len(data) // 2, len(data)))
        path.write_bytes(damaged[:end] if random.random() < 0.5 else damaged)
        try:
            rows, rejections = planned(discover([str(path)]), SPEC)
        except InputError:
            continue
        assert all(rejection["reason"] != "internal_error" for rejection in rejections), rejections
        assert rows.num_rows + len(rejections) >= 1


@pytest.mark.parametrize(
    "options",
    ["bytes=5", "bytes=a:b", "bytes=0:999999999", "zip=0:1:0:1", "zip=1:2:3", "row=99&column=video", "row=0&column=x"],
)
def test_places_that_an_archive_does_not_have_are_rejections(tmp_path: Path, videos: list[bytes], options: str) -> None:
    path = write_parquet(tmp_path / "x.parquet", videos)
    (tmp_path / "m.jsonl").write_text(json.dumps({"uri": f"{path}#{options}"}))
    _, [rejection] = planned(discover([str(tmp_path / "m.jsonl")]), SPEC)
    assert rejection["reason"] in ("unreadable", "truncated", "decode_error", "not_a_video")


def test_a_huge_footer_and_large_texts_are_refused(
    tmp_path: Path, videos: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "x.parquet", videos)
    found = discover([str(path)])
    data = bytearray(path.read_bytes())
    data[-8:-4] = (1 << 31).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(VideoError, match="footer that is too large"):
        member.open_member(io.BytesIO(data), split_member(found.videos["uri"][0].as_py())[1])
    monkeypatch.setattr(archives, "_MAX_SIDE_BYTES", 10)
    faults = faults_of(write_tar(tmp_path / "x.tar", members(videos)))
    assert len(faults) == 3
    assert all("the .json file beside it has" in text for text in faults)


def test_a_sample_whose_json_is_broken_is_a_rejection_alone(tmp_path: Path, videos: list[bytes]) -> None:
    entries = members(videos)
    entries[1] = ("part/000000.json", b"{broken")
    entries[4] = ("part/000001.json", b"[1]")
    path = write_tar(tmp_path / "x.tar", entries)
    assert ["cannot be read" in text or "holds no object" in text for text in faults_of(path)] == [True, True]


def test_members_are_held_against_what_a_run_allows_by_their_archive(tmp_path: Path, videos: list[bytes]) -> None:
    path = write_tar(tmp_path / "x.tar", members(videos))
    uri = discover([str(path)]).videos["uri"][0].as_py()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/m.jsonl").write_text(json.dumps({"uri": uri}))
    access = RowAccess(under=(str(tmp_path / "in"),))
    [text] = discover([str(tmp_path / "in/m.jsonl")], access=access).videos["refusal"].to_pylist()
    assert "--allow-under" in text


def test_a_member_of_an_archive_that_changed_is_a_rejection(tmp_path: Path, videos: list[bytes]) -> None:
    path = write_tar(tmp_path / "x.tar", members(videos))
    rows, _ = planned(discover([str(path)]), SPEC)
    write_tar(path, members(videos[::-1]))
    tables = list(SpanDecoder(spec=SPEC, max_clips=100, clips_per_pass=100, limits=Limits())(rows))
    assert {table["rejection"][0].as_py()["reason"] for table in tables} == {"changed"}


@pytest.mark.parametrize("named", ["/etc/hostname", "http://169.254.169.254/x.npy", "s3://other/x.npy", "../x.npy"])
def test_signals_that_files_beside_videos_name_are_held_against_what_a_run_allows(
    tmp_path: Path, videos: list[bytes], named: str
) -> None:
    (tmp_path / "in").mkdir()
    entries = [("a.mp4", videos[0]), ("a.json", json.dumps({"action": named}).encode())]
    entries += [("b.mp4", videos[1]), ("b.json", b'{"action": "b.npy"}')]
    path = write_tar(tmp_path / "in/x.tar", entries)
    access = RowAccess(under=(str(tmp_path / "in"),))
    refusals = discover([str(path)], signals=["action"], access=access).videos["refusal"].to_pylist()
    assert [text and "--allow-under" in text for text in refusals] == [True, None]


def test_an_archive_that_the_user_names_is_not_held_against_it(tmp_path: Path, videos: list[bytes]) -> None:
    access = RowAccess(under=(str(tmp_path / "in"),))
    for path in (write_tar(tmp_path / "x.tar", members(videos)), write_parquet(tmp_path / "x.parquet", videos)):
        assert "refusal" not in discover([str(path)], access=access).videos.column_names


def test_columns_that_cannot_be_stored_reject_their_archive_alone(tmp_path: Path, videos: list[bytes]) -> None:
    entries = [("a.mp4", videos[0]), ("a.json", b'{"fault": 1, "manifest_fault": 2}')]
    write_tar(tmp_path / "x.tar", entries)
    write_tar(tmp_path / "y.tar", [("a.mp4", videos[1]), ("a.json", b'{"empty": {}, "deep": [{"x": {}}], "k": 1}')])
    found = discover([str(tmp_path)]).videos.sort_by("uri").to_pylist()
    assert ["'manifest_fault', which another one" in (row["fault"] or "") for row in found] == [True, False]
    assert (found[1]["empty"], found[1]["k"]) == (None, 1)
    write_tar(tmp_path / "x.tar", [*entries[:1], ("a.json", b'{"": 1}'), ("b.mp4", videos[1])])
    [fault] = faults_of(tmp_path / "x.tar")
    assert "a field without a name" in fault


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("streamed", [False, True], ids=["", "streamed"])
def test_another_byte_in_a_member_of_a_zip_is_noticed(
    tmp_path: Path, videos: list[bytes], method: int, streamed: bool
) -> None:
    whole = io.BytesIO()
    if streamed:  # then checksums stand behind the members
        whole.seekable = lambda: False  # type: ignore[method-assign]
    with zipfile.ZipFile(whole, "w", method) as archive:
        archive.writestr("a.mp4", videos[0])
    path = tmp_path / "x.zip"
    path.write_bytes(whole.getvalue())
    rows, rejections = planned(discover([str(path)]), SPEC)
    assert rows.num_rows
    assert not rejections
    [uri] = discover([str(path)]).videos["uri"].to_pylist()
    size = int(split_member(uri)[1]["zip"].split(":")[1])
    for at in range(40, 35 + size, max(1, size // 12)):
        data = bytearray(whole.getvalue())
        data[at] ^= 4
        path.write_bytes(data)
        with pytest.raises(VideoError) as caught, path.open("rb") as file:
            member.open_member(file, split_member(uri)[1]).read()
        assert caught.value.reason == "decode_error"


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())], ids=str)
def test_every_type_of_bytes_in_parquet_holds_videos(tmp_path: Path, videos: list[bytes], kind: pa.DataType) -> None:
    plain = pa.array(videos[:2])
    values = plain.dictionary_encode() if pa.types.is_dictionary(kind) else plain.cast(kind)
    pq.write_table(pa.table({"video": values}), tmp_path / "x.parquet")
    rows, rejections = planned(discover([str(tmp_path / "x.parquet")]), SPEC)
    assert rows.num_rows == 2
    assert not rejections
