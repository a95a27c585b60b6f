"""The network computes what the original VidTok implementation computes, with weights and clips made from names."""

# B batch, C channels, T frames, H height, W width

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.support.golden import TOLERANCE, relative_error, video
from tests.support.shared import SHARED
from vidshard.models.vidtok.config import PRESETS
from vidshard.models.vidtok.heads import FSQ
from vidshard.models.vidtok.model import VidTok
from vidshard.models.weights import load_tokenizer

WHOLE_SET = SHARED / "reference" / "golden"
OWN_PART = Path(__file__).parent / "golden" / "reference.npz"

CASES = {
    "causal-v1.0": {"A": (17, 64, 64, 1), "B": (5, 32, 48, 2), "C": (13, 32, 32, 1), "G": (1, 32, 32, 1)},
    "causal-v1.1": {
        "A": (17, 48, 48, 1),
        "B": (5, 16, 32, 2),
        "C": (13, 32, 32, 1),
        "E": (16, 16, 32, 1),
        "F": (18, 16, 32, 1),
        "G": (1, 32, 32, 1),
        "H": (2, 32, 32, 1),
        "L23": (23, 16, 16, 1),
        "L49": (49, 16, 16, 1),
    },
    "non-causal": {"A": (16, 64, 64, 1), "B": (8, 32, 48, 2), "H": (4, 32, 32, 1)},
}
"""T, H, W, B. The set's other lengths are refused here: the original loses frames with them."""

CONFIGS = (
    "fsq_causal_488_262144",
    "fsq_causal_488_32768",
    "fsq_causal_488_4096",
    "fsq_causal_41616_262144",
    "kl_causal_488_4chn",
    "kl_causal_488_16chn",
    "kl_causal_41616_4chn",
    "kl_causal_288_8chn",
    "fsq_causal_488_32768_v1_1",
    "fsq_causal_888_32768_v1_1",
    "kl_causal_488_4chn_v1_1",
    "kl_causal_488_16chn_v1_1",
    "kl_causal_41616_16chn_v1_1",
    "kl_causal_288_8chn_v1_1",
    "fsq_noncausal_488_262144",
    "kl_noncausal_488_4chn",
)
QUICK = {
    "fsq_causal_488_262144": "C",
    "kl_causal_288_8chn": "BCG",
    "fsq_causal_888_32768_v1_1": "BG",
}
"""Cases of the whole set that every run compares, beside those of the committed part: it holds the same values."""


@pytest.fixture(scope="module")
def last_model() -> dict[str, VidTok]:
    """The last model by the name of its configuration, as the largest takes seconds and 600 MB."""
    return {}


@pytest.fixture
def model(request: pytest.FixtureRequest, last_model: dict[str, VidTok]) -> VidTok:
    """A released configuration."""
    if request.param not in last_model:
        last_model.clear()
        last_model[request.param] = load_tokenizer(PRESETS[request.param], None, seed=0)
    return last_model[request.param]


def check(model: VidTok, case: str, expected: dict[str, npt.NDArray[np.generic]]) -> None:
    encoded = model.encode(video(*CASES[model.config.variant][case]))
    # The v1.1 values have the frames of whole latents, before the original cuts them to those that went in.
    num_frames = expected["dec"].shape[2]
    enc = expected["enc"].astype(np.float32)
    if encoded.tokens is not None:
        assert encoded.pre_quantized is not None
        # The stored values are those before the bounding.
        assert isinstance(model.head, FSQ)
        theirs = model.head.bound(torch.from_numpy(enc))
        assert relative_error(encoded.pre_quantized, theirs.numpy()) < TOLERANCE
        near_tie = ((theirs - theirs.floor() - 0.5).abs() < TOLERANCE).any(dim=1)
        assert ((encoded.tokens == torch.from_numpy(expected["indices"])) | near_tie).all()
        latents = torch.from_numpy(expected["codes"].astype(np.float32) / 4)
        from_tokens = model.decode(torch.from_numpy(expected["indices"]), num_frames)
        decoded = model.decode(latents, num_frames)
        assert torch.equal(from_tokens, decoded)
    else:
        assert encoded.logvar is not None
        assert relative_error(torch.cat([encoded.latents, encoded.logvar], dim=1), enc) < TOLERANCE
        decoded = model.decode(torch.from_numpy(enc).chunk(2, dim=1)[0], num_frames)
    assert relative_error(decoded, expected["dec"].astype(np.float32)) < TOLERANCE


@pytest.mark.parametrize(
    ("model", "case"),
    [
        ("kl_causal_488_4chn", "G"),
        ("fsq_causal_888_32768_v1_1", "F"),
        ("kl_noncausal_488_4chn", "H"),
        ("fsq_causal_488_262144", "B"),  # with which the next test begins
        ("fsq_causal_488_262144", "G"),
    ],
    indirect=["model"],
)
def test_latents_tokens_and_frames_are_those_of_the_original(model: VidTok, case: str) -> None:
    with np.load(OWN_PART) as arrays:
        prefix = f"{model.config.name}/{case}/"
        check(model, case, {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)})


@pytest.mark.shared
@pytest.mark.skipif(not WHOLE_SET.is_dir(), reason=f"the whole set of reference values is not at {WHOLE_SET}")
@pytest.mark.parametrize(
    ("model", "case"),
    [
        pytest.param(config, case, marks=() if case in QUICK.get(config, ()) else pytest.mark.slow)
        for config in CONFIGS
        for case in CASES[PRESETS[config].variant]
    ],
    indirect=["model"],
)
def test_every_configuration_agrees_with_the_whole_set_of_reference_values(model: VidTok, case: str) -> None:
    with np.load(WHOLE_SET / f"vidtok_{model.config.name}.npz") as arrays:
        check(
            model,
            case,
            {
                key: arrays[f"{case}/{key}"]
                for key in ("enc", "dec", "indices", "codes")
                if f"{case}/{key}" in arrays.files
            },
        )
