"""Quality while tokenizing: a share of the clips is decoded again, their scores are stored, and trouble is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from torch import Tensor

from tests.support.cli import SMALL, printed_by
from tests.support.videos import Recipe, write_video
from vidshard.jobs.tokenization import quality as watching
from vidshard.jobs.tokenization.demo import Sample, write_sample
from vidshard.jobs.tokenization.quality import QualityWatch
from vidshard.models.vidtok.config import VidTokConfig
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import load_weights, save_tokenizer, shipped_weights
from vidshard.pipeline.output.committed import drop_spans, shard_spans
from vidshard.pipeline.output.layout import AUDIT_KEY, TOKEN_COUNTS_KEY, shard_paths
from vidshard.pipeline.output.quality import AuditFigures
from vidshard.pipeline.quality import QualityAudit
from vidshard.schemas.runs import AuditSettings
from vidshard.schemas.tokens import QUALITY_FIELDS

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = [field.name for field in QUALITY_FIELDS]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of seven clips each, the last of which is not full."""
    folder = tmp_path_factory.mktemp("videos")
    for n in range(3):
        write_video(folder / f"v{n}.mp4", Recipe(num_frames=32 + n, rate=Fraction(4), width=48, height=48))
    return folder


def tokenize(videos: Path, out: Path, *more: object, settings: tuple[str, ...] = SMALL) -> str:
    return printed_by("tokenize", videos, "--out", out, *settings, "--local", *more)


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows = [row for path in shard_paths(str(out)) for row in pq.read_table(path).to_pylist()]
    return sorted(rows, key=lambda row: str(row["clip_id"]))


def quality_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "summary.json").read_text())["quality"]
    return record


@pytest.fixture(scope="module")
def audited(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output with every clip audited, in small shards."""
    out = tmp_path_factory.mktemp("audited") / "out"
    tokenize(videos, out, "--audit", 1, "--clips-per-span", 2, "--shard-size", 200)
    return out


TWIN = ("--tokenizer", "vidtwin_tiny", "--fps", "4")
KINDS = {
    "tokens": SMALL,
    "latents": ("--tokenizer", "tiny_kl", *SMALL[2:], "--keep-logvar"),
    "padded": (*SMALL[:5], "6", *SMALL[6:], "--pad-frames", "repeat-last"),
    "tiled": (*SMALL, "--tile-size", "16", "--tile-overlap", "8"),
    "twin": TWIN,
    "stream": (*SMALL, "--continuous", "--clips-per-span", "3"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_stored_scores_are_those_of_the_decoded_shard(kind: str, videos: Path, tmp_path: Path) -> None:
    """Every kind of payload; an evaluation of the stored payload decodes it by itself, and rounds to 8 bits."""
    tokenize(videos, tmp_path / "out", "--audit", 1, "--limit", 1, settings=KINDS[kind])
    printed_by("evaluate", "--from", tmp_path / "out", "--out", tmp_path / "scores", "--local", "--no-lpips")
    scores = [row for path in (tmp_path / "scores" / "scores").iterdir() for row in pq.read_table(path).to_pylist()]
    expected = {row["clip_id"]: row for row in scores}
    measured = [row for row in rows_of(tmp_path / "out") if row["audit_psnr"] is not None]
    assert len(measured) >= (2 if kind == "twin" else 5)
    for row in measured:
        there = expected[row["clip_id"]]
        assert row["audit_psnr"] == pytest.approx(np.mean(there["psnr"]), abs=0.05)
        assert row["audit_ssim"] == pytest.approx(np.mean(there["ssim"]), abs=0.01)
        assert row["audit_lpips"] is None


def test_a_clip_of_a_stream_is_measured_where_its_row_holds_what_it_depends_on(tmp_path: Path) -> None:
    """``tiny`` sees far back: of spans of four clips only the first one holds all that its clips depend on."""
    write_video(tmp_path / "v.mp4", Recipe(num_frames=90, rate=Fraction(4), width=48, height=48))
    stream = (*SMALL, "--continuous", "--clips-per-span", "4")
    tokenize(tmp_path / "v.mp4", tmp_path / "out", "--audit", 1, settings=stream)
    spans = [shard_spans(path).spans for path in shard_paths(str(tmp_path / "out"))]
    assert len(spans[0]) == 3
    measured = {row["clip_index"] for row in rows_of(tmp_path / "out") if row["audit_psnr"] is not None}
    assert measured == {0, 1, 2, 3}


def test_without_an_audit_nothing_of_one_is_in_shards_or_records(videos: Path, tmp_path: Path) -> None:
    tokenize(videos, tmp_path / "out", "--limit", 1)
    [path] = shard_paths(str(tmp_path / "out"))
    schema = pq.read_schema(path)
    assert not set(NAMES) & set(schema.names)
    assert not {AUDIT_KEY.encode(), TOKEN_COUNTS_KEY.encode()} & set(schema.metadata)
    recorded = (
        json.loads(schema.metadata[b"vidshard.run"]),
        json.loads((tmp_path / "out" / "run.json").read_text())["run"],
    )
    assert not any(set(AuditSettings.model_fields) & set(record) for record in recorded)
    assert quality_of(tmp_path / "out") is None


def test_the_payload_is_the_same_with_an_audit(audited: Path, videos: Path, tmp_path: Path) -> None:
    tokenize(videos, tmp_path / "out", "--clips-per-span", 2, "--shard-size", 200)
    plain, with_scores = rows_of(tmp_path / "out"), rows_of(audited)
    assert [{k: v for k, v in row.items() if k not in NAMES} for row in with_scores] == plain


def test_a_share_chooses_the_same_clips_however_a_run_is_cut(audited: Path, videos: Path, tmp_path: Path) -> None:
    more = ("--clips-per-span", 2, "--audit", 0.4)
    tokenize(videos, tmp_path / "whole", *more)
    tokenize(videos, tmp_path / "parts", *more, "--limit", 1)
    text = tokenize(videos, tmp_path / "parts", *more)
    scores = {row["clip_id"]: row["audit_psnr"] for row in rows_of(audited)}
    chosen = {row["clip_id"]: row["audit_psnr"] for row in rows_of(tmp_path / "whole") if row["audit_psnr"] is not None}
    assert 3 <= len(chosen) <= 16
    assert chosen == {clip: scores[clip] for clip in chosen}
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    whole, parts = quality_of(tmp_path / "whole"), quality_of(tmp_path / "parts")
    assert parts.pop("num_shards") == 2
    assert whole.pop("num_shards") == 1
    assert parts == whole | {name: pytest.approx(whole[name], rel=1e-12) for name in ("psnr", "ssim")}
    assert f"means of {len(chosen)} clips" in text


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_the_share_that_is_chosen_is_the_one_that_was_asked_for(share: float) -> None:
    audit = QualityAudit(share=share, seed="s", vgg_weights=None)
    chosen = [audit.chooses(f"v{n}", index) for n in range(300) for index in range(20)]
    assert np.mean(chosen) == pytest.approx(share, abs=3 * np.sqrt(share / len(chosen)))


def test_codebook_use_is_that_of_all_tokens_of_all_shards(audited: Path) -> None:
    tokens = np.concatenate([row["tokens"] for row in rows_of(audited)])
    [codebook] = quality_of(audited)["codebooks"]
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    assert (codebook["tokens"], codebook["used"]) == (len(tokens), len(set(tokens.tolist())))
    assert codebook["ceiling"] == min(len(tokens), codebook["size"])
    assert codebook["dead"] == codebook["size"] - codebook["used"]
    assert codebook["perplexity"] == pytest.approx(2.0 ** -(shares * np.log2(shares)).sum())


def test_shards_of_a_run_without_an_audit_are_counted_as_such(videos: Path, tmp_path: Path) -> None:
    tokenize(videos, tmp_path / "out", "--limit", 1)
    text = tokenize(videos, tmp_path / "out", "--audit", 1)
    assert quality_of(tmp_path / "out")["num_shards_without"] == 1
    assert "1 of 2 shards have no such figures" in text


def test_inspect_shows_the_means_and_the_worst_clips(audited: Path) -> None:
    quality = quality_of(audited)
    text = printed_by("inspect", audited)
    assert f"audit: mean PSNR in dB {quality['psnr']:.2f}, SSIM {quality['ssim']:.3f} of 21 clips" in text
    assert quality["worst"][0]["clip_id"] in text
    record = json.loads(printed_by("inspect", audited, "--json"))["audit"]
    assert record["psnr"] == quality["psnr"]
    assert record["worst"] == quality["worst"]


def test_one_clip_of_each_video_is_among_the_worst(audited: Path) -> None:
    by_video: dict[str, float] = {}
    for row in rows_of(audited):
        by_video[row["uri"]] = min(row["audit_psnr"], by_video.get(row["uri"], 100.0))
    worst = quality_of(audited)["worst"]
    assert {clip["uri"]: clip["psnr"] for clip in worst} == by_video
    assert [clip["psnr"] for clip in worst] == sorted(by_video.values())


def test_figures_go_when_spans_are_taken_out_of_a_shard(videos: Path, tmp_path: Path) -> None:
    tokenize(videos, tmp_path / "out", "--audit", 1, "--limit", 1, "--clips-per-span", 2)
    [path] = shard_paths(str(tmp_path / "out"))
    drop_spans(path, shard_spans(path).spans[:1])
    metadata = pq.read_metadata(path).metadata
    assert not {AUDIT_KEY.encode(), TOKEN_COUNTS_KEY.encode()} & set(metadata)
    assert "audit: mean PSNR" not in printed_by("inspect", tmp_path / "out")
    printed_by("verify", path)


def test_a_clip_that_does_not_fit_in_memory_is_counted_and_its_tokens_stay(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*_args: Any, **_named: Any) -> Tensor:
        raise MemoryError("no room")

    monkeypatch.setattr(VidTok, "decode_payload", decode)
    text = tokenize(videos, tmp_path / "out", "--audit", 1, "--limit", 1)
    assert "7 chosen clips were not audited: too little memory" in text
    assert [row["audit_psnr"] for row in rows_of(tmp_path / "out")] == [None] * 7


WRONG_FIGURES: dict[str, Any] = {
    "no object": [1],
    "unknown field": {"worst": [], "clips": 3},
    "not counted": {"worst": [], "num_clips": -1},
    "no number": {"worst": [], "sums": {"psnr": "high"}},
    "not finite": {"worst": [], "sums": {"psnr": float("inf")}},
    "few moments": {"worst": [], "moments": [1.0]},
    "no clip": {"worst": [{"psnr": 1.0}]},
    "no text": {"worst": [{"psnr": 1.0, "clip_id": 1, "uri": "v"}]},
}


@pytest.mark.parametrize("record", WRONG_FIGURES.values(), ids=WRONG_FIGURES)
def test_impossible_figures_of_a_shard_are_refused(record: Any) -> None:
    with pytest.raises(ValueError, match=r"its metadata 'vidshard\.audit' holds"):
        AuditFigures.parse(record)


# Wrong weights, colors and ranges, through the shipped tokenizer


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A colored film of two clips."""
    folder = tmp_path_factory.mktemp("film")
    sample = Sample(name="film.mp4", codec="libx264", width=96, height=96, rate=Fraction(8), seconds=1.25)
    write_sample(folder / sample.name, sample, 0)
    return folder


Weights = dict[str, Tensor]


def exchanged(weights: Weights) -> None:
    """Weights of a model that gives blue, green, red."""
    for name in ("decoder.conv_out.conv.weight", "decoder.conv_out.conv.bias"):
        weights[name] = weights[name].flip(0)


def half_range(weights: Weights) -> None:
    """Weights of a model whose values lie in [0, 1]."""
    weights["decoder.conv_out.conv.weight"] = weights["decoder.conv_out.conv.weight"] / 2
    weights["decoder.conv_out.conv.bias"] = (weights["decoder.conv_out.conv.bias"] + 1) / 2


def double_range(weights: Weights) -> None:
    """Weights of a model whose values lie in [-2, 2]."""
    for name in ("decoder.conv_out.conv.weight", "decoder.conv_out.conv.bias"):
        weights[name] = weights[name] * 2


def unchanged(_weights: Weights) -> None:
    """The right weights."""


@pytest.mark.parametrize(
    ("change", "variant", "found"),
    [
        (unchanged, "causal-v1.0", None),
        (exchanged, "causal-v1.0", "with red and blue exchanged"),
        (half_range, "causal-v1.0", "take another range of values"),
        (double_range, "causal-v1.0", "take another range of values"),
        (unchanged, "causal-v1.1", "below --audit-min-psnr 20"),
    ],
    ids=["right", "channels", "half_range", "double_range", "v1.0_as_v1.1"],
)
def test_wrong_weights_are_found_and_right_ones_are_not(
    change: Callable[[Weights], None], variant: str, found: str | None, film: Path, tmp_path: Path
) -> None:
    config, weights = load_weights(shipped_weights("fsq_causal_488_small"))
    assert isinstance(config, VidTokConfig)
    changed = dict(weights)
    change(changed)
    model = VidTok(VidTokConfig.model_validate(config.model_dump() | {"name": "mine", "variant": variant}))
    model.load_state_dict(changed)
    save_tokenizer(tmp_path / "mine.safetensors", model)
    settings = ("--weights", str(tmp_path / "mine.safetensors"), "--fps", "8", "--frames", "5", "--size", "64")
    text = tokenize(film, tmp_path / "out", "--audit", 1, "--audit-min-psnr", 20, settings=settings)
    quality = quality_of(tmp_path / "out")
    assert (found is None) == (not quality["findings"]), quality
    if found is not None:
        assert any(found in finding for finding in quality["findings"]), quality
        assert f"!! audit: {quality['findings'][0]}" in text
        assert "film.mp4" in text.split("!! audit")[-1]


def scores(psnr: float) -> dict[str, Any]:
    return {"psnr": psnr, "ssim": None, "lpips": None, "moments": [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]}


def test_a_running_job_warns_once_and_long_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    from vidshard.pipeline.rows import QUALITY

    monkeypatch.setattr(watching, "FEWEST_CLIPS", 4)
    console = Console(record=True, width=300)
    watch = QualityWatch(min_psnr=20.0, console=console)
    row = {"uri": "v.mp4", "span_id": "v-0-end", "quality": [scores(10.0), None]}
    schema = pa.schema([("uri", pa.string()), ("span_id", pa.string()), QUALITY])
    rows = pa.Table.from_pylist([row], schema=schema)
    for _ in range(3):
        watch.take(rows)
    assert not console.export_text(clear=False)
    for _ in range(5):
        watch.take(rows)
    assert console.export_text().count("mean PSNR of 4 audited clips is 10.0 dB") == 1
