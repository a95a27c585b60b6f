"""Payload parts of stored clips: which there are, whether clips go together, and clips crossed to one.

Crossing takes one payload part of one clip and the others of another, such as the structure of A with the dynamics of
B. Nothing is decoded here, and no weights are loaded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from vidshard.models.tokenizer import parse_config
from vidshard.pipeline.output.shard_reader import ShardError, StoredClip, decodable
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.schemas.errors import UserError
from vidshard.schemas.text import readable
from vidshard.schemas.tokens import Provenance
from vidshard.schemas.video import ClipSpec


def check_parts(resolved: ResolvedRun, parts: Collection[str]) -> None:
    """Check the names of payload parts to decode.

    Raises:
        UserError: none is named, the tokenizer has no such part, or the output is a continuous sequence.
    """
    config = resolved.config
    if not config.parts:
        shapes = _shapes({column.name: column.shape for column in decodable(resolved.payload)})
        raise UserError(f"{config.name} has no payload parts: its clips hold {shapes}, and decode as a whole only")
    try:
        config.columns_of(parts)
    except ValueError as error:
        raise UserError(readable(error)) from error
    if resolved.run.continuous:
        raise UserError("rows of --continuous decode as a whole only: parts are decoded of clips that stand apart")


def check_clip(resolved: ResolvedRun, clip: StoredClip) -> None:
    """Check that a clip can be decoded by the tokenizer of a run.

    Raises:
        ShardError: the clip was made by another tokenizer or other weights, or its payload or its number of frames is
            not that of the run.
    """
    if clip.provenance is not None:
        own = (resolved.config.identity, resolved.source.sha256)
        if (_tokenizer(clip.provenance), clip.provenance.weights_sha256) != own:
            raise ShardError(
                f"clip {readable(clip.clip_id, 80)} was made by {_made_by(clip.provenance)} and is not decoded by "
                f"{resolved.config.name} with weights {own[1][:12]}: open the output that holds it"
            )
    try:
        spec = stored_spec(resolved, clip.values)
        payload = decodable(resolved.payload_of(spec))
    except (LookupError, ValueError) as error:
        raise ShardError(f"clip {readable(clip.clip_id, 80)} fits no settings of its run: {readable(error)}") from error
    expected = {column.name: column.shape for column in payload}
    found = {name: values.shape for name, values in clip.payload.items()}
    if found != expected:
        raise ShardError(
            f"clip {readable(clip.clip_id, 80)} holds {_shapes(found)}, and {resolved.config.name} decodes "
            f"{_shapes(expected)}: the shard is damaged or was made by other software"
        )
    if not spec.continuous and _num_frames(clip) != spec.num_frames:
        raise ShardError(
            f"clip {readable(clip.clip_id, 80)} has {_num_frames(clip)} frame times, and clips of its run have "
            f"{spec.num_frames} frames: the shard is damaged or was made by other software"
        )


def cross_clips(resolved: ResolvedRun, clips: Mapping[str, StoredClip]) -> StoredClip:
    """Join payload parts of several clips to one clip.

    Args:
        resolved: run that made the clips.
        clips: a clip for each payload part of the tokenizer, by name of the part.

    Returns:
        A clip with the columns of the first part's clip, the payload of each part from its clip, and as many valid
        frames as the clip with the fewest.

    Raises:
        UserError: a part is missing or unknown, or the clips are of different tokenizers, weights, shapes or rates.
        ShardError: as :func:`check_clip`.
    """
    for first, other in itertools.pairwise(clips.values()):
        _check_pair(first, other)
    check_parts(resolved, clips)
    missing = [name for name in resolved.config.parts if name not in clips]
    if missing:
        raise UserError(
            f"crossing takes a clip for each payload part of {resolved.config.name} ({_names(resolved)}); "
            f"there is none for {', '.join(missing)}"
        )
    for clip in clips.values():
        check_clip(resolved, clip)
    valid = min(clip.values["num_valid_frames"] for clip in clips.values())
    payload = {
        column: clips[part].payload[column] for part, columns in resolved.config.parts.items() for column in columns
    }
    first = next(iter(clips.values()))
    return replace(first, values={**first.values, "num_valid_frames": valid}, payload=payload)


def stored_spec(resolved: ResolvedRun, values: Mapping[str, Any]) -> ClipSpec:
    """Clip settings of a stored row.

    Raises:
        LookupError: the run has no such bucket.
    """
    specs = {spec.bucket: spec for spec in resolved.clip_specs}
    if "bucket" not in values:
        return next(iter(specs.values()))
    if values["bucket"] not in specs:
        raise LookupError(f"no bucket {values['bucket']!r:.80} among {', '.join(specs)}")
    return specs[values["bucket"]]


def _check_pair(first: StoredClip, other: StoredClip) -> None:
    """Check that parts of one clip can stand in for those of another.

    Raises:
        UserError: the clips differ in their tokenizer, weights, shapes, number of frames, padding or rate.
    """
    for trait, of, shown in _TRAITS:
        a, b = of(first), of(other)
        if a != b:
            ids = f"{readable(first.clip_id, 80)} and {readable(other.clip_id, 80)}"
            raise UserError(f"clips {ids} cannot be crossed: they differ in {trait}, {shown(first)} and {shown(other)}")


def _provenance(of: Callable[[Provenance], Any]) -> Callable[[StoredClip], Any]:
    return lambda clip: None if clip.provenance is None else of(clip.provenance)


def _tokenizer(provenance: Provenance) -> Any:
    try:
        return parse_config(provenance.tokenizer).identity
    except ValueError:
        return dict(provenance.tokenizer)  # of a family that this vidshard does not know


def _tokenizer_name(provenance: Provenance) -> str:
    return readable(provenance.tokenizer.get("name"), 80)


def _made_by(provenance: Provenance) -> str:
    return f"{_tokenizer_name(provenance)} with weights {readable(provenance.weights_sha256[:12])}"


def _payload_shapes(clip: StoredClip) -> dict[str, tuple[int, ...]]:
    return {name: values.shape for name, values in clip.payload.items()}


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return " + ".join(f"{readable(name, 80)} {list(shape)}" for name, shape in shapes.items()) or "no payload"


def _num_frames(clip: StoredClip) -> int:
    return len(clip.values["frame_pts_seconds"])


def _padding(provenance: Provenance) -> Any:
    return provenance.identity.get("pad_frames", "no padding")


def _names(resolved: ResolvedRun) -> str:
    return ", ".join(resolved.config.parts)


_TRAITS: tuple[tuple[str, Callable[[StoredClip], Any], Callable[[StoredClip], str]], ...] = (
    ("the tokenizer", _provenance(_tokenizer), _provenance(_tokenizer_name)),
    ("the weights", _provenance(lambda p: p.weights_sha256), _provenance(lambda p: readable(p.weights_sha256[:12]))),
    ("the payload shapes", _payload_shapes, lambda clip: _shapes(_payload_shapes(clip))),
    ("the number of frames", _num_frames, lambda clip: str(_num_frames(clip))),
    ("the padding", _provenance(_padding), lambda clip: str(_provenance(_padding)(clip))),
    ("frames per second", lambda clip: clip.values["fps"], lambda clip: f"{clip.values['fps']:g}"),
)
"""Property that clips must have in common to be crossed: its name, its value, and the value as it is shown."""
