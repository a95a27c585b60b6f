"""The encode stage: one batch shape for each frame size, values that are not finite, and batches that do not fit."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor

from tests.support.encoding import LARGE, SMALL, clip_spec, decoded_row, encoder_spec, rows_of_two_sizes
from vidshard.models.tokenizer import Tokenizer, get_preset
from vidshard.pipeline import batch_sizes
from vidshard.pipeline.devices import GpuFaultError
from vidshard.pipeline.encode_stage import ClipEncoder, EncoderSpec
from vidshard.pipeline.rows import clip_frames
from vidshard.pipeline.tokenizer_source import TokenizerSource

pytestmark = pytest.mark.usefixtures("one_thread")


def with_model(encoder: ClipEncoder, **methods: Any) -> Tokenizer:
    """Load the model of an encoder and replace some of its methods by functions that get the original first."""
    model = encoder._tokenizer()
    for name, method in methods.items():
        original = getattr(model, name)
        setattr(model, name, lambda *given, _m=method, _o=original, **named: _m(_o, *given, **named))
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 4, 8])
def test_every_pass_of_a_frame_size_has_the_same_shape(batch_size: int) -> None:
    encoder = ClipEncoder(replace(encoder_spec(batch_size), most_clips=(((SMALL, SMALL), 2),)))
    shapes: set[tuple[int, ...]] = set()

    def encode(original: Any, x_BCTHW: Tensor, **named: Any) -> Any:
        shapes.add(tuple(x_BCTHW.shape))
        return original(x_BCTHW, **named)

    with_model(encoder, encode=encode)
    encoder(rows_of_two_sizes())
    encoder(rows_of_two_sizes().slice(0, 4))
    assert shapes == {(batch_size, 3, 5, LARGE, LARGE), (min(batch_size, 2), 3, 5, SMALL, SMALL)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Poisoned(TokenizerSource):
    """A tokenizer one of whose weights is not finite."""

    value: float
    name: str

    def load(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Tokenizer:
        tokenizer = TokenizerSource.load(self, device, dtype)
        tensor = next(tensor for name, tensor in tokenizer.state_dict().items() if name == self.name)
        tensor.view(-1)[0] = self.value
        return tokenizer


def poisoned(
    preset: str, precision: str, value: float, name: str = "encoder.conv_in.conv.weight", *, continuous: bool = False
) -> EncoderSpec:
    config = get_preset(preset)
    spec = encoder_spec(2, continuous=continuous)
    source = Poisoned(config=config, weights=None, seed=0, value=value, name=name)
    return replace(spec, source=source, precision=precision, payload=config.payload(5, LARGE, LARGE))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("preset", "precision"),
    [("tiny", "float32"), ("tiny", "bfloat16"), ("tiny", "tf32"), ("tiny_kl", "float32"), ("tiny_kl", "float16")],
)
def test_a_value_that_is_not_finite_rejects_the_span_with_clip_and_precision(
    preset: str, precision: str, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    [row] = ClipEncoder(poisoned(preset, precision, value))(decoded_row(3, clip_spec(SMALL), 3)).to_pylist()
    rejection = row["rejection"]
    assert row["clips"] == []
    assert (rejection["stage"], rejection["reason"]) == ("encode", "not_finite")
    assert re.fullmatch(rf"clip 2 in {precision}: .*not finite.*", rejection["detail"])
    assert "https://host/3.mp4: clip 2" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("name", ["encoder.mid.attn_1.v.conv.bias", "encoder.norm_out.norm.weight"])
def test_it_does_not_matter_in_which_layer_the_value_arises(name: str) -> None:
    encoder = ClipEncoder(poisoned("tiny", "float32", float("nan"), name))
    [row] = encoder(decoded_row(3, clip_spec(SMALL), 1)).to_pylist()
    assert row["rejection"]["reason"] == "not_finite"


def test_a_stream_names_the_clip_too() -> None:
    encoder = ClipEncoder(poisoned("tiny", "float32", float("nan"), continuous=True))
    [row] = encoder(decoded_row(3, clip_spec(SMALL, continuous=True), 2)).to_pylist()
    assert row["rejection"]["detail"].startswith("clip 2 in float32: ")


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("overflowing", [{0}, {4}, {8}, {1, 2}, {0, 3, 8}])
def test_only_the_span_of_a_clip_that_overflows_is_rejected(overflowing: set[int], batch_size: int) -> None:
    rows = pa.concat_tables([decoded_row(number, clip_spec(SMALL), 3) for number in (5, 6, 7)])
    expected = ClipEncoder(encoder_spec(batch_size))(rows).to_pylist()
    clips = [clip for row in rows["clips"].to_pylist() for clip in row]
    encoder = ClipEncoder(encoder_spec(batch_size))
    frames = [np.ravel(clip) for row in clip_frames(rows, encoder_spec(1).num_frames) for clip in row]

    def encode(original: Any, x_BCTHW: Tensor, **named: Any) -> Any:
        encoded = original(x_BCTHW, **named)
        shown = ((x_BCTHW.movedim(1, -1) + 1) * 127.5).round().to(torch.uint8).flatten(1).numpy()
        broken = [any((frames[at] == one).all() for at in overflowing) for one in shown]
        return replace(encoded, is_finite=~torch.tensor(broken))

    with_model(encoder, encode=encode)
    for number, (row, whole) in enumerate(zip(encoder(rows).to_pylist(), expected, strict=True)):
        broken = [clip for clip in sorted(overflowing) if clip // 3 == number]
        if broken:
            assert row["clips"] == row["tokens"] == []
            assert f"clip {clips[broken[0]]['clip_index']} " in row["rejection"]["detail"]
        else:
            assert (row["tokens"], row["rejection"]) == (whole["tokens"], None)


def encode_at_most(most: dict[str, int], message: str) -> Any:
    def encode(original: Any, x_BCTHW: Tensor, **named: Any) -> Any:
        if x_BCTHW.shape[0] > most["clips"]:
            raise RuntimeError(message)
        return original(x_BCTHW, **named)

    return encode


@pytest.mark.parametrize(
    "message",
    ["CUDA out of memory. Tried to allocate 2 GiB", "GET was unable to find an engine to execute this computation"],
)
def test_a_batch_for_which_memory_runs_out_is_halved_and_tried_again_later(
    message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(batch_sizes, "PATIENCE", 3)
    rows = decoded_row(3, clip_spec(SMALL), 4)
    expected = ClipEncoder(encoder_spec(4))(rows)["tokens"]
    encoder, most = ClipEncoder(encoder_spec(4)), {"clips": 1}
    with_model(encoder, encode=encode_at_most(most, message))
    assert encoder(rows)["tokens"] == expected
    assert encoder._batch_sizes.of((SMALL, SMALL)) <= 2
    most["clips"] = 4  # the neighbor on the GPU has gone
    for _ in range(12):
        assert encoder(rows)["tokens"] == expected
    assert encoder._batch_sizes.of((SMALL, SMALL)) == 4
    assert "from now on 2 clips" in caplog.text
    assert "trying 4 clips" in caplog.text


def test_an_encoder_that_was_promised_a_gpu_never_computes_on_a_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(GpuFaultError, match=r"gone, or PyTorch cannot use it.*torch .* built"):
        ClipEncoder(replace(encoder_spec(1), device="cuda"))(decoded_row(0, clip_spec(SMALL), 1))
