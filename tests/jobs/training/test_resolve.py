"""A training run resolved: its weights, memory and resources."""

from __future__ import annotations

from pathlib import Path

import pytest

from vidshard.jobs.runtime.cluster import Cluster
from vidshard.jobs.training.presets import TRAININGS
from vidshard.jobs.training.resolve import activation_bytes, plan_resources, resolve
from vidshard.jobs.training.start import start_weights
from vidshard.models.training.generator import start_tokenizer
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.weights import save_tokenizer
from vidshard.schemas.errors import UserError
from vidshard.schemas.training import StageConfig


def test_weights_of_another_version_of_the_network_may_start_a_training(tmp_path: Path) -> None:
    old, new = PRESETS["tiny"], PRESETS["tiny"].model_copy(update={"name": "new", "variant": "causal-v1.1"})
    path = tmp_path / "old.safetensors"
    save_tokenizer(path, start_tokenizer(old, 0))
    weights = start_weights(str(path), new)
    start_tokenizer(new, 1).load_state_dict(weights)
    with pytest.raises(ValueError, match="is of tiny, not tiny_kl"):
        start_weights(str(path), PRESETS["tiny_kl"])


def test_what_a_pass_keeps_in_memory_is_known_without_making_it() -> None:
    stage = StageConfig(frames=5, size=(32, 32))
    one = activation_bytes(PRESETS["tiny"], stage)
    assert one > 5 << 20
    larger = activation_bytes(PRESETS["tiny"], stage.model_copy(update={"size": (64, 64)}))
    assert 3 < larger / one < 4.5


def test_what_cannot_fit_the_machine_is_refused_before_it_starts() -> None:
    cpus = Cluster(num_cpus=2, num_gpus=0, num_nodes=1, is_own=True)
    run = TRAININGS["paper_stage1"](["clips"], "out")
    batch = {"stage1": run.stages["stage1"].model_copy(update={"batch_size": 4096, "perceptual_weight": 0})}
    with pytest.raises(
        UserError, match=r"stage1 does not fit this machine: .* 4096 clips each .* --activation-checkpointing"
    ):
        plan_resources(resolve(run.model_copy(update={"stages": batch})), cpus)
    many = run.model_copy(update={"workers": 1024, "stages": batch})
    with pytest.raises(UserError, match=r"1024 workers take about \d{4}\.\d GiB for weights"):
        plan_resources(resolve(many), cpus)
    assert plan_resources(resolve(TRAININGS["tiny"](["clips"], "out")), cpus) == 1
