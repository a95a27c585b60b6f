"""The Fréchet distance is scipy's and that of closed forms; features come from a given program."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.i3d import Program, save_program
from vidshard.models.frechet import I3D, frechet_distance


def draws(count: int, width: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, width)) @ random.normal(size=(width, width)) + random.normal(size=width)


@pytest.mark.parametrize(("count", "width"), [(50, 3), (3000, 8), (12, 20)])
def test_the_distance_is_that_of_scipy_s_matrix_root(count: int, width: int) -> None:
    import scipy.linalg  # half a second, of each process of `make test` if above

    real, fake = draws(count, width, 0), draws(count + 7, width, 1)
    covariances = [np.cov(features, rowvar=False) for features in (real, fake)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1] + 1e-10 * np.eye(width))
    means = real.mean(axis=0) - fake.mean(axis=0)
    expected = means @ means + np.trace(covariances[0] + covariances[1] - 2 * root.real)
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-4)


def test_closed_forms() -> None:
    real = draws(400, 5, 0)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(real, real + 3.0) == pytest.approx(5 * 9)  # a shift alone
    assert frechet_distance(real, -2 * real + 3 * real.mean(axis=0)) == pytest.approx(
        np.trace(np.cov(real, rowvar=False))
    )  # twice the spread
    line = np.array([[-1.0], [1.0]] * 50)
    assert frechet_distance(line, 4 * line + 5) == pytest.approx(25 + (3 * line.std(ddof=1)) ** 2)


def test_far_means_lose_no_digits() -> None:
    real, fake = draws(300, 4, 0), draws(300, 4, 1)
    assert frechet_distance(real + 1e6, fake + 1e6) == pytest.approx(frechet_distance(real, fake), rel=1e-6)


@pytest.mark.parametrize("bad", [np.zeros((1, 3)), np.zeros((5, 2)), np.full((5, 3), np.nan)])
def test_features_that_give_no_distance_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"two sets of at least two clips|not finite"):
        frechet_distance(np.random.default_rng(0).normal(size=(5, 3)), bad)


class NoFeatures(torch.nn.Module):
    """A program that takes clips alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_features_are_those_of_the_program_at_its_size(tmp_path: Path) -> None:
    save_program(Program(), tmp_path / "i3d.pt")
    clips = torch.rand(2, 3, 9, 32, 48) * 2 - 1
    found = I3D(tmp_path / "i3d.pt").features(clips)
    torch.testing.assert_close(found, clips.mean(dim=[2, 3, 4]), atol=0.02, rtol=0)
    save_program(NoFeatures(), tmp_path / "other.pt")
    with pytest.raises(ValueError, match="does not take"):
        I3D(tmp_path / "other.pt").features(clips)
    (tmp_path / "no.pt").write_bytes(b"no program")
    with pytest.raises(ValueError, match="is no TorchScript program"):
        I3D(tmp_path / "no.pt")
