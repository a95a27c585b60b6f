"""Files, folders, globs and manifests, local and on S3, to a list of videos."""

from __future__ import annotations

import glob
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tests.support.cli import SMALL, printed_by
from tests.support.corpus import GOOD_VIDEOS
from tests.support.faulty_s3 import FaultyS3
from vidshard.pipeline import storage
from vidshard.pipeline.decode_stage import probe
from vidshard.pipeline.discover import discover
from vidshard.pipeline.inputs.manifest import InputError
from vidshard.schemas.video import VideoProbe, VideoRef


def uris(*inputs: str, **options: Any) -> list[str]:
    return [str(uri) for uri in discover(inputs, **options).videos["uri"].to_pylist()]


def test_a_folder_gives_its_videos_recursively_and_nothing_hidden(good_videos: Path) -> None:
    assert uris(str(good_videos)) == sorted(str(good_videos / name) for name in GOOD_VIDEOS)


def test_files_that_are_no_videos_are_passed_over_and_counted(good_videos: Path) -> None:
    found = discover([str(good_videos)])
    assert found.num_passed_over == 1
    assert found.passed_over_extensions == ((".txt", 1),)


def test_a_file_named_outright_is_taken_whatever_its_extension(good_videos: Path) -> None:
    assert uris(str(good_videos / "notes.txt")) == [str(good_videos / "notes.txt")]


def test_overlapping_inputs_give_each_file_once(good_videos: Path) -> None:
    everything = uris(str(good_videos))
    assert uris(str(good_videos), str(good_videos / "*.mp4"), str(good_videos / "a.mp4")) == everything


def test_globs_and_recursive_globs(good_videos: Path) -> None:
    assert uris(str(good_videos / "*.mp4")) == [str(good_videos / "a.mp4"), str(good_videos / "e.mp4")]
    assert len(uris(str(good_videos / "**" / "*.mp4"))) == 3


def test_a_name_with_glob_characters_that_exists_is_a_name(tmp_path: Path) -> None:
    path = tmp_path / "take [1].mp4"
    path.touch()
    assert uris(str(path)) == [str(path)]


@pytest.mark.parametrize("name", ["a#bytes=0:10.mp4", "ä#row=1.mp4", "a#member=é.mp4", "a#rows=ö.mp4"])
def test_a_name_that_looks_like_a_place_in_an_archive_is_a_name(tmp_path: Path, good_videos: Path, name: str) -> None:
    shutil.copy(good_videos / "a.mp4", tmp_path / name)
    [uri] = uris(str(tmp_path))
    found = probe(VideoRef(uri=uri, num_bytes=-1))
    assert isinstance(found, VideoProbe), found
    assert found.uri == uri


def test_odd_names_and_pipes_in_a_folder(tmp_path: Path) -> None:
    odd = tmp_path / "what?x=1 #2 %20.mp4"
    odd.touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.mp4")).touch()
    found = discover([str(tmp_path)])
    assert found.videos["uri"].to_pylist() == [str(tmp_path / "pipe.mp4"), str(odd)]  # opening it rejects it
    assert found.passed_over_extensions == (("files whose name is not UTF-8", 1),)
    with pytest.raises(storage.StorageError, match="it is a pipe: save"):
        storage.open_binary(str(tmp_path / "pipe.mp4"))


def test_manifests_that_disagree_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("uri,caption\na.mp4,text\n")
    (tmp_path / "b.csv").write_text("uri,caption\nb.mp4,7\n")
    with pytest.raises(InputError, match="do not agree"):
        discover([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])


def test_limit_takes_the_first_in_sorted_order(good_videos: Path) -> None:
    assert uris(str(good_videos), limit=2) == [str(good_videos / "a.mp4"), str(good_videos / "b.mkv")]


@pytest.mark.parametrize("extension", ["parquet", "csv", "jsonl"])
def test_a_manifest_brings_its_columns_along(good_videos: Path, tmp_path: Path, extension: str) -> None:
    rows = {"uri": [str(good_videos / "a.mp4"), str(good_videos / "e.mp4")], "caption": ["a", "b"], "label": [3, 4]}
    path = tmp_path / f"manifest.{extension}"
    match extension:
        case "parquet":
            pq.write_table(pa.table(rows), path)
        case "csv":
            pyarrow.csv.write_csv(pa.table(rows), path)
        case _:
            path.write_text("\n".join(json.dumps(row) for row in pa.table(rows).to_pylist()))
    videos = discover([str(path)]).videos
    assert videos.select(["uri", "caption", "label"]).to_pydict() == rows


def test_relative_paths_in_a_manifest_start_at_the_manifest(good_videos: Path) -> None:
    path = good_videos.parent / "manifest.csv"
    path.write_text(f"uri\n{good_videos.name}/a.mp4\n")
    assert uris(str(path)) == [str(good_videos / "a.mp4")]


def test_a_file_in_manifest_and_folder_keeps_the_manifests_columns(good_videos: Path, tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    path.write_text(f"uri,caption\n{good_videos}/a.mp4,hello\n")
    videos = discover([str(good_videos), str(path)]).videos
    assert videos.num_rows == len(GOOD_VIDEOS)
    assert {r["uri"]: r["caption"] for r in videos.to_pylist()}[str(good_videos / "a.mp4")] == "hello"


def test_manifest_columns_that_clash_with_shard_columns_get_another_name(tmp_path: Path) -> None:
    path = tmp_path / "manifest.csv"
    path.write_text("uri,fps,video_id\na.mp4,30,x\n")
    found = discover([str(path)])
    assert found.renamed_columns == {"fps": "manifest_fps", "video_id": "manifest_video_id"}
    assert found.videos["manifest_fps"].to_pylist() == [30]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.csv", "path,caption\na,b\n", "no column 'uri'; its columns are 'path', 'caption'"),
        ("m.jsonl", "{not json", "cannot be read"),
        ("m.parquet", "PAR1", "cannot be read"),
        ("m.jsonl", "[1]\n2\n", "cannot be read"),
        ("m.jsonl", '{"uri": 1}\n{"uri": 2}', "'uri' must hold text"),
        ("m.jsonl", '{"uri": "a", "start_seconds": true}', "'start_seconds' must hold numbers"),
    ],
)
def test_an_unusable_manifest_is_refused_by_name(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as caught:
        discover([str(tmp_path / name)])
    assert name in str(caught.value)
    assert words in str(caught.value)


def test_inputs_that_name_nothing_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file, or the folder is empty"):
        discover([str(tmp_path / "nothing")])
    with pytest.raises(InputError, match="no file matches"):
        discover([str(tmp_path / "*.mp4")])
    (tmp_path / "readme.md").touch()
    with pytest.raises(InputError, match=r"other files only \(1 \.md\)"):
        discover([str(tmp_path)])


def test_s3_folders_globs_and_manifests(s3: str, good_videos: Path) -> None:
    for name in GOOD_VIDEOS:
        fsspec.open(f"s3://videos/discover/{name}", "wb").open().close()
    with fsspec.open("s3://videos/discover/list.csv", "wb") as file:
        file.write(b"uri,caption\na.mp4,first\ns3://videos/discover/e.mp4,second\n")
    everything = sorted(f"s3://videos/discover/{name}" for name in GOOD_VIDEOS)
    assert uris("s3://videos/discover") == everything
    assert uris("s3://videos/discover/*.mp4") == [u for u in everything if "deep" not in u and u.endswith("mp4")]
    assert uris("s3://videos/discover/list.csv") == ["s3://videos/discover/a.mp4", "s3://videos/discover/e.mp4"]


@pytest.mark.parametrize("named", ["folder", "pattern", "pattern of folders", "file"])
def test_a_listing_that_meets_trouble_is_asked_for_again_and_lacks_nothing(
    named: str, s3: str, faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidshard.pipeline.storage.retry._FIRST_PAUSE_SECONDS", 0.01)
    for name in ("a.mp4", "b.mp4", "deep/c.mp4"):
        fsspec.open(f"s3://videos/again/{name}", "wb").open().close()
    asked = {"folder": "", "pattern": "/*.mp4", "pattern of folders": "/**/*.mp4", "file": "/a.mp4"}[named]
    expected = uris(f"s3://videos/again{asked}")
    assert expected
    num_requests = len(faulty_s3.seen)
    for number in range(num_requests):  # whichever request it is that fails
        faulty_s3.misbehave("reset_before" if number % 2 else "slow_down", path="again", skip=number)
        assert uris(f"s3://videos/again{asked}") == expected, number
        faulty_s3.behave()


@pytest.mark.parametrize("asked", ["", "/*.mp4", "/**/*.mp4", "/a.mp4"])
def test_a_listing_that_never_comes_is_an_outage_and_no_empty_folder(
    asked: str, s3: str, faulty_s3: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.open("s3://videos/never/a.mp4", "wb").open().close()
    monkeypatch.setattr("vidshard.pipeline.storage.retry.RETRY_SECONDS", 0.2)
    faulty_s3.misbehave("unavailable", path="never", times=math.inf)
    with pytest.raises(storage.StorageOutageError, match=r"s3://videos/never.*tried \d+ times"):
        uris(f"s3://videos/never{asked}")
    faulty_s3.behave()


def test_an_unreachable_bucket_is_one_clear_message(s3: str) -> None:
    with pytest.raises((InputError, storage.StorageError), match="no-such-bucket"):
        discover(["s3://no-such-bucket/clips"])


@pytest.mark.parametrize("address", ["s3://", "s3:///", "s3:///clips", "s3://*", "s3://**/*.mp4"])
def test_an_address_without_a_bucket_is_one_clear_message(address: str, s3: str) -> None:
    with pytest.raises((InputError, storage.StorageError), match="s3:"):
        discover([address])


@pytest.mark.parametrize("address", ["s3://", "s3:///", "gs://", "simplecache://"])
def test_an_output_without_a_bucket_is_no_local_folder(
    address: str, good_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = printed_by("tokenize", good_videos, "--out", address, *SMALL, "--local", code=2)
    assert "names no bucket or folder" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://user:pw@host/a.mp4?X-Amz-Signature=s3cret#f", "https://host/a.mp4"),
        ("s3://bucket/what?.mp4", "s3://bucket/what"),
        ("s3://key:secret@bucket/a.mp4", "s3://bucket/a.mp4"),
        ("/clips/a?.mp4", "/clips/a?.mp4"),
    ],
)
def test_no_secret_of_a_url_is_shown(uri: str, shown: str) -> None:
    assert storage.public_uri(uri) == shown


@pytest.mark.parametrize("column", ["a_source", "a_seconds"])
def test_a_manifest_whose_own_column_stands_where_a_signal_goes_is_refused(tmp_path: Path, column: str) -> None:
    (tmp_path / "m.csv").write_text(f"uri,a,{column}\nv.mp4,s.npy,1\n")
    with pytest.raises(InputError, match=f"'{column}' is where signal 'a' goes"):
        discover([str(tmp_path / "m.csv")], signals=["a"])


def test_entries_that_cannot_be_looked_at_are_listed_so_that_opening_rejects_them(tmp_path: Path) -> None:
    (tmp_path / "good.mp4").touch()
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "annex.mp4").symlink_to("../.git/annex/objects/x")
    (tmp_path / "README").symlink_to("nowhere")
    (tmp_path / "again").symlink_to(tmp_path)
    expected = sorted(str(tmp_path / name) for name in ("annex.mp4", "good.mp4", "loop", "loop.mp4"))
    assert uris(str(tmp_path)) == expected
    assert uris(str(tmp_path / "*.mp4")) == [path for path in expected if path.endswith(".mp4")]
    assert uris(f"{tmp_path.parent}/{tmp_path.name[:-1]}[{tmp_path.name[-1]}]/annex.mp4") == [expected[0]]


def test_a_folder_that_cannot_be_listed_is_listed_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "good.mp4").touch()
    real = os.scandir

    def scandir(path: str) -> Any:
        if str(path).rstrip("/").endswith("lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    expected = [str(tmp_path / "good.mp4"), str(tmp_path / "lost+found")]
    assert uris(str(tmp_path)) == expected
    for pattern in ("**/*.mp4", "**", "*", "**/*"):
        assert uris(str(tmp_path / pattern)) == expected
    assert uris(str(tmp_path / "*" / "*.mp4")) == expected[1:]
    with pytest.raises(storage.StorageError, match="permission denied"):
        storage.open_binary(str(tmp_path / "lost+found"))


def test_a_pattern_lists_what_a_shell_lists_each_file_once(tmp_path: Path) -> None:
    for name in ("a/x.mp4", "a/b/y.mp4", ".h/z.mp4", "a/.hidden.mp4", "a/b/c/w.mkv", "[q]/r.mp4", "a/b/.git/o.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "loop").symlink_to("loop")
    patterns = ["*/x.mp4", "**/*.mp4", "a/*/*.mp4", "a/[b]/y.mp4", "a/b/?.mp4", ".h/*", "**/b/*.mp4"]
    for pattern in [*patterns, "[[]q]/*.mp4", "a//b/*.mp4"]:
        expected = sorted(glob.glob(str(tmp_path / pattern), recursive=True))
        assert [str(Path(uri)) for uri in uris(f"{tmp_path}/{pattern}")] == [str(Path(path)) for path in expected]
    everything = sorted(str(tmp_path / name) for name in ("a/b/c/w.mkv", "a/b/y.mp4", "a/x.mp4", "[q]/r.mp4"))
    assert [uri for uri in uris(f"{tmp_path}/**") if "loop" not in uri] == everything
    assert [uri for uri in uris(f"{tmp_path}/**/*") if "loop" not in uri] == everything


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["0001", "0010"], ["0001", "0010"]),
        (["NA", "null"], ["NA", "null"]),
        (["1e5", "7"], ["1e5", "7"]),
        (["007", "1.5"], ["007", "1.5"]),
        (["2024-01-02", "2024-01-03"], ["2024-01-02", "2024-01-03"]),
        (["true", "false"], ["true", "false"]),
        (["+1", "2"], ["+1", "2"]),
        (["9223372036854775808", "1"], ["9223372036854775808", "1"]),
        (["1", "-20"], [1, -20]),
        (["1", ""], [1, None]),
        (["1.5", "2.0"], [1.5, 2.0]),
        (["0.1", "-3"], [0.1, -3.0]),
    ],
)
def test_a_csv_column_holds_numbers_only_where_they_read_back_as_written(
    texts: list[str], expected: list[Any], tmp_path: Path
) -> None:
    rows = "".join(f"{name}.mp4,{text}\n" for name, text in zip("ab", texts, strict=True))
    (tmp_path / "m.csv").write_text(f"uri,column\n{rows}")
    assert discover([str(tmp_path / "m.csv")]).videos["column"].to_pylist() == expected


def test_texts_of_json_lines_stay_texts(tmp_path: Path) -> None:
    rows = [{"uri": f"{n}.mp4", "day": "2024-01-02", "n": {"at": ["2024-01-02T03:04:05"]}, "id": n} for n in range(2)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    videos = discover([str(tmp_path / "m.jsonl")]).videos.select(["day", "n", "id"])
    assert videos.to_pylist() == [{name: row[name] for name in videos.column_names} for row in rows]


def test_a_name_keeps_its_blanks(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": [" a.mp4", "b.mp4 "]}), tmp_path / "m.parquet")
    assert uris(str(tmp_path / "m.parquet")) == [str(tmp_path / " a.mp4"), str(tmp_path / "b.mp4 ")]


def test_a_named_file_whose_name_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.mp4")
    Path(path).touch()
    (tmp_path / "good.mp4").touch()
    with pytest.raises(InputError, match=r"udce9\.mp4: names that are not UTF-8 cannot be stored"):
        discover([str(tmp_path / "good.mp4"), path])


def test_a_fault_of_ours_in_a_manifest_is_named_and_its_traceback_is_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = tmp_path / "videos.csv"
    manifest.write_text("uri\na.mp4\n")

    def broken(*_: Any, **__: Any) -> None:
        raise ArithmeticError("unforeseen")

    monkeypatch.setattr("vidshard.pipeline.discover.read_manifest", broken)
    with pytest.raises(InputError, match="ArithmeticError: unforeseen"):
        discover([str(manifest)])
    assert "in broken" in caplog.text
