"""Figures over stored scores: the averages by their definitions, exact however the clips are spread over files."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vidshard.models.frechet import frechet_distance
from vidshard.pipeline.evaluation.scores import Figures, ScoredSpans, counts_key, figures_of, read_scores, write_scores
from vidshard.pipeline.output.parquet import ShardError


def span(number: int, *, tokenizers: tuple[str, ...] = ("a", "b"), clips: int = 2) -> ScoredSpans:
    """Scores of one span, random but the same for a number."""
    random = np.random.default_rng(number)
    made = ScoredSpans(spans=[f"s{number}"])
    for clip in range(clips):
        for tokenizer in tokenizers:
            frames = [float(np.float32(value)) for value in random.normal(25, 9, int(random.integers(1, 6)))]
            tokens = random.integers(0, 50, 12)
            key = counts_key(tokenizer, 8.0)
            own = made.counts.setdefault(key, {})
            for token in tokens.tolist():
                own[token] = own.get(token, 0) + 1
            made.rows.append(
                {
                    "clip_id": f"v{number % 3}-x-{number:03d}{clip}",
                    "tokenizer": tokenizer,
                    "fps": 8.0,
                    "span_id": f"s{number}",
                    "video_id": f"v{number % 3}",
                    "uri": "v.mp4",
                    "clip_index": clip,
                    "start_seconds": 0.0,
                    "psnr": frames,
                    "ssim": [value / 100 for value in frames],
                    "lpips": None,
                    "num_tokens": 12,
                    "num_codes": len(set(tokens.tolist())),
                    "features_source": random.normal(size=3).astype(np.float32).tolist(),
                    "features_reconstruction": random.normal(size=3).astype(np.float32).tolist(),
                }
            )
    return made


def total(spans: list[ScoredSpans]) -> ScoredSpans:
    whole = ScoredSpans()
    for one in spans:
        whole.add(one)
    return whole


def plain(figures: list[Figures]) -> list[dict[str, Any]]:
    return [
        {name: getattr(one, name) for name in ("tokenizer", "fps", "num_clips", "num_frames", "means", "fvd", "worst")}
        | {"counts": None if one.use is None else one.use.counts.tolist()}
        for one in figures
    ]


SIZES = {"a": 64, "b": None}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(7)), cuts=st.sets(st.integers(1, 6)))
def test_figures_are_the_same_to_the_last_bit_for_any_partition_and_order(
    order: list[int], cuts: set[int], tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    expected_from = total([span(number) for number in range(7)])
    shutil.rmtree(whole, ignore_errors=True)
    write_scores(str(whole), expected_from)
    expected = plain(figures_of(read_scores(str(whole)), SIZES))
    out = tmp_path / "parts"
    shutil.rmtree(out, ignore_errors=True)
    bounds = [0, *sorted(cuts), 7]
    for start, end in pairwise(bounds):
        write_scores(str(out), total([span(number) for number in order[start:end]]))
    found = plain(figures_of(read_scores(str(out)), SIZES))
    assert found == expected
    assert found[0]["counts"] is not None
    assert found[1]["counts"] is None


def test_averages_are_over_frames_clips_and_videos() -> None:
    rows = total([span(number, tokenizers=("a",)) for number in range(5)]).rows
    [one] = figures_of(ScoredSpans(rows=rows), {"a": None})
    frames = [value for row in rows for value in row["psnr"]]
    assert one.means["psnr"]["frames"] == pytest.approx(np.mean(frames))
    assert one.means["psnr"]["clips"] == pytest.approx(np.mean([np.mean(row["psnr"]) for row in rows]))
    videos = [np.mean([v for r in rows if r["video_id"] == video for v in r["psnr"]]) for video in ("v0", "v1", "v2")]
    assert one.means["psnr"]["videos"] == pytest.approx(np.mean(videos))
    assert "lpips" not in one.means
    features = [np.array([row[name] for row in rows]) for name in ("features_source", "features_reconstruction")]
    assert one.fvd == pytest.approx(frechet_distance(*features))
    assert [value for _, _, value in one.worst] == sorted(float(np.mean(r["psnr"])) for r in rows)[:5]


def test_codebook_use_is_of_all_clips_and_has_a_ceiling(tmp_path: Path) -> None:
    write_scores(str(tmp_path), span(0))
    write_scores(str(tmp_path), span(1))
    one = figures_of(read_scores(str(tmp_path)), {"a": 1000})[0]
    assert one.use is not None
    assert one.use.num_tokens == one.use.ceiling == 4 * 12
    assert one.use.num_used == len(total([span(0), span(1)]).counts[counts_key("a", 8.0)])


def test_frame_rates_are_kept_apart() -> None:
    slow, fast = span(0, tokenizers=("a",)), span(1, tokenizers=("a",))
    for row in fast.rows:
        row["fps"] = 30.0
    fast.counts = {counts_key("a", 30.0): {5: 24}}
    figures = figures_of(total([slow, fast]), {"a": 64})
    assert [(one.fps, one.num_clips) for one in figures] == [(8.0, 2), (30.0, 2)]
    assert figures[1].use is not None
    assert figures[1].use.num_used == 1


def test_a_span_in_two_files_and_a_damaged_file_are_named(tmp_path: Path) -> None:
    write_scores(str(tmp_path), span(0))
    [first] = (tmp_path / "scores").iterdir()
    shutil.copy(first, tmp_path / "scores" / "copy.parquet")
    with pytest.raises(ShardError, match="hold the same span s0: delete one"):
        read_scores(str(tmp_path))
    (tmp_path / "scores" / "copy.parquet").write_bytes(first.read_bytes()[:-30])
    with pytest.raises(ShardError, match=r"copy\.parquet.*the same command measures its clips again"):
        read_scores(str(tmp_path))
