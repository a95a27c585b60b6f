"""Files of weights that somebody else made: whatever they hold, the answer is a WeightsError, at little cost."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from vidshard.jobs.training.start import read_start
from vidshard.models.tokenizer import PRESETS, parse_config
from vidshard.models.weights import WeightsError, load_tokenizer, load_weights, save_tokenizer
from vidshard.schemas.errors import VidshardError

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return load_tokenizer(TINY, None, seed=0).state_dict()


KINDS: dict[str, Callable[[torch.Tensor], object]] = {
    "sparse": lambda t: t.reshape(-1).to_sparse(),
    "csr": lambda t: t.reshape(1, -1).to_sparse_csr(),
    "meta": lambda t: t.to("meta"),
    "nested": lambda t: torch.nested.nested_tensor([t.reshape(-1), t.reshape(-1)[:1]]),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "expanded": lambda t: torch.zeros(1).expand(1 << 40),
    "complex": lambda t: t.to(torch.complex64),
    "empty": lambda t: t.new_empty(0),
    "text": lambda t: "x",
    "a table": lambda t: {"x": t},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_plain_arrays_are_refused(
    kind: str, legacy: bool, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    name = next(iter(state))
    path = tmp_path / "w.ckpt"
    try:
        torch.save({**state, name: KINDS[kind](state[name])}, path, _use_new_zipfile_serialization=not legacy)
    except (RuntimeError, NotImplementedError):
        pytest.skip("torch does not write it")
    with pytest.raises(WeightsError, match=r"w\.ckpt"):
        load_weights(path, TINY)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_checkpoints_are_refused_or_whole(legacy: bool, tmp_path: Path) -> None:
    numbers = random.Random(0)
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(3), "b": [1, {"c": torch.ones(2)}]}, buffer, _use_new_zipfile_serialization=not legacy)
    for _ in range(400):
        data = bytearray(buffer.getvalue())
        for _ in range(numbers.randint(1, 6)):
            data[numbers.randrange(len(data))] = numbers.randrange(256)
        (tmp_path / "w.ckpt").write_bytes(data[: numbers.choice([len(data), numbers.randrange(len(data))])])
        with pytest.raises(WeightsError):
            load_weights(tmp_path / "w.ckpt", TINY)


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\x80\x02" + b"(" * 100_000, b"\x80\x02" + b"]" * 50_000, pickle.dumps([1])]
)
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    for name in ("w.ckpt", "w.pt", "w.pth", "w.safetensors"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WeightsError, match=name):
            load_weights(tmp_path / name, TINY)


def test_a_checkpoint_that_unpacks_to_more_than_it_has_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"\0" * (64 << 20))
    with pytest.raises(WeightsError, match="it unpacks to 67,108,864 bytes"):
        load_weights(tmp_path / "w.ckpt", TINY)


@pytest.mark.parametrize("num_bytes", [1 << 63, 1 << 40, 99_000_000, 17 << 20])
def test_a_huge_header_is_not_parsed(num_bytes: int, tmp_path: Path) -> None:
    with (tmp_path / "w.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", num_bytes))
        file.truncate(min(num_bytes, 100_000_000) + 8)
    with pytest.raises(WeightsError, match="its header is said to take"):
        load_weights(tmp_path / "w.safetensors", TINY)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder_pairs": 10**9}, {"decoder_pairs": 10**9}, {"base_width": 10**9}, {"latent_channels": 10**9},
        {"width_multipliers": [1] * 10_000}, {"width_multipliers": [10**9] * 4}, {"fsq_levels": [2] * 10**5},
        {"base_width": 4096, "width_multipliers": [64] * 4}, {"name": "x" * 10**6}, {"encoder_pairs": "x"},
        {"family": []}, {"head": {}}, {"width_multipliers": []}, {"encoder_space_levels": list(range(10**4))},
    ],
)  # fmt: skip
def test_a_config_cannot_ask_for_a_huge_network(changes: dict[str, Any], tmp_path: Path) -> None:
    config = json.dumps(json.loads(TINY.model_dump_json()) | changes)
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata={"vidshard_tokenizer_config": config})
    with pytest.raises(WeightsError):
        load_weights(path)
    with pytest.raises((WeightsError, ValueError)):
        load_tokenizer(parse_config(json.loads(config)), None, seed=0)


@pytest.mark.parametrize("record", [None, 7, [], "x", {"family": "other"}, {}])
def test_what_is_no_config_is_a_value_error(record: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        parse_config(record)


def test_a_weights_error_is_a_message_for_the_user_and_a_value_error() -> None:
    assert issubclass(WeightsError, VidshardError)
    assert issubclass(WeightsError, ValueError)


def test_names_of_foreign_entries_are_printed_safely(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(TINY, None, seed=0)
    save_tokenizer(tmp_path / "w.safetensors", tokenizer)
    entries = safetensors.torch.load_file(tmp_path / "w.safetensors") | {"\x1b]52;c;x\x07\n": torch.zeros(1)}
    safetensors.torch.save_file(entries, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError) as refusal:
        load_weights(tmp_path / "w.safetensors", TINY)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    "changes",
    [
        {"generator": {5: 1}}, {"generator": {("a",): 1}}, {"averages": {5: 1}}, {"averages": {b"x": 1}},
        {"tokenizer": "[" * 100_000}, {"tokenizer": ""}, {"tokenizer": "9" * 5000}, {"tokenizer": "null"},
        {"tokenizer": '{"base_width": -1}'}, {"format": torch.zeros(3)}, {"format": "x" * 10_000}, {"format": 10**5000},
    ],
)  # fmt: skip
def test_odd_checkpoints_of_trainings_are_refused_by_name(
    changes: dict[str, Any], state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    generator = {f"tokenizer.{name}": value for name, value in state.items()}
    own = {"format": 1, "tokenizer": TINY.model_dump_json(), "generator": generator, "averages": {}}
    torch.save({"state": own | changes}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt") as refusal:
        read_start(str(tmp_path / "w.pt"), TINY)
    assert len(str(refusal.value)) < 1000 + len(str(tmp_path))
    if "format" not in changes:
        with pytest.raises(WeightsError, match=r"w\.pt"):
            load_weights(tmp_path / "w.pt")
