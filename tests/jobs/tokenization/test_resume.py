"""Running the same command again: what is reused, what is new, what was replaced, and what verify says of it all."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from tests.support.cli import SMALL, printed_by, run
from tests.support.shards import rows_of, shard_bytes, tokens_by_clip
from tests.support.videos import Recipe, write_damaged, write_video
from vidshard.pipeline.discover import discover
from vidshard.pipeline.output.committed import committed_spans
from vidshard.pipeline.output.entries import Inputs
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.pipeline.output.state import OutputState
from vidshard.pipeline.output.work_list import begin_retry
from vidshard.schemas.video import Part


def tokenize(*arguments: Any, code: int = 0) -> str:
    return printed_by("tokenize", *arguments, *SMALL, "--local", code=code)


def verified(out: Path, *arguments: Any, code: int = 0) -> str:
    return printed_by("verify", out, *arguments, code=code)


def clips_by_video(out: Path) -> Counter[str]:
    return Counter(Path(row["uri"]).name for row in rows_of(out))


def video(folder: Path, name: str, seconds: int, **recipe: Any) -> Path:
    folder.mkdir(exist_ok=True)
    return write_video(folder / name, Recipe(num_frames=10 * seconds, rate=Fraction(10), **recipe))


def test_videos_that_are_added_replaced_touched_or_removed_later(tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    for number, name in enumerate(("kept.mp4", "gone.mp4", "replaced.mp4", "touched.mp4")):
        video(videos, name, 5 + number)
    tokenize(videos, "--out", out)
    first, shards = tokens_by_clip(out), shard_bytes(out)
    assert clips_by_video(out) == {"kept.mp4": 4, "gone.mp4": 5, "replaced.mp4": 6, "touched.mp4": 7}

    printed = tokenize(videos, "--out", out)
    assert (
        "4 of 4 videos are known from an earlier run; 4 planned spans: 4 finished, 0 rejected, 0 to do now" in printed
    )
    assert shard_bytes(out) == shards

    video(videos, "added.mp4", 3)
    (videos / "gone.mp4").unlink()
    video(videos, "replaced.mp4", 2, gop=5)
    os.utime(videos / "touched.mp4", ns=(1, 1))
    printed = tokenize(videos, "--out", out)
    assert "1 of 4 videos are known" in printed
    assert "replaced since: 1 video; 1 span taken out" in printed
    assert clips_by_video(out) == {"kept.mp4": 4, "gone.mp4": 5, "replaced.mp4": 2, "touched.mp4": 7, "added.mp4": 3}
    now = tokens_by_clip(out)
    assert {clip: now[clip] for clip in now if clip in first} == {clip: first[clip] for clip in first if clip in now}
    assert len(set(now) - set(first)) == 5
    assert "5 videos = 5 tokenized" in verified(out)

    fresh = tmp_path / "fresh"
    tokenize(videos, "--out", fresh)
    made_anew = tokens_by_clip(fresh)
    assert {clip: now[clip] for clip in made_anew} == made_anew  # all but what is gone, which stays
    record = json.loads((out / "run.json").read_text())
    assert [entry["starts"] for entry in record["runs"]] == [3]


def test_a_video_that_comes_back_takes_its_place_again(tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    path = video(videos, "a.mp4", 3)
    first, stamp = path.read_bytes(), path.stat().st_mtime_ns
    tokenize(videos, "--out", out)
    before = tokens_by_clip(out)
    video(videos, "a.mp4", 2, gop=5)
    tokenize(videos, "--out", out)
    assert not tokens_by_clip(out).keys() & before.keys()
    path.write_bytes(first)
    os.utime(path, ns=(stamp, stamp))
    tokenize(videos, "--out", out)
    assert tokens_by_clip(out) == before
    assert "1 video = 1 tokenized" in verified(out)
    path.write_bytes(b"no video any more")
    tokenize(videos, "--out", out)  # the clips of what was there stay
    assert tokens_by_clip(out) == before
    assert "1 video = 1 tokenized in part" in verified(out)


def test_addresses_that_differ_in_their_query_are_places_of_their_own(tmp_path: Path) -> None:
    contents = {f"/get?id={n}&sig=SECRET": video(tmp_path / "v", f"{n}.mp4", n + 1).read_bytes() for n in (1, 2, 3)}
    contents["/get?id=4&sig=SECRET"] = b"no video"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = contents[self.path]
            bounds = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first, last = (int(bounds[1]), int(bounds[2] or len(data) - 1)) if bounds else (0, len(data) - 1)
            part = data[first : last + 1]
            self.send_response(206 if bounds else 200)
            if bounds:
                self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(part)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    out = tmp_path / "out"
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        for name, ids in (("a", (1, 2, 4)), ("b", (3,))):
            lines = "".join(f"{root}/get?id={n}&sig=SECRET\n" for n in ids)
            (tmp_path / f"{name}.csv").write_text(f"uri\n{lines}")
        tokenize(tmp_path / "a.csv", "--out", out, "--allow-private")
        first = tokens_by_clip(out)
        assert len(first) == 2 + 3
        tokenize(tmp_path / "a.csv", "--out", out, "--allow-private")
        tokenize(tmp_path / "b.csv", "--out", out, "--allow-private")
        server.shutdown()
    assert first.items() <= tokens_by_clip(out).items()
    assert len(tokens_by_clip(out)) == 2 + 3 + 4
    assert [r["reason"] for r in read_rejects(str(out)).to_pylist()] == ["not_a_video"]
    assert "4 videos = 3 tokenized + 1 rejected" in verified(out)
    assert not [path for path in out.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()]


def test_a_copy_takes_the_place_of_what_it_is_a_copy_of(tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    video(videos, "a.mp4", 3)
    (videos / "b.mp4").write_bytes((videos / "a.mp4").read_bytes())
    tokenize(videos, "--out", out)
    first = tokens_by_clip(out)
    assert [Path(r["uri"]).name for r in read_rejects(str(out)).to_pylist()] == ["b.mp4"]
    assert "2 videos = 1 tokenized + 1 copies of others" in verified(out)
    video(videos, "a.mp4", 2, gop=5)  # what b holds is no copy any more
    tokenize(videos, "--out", out)
    assert first.keys() < tokens_by_clip(out).keys()
    assert read_rejects(str(out)).num_rows == 0
    assert "2 videos = 2 tokenized" in verified(out)


def test_rejected_videos_and_stretches_are_tried_again_when_asked(tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    good = video(videos, "good.mp4", 4)
    whole = video(tmp_path / "whole", "whole.mp4", 8)
    write_damaged(videos / "damaged.mp4", whole)
    big = write_video(videos / "big.mp4", Recipe(num_frames=20, rate=Fraction(10), width=256, height=192))
    tokenize(videos, "--out", out, "--max-pixels", "20000")
    before = shard_bytes(out)
    reasons = {Path(r["uri"]).name: r["reason"] for r in read_rejects(str(out)).to_pylist()}
    assert reasons == {"damaged.mp4": "decode_error", big.name: "over_limit"}
    assert "3 videos = 1 tokenized + 2 rejected" in verified(out)

    tokenize(videos, "--out", out)  # rejected is done, also when the limit is another one
    assert shard_bytes(out) == before
    video(videos, "later.mp4", 2)
    printed = tokenize(videos, "--out", out, "--retry-rejected", "over_limit")
    assert "trying again 0 rejected spans and 1 rejected video" in printed
    assert clips_by_video(out) == {"good.mp4": 4, "big.mp4": 2}  # those, and nothing else
    assert [r["reason"] for r in read_rejects(str(out)).to_pylist()] == ["decode_error"]

    printed = tokenize(videos, "--out", out, "--retry-rejected")
    assert "trying again 1 rejected span and 0 rejected videos" in printed
    assert [r["reason"] for r in read_rejects(str(out)).to_pylist()] == ["decode_error"]
    tokenize(videos, "--out", out)
    assert clips_by_video(out) == {"good.mp4": 4, "big.mp4": 2, "later.mp4": 2}
    assert good.exists()
    refused = tokenize(videos, "--out", out, "--retry-rejected", "no_such_reason", code=2)
    assert "'no_such_reason' is no reason of a rejection; these are: unreadable" in refused


def test_clips_kept_of_a_damaged_video_are_taken_out_and_made_again_by_a_retry(tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = write_video(tmp_path / "whole.mp4", Recipe(num_frames=120, rate=Fraction(10), gop=10))
    write_damaged(tmp_path / "damaged.mp4", whole)
    arguments = (tmp_path / "damaged.mp4", "--out", out, "--damaged", "keep")
    tokenize(*arguments)
    first = tokens_by_clip(out)
    [reject] = read_rejects(str(out)).to_pylist()
    assert reject["kept_clips"] == len(first) > 0
    assert "1 video = 1 tokenized in part" in verified(out)
    other = video(tmp_path / "other", "other.mp4", 2)
    tokenize(other, "--out", out, "--damaged", "keep", "--retry-rejected")  # what cannot be tried now is left as it is
    assert tokens_by_clip(out) == first
    assert read_rejects(str(out)).to_pylist() == [reject]
    found = discover([str(tmp_path / "damaged.mp4")])
    begin_retry(str(out), OutputState.load(str(out)), Inputs.of(found.videos, Part()), None)  # and then it was killed
    assert not tokens_by_clip(out)
    printed = tokenize(*arguments, "--retry-rejected")
    assert "trying again 1 rejected span" in printed
    assert not (out / "retry.json").exists()
    assert tokens_by_clip(out) == first
    assert read_rejects(str(out)).to_pylist() == [reject]


def test_a_file_that_is_replaced_while_the_run_goes_on_is_no_other_videos_tokens(tmp_path: Path) -> None:
    from vidshard.pipeline.decode_stage import SpanDecoder
    from vidshard.pipeline.rows import WORK_SCHEMA, span_row
    from vidshard.pipeline.storage import fingerprint, open_binary
    from vidshard.pipeline.video.probe import probe_video
    from vidshard.pipeline.video.sampling import plan_spans
    from vidshard.schemas.video import ClipSpec, VideoRef

    path = video(tmp_path / "videos", "v.mp4", 3)
    spec = ClipSpec(fps=Fraction(4), num_frames=5, height=32, width=32)
    probe = probe_video(VideoRef(uri=str(path), num_bytes=-1), open_binary)
    [span] = plan_spans(probe, spec, 10)
    import pyarrow as pa

    row = pa.Table.from_pylist([span_row(span, spec, fingerprint(str(path)))], schema=WORK_SCHEMA)
    decoder = SpanDecoder(spec=spec, max_clips=10, clips_per_pass=10)
    [before] = decoder(row)
    assert before["rejection"].to_pylist() == [None]
    video(tmp_path / "videos", "v.mp4", 4)
    [after] = decoder(row)
    [rejection] = after["rejection"].to_pylist()
    assert rejection["reason"] == "changed"
    assert after["clips"].to_pylist() == [[]]


def test_the_audit_adds_up_and_repair_leaves_what_a_rerun_fills_in(tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    for number in range(6):
        video(videos, f"{number}.mp4", 5 + number)
    (videos / "text.mp4").write_text("no video")
    arguments = (videos, "--out", out, "--clips-per-span", "2", "--shard-size", "300")
    tokenize(*arguments)
    everything = tokens_by_clip(out)
    printed = verified(out, "--audit", tmp_path / "audit.csv")
    assert "7 videos = 6 tokenized + 1 rejected" in printed
    assert "45.000 s of video planned = 45.000 s in clips + 0.000 s rejected + 0.000 s pending" in printed
    audit = pyarrow.csv.read_csv(tmp_path / "audit.csv").to_pylist()
    assert Counter(row["status"] for row in audit) == {"tokenized": 6, "rejected": 1}
    for row in audit:
        parts = ("tokenized_seconds", "rejected_seconds", "pending_seconds", "tail_seconds")
        assert row["planned_seconds"] == pytest.approx(sum(row[name] for name in parts), abs=1e-6)
    assert "not_a_video" in next(row["reasons"] for row in audit if row["status"] == "rejected")

    paths = [Path(path) for path in shard_paths(str(out))]
    assert len(paths) > 8
    data = bytearray(paths[0].read_bytes())
    tokens = pq.ParquetFile(paths[0]).metadata.row_group(0).column(0)
    data[tokens.data_page_offset + tokens.total_compressed_size - 5] ^= 0xFF
    paths[0].write_bytes(data)  # damage in a page
    paths[1].write_bytes(paths[1].read_bytes()[:-100])  # its end is missing
    (paths[2].parent / "zzz.parquet").write_bytes(paths[2].read_bytes())  # its clips stand there twice
    paths[3].unlink()
    (out / "shards" / ".half.parquet.0123abcd.tmp").write_bytes(b"begun by a killed run")
    printed = verified(out, code=1)
    assert printed.count("broken:") == 3
    assert "of another shard" in printed
    printed = verified(out, "--repair", code=1)
    assert "3 of 3 repaired" in printed
    printed = verified(out)
    assert "planned spans are left to do" in printed
    assert not list((out / "shards").glob(".*"))
    tokenize(*arguments)
    assert tokens_by_clip(out) == everything
    assert "6 tokenized + 1 rejected" in verified(out)

    foreign = out / "shards" / "zzz.parquet"  # of a newer version, or of other settings: said, and left alone
    table = pq.read_table(shard_paths(str(out))[0])
    for name, value in ((b"vidshard.format_version", b"99"), (b"vidshard.identity", b"{}")):
        pq.write_table(table.replace_schema_metadata(table.schema.metadata | {name: value}), foreign)
        assert "repaired" not in verified(out, "--repair", code=1)
        assert foreign.exists()
    foreign.unlink()

    plan, record = out / "plan" / "000001.parquet", out / "run.json"
    whole = plan.read_bytes()
    for damage in (
        b"PAR1 nonsense",
        whole[:-3] + b"xyz",
    ):
        plan.write_bytes(damage)
        assert "vidshard verify --repair" in tokenize(*arguments, code=2)
        assert run("verify", out).exit_code == 1
    assert "1 of 1 repaired" in verified(out, "--repair", code=1)
    before = shard_bytes(out)
    tokenize(*arguments)
    assert shard_bytes(out) == before

    record.unlink()  # the shards say it too
    assert "resize: 'crop' there, 'pad' now" in tokenize(*arguments, "--resize", "pad", code=2)
    record.write_text("{")
    assert "vidshard verify --repair" in tokenize(*arguments, code=2)
    assert "written anew" in verified(out, "--repair", code=1)
    assert "6 tokenized + 1 rejected" in verified(out)
    tokenize(*arguments)
    assert shard_bytes(out) == before
    assert committed_spans(str(out))
