"""Frames of a clip and its latents: which frames each latent stands for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from vidshard.models.tokenizer import parse_config
from vidshard.schemas.errors import UserError
from vidshard.schemas.tokens import Provenance

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class FrameCells:
    """Rule that assigns the frames of a row to cells: to the frames of a clip, or to its latents.

    The first latent of a causal tokenizer stands for the frames that the others leave over: one of 17, or all four
    where the row continues another.
    """

    num_frames: int
    """Most frames of a row."""
    num_latents: int
    """Latents of a row along time."""
    time_stride: int
    """Frames of a latent that is not the first."""
    num_encoded: int | None
    """Frames of a row as it was encoded, padding included; None where rows are not padded to a length."""
    copies_first: bool
    """Whether the padding precedes the frames."""

    reads = ("frame_pts_seconds", "num_valid_frames")
    """Columns of the shards that `of` needs."""

    @classmethod
    def of_run(cls, provenance: Provenance) -> FrameCells:
        """The rule of the run that made a shard.

        Raises:
            UserError: its tokenizer is unknown, or its clip length is missing.
        """
        try:
            config = parse_config(provenance.tokenizer)
            frames = int(provenance.run["frames"])
            padding = provenance.run.get("pad_frames", "refuse")
            encoded = frames if padding == "refuse" else config.valid_frames(frames)
            latents = config.latent_frames(encoded)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"signals cannot be aligned with the latents of these shards: {error!s:.300}") from error
        is_continuous = bool(provenance.run.get("continuous"))
        return cls(
            num_frames=latents * config.time_stride if is_continuous else frames,
            num_latents=latents,
            time_stride=config.time_stride,
            num_encoded=None if is_continuous else encoded,
            copies_first=padding == "repeat-first",
        )

    def check_per_latent(self) -> None:
        """Check that each latent stands for the same number of frames, the first one at most for as many.

        Raises:
            UserError: it does not, as of a tokenizer that encodes a clip in pieces.
        """
        if self.num_encoded is None:
            return
        first = self.num_encoded - (self.num_latents - 1) * self.time_stride
        if not 1 <= first <= self.time_stride:
            raise UserError(
                f"signals_per='latent': {self.num_latents} latents of {self.num_encoded} frames do not stand for "
                f"{self.time_stride} frames each, as this tokenizer encodes a clip in pieces; give signals_per='frame'"
            )

    def of(self, rows: pa.StructArray, *, per_latent: bool) -> tuple[Integers, npt.NDArray[np.bool_], int, int]:
        """Cells of all frames of some rows.

        Args:
            rows: struct of the columns in ``reads``.
            per_latent: cells are latents; otherwise frames.

        Returns:
            int64 (frames,), the cell of each frame, numbered through all rows; bool (frames,), whether the frame is
            of the video; the most frames of a cell; the number of cells of a row.

        Raises:
            ValueError: a row has more frames than the run's clips.
        """
        lengths = pc.fill_null(pc.list_value_length(rows.field("frame_pts_seconds")), 0).to_numpy().astype(np.int64)
        valid = pc.fill_null(rows.field("num_valid_frames"), 0).to_numpy()
        if lengths.max(initial=0) > self.num_frames:
            raise ValueError(f"a clip has {int(lengths.max())} frames, the run's have {self.num_frames}")
        row = np.repeat(np.arange(len(lengths)), lengths)
        frame = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        inside = frame < valid[row]
        if not per_latent:
            return row * self.num_frames + frame, inside, 1, self.num_frames
        encoded = lengths if self.num_encoded is None else np.full(len(lengths), self.num_encoded)
        first = encoded - (self.num_latents - 1) * self.time_stride
        shift = encoded - lengths if self.copies_first else np.zeros_like(lengths)
        latent = np.maximum(0, (frame + shift[row] - first[row]) // self.time_stride + 1)
        return row * self.num_latents + latent, inside, self.time_stride, self.num_latents
