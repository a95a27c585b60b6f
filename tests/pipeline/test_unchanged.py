"""Videos that change after they were planned, ids of content, sparse files, and the number of clips of one video."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.support.cli import SMALL, printed_by, tokenize
from tests.support.shards import tokens_by_clip
from tests.support.videos import Recipe, write_video
from vidshard.pipeline import storage
from vidshard.pipeline.decode_stage import decode_clip, probe
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.pipeline.unchanged import read_unchanged
from vidshard.pipeline.video.content_id import WHOLE_ID_BYTES, content_id, has_content
from vidshard.pipeline.video.input_file import WatchedFile
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.video import ClipSpec, Limits, VideoProbe, VideoRef

SPEC = ClipSpec(fps=Fraction(4), num_frames=5, height=32, width=32)


def rejects(out: Path) -> Counter[str]:
    return Counter(read_rejects(str(out))["reason"].to_pylist())


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video of more than five samples of its content."""
    path = tmp_path_factory.mktemp("video") / "v.y4m"
    return write_video(path, Recipe(codec="rawvideo", num_frames=60))


def planned(path: Path) -> tuple[str, str | None]:
    found = probe(VideoRef(uri=str(path), num_bytes=-1))
    assert isinstance(found, VideoProbe)
    return found.video_id, storage.fingerprint(str(path))


def between_samples(data: bytes) -> bytes:
    """Another content of the same length, which differs only where samples do not reach."""
    assert len(data) > 7 * 65536
    changed = bytearray(data)
    at = 65536 + (len(data) // 4 - 65536) // 2
    changed[at : at + 100] = bytes(255 - byte for byte in changed[at : at + 100])
    return bytes(changed)


def id_of(data: bytes, **limits: Any) -> str:
    return content_id(WatchedFile(io.BytesIO(data), limits=Limits(**limits)))


def test_ids_of_small_files_digest_every_byte(video: Path) -> None:
    data = video.read_bytes()
    other = between_samples(data)
    assert id_of(data) == id_of(bytes(data)) != id_of(other)
    assert id_of(data, sampled_ids=True) == id_of(other, sampled_ids=True)  # as earlier versions made them
    assert id_of(data[:1000]) == id_of(data[:1000], sampled_ids=True)


def test_either_kind_of_id_is_recognized_and_another_content_is_not(video: Path) -> None:
    data = video.read_bytes()
    watched = WatchedFile(io.BytesIO(data), limits=Limits())
    assert all(has_content(watched, id_of(data, sampled_ids=sampled)) for sampled in (True, False))
    assert not has_content(watched, id_of(between_samples(data)))
    large = WatchedFile(io.BytesIO(bytes(WHOLE_ID_BYTES + 1)), limits=Limits())
    assert has_content(large, content_id(large))


def test_contents_that_agree_in_all_samples_are_two_videos(video: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.y4m").write_bytes(video.read_bytes())
    (tmp_path / "in" / "b.y4m").write_bytes(between_samples(video.read_bytes()))
    result = tokenize(tmp_path / "in", "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    assert not rejects(tmp_path / "out")
    assert len({clip.split("-")[0] for clip in tokens_by_clip(tmp_path / "out")}) == 2


def test_an_output_of_an_earlier_version_keeps_its_kind_of_ids(video: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.y4m").write_bytes(video.read_bytes())
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert tokenize(tmp_path / "in", "--out", out, *SMALL, "--limit", "1").exit_code == 0
    record = json.loads((out / "run.json").read_text())
    assert record.pop("sampled_ids") is False
    (out / "run.json").write_text(json.dumps(record))
    (tmp_path / "in" / "b.y4m").write_bytes(between_samples(video.read_bytes()) + b"FRAME\n")
    assert tokenize(tmp_path / "in", "--out", out, *SMALL).exit_code == 0
    data = (tmp_path / "in" / "b.y4m").read_bytes()
    assert {clip.split("-")[0] for clip in tokens_by_clip(out)} >= {id_of(data, sampled_ids=True)}
    assert json.loads((out / "run.json").read_text())["sampled_ids"] is True


@pytest.mark.parametrize("damage", ["{", None])
def test_a_run_record_that_is_lost_keeps_the_kind_of_ids(damage: str | None, video: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert tokenize(video, "--out", out, *SMALL).exit_code == 0
    (out / "run.json").unlink()
    if damage is not None:
        (out / "run.json").write_text(damage)
        printed_by("verify", out, "--repair", code=1)
        assert json.loads((out / "run.json").read_text())["sampled_ids"] is False
    assert tokenize(video, "--out", out, *SMALL).exit_code == 0
    assert json.loads((out / "run.json").read_text())["sampled_ids"] is False


def write(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def touch(path: Path) -> None:
    os.utime(path, ns=(0, 0))


def hide(path: Path) -> None:
    """Change bytes that no sample holds, and put the time stamp back."""
    before = path.stat()
    path.write_bytes(between_samples(path.read_bytes()))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [write, touch, hide])
def test_a_file_that_changes_while_it_is_read_is_refused(
    change: Callable[[Path], None], video: Path, tmp_path: Path
) -> None:
    path = tmp_path / "v.y4m"
    path.write_bytes(video.read_bytes())
    video_id, _ = planned(path)

    def read(_: object) -> None:
        change(path)

    with path.open("rb") as file, pytest.raises(VideoError) as caught:
        read_unchanged(file, video_id, Limits(), read)
    assert caught.value.reason is Reason.CHANGED


def test_another_link_to_a_file_while_it_is_read_is_no_change(video: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.y4m"
    path.write_bytes(video.read_bytes())
    calls = []

    def read(_: object) -> int:
        calls.append(1)
        if len(calls) == 1:
            os.link(path, tmp_path / "link")
        return len(calls)

    with path.open("rb") as file:
        assert read_unchanged(file, planned(path)[0], Limits(), read) == 2


def test_another_content_of_equal_size_and_time_is_not_decoded(video: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.y4m"
    path.write_bytes(video.read_bytes())
    found, fingerprint = probe(VideoRef(uri=str(path), num_bytes=-1)), storage.fingerprint(str(path))
    assert isinstance(found, VideoProbe)
    [span] = plan_spans(found, SPEC, 1000)
    decode_clip(span, SPEC, limits=Limits(), fingerprint=fingerprint)
    hide(path)
    assert storage.fingerprint(str(path)) == fingerprint
    with pytest.raises(VideoError, match="content is not what was planned") as caught:
        decode_clip(span, SPEC, limits=Limits(), fingerprint=fingerprint)
    assert caught.value.reason is Reason.CHANGED


@pytest.mark.parametrize(("stored", "reason"), [(0, "empty_file"), (4096, "truncated")])
def test_sparse_files_are_refused_before_a_decoder_searches_them(tmp_path: Path, stored: int, reason: str) -> None:
    path = tmp_path / "v.ts"
    with path.open("wb") as file:
        file.write(b"G" * stored)
        file.truncate(20 << 30)
    if path.stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this file system stores holes")
    found = probe(VideoRef(uri=str(path), num_bytes=-1), Limits(timeout_seconds=5))
    assert isinstance(found, VideoError)
    assert (found.reason, "sparse" in found.detail) == (Reason(reason), True)


def test_a_video_with_too_many_clips_is_over_the_limit(video: Path, tmp_path: Path) -> None:
    settings = (video, *SMALL, "--stride-seconds", "0.01")
    result = tokenize(*settings, "--out", tmp_path / "a", "--max-clips", "100")
    assert result.exit_code == 0, result.output
    assert rejects(tmp_path / "a") == {"over_limit": 1}
    [row] = read_rejects(str(tmp_path / "a")).to_pylist()
    assert "of --max-clips" in row["detail"]
    assert tokenize(*settings, "--clips-per-video", "2", "--out", tmp_path / "b", "--max-clips", "2").exit_code == 0
    assert not rejects(tmp_path / "b")
