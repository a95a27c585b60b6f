"""A step of training does what its formulas say, whatever it is split over; a resumed run is the same run."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.support.shared import SHARED
from tests.support.two_processes import in_two_processes
from vidshard.models.tokenizer import frames_to_input
from vidshard.models.training.discriminator import adversarial_loss
from vidshard.models.training.distributed import load_full_optimizer_state
from vidshard.models.training.evaluation import evaluate_batch, reconstruct
from vidshard.models.training.families import trainable_of
from vidshard.models.training.generator import Generator, shard_generator, start_tokenizer
from vidshard.models.training.losses import weighted_regularization
from vidshard.models.training.perceptual import Perceptual
from vidshard.models.training.state import TrainState, _adam, begin_stage
from vidshard.models.training.step import DivergedError, NonFiniteError, average_decay, learning_rate, train_step
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import checkpoint_name, load_tokenizer, weights_digest
from vidshard.schemas.training import StageConfig

pytestmark = pytest.mark.usefixtures("one_thread")

NAME_TABLES = SHARED / "reference" / "state_dict"
TINY, TINY_KL = PRESETS["tiny"], PRESETS["tiny_kl"]
TINY_VQ = TINY.model_copy(update={"name": "tiny_vq", "head": "vq", "fsq_levels": (), "vq_codebook_size": 50})
SMALL = StageConfig(
    frames=5,
    size=(32, 32),
    steps=100,
    batch_size=2,
    learning_rate=1e-3,
    ema_decay=0.999,
    perceptual_weight=0,
    gan_start=2,
    discriminator_width=4,
    precision="float32",
)


def small(**changes: object) -> StageConfig:
    return StageConfig.model_validate({**SMALL.model_dump(), **changes})


def state_of(config: StageConfig, tokenizer: str | Any = "tiny", **further: Any) -> TrainState:
    preset = PRESETS[tokenizer] if isinstance(tokenizer, str) else tokenizer
    return begin_stage(config, start_tokenizer(preset, 0), **further)


def vidtok_of(state: TrainState) -> VidTok:
    assert isinstance(state.tokenizer, VidTok)
    return state.tokenizer


def clips(count: int, seed: int = 0, frames: int = 5, size: int = 32) -> Tensor:
    """Soft blobs of color that move: uint8 (B, T, H, W, 3)."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(size) / size, torch.arange(size) / size, indexing="ij")
    t = torch.arange(frames)[:, None, None] / 16
    videos = []
    for _ in range(count):
        a, b, c, d, *colors = torch.rand(10, generator=generator).tolist()
        wave = torch.sin(6 * (a * x + b * y) + 6 * c + 4 * d * t)
        first, second = torch.tensor(colors[:3]), torch.tensor(colors[3:])
        videos.append((wave[..., None] + 1) / 2 * first + (1 - wave[..., None]) / 2 * second)
    return (torch.stack(videos) * 255).to(torch.uint8)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Equal names, and values equal up to a share of the largest of their tensor, or a hundredth of all."""
    assert ours.keys() == theirs.keys()
    largest = {name: float(value.abs().max()) for name, value in theirs.items()}
    for name, value in theirs.items():
        scale = max(largest[name], 0.01 * max(largest.values()))
        difference = float((ours[name] - value).abs().max())
        assert difference <= tolerance * scale, (name, difference, scale)


def assert_equal(ours: Any, theirs: Any, at: str = "") -> None:
    """Bitwise equal nested states."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_equal(ours[key], theirs[key], f"{at}/{key}")
    elif isinstance(theirs, Tensor):
        assert torch.equal(ours, theirs), at
    else:
        assert ours == theirs, at


# The step


def test_a_tiny_tokenizer_learns() -> None:
    config = small(learning_rate=3e-3, gan_weight=0, entropy_weight=0.01, warmup_steps=5)
    state = state_of(config)
    held_out = clips(2, seed=9)
    before = evaluate_batch(state, held_out).metrics()
    losses = [train_step(state, clips(2)) for _ in range(50)]
    with state.averaged():
        after = evaluate_batch(state, held_out).metrics()
    assert losses[-1]["nll"] < 0.5 * losses[0]["nll"]
    assert losses[-1]["l1"] < 0.5 * losses[0]["l1"]
    assert after["psnr"] > before["psnr"] + 1.5
    assert after["ssim"] > before["ssim"]
    assert 0 < after["codebook_utilization"] <= 1


@pytest.mark.parametrize("preset", [TINY, TINY_KL, TINY_VQ], ids=lambda config: config.name)
def test_the_gradients_are_those_of_the_whole_loss(preset: Any) -> None:
    config = small(gan_start=0, max_grad_norm=1e9)
    state = state_of(config, preset)
    batch = clips(2)
    reference = state_of(config, preset)
    metrics = train_step(state, batch)

    generator, discriminator = reference.bare_generator, reference.bare_discriminator
    assert discriminator is not None
    tokenizer = vidtok_of(reference)
    x = frames_to_input(batch)
    z = tokenizer.encoder_output(x)
    encoded = tokenizer.head.quantize(z)
    latents = encoded.latents
    if encoded.logvar is not None:
        from vidshard.models.training.step import _noise, _seeds

        noise = _noise(reference, x, _seeds(reference, 0)[0])["latents"]
        latents = latents + noise * encoded.logvar.mul(0.5).exp()
    fake = tokenizer.decode(latents, 5)
    l1 = (fake - x).abs()
    nll = (l1 / generator.logvar.exp() + generator.logvar).sum() / (2 * 5)
    gan = adversarial_loss(discriminator(fake)[0], "softplus")
    last = tokenizer.decoder.conv_out.conv.weight
    by_nll, by_gan = (torch.autograd.grad(term, last, retain_graph=True)[0] for term in (nll, gan))
    weight = (by_nll.norm() / (by_gan.norm() + 1e-4)).clamp(max=1e4)
    terms = tokenizer.head.regularization(z, encoded)
    (nll + 0.2 * weight.detach() * gan + weighted_regularization(terms, config, 0)).backward()
    assert metrics["l1"] == pytest.approx(l1.mean().item(), rel=1e-5)
    assert metrics["nll"] == pytest.approx(nll.item(), rel=1e-5)
    assert metrics["gan"] == pytest.approx(gan.item(), rel=1e-4)
    assert metrics["adaptive_weight"] == pytest.approx(weight.item(), rel=1e-3)
    for name, term in terms.items():
        assert metrics[name] == pytest.approx(term.item(), rel=1e-4)
    assert_same(gradients(state.bare_generator), gradients(generator))

    discriminator.zero_grad()
    real_scores, fake_scores = discriminator(x, fake.detach())
    hinge = 0.5 * (torch.relu(1 - real_scores).mean() + torch.relu(1 + fake_scores).mean())
    lecam = torch.relu(real_scores).square().mean() + torch.relu(-fake_scores).square().mean()
    (hinge + 0.005 * lecam).backward()  # type: ignore[no-untyped-call]
    assert metrics["hinge"] == pytest.approx(hinge.item(), rel=1e-4)
    assert metrics["lecam"] == pytest.approx(lecam.item(), rel=1e-4)
    assert state.bare_discriminator is not None
    assert_same(gradients(state.bare_discriminator), gradients(discriminator))
    assert state.lecam.real.item() == pytest.approx(0.001 * real_scores.mean().item(), rel=1e-3)


class Distance(nn.Module):
    """Stands for LPIPS where its weights are not to be had."""

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        return (real - fake).square().mean(dim=(1, 2, 3), keepdim=True)


def test_recomputing_layers_changes_nothing() -> None:
    states = [
        state_of(
            small(activation_checkpointing=recompute, gan_start=0, perceptual_weight=1.0),
            perceptual=Perceptual(Distance()),
        )
        for recompute in (False, True)
    ]
    kept, recomputed = (train_step(state, clips(2)) for state in states)
    assert recomputed == pytest.approx(kept, rel=1e-5)
    assert kept["perceptual"] > 0
    assert_same(gradients(states[1].bare_generator), gradients(states[0].bare_generator), 1e-5)


def test_compiling_takes_the_network_as_one_graph_and_changes_nothing() -> None:
    def traced(network: nn.Module) -> nn.Module:
        if isinstance(network, Generator):
            network.compile(backend="aot_eager", fullgraph=True)  # what follows is the compiler's
        return network

    expected, compiled = state_of(small(gan_start=1)), state_of(small(gan_start=1), wrap=traced)
    for seed in range(2):
        batch = clips(2, seed=seed)
        assert train_step(compiled, batch) == pytest.approx(train_step(expected, batch), rel=1e-4)
    assert_same(gradients(compiled.bare_generator), gradients(expected.bare_generator))


def test_a_batch_in_pieces_is_the_batch() -> None:
    # What is no mean over clips is left out: entropy over a codebook, the adaptive weight, batch norm.
    config = small(entropy_weight=0, gan_weight=0, batch_size=4)
    whole = state_of(config)
    in_pieces = state_of(small(entropy_weight=0, gan_weight=0, batch_size=4, gradient_accumulation=2))
    expected, metrics = train_step(whole, clips(4)), train_step(in_pieces, clips(4))
    for name in ("nll", "l1", "commitment", "grad_norm_generator"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4)
    assert_same(gradients(in_pieces.bare_generator), gradients(whole.bare_generator))
    with pytest.raises(ValueError, match="multiple of gradient_accumulation, 2, got 3 clips"):
        train_step(in_pieces, clips(3))


def test_pieces_work_with_the_discriminator_too() -> None:
    state = state_of(small(batch_size=4, gradient_accumulation=2, gan_start=0))
    metrics = train_step(state, clips(4))
    assert {"hinge", "lecam", "adaptive_weight", "grad_norm_discriminator"} <= {*metrics}
    assert state.lecam.real.item() == pytest.approx(0.001 * metrics["score_real"], rel=1e-3)


@pytest.mark.parametrize("discriminator", ["2d", "3d"])
@pytest.mark.parametrize("tokenizer", ["tiny", "tiny_kl"])
def test_bfloat16_steps_are_near_those_of_float32(tokenizer: str, discriminator: str) -> None:
    metrics = {}
    for precision in ("float32", "bfloat16"):
        state = state_of(small(precision=precision, gan_start=0, discriminator=discriminator), tokenizer)
        metrics[precision] = train_step(state, clips(2))
        assert all(p.dtype is torch.float32 for p in state.bare_generator.parameters())
    for name in ("nll", "l1", "gan", "hinge"):
        assert metrics["bfloat16"][name] == pytest.approx(metrics["float32"][name], rel=0.05)


def test_the_discriminator_begins_at_its_batch_and_costs_nothing_before() -> None:
    state = state_of(small(gan_start=2, warmup_steps=4))
    assert state.bare_discriminator is not None
    before = {name: value.clone() for name, value in state.bare_discriminator.state_dict().items()}
    metrics = [train_step(state, clips(2)) for _ in range(2)]
    assert not any("hinge" in step or "adaptive_weight" in step for step in metrics)
    assert_equal(dict(state.bare_discriminator.state_dict()), before)
    third = train_step(state, clips(2))
    assert {"hinge", "adaptive_weight", "gan", "lecam", "score_real", "score_fake"} <= {*third}
    # its own warm-up begins with it
    assert third["learning_rate_discriminator"] == pytest.approx(1e-3 / 4)
    assert third["learning_rate"] == pytest.approx(3e-3 / 4)
    assert not torch.equal(state.bare_discriminator.state_dict()["main.0.weight"], before["main.0.weight"])


def test_without_weight_there_is_no_discriminator() -> None:
    assert state_of(small(gan_weight=0)).discriminator is None
    assert state_of(small(gan_start=100)).discriminator is None


def test_gradients_are_cut_to_the_norm() -> None:
    state = state_of(small(gan_weight=0, max_grad_norm=0.5))
    metrics = train_step(state, clips(2))
    total = math.sqrt(sum(float(g.square().sum()) for g in gradients(state.bare_generator).values()))
    assert metrics["grad_norm_generator"] > 1
    assert total == pytest.approx(0.5, rel=1e-3)


def test_rates_rise_and_fall_as_said() -> None:
    config = small(warmup_steps=10, schedule="cosine", final_rate_share=0.1, steps=110, gan_start=50)
    rates = [learning_rate(config, step) for step in range(110)]
    assert rates[:3] == pytest.approx([1e-4, 2e-4, 3e-4])
    assert rates[9] == rates[10] == 1e-3
    assert rates[60] == pytest.approx(1e-3 * (0.1 + 0.9 * 0.5))
    assert learning_rate(config, 110) == pytest.approx(1e-4)
    assert learning_rate(config, 50, discriminator=True) == pytest.approx(learning_rate(config, 50) / 10)
    assert learning_rate(small(), 0) == learning_rate(small(), 99) == 1e-3
    slow = small(discriminator_learning_rate=1e-5)
    assert learning_rate(slow, 7, discriminator=True) == 1e-5


def test_an_optimizer_is_fused_on_gpus_alone_whatever_device_stored_its_state() -> None:
    state = state_of(SMALL)
    optimizer = state.generator_optimizer
    assert [group["fused"] for group in optimizer.param_groups] == [None]
    stored = optimizer.state_dict()
    stored["param_groups"][0]["fused"] = True  # as a GPU stores it
    load_full_optimizer_state(optimizer, stored)
    assert [group["fused"] for group in optimizer.param_groups] == [None]
    with torch.device("meta"):
        parameter = torch.nn.Parameter(torch.empty(2))
    assert _adam([parameter], SMALL).param_groups[0]["fused"] is None


def test_averages_follow_the_weights_quickly_at_first() -> None:
    assert average_decay(SMALL, 0) == pytest.approx(2 / 11)
    assert average_decay(SMALL, 100_000) == 0.999
    state = state_of(SMALL)
    name = "decoder.conv_out.conv.weight"
    weight = dict(state.tokenizer.named_parameters())[name]
    expected = weight.detach().clone()
    for step in range(3):
        train_step(state, clips(2))
        decay = (2 + step) / (11 + step)
        expected = decay * expected + (1 - decay) * weight.detach()
    torch.testing.assert_close(state.averages[name], expected)
    last = weight.detach().clone()
    with state.averaged():
        torch.testing.assert_close(weight.detach(), expected)
    assert torch.equal(weight.detach(), last)
    assert torch.equal(state.weights(averaged=True)[name], state.averages[name])
    assert torch.equal(state.weights(averaged=False)[name], last)
    assert not state_of(small(ema_decay=0)).averages


# What must not happen


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        ("decoder.conv_out.conv.weight", r"nll is nan, l1 is nan"),
        ("encoder.conv_in.conv.bias", r"token_entropy is nan, codebook_entropy is nan, commitment is nan"),
        ("logvar", r"nll is inf"),
        ("discriminator", r"step 0: gan is nan, adaptive_weight is nan"),
    ],
)
def test_a_loss_that_is_no_number_is_named_and_nothing_is_changed(spoil: str, named: str) -> None:
    state = state_of(small(gan_start=0))
    if spoil == "discriminator":
        assert state.bare_discriminator is not None
        spoiled, value = state.bare_discriminator.get_parameter("main.0.weight"), math.nan
    elif spoil == "logvar":
        spoiled, value = state.bare_generator.logvar, -200.0
    else:
        spoiled, value = state.tokenizer.get_parameter(spoil), math.nan
    with torch.no_grad():
        spoiled.fill_(value)
    before = state.state_dict()
    with pytest.raises(NonFiniteError, match=named):
        train_step(state, clips(2))
    after = state.state_dict()
    for kept in ("generator", "averages", "lecam", "generator_optimizer", "discriminator_optimizer", "step"):
        torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=0, equal_nan=True)


def test_batches_that_are_not_finite_are_skipped_up_to_a_number_in_a_row_and_leave_nothing() -> None:
    state = state_of(small(gan_start=0, max_skipped_batches=2))
    train_step(state, clips(2))
    bias = state.tokenizer.get_parameter("decoder.conv_out.conv.bias")
    good = bias.detach().clone()

    def skipped() -> bool:
        with torch.no_grad():
            bias.fill_(math.nan)
        before, buffers = state.state_dict(), [b.clone() for b in state.bare_discriminator.buffers()]  # type: ignore[union-attr]
        metrics = train_step(state, clips(2))
        after = state.state_dict()
        for kept in ("generator", "averages", "lecam", "generator_optimizer", "discriminator_optimizer"):
            torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=0, equal_nan=True)
        for now, then in zip(state.bare_discriminator.buffers(), buffers, strict=True):  # type: ignore[union-attr]
            torch.testing.assert_close(now, then, rtol=0, atol=0)
        assert after["step"] == before["step"] + 1
        return metrics == {"skipped_batches": 1.0}

    assert skipped()
    assert skipped()
    with pytest.raises(NonFiniteError):
        train_step(state, clips(2))
    with torch.no_grad():
        bias.copy_(good)
    assert math.isfinite(train_step(state, clips(2))["l1"])
    assert skipped()  # the count begins anew after a good one


def test_training_that_is_worse_than_gray_stops() -> None:
    state = state_of(small(divergence_after=1, gan_weight=0))
    with torch.no_grad():
        vidtok_of(state).decoder.conv_out.conv.bias.fill_(5.0)  # type: ignore[union-attr]
    train_step(state, clips(2))
    with pytest.raises(DivergedError, match=r"step 1: l1 has been 4\.\d+ on average, worse than gray"):
        train_step(state, clips(2))
    assert state.step == 1


@pytest.mark.parametrize(
    ("changes", "tokenizer", "message"),
    [
        ({"frames": 6}, "tiny", "num_frames must be 1 \\+ a multiple of 4"),
        ({"size": (36, 32)}, "tiny", "height must be divisible by 8, got 36"),
        ({"size": (16, 32)}, "tiny", "2d discriminator needs frames of at least 24 x 24"),
        ({"perceptual_weight": 1}, "tiny", "LPIPS is missing"),
    ],
)
def test_a_stage_that_cannot_be_is_refused(changes: dict[str, object], tokenizer: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        state_of(small(**changes), tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l1_weight": 0}, "nothing would hold the reconstruction"),
        ({"batch_size": 3, "gradient_accumulation": 2}, "multiple of gradient_accumulation"),
        ({"warmup_steps": 100}, "warmup_steps must be below steps"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas"),
        ({"leraning_rate": 1}, "Extra inputs"),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_the_defaults_are_the_first_stage_of_the_paper() -> None:
    config = StageConfig()
    assert (config.frames, config.size, config.steps, config.batch_size) == (17, (128, 128), 50_000, 16)
    assert config.fps == Fraction(3)
    assert (config.learning_rate, config.max_grad_norm, config.gan_weight, config.gan_start) == (1e-5, 20, 0.2, 10_000)
    again = StageConfig.model_validate_json(config.model_dump_json())
    assert again == config


def test_training_keeps_float32_weights() -> None:
    tokenizer = load_tokenizer(TINY, None, seed=0, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"float32, got torch\.bfloat16"):
        begin_stage(SMALL, tokenizer)


# Stages


@pytest.mark.parametrize("tokenizer", [TINY, TINY_KL, TINY_VQ], ids=lambda config: config.name)
def test_stage_2_leaves_encoder_and_head_as_they_are(tokenizer: Any) -> None:
    first = state_of(SMALL, tokenizer)
    for _ in range(3):
        train_step(first, clips(2))
    stage2 = small(trainable="decoder", size=(48, 48), gan_start=1)
    second = begin_stage(stage2, start_tokenizer(tokenizer, 5), previous=first.state_dict())
    averages = first.weights(averaged=True)
    assert weights_digest(second.tokenizer.state_dict()) == weights_digest(averages)
    latents = vidtok_of(second).encode(frames_to_input(clips(1))).latents.detach()
    frozen = second.frozen_digest()
    metrics = [train_step(second, clips(2, size=48)) for _ in range(3)]
    assert second.frozen_digest() == frozen != first.frozen_digest()
    assert not any("commitment" in step or "kl" in step for step in metrics)
    for weights in (second.weights(averaged=False), second.weights(averaged=True)):
        changed = {name for name in weights if not torch.equal(weights[name], averages[name])}
        assert changed
        assert all(name.startswith("decoder.") for name in changed)
    assert all(name.startswith("decoder.") for name in second.averages)
    assert torch.equal(vidtok_of(second).encode(frames_to_input(clips(1))).latents, latents)
    assert second.generator_optimizer.state_dict()["state"].keys() == {
        *range(len(list(vidtok_of(second).decoder.parameters())) + 1)
    }


def test_a_stage_goes_on_with_the_discriminator_and_scale_of_the_one_before() -> None:
    first = state_of(small(gan_start=0))
    for _ in range(2):
        train_step(first, clips(2))
    second = begin_stage(
        small(trainable="decoder"), start_tokenizer(TINY, 5), previous=first.state_dict(), averaged=False
    )
    assert second.step == 0
    assert not second.generator_optimizer.state_dict()["state"]
    assert first.bare_discriminator is not None
    assert second.bare_discriminator is not None
    assert_equal(dict(second.bare_discriminator.state_dict()), dict(first.bare_discriminator.state_dict()))
    assert_equal(dict(second.lecam.state_dict()), dict(first.lecam.state_dict()))
    assert torch.equal(second.bare_generator.logvar, first.bare_generator.logvar)
    assert weights_digest(second.tokenizer.state_dict()) == weights_digest(first.tokenizer.state_dict())
    other = begin_stage(small(discriminator="3d"), start_tokenizer(TINY, 5), previous=first.state_dict())
    assert other.lecam.real.item() == 0


def test_a_stage_refuses_another_architecture() -> None:
    first = state_of(SMALL, "tiny").state_dict()
    v1_1 = TINY.model_copy(update={"name": "tiny_v1_1", "variant": "causal-v1.1"})
    with pytest.raises(
        ValueError, match=r"is tiny, not tiny_v1_1 \(variant: 'causal-v1\.0' there, 'causal-v1\.1' now\)"
    ):
        begin_stage(SMALL, start_tokenizer(v1_1, 0), previous=first)
    with pytest.raises(ValueError, match=r"is tiny, not tiny_kl \(.*head: 'fsq' there, 'kl' now"):
        begin_stage(SMALL, start_tokenizer(TINY_KL, 0), previous=first)


def trained_names(tokenizer: VidTok, stage: str) -> tuple[set[str], set[str]]:
    trainable_of(tokenizer, stage)
    named = [(checkpoint_name(n, tokenizer.config), p.requires_grad) for n, p in tokenizer.named_parameters()]
    return {n for n, learns in named if learns}, {n for n, learns in named if not learns}


@pytest.mark.parametrize("tokenizer", [TINY, TINY_KL, TINY_VQ], ids=lambda config: config.name)
def test_each_stage_trains_what_it_says(tokenizer: Any) -> None:
    model = start_tokenizer(tokenizer, 0).requires_grad_(False)
    learning, frozen = trained_names(model, "all")
    assert not frozen
    everything = learning
    learning, frozen = trained_names(model, "decoder")
    assert learning == {name for name in everything if name.startswith("decoder.")}
    assert frozen == {name for name in everything if name.startswith(("encoder.", "head."))}
    assert len(learning) > 40


@pytest.mark.shared
@pytest.mark.skipif(not NAME_TABLES.is_dir(), reason=f"tables of released names are not at {NAME_TABLES}")
@pytest.mark.parametrize("path", sorted(NAME_TABLES.glob("vidtok_*.json")), ids=lambda path: path.stem)
def test_each_stage_trains_the_released_names(path: Path) -> None:
    names = {name for name in json.loads(path.read_text()) if not name.startswith("loss.")}
    with torch.device("meta"):
        model = VidTok(PRESETS[path.stem.removeprefix("vidtok_")])
    assert trained_names(model, "all") == (names, set())
    decoder = {name for name in names if name.startswith("decoder.")}
    assert trained_names(model, "decoder") == (decoder, names - decoder)


# Resume


@pytest.mark.parametrize(
    ("tokenizer", "changes"),
    [
        ("tiny", {"warmup_steps": 3, "schedule": "cosine"}),
        ("tiny_kl", {"precision": "bfloat16"}),
        (
            "tiny",
            {
                "trainable": "decoder",
                "gradient_accumulation": 2,
                "activation_checkpointing": True,
                "discriminator": "3d",
            },
        ),
    ],
    ids=["fsq", "kl, bfloat16", "decoder"],
)
@pytest.mark.parametrize("stop", [1, 3], ids=["before the discriminator", "with it"])
def test_a_resumed_run_is_the_same_run_bit_by_bit(tokenizer: str, changes: dict[str, object], stop: int) -> None:
    config = small(**changes)
    whole = state_of(config, tokenizer)
    curve = [train_step(whole, clips(2, seed=step)) for step in range(5)]

    interrupted = state_of(config, tokenizer)
    for step in range(stop):
        assert train_step(interrupted, clips(2, seed=step)) == curve[step]
    file = io.BytesIO()
    torch.save(interrupted.state_dict(), file)
    torch.rand(7)
    resumed = begin_stage(config, start_tokenizer(PRESETS[tokenizer], 77))
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert [train_step(resumed, clips(2, seed=step)) for step in range(stop, 5)] == curve[stop:]
    ours, theirs = resumed.state_dict(), whole.state_dict()
    ours.pop("rng"), theirs.pop("rng")
    assert_equal(ours, theirs)


def test_a_state_is_a_snapshot() -> None:
    state = state_of(small(gan_start=0))
    train_step(state, clips(2))
    kept = state.state_dict()
    weight = kept["generator"]["tokenizer.decoder.conv_in.conv.weight"].clone()
    moment = kept["generator_optimizer"]["state"][0]["exp_avg"].clone()
    other = state_of(small(gan_start=0))
    other.load_state_dict(kept)
    train_step(state, clips(2))
    train_step(other, clips(2))
    assert torch.equal(kept["generator"]["tokenizer.decoder.conv_in.conv.weight"], weight)
    assert torch.equal(kept["generator_optimizer"]["state"][0]["exp_avg"], moment)


def test_random_numbers_go_on_too() -> None:
    state = state_of(SMALL)
    kept = state.state_dict()
    drawn = torch.rand(3)
    state.load_state_dict(kept)
    assert torch.equal(torch.rand(3), drawn)


def test_a_state_of_another_run_is_refused() -> None:
    kept = state_of(SMALL).state_dict()
    with pytest.raises(ValueError, match=r"of tiny, not tiny_kl"):
        state_of(SMALL, "tiny_kl").load_state_dict(kept)
    with pytest.raises(ValueError, match=r"another stage of training \(size: '32x32' there, '48x48' now\)"):
        state_of(small(size=(48, 48))).load_state_dict(kept)
    state_of(small(steps=200)).load_state_dict(kept)
    with pytest.raises(ValueError, match="format 1 is needed, got None"):
        state_of(SMALL).load_state_dict({"state_dict": {}})


# Evaluation


def test_evaluations_add_up_and_change_nothing() -> None:
    state = state_of(small(gan_start=0))
    train_step(state, clips(2))
    before = state.state_dict()
    whole = evaluate_batch(state, clips(4, seed=3))
    parts = [evaluate_batch(state, part) for part in torch.split(clips(4, seed=3), 1)]
    added = parts[0] + parts[1] + parts[2] + parts[3]
    assert added.num_frames == whole.num_frames == 20
    assert added.metrics() == pytest.approx(whole.metrics(), rel=1e-5)
    assert whole.use is not None
    assert whole.use.num_tokens == 4 * 2 * 4 * 4
    assert_equal(state.state_dict(), before)


def test_kl_is_evaluated_by_its_mean_and_has_no_codebook() -> None:
    state = state_of(SMALL, "tiny_kl")
    first, second = (evaluate_batch(state, clips(2)).metrics() for _ in range(2))
    assert first == second
    assert set(first) == {"psnr", "l1", "ssim"}
    made = reconstruct(state, clips(2))
    assert made.tokens is None
    assert not made.parts
    tokenizer = load_tokenizer(TINY_KL, None, seed=0)
    tokenizer.load_state_dict(state.weights(averaged=False))
    expected = tokenizer.decode(tokenizer.encode(made.clips).latents, 5)
    torch.testing.assert_close(made.video, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", ["causal-v1.1", "non-causal"])
def test_other_variants_train(variant: str) -> None:
    config = TINY.model_copy(update={"name": "tiny_other", "variant": variant})
    frames = 6 if variant == "causal-v1.1" else 8
    state = state_of(small(frames=frames, gan_start=0), config)
    train_step(state, clips(1, frames=frames))
    made = reconstruct(state, clips(1, frames=frames))
    assert made.video.shape == made.clips.shape
    encoded = vidtok_of(state).encode(made.clips)
    expected = vidtok_of(state).decode(encoded.latents, frames)
    torch.testing.assert_close(made.video, expected, atol=1e-5, rtol=1e-4)


# Several workers


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": DistributedDataParallel, "fsdp2": shard_generator}
TWO_WORKERS = small(gan_weight=0, max_grad_norm=1e9)
WITH_DISCRIMINATOR = small(gan_start=1, gradient_accumulation=2, batch_size=4)


def both_wrappings(rank: int, folder: str) -> None:
    for name, wrap in WRAPS.items():
        state = state_of(TWO_WORKERS, wrap=wrap)
        metrics = train_step(state, clips(2)[rank : rank + 1])
        grads = {n: p.grad for n, p in state.bare_generator.named_parameters()}
        whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items() if g is not None}
        # and on through a checkpoint, with a discriminator and in pieces
        state = state_of(WITH_DISCRIMINATOR, wrap=wrap)
        batches = [clips(4, seed=step)[2 * rank : 2 * rank + 2] for step in range(2)]
        curve = [train_step(state, batches[0])]
        kept = state.state_dict()
        curve += [train_step(state, batch) for batch in batches[1:]]
        again = begin_stage(WITH_DISCRIMINATOR, start_tokenizer(TINY, 9), wrap=wrap)
        again.load_state_dict(kept)
        for _ in range(2):  # looking on changes nothing
            with again.averaged():
                measured = evaluate_batch(again, clips(1)).metrics()
        resumed = [train_step(again, batch) for batch in batches[1:]]
        exported = again.weights(averaged=True)
        # one worker alone with a loss that is no number stops both
        with torch.no_grad():
            again.average_l1 = 0.0
        told = ""
        try:
            train_step(again, spoiled(again, batches[0], rank))
        except NonFiniteError as error:
            told = str(error)
        result = {"metrics": metrics, "curve": curve, "resumed": resumed, "measured": measured, "told": told}
        result |= {"gradients": whole, "weights": kept["generator"], "exported": exported}
        torch.save(result, f"{folder}/{name}{rank}.pt")


def spoiled(state: TrainState, batch: Tensor, rank: int) -> Tensor:
    """The batch; on worker 1 alone LPIPS is no number."""
    state.perceptual = Perceptual(Spoilt() if rank == 1 else Distance())
    return batch


class Spoilt(nn.Module):
    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        return fake.mean(dim=(1, 2, 3), keepdim=True) * math.nan


def test_two_workers_are_one_with_all_clips(tmp_path: Path) -> None:
    alone = state_of(TWO_WORKERS)
    expected = train_step(alone, clips(2))
    in_two_processes(both_wrappings, tmp_path)
    measured, exported = {}, {}
    for wrapping in WRAPS:
        results = [torch.load(tmp_path / f"{wrapping}{rank}.pt", weights_only=True) for rank in (0, 1)]
        for result in results:
            # the codebook's entropy too, which is no mean over clips
            assert result["metrics"] == pytest.approx(expected, rel=1e-4)
            assert_same(result["gradients"], gradients(alone.bare_generator))
            for resumed, step in zip(result["resumed"], result["curve"][1:], strict=True):
                assert resumed == pytest.approx(step, rel=1e-4)
            assert "adaptive_weight" in result["curve"][1]
            assert result["weights"].keys() == alone.bare_generator.state_dict().keys()
            assert "perceptual is nan" in result["told"]
        assert results[0]["curve"] == results[1]["curve"]
        assert_equal(results[0]["weights"], results[1]["weights"])
        measured[wrapping] = results[0]["measured"]
        exported[wrapping] = results[0]["exported"]
    assert measured["fsdp2"] == pytest.approx(measured["ddp"], rel=1e-3)
    assert_same(exported["fsdp2"], exported["ddp"])
