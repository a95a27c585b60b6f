"""Settings of training: former names, identity, help texts, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from vidshard.jobs.training.resolve import begin_run, read_record, resolve
from vidshard.jobs.training.settings import training_run
from vidshard.schemas.errors import UserError
from vidshard.schemas.fields import differences, setting_of
from vidshard.schemas.training import RunSettings, StageConfig, TrainFlags, TrainRun, join_weight, split_weight

FORMER_STAGE = {
    "batch_size": "clips_per_step",
    "gradient_accumulation": "accumulate",
    "activation_checkpointing": "recompute",
    "max_grad_norm": "clip_norm",
}
FORMER_RUN = {"validation_share": "held_out", "init_from": "start_from"}


def with_former_names(record: dict[str, Any]) -> dict[str, Any]:
    """A stored run or identity as it was before the settings were renamed."""
    renamed = {FORMER_RUN.get(name, name): value for name, value in record.items()}
    renamed["stages"] = {
        stage: {FORMER_STAGE.get(name, name): value for name, value in values.items()}
        for stage, values in record["stages"].items()
    }
    return renamed


def test_every_former_name_means_its_present_setting() -> None:
    former = {name: alias for alias, name in TrainFlags.former_names().items() if alias != "from"}
    assert former == FORMER_STAGE | FORMER_RUN
    old = {"clips_per_step": 6, "accumulate": 3, "recompute": True, "clip_norm": 2.0}
    new = {"batch_size": 6, "gradient_accumulation": 3, "activation_checkpointing": True, "max_grad_norm": 2.0}
    assert StageConfig.model_validate(old) == StageConfig.model_validate(new)
    run: dict[str, Any] = {"videos": ["a"], "out": "x", "stages": {"stage1": {}}}
    assert TrainRun.model_validate({**run, "held_out": 0.5, "start_from": "b"}) == TrainRun.model_validate(
        {**run, "validation_share": 0.5, "init_from": "b"}
    )


def test_former_names_work_in_flags_files_and_settings_of_one_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: tiny\nheld_out: 0.5\nstage2: {accumulate: 2}\n")
    flags = {"videos": ["a"], "out": "x", "clip_norm": "3", "from": "b.pt", "stage1": ("clips_per_step=8",)}
    run = training_run("paper", ("stage1", "stage2"), flags, file)
    assert (run.validation_share, run.init_from) == (0.5, "b.pt")
    first, second = run.stages.values()
    assert (first.batch_size, first.gradient_accumulation, first.max_grad_norm) == (8, 1, 3.0)
    assert (second.batch_size, second.gradient_accumulation, second.max_grad_norm) == (4, 2, 3.0)
    notes = capsys.readouterr().err
    for words in (
        "--clip-norm is now --max-grad-norm",
        "held_out is now validation_share",
        "--from is now --init-from",
        "stage1: clips_per_step is now batch_size",
        "stage2: accumulate is now gradient_accumulation",
    ):
        assert words in notes


def test_a_run_stored_under_former_names_is_the_same_run(tmp_path: Path) -> None:
    flags = {"videos": [str(tmp_path)], "out": str(tmp_path / "run")}
    begun = begin_run(resolve(training_run("tiny", ("stage1", "stage2"), flags)))
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    old = {**record, "run": with_former_names(record["run"]), "identity": with_former_names(record["identity"])}
    assert "clips_per_step" in old["identity"]["stages"]["stage1"]
    path.write_text(json.dumps(old))
    (tmp_path / "run" / "stage1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "stage1" / "checkpoints" / "step-00000010.json").write_text(
        json.dumps({"step": 10, "run_id": begun.run_id, "digest": "x", "metrics": {}})
    )
    again = resolve(TrainRun.model_validate(read_record(str(tmp_path / "run"))["run"]))
    assert begin_run(again).run_id == begun.run_id
    other = resolve(training_run("tiny", ("stage1", "stage2"), {**flags, "batch_size": "8"}))
    with pytest.raises(UserError, match=r"stage1\.batch_size: 4 there, 8 now"):
        begin_run(other)


def test_the_identity_of_a_run_is_what_it_computes() -> None:
    """Every setting of a run decides whether it belongs to the identity; those of stages always do."""
    decided = {name: setting_of(field).identity for name, field in RunSettings.model_fields.items()}
    assert None not in decided.values()
    run = TrainRun.model_validate({"videos": ["a"], "out": "x", "stages": {"stage1": {}}})
    assert list(run.identity) == [
        "videos",
        "validation_share",
        "clips_per_video",
        "tokenizer",
        "init_from",
        "stages",
        "cached",
    ]
    assert run.model_copy(update={"cache": "c"}).identity["cached"] is True


@pytest.mark.parametrize("name", TrainFlags.model_fields)
def test_help_texts_stand_alone(name: str) -> None:
    text = TrainFlags.model_fields[name].description
    assert text is not None
    assert re.match(r"[A-Z0-9]", text)
    assert not re.match(r"(Of|It|What|How|Where)\b", text)
    assert text.endswith(".")
    for sentence in re.split(r"[.;:] ", text):
        assert len(sentence.split()) <= 25, sentence


def test_differences_name_nested_fields_and_know_defaults() -> None:
    before = {"fps": "8", "stages": {"stage1": {"steps": 4, "size": "32x32"}}}
    now = {"fps": "8", "stages": {"stage1": {"steps": 5, "size": "32x32"}}, "tail": "drop"}
    assert differences(before, now) == ["stages.stage1.steps: 4 there, 5 now", "tail: None there, 'drop' now"]
    assert differences(before, now, defaults={"tail": "drop", "unused": 1}) == ["stages.stage1.steps: 4 there, 5 now"]
    assert differences({"empty": {}}, {"empty": {}}) == []
    assert differences({"empty": {}}, {"empty": {"a": 1}}) == [
        "empty: {} there, None now",
        "empty.a: None there, 1 now",
    ]


def test_a_path_may_have_a_weight() -> None:
    assert split_weight("a/=0.7") == ("a/", 0.7)
    assert split_weight("s3://b/x=y/") == ("s3://b/x=y/", None)
    for path, weight in (("a", 1e6), ("a", 1e-5), ("a", 1 / 3), ("a=5", 2.0), ("a=5", None), ("a", None)):
        again = split_weight(join_weight(path, weight))
        assert (again[0].rstrip("/"), again[1]) == (path, weight)
    with pytest.raises(ValueError, match="positive"):
        split_weight("a=0")
    with pytest.raises(ValueError, match="every --videos a weight"):
        RunSettings(videos=["a=1", "b"], out="x")
