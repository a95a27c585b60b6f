"""Manifests of which single rows are malformed: those rows are rejections, and the others are what they always were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.cli import printed_by, tokenize
from tests.support.videos import Recipe, write_video
from vidshard.pipeline.discover import discover
from vidshard.pipeline.inputs.manifest import InputError
from vidshard.pipeline.output.rejects import read_rejects

GOOD = [{"uri": f"{name}.mp4", "start_seconds": 0.5, "end_seconds": 1.5, "s": "s.npy"} for name in "abc"]
"""Rows around the bad one."""

BAD_JSON = [
    (b"{not json", "is no JSON object"), (b"[1, 2]", "a list"), (b'"x"', "text"), (b"null", "it is null"),
    (b'{"uri": 1}', "'uri' holds a number"), (b'{"uri": ["a.mp4"]}', "'uri' holds a list"), (b"{}", "no 'uri'"),
    (b'{"uri": {"a": 1}}', "'uri' holds an object"), (b'{"uri": null}', "no 'uri'"),
    (b'{"uri": true}', "true or false"),
    (b'{"uri": ""}', "is empty"), (b'{"uri": " \\t"}', "is empty"), (b'{"uri": "a\xff.mp4"}', "not UTF-8"),
    (b'{"uri": "\\ud800.mp4"}', "is no JSON object"), (b'{"uri": "x", "uri": "y"}', "'uri' is there twice"),
    (b'{"uri": "x", "start_seconds": "soon"}', "'start_seconds' holds text"),
    (b'{"uri": "x", "start_seconds": true}', "'start_seconds' holds true or false"),
    (b'{"uri": "x", "end_seconds": [1]}', "'end_seconds' holds a list"),
    (b'{"uri": "x", "end_seconds": 1e400}', "read"),
    (b'{"uri": "x", "start_seconds": 3, "end_seconds": 2}', "end after it starts"),
    (b'{"uri": "x", "start_seconds": -1}', "before the video"), (b'{"uri": "x", "start_seconds": NaN}', "finite"),
    (b'{"uri": "x", "s": 5}', "'s' holds a number"), (b'{"uri": "x", "s": ["t.npy"]}', "'s' holds a list"),
    (b"[" * 2000, "nested too deep"), (b'{"uri": "x"', "is no JSON object"),
    (b'{"uri": "x", "y": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    (b'{"uri": "x", ' + b", ".join(b'"c%d": 1' % n for n in range(5000)) + b"}", "4096 are the most"),
    (b'{"uri": "x",}', "is no JSON object"), (b'{"uri": "x"},', "is no JSON object"), (b"\0" * 4, "is no JSON object"),
]  # fmt: skip

BAD_CSV = [
    (b",1,2,s", "'uri' is empty"), (b"   ,1,2,s", "'uri' is empty"), (b"x", "1 fields"), (b"x,1,2,s,t", "5 fields"),
    (b'"x,1,2,s', "is not closed"), (b'x,1,2,"s"t', "more follows"), (b"x\xff,1,2,s", "'uri' is not UTF-8"),
    (b"x,1,2,\xff", "'s' is not"),
    (b"x,soon,2,s", "'start_seconds' must be a number"), (b"x,1:30,99,s", "must be a number"),
    (b"x,1,nan,s", "finite"), (b"x,inf,,s", "finite"), (b"x,-1,,s", "before the video"),
    (b"x,2,1,s", "end after it starts"),
    (b"x,1,1,s", "end after it starts"),
]  # fmt: skip


def bad_rows(path: Path, data: bytes) -> list[dict[str, Any]]:
    """The rows with a fault; the others must be ``GOOD``."""
    path.write_bytes(data)
    videos = discover([str(path)], signals=["s"]).videos
    rows = videos.to_pylist()
    good = [row for row in rows if row.get("fault") is None]
    assert [Path(row["uri"]).name for row in good] == [row["uri"] for row in GOOD]
    assert all((row["part_start_seconds"], row["part_end_seconds"]) == (0.5, 1.5) for row in good)
    assert all(row["s_source"] == str(path.parent / "s.npy") for row in good)
    return [row for row in rows if row.get("fault") is not None]


@pytest.mark.parametrize(("line", "words"), BAD_JSON)
def test_a_malformed_line_of_json_is_a_fault_of_its_row(tmp_path: Path, line: bytes, words: str) -> None:
    lines = [json.dumps(row).encode() for row in GOOD]
    lines.insert(1, line)
    [bad] = bad_rows(tmp_path / "m.jsonl", b"\n".join(lines) + b"\n")
    assert bad["fault"].startswith(f"row 2 of manifest {tmp_path}/m.jsonl: ")
    assert words in bad["fault"]
    assert bad["uri"] in (f"{tmp_path}/x", f"{tmp_path}/m.jsonl row 2")


@pytest.mark.parametrize(("line", "words"), BAD_CSV)
def test_a_malformed_line_of_csv_is_a_fault_of_its_row(tmp_path: Path, line: bytes, words: str) -> None:
    lines = [b"uri,start_seconds,end_seconds,s", *(",".join(map(str, row.values())).encode() for row in GOOD)]
    lines.insert(2, line)
    [bad] = bad_rows(tmp_path / "m.csv", b"\n".join(lines) + b"\n")
    assert bad["fault"].startswith(f"row 2 of manifest {tmp_path}/m.csv: ")
    assert words in bad["fault"]


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("uri", None, "no 'uri'"), ("uri", "", "is empty"), ("start_seconds", float("nan"), "finite"),
        ("end_seconds", 0.1, "end after it starts"), ("start_seconds", -5.0, "before the video"),
        ("end_seconds", float("inf"), "finite"),
    ],
)  # fmt: skip
def test_a_bad_value_in_parquet_is_a_fault_of_its_row(tmp_path: Path, column: str, value: Any, words: str) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.Table.from_pylist([*GOOD[:2], {**GOOD[0], "uri": "x", column: value}, GOOD[2]]), path)
    [bad] = bad_rows(path, path.read_bytes())
    assert words in bad["fault"]
    assert bad["fault"].startswith("row 3 of manifest")


def test_text_of_parquet_that_is_not_utf8_is_a_fault_of_its_row(tmp_path: Path) -> None:
    text = pa.array([b"a.mp4", b"b\xff.mp4", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"uri": text, "note": text}), tmp_path / "m.parquet")
    faults = discover([str(tmp_path / "m.parquet")]).videos["fault"].to_pylist()
    assert faults[0] is None
    assert "'uri' is not UTF-8 text" in faults[1]
    assert "no 'uri'" in faults[2]


def test_further_columns_of_json_that_disagree_cost_the_fewer_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"uri": f"{n}.mp4", "meta": {"label": n, "tags": ["t"]}} for n in range(5)]
    rows[2]["meta"] = {"label": "two"}
    rows[3]["meta"] = {"tags": [1]}
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    videos = discover([str(tmp_path / "m.jsonl")]).videos
    assert [fault is None for fault in videos["fault"].to_pylist()] == [True, True, False, False, True]
    assert "'meta.label' holds text, and should hold a number" in videos["fault"][2].as_py()
    assert "'meta.tags[]' holds a number" in videos["fault"][3].as_py()
    assert [row["label"] for row in videos["meta"].to_pylist() if row] == [0, 1, 4]


def test_bad_rows_of_a_manifest_are_rejections_until_they_are_mended(tmp_path: Path) -> None:
    for name in "ab":
        write_video(tmp_path / f"{name}.mp4", Recipe(num_frames=8 if name == "a" else 12))
    manifest, out = tmp_path / "m.csv", tmp_path / "out"
    lines = ["uri,end_seconds", "a.mp4,", ",", "a.mp4,-3", "b.mp4,soon", "a.mp4,0"]
    run = [manifest, "--out", out, "--tokenizer", "tiny", "--fps", 4, "--frames", 1, "--size", 32]

    def rejected(*more: object) -> dict[str, str]:
        manifest.write_text("\n".join(lines))
        result = tokenize(*run, *more)
        assert result.exit_code == 0, result.output
        rows = read_rejects(str(out)).to_pylist()
        assert {row["reason"] for row in rows} <= {"bad_row"}
        return {row["detail"].split(" of ")[0]: Path(row["uri"]).name for row in rows}

    first = rejected()
    assert first == {"row 2": "m.csv row 2", "row 3": "a.mp4", "row 4": "b.mp4", "row 5": "a.mp4"}
    shards = {path.name: path.read_bytes() for path in (out / "shards").iterdir()}
    assert "3 videos = 1 tokenized in part + 2 rejected" in printed_by("verify", out)
    assert rejected("--retry-rejected", "bad_row") == first
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == shards
    lines[2:5] = ["b.mp4,", "b.mp4,1"]  # the second and fourth are mended, the third is taken out
    assert rejected() == {"row 4": "a.mp4"}
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir() if path.name in shards} == shards
    (tmp_path / "other.csv").write_text("uri\na.mp4\n")
    run[0] = tmp_path / "other.csv"
    assert rejected() == {"row 4": "a.mp4"}  # of a manifest that this run does not name


def test_a_manifest_of_bad_rows_alone_ends_in_rejections(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"uri": ""}\n{"uri": "a", "end_seconds": -1}\n')
    result = tokenize(tmp_path / "m.jsonl", "--out", tmp_path / "out", "--tokenizer", "tiny", "--size", 32)
    assert "bad_row" in result.output
    assert read_rejects(str(tmp_path / "out")).num_rows == 2


ROWS = [b"a.mp4,x,p", b'b.mp4,"two, of, it",q', b'c.mp4,"three\nlines\nof text",r', b'd.mp4,"say ""hi""",s']


def labels_of(path: Path, data: bytes) -> dict[str, str | None]:
    """For the name of each video of a manifest its label, or the fault of its row."""
    path.write_bytes(data)
    rows = discover([str(path)]).videos.to_pylist()
    return {Path(row["uri"]).name: row.get("fault") or row["label"] for row in rows}


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_quoted_fields_may_hold_commas_quotes_and_line_breaks(tmp_path: Path, newline: bytes) -> None:
    text = newline.join([b"uri,label,more", *ROWS, b""])
    assert labels_of(tmp_path / "m.csv", b"\xef\xbb\xbf" + text) == {
        "a.mp4": "x", "b.mp4": "two, of, it", "c.mp4": "three\nlines\nof text", "d.mp4": 'say "hi"',
    }  # fmt: skip


def test_fields_of_several_lines_stay_whole_in_a_file_of_many_blocks(tmp_path: Path) -> None:
    labels = {f"{n}.mp4": f"a caption of two lines\n{'x' * 500}, number {n}" for n in range(4000)}
    rows = [f'{name},"{label}"'.encode() for name, label in labels.items()]
    found = labels_of(tmp_path / "m.csv", b"\n".join([b"uri,label", *rows]))  # 2 MB, and Arrow's blocks have 1 MiB
    assert found == labels


@pytest.mark.parametrize(
    ("stray", "lost"),
    [
        (b'x.mp4,"open,p', 1), (b'"x.mp4,open,p', 1), (b'x.mp4,p,"open', 1), (b'x.mp4,"12" tv,p', 1),
        (b'x.mp4,"open,p\ny.mp4,q"', 1), (b'x.mp4,"open,p\na.mp4,q,"', 1), (b'x.mp4,"a"b"c,p', 1),
    ],
)  # fmt: skip
def test_a_stray_quote_costs_its_own_row_and_takes_in_no_other(tmp_path: Path, stray: bytes, lost: int) -> None:
    for at in range(4):
        rows = [b"a.mp4,x,p", b"b.mp4,y,q", b"c.mp4,z,r"]
        found = labels_of(tmp_path / "m.csv", b"\n".join([b"uri,label,more", *rows[:at], stray, *rows[at:], b""]))
        assert {name: label for name, label in found.items() if name in ("b.mp4", "c.mp4")} == {
            "b.mp4": "y", "c.mp4": "z",
        }  # fmt: skip
        assert f"m.csv row {at + 1}" in found, "the row of the quote is named by its number"
        assert "quote" in str(found[f"m.csv row {at + 1}"])


def test_a_field_may_be_longer_than_those_of_pythons_csv(tmp_path: Path) -> None:
    text = "one\n" + "x" * 200_000
    assert labels_of(tmp_path / "m.csv", f'uri,label\na.mp4,"{text}"\nb.mp4,y\n'.encode()) == {
        "a.mp4": text, "b.mp4": "y",
    }  # fmt: skip
    taken_in = "".join(f"{n}.mp4,{'z' * 100}\n" for n in range(2000))
    found = labels_of(tmp_path / "n.csv", f'uri,label\na.mp4,"{taken_in}b.mp4,y"\nc.mp4,w\n'.encode())
    assert "takes in the rows" in str(found["n.csv row 1"])
    assert len(found) == 2002
    assert found["c.mp4"] == "w"


def test_a_text_before_the_uri_may_have_lines(tmp_path: Path) -> None:
    assert labels_of(tmp_path / "m.csv", b'label,uri\n"one\ntwo, three",a.mp4\n"b\n",b.mp4\n') == {
        "a.mp4": "one\ntwo, three", "b.mp4": "b\n",
    }  # fmt: skip


@pytest.mark.parametrize("extension", ["csv", "jsonl"])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("text".encode("utf-16"), "UTF-16 text: save it again as UTF-8"),
        ("text".encode("utf-16-be"), "UTF-16 text"), ("text".encode("utf-32"), "text: save it again as UTF-8"),
        (b"\x1f\x8b\x08\0", "gzip"), (b"PK\x03\x04", "zip file, or a workbook"),
    ],
)  # fmt: skip
def test_a_manifest_of_another_encoding_is_refused_by_its_name(
    tmp_path: Path, extension: str, data: bytes, words: str
) -> None:
    path = tmp_path / f"m.{extension}"
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"manifest {path} cannot be read: it is .*{words}"):
        discover([str(path)])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'[{"uri": "a.mp4"}]', "a JSON array: write one object a line"),
        (b'{"uri": "a.mp4"},\n{"uri": "b.mp4"},\n', "none of its lines is a JSON object; of the first: .*Extra data"),
        (b"", "none of its lines is a JSON object"), (b'{"uri": "a", "": 1}\n', "a column without a name"),
    ],
)  # fmt: skip
def test_json_that_is_no_lines_of_objects_is_refused_with_what_it_is(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "m.jsonl").write_bytes(data)
    with pytest.raises(InputError, match=words):
        discover([str(tmp_path / "m.jsonl")])


@pytest.mark.parametrize("blank", [b"\n", b"\r\n", b"\r", b" "])
def test_objects_may_be_written_over_lines_or_several_on_one(tmp_path: Path, blank: bytes) -> None:
    text = b'{"uri": "a.mp4", "label": "x"}' + blank + b'{"uri":\n"b.mp4", "label":\n"[{"}' + blank
    assert labels_of(tmp_path / "m.jsonl", b"\xef\xbb\xbf" + text) == {"a.mp4": "x", "b.mp4": "[{"}


@pytest.mark.parametrize("extension", ["csv", "jsonl"])
def test_lines_longer_than_a_block_of_arrow_are_read(tmp_path: Path, extension: str) -> None:
    long = "y" * 3_000_000
    rows = [{"uri": "a.mp4", "label": long}, {"uri": "b.mp4", "label": "z"}]
    text = "uri,label\n" + "\n".join(f"{row['uri']},{row['label']}" for row in rows)
    if extension == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows)
    assert labels_of(tmp_path / f"m.{extension}", text.encode()) == {"a.mp4": long, "b.mp4": "z"}


@pytest.mark.parametrize(
    ("values", "stored"),
    [
        (("18446744073709551615", "1"), ["18446744073709551615", "1"]),
        (("9007199254740993", "1.5"), ["9007199254740993", "1.5"]),
        (("9007199254740993", "1"), [9007199254740993, 1]), (("1e300", "1"), [1e300, 1.0]),
        (("NaN", "2"), ["nan", 2.0]),
    ],
)  # fmt: skip
def test_integers_that_float64_would_round_stay_as_they_are_written(
    tmp_path: Path, values: tuple[str, ...], stored: list[object]
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(f'{{"uri": "{n}.mp4", "id": {value}}}' for n, value in enumerate(values)))
    found = discover([str(path)]).videos["id"].to_pylist()
    assert ["nan" if value != value else value for value in found] == stored


def test_commas_at_the_ends_of_all_lines_make_no_column(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("uri,label,\na.mp4,x,\n")
    assert discover([str(tmp_path / "m.csv")]).videos.column_names[-1] == "label"
    (tmp_path / "m.csv").write_text("uri,label,\na.mp4,x,y\n")
    with pytest.raises(InputError, match="a column without a name"):
        discover([str(tmp_path / "m.csv")])


def test_rows_of_hostile_length_cost_one_row_each(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", Recipe(num_frames=8))
    odd = ["a." * 15_000, "a" * 100_000, f"http://127.0.0.1:{'9' * 5000}/a.mp4", f"http://127.0.0.1:1/{'::' * 15_000}"]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({"uri": uri}) for uri in ["a.mp4", *odd]))
    out = tmp_path / "out"
    run = [tmp_path / "m.jsonl", "--out", out, "--tokenizer", "tiny", "--fps", 4, "--frames", 1, "--size", 32]
    result = tokenize(*run, "--random-weights", 0, "--max-reject-share", 1)
    assert result.exit_code == 0, result.output
    assert read_rejects(str(out)).num_rows == len(odd)
    assert "100,000 characters" in " ".join(read_rejects(str(out))["detail"].to_pylist())


def test_a_name_with_a_tilde_is_looked_for_beside_its_manifest(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps({"uri": uri}) for uri in ["~nobody-here.mp4", "~/a.mp4"]))
    beside, home = discover([str(tmp_path / "m.jsonl")]).videos["uri"].to_pylist()
    assert beside == str(tmp_path / "~nobody-here.mp4")
    assert home == str(Path("~/a.mp4").expanduser())
