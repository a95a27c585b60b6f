"""Weight files: those that fit are loaded with one digest whatever their wrapping, all others are refused."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from vidshard.models import tokenizer
from vidshard.models.vidtok.config import PRESETS, VidTokConfig
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import (
    checkpoint_name,
    load_tokenizer,
    load_weights,
    preset_in_name,
    save_tokenizer,
    seeded_weights,
    weights_digest,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = PRESETS["tiny"]
TINY_KL = TINY.model_copy(update={"name": "tiny_kl", "head": "kl", "latent_channels": 3, "fsq_levels": ()})
TINY_LFQ = TINY.model_copy(update={"name": "tiny_lfq", "head": "lfq", "latent_channels": 10, "fsq_levels": ()})
TINY_VQ = TINY.model_copy(update={"name": "tiny_vq", "head": "vq", "fsq_levels": (), "vq_codebook_size": 500})
NON_CAUSAL = TINY.model_copy(update={"name": "tiny_non_causal", "variant": "non-causal"})


def video(batch: int, num_frames: int) -> Tensor:
    return torch.rand(batch, 3, num_frames, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


CLIP = torch.rand(1, 3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return seeded_weights(TINY, 0)


def written(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_a_tokenizer_is_saved_with_its_config_and_read_back(tiny: VidTok, tmp_path: Path) -> None:
    path = tmp_path / "tiny.safetensors"
    save_tokenizer(path, tiny)
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.safetensors"]
    config, weights = load_weights(path)
    assert config == TINY
    assert weights_digest(weights) == weights_digest(tiny.state_dict())
    again = load_tokenizer(TINY, path)
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert torch.equal(again.encode(CLIP).latents, tiny.encode(CLIP).latents)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "global_step": 3},
        lambda weights: {"state_dict": weights | {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.tensor(1)}},
        lambda weights: {f"module.{name}": tensor for name, tensor in weights.items()},
        lambda weights: {name.replace("coder.", "coder._orig_mod."): tensor for name, tensor in weights.items()},
    ],
    ids=["bare", "wrapped", "with training leftovers", "module.", "_orig_mod."],
)
def test_checkpoints_of_any_wrapping_have_the_digest_of_the_safetensors(
    wrap: Callable[[dict[str, Tensor]], object], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    safetensors.torch.save_file(weights, tmp_path / "weights.safetensors")
    plain = load_weights(tmp_path / "weights.safetensors", TINY)[1]
    wrapped = load_weights(written(tmp_path / "weights.ckpt", wrap(weights)), TINY)[1]
    assert weights_digest(plain) == weights_digest(wrapped) == weights_digest(weights)


def test_files_of_models_that_are_not_causal_have_their_shorter_names(tmp_path: Path) -> None:
    model = load_tokenizer(NON_CAUSAL, None, seed=0)
    save_tokenizer(tmp_path / "weights.safetensors", model)
    stored = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert {"encoder.conv_in.weight", "encoder.mid.attn_1.q.weight", "decoder.up.1.upsample.conv.weight"} <= {*stored}
    assert "decoder.up_temporal.1.upsample.conv.weight" in stored
    assert not any(".conv.conv." in name or "conv_in.conv" in name for name in stored)
    again = load_tokenizer(NON_CAUSAL, tmp_path / "weights.safetensors")
    assert weights_digest(again.state_dict()) == weights_digest(model.state_dict())
    with pytest.raises(ValueError, match=r"variant: 'non-causal' there, 'causal-v1\.0' now"):
        load_weights(tmp_path / "weights.safetensors", TINY)
    with pytest.raises(ValueError, match=r"missing: encoder\.conv_in\.conv\.weight"):
        load_weights(written(tmp_path / "weights.ckpt", stored), TINY)


def with_averages(config: VidTokConfig, compiled: str = "") -> dict[str, Tensor]:
    """Weights of seed 0 and averages of seed 1, as training stores both."""
    last, averages = ({checkpoint_name(n, config): w for n, w in seeded_weights(config, s).items()} for s in (0, 1))
    joined = {name.replace("coder.", f"coder.{compiled}", 1).replace(".", ""): w for name, w in averages.items()}
    return {
        **last,
        **{f"model_ema.{name}": weight for name, weight in joined.items()},
        "model_ema.losslogvar": torch.zeros(()),
        "model_ema.decay": torch.tensor(0.99),
        "model_ema.num_updates": torch.tensor(7),
    }


@pytest.mark.parametrize("compiled", ["", "_orig_mod."])
@pytest.mark.parametrize("config", [TINY, NON_CAUSAL], ids=["causal", "non-causal"])
def test_averaged_weights_are_taken_where_they_are_asked_for(
    config: VidTokConfig, compiled: str, tmp_path: Path
) -> None:
    path = written(tmp_path / "weights.ckpt", {"state_dict": with_averages(config, compiled)})
    for ema in (False, True):
        digest = weights_digest(load_tokenizer(config, path, ema=ema).state_dict())
        assert digest == weights_digest(seeded_weights(config, int(ema)))


def test_averages_that_are_missing_or_incomplete_are_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no averaged"):
        load_weights(written(tmp_path / "plain.ckpt", weights), TINY, ema=True)
    partly = with_averages(TINY)
    del partly["model_ema.encoderconv_inconvweight"]
    partly["model_ema.encodersurprise"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"1 missing: encoder\.conv_in\.conv\.weight; 1 foreign: model_ema"):
        load_weights(written(tmp_path / "partly.ckpt", partly), TINY, ema=True)
    with pytest.raises(ValueError, match="come from a file"):
        load_tokenizer(TINY, None, seed=0, ema=True)


def test_weights_that_do_not_fit_are_listed(weights: dict[str, Tensor], tmp_path: Path) -> None:
    names = list(weights)
    changed = {name: weights[name] for name in names[12:]} | {"encoder.extra.weight": torch.zeros(1)}
    changed["decoder.conv_out.conv.bias"] = torch.zeros(4)
    with pytest.raises(ValueError, match="another preset") as error:
        load_weights(written(tmp_path / "weights.pt", changed), TINY)
    text = str(error.value)
    assert "12 missing: encoder.conv_in.conv.weight" in text
    assert "and 2 more" in text
    assert "1 foreign: encoder.extra.weight" in text
    assert "1 mis-shaped: decoder.conv_out.conv.bias (4,) instead of (3,)" in text


def test_weights_of_another_preset_are_refused(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mis-shaped.*encoder.conv_out"):
        load_weights(written(tmp_path / "weights.pt", weights), TINY_KL)


def test_a_file_that_states_another_network_is_refused_even_if_the_shapes_fit(tiny: VidTok, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tiny.safetensors", tiny)
    other = TINY.model_copy(update={"fsq_levels": (8, 8, 8, 8, 7)})
    with pytest.raises(ValueError, match="fsq_levels"):
        load_weights(tmp_path / "tiny.safetensors", other)
    assert load_weights(tmp_path / "tiny.safetensors", TINY.model_copy(update={"name": "mine"}))[0].name == "mine"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(weights: dict[str, Tensor], tmp_path: Path, value: float) -> None:
    changed = weights | {"encoder.conv_in.conv.bias": torch.full((TINY.base_width,), value)}
    with pytest.raises(ValueError, match=r"not finite: encoder\.conv_in\.conv\.bias"):
        load_weights(written(tmp_path / "weights.pt", changed), TINY)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("vidtok_fsq_causal_488_32768.ckpt", "fsq_causal_488_32768"),
        ("vidtok_fsq_causal_488_32768_v1_1.ckpt", "fsq_causal_488_32768_v1_1"),
        ("/models/FSQ-causal-488-32768-v1.1-ema.safetensors", "fsq_causal_488_32768_v1_1"),
        ("hf://microsoft/VidTok/checkpoints/vidtok_kl_causal_488_4chn.ckpt", "kl_causal_488_4chn"),
        ("kl_noncausal_488_16chn/epoch=3.ckpt", None),
        ("fsq_causal_488_327680.ckpt", None),
        ("destiny.ckpt", None),
        ("tiny_kl.ckpt", "tiny_kl"),
    ],
)
def test_a_files_name_tells_the_preset_that_it_is_called_after(name: str, preset: str | None) -> None:
    assert preset_in_name(name) == preset


@pytest.fixture
def two_versions(monkeypatch: pytest.MonkeyPatch) -> tuple[VidTokConfig, VidTokConfig]:
    """Presets that differ in nothing that weights tell."""
    later = TINY.model_copy(update={"name": "tiny_v1_1", "variant": "causal-v1.1"})
    monkeypatch.setitem(tokenizer.PRESETS, later.name, later)
    return TINY, later


def test_weights_called_after_another_version_of_the_model_are_refused(
    weights: dict[str, Tensor], tmp_path: Path, two_versions: tuple[VidTokConfig, VidTokConfig]
) -> None:
    for config, other in (two_versions, two_versions[::-1]):
        load_weights(written(tmp_path / f"vidtok_{config.name}.ckpt", weights), config)
        with pytest.raises(ValueError, match=rf"{config.name}, not {other.name}.*variant: .*rename the file"):
            load_weights(tmp_path / f"vidtok_{config.name}.ckpt", other)
        load_weights(written(tmp_path / "weights.ckpt", weights), other)
        # Where the content tells, the name has no say.
        load_weights(written(tmp_path / "vidtok_fsq_causal_488_32768.ckpt", weights), other)


def test_what_a_file_states_counts_more_than_its_name(
    tiny: VidTok, tmp_path: Path, two_versions: tuple[VidTokConfig, VidTokConfig]
) -> None:
    save_tokenizer(tmp_path / "tiny_v1_1.safetensors", tiny)
    assert load_weights(tmp_path / "tiny_v1_1.safetensors")[0] == TINY
    with pytest.raises(ValueError, match="holds tiny, not tiny_v1_1"):
        load_weights(tmp_path / "tiny_v1_1.safetensors", two_versions[1])


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_a_checkpoint_that_would_execute_code_is_refused_and_does_not(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    mark = tmp_path / "executed"
    path = written(tmp_path / "weights.ckpt", {"state_dict": weights, "callbacks": Bomb(mark)})
    with pytest.raises(ValueError, match=r"it asks for [\w.]+, and loading it would execute code") as error:
        load_weights(path, TINY)
    assert "weights_only" not in str(error.value)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.ckpt", "weights.gz"])
def test_files_that_hold_no_weights_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not weights at all, merely some text")
    with pytest.raises(ValueError, match=name):
        load_weights(tmp_path / name, TINY)


@pytest.mark.parametrize("content", [[1, 2], {"encoder.conv_in.conv.bias": 3}, {"encoder.x": torch.zeros(2).int()}])
def test_checkpoints_of_other_things_are_refused(content: object, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensors"):
        load_weights(written(tmp_path / "weights.pt", content), TINY)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*nowhere\.ckpt"):
        load_tokenizer(TINY, tmp_path / "nowhere.ckpt")


def test_a_file_without_a_config_needs_one(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a preset"):
        load_weights(written(tmp_path / "weights.pt", weights))


@pytest.mark.parametrize(("path", "seed"), [(None, None), ("weights.ckpt", 0)])
def test_weights_come_from_a_file_or_a_seed(path: str | None, seed: int | None, tmp_path: Path) -> None:
    source = None if path is None else written(tmp_path / path, seeded_weights(TINY, 0))
    with pytest.raises(ValueError, match="either a weights file or a seed"):
        load_tokenizer(TINY, source, seed=seed)


def test_two_models_of_one_seed_are_the_same_whatever_torch_drew_before() -> None:
    digests = []
    for torch_seed in (1, 2):
        torch.manual_seed(torch_seed)
        digests.append(weights_digest(seeded_weights(TINY, 5)))
    assert digests[0] == digests[1]
    assert weights_digest(seeded_weights(TINY, 6)) != digests[0]


def test_seeded_weights_never_change() -> None:
    weights = seeded_weights(PRESETS["tiny"], 0)
    # Copied from the run that made them.
    assert weights_digest(weights) == "bd98ed518a5b5edab816324cc8d71402a7df3eed293dcadfb8979c668098137c"


@pytest.mark.parametrize("config", [TINY_LFQ, TINY_VQ], ids=["lfq", "vq"])
def test_tokenizers_with_other_heads_are_tokenizers_too(config: VidTokConfig, tmp_path: Path) -> None:
    assert VidTokConfig.model_validate_json(config.model_dump_json()) == config
    model = load_tokenizer(config, None, seed=0)
    x_BCTHW = video(2, 9)
    encoded = model.encode(x_BCTHW)
    assert encoded.tokens is not None
    assert encoded.tokens.shape[1:] == config.latent_shape(9, 32, 32)
    assert len({*encoded.tokens.flatten().tolist()}) > 30
    decoded = model.decode(encoded.tokens)
    assert decoded.shape == x_BCTHW.shape
    assert torch.equal(decoded, model.decode(encoded.latents))
    alone = model.encode(x_BCTHW[1:]).tokens
    assert alone is not None
    assert torch.equal(alone, encoded.tokens[1:])
    save_tokenizer(tmp_path / "weights.safetensors", model)
    stored_config, stored = load_weights(tmp_path / "weights.safetensors")
    assert stored_config == config
    assert ("head.codebook" in stored) == (config.head == "vq")
    assert weights_digest(stored) == weights_digest(model.state_dict())
    again = load_tokenizer(config, tmp_path / "weights.safetensors").encode(x_BCTHW).tokens
    assert again is not None
    assert torch.equal(again, encoded.tokens)


def test_a_learned_codebook_stays_in_float32_and_counts_in_the_digest(tmp_path: Path) -> None:
    model = load_tokenizer(TINY_VQ, None, seed=0, dtype=torch.bfloat16)
    assert model.dtype is torch.bfloat16
    before = weights_digest(seeded_weights(TINY_VQ, 0))
    changed = seeded_weights(TINY_VQ, 0)
    assert torch.equal(model.state_dict()["head.codebook"], changed["head.codebook"])
    assert model.encode(video(1, 5)).latents.dtype is torch.float32
    changed["head.codebook"][7, 0] += 1
    assert weights_digest(changed) != before
    del changed["head.codebook"]
    with pytest.raises(ValueError, match=r"missing: head\.codebook"):
        load_weights(written(tmp_path / "weights.pt", changed), TINY_VQ)


def test_shapes_are_known_without_torchs_compiler() -> None:
    # importing it takes a second, in each process that loads a tokenizer
    code = (
        "import sys\n"
        "from vidshard.models.tokenizer import PRESETS\n"
        "from vidshard.models.weights import count_parameters\n"
        "for config in PRESETS.values():\n"
        "    count_parameters(config)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
