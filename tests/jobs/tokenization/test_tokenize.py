"""The job end to end, through the command line, on real files, in this process (``--local``)."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import boto3
import duckdb
import numpy as np
import polars
import pyarrow.parquet as pq
import pytest

from tests.support.cli import SMALL, run, tokenize
from tests.support.corpus import BAD_VIDEOS, GOOD_VIDEOS
from tests.support.shards import rows_of, tokens_by_clip
from tests.support.shared import SHARED
from tests.support.videos import Recipe, write_video
from vidshard.models.tokenizer import frames_to_input
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import load_tokenizer, seeded_weights, weights_digest
from vidshard.pipeline.output.layout import shard_paths
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.pipeline.storage import open_binary
from vidshard.pipeline.video.decode import decode_span
from vidshard.pipeline.video.probe import probe_video
from vidshard.pipeline.video.sampling import plan_spans
from vidshard.schemas.video import ClipSpec, VideoRef

SPEC = ClipSpec(fps=Fraction(4), num_frames=5, height=32, width=32)


def expected_clips(recipe: Recipe) -> int:
    """Clips of a constant-rate video by exact arithmetic: grid times before its end, in fives, the last padded."""
    grid_times = -(-recipe.num_frames * SPEC.fps // recipe.rate)
    return int(-(-grid_times // SPEC.num_frames))


def test_every_good_video_comes_out_as_all_of_its_clips(output: Path, good_videos: Path) -> None:
    clips: dict[str, list[int]] = {}
    for row in rows_of(output):
        clips.setdefault(Path(row["uri"]).relative_to(good_videos).as_posix(), []).append(row["clip_index"])
    assert clips == {name: list(range(expected_clips(recipe))) for name, recipe in GOOD_VIDEOS.items()}


def test_every_bad_video_comes_out_as_a_rejection_with_its_reason(output: Path) -> None:
    rejects = read_rejects(str(output)).to_pylist()
    assert {Path(r["uri"]).name: r["reason"] for r in rejects} == BAD_VIDEOS
    for row in rejects:
        assert row["detail"]
        assert row["remedy"]
        assert "\n" not in row["detail"]


def test_rows_carry_the_times_of_their_frames(output: Path, good_videos: Path) -> None:
    row = next(r for r in rows_of(output) if r["uri"].endswith("a.mp4") and r["clip_index"] == 1)
    recipe = GOOD_VIDEOS["a.mp4"]
    grid = [Fraction(5 + i) / SPEC.fps for i in range(5)]
    shown = [min(int(t * recipe.rate), recipe.num_frames - 1) / recipe.rate for t in grid[:3]]
    assert row["start_seconds"] == 1.25
    assert row["fps"] == 4.0
    assert row["num_valid_frames"] == 3  # 2 s at 4 per second are 8 grid times, 5 of them in the first clip
    assert row["frame_pts_seconds"] == pytest.approx([float(t) for t in [*shown, shown[-1], shown[-1]]], abs=1e-9)
    assert (row["source_width"], row["source_height"], row["source_codec"]) == (96, 64, "h264")
    assert row["geometry"] == {"policy": "crop", "scaled_width": 48, "scaled_height": 32, "left": 8, "top": 0}


def test_stored_tokens_are_those_of_the_plain_functions(output: Path, good_videos: Path, tiny: VidTok) -> None:
    path = str(good_videos / "deep" / "d.mp4")
    probe = probe_video(VideoRef(uri=path, num_bytes=-1), open_binary)
    (span,) = plan_spans(probe, SPEC, 100)
    stored = tokens_by_clip(output)
    import torch

    for clip in decode_span(span, SPEC, path, max_clips=100):
        with torch.inference_mode():
            encoded = tiny.encode(frames_to_input(torch.from_numpy(clip.frames)[None]))
        assert encoded.tokens is not None
        assert stored[SPEC.clip_id(clip.video_id, clip.clip_index)] == encoded.tokens.flatten().tolist()


def test_a_second_run_writes_nothing_new(output: Path, good_videos: Path, bad_videos: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for d in ("shards", "rejects") for p in (output / d).iterdir()}
    result = tokenize(good_videos, bad_videos, "--out", output, *SMALL)
    assert result.exit_code == 0
    assert "finished by an earlier run" in result.output
    after = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for d in ("shards", "rejects") for p in (output / d).iterdir()}
    assert after == before


def test_what_is_missing_is_filled_in_by_the_same_command(
    output: Path, good_videos: Path, bad_videos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "tokens"
    assert tokenize(good_videos / "a.mp4", bad_videos, "--out", out, *SMALL).exit_code == 0
    assert tokenize(good_videos, bad_videos, "--out", out, *SMALL).exit_code == 0
    assert tokens_by_clip(out) == tokens_by_clip(output)
    assert len(rows_of(out)) == len(tokens_by_clip(out))
    rejects = [Path(r["uri"]).name for r in read_rejects(str(out)).to_pylist()]
    assert sorted(rejects) == sorted(BAD_VIDEOS)


def test_another_batch_size_changes_nothing_but_near_ties(
    output: Path, good_videos: Path, tmp_path: Path, tiny: VidTok
) -> None:
    result = tokenize(good_videos, "--out", tmp_path / "tokens", *SMALL, "--batch-size", "4")
    assert result.exit_code == 0, result.output
    one, four = tokens_by_clip(output), tokens_by_clip(tmp_path / "tokens")
    assert one.keys() == four.keys()
    different = {clip_id for clip_id in one if one[clip_id] != four[clip_id]}
    import torch

    for row in rows_of(output):
        if row["clip_id"] not in different:
            continue
        (span,) = plan_spans(probe_video(VideoRef(uri=row["uri"], num_bytes=-1), open_binary), SPEC, 100)
        clip = decode_span(span, SPEC, row["uri"], max_clips=100)[row["clip_index"]]
        with torch.inference_mode():
            bounded = tiny.encode(frames_to_input(torch.from_numpy(clip.frames)[None])).pre_quantized
        assert bounded is not None
        from_tie = (bounded - bounded.floor() - 0.5).abs().amin(dim=1).flatten().numpy()
        changed = np.array(one[row["clip_id"]]) != np.array(four[row["clip_id"]])
        assert np.all(from_tie[changed] < 1e-4)


def test_manifest_columns_travel_to_the_rows(good_videos: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "list.jsonl"
    lines = [
        {"uri": str(good_videos / "a.mp4"), "caption": "a cat", "tags": ["x", "y"], "fps": 25},
        {"uri": str(good_videos / "e.mp4"), "caption": None, "tags": [], "fps": 10},
        {"uri": str(tmp_path / "gone.mp4"), "caption": "gone", "tags": [], "fps": 1},
    ]
    manifest.write_text("\n".join(map(json.dumps, lines)))
    result = tokenize(manifest, "--out", tmp_path / "tokens", *SMALL)
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "tokens")
    found = {(Path(r["uri"]).name, r["caption"], tuple(r["tags"]), r["manifest_fps"]) for r in rows}
    assert found == {("a.mp4", "a cat", ("x", "y"), 25), ("e.mp4", None, (), 10)}
    assert [r["reason"] for r in read_rejects(str(tmp_path / "tokens")).to_pylist()] == ["unreadable"]


def test_copies_of_a_video_are_tokenized_once_and_the_others_named(good_videos: Path, tmp_path: Path) -> None:
    for name in ("one.mp4", "two.mp4"):
        (tmp_path / name).write_bytes((good_videos / "e.mp4").read_bytes())
    result = tokenize(tmp_path / "one.mp4", tmp_path / "two.mp4", "--out", tmp_path / "tokens", *SMALL)
    assert result.exit_code == 0, result.output
    assert {Path(r["uri"]).name for r in rows_of(tmp_path / "tokens")} == {"one.mp4"}
    (copy,) = read_rejects(str(tmp_path / "tokens")).to_pylist()
    assert copy["reason"] == "duplicate"
    assert "one.mp4" in copy["detail"]


def test_other_settings_for_an_output_are_refused_with_the_difference(output: Path, good_videos: Path) -> None:
    result = tokenize(good_videos, "--out", output, *SMALL, "--fps", "3")
    assert result.exit_code == 2
    assert "fps: '4' there, '3' now" in result.output


def test_other_units_of_work_for_an_output_are_refused(output: Path, good_videos: Path) -> None:
    result = tokenize(good_videos, "--out", output, *SMALL, "--clips-per-span", "1")
    assert result.exit_code == 2
    assert "clips_per_span" in result.output


def test_too_many_rejects_fail_the_run(good_videos: Path, bad_videos: Path, tmp_path: Path) -> None:
    bad = (good_videos / "a.mp4", bad_videos / "text.mp4")
    result = tokenize(*bad, "--out", tmp_path / "a", *SMALL, "--max-reject-share", "0.4")
    assert result.exit_code == 1
    assert "--max-reject-share 0.4" in result.output
    assert tokenize(*bad, "--out", tmp_path / "b", *SMALL, "--max-reject-share", "0.5").exit_code == 0


def test_a_run_of_nothing_but_bad_videos_says_so(bad_videos: Path, tmp_path: Path) -> None:
    result = tokenize(bad_videos, "--out", tmp_path / "tokens", *SMALL)
    assert result.exit_code == 0
    assert "NOTHING WAS TOKENIZED" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--tokenizer", "fsq_causal_488_3276"), "fsq_causal_488_32768"),
        (("--frames", "16"), "13 or 17"),
        (("--size", "100"), "96 or 104"),
        (("--tokenizer", "fsq_causal_488_32768"), "--weights FILE"),
        (("--weights", "missing.safetensors"), "missing.safetensors"),
        (("--keep-logvar",), "KL"),
        (("--out", "/proc/no/such"), "/proc/no/such"),
        (("--out", "s3://no-such-bucket/tokens"), "no-such-bucket"),
        (("--out", "s3://key:SECRET@bucket/tokens"), "put the credentials into the environment"),
    ],
)
def test_impossible_requests_are_one_message_and_exit_code_2(
    s3: str, good_videos: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    result = tokenize(good_videos, "--out", tmp_path / "tokens", *SMALL, *arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert "SECRET" not in result.output
    assert not (tmp_path / "tokens" / "run.json").exists()


def test_the_demos_notice_stands_in_summary_and_shards(output: Path, good_videos: Path, bad_videos: Path) -> None:
    (path,) = shard_paths(str(output))
    metadata = pq.read_schema(path).metadata
    assert metadata[b"vidshard.notice"].startswith(b"RANDOM WEIGHTS")
    assert json.loads((output / "summary.json").read_text())["notice"].startswith("RANDOM WEIGHTS")
    assert "RANDOM WEIGHTS" in run("inspect", output).output


def test_shards_say_how_they_were_made(output: Path) -> None:
    (path,) = shard_paths(str(output))
    metadata = {k.decode(): v.decode() for k, v in pq.read_schema(path).metadata.items()}
    assert metadata["vidshard.format_version"] == "1"
    assert json.loads(metadata["vidshard.tokenizer"])["name"] == "tiny"
    assert len(metadata["vidshard.weights_sha256"]) == 64
    assert json.loads(metadata["vidshard.run"])["fps"] == "4"
    assert metadata["vidshard.code_version"].startswith("0.1.0")
    record = json.loads((output / "run.json").read_text())
    assert record["run"]["frames"] == 5
    assert pq.read_schema(path).field("tokens").metadata[b"shape"] == b"[2, 4, 4]"
    plan = pq.read_table(output / "plan")
    assert json.loads(metadata["vidshard.spans"])  # every planned span is in a shard or a reject
    rejected = {s for s in read_rejects(str(output))["span_id"].to_pylist() if s}
    assert set(plan["span_id"].drop_null().to_pylist()) == set(json.loads(metadata["vidshard.spans"])) | rejected


def test_the_readers_of_the_readme_read_the_shards(output: Path) -> None:
    import datasets

    files = f"{output}/shards/*.parquet"
    expected = {row["clip_id"]: row["tokens"] for row in rows_of(output)}

    def check(pairs: list[tuple[str, Any]]) -> None:
        assert {clip_id: np.asarray(tokens).reshape(-1).tolist() for clip_id, tokens in pairs} == expected

    table = pq.read_table(f"{output}/shards")
    check(list(zip(table["clip_id"].to_pylist(), table["tokens"].to_pylist(), strict=True)))
    check(duckdb.execute(f"select clip_id, tokens from '{files}'").fetchall())
    frame = polars.read_parquet(files)
    check(list(zip(frame["clip_id"].to_list(), frame["tokens"].to_list(), strict=True)))
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(output / "hf"))
    check([(row["clip_id"], row["tokens"]) for row in dataset])


def test_latents_are_stored_as_float16_and_read_everywhere(good_videos: Path, tmp_path: Path) -> None:
    import datasets
    import torch

    out = tmp_path / "latents"
    result = tokenize(good_videos / "a.mp4", "--out", out, *SMALL, "--tokenizer", "tiny_kl", "--keep-logvar")
    assert result.exit_code == 0, result.output
    assert "of their raw" in result.output
    kl = load_tokenizer(PRESETS["tiny_kl"], None, seed=0)
    path = str(good_videos / "a.mp4")
    (span,) = plan_spans(probe_video(VideoRef(uri=path, num_bytes=-1), open_binary), SPEC, 100)
    expected: dict[str, tuple[list[float], list[float]]] = {}
    for clip in decode_span(span, SPEC, path, max_clips=100):
        with torch.inference_mode():
            encoded = kl.encode(frames_to_input(torch.from_numpy(clip.frames)[None]))
        assert encoded.logvar is not None
        mean, logvar = (t.flatten().half().tolist() for t in (encoded.latents, encoded.logvar))
        expected[SPEC.clip_id(clip.video_id, clip.clip_index)] = (mean, logvar)

    def check(rows: list[tuple[str, Any, Any]]) -> None:
        assert {i: (list(map(float, mean)), list(map(float, logvar))) for i, mean, logvar in rows} == expected

    names = ["clip_id", "latents", "latents_logvar"]
    files = f"{out}/shards/*.parquet"
    check([tuple(row[n] for n in names) for row in rows_of(out)])
    check(duckdb.execute(f"select {', '.join(names)} from '{files}'").fetchall())
    check([tuple(row[n] for n in names) for row in polars.read_parquet(files).to_dicts()])
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "hf"))
    check([tuple(row[n] for n in names) for row in dataset])
    assert pq.read_schema(shard_paths(str(out))[0]).field("latents").metadata[b"shape"] == b"[4, 2, 4, 4]"
    target = tmp_path / "clip.mp4"
    clip_id = next(iter(expected))
    decoded = run("decode", out, "--clip", clip_id, "--to", target)
    assert decoded.exit_code == 0, decoded.output


def test_a_long_video_is_cut_into_spans_that_join_without_a_seam(tmp_path: Path) -> None:
    video = write_video(tmp_path / "long.mp4", Recipe(num_frames=500, rate=Fraction(25), gop=40, b_frames=2))
    assert tokenize(video, "--out", tmp_path / "whole", *SMALL).exit_code == 0
    result = tokenize(video, "--out", tmp_path / "cut", *SMALL, "--clips-per-span", "2")
    assert result.exit_code == 0, result.output
    assert pq.read_table(tmp_path / "cut" / "plan").num_rows > 4
    assert tokens_by_clip(tmp_path / "cut") == tokens_by_clip(tmp_path / "whole")
    assert len(tokens_by_clip(tmp_path / "cut")) == 16


def test_a_converted_checkpoint_says_which_model_it_is(
    output: Path, good_videos: Path, tmp_path: Path, tiny: VidTok
) -> None:
    import torch

    released, converted = tmp_path / "released.ckpt", tmp_path / "tiny.safetensors"
    torch.save({"state_dict": tiny.state_dict() | {"loss.logvar": torch.zeros(1)}, "epoch": 3}, released)
    result = run("convert", released, converted, "--tokenizer", "tiny")
    assert result.exit_code == 0, result.output
    sampling = ("--fps", "4", "--frames", "5", "--size", "32")
    result = tokenize(good_videos / "a.mp4", "--out", tmp_path / "tokens", *sampling, "--weights", converted)
    assert result.exit_code == 0, result.output
    assert "RANDOM" not in result.output
    found = tokens_by_clip(tmp_path / "tokens")
    assert found
    assert found == {clip_id: t for clip_id, t in tokens_by_clip(output).items() if clip_id in found}
    refused = tokenize(good_videos, "--out", tmp_path / "other", *sampling, "--weights", released)
    assert refused.exit_code == 2
    assert "--tokenizer NAME" in refused.output


def test_averaged_weights_are_recorded_and_decoded_with(good_videos: Path, tmp_path: Path) -> None:
    import torch

    last, averages = (seeded_weights(PRESETS["tiny"], seed) for seed in (0, 1))
    files = {name: tmp_path / f"{name}.ckpt" for name in ("last", "both")}
    torch.save(last, files["last"])
    torch.save(last | {f"model_ema.{name.replace('.', '')}": w for name, w in averages.items()}, files["both"])
    out, sampling = tmp_path / "tokens", ("--fps", "4", "--frames", "5", "--size", "32")
    command = (good_videos / "a.mp4", "--out", out, *sampling, "--ema")
    result = tokenize(*command, "--tokenizer", "tiny", "--weights", files["last"])
    assert result.exit_code == 2
    assert "holds no averaged (EMA) weights" in result.stderr
    result = tokenize(*command, "--tokenizer", "tiny", "--weights", files["both"])
    assert result.exit_code == 0, result.output
    record = json.loads((out / "run.json").read_text())
    assert record["run"]["ema"] is True
    assert record["weights_sha256"] == weights_digest(averages)

    converted = tmp_path / "averages.safetensors"
    assert run("convert", files["both"], converted, "--tokenizer", "tiny", "--ema").exit_code == 0
    decode = ("decode", out, "--all", tmp_path / "videos", "--limit", "1", "--each-clip")
    for weights in ((), ("--weights", files["both"]), ("--weights", converted)):
        result = run(*decode, *weights)
        assert result.exit_code == 0, result.output
    result = run(*decode, "--weights", files["last"])
    assert result.exit_code == 2
    assert "not those expected" in result.output

    again = tokenize(*command[:-1], "--weights", converted)  # the same weights from another file: nothing is left to do
    assert again.exit_code == 0, again.output
    assert json.loads((out / "summary.json").read_text())["written"]["num_clips"] == 0


@pytest.mark.shared
def test_real_clips_give_what_an_independent_script_says(tmp_path: Path) -> None:
    import av

    videos = SHARED / "videos"
    if not videos.is_dir():
        pytest.skip(f"{videos} is not there")
    result = tokenize(videos, "--out", tmp_path / "tokens", "--tokenizer", "tiny", "--size", "64")
    assert result.exit_code == 0, result.output

    expected: dict[tuple[str, int], tuple[list[float], int]] = {}
    damaged: list[str] = []
    for path in sorted(videos.iterdir()):
        if path.suffix not in (".mp4", ".mov"):
            continue
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            base = stream.time_base  # to be read while the container is open
            assert base is not None
            try:
                frames = sorted((f.pts, f.duration) for f in container.decode(stream) if f.pts is not None)
            except av.error.InvalidDataError:
                damaged.append(path.name)
                continue
        pts = [p for p, _ in frames]
        end = (pts[-1] + frames[-1][1]) * base
        shown: list[float] = []
        while (now := pts[0] * base + Fraction(len(shown), 8)) < end:
            assert len(shown) < 1000
            shown.append(float(max(p for p in pts if p * base <= now) * base))
        for number in range(0, len(shown), 17):
            times = shown[number : number + 17]
            expected[path.name, number // 17] = (times + times[-1:] * (17 - len(times)), len(times))
    rows = rows_of(tmp_path / "tokens")
    found = {(Path(r["uri"]).name, r["clip_index"]): (r["frame_pts_seconds"], r["num_valid_frames"]) for r in rows}
    assert found == expected
    rejects = read_rejects(str(tmp_path / "tokens")).to_pylist()
    assert [(Path(r["uri"]).name, r["reason"]) for r in rejects] == [(name, "decode_error") for name in damaged]
    assert damaged == ["corrupted.mp4"]


def test_what_the_kernel_lacks_for_confinement_is_said_or_refused(
    good_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = good_videos / "a.mp4"
    monkeypatch.setattr("vidshard.jobs.tokenization.job.confinement_lacks", lambda _: ["landlock"])
    said = tokenize(video, "--out", tmp_path / "auto", *SMALL)
    assert said.exit_code == 0, said.output
    assert "not wholly confined: the kernel lacks landlock" in said.output
    refused = tokenize(video, "--out", tmp_path / "required", *SMALL, "--sandbox", "required")
    assert refused.exit_code == 2
    assert "--sandbox required, and the kernel of this machine lacks landlock" in " ".join(refused.output.split())


def test_confined_or_not_the_shards_are_the_same(good_videos: Path, tmp_path: Path) -> None:
    found = {}
    for sandbox in ("auto", "off"):
        out = tmp_path / sandbox
        result = tokenize(good_videos, "--out", out, *SMALL, "--sandbox", sandbox)
        assert result.exit_code == 0, result.output
        found[sandbox] = tokens_by_clip(out)
    assert found["auto"] == found["off"]


def test_remote_files_are_decoded_confined_and_give_the_tokens_of_local_ones(
    s3: str, good_videos: Path, tmp_path: Path
) -> None:
    boto3.client("s3").upload_file(str(good_videos / "a.mp4"), "videos", "confined/a.mp4")
    found = []
    for source, sandbox in (("s3://videos/confined", "required"), (str(good_videos / "a.mp4"), "auto")):
        out = tmp_path / sandbox
        result = tokenize(source, "--out", out, *SMALL, "--sandbox", sandbox)
        if sandbox == "required" and "the kernel of this machine lacks" in result.output:
            pytest.skip(result.output)
        assert result.exit_code == 0, result.output
        assert "not confined" not in result.output
        found.append(tokens_by_clip(out))
    assert found[0] == found[1]
