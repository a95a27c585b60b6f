"""Losses of training agree with their formulas, by hand and against autograd."""

from __future__ import annotations

import copy
import json
import math
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.support.shared import SHARED
from vidshard.models.training.discriminator import (
    Discriminator,
    LeCam,
    adaptive_weight,
    adversarial_loss,
    hinge_loss,
    last_layer_gradient,
    scores_for_generator,
)
from vidshard.models.training.losses import frames_of, reconstruction_loss, weighted_regularization
from vidshard.models.training.perceptual import Perceptual, load_perceptual
from vidshard.models.vidtok.heads import FSQ
from vidshard.models.vidtok.layers import TIME_RULES, TimeConv
from vidshard.schemas.training import StageConfig

pytestmark = pytest.mark.usefixtures("one_thread")

NAME_TABLES = SHARED / "reference" / "state_dict"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The reconstruction


def test_a_frame_costs_its_differences_on_the_learned_scale() -> None:
    real = torch.zeros(2, 3, 2, 2)
    fake = torch.stack([torch.full((3, 2, 2), 0.5), torch.full((3, 2, 2), -0.25)])
    logvar = torch.tensor(0.3, requires_grad=True)
    lpips = torch.tensor([0.2, 0.4])
    nll, l1, perceptual = reconstruction_loss(real, fake, lpips, logvar, l1_weight=2.0, perceptual_weight=0.5)
    assert l1.item() == pytest.approx(0.375)
    assert perceptual is not None
    assert perceptual.item() == pytest.approx(0.3)
    # by pixels: 12 values a frame, each with its own L1 and its frame's LPIPS
    pixels = (2.0 * (fake - real).abs() + 0.5 * lpips[:, None, None, None]) / math.exp(0.3) + 0.3
    assert nll.item() == pytest.approx(pixels.sum().item() / 2)
    (slope,) = torch.autograd.grad(nll, logvar)
    assert slope.item() == pytest.approx(12 * (1 - (2 * 0.375 + 0.5 * 0.3) / math.exp(0.3)))


def test_the_learned_scale_settles_where_it_is_the_mean_difference() -> None:
    fake = random(2, 3, 4, 4)
    logvar = fake.abs().mean().log().requires_grad_()
    nll = reconstruction_loss(torch.zeros_like(fake), fake, None, logvar, l1_weight=1.0, perceptual_weight=1.0).nll
    (slope,) = torch.autograd.grad(nll, logvar)
    assert slope.item() == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(
    ("step", "entropy"), [(0, 0.3), (1000, 0.2), (2000, 0.1), (50_000, 0.1)], ids=["start", "half", "end", "after"]
)
def test_entropies_count_three_times_as_much_at_the_start(step: int, entropy: float) -> None:
    terms = {n: torch.tensor(v) for n, v in (("token_entropy", 2.0), ("codebook_entropy", 5.0), ("commitment", 0.8))}
    weighted = weighted_regularization(terms, StageConfig(), step)
    assert weighted.item() == pytest.approx(entropy * (2.0 - 5.0) + 0.25 * 0.8)


def test_annealing_may_be_left_out_and_other_heads_have_their_own_weights() -> None:
    config = StageConfig(entropy_anneal_steps=0, codebook_entropy_share=0.5)
    terms = {"token_entropy": torch.tensor(2.0), "codebook_entropy": torch.tensor(5.0)}
    assert weighted_regularization(terms, config, 0).item() == pytest.approx(0.1 * (2.0 - 2.5))
    assert weighted_regularization({"kl": torch.tensor(3e4)}, config, 0).item() == pytest.approx(0.03)
    vq = {"commitment": torch.tensor(0.4), "codebook": torch.tensor(0.6)}
    assert weighted_regularization(vq, config, 0).item() == pytest.approx(0.1 + 0.6)


def test_the_codebook_entropy_of_two_workers_is_that_of_one_with_both_parts() -> None:
    head = FSQ([5, 4, 3])
    parts = [(0.02 * random(1, 3, 2, 3, 3, seed=seed)).requires_grad_() for seed in (0, 1)]
    whole = torch.cat([part.detach() for part in parts]).requires_grad_()
    expected = head.regularization(whole, head.quantize(whole))["codebook_entropy"]
    (gradient,) = torch.autograd.grad(expected, whole)

    sent: list[Tensor] = []

    def send(value: Tensor) -> Tensor:
        assert not value.requires_grad
        sent.append(value)
        return value

    for part in parts:
        head.regularization(part, head.quantize(part), mean_over_workers=send)
    mean = torch.stack(sent).mean(0)
    for index, part in enumerate(parts):
        entropy = head.regularization(part, head.quantize(part), mean_over_workers=lambda _: mean)["codebook_entropy"]
        torch.testing.assert_close(entropy, expected)
        (own,) = torch.autograd.grad(entropy, part)
        # gradients are averaged over workers
        torch.testing.assert_close(own[0] / 2, gradient[index], atol=1e-5, rtol=1e-4)


# The discriminator

RELEASED_2D = {
    "0.weight": (64, 3, 4, 4),
    "0.bias": (64,),
    "2.weight": (128, 64, 4, 4),
    "5.weight": (256, 128, 4, 4),
    "8.weight": (512, 256, 4, 4),
    "11.weight": (1, 512, 4, 4),
    "11.bias": (1,),
} | {
    f"{at}.{name}": shape
    for at, width in ((3, 128), (6, 256), (9, 512))
    for name, shape in {
        "weight": (width,),
        "bias": (width,),
        "running_mean": (width,),
        "running_var": (width,),
        "num_batches_tracked": (),
    }.items()
}


def test_the_2d_discriminator_has_the_released_names_and_shapes() -> None:
    ours = {name: tuple(tensor.shape) for name, tensor in Discriminator("2d").state_dict().items()}
    assert ours == {f"main.{name}": shape for name, shape in RELEASED_2D.items()}
    assert sum(p.numel() for p in Discriminator("2d").parameters()) / 1e6 == pytest.approx(2.77, abs=0.01)


@pytest.mark.shared
@pytest.mark.skipif(not NAME_TABLES.is_dir(), reason=f"tables of released names are not at {NAME_TABLES}")
def test_the_table_of_released_names_says_the_same() -> None:
    table = json.loads((NAME_TABLES / "vidtok_fsq_causal_488_4096.json").read_text())
    prefix = "loss.discriminator.main."
    released = {n.removeprefix(prefix): tuple(shape) for n, shape in table.items() if n.startswith(prefix)}
    assert released == RELEASED_2D


@pytest.mark.parametrize(
    ("kind", "shape", "scores"),
    [
        ("2d", (2, 3, 5, 128, 128), (10, 14 * 14)),
        ("2d", (1, 3, 1, 24, 32), (1, 1 * 2)),
        ("3d", (2, 3, 5, 32, 48), (2, 2 * 4 * 6)),
        ("3d", (1, 3, 17, 32, 32), (1, 5 * 16)),
    ],
)
def test_patches_of_frames_are_scored(kind: str, shape: tuple[int, ...], scores: tuple[int, int]) -> None:
    discriminator = Discriminator("2d" if kind == "2d" else "3d", width=2)
    first, second = discriminator(random(*shape), random(*shape, seed=1))
    assert first.shape == second.shape == scores
    # the videos of one call do not share the statistics of batch norm
    torch.testing.assert_close(Discriminator.forward(discriminator, random(*shape))[0], first)


def test_the_discriminator_starts_as_released() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator("2d")
    kernels = [p for n, p in discriminator.named_parameters() if p.ndim == 4]
    assert all(kernel.std().item() == pytest.approx(0.02, rel=0.1) for kernel in kernels)
    gains = torch.cat([m.weight for m in discriminator.modules() if isinstance(m, nn.BatchNorm2d)])
    assert gains.mean().item() == pytest.approx(1.0, abs=0.01)
    assert gains.std().item() == pytest.approx(0.02, rel=0.1)


def test_scores_for_generator_give_the_video_its_gradient_and_leave_the_discriminator() -> None:
    discriminator = Discriminator("2d", width=4)
    video = random(1, 3, 2, 32, 32).requires_grad_()
    before = {name: value.clone() for name, value in discriminator.state_dict().items()}
    scores = scores_for_generator(discriminator, video)
    (gradient,) = torch.autograd.grad(scores.sum(), video)
    assert all(torch.equal(before[name], value) for name, value in discriminator.state_dict().items())
    assert all(parameter.grad is None for parameter in discriminator.parameters())
    (plain,) = discriminator(video)
    torch.testing.assert_close(scores, plain)
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.sum(), video)[0])


def test_the_tokenizer_meets_the_mean_score_of_each_frame() -> None:
    scores = torch.tensor([[1.0, 3.0], [-2.0, 0.0]])
    by_frame = [math.log1p(math.exp(-2.0)), math.log1p(math.exp(1.0))]
    assert adversarial_loss(scores, "softplus").item() == pytest.approx(sum(by_frame) / 2)
    assert adversarial_loss(scores, "hinge").item() == pytest.approx(-0.5)


def test_the_tokenizer_meets_the_mean_score_of_each_clip_of_a_3d_discriminator() -> None:
    torch.manual_seed(0)
    discriminator = Discriminator("3d", width=2).eval()
    scores = discriminator(torch.rand(2, 3, 17, 32, 32) * 2 - 1)[0] * 50
    by_clip = scores.reshape(2, -1).mean(dim=1)
    assert adversarial_loss(scores, "softplus").item() == pytest.approx(torch.log1p(torch.exp(-by_clip)).mean().item())


def test_hinge_asks_for_scores_beyond_one() -> None:
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [1.0, -1.0]])
    assert hinge_loss(real, fake).item() == pytest.approx(0.5 * ((0 + 0.5 + 2 + 0) / 4 + (0 + 1 + 2 + 0) / 4))


def test_lecam_keeps_its_averages_in_the_checkpoint_and_moves_them_only_when_told() -> None:
    lecam = LeCam(0.9)
    real, fake = torch.tensor([[1.0, -1.0]]), torch.tensor([[-2.0, 0.5]])
    assert lecam.penalty(real, fake).item() == pytest.approx((1 + 0) / 2 + (4 + 0) / 2)
    assert lecam.real.item() == lecam.fake.item() == 0
    lecam.update(torch.tensor(2.0), torch.tensor(-4.0))
    lecam.update(torch.tensor(3.0), torch.tensor(-4.0))
    assert lecam.real.item() == pytest.approx(0.9 * 0.2 + 0.3)
    assert lecam.fake.item() == pytest.approx(0.9 * -0.4 - 0.4)
    assert {name: value.item() for name, value in lecam.state_dict().items()} == {
        "real": lecam.real.item(),
        "fake": lecam.fake.item(),
    }
    expected = (((real + 0.76).clamp_min(0)) ** 2).mean() + (((0.48 - fake).clamp_min(0)) ** 2).mean()
    assert lecam.penalty(real, fake).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("variant", sorted(TIME_RULES))
def test_the_last_layers_gradient_is_autograds(variant: str) -> None:
    conv = TimeConv(32, 3, (3, 3, 3), TIME_RULES[variant])
    features = random(2, 4, 5, 6, 32)
    output, _ = conv(features)
    upstream = random(*output.shape, seed=1)
    (expected,) = torch.autograd.grad(output, conv.conv.weight, upstream)
    torch.testing.assert_close(last_layer_gradient(conv, features, upstream), expected)
    with torch.no_grad():
        torch.testing.assert_close(last_layer_gradient(conv, features, upstream), expected)
    assert conv.conv.weight.grad is None


def test_the_adaptive_weight_makes_both_gradients_equally_long_within_limits() -> None:
    nll, gan = random(50), 0.01 * random(50, seed=1)
    weight = adaptive_weight(nll, gan)
    assert (weight * gan).norm().item() == pytest.approx(nll.norm().item(), rel=0.01)
    assert adaptive_weight(nll, torch.zeros(50)).item() == 1e4
    assert adaptive_weight(torch.zeros(50), gan).item() == 0


# LPIPS


@pytest.fixture(scope="module")
def perceptual(vgg_file: Path) -> Perceptual:
    return load_perceptual(vgg_file)


def test_lpips_is_the_formula_on_the_given_trunk(perceptual: Perceptual, vgg_file: Path) -> None:
    weights = torch.load(vgg_file, weights_only=True)
    import lpips  # only now: load_perceptual declared what torchvision asks for

    heads = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    real, fake = (torch.tanh(random(3, 3, 32, 32, seed=seed)) for seed in (0, 1))
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    maps = [(x - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1) for x in (real, fake)]
    expected = torch.zeros(3)
    layers = [[0, 2], [5, 7], [10, 12, 14], [17, 19, 21], [24, 26, 28]]
    for number, convolutions in enumerate(layers):
        for at in convolutions:
            w, b = weights[f"features.{at}.weight"], weights[f"features.{at}.bias"]
            maps = [F.relu(F.conv2d(x, w, b, padding=1)) for x in maps]
        units = [x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10) for x in maps]
        difference = (units[0] - units[1]).square()
        expected += F.conv2d(difference, heads[f"lin{number}.model.1.weight"]).mean(dim=(1, 2, 3))
        maps = [F.max_pool2d(x, 2) for x in maps]
    torch.testing.assert_close(perceptual(real, fake), expected, atol=1e-5, rtol=1e-4)


def test_lpips_stays_frozen_and_without_dropout_whatever_is_called(perceptual: Perceptual) -> None:
    whole = nn.ModuleDict({"perceptual": perceptual}).train()
    assert not any(module.training for module in perceptual.modules())
    assert not any(parameter.requires_grad for parameter in whole.parameters())
    frames = torch.tanh(random(2, 3, 32, 32))
    assert torch.equal(perceptual(frames, frames), torch.zeros(2))


def test_lpips_in_pieces_has_the_same_values_and_gradients(perceptual: Perceptual) -> None:
    # In float32 a convolution of fewer frames may be rounded otherwise; the maximum of a pool is another pixel then.
    exact = copy.deepcopy(perceptual).double()
    real = torch.tanh(random(5, 3, 16, 16)).double()
    fakes = [torch.tanh(random(5, 3, 16, 16, seed=1)).double().requires_grad_() for _ in range(2)]
    at_once = exact(real, fakes[0])
    in_pieces = exact(real, fakes[1], frames_at_once=2)
    torch.testing.assert_close(in_pieces, at_once, atol=1e-12, rtol=1e-9)
    for distances in (at_once, in_pieces):
        distances.sum().backward()
    assert fakes[0].grad is not None
    assert fakes[1].grad is not None
    torch.testing.assert_close(fakes[1].grad, fakes[0].grad, atol=1e-12, rtol=1e-9)


def test_loading_lpips_draws_no_random_numbers(vgg_file: Path) -> None:
    before = torch.get_rng_state()
    load_perceptual(vgg_file)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_a_network_lpips_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(ValueError, match=r"no route to host.*vgg_weights.*vgg16-397923af\.pth\)$"):
        load_perceptual()


def test_without_the_package_lpips_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match=r"install 'vidshard\[train\]'$"):
        load_perceptual()


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


def test_files_that_are_not_vgg_are_refused_and_nothing_in_them_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no VGG16 weights at .*nowhere\.pth"):
        load_perceptual(tmp_path / "nowhere.pth")
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3), "bomb": Bomb(tmp_path / "mark")}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth .*without executing"):
        load_perceptual(tmp_path / "bomb.pth")
    assert not (tmp_path / "mark").exists()
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.pth")
    with pytest.raises(
        ValueError, match=r"not torchvision's vgg16: features\.0\.bias should be \(64,\), found nothing"
    ):
        load_perceptual(tmp_path / "part.pth")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz"):
        load_perceptual(tmp_path / "other.npz")


def test_frames_follow_each_other_clip_by_clip() -> None:
    video = torch.arange(2 * 3 * 4.0).view(2, 1, 3, 2, 2)[:, :, :, :1, :1].expand(2, 3, 3, 2, 2)
    assert torch.equal(frames_of(video)[4], video[1, :, 1])
