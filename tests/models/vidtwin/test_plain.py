"""The plain implementations of VidTwin that benchmarks compare ours with compute what ours computes."""

from __future__ import annotations

import pytest

from benchmarks.plain_vidtwin import Structure, plain_vidtwin
from tests.support.golden import TOLERANCE, TWIN_TINY_A, relative_error, video
from vidshard.models.vidtwin.config import PRESETS
from vidshard.models.weights import load_tokenizer


@pytest.mark.parametrize("structure", ["parts", "released"])
def test_plain_implementations_give_the_latents_and_the_video_of_ours(structure: Structure) -> None:
    ours = load_tokenizer(TWIN_TINY_A, None, seed=0)
    plain = plain_vidtwin(TWIN_TINY_A, ours.state_dict(), structure)
    x_BCTHW = video(TWIN_TINY_A.num_frames, TWIN_TINY_A.frame_size, TWIN_TINY_A.frame_size, 1)
    payload = ours.encode(x_BCTHW).payload
    for name, (mean, logvar) in plain.encode(x_BCTHW).items():
        assert relative_error(mean, payload[name].numpy()) < TOLERANCE
        assert relative_error(logvar, payload[f"{name}_logvar"].numpy()) < TOLERANCE
    latents = {name: payload[name] for name in TWIN_TINY_A.latent_shapes}
    assert relative_error(plain.decode(latents), ours.decode_payload(payload).numpy()) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "encode", "decode"),
    [
        ("vidtwin_small_structure_7_7_4_dynamics_7_8", 0.34e12, 0.34e12),
        ("vidtwin_structure_7_7_8_dynamics_7_8", 1.00e12, 0.98e12),
    ],
)
def test_the_flops_that_speeds_are_stated_in_are_those_of_the_architecture(
    name: str, encode: float, decode: float
) -> None:
    from benchmarks.encode import plain_flops  # with diffusers: a second, of each process of `make test` if above

    counted = plain_flops(PRESETS[name])
    assert counted == {"encode": pytest.approx(encode, rel=0.015), "decode": pytest.approx(decode, rel=0.015)}
