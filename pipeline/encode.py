"""Clips to tokens or latents: the model in a Ray actor, loaded once, fed in full batches.

The forward pass always has the same shape: a short last batch is filled up and the surplus dropped. A clip's
result then depends on the clip alone and not on which clips happened to travel with it, which is what makes two
runs equal, and fixed shapes are what compilers and graph capture want.

A batch that memory cannot hold is tried again at half its size, down to one clip. That is another shape: on the CPUs
and in the tests at hand it gives the same bytes, but kernels may sum in another order, and a value at a tie of
rounding may then fall to the other side, as with another --batch-size.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
import pyarrow as pa
import torch

from vidshard.models.tokenizer import Past, TokenizerConfig, VideoTokenizer, frames_to_input
from vidshard.models.vidtok.lengths import Padding, pad
from vidshard.models.vidtok.tiling import Tiling
from vidshard.models.weights import load_tokenizer, weights_digest
from vidshard.pipeline import storage
from vidshard.pipeline.rows import EncodeStats, add_payload, clip_counts, clip_frames, frame_sizes, refuse
from vidshard.schemas.rejections import Reason, Stage, VideoError
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.tokens import Payload
from vidshard.schemas.video import ClipSpec

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderSpec:
    """What an encoder needs to know; small enough to travel to every actor."""

    tokenizer: TokenizerConfig
    weights: str | None
    """Path or URL; None for seeded random weights. One of the Hub by its commit, so that all encoders have one file."""
    ema: bool
    """Whether the averaged ones of them."""
    random_seed: int | None
    weights_sha256: str
    """What the weights must be: an encoder refuses to start with others. Empty before the first look."""
    precision: str
    num_frames: int
    """Of every clip."""
    payload: Payload
    """What a clip becomes; the shape is that of one frame size."""
    batch_size: int
    """Clips per forward pass."""
    num_threads: int
    """CPU threads of one encoder; ignored on a GPU."""
    padding: Padding | None = None
    """How clips become as long as the tokenizer takes; None where they are."""
    tiling: Tiling | None = None
    """None to encode whole frames."""
    continuous: ClipSpec | None = None
    """How the clips of a span are one stream; None where each is encoded by itself."""


def clip_specs_of(run: TokenizeRun, config: TokenizerConfig) -> list[ClipSpec]:
    """How a run makes clips for its tokenizer, one for each frame size.

    Raises:
        ValueError: a continuous sequence that the tokenizer or another setting does not allow.
    """
    specs = run.clip_specs
    if not run.continuous:
        return specs
    if run.tile_size is not None:
        raise ValueError("--continuous cannot go with --tile-size: a stream takes whole frames")
    if run.stride_seconds is not None or run.clips_per_video is not None:
        raise ValueError("--continuous is one sequence without gaps: leave --stride-seconds and --clips-per-video out")
    if run.damaged == "keep":
        raise ValueError("--continuous is one sequence without gaps: it cannot go with --damaged keep")
    return [continuous_spec(spec, config) for spec in specs]


def continuous_spec(spec: ClipSpec, config: TokenizerConfig) -> ClipSpec:
    """Clips of a video as one sequence: as many latents in each as in a clip of ``spec`` by itself.

    A causal model's first latent stands for the first frame alone, every other one for time_stride frames. With
    time_stride - 1 copies before the first frame, which is what the model itself puts there, all clips are alike.

    Raises:
        ValueError: the model is not causal, or takes no clips of this length.
    """
    if not config.is_causal:
        raise ValueError(
            f"{config.name} is not causal: its latents depend on later frames, so a video cannot be encoded piece by "
            "piece; choose a causal tokenizer for --continuous"
        )
    num_latents = config.latent_frames(spec.num_frames)
    if config.decoded_frames(num_latents) != spec.num_frames:
        raise ValueError(
            f"--continuous takes --frames of 1 + a multiple of {config.time_stride}, got {spec.num_frames}; nearest: "
            f"{config.decoded_frames(num_latents)}"
        )
    num_frames = num_latents * config.time_stride
    return replace(
        spec,
        num_frames=num_frames,
        continuous=True,
        lead_frames=config.time_stride - 1,
        halo_clips=-(-config.history_frames // num_frames),
    )


def open_tokenizer(spec: EncoderSpec, device: str) -> VideoTokenizer:
    """Load the tokenizer that the spec names, ready to encode and decode.

    Raises:
        ValueError: the weights do not fit the model, or are not the ones that the run began with.
        FileNotFoundError: there is no such file.
    """
    with storage.local_copy(spec.weights) as path:
        tokenizer = load_tokenizer(spec.tokenizer, path, seed=spec.random_seed, ema=spec.ema)
    digest = weights_digest(tokenizer.state_dict())
    if spec.weights_sha256 not in ("", digest):
        raise ValueError(
            f"the weights in {storage.public_uri(spec.weights or 'memory')} are not those expected: their SHA-256 is "
            f"{digest}, expected {spec.weights_sha256}; give the file that was used, or start a new output"
        )
    return tokenizer.to(device=device, dtype=DTYPES[spec.precision])


def make_reproducible(device: str, num_threads: int) -> None:
    """Process-wide settings that make the same clip give the same bits in every run."""
    torch.set_num_threads(num_threads)
    if device == "cuda":
        torch.backends.cudnn.benchmark = False  # timing-based choice of kernels differs from run to run
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False


def encode_clips(
    tokenizer: VideoTokenizer,
    clips: Sequence[np.ndarray],
    payload: Payload,
    *,
    batch_size: int,
    padding: Padding | None = None,
    tiling: Tiling | None = None,
) -> dict[str, np.ndarray]:
    """Encode clips of one shape.

    Args:
        clips: each uint8 (T, H, W, 3).
        batch_size: clips per forward pass; the last one is filled up by repeating a clip.
        padding: makes clips of another length than the tokenizer takes as long as it does.
        tiling: for large frames.

    Returns:
        For each payload column an array (number of clips, values per clip), flattened in C order.

    Raises:
        FloatingPointError: a latent is not a finite float16.
    """
    device = next(tokenizer.parameters()).device
    dtype = tokenizer.dtype
    parts: dict[str, list[np.ndarray]] = {name: [] for name in payload.columns}
    if not clips:
        return {name: np.empty((0, payload.num_values), payload.dtype) for name in payload.columns}
    staging = torch.empty((batch_size, *clips[0].shape), dtype=torch.uint8, pin_memory=device.type == "cuda")
    batch = staging.numpy()
    for start in range(0, len(clips), batch_size):
        for slot in range(batch_size):
            batch[slot] = clips[min(start + slot, len(clips) - 1)]
        with torch.inference_mode():
            x_BCTHW = frames_to_input(staging.to(device), dtype)
            if padding is not None:
                x_BCTHW = pad(x_BCTHW, tokenizer.config, padding).frames
            encoded = tokenizer.encode(x_BCTHW, tiling=tiling)
        count = min(batch_size, len(clips) - start)
        results = [encoded.tokens] if payload.kind == "tokens" else [encoded.latents, encoded.logvar]
        for name, result in zip(payload.columns, results, strict=False):
            assert result is not None
            array = result[:count].flatten(1).to(torch.float32 if payload.kind == "latents" else None).cpu().numpy()
            parts[name].append(array.astype(payload.dtype))
    values = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    if payload.kind == "latents" and not all(np.isfinite(v).all() for v in values.values()):
        raise FloatingPointError("the encoder gave latents that are not finite float16 numbers: check the weights")
    return values


def encode_spans(
    tokenizer: VideoTokenizer,
    spans: Sequence[Sequence[np.ndarray]],
    counts: Sequence[int],
    payload: Payload,
    spec: ClipSpec,
    *,
    batch_size: int,
) -> dict[str, np.ndarray]:
    """Encode spans of continuous sequences, several streams side by side, each clip carrying on from the one before.

    Args:
        spans: of each span the clips, uint8 (T, H, W, 3), those of its halo first.
        counts: of each span the number of its own clips: the last ones.
        spec: from `continuous_spec`.
        batch_size: streams at once; the last batch is filled up by repeating one.

    Returns:
        As `encode_clips`, for the spans' own clips.
    """
    device, dtype = next(tokenizer.parameters()).device, tokenizer.dtype
    rows: dict[str, list[np.ndarray]] = {name: [np.empty(0)] * sum(counts) for name in payload.columns}
    ends = np.cumsum(counts)
    numbers = [number for number, count in enumerate(counts) if count]
    for start in range(0, len(numbers), batch_size):
        group = numbers[start : start + batch_size]
        streams = [spans[number] for number in (group + group[-1:] * batch_size)[:batch_size]]
        past: Past = ()
        for step in range(max(map(len, streams))):
            batch = torch.from_numpy(np.stack([stream[min(step, len(stream) - 1)] for stream in streams]))
            x_BCTHW = frames_to_input(batch.to(device), dtype)
            with torch.inference_mode():
                encoded, past = tokenizer.encode_stream(x_BCTHW if past else x_BCTHW[:, :, spec.lead_frames :], past)
            results = [encoded.tokens] if payload.kind == "tokens" else [encoded.latents, encoded.logvar]
            for slot, number in enumerate(group):
                row = ends[number] - len(spans[number]) + step  # below the span's first row: a clip of its halo
                if step < len(spans[number]) and row >= ends[number] - counts[number]:
                    for name, result in zip(payload.columns, results, strict=False):
                        assert result is not None
                        rows[name][row] = result[slot].flatten().cpu().numpy().astype(payload.dtype)
    none = np.empty((0, payload.num_values), payload.dtype)
    values = {name: np.stack(arrays) if arrays else none for name, arrays in rows.items()}
    if payload.kind == "latents" and not all(np.isfinite(v).all() for v in values.values()):
        raise FloatingPointError("the encoder gave latents that are not finite float16 numbers: check the weights")
    return values


MEMORY_MESSAGES = (
    "can't allocate memory",  # PyTorch's CPU allocator on Linux and macOS
    "not enough memory",  # and on Windows
    "std::bad_alloc",
    "out of memory",  # the CUDA runtime itself: pinned memory, a library's workspace
    "_ALLOC_FAILED",  # cuBLAS, cuDNN
)
"""What a RuntimeError says that is about memory; PyTorch has a class of its own only for its CUDA allocator."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a computation failed for want of memory, so that a smaller one may succeed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MEMORY_MESSAGES)


def free_caches() -> None:
    """Give back what no tensor uses: after a failure, cached blocks may be of no use to the next, smaller batch."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Unit:
    """What goes into a batch as a whole: a clip, or a span whose clips are one stream."""

    row: int
    clips: Sequence[np.ndarray]
    num_own: int
    """Without those of its halo."""


class ClipEncoder:
    """The actor of the encoding stage: rows of decoded spans in, rows with tokens out.

    Called by Ray Data, one batch of rows at a time. Rejections pass untouched. A row with a clip for which there is
    no memory, not even by itself, becomes a rejection; any other exception is a bug and ends the run.

    The first call loads the model, not the constructor: a death while loading then counts as an attempt of that
    task, of which there are few, and not as a restart of the actor, of which there are many (`pipeline.flow`).
    """

    def __init__(self, spec: EncoderSpec) -> None:
        self._spec = spec
        self._model: VideoTokenizer | None = None
        self._batch_sizes: dict[tuple[int, int], int] = {}
        """For each frame size that did not fit at the spec's batch size, what did."""
        self._idle_since: float | None = None

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Encode the clips of all rows together."""
        tokenizer = self._tokenizer()
        started = time.monotonic()
        waited = started - self._idle_since if self._idle_since is not None else 0.0
        spec = self._spec
        spans = clip_frames(rows, spec.num_frames)
        counts = clip_counts(rows)
        sizes = frame_sizes(rows)
        encoded: list[dict[str, list[np.ndarray]]] = [{name: [] for name in spec.payload.columns} for _ in sizes]
        errors: dict[int, VideoError] = {}
        num_slots = 0
        # rows of one frame size are neighbours: the plan is sorted by it
        for size, group in groupby(range(rows.num_rows), key=lambda row: sizes[row]):
            units: list[_Unit] = []
            for row in group:
                if spec.continuous is None:
                    units += [_Unit(row=row, clips=[clip], num_own=1) for clip in spans[row]]
                elif counts[row]:
                    units.append(_Unit(row=row, clips=spans[row], num_own=counts[row]))
            num_slots += self._encode(tokenizer, units, size, encoded, errors)
        for row in errors:
            encoded[row] = {name: [] for name in spec.payload.columns}
        values = {name: [clip for row in encoded for clip in row[name]] for name in spec.payload.columns}
        self._idle_since = time.monotonic()
        stats = EncodeStats(seconds=self._idle_since - started, wait_seconds=waited, num_slots=num_slots)
        return add_payload(refuse(rows, errors, Stage.ENCODE), values, spec.payload, stats)

    def _tokenizer(self) -> VideoTokenizer:
        if self._model is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            make_reproducible(device, self._spec.num_threads)
            self._model = open_tokenizer(self._spec, device)
        return self._model

    def _encode(
        self,
        tokenizer: VideoTokenizer,
        units: Sequence[_Unit],
        size: tuple[int, int],
        encoded: Sequence[Mapping[str, list[np.ndarray]]],
        errors: dict[int, VideoError],
    ) -> int:
        """Encode units of one frame size, in batches that memory holds.

        Args:
            encoded: of each row and for each payload column the clips; those of the units are appended.
            errors: of rows with a unit that does not fit; their further units are left out.

        Returns:
            Clips that the forward passes had room for.
        """
        batch_size = self._batch_sizes.get(size, self._spec.batch_size)
        num_slots = start = 0
        has_freed = False
        while start < len(units):
            if units[start].row in errors:
                start += 1
                continue
            batch = units[start : start + batch_size]
            values, shortage = _unless_out_of_memory(partial(self._encode_batch, tokenizer, batch, batch_size))
            if values is not None:
                _share_out(values, batch, encoded)
                num_slots += max(len(unit.clips) for unit in batch) * batch_size
                start += len(batch)
                has_freed = False
                continue
            free_caches()
            what = f"{self._spec.num_frames}x{size[0]}x{size[1]} frames"
            if batch_size > 1:
                self._batch_sizes[size] = batch_size = batch_size // 2
                log.warning("out of memory (%s): from now on %d clips of %s at once", shortage, batch_size, what)
            elif not has_freed:
                has_freed = True  # caches of other shapes may have been what was in the way
            else:
                streams = " as a stream" if self._spec.continuous is not None else ""
                errors[units[start].row] = VideoError(
                    Reason.OUT_OF_MEMORY,
                    f"one clip of {what}{streams} does not fit by itself in {self._spec.precision}: {shortage}",
                )
                log.warning("out of memory (%s): not even one clip of %s fits", shortage, what)
                has_freed = False
        return num_slots

    def _encode_batch(
        self, tokenizer: VideoTokenizer, units: Sequence[_Unit], batch_size: int
    ) -> dict[str, np.ndarray]:
        """The units' own clips, in order."""
        spec = self._spec
        if spec.continuous is not None:
            spans, counts = [unit.clips for unit in units], [unit.num_own for unit in units]
            return encode_spans(tokenizer, spans, counts, spec.payload, spec.continuous, batch_size=batch_size)
        clips = [clip for unit in units for clip in unit.clips]
        return encode_clips(
            tokenizer, clips, spec.payload, batch_size=batch_size, padding=spec.padding, tiling=spec.tiling
        )


def _unless_out_of_memory(
    encode: Callable[[], dict[str, np.ndarray]],
) -> tuple[dict[str, np.ndarray] | None, str]:
    """What a function gives; None and the allocator's words, a line, where there was not enough memory.

    A function of its own, as an exception's traceback keeps every tensor of the failed pass alive: it must be gone
    before caches are freed and the next attempt begins.
    """
    try:
        return encode(), ""
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None, " ".join(str(error).split())[:300] or type(error).__name__


def _share_out(
    values: Mapping[str, np.ndarray], units: Sequence[_Unit], encoded: Sequence[Mapping[str, list[np.ndarray]]]
) -> None:
    """Append each unit's clips to those of its row."""
    for name, clips in values.items():
        start = 0
        for unit in units:
            encoded[unit.row][name].extend(clips[start : start + unit.num_own])
            start += unit.num_own
