"""Compares the layers of the GPU path, run by Triton's interpreter, with those of the CPU path.

Started by `tests/models/vidtok/test_fused.py` in a process of its own, as Triton reads ``TRITON_INTERPRET`` when it is
imported. Takes the names of the checks, and prints the largest difference of each comparison.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vidshard.models.tokenizer import get_preset
from vidshard.models.vidtok import fused, fused_convolution
from vidshard.models.vidtok.layers import (
    TIME_RULES,
    ChannelNorm,
    FrameAttention,
    Normed,
    SpatialUnit,
    Sum,
    TimeUnit,
    in_two_kernels,
)
from vidshard.models.vidtok.model import VidTok
from vidshard.models.vidtok.resampling import LinearTimeUp, RepeatedTimeUp, SpaceDown, SpaceUp
from vidshard.models.weights import load_tokenizer

DTYPES = (torch.float32, torch.float16)
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-2}
"""Largest difference allowed, of values around one, in a single layer."""


@contextmanager
def kernels() -> Iterator[None]:
    """Take the path of a GPU on this CPU."""
    originals = fused.is_used, fused_convolution.is_half
    fused.is_used = lambda *_: True
    fused_convolution.is_half = lambda *_: True
    try:
        yield
    finally:
        fused.is_used, fused_convolution.is_half = originals


def compare(name: str, dtype: torch.dtype, run: Callable[[], list[Tensor]], factor: float = 1.0) -> None:
    """Run with and without the kernels, and compare shapes, dtypes and values."""
    expected = run()
    with kernels():
        found = run()
    assert len(expected) == len(found)
    worst = 0.0
    for one, other in zip(expected, found, strict=True):
        assert one.shape == other.shape, (name, one.shape, other.shape)
        assert one.dtype == other.dtype, name
        if one.numel():
            worst = max(worst, float((one.float() - other.float()).abs().max()))
    assert worst <= factor * LIMITS[dtype], (name, dtype, worst)
    print(f"{name} {dtype}: {worst:.2g}", flush=True)


def prepared(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give a module seeded weights of a trained size."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        scale = 1.0 if parameter.ndim < 2 else (parameter[0].numel()) ** -0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return module.to(dtype).requires_grad_(False)


def norms() -> None:
    """Norm, SiLU and context on ragged shapes, with and without a past."""
    shapes = [(1, 1, 1, 1, 4), (3, 5, 3, 7, 16), (1, 3, 4, 4, 128), (5, 2, 1, 9, 40)]
    rules = ("causal-v1.0", "causal-v1.1")
    for shape, dtype, rule, with_past in itertools.product(shapes, DTYPES, rules, (False, True)):
        norm = prepared(ChannelNorm(shape[-1]), dtype)
        assert isinstance(norm, ChannelNorm)
        x = (3 * torch.randn(shape) + 1).to(dtype)
        past = (torch.randn(shape[0], 2, *shape[2:]).to(dtype),) if with_past else ()

        def run(norm=norm, x=x, past=past, rule=rule) -> list[Tensor]:  # type: ignore[no-untyped-def]
            joined, kept = norm.in_context(x, past, TIME_RULES[rule])
            return [joined, *kept, norm(x), norm(x, silu=True)]

        compare(f"norm {shape} {rule} past={with_past}", dtype, run)


def sums() -> None:
    """Each layer that takes a sum, and each that leaves one."""
    rule = TIME_RULES["causal-v1.0"]
    for dtype, (B, T, H, W, C) in itertools.product(DTYPES, [(3, 4, 6, 2, 16), (1, 2, 2, 4, 24)]):
        for name, layer in {
            "spatial unit": SpatialUnit(C, C),
            "spatial unit that widens": SpatialUnit(C, C + 8),
            "unit over time": TimeUnit(C, (3,), rule),
            "volume": TimeUnit(C, (3, 3, 3), rule),
            "volume that widens": TimeUnit(C, (3, 3, 3), rule, out_channels=C + 8),
            "volume that looks ahead": TimeUnit(C, (3, 3, 3), TIME_RULES["non-causal"]),
            "attention": FrameAttention(C),
            "halved": SpaceDown(C),
        }.items():
            prepared(layer, dtype)
            h, x = (torch.randn(B, T, H, W, C).to(dtype) for _ in range(2))

            def run(layer=layer, h=h, x=x) -> list[Tensor]:  # type: ignore[no-untyped-def]
                is_on = fused.is_used(x, x)
                y, kept = layer(Sum(h.clone(), x) if is_on else h + x)
                outputs = [y, *kept]
                if is_on and not isinstance(layer, SpaceDown):
                    left, _ = layer(Sum(h.clone(), x), defer_sum=True)
                    assert isinstance(left, Sum)
                    outputs[0] = left.total()
                return outputs

            compare(f"{name} {(B, T, H, W, C)}", dtype, run)


def convolutions() -> None:
    """Units whose convolutions compute the norms after them, on ragged shapes and odd batches, by every rule."""
    units: list[tuple[str, SpatialUnit | TimeUnit]] = [
        ("spatial unit", SpatialUnit(16, 16)),
        ("spatial unit that widens", SpatialUnit(16, 32)),
        *((f"unit over time, {variant}", TimeUnit(16, (3,), rule)) for variant, rule in TIME_RULES.items()),
        ("volume that widens", TimeUnit(16, (3, 3, 3), TIME_RULES["causal-v1.1"], out_channels=32)),
    ]
    cases = [(torch.float32, (3, 1, 3, 18)), (torch.float32, (1, 3, 17, 2)), (torch.float16, (1, 3, 2, 5))]
    for (dtype, (B, T, H, W)), (name, unit) in itertools.product(cases, units):
        prepared(unit, dtype)
        norm = prepared(ChannelNorm(unit.norm2.norm.weight.numel()), dtype)
        assert isinstance(norm, ChannelNorm)
        x = torch.randn(B, T, H, W, 16).to(dtype)

        def run(unit=unit, norm=norm, x=x) -> list[Tensor]:  # type: ignore[no-untyped-def]
            if fused.is_used(x, x):
                alone, result = in_two_kernels(unit, x, None), in_two_kernels(unit, x, norm)
                assert isinstance(alone, Tensor)
                assert isinstance(result, Normed)
                return [alone, *result]
            total, _ = unit(x)
            return [total, total, norm(total, silu=True)]

        compare(f"{name} {(B, T, H, W)}", dtype, run, factor=3)


def resampling() -> None:
    """Doubling in space and time, with a past and without; taps at the ends of a video."""
    torch.manual_seed(1)
    for dtype, (B, T, H, W, C) in itertools.product(DTYPES, [(3, 3, 2, 4, 16), (1, 1, 3, 1, 8)]):
        x = torch.randn(B, T, H, W, C).to(dtype)
        layers = {
            "doubled in space": SpaceUp(C),
            "repeated": RepeatedTimeUp(C, TIME_RULES["causal-v1.0"]),
            "repeated, not causal": RepeatedTimeUp(C, TIME_RULES["non-causal"]),
            "interpolated": LinearTimeUp(C, TIME_RULES["causal-v1.1"], 1),
            "without blend": RepeatedTimeUp(C, TIME_RULES["causal-v1.0"], blend=False),
        }
        for name, layer in layers.items():
            prepared(layer, dtype)

            def run(layer=layer, x=x) -> list[Tensor]:  # type: ignore[no-untyped-def]
                first, past = layer(x)
                second, past = layer(x.flip(1), past)
                return [first, second, *past]

            compare(f"{name} {(B, T, H, W, C)}", dtype, run)


def models() -> None:
    """Whole networks: clips of an odd batch, and streams with a past."""
    for name, dtype in [
        ("tiny", torch.float32),
        ("tiny", torch.float16),
        ("v1.1", torch.float32),
        ("non", torch.float32),
        ("wide", torch.float32),
        ("bands and shortcuts", torch.float32),
    ]:
        config = get_preset("tiny")
        if name == "v1.1":
            config = config.model_copy(update={"variant": "causal-v1.1"})
        elif name == "non":
            config = config.model_copy(update={"variant": "non-causal"})
        elif name == "wide":
            config = config.model_copy(update={"base_width": 16})
        elif name == "bands and shortcuts":
            config = config.model_copy(update={"base_width": 16, "haar_bands": True, "shortcuts": True})
        model = load_tokenizer(config, None, seed=0, dtype=dtype)
        assert isinstance(model, VidTok)
        model.encoder.fuses_convolutions = model.decoder.fuses_convolutions = name in ("wide", "bands and shortcuts")
        side, first, more = config.space_stride * 2, 1 if config.is_causal else 0, config.time_stride
        x = (2 * torch.rand(3, 3, first + 2 * more, side, 2 * side) - 1).to(dtype)

        def run(model=model, x=x, first=first, more=more) -> list[Tensor]:  # type: ignore[no-untyped-def]
            z = model.encoder_output(x)
            latents = z[:, : model.config.latent_channels].tanh()
            outputs = [z, model.decode(latents)]
            if model.config.is_causal:
                past: tuple[tuple[Tensor, ...], ...] = ()
                for start, end in ((0, first), (first, first + more), (first + more, first + 2 * more)):
                    z, past = model._encode(x[:, :, start:end], past, keep_past=True)
                    outputs.append(z)
                past = ()
                for number in range(latents.shape[2]):
                    frames, past = model.decode_stream(latents[:, :, number : number + 1], past, last=number == 2)
                    outputs.append(frames)
            return outputs

        compare(f"model {name}", dtype, run, factor=20)


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.inference_mode():
        for check in (norms, sums, convolutions, resampling, models):
            if check.__name__ in sys.argv[1:]:
                check()
    print("equal")
