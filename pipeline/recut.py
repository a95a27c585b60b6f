"""Recutting: a share of the spans is decoded a second time, cut otherwise, and must give the same clips.

Spans cut anywhere equal one pass over the video. Whether that holds for a video nobody has seen can only be found out
on it, so every run tries it on a few spans. Which ones depends on the run's settings and the span alone, so that a
resumed run tries the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vidshard.schemas.rejections import Reason, VideoError
from vidshard.schemas.text import counted
from vidshard.schemas.video import Clip, Span, SpanClips

DecodeSpan = Callable[[Span], SpanClips]
"""Decodes one span by itself; a span that is refused has an error."""

_SAYS_NOTHING = frozenset(set(Reason) - {Reason.DECODE_ERROR, Reason.TRUNCATED, Reason.NO_FRAMES, Reason.UNSUPPORTED})
"""Reasons that have to do with time, memory or the storage, and not with where a span was cut."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recutting:
    """The choice of spans that are decoded a second time."""

    share: float
    """Share of the spans, in [0, 1]."""
    seed: str
    """Text that is the same for all runs of one output."""

    def chooses(self, span: Span) -> bool:
        """Whether a span is one of them."""
        return self._number(span) < self.share * 2**64

    def _number(self, span: Span) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}|{span.span_id}".encode()).digest()[:8], "big")

    def compare(self, span: Span, clips: Sequence[Clip], decode: DecodeSpan) -> VideoError | None:
        """Decode a span again in two pieces, the first of which begins a clip earlier where there is one.

        Args:
            span: one that was decoded without an error.
            clips: its clips, after those of its halo.
            decode: decodes each piece.

        Returns:
            CUT_DEPENDENT where the pieces give other clips; None where they give the same.

        Raises:
            VideoError: a piece was refused for a reason that has nothing to do with the cut.
        """
        own = [clip for clip in clips if clip.clip_index >= span.first_clip]
        found: list[Clip] = []
        for piece in self._pieces(span, len(own)):
            result = decode(piece)
            if result.error is not None and piece.first_clip < span.first_clip:  # the clip before may be damaged
                result = decode(replace(piece, first_clip=span.first_clip))
            if result.error is not None:
                if result.error.reason in _SAYS_NOTHING:
                    raise result.error
                return _different(f"from clip {piece.first_clip} on it is refused: {result.error.detail}")
            first = max(span.first_clip, piece.first_clip)
            found += [clip for clip in result.clips if clip.clip_index >= first]
        found = [clip for clip in found if span.end_clip is None or clip.clip_index < span.end_clip]
        if [clip.clip_index for clip in found] != [clip.clip_index for clip in own]:
            return _different(f"it has {counted(len(found), 'clip')} instead of {len(own)}")
        unequal = [one.clip_index for one, other in zip(own, found, strict=True) if not _is_same(one, other)]
        return _different(f"{len(unequal)} of {len(own)} clips differ, the first is {unequal[0]}") if unequal else None

    def _pieces(self, span: Span, num_clips: int) -> list[Span]:
        first = max(0, span.first_clip - 1)
        if num_clips > 1:
            middle = span.first_clip + 1 + self._number(span) % (num_clips - 1)
            return [replace(span, first_clip=first, end_clip=middle), replace(span, first_clip=middle)]
        if first < span.first_clip:
            return [replace(span, first_clip=first)]
        return [replace(span, end_clip=1 if span.end_clip is None else 2)]


def _is_same(one: Clip, other: Clip) -> bool:
    return (
        one.num_valid_frames == other.num_valid_frames
        and np.array_equal(one.frames, other.frames)
        and np.array_equal(one.frame_pts_seconds, other.frame_pts_seconds)
    )


def _different(words: str) -> VideoError:
    return VideoError(Reason.CUT_DEPENDENT, f"decoded again with another cut, {words}")
