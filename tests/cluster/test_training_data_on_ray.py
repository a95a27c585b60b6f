"""The clips of a training are known beforehand, whole, and the same from any position on; bad videos are counted."""

from __future__ import annotations

import os
import shutil
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.data import DataContext

from tests.support.http_server import http_server
from tests.support.videos import Recipe, read_frame_number, write_undecodable, write_video
from vidshard.pipeline import storage
from vidshard.pipeline.training_data.cache import fill_cache
from vidshard.pipeline.training_data.loader import (
    CLIP_SCHEMA,
    ClipReader,
    batches,
    decode_held_out,
    training_clips,
)
from vidshard.pipeline.training_data.sampler import ClipSampler
from vidshard.pipeline.training_data.videos import (
    ITEM_SCHEMA,
    TrainingVideos,
    UnusableError,
    open_training_videos,
    read_training_videos,
)
from vidshard.schemas.rejections import Reason
from vidshard.schemas.training import StageConfig, TrainRun
from vidshard.schemas.video import ClipSpec, Limits

STAGE = StageConfig(frames=3, size=(32, 32), fps=Fraction(4), batch_size=4)
SPEC = STAGE.clip_spec(clips_per_video=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten videos of five seconds whose frames carry numbers, one of half a second, one broken and a copy of another."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(10):
        # another length each, as the id of a video is its content
        write_video(folder / f"v{number}.mp4", Recipe(num_frames=40 + number, rate=Fraction(8), width=64, height=64))
    write_video(folder / "short.mp4", Recipe(num_frames=3, rate=Fraction(8)))
    (folder / "junk.mp4").write_text("no video")
    shutil.copy(folder / "v3.mp4", folder / "copy.mp4")
    return folder


@pytest.fixture(scope="module")
def corpora(corpus: Path, ray_session: None) -> TrainingVideos:
    return opened(corpus)


def opened(
    *folders: Path, held_out: float = 0.2, spec: ClipSpec = SPEC, before: TrainingVideos | None = None
) -> TrainingVideos:
    return open_training_videos(
        [str(f) for f in folders], spec=spec, validation_share=held_out, num_tasks=2, before=before
    )


# Which videos


def test_a_server_with_a_private_address_that_a_manifest_names_is_not_asked_unless_allowed(
    corpus: Path, tmp_path: Path, ray_session: None
) -> None:
    files = {f"/v{number}.mp4": (corpus / f"v{number}.mp4").read_bytes() for number in range(2)}
    with http_server(lambda path: files[path]) as server:
        manifest = tmp_path / "some.csv"
        manifest.write_text("\n".join(["uri", *(server.url + path for path in files)]))
        settings = {"out": str(tmp_path), "stages": {}, "tokenizer": "tiny", "videos": [str(manifest)]}

        def open_with(**more: object) -> TrainingVideos:
            limits = TrainRun.model_validate(settings | more).limits
            return open_training_videos([str(manifest)], spec=SPEC, validation_share=0.0, num_tasks=2, limits=limits)

        with pytest.raises(UnusableError):
            open_with()
        assert not server.asked
        assert open_with(allow_private=True).num_videos == 2


def test_videos_are_opened_once_copies_count_once_and_bad_ones_are_counted(corpora: TrainingVideos) -> None:
    assert corpora.num_videos == 10
    assert sorted(str(r.reason) for r in corpora.rejections) == [Reason.NOT_A_VIDEO, Reason.TOO_SHORT]
    held_out = set(corpora.held_out["video_id"].to_pylist())
    assert len(held_out) == 2
    assert corpora.train.num_rows == 8 * 2
    assert held_out.isdisjoint(corpora.train["video_id"].to_pylist())


def test_whether_a_video_is_held_out_follows_from_its_content(
    corpora: TrainingVideos, corpus: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    for number, path in enumerate(sorted(corpus.glob("v*.mp4"), reverse=True)):
        shutil.copy(path, elsewhere / f"{number}.mp4")
    ids = corpora.held_out["video_id"].to_pylist()
    assert sorted(opened(elsewhere).held_out["video_id"].to_pylist()) == sorted(ids)


def test_a_second_stage_holds_out_nothing_that_the_first_trained_on(
    corpora: TrainingVideos, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "grown"
    shutil.copytree(corpus, folder)
    for number in range(10):
        write_video(folder / f"more{number}.mp4", Recipe(num_frames=60 + number, rate=Fraction(8)))
    for row in corpora.held_out.slice(0, 1).to_pylist():
        (folder / Path(row["uri"]).name).unlink()
    longer = StageConfig(frames=23, fps=Fraction(4)).clip_spec(clips_per_video=1)  # some are too short for it
    [lost, left] = corpora.held_out["video_id"].to_pylist()
    trained = set(corpora.train["video_id"].to_pylist())
    second = opened(folder, spec=longer, held_out=0.4, before=corpora)
    held_out = set(second.held_out["video_id"].to_pylist())
    assert len(held_out) == round(0.4 * second.num_videos) > 2
    assert lost not in held_out
    assert trained.isdisjoint(held_out)
    assert left not in second.train["video_id"].to_pylist()
    assert trained & set(second.train["video_id"].to_pylist())


def test_a_video_of_two_corpora_belongs_to_the_first(corpus: Path, tmp_path: Path, ray_session: None) -> None:
    shutil.copy(corpus / "v1.mp4", tmp_path / "v1.mp4")
    write_video(tmp_path / "own.mp4", Recipe(num_frames=33, rate=Fraction(8)))
    both = opened(tmp_path, corpus, held_out=0)
    by_corpus = both.train.group_by("corpus").aggregate([("video_id", "count_distinct")]).sort_by("corpus")
    assert by_corpus["video_id_count_distinct"].to_pylist() == [2, 9]


def test_a_corpus_of_nothing_usable_is_refused_with_reasons(corpus: Path, tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(UnusableError, match=r"no usable video in .*1 x not_a_video.*a\.mp4"):
        opened(tmp_path)
    with pytest.raises(UnusableError, match=r"12 x too_short.*--fps make clips shorter"):
        opened(corpus, spec=StageConfig(frames=33, fps=Fraction(1)).clip_spec(clips_per_video=1))
    with pytest.raises(UnusableError, match="held out: give more videos"):
        opened(corpus / "v0.mp4")
    with pytest.raises(UnusableError, match=r"no usable video in .*1 x not_a_video"):
        opened(corpus, tmp_path)  # nor is it left out in silence, and its weight given to the others
    with pytest.raises(UnusableError, match=r"v0\.mp4 that is not in another corpus"):
        opened(corpus, corpus / "v0.mp4")


def test_what_a_training_began_with_can_be_kept(corpora: TrainingVideos, corpus: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "videos.parquet")
    corpora.write(path)
    again = read_training_videos(path)
    assert again.train.equals(corpora.train)
    assert again.held_out.equals(corpora.held_out)
    assert again.num_videos == corpora.num_videos
    assert again.digest == corpora.digest
    assert opened(corpus, held_out=0.8).digest != corpora.digest
    Path(path).write_bytes(b"PAR1 and no more")
    with pytest.raises(UnusableError, match=r"videos\.parquet is damaged"):
        read_training_videos(path)


# The clips


def streamed(draws: ClipSampler, start: int, stop: int, workers: int, block: int = 2) -> list[list[pa.Table]]:
    """Blocks that each worker gets."""
    context = DataContext.get_current()
    before = context.execution_options.preserve_order
    context.execution_options.preserve_order = True
    try:
        reader = ClipReader(spec=SPEC, limits=Limits())
        dataset = training_clips(ray.put(draws), reader, start, stop, rows_per_block=block)
        parts = dataset.streaming_split(workers, equal=True)

        def consume(part: ray.data.DataIterator) -> list[pa.Table]:
            return list(part.iter_batches(batch_size=block, batch_format="pyarrow"))

        got: list[list[pa.Table]] = ray.get([ray.remote(num_cpus=0)(consume).remote(part) for part in parts])
        return got
    finally:
        context.execution_options.preserve_order = before


def test_clips_are_consecutive_frames_on_the_grid_from_any_place_on(corpora: TrainingVideos) -> None:
    draws = ClipSampler(items=corpora.train, weights=None, seed=3)
    [whole] = streamed(draws, 0, 24, workers=1)
    table = pa.concat_tables(whole)
    assert table["sample"].to_pylist() == list(range(24))
    assert table.schema == CLIP_SCHEMA
    starts = set()
    for batch in batches(iter(whole), SPEC, first=0):
        assert batch.frames.shape == (2, 3, 32, 32, 3)
        for clip in batch.frames:
            numbers = [read_frame_number(frame) for frame in clip]
            assert [after - before for before, after in pairwise(numbers)] == [2, 2]  # 8 to 4
            starts.add(numbers[0])
    assert len(starts) > 5  # random places
    [rest] = streamed(draws, 10, 24, workers=1)
    assert pa.concat_tables(rest).to_pylist() == table.slice(10).to_pylist()


def test_workers_together_take_the_sequence_without_gap_or_repetition(corpora: TrainingVideos) -> None:
    draws = ClipSampler(items=corpora.train, weights=None, seed=3)
    first, second = streamed(draws, 8, 28, workers=2)
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        samples = one["sample"].to_pylist() + other["sample"].to_pylist()
        assert samples == list(range(8 + 4 * step, 12 + 4 * step))
    assert len(first) == 5


def test_a_video_that_breaks_is_counted_and_another_takes_its_place(tmp_path: Path, ray_session: None) -> None:
    for number in range(4):
        write_video(tmp_path / f"v{number}.mp4", Recipe(num_frames=30 + number, rate=Fraction(8)))
    corpora = opened(tmp_path, held_out=0)
    broken = tmp_path / "v0.mp4"
    write_undecodable(broken, broken)
    draws = ClipSampler(items=corpora.train, weights=None, seed=0)
    [tables] = streamed(draws, 0, 16, workers=1)
    found = list(batches(iter(tables), SPEC, first=0))
    assert [sample for batch in found for sample in batch.samples] == list(range(16))
    rejected = [entry for batch in found for entry in batch.rejected]
    assert {entry["uri"] for entry in rejected} == {str(broken)}
    assert len(rejected) >= 4
    for batch in found:
        for clip in batch.frames:
            assert [read_frame_number(frame) for frame in clip]  # never black
    for number in range(1, 4):
        (tmp_path / f"v{number}.mp4").unlink()
    with pytest.raises(Exception, match="none of 8 places drawn one after the other"):
        streamed(draws, 0, 2, workers=1)


def test_a_video_that_was_touched_is_what_it_was_and_one_that_was_replaced_is_not(
    tmp_path: Path, ray_session: None
) -> None:
    for number in range(2):
        write_video(tmp_path / f"v{number}.mp4", Recipe(num_frames=30 + number, rate=Fraction(8)))
    corpora = opened(tmp_path, held_out=0)
    rows = ClipSampler(items=corpora.train, weights=None, seed=0).rows(range(4))
    reader = ClipReader(spec=SPEC, limits=Limits())
    before = reader(rows)
    os.utime(tmp_path / "v0.mp4", (1, 1))
    write_video(tmp_path / "v1.mp4", Recipe(num_frames=40, rate=Fraction(8)))
    after = reader(rows)
    rejected = {(entry["uri"], entry["reason"]) for row in after["rejected"].to_pylist() for entry in row}
    assert rejected == {(str(tmp_path / "v1.mp4"), "changed")}
    kept = [n for n, uri in enumerate(before["uri"].to_pylist()) if uri.endswith("v0.mp4")]
    assert kept
    assert before["frames"].take(kept).equals(after["frames"].take(kept))


def test_held_out_clips_are_the_middle_of_their_videos(corpora: TrainingVideos) -> None:
    spec = STAGE.clip_spec(clips_per_video=1, placement="even")
    clips, broken = decode_held_out(corpora.held_out, spec, Limits())
    assert not broken
    assert clips["video_id"].to_pylist() == corpora.held_out["video_id"].to_pylist()
    for frames in clips["frames"].to_pylist():
        middle = np.frombuffer(frames, np.uint8).reshape(3, 32, 32, 3)[1]
        assert 15 <= read_frame_number(middle) <= 30


def test_a_cache_gives_the_first_epoch_clips_without_decoding_again(
    corpora: TrainingVideos, tmp_path: Path, corpus: Path
) -> None:
    counts: list[int] = []
    filled, broken = fill_cache(str(tmp_path), corpora.train, SPEC, Limits(), 3, counts.append)
    assert not broken
    assert counts[-1] == filled.num_rows == corpora.train.num_rows
    [decoded] = streamed(ClipSampler(items=corpora.train, weights=None, seed=3), 0, 16, workers=1)
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    again, _ = fill_cache(str(tmp_path), corpora.train, SPEC, Limits(), 3, counts.append)
    assert shards == {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    gone = again.set_column(
        again.schema.get_field_index("uri"), "uri", pa.array(["/nowhere.mp4"] * again.num_rows, pa.string())
    )
    cached = ClipSampler(items=gone.cast(ITEM_SCHEMA), weights=None, seed=3)
    [read] = streamed(cached, 0, 32, workers=1)
    clips = pa.concat_tables(read)["frames"].to_pylist()
    assert clips[:16] == pa.concat_tables(decoded)["frames"].to_pylist()
    assert sorted(clips[:16]) == sorted(clips[16:])  # the second epoch has the same ones
    parts = pa.array([2.0] * corpora.train.num_rows)
    at = corpora.train.schema.get_field_index("part_end_seconds")
    for others in (corpora.train.slice(1), corpora.train.set_column(at, ITEM_SCHEMA.field(at), parts)):
        with pytest.raises(UnusableError, match="holds clips of other videos or settings"):
            fill_cache(str(tmp_path), others, SPEC, Limits(), 3, counts.append)
    [shard, *_] = shards
    shard.write_bytes(b"PAR1 and no more")
    with pytest.raises(UnusableError, match=r"gone or damaged .* delete it and go on"):
        ClipReader(spec=SPEC, limits=Limits()).clip_of({"shard": str(shard), "shard_row": 0})
    fill_cache(str(tmp_path), corpora.train, SPEC, Limits(), 3, counts.append)
    assert pq.read_table(shard).num_rows
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(UnusableError, match="holds clips of other videos or settings"):
        fill_cache(str(tmp_path), corpora.train, SPEC, Limits(), 3, counts.append)


def test_a_cache_on_an_object_store_works_too(corpora: TrainingVideos) -> None:
    url = "s3://videos/cache"
    filled, _ = fill_cache(url, corpora.train.slice(0, 3), SPEC, Limits(), 0, lambda _: None)
    assert storage.list_files(url, ".parquet")
    reader = ClipReader(spec=SPEC, limits=Limits())
    for item in filled.to_pylist():
        assert len(reader.clip_of(item | {"placement_seed": 0})[0]) == SPEC.clip_bytes
