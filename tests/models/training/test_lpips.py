"""LPIPS with the real VGG16 has its documented value; the script that makes the file loads nothing but arrays."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from tests.support import vgg
from vidshard.models.training.perceptual import load_perceptual

needs_vgg = pytest.mark.skipif(
    not vgg.FILE.is_file(), reason=f"needs {vgg.FILE}: python -m tests.support.vgg, or VIDSHARD_VGG16=FILE"
)


@needs_vgg
def test_lpips_has_the_value_that_torchmetrics_documents() -> None:
    """The example of its class: seed 123, then the network, which draws numbers too, then ten pairs of noise."""
    perceptual = load_perceptual(vgg.FILE)  # also makes torchvision importable
    from torchvision.models import vgg16

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        vgg16(init_weights=False)
        for channels in (64, 128, 256, 512, 512):
            torch.nn.Conv2d(channels, 1, 1, bias=False)
        first, second = (torch.rand(10, 3, 100, 100) * 2 - 1 for _ in range(2))
    with torch.no_grad():
        assert f"{perceptual(first, second).mean().item():.4f}" == "0.3493"


def test_another_file_than_the_pinned_one_is_refused() -> None:
    with pytest.raises(vgg.WrongFileError, match="its SHA-256 is e3b0c442"):
        vgg.vgg16_of(b"")


def test_a_pickle_that_names_more_than_arrays_is_refused() -> None:
    with pytest.raises(vgg.WrongFileError, match=r"asks for builtins\.print, which is not loaded"):
        vgg.convolutions_of(pickle.dumps({"VGG16_0": print}))


def test_kernels_are_turned_to_torchvision_s_layout() -> None:
    layers = {
        f"Conv_{n}": {"kernel": np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4), "bias": np.zeros(4, np.float32)}
        for n in range(13)
    }
    weights = vgg.convolutions_of(pickle.dumps({"VGG16_0": layers}, protocol=4))
    assert len(weights) == 26
    assert weights["features.28.weight"].shape == (4, 3, 1, 2)
    assert weights["features.0.weight"][3, 2, 0, 1] == layers["Conv_0"]["kernel"][0, 1, 2, 3]
