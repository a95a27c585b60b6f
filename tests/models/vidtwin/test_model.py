"""Properties of any VidTwin: its size, what sees what, its parts, gradients, precision, and the clips it takes."""

# B batch, C channels, T frames, H height, W width, S positions of a frame

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.golden import TWIN_TINY_A, TWIN_TINY_B, video
from tests.support.shared import SHARED
from vidshard.models.vidtok.tiling import Tiling
from vidshard.models.vidtwin.config import PRESETS, VidTwinConfig
from vidshard.models.vidtwin.model import VidTwin, checkpoint_name, sum_of
from vidshard.models.weights import count_parameters, load_tokenizer

LISTINGS = SHARED / "reference" / "state_dict"
NARROW = {
    "num_frames": 4,
    "frame_size": 64,
    "width": 32,
    "depth": 1,
    "num_heads": 2,
    "query_width": 16,
    "structure_width": 8,
    "qformer_layers": 2,
    "qformer_mlp_width": 16,
    "num_queries": 4,
}
ARCHITECTURES = [
    "vidtwin_structure_7_7_8_dynamics_7_8",
    *(name for name in PRESETS if PRESETS[name].architecture != "released"),
]


def narrow(name: str) -> VidTwinConfig:
    """A preset with few channels, frames and positions."""
    return VidTwinConfig.model_validate(PRESETS[name].model_dump() | NARROW)


@pytest.fixture(scope="module")
def tiny() -> VidTwin:
    return load_tokenizer(TWIN_TINY_A, None, seed=0)


def clips(config: VidTwinConfig, batch: int = 1) -> Tensor:
    return video(config.num_frames, config.frame_size, config.frame_size, batch)


# Size


@pytest.mark.parametrize(
    ("name", "changes", "num_parameters"),
    [
        ("vidtwin_structure_7_7_8_dynamics_7_8", {}, 312_701_490),
        ("vidtwin_structure_7_7_4_dynamics_7_8", {}, 312_673_834),
        ("vidtwin_structure_7_7_4_dynamics_4_16", {}, 318_099_728),
        ("vidtwin_structure_7_7_4_q12_dynamics_7_8", {}, 312_673_514),
        ("vidtwin_small_structure_7_7_4_dynamics_7_8", {}, 106_894_378),
        ("vidtwin_large_structure_7_7_4_dynamics_7_8", {}, 1_239_632_938),
    ],
)
def test_presets_have_as_many_parameters_as_the_original(
    name: str, changes: dict[str, int], num_parameters: int
) -> None:
    assert count_parameters(PRESETS[name].model_copy(update=changes)) == num_parameters


@pytest.mark.parametrize(
    ("size", "changes", "millions"),
    [
        ("small", {"structure_channels": 8}, 106.922),
        ("small", {"dynamics_halvings": 2, "dynamics_channels": 16}, 109.332),
        ("large", {"structure_channels": 8}, 1239.661),
        ("large", {"dynamics_halvings": 2, "dynamics_channels": 16}, 1261.102),
    ],
)
def test_every_size_has_as_many_parameters_as_the_original_in_every_setting(
    size: str, changes: dict[str, int], millions: float
) -> None:
    config = PRESETS[f"vidtwin_{size}_structure_7_7_4_dynamics_7_8"].model_copy(update=changes)
    assert count_parameters(config) / 1e6 == pytest.approx(millions, abs=6e-4)


def test_presets_have_the_compression_rates_of_the_paper() -> None:
    rates = {
        "vidtwin_structure_7_7_8_dynamics_7_8": 8064,
        "vidtwin_structure_7_7_4_dynamics_7_8": 4928,
        "vidtwin_structure_7_7_4_dynamics_4_16": 5184,
        "vidtwin_structure_7_7_4_q12_dynamics_7_8": 4144,
        "vidtwin_no_disentanglement": 4704,
        "vidtwin_no_dynamics_average": 4928,
        "vidtwin_no_structure_qformer": 4928,
        "vidtwin_no_moved_positions": 4864,
    }
    for name, values in rates.items():
        assert PRESETS[name].compression_rate == values / (3 * 16 * 224 * 224)


@pytest.mark.shared
@pytest.mark.skipif(not LISTINGS.is_dir(), reason=f"no listings of published names at {LISTINGS}")
@pytest.mark.parametrize("config", [*(PRESETS[n] for n in PRESETS if "structure_7" in n), TWIN_TINY_A, TWIN_TINY_B])
def test_names_and_shapes_of_weights_are_those_of_published_files(config: VidTwinConfig) -> None:
    with torch.device("meta"):
        network = VidTwin(config)
    shapes = {checkpoint_name(name, config): list(tensor.shape) for name, tensor in network.state_dict().items()}
    listed = json.loads((LISTINGS / f"{config.name}.json").read_text())
    assert shapes == {name: shape for name, shape in listed.items() if not name.startswith("loss.")}


# What sees what


def test_tokens_see_no_later_frames_but_the_structure_sees_all(tiny: VidTwin) -> None:
    x_BCTHW = clips(TWIN_TINY_A)
    changed = x_BCTHW.clone()
    changed[:, :, 3] *= -1
    tokens, other_tokens = tiny.encoder(x_BCTHW), tiny.encoder(changed)
    assert torch.equal(tokens[:, :3], other_tokens[:, :3])
    assert all(not torch.equal(tokens[:, frame], other_tokens[:, frame]) for frame in (3, 4))
    before, after = tiny.encode(x_BCTHW).payload, tiny.encode(changed).payload
    queries = (before["structure"] != after["structure"]).flatten(2).any(dim=2)
    assert queries.all()
    for name in ("dynamics_x", "dynamics_y"):
        frames = (before[name] != after[name]).flatten(2).any(dim=2)[0].tolist()
        assert frames == [False, False, True, True, True]  # the convolution of the latents sees one frame ahead


def test_a_clip_is_encoded_and_decoded_alike_in_any_company(tiny: VidTwin) -> None:
    x_BCTHW = clips(TWIN_TINY_A, 3)
    whole = tiny.encode(x_BCTHW).payload
    decoded = tiny.decode_payload(whole)
    for order in ([2, 0], [1]):
        part = tiny.encode(x_BCTHW[order]).payload
        assert all(torch.equal(part[name], whole[name][order]) for name in whole)
        assert torch.equal(tiny.decode_payload(part), decoded[order])


def test_a_batch_with_gradients_has_the_values_of_single_clips(tiny: VidTwin) -> None:
    model = copy.deepcopy(tiny).requires_grad_(True)
    x_BCTHW = clips(TWIN_TINY_A, 2)
    moments = model.moments(x_BCTHW)
    for name, values in tiny.encode(x_BCTHW).moments.items():
        torch.testing.assert_close(moments[name].mean.detach(), values.mean, atol=1e-5, rtol=0)
    decoded = model.decode({name: latent.mean for name, latent in moments.items()})
    torch.testing.assert_close(decoded.detach(), tiny.decode_payload(tiny.encode(x_BCTHW).payload), atol=1e-4, rtol=0)


def test_a_fresh_model_treats_frames_independently() -> None:
    torch.manual_seed(0)
    model = VidTwin(TWIN_TINY_B).eval()
    x_BCTHW = clips(TWIN_TINY_B)
    changed = x_BCTHW.clone()
    changed[:, :, 1] *= -1
    with torch.no_grad():
        differs = (model.encoder(x_BCTHW) != model.encoder(changed)).flatten(2).any(dim=2)[0].tolist()
        assert differs == [False, True, False, False]
        # its decoder does not give gray frames, as it would with the zeros that the encoder's unused layer begins with
        payload = model.encode(x_BCTHW).payload
        assert model.decode_payload(payload).std() > 0.05


# Parts


def test_parts_add_up_to_the_input_of_the_decoder(tiny: VidTwin) -> None:
    payload = tiny.encode(clips(TWIN_TINY_A)).payload
    aligned = tiny.aligned(payload)
    assert list(aligned) == ["structure", "dynamics"]
    assert all((tokens >= 0).all() for tokens in aligned.values())
    both = tiny.decoder(sum_of(aligned)).permute(0, 4, 1, 2, 3)
    assert torch.equal(both, tiny.decode_payload(payload))
    assert torch.equal(both, tiny.decode_payload(payload, parts=["structure", "dynamics"]))
    for part, tokens in aligned.items():
        alone = tiny.decoder(tokens).permute(0, 4, 1, 2, 3)
        columns = {name: payload[name] for name in TWIN_TINY_A.parts[part]}
        assert torch.equal(alone, tiny.decode_payload(columns, parts=[part]))


@pytest.mark.parametrize(
    ("change", "parts", "message"),
    [
        ({}, ["motion"], r"no part 'motion'; there are: structure, dynamics"),
        ({}, [], "no part is given"),
        ({"structure": None}, None, "the latents lack structure"),
        ({"dynamics_y": torch.zeros(1, 5, 3, 5)}, None, r"dynamics_y must be floating \(B, 5, 2, 5\)"),
        ({"dynamics_x": torch.zeros(0, 5, 2, 5)}, None, r"dynamics_x must be floating \(B, 5, 2, 5\)"),
        ({"dynamics_x": torch.zeros(5, 2, 5)}, ["dynamics"], r"dynamics_x must be floating \(B, 5, 2, 5\)"),
        ({"structure": torch.zeros(1, 3, 2, 2, 3, dtype=torch.int64)}, None, "structure must be floating"),
    ],
)
def test_what_cannot_be_decoded_is_refused(
    tiny: VidTwin, change: dict[str, Tensor | None], parts: list[str] | None, message: str
) -> None:
    payload = {**tiny.encode(clips(TWIN_TINY_A)).payload, **change}
    with pytest.raises(ValueError, match=message):
        tiny.decode_payload({name: value for name, value in payload.items() if value is not None}, parts=parts)


@pytest.mark.parametrize(
    ("num_clips", "message"),
    [
        ((2, 3, 3), "got 2 of structure, 3 of dynamics_x, 3 of dynamics_y"),
        ((3, 2, 3), "got 3 of structure, 2 of dynamics_x, 3 of dynamics_y"),
        ((2, 2, 1), "got 2 of structure, 2 of dynamics_x, 1 of dynamics_y"),
    ],
)
def test_latents_of_unequally_many_clips_are_refused_and_none_is_dropped(
    tiny: VidTwin, num_clips: tuple[int, int, int], message: str
) -> None:
    payload = tiny.encode(clips(TWIN_TINY_A, 3)).payload
    for name, count in zip(TWIN_TINY_A.latent_shapes, num_clips, strict=True):
        payload[name] = payload[name][:count]
    for decoded in (tiny.decode_payload, tiny.decode, tiny.aligned):
        with pytest.raises(ValueError, match=f"vidtwin_tiny_a: all latents .* same number of clips, {message}"):
            decoded(payload)
    if num_clips[1] == num_clips[2]:  # the structure plays no part in the dynamics alone
        assert tiny.decode(payload, parts=["dynamics"]).shape[0] == num_clips[1]


def test_nothing_to_decode_is_refused(tiny: VidTwin) -> None:
    for decoded in (tiny.decode_payload, tiny.decode, tiny.aligned):
        with pytest.raises(ValueError, match="vidtwin_tiny_a: the latents lack structure; there are none"):
            decoded({})


@pytest.mark.parametrize(
    "refused",
    [
        lambda model: model.encode(torch.zeros(1, 3, 6, 80, 80)),
        lambda model: model.encode(torch.zeros(1, 3, 5, 80, 96)),
        lambda model: model.encode(torch.zeros(1, 3, 5, 80, 80), tiling=Tiling(height=64, width=64, overlap=16)),
        lambda model: model.encode_stream(torch.zeros(1, 3, 5, 80, 80)),
        lambda model: model.decode_payload({}, 6),
        lambda model: model.decode_payload_stream({}),
        lambda model: model.config.payload(5, 96, 80),
        lambda model: model.config.valid_frames(6),
    ],
)
def test_clips_of_another_shape_streams_and_tiles_are_refused_by_name(
    tiny: VidTwin, refused: Callable[[VidTwin], object]
) -> None:
    with pytest.raises(ValueError, match=r"vidtwin_tiny_a.* (5 frames|80x80)"):
        refused(tiny)


# Training


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_trains_and_decodes_its_parts(name: str) -> None:
    config = narrow(name)
    model = VidTwin(config)
    moments = model.moments(clips(config, 2))
    assert {column: tuple(latent.mean.shape[1:]) for column, latent in moments.items()} == config.latent_shapes
    assert [c.shape for c in config.payload(*config.default_clip)] == list(config.latent_shapes.values())
    latents = {column: latent.sample(torch.randn_like(latent.mean)) for column, latent in moments.items()}
    loss = model.decode(latents).square().mean() + sum(latent.kl() for latent in moments.values())
    torch.autograd.backward(loss)
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    with torch.no_grad():
        for part, columns in config.parts.items():
            only = {column: latents[column] for column in columns}
            assert model.decode(only, parts=[part]).shape == (2, 3, *config.default_clip)


def test_recomputed_activations_give_the_same_gradients() -> None:
    torch.manual_seed(0)
    model = VidTwin(TWIN_TINY_B).eval()  # without dropout
    x_BCTHW = clips(TWIN_TINY_B)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        latents = {name: latent.mean for name, latent in model.moments(x_BCTHW, recompute=recompute).items()}
        torch.autograd.backward(model.decode(latents, recompute=recompute).square().mean())
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_dropout_is_for_training_only() -> None:
    torch.manual_seed(0)
    model = VidTwin(TWIN_TINY_B)
    x_BCTHW = clips(TWIN_TINY_B)
    with torch.no_grad():
        first, second = (model.train().encode(x_BCTHW).payload["structure"] for _ in range(2))
        assert not torch.equal(first, second)
        first, second = (model.eval().encode(x_BCTHW).payload["structure"] for _ in range(2))
        assert torch.equal(first, second)


# Precision


def test_position_codes_stay_float64_and_latents_float32_in_reduced_precision(tiny: VidTwin) -> None:
    half = load_tokenizer(TWIN_TINY_A, None, seed=0, dtype=torch.bfloat16)
    assert half.dtype is torch.bfloat16
    for model in (half, copy.deepcopy(tiny).half()):
        assert model.encoder.pos_embed.dtype is model.decoder.pos_embed_temporal.dtype is torch.float64
        assert torch.equal(model.encoder.pos_embed, tiny.encoder.pos_embed)
    x_BCTHW = clips(TWIN_TINY_A)
    encoded = half.encode(x_BCTHW.bfloat16())
    assert all(latent.mean.dtype is latent.logvar.dtype is torch.float32 for latent in encoded.moments.values())
    for name, values in tiny.encode(x_BCTHW).payload.items():
        assert (encoded.payload[name] - values).square().mean().sqrt() < 0.03 * values.square().mean().sqrt()
    assert half.decode_payload(encoded.payload).dtype is torch.bfloat16
