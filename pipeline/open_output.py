"""Reading an output from Python: its provenance, clips and rejections, and clips as video again.

Only `Output.reconstruct` loads torch. Reading needs pyarrow alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from vidshard.pipeline import storage
from vidshard.pipeline.output.layout import REJECTS, RUN, shard_paths
from vidshard.pipeline.output.parquet import named_if_damaged
from vidshard.pipeline.output.rejects import read_rejects
from vidshard.pipeline.output.shard_reader import ShardError, StoredClip, open_shard, output_shards, read_clips
from vidshard.pipeline.rows import row_rejection
from vidshard.schemas.rejections import Rejection
from vidshard.schemas.text import counted
from vidshard.schemas.tokens import Provenance

if TYPE_CHECKING:
    from vidshard.pipeline.reconstruct import ClipDecoder


class Output:
    """An output folder, a folder of shards, or a single shard, opened for reading.

    It shows the shards that were committed when it was opened.
    """

    def __init__(self, path: str, *, weights: str | None = None) -> None:
        """Find the shards; see `open_output`."""
        self.path = storage.absolute(path)
        self._is_folder = not self.path.endswith(".parquet") and storage.exists(storage.join(self.path, RUN))
        self.shards: list[str] = shard_paths(self.path) if self._is_folder else output_shards(self.path)
        """Paths of the Parquet files, sorted; none where every video was rejected."""
        self._weights = weights

    def __repr__(self) -> str:
        return f"Output({storage.public_uri(self.path)!r}, {counted(len(self.shards), 'shard')})"

    @cached_property
    def provenance(self) -> Provenance:
        """Tokenizer, weights, settings and versions that made the shards; the same in each of them.

        Raises:
            ShardError: there is no shard, or the first one is damaged or of an unknown format.
        """
        if not self.shards:
            raise ShardError(f"{storage.public_uri(self.path)} has no shards: nothing was committed, see rejects()")
        with open_shard(self.shards[0]) as (_, provenance):
            return provenance

    def clips(self, prefix: str = "") -> Iterator[StoredClip]:
        """Read clips in the order of the shards, one row group in memory at a time.

        Args:
            prefix: a clip id or its beginning, such as a video id; the empty string takes every clip.

        Raises:
            ShardError: a shard is damaged, or holds a token outside the codebook.
        """
        for path in self.shards:
            yield from read_clips(path, prefix)

    def rejects(self) -> list[Rejection]:
        """List the spans and whole videos that gave no tokens, with the reasons; empty without a ``rejects/`` folder.

        Raises:
            VidshardError: a file of rejections is damaged.
        """
        if not self._is_folder:
            return []
        with named_if_damaged(storage.join(self.path, REJECTS)):
            return [row_rejection(row) for row in read_rejects(self.path).to_pylist()]

    def reconstruct(self, clip: StoredClip, *, parts: str | Collection[str] | None = None) -> np.ndarray:
        """Decode a clip of this output, on a GPU where there is one; the first call loads the tokenizer.

        A row of a continuous output is decoded with the rows around it, so that its frames are those of the whole
        video.

        Args:
            parts: names of the payload parts to decode, such as ``"structure"``; None for the whole clip.

        Returns:
            uint8 (T, H, W, 3), RGB in [0, 255]; frames from ``num_valid_frames`` on repeat the last real one.

        Raises:
            UserError: the weights are missing, or are not those that made the output; or the tokenizer has no such
                part.
            ShardError: the clip was made by another tokenizer, or its payload is damaged.
        """
        return self._decoder.decode(clip, parts=(parts,) if isinstance(parts, str) else parts)

    def cross(self, **clips: StoredClip) -> np.ndarray:
        """Decode payload parts of several clips together, such as the structure of one with the dynamics of another.

        Args:
            clips: a clip for each payload part of the tokenizer, by name of the part. They may be of other outputs
                that were made by the same tokenizer with the same weights.

        Returns:
            As `reconstruct`; the frames up to the smallest ``num_valid_frames`` of the clips are real in all of them.

        Raises:
            UserError: a part is missing or unknown, or the clips differ in tokenizer, weights, shape or frame rate.
            ShardError: as `reconstruct`.
        """
        return self._decoder.cross(clips)

    @cached_property
    def _decoder(self) -> ClipDecoder:
        from vidshard.pipeline.reconstruct import ClipDecoder
        from vidshard.pipeline.resolved_run import ResolvedRun

        resolved = ResolvedRun.from_provenance(self.provenance, weights=self._weights)
        return ClipDecoder(resolved, self.shards, tiling=resolved.tiling)


def open_output(path: str, *, weights: str | None = None) -> Output:
    """Open what ``vidshard tokenize`` wrote.

    Args:
        path: an output folder, a folder of shards, or a single shard: a local path or a URL.
        weights: where the tokenizer's weights are now, for `Output.reconstruct`; None for where the shards say.

    Raises:
        ShardError: it is neither an output folder nor a token shard.
    """
    return Output(path, weights=weights)
