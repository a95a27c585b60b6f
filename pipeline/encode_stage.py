"""Encode stage: rows of decoded spans in, rows with payloads out.

A batch that does not fit in memory is retried at half its size, down to one clip; after a while a larger one is tried
again (`pipeline.batch_sizes`). A smaller batch has another shape. Tests on CPUs give the same bytes, but kernels may
sum in another order: a value at a rounding tie may then round the other way, as with another --batch-size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import torch

from vidshard.models.tokenizer import Tokenizer
from vidshard.models.vidtok.lengths import Padding
from vidshard.models.vidtok.model import VidTok
from vidshard.models.vidtok.tiling import Tiling
from vidshard.pipeline.batch_sizes import BatchSizes
from vidshard.pipeline.compiled import CompileCache, compile_encoder
from vidshard.pipeline.devices import GpuFaultError, examine_gpu, free_caches, is_out_of_memory, make_reproducible
from vidshard.pipeline.encode import NotFiniteError, encode_clips, encode_spans
from vidshard.pipeline.quality import QualityAudit, QualityMeter
from vidshard.pipeline.rows import (
    EncodeStats,
    add_payload,
    add_quality,
    clip_counts,
    clip_frames,
    frame_sizes,
    refuse,
)
from vidshard.pipeline.storage import public_uri
from vidshard.pipeline.tokenizer_source import PRECISIONS, TokenizerSource
from vidshard.schemas.errors import one_line
from vidshard.schemas.rejections import Reason, Stage, VideoError
from vidshard.schemas.tokens import Payload
from vidshard.schemas.video import ClipSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """Settings of an encoder, small enough to send to every actor."""

    source: TokenizerSource
    """Source of the tokenizer; an encoder refuses to start if the weights have another digest."""
    precision: str
    num_frames: int
    """Frames per clip."""
    payload: Payload
    """Payload columns of a clip; the frame size changes their shapes, not their names or dtypes."""
    batch_size: int
    """Clips per forward pass."""
    num_threads: int
    """CPU threads of one encoder."""
    device: str = "cpu"
    """``cuda`` or ``cpu``; an encoder that was promised a GPU never computes on a CPU."""
    compile_cache: str | None = None
    """Folder of compiled networks if ``torch.compile`` makes the kernels; None for those of `models.vidtok.fused`."""
    fuses_convolutions: bool = False
    """On a GPU, convolutions of a VidTok encoder compute the norms after them."""
    most_clips: tuple[tuple[tuple[int, int], int], ...] = ()
    """Largest batch by frame size (height, width), where it is below ``batch_size``. Pairs, as Ray hashes the spec."""
    padding: Padding | None = None
    """Placement of the frames that pad clips to a valid length; None if their length is valid."""
    tiling: Tiling | None = None
    """Tiles in which frames are encoded; None for whole frames."""
    continuous: ClipSpec | None = None
    """Clip settings if the clips of a span form one stream; None if each clip is encoded by itself."""
    audit: QualityAudit | None = None
    """Choice of the clips whose quality is measured; None for none."""

    def encoder(self) -> ClipEncoder:
        """Make an encoder with these settings; the model is loaded by its first call."""
        return ClipEncoder(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unit:
    """Indivisible entry of a batch: a clip, or a span whose clips form one stream."""

    row: int
    clips: Sequence[np.ndarray]
    """uint8 (T, H, W, 3) each, halo first."""
    num_own: int
    """Number of clips without the halo."""
    first_own: int = 0
    """Position of the first of them among the row's clips."""


class ClipEncoder:
    """Encoder of the encode stage: rows of decoded spans in, rows with payloads out.

    Each call takes one batch of rows. Rejections pass unchanged. A row with a clip that does not fit in memory even by
    itself, or whose values are not finite, becomes a rejection; any other exception is a defect and ends the run.

    The model is loaded by the first call, not by the constructor. A crash while loading then counts as an attempt
    of that task, which are limited, and not as a restart of the actor, which are not (`pipeline.attempts`).
    """

    def __init__(self, spec: EncoderSpec) -> None:
        self._spec = spec
        self._model: Tokenizer | None = None
        self._batch_sizes = BatchSizes(spec.batch_size, dict(spec.most_clips))
        self._compiled = None if spec.compile_cache is None else CompileCache(spec.compile_cache, _model_name(spec))
        self._idle_since: float | None = None
        self._meter: QualityMeter | None = None

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Encode the clips of all rows together."""
        tokenizer = self._tokenizer()
        started = time.monotonic()
        waited = started - self._idle_since if self._idle_since is not None else 0.0
        spec = self._spec
        spans = clip_frames(rows, spec.num_frames)
        counts = clip_counts(rows)
        sizes = frame_sizes(rows)
        encoded: list[dict[str, list[np.ndarray]]] = [{column.name: [] for column in spec.payload} for _ in sizes]
        errors: dict[int, VideoError] = {}
        num_slots = 0
        # rows of one frame size are adjacent: the plan is sorted by it
        for size, group in groupby(range(rows.num_rows), key=lambda row: sizes[row]):
            units: list[_Unit] = []
            for row in group:
                if spec.continuous is None:
                    units += [
                        _Unit(row=row, clips=[clip], num_own=1, first_own=number)
                        for number, clip in enumerate(spans[row])
                    ]
                elif counts[row]:
                    units.append(_Unit(row=row, clips=spans[row], num_own=counts[row]))
            num_slots += self._encode(tokenizer, units, size, encoded, errors, rows)
        for row in errors:
            encoded[row] = {column.name: [] for column in spec.payload}
        values = {column.name: [clip for row in encoded for clip in row[column.name]] for column in spec.payload}
        rows = refuse(rows, errors, Stage.ENCODE)
        quality = None if spec.audit is None else self._quality_meter(spec.audit).measure(rows, spans, encoded)
        self._idle_since = time.monotonic()
        stats = EncodeStats(seconds=self._idle_since - started, wait_seconds=waited, num_slots=num_slots)
        rows = add_payload(rows, values, spec.payload, stats)
        return rows if quality is None else add_quality(rows, quality)

    def _quality_meter(self, audit: QualityAudit) -> QualityMeter:
        if self._meter is None:
            spec = self._spec
            self._meter = QualityMeter(
                audit,
                self._tokenizer(),
                num_frames=spec.num_frames,
                padding=spec.padding,
                tiling=spec.tiling,
                continuous=spec.continuous is not None,
            )
        return self._meter

    def _tokenizer(self) -> Tokenizer:
        if self._model is None:
            spec = self._spec
            if spec.device == "cuda" and not torch.cuda.is_available():
                raise GpuFaultError(
                    f"the GPU of this encoder is gone, or PyTorch cannot use it any more: {examine_gpu().versions}"
                )
            make_reproducible(spec.device, spec.num_threads, spec.precision)
            self._model = spec.source.load(spec.device, PRECISIONS[spec.precision])
            if spec.fuses_convolutions:
                assert isinstance(self._model, VidTok)
                self._model.encoder.fuses_convolutions = True
            if self._compiled is not None:
                compile_encoder(self._model)
        return self._model

    def _encode(
        self,
        tokenizer: Tokenizer,
        units: Sequence[_Unit],
        size: tuple[int, int],
        encoded: Sequence[Mapping[str, list[np.ndarray]]],
        errors: dict[int, VideoError],
        rows: pa.Table,
    ) -> int:
        """Encode units of one frame size, in batches that fit in memory.

        Args:
            encoded: clips of each row, by payload column; results are appended to it.
            errors: failures by row; rows with a unit that does not fit, or whose values are not finite, are added, and
                their other units skipped.
            rows: the rows, to name a clip.

        Returns:
            Capacity of the forward passes, in clips.
        """
        sizes = self._batch_sizes
        num_slots = start = 0
        has_freed = False
        what = f"{self._spec.num_frames}x{size[0]}x{size[1]} frames"
        while start < len(units):
            if units[start].row in errors:
                start += 1
                continue
            batch_size = sizes.of(size)
            # A GPU gets several batches a call, so that one is copied while another is computed. Of a single clip that
            # does not fit, the row must be known.
            several = tokenizer.device.type == "cuda" and batch_size > 1
            batch = units[start:] if several else units[start : start + batch_size]
            try:
                with self._passes(size, batch_size):
                    values, shortage = self._unless_out_of_memory(tokenizer, batch, batch_size)
            except _UnitNotFiniteError as error:
                errors[error.row] = self._not_finite(rows, error)
                units = [*units[:start], *(unit for unit in units[start:] if unit.row != error.row)]
                continue
            if values is not None:
                _share_out(values, batch, encoded)
                num_slots += _num_slots(batch, batch_size)
                start += len(batch)
                has_freed = False
                if sizes.succeeded(size, -(-len(batch) // batch_size)):
                    log.warning("trying %d clips of %s at once again", sizes.of(size), what)
                continue
            free_caches()
            if batch_size > 1:
                halved = sizes.halve(size)
                log.warning("out of memory (%s): from now on %d clips of %s at once", shortage, halved, what)
            elif not has_freed:
                has_freed = True  # memory cached for other shapes may have been the obstacle: retry once without it
            else:
                streams = " as a stream" if self._spec.continuous is not None else ""
                errors[units[start].row] = VideoError(
                    Reason.OUT_OF_MEMORY,
                    f"one clip of {what}{streams} does not fit by itself in {self._spec.precision}: {shortage}",
                )
                log.warning("out of memory (%s): not even one clip of %s fits", shortage, what)
                has_freed = False
        return num_slots

    def _passes(self, size: tuple[int, int], batch_size: int) -> AbstractContextManager[None]:
        """Passes of one shape, of which the first is compiled once for all encoders."""
        if self._compiled is None:
            return nullcontext()
        return self._compiled.passes(self._spec.num_frames, size, batch_size)

    def _unless_out_of_memory(
        self, tokenizer: Tokenizer, batch: Sequence[_Unit], batch_size: int
    ) -> tuple[dict[str, np.ndarray] | None, str]:
        """Encode units; returns their values, or None and the allocator's message in one line if memory ran out.

        This is a separate function because a traceback keeps every tensor of the failed pass alive. The exception must
        be gone before caches are freed and the next attempt starts.
        """
        try:
            return self._encode_batch(tokenizer, batch, batch_size), ""
        except (RuntimeError, MemoryError, OSError) as error:
            if not is_out_of_memory(error, num_clips=batch_size):
                raise
            return None, one_line(error, 300)

    def _encode_batch(self, tokenizer: Tokenizer, units: Sequence[_Unit], batch_size: int) -> dict[str, np.ndarray]:
        """Encode units: by payload column, an array (clips without halos, values per clip), in order."""
        spec = self._spec
        try:
            if spec.continuous is not None:
                spans, counts = [unit.clips for unit in units], [unit.num_own for unit in units]
                return encode_spans(tokenizer, spans, counts, spec.payload, spec.continuous, batch_size=batch_size)
            clips = [clip for unit in units for clip in unit.clips]
            return encode_clips(
                tokenizer, clips, spec.payload, batch_size=batch_size, padding=spec.padding, tiling=spec.tiling
            )
        except NotFiniteError as error:
            places = [(unit, own) for unit in units for own in range(unit.num_own)]
            unit, own = places[error.index]
            raise _UnitNotFiniteError(unit.row, unit.first_own + own, error.what) from None

    def _not_finite(self, rows: pa.Table, error: _UnitNotFiniteError) -> VideoError:
        """Describe a value that is not finite: a plausible token would hide it."""
        clip = rows["clips"][error.row][error.clip]["clip_index"].as_py()
        detail = f"clip {clip} in {self._spec.precision}: {error.what}"
        log.warning("%s: %s", public_uri(rows["uri"][error.row].as_py()), detail)
        return VideoError(Reason.NOT_FINITE, detail)


class _UnitNotFiniteError(Exception):
    """A clip of a unit whose values are not finite."""

    def __init__(self, row: int, clip: int, what: str) -> None:
        super().__init__(row, clip, what)
        self.row = row
        self.clip = clip
        """Position among the row's clips without the halo."""
        self.what = what


def _model_name(spec: EncoderSpec) -> str:
    return f"{spec.source.config.name} {spec.precision}"


def _num_slots(units: Sequence[_Unit], batch_size: int) -> int:
    """Capacity of the forward passes over units, in clips: each batch takes as many steps as its longest unit."""
    batches = [units[start : start + batch_size] for start in range(0, len(units), batch_size)]
    return batch_size * sum(max(len(unit.clips) for unit in batch) for batch in batches)


def _share_out(
    values: Mapping[str, np.ndarray], units: Sequence[_Unit], encoded: Sequence[Mapping[str, list[np.ndarray]]]
) -> None:
    """Append the clips of each unit to its row."""
    for name, clips in values.items():
        start = 0
        for unit in units:
            encoded[unit.row][name].extend(clips[start : start + unit.num_own])
            start += unit.num_own
