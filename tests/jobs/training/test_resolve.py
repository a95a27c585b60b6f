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


def test_a_network_of_ones_own_is_a_preset_with_changes(tmp_path: Path) -> None:
    run = TRAININGS["tiny"](["clips"], "out")
    own = resolve(run.model_copy(update={"model": {"base_width": "8", "width_multipliers": "[1, 2, 2, 2]"}}))
    assert own.tokenizer.name == "tiny_own"
    assert own.tokenizer == PRESETS["tiny"].model_copy(
        update={"name": "tiny_own", "base_width": 8, "width_multipliers": (1, 2, 2, 2)}
    )
    (tmp_path / "mine.yaml").write_text("preset: tiny\nname: mine\nbase_channels: 8\nwidth_multipliers: [1, 2, 2, 2]\n")
    from_file = resolve(run.model_copy(update={"tokenizer": str(tmp_path / "mine.yaml")}))
    assert from_file.tokenizer == own.tokenizer.model_copy(update={"name": "mine"})
    assert from_file.run.tokenizer == "tiny"  # the file is not read again: another content would be another run
    assert from_file.run.model["name"] == "mine"
    assert from_file.run.identity["model"] == from_file.run.model
    assert "model" not in resolve(run).run.identity
    assert resolve(from_file.run).tokenizer == from_file.tokenizer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": "8"}, r"--model width: tiny has name, .*base_width"),
        ({"base_width": "many"}, r"--model: vidtok.base_width|--model: base_width"),
        ({"fsq_levels": "[8]"}, r"latent channels takes"),
        ({"family": "vidtwin"}, r"--model family"),
    ],
)
def test_a_network_that_cannot_be_is_refused_by_the_name_of_its_setting(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        resolve(TRAININGS["tiny"](["clips"], "out").model_copy(update={"model": changes}))


@pytest.mark.parametrize("text", ["[1]", "base_width: 8", "{", None])
def test_a_file_that_describes_no_network_is_refused_by_name(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    run = TRAININGS["tiny"](["clips"], "out").model_copy(update={"tokenizer": str(tmp_path / "mine.yaml")})
    with pytest.raises(UserError, match=r"--tokenizer .*mine\.yaml"):
        resolve(run)
