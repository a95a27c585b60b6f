"""The settings of a tokenization run: sections in one namespace, and the identity declared at each field."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError, create_model

from vidshard.schemas.fields import With, setting, setting_of
from vidshard.schemas.runs import TokenizeRun, identity_settings

VALUES: dict[str, Any] = {
    "signals": st.sampled_from(["actions=linear", "actions=linear,poses=window"]),
    "image_fps": st.sampled_from(["24", "30", "30000/1001"]),
    "keep_logvar": st.booleans(),
    "precision": st.sampled_from(["auto", "float32", "tf32", "float16", "bfloat16"]),
    "tile_size": st.sampled_from(["256", "256x448"]),
    "tile_overlap": st.integers(0, 128),
    "fps": st.sampled_from(["8", "7.5", "3"]),
    "frames": st.integers(1, 33),
    "pad_frames": st.sampled_from(["refuse", "repeat-last", "repeat-first"]),
    "continuous": st.booleans(),
    "tail": st.sampled_from(["pad", "drop"]),
    "size": st.sampled_from(["256", "64x128"]),
    "damaged": st.sampled_from(["reject", "keep"]),
    "buckets": st.sampled_from(["256x256,256x448", "64"]),
    "resize": st.sampled_from(["crop", "pad", "stretch"]),
    "start": st.sampled_from(["0", "1:30"]),
    "end": st.sampled_from(["90.5", "2:00"]),
    "stride_seconds": st.sampled_from(["0.5", "10"]),
    "clips_per_video": st.integers(1, 9),
    "clip_placement": st.sampled_from(["even", "random"]),
    "clip_seed": st.integers(0, 9),
    "min_seconds": st.sampled_from(["0", "0.25"]),
    "limit": st.integers(1, 9),
    "batch_size": st.integers(1, 9),
    "max_seconds": st.integers(1, 9),
    "clips_per_span": st.integers(1, 9),
    "weights": st.just("model.safetensors"),
}


def identity_before_fields_declared_it(run: TokenizeRun, *, padded: bool, tiled: bool) -> dict[str, Any]:
    """The identity as version 0.1.0 wrote it into run.json and the shards; never to be changed."""
    record = run.model_dump(mode="json")
    kept = ["precision", "fps", "frames", "tail", "resize", "keep_logvar"]
    kept.append("size" if run.buckets is None else "buckets")
    if padded:
        kept.append("pad_frames")
    if tiled:
        kept += ["tile_size", "tile_overlap"]
    if run.continuous:
        kept.append("continuous")
    others = ("start", "end", "stride_seconds", "clips_per_video", "signals")
    kept += [name for name in others if record[name] is not None]
    if run.clips_per_video is not None:
        kept += ["clip_placement", "clip_seed"]
    if run.min_seconds:
        kept.append("min_seconds")
    if run.image_fps != Fraction(24):
        kept.append("image_fps")
    if run.damaged != "reject":
        kept.append("damaged")
    return {name: record[name] for name in kept}


@settings(max_examples=300, deadline=None)
@given(values=st.fixed_dictionaries({}, optional=VALUES), padded=st.booleans(), tiled=st.booleans())
def test_the_identity_is_that_of_outputs_made_before(values: dict[str, Any], padded: bool, tiled: bool) -> None:
    try:
        run = TokenizeRun(inputs=["clips"], out="tokens", **values)
    except ValidationError:
        return  # such as overlapping clips of a continuous video
    before = identity_before_fields_declared_it(run, padded=padded, tiled=tiled)
    assert identity_settings(run, padded=padded, tiled=tiled) == before
    stored = TokenizeRun.model_validate(run.model_dump(mode="json"))
    assert identity_settings(stored, padded=padded, tiled=tiled) == before


@settings(max_examples=20, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", VALUES)
def test_each_setting_is_valid_by_itself(name: str, data: st.DataObject) -> None:
    """The property above would say nothing if the models refused the runs that it makes up."""
    TokenizeRun(inputs=["clips"], out="tokens", **{name: data.draw(VALUES[name])})


def test_every_setting_decides_about_its_identity() -> None:
    for name, field in TokenizeRun.model_fields.items():
        assert setting_of(field).identity is not None, name


def test_a_setting_that_leaves_its_identity_undecided_is_refused_when_the_module_is_imported() -> None:
    with pytest.raises(TypeError, match=r"Longer\.sharpness: say with identity="):
        create_model("Longer", __base__=TokenizeRun, sharpness=(int, setting(1, section="Sampling", help="Sharpness.")))
    with pytest.raises(TypeError, match=r"Longer\.sharpness: .* names no field"):
        create_model(
            "Longer",
            __base__=TokenizeRun,
            sharpness=(int, setting(1, section="Sampling", help="Sharpness.", identity=With("blur"))),
        )


def test_the_run_json_of_an_older_version_is_still_valid() -> None:
    """All settings of version 0.1.0, as its run.json holds them."""
    record = {
        "inputs": ["/clips"],
        "signals": None,
        "image_fps": "24",
        "limit": None,
        "out": "/tokens",
        "shard_size": 134217728,
        "commit_minutes": 10.0,
        "keep_logvar": False,
        "max_reject_share": 1.0,
        "tokenizer": "fsq_causal_488_small",
        "weights": "shipped:fsq_causal_488_small",
        "ema": False,
        "random_weights": None,
        "precision": "float32",
        "tile_size": None,
        "tile_overlap": 64,
        "fps": "8",
        "frames": 17,
        "pad_frames": "refuse",
        "continuous": False,
        "start": None,
        "end": None,
        "stride_seconds": None,
        "clips_per_video": None,
        "clip_placement": "even",
        "clip_seed": 0,
        "min_seconds": "0",
        "tail": "pad",
        "size": "256x256",
        "damaged": "reject",
        "buckets": None,
        "resize": "crop",
        "retry_rejected": "all",
        "recheck": False,
        "grace_seconds": 20.0,
        "lease_seconds": 60.0,
        "batch_size": None,
        "encode_workers": None,
        "gpus_per_worker": 1.0,
        "encode_threads": None,
        "decode_workers": None,
        "decode_timeout": 600.0,
        "decode_seconds_per_second": 30.0,
        "decode_memory": 4294967296,
        "max_pixels": 67108864,
        "max_seconds": 172800.0,
        "max_frames": 20000000,
        "clips_per_span": None,
        "ray_address": None,
        "object_store": None,
        "verbose": False,
    }
    run = TokenizeRun.model_validate(record)
    assert run.model_dump(mode="json").items() >= record.items()


def test_no_validator_of_settings_hides_another_one() -> None:
    """Validators are known by name: of two with one name in the classes that a run joins, one would never be called."""
    found = Counter(name for base in TokenizeRun.__bases__ for name in vars(base) if name in _validators(base))
    assert [name for name, count in found.items() if count > 1] == []
    run = TokenizeRun.model_validate({"inputs": ["x"], "out": "y", "cameras": "top, wrist", "decoders": "h264,vp9"})
    assert (run.cameras, run.decoders) == (["top", "wrist"], ["h264", "vp9"])


def _validators(base: type) -> set[str]:
    found = vars(base).get("__pydantic_decorators__")
    return set() if found is None else {*found.field_validators, *found.model_validators}
