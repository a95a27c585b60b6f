"""A run whose files are damaged, or were made to harm: a resume refuses them by name, and executes nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pytest
import torch

from tests.support.training import run_of
from vidshard.jobs.training.metrics_file import read_metrics
from vidshard.jobs.training.resolve import begin_run, read_record, resolve
from vidshard.jobs.training.stage_job import StageJob, Worker
from vidshard.jobs.training.worker import begin
from vidshard.models.training.generator import start_tokenizer
from vidshard.models.training.state import begin_stage
from vidshard.pipeline.training_data.checkpoints import CheckpointError, Checkpoints
from vidshard.pipeline.training_data.videos import ITEM_SCHEMA, TrainingVideos, UnusableError, read_training_videos
from vidshard.schemas.errors import UserError

DEEP = "[" * 100_000


class _Command:
    """An object that runs a command where it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


def job_of(out: Path) -> StageJob:
    training = begin_run(resolve(run_of(out.parent, out)))
    return StageJob(
        run=training.run,
        name="stage1",
        run_id=training.run_id,
        tokenizer=training.tokenizer,
        previous=None,
        weights=None,
        epoch_length=4,
        threads=1,
        status=cast(Any, SimpleNamespace()),
    )


def begun(job: StageJob) -> tuple[Any, ...]:
    return begin(job, Worker(rank=0, count=1, device=torch.device("cpu")))


def saved(job: StageJob, **changes: Any) -> dict[str, Any]:
    """The content of a checkpoint of step 0."""
    state = begin_stage(job.stage, start_tokenizer(job.tokenizer, 0)).state_dict()
    return {"state": state, "data": {}, "digests": {}, **changes}


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries.pop("state"),
        lambda entries: entries.pop("data"),
        lambda entries: entries.update(data={"interval": 1.5}),
        lambda entries: entries.update(digests=[1]),
        lambda entries: entries.update(state=None),
        lambda entries: entries["state"].pop("rng"),
        lambda entries: entries["state"].update(rng="x"),
        lambda entries: entries["state"].update(step=7),
        lambda entries: entries["state"].update(tokenizer=None),
        lambda entries: entries["state"]["averages"].update({next(iter(entries["state"]["averages"])): 1}),
        lambda entries: entries["state"].update(generator_optimizer=True),
    ],
)
def test_a_checkpoint_of_other_content_is_refused_and_not_tried_again(
    change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    job = job_of(tmp_path / "out")
    entries = saved(job)
    job.checkpoints.save(entries, 0, {})
    assert begun(job)[0].step == 0
    change(entries)
    job.checkpoints.save(entries, 0, {})
    with pytest.raises(CheckpointError):
        begun(job)


def _doubled(levels: int) -> list[Any]:
    """A list that holds another one twice, and so on."""
    found: list[Any] = [torch.zeros(1)]
    for _ in range(levels):
        found = [found, found]
    return found


def _in_itself() -> list[Any]:
    found: list[Any] = []
    found += [found, found]
    return found


@pytest.mark.parametrize("state", [_in_itself(), _doubled(25), _doubled(90)], ids=["in itself", "doubled", "deep"])
def test_a_checkpoint_whose_walk_would_not_end_is_refused(state: list[Any], tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), "run")
    checkpoints.save({"state": state}, 1, {})
    with pytest.raises(CheckpointError, match="nested without end"):
        checkpoints.load(checkpoints.infos()[0])


def test_a_checkpoint_that_holds_more_than_tensors_runs_nothing(tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), "run")
    checkpoints.save({"state": _Command(tmp_path / "made")}, 1, {})
    [info] = checkpoints.infos()
    with pytest.raises(
        CheckpointError, match=r"refused: it asks for \w+\.mkdir, and loading it would execute code"
    ) as e:
        checkpoints.load(info)
    assert "weights_only" not in str(e.value)  # as torch advises, which would run it
    assert not (tmp_path / "made").exists()
    pickle.loads(pickle.dumps(_Command(tmp_path / "made")))
    assert (tmp_path / "made").exists()


def test_a_checkpoint_that_unpacks_to_more_than_it_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packed(content: object, file: io.BytesIO) -> None:
        plain = io.BytesIO()
        kept(content, plain)
        with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
            for name in source.namelist():
                target.writestr(name, source.read(name))

    kept = torch.save
    monkeypatch.setattr(torch, "save", packed)
    checkpoints = Checkpoints(str(tmp_path), "run")
    checkpoints.save({"state": torch.zeros(1 << 20)}, 1, {})
    [info] = checkpoints.infos()
    with pytest.raises(CheckpointError, match="unpacks to"):
        checkpoints.load(info)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(1).expand(1 << 34), torch.zeros(2).to_sparse(), torch.empty(2, device="meta")],
    ids=["expanded", "sparse", "meta"],
)
def test_tensors_that_take_more_than_they_have_are_refused(value: torch.Tensor, tmp_path: Path) -> None:
    checkpoints = Checkpoints(str(tmp_path), "run")
    checkpoints.save({"state": [{"step": value}]}, 1, {})
    [info] = checkpoints.infos()
    with pytest.raises(CheckpointError, match="tensors without values"):
        checkpoints.load(info)


@pytest.mark.parametrize("stages", [DEEP, "{}"])
def test_a_record_that_is_none_is_refused(stages: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / "run.json"
    job_of(path.parent)
    record = json.loads(path.read_text())
    record["run"]["stages"] = "STAGES"
    path.write_text(json.dumps(record).replace('"STAGES"', stages))
    with pytest.raises(UserError, match=r"run\.json is not the record of a training run"):
        read_record(str(path.parent))


@pytest.mark.parametrize(
    "line",
    [DEEP, '{"step": "x", "group": "train"}', '{"step": 1, "group": []}', '{"step": 1, "group": "train", "l1": ""}'],
)
def test_lines_that_are_no_figures_are_left_out(line: str, tmp_path: Path) -> None:
    good = {"step": 1, "group": "train", "l1": 0.5}
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{json.dumps(good)}\n")
    assert read_metrics(str(tmp_path)) == [good]


def test_videos_of_a_run_with_a_changed_byte_anywhere_are_refused_or_the_same(tmp_path: Path) -> None:
    items = pa.table({field.name: pa.array([0] * 200).cast(field.type) for field in ITEM_SCHEMA}, schema=ITEM_SCHEMA)
    names = pa.array([f"v{number}.mp4" for number in range(200)])
    items = items.set_column(ITEM_SCHEMA.get_field_index("uri"), ITEM_SCHEMA.field("uri"), names)
    path = tmp_path / "videos.parquet"
    TrainingVideos(train=items, held_out=items, rejections=[], num_videos=9).write(str(path))
    data, refused = path.read_bytes(), 0
    for at in range(0, len(data), 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            again = read_training_videos(str(path))
        except UnusableError:
            refused += 1
        else:
            assert again.train["uri"].to_pylist() == names.to_pylist()
    assert refused > len(data) // 7 // 2
