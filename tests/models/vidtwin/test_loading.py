"""Weight files of VidTwin: what the publisher's training leaves in them, other settings, and the fixed tables."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.cli import vidshard_exits
from tests.support.golden import TWIN_TINY_A, TWIN_TINY_B
from vidshard.models import tokenizer as models
from vidshard.models.vidtwin.config import PRESETS, VidTwinConfig
from vidshard.models.vidtwin.model import checkpoint_name
from vidshard.models.weights import WeightsError, load_tokenizer, load_weights, seeded_weights, weights_digest


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """Weights under their published names."""
    return {checkpoint_name(n, TWIN_TINY_A): t for n, t in seeded_weights(TWIN_TINY_A, 0).items()}


@pytest.fixture(scope="module")
def digest() -> str:
    return weights_digest(seeded_weights(TWIN_TINY_A, 0))


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def training_checkpoint(weights: dict[str, Tensor]) -> dict[str, Any]:
    """A checkpoint of a whole training: losses, optimizer, and schedules that computed with numpy."""
    rate = np.float64(3e-5) * 0.5 * (1 + np.cos(np.float64(0.3)))
    assert isinstance(rate, np.float64)
    return {
        "epoch": 3,
        "global_step": 20000,
        "state_dict": OrderedDict(weights | {"loss.logvar": torch.zeros(()), "loss.lpips.count": torch.zeros(1)}),
        "optimizer_states": [
            {
                "state": {0: {"step": torch.tensor(5.0), "exp_avg": torch.zeros(3)}},
                "param_groups": [{"lr": rate, "betas": (0.0, 0.9), "foreach": None, "params": [0]}],
            }
        ],
        "lr_schedulers": [{"base_lrs": [1.6e-4], "_last_lr": [rate], "last_epoch": np.int64(7)}],
        "loops": {},
        "hyper_parameters": {},
    }


@pytest.mark.parametrize("wrapping", ["bare", "state_dict", "training", "module.", "bfloat16 tables"])
def test_checkpoints_of_any_wrapping_load(
    wrapping: str, published: dict[str, Tensor], digest: str, tmp_path: Path
) -> None:
    content: object = published
    if wrapping == "state_dict":
        content = {"state_dict": published}
    elif wrapping == "training":
        content = training_checkpoint(published)
    elif wrapping == "module.":
        content = {f"module.{name}": tensor for name, tensor in published.items()}
    elif wrapping == "bfloat16 tables":
        content = {n: t.bfloat16() if "pos_embed" in n else t for n, t in published.items()}
    _, weights = load_weights(written(tmp_path / "weights.ckpt", content), TWIN_TINY_A)
    assert weights_digest(weights) == digest
    assert weights["encoder.pos_embed"].dtype is torch.float64
    assert {t.dtype for n, t in weights.items() if "pos_embed" not in n} == {torch.float32}


def test_numbers_that_numpy_1_pickled_are_read(published: dict[str, Tensor], digest: str, tmp_path: Path) -> None:
    source = written(tmp_path / "new.ckpt", training_checkpoint(published))
    path = tmp_path / "old.ckpt"
    with zipfile.ZipFile(source) as given, zipfile.ZipFile(path, "w") as old:
        for entry in given.infolist():
            data = given.read(entry)
            if entry.filename.endswith("data.pkl"):
                renamed = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                assert renamed != data
                data = renamed
            old.writestr(entry, data)
    assert weights_digest(load_weights(path, TWIN_TINY_A)[1]) == digest


class Unknown:
    """Stands for a class that a training pickles, such as a list of omegaconf; it tells when it is rebuilt."""

    rebuilt = 0

    def __setstate__(self, _state: object) -> None:
        Unknown.rebuilt += 1

    def __getstate__(self) -> dict[str, int]:
        return {"value": 1}


def test_other_pickled_things_are_refused_by_name_and_not_executed(
    published: dict[str, Tensor], tmp_path: Path
) -> None:
    path = written(tmp_path / "weights.ckpt", training_checkpoint(published) | {"callbacks": Unknown()})
    with pytest.raises(WeightsError, match=r"asks for [\w.]*Unknown, .* save the tensors of its 'state_dict' alone"):
        load_weights(path, TWIN_TINY_A)
    assert Unknown.rebuilt == 0
    pickle.loads(pickle.dumps(Unknown()))  # as it would be elsewhere
    assert Unknown.rebuilt == 1


@pytest.mark.parametrize(
    ("changes", "theirs"),
    [
        ({"structure_channels": 4}, "structure 3x2x2x4, dynamics_x 5x2x5, dynamics_y 5x2x5"),
        ({"num_queries": 4}, "structure 4x2x2x3, dynamics_x 5x2x5, dynamics_y 5x2x5"),
        ({"dynamics_halvings": 1, "dynamics_channels": 6}, "structure 3x2x2x3, dynamics_x 5x3x6, dynamics_y 5x3x6"),
        ({"structure_halvings": 1}, "structure 3x3x3x3, dynamics_x 5x2x5, dynamics_y 5x2x5"),
        ({"num_frames": 6}, "structure 3x2x2x3, dynamics_x 6x2x5, dynamics_y 6x2x5"),
    ],
)
def test_weights_of_another_setting_are_refused_with_the_latents_of_both(
    changes: dict[str, int], theirs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = VidTwinConfig.model_validate(TWIN_TINY_A.model_dump() | {"name": "other_setting"} | changes)
    monkeypatch.setitem(PRESETS, other.name, other)
    names = {checkpoint_name(n, other): t for n, t in seeded_weights(other, 0).items()}
    path = written(tmp_path / "weights.ckpt", {"state_dict": names})
    with pytest.raises(WeightsError) as error:
        load_weights(path, TWIN_TINY_A)
    ours = "structure 3x2x2x3, dynamics_x 5x2x5, dynamics_y 5x2x5"
    assert f"vidtwin_tiny_a, whose latents are {ours}; the file's are {theirs}, those of other_setting" in str(
        error.value
    )


def test_weights_of_another_family_or_size_are_refused(published: dict[str, Tensor], tmp_path: Path) -> None:
    path = written(tmp_path / "weights.ckpt", published)
    wider = TWIN_TINY_A.model_copy(update={"width": 64})
    for config in (wider, models.PRESETS["tiny"]):
        with pytest.raises(WeightsError, match=rf"does not fit {config.name}; is it of another preset\?"):
            load_weights(path, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.pos_embed": torch.ones(1, 25, 32)}, "encoder.pos_embed is a fixed table, and differs"),
        ({"decoder.pos_embed_temporal": None}, "1 missing: decoder.pos_embed_temporal"),
        ({"encoder.final_layer.linear.bias": None}, "1 missing: encoder.final_layer.linear.bias"),
        ({"decoder.final_layer.extra": torch.ones(1)}, "1 foreign: decoder.final_layer.extra"),
        ({"motion_head.bias": torch.full((10,), torch.nan)}, "weights that are not finite: motion_head.bias"),
    ],
)
def test_entries_must_be_those_of_published_files(
    change: dict[str, Tensor | None], message: str, published: dict[str, Tensor], tmp_path: Path
) -> None:
    content = {name: tensor for name, tensor in {**published, **change}.items() if tensor is not None}
    with pytest.raises(WeightsError, match=message):
        load_weights(written(tmp_path / "weights.ckpt", content), TWIN_TINY_A)


def test_averages_of_what_is_learned_are_taken_with_the_other_entries(
    published: dict[str, Tensor], tmp_path: Path
) -> None:
    learned = dict(load_tokenizer(TWIN_TINY_A, None, seed=0).named_parameters())
    averages = {
        f"model_ema.{checkpoint_name(name, TWIN_TINY_A).replace('.', '')}": torch.full_like(tensor, 0.5)
        for name, tensor in learned.items()
    }
    path = written(tmp_path / "weights.ckpt", {"state_dict": published | averages})
    _, weights = load_weights(path, TWIN_TINY_A, ema=True)
    assert all((weights[name] == 0.5).all() for name in learned)
    assert torch.equal(weights["encoder.final_layer.linear.bias"], published["encoder.final_layer.linear.bias"])


def test_a_published_checkpoint_is_converted_to_a_file_that_states_its_model(
    published: dict[str, Tensor], digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(models.PRESETS, TWIN_TINY_A.name, TWIN_TINY_A)
    source = written(tmp_path / "vidtwin.ckpt", training_checkpoint(published))
    target = tmp_path / "vidtwin.safetensors"
    code, printed = vidshard_exits("convert", source, target, "--tokenizer", TWIN_TINY_A.name)
    assert code == 0, printed
    assert digest in printed
    config, weights = load_weights(target)
    assert config == TWIN_TINY_A
    assert weights_digest(weights) == digest
    code, printed = vidshard_exits("convert", source, tmp_path / "no.safetensors", "--tokenizer", "tiny")
    assert code == 2
    assert "does not fit tiny" in printed


def test_tables_of_another_frame_grid_do_not_fit() -> None:
    assert not models.FAMILIES["vidtwin"].latents_in({"bottle_down.weight": (6, 64, 3, 3)})
    shapes = {checkpoint_name(n, TWIN_TINY_B): tuple(t.shape) for n, t in seeded_weights(TWIN_TINY_B, 0).items()}
    assert models.FAMILIES["vidtwin"].latents_in(shapes) == TWIN_TINY_B.latent_shapes
