"""Variation of training clips: frame rates, crops at native resolution, mirroring, clips longer than their video.

Every choice follows from the seed of the round, the video and the place in it. So a resumed run, and one with other
workers, takes the same pixels. Nothing is opened here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from vidshard.pipeline.training_data.videos import stable_hash
from vidshard.schemas.training import CropPolicy, ShortVideos, StageConfig
from vidshard.schemas.video import Clip, ClipSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Variation:
    """Choices that a stage makes for each of its clips; the defaults make none."""

    crop: CropPolicy = "scaled"
    flip_share: float = 0.0
    """Share of the clips that are mirrored left to right, in [0, 1]."""
    short_videos: ShortVideos = "reject"
    more_fps: tuple[Fraction, ...] = ()
    """Frame rates of clips besides the one of the stage."""

    @classmethod
    def of(cls, stage: StageConfig, *, held_out: bool = False) -> Variation:
        """Variation of a stage. Held-out clips are cut and shown as by ``vidshard tokenize``, whatever a stage does."""
        if held_out:
            return cls(short_videos=stage.short_videos)
        return cls(
            crop=stage.crop,
            flip_share=stage.flip_share,
            short_videos=stage.short_videos,
            more_fps=tuple(stage.more_fps or ()),
        )

    @property
    def ways(self) -> tuple[str, ...]:
        """Ways of ``MADE`` that these choices can lead to."""
        crops = ("native", "enlarged") if self.crop == "native" else ()
        mirrored = ("mirrored",) if self.flip_share else ()
        short = {"reject": (), "repeat": ("repeated",), "squeeze": ("repeated", "squeezed")}[self.short_videos]
        return crops + mirrored + short + (("other_fps",) if self.more_fps else ())

    @property
    def decoded(self) -> str:
        """Text of the choices that decide what is decoded, for the folder of a cache; empty for the defaults."""
        choices = [f"crop={self.crop}"] if self.crop != "scaled" else []
        choices += [f"short={self.short_videos}"] if self.short_videos != "reject" else []
        choices += [f"more_fps={','.join(map(str, self.more_fps))}"] if self.more_fps else []
        return " ".join(choices)

    def spec_of(self, item: Mapping[str, Any], spec: ClipSpec) -> ClipSpec:
        """Clip specification of one item.

        Args:
            item: row of ``ITEM_SCHEMA`` with its ``placement_seed``.
            spec: the one of the stage, with the places of the item's round.
        """
        spec = replace(spec, fps=self.fps_of(item, spec))
        if self.crop == "native":
            spec = replace(spec, resize="native", cut_place=(_share("left", item), _share("top", item)))
        if self.short_videos == "reject":
            return spec
        seconds = seconds_of(item)
        if self.short_videos == "squeeze" and is_short(item, spec):
            spec = replace(spec, fps=spec.num_frames / seconds)
        return replace(spec, tail="pad")

    def fps_of(self, item: Mapping[str, Any], spec: ClipSpec) -> Fraction:
        """Frame rate of the clip of an item in its round, before a short video is squeezed.

        Args:
            item: row of ``ITEM_SCHEMA`` with its ``placement_seed``.
            spec: the one of the stage, whose rate is always among those that are drawn from.
        """
        own = item["source_fps"]
        others = [
            fps
            for fps in self.more_fps
            if not 0 < own < 0.99 * fps and not is_short(item, replace(spec, fps=fps))  # 29.97 for 30
        ]
        rates = [spec.fps, *others]
        return rates[int(_share("fps", item) * len(rates))]

    def mirrors(self, item: Mapping[str, Any]) -> bool:
        """Whether the clip of an item is mirrored in its round."""
        return self.flip_share > 0 and _share("mirror", item) < self.flip_share

    def made(self, item: Mapping[str, Any], clip: Clip, spec: ClipSpec) -> list[str]:
        """Ways of ``MADE`` in which a decoded clip was made; mirroring is left to the caller.

        Args:
            item: row of ``ITEM_SCHEMA``.
            clip: as decoded.
            spec: the one of the stage, before `spec_of`.
        """
        fps = self.fps_of(item, spec)
        made = [] if fps == spec.fps else ["other_fps"]
        spec = replace(spec, fps=fps)
        if self.crop == "native":
            source = (item["source_height"], item["source_width"])
            fits = all(side >= cut for side, cut in zip(source, (spec.height, spec.width), strict=True))
            made.append("native" if fits else "enlarged")
        if self.short_videos == "squeeze" and is_short(item, spec):
            made.append("squeezed")
        elif clip.num_valid_frames < spec.num_frames:
            made.append("repeated")
        return made


def is_short(item: Mapping[str, Any], spec: ClipSpec) -> bool:
    """Whether a video or part is shorter than a clip by its header; one of unknown length (0) is not."""
    return 0 < seconds_of(item) < (spec.num_frames - 1) / spec.fps


def seconds_of(item: Mapping[str, Any]) -> Fraction:
    """Length of an item's video, or of its part, in seconds by the header; 0 where it is unknown."""
    seconds = Fraction(item["duration_seconds_from_header"])
    start, end = (item.get(f"part_{side}_seconds") for side in ("start", "end"))
    if not seconds:
        return seconds
    end = seconds if end is None else min(seconds, Fraction(str(end)))
    return max(Fraction(0), end - Fraction(str(start or 0)))


def _share(purpose: str, item: Mapping[str, Any]) -> float:
    """Number in [0, 1) that follows from an item, its round and a purpose."""
    names = ("placement_seed", "video_id", "part_start_seconds", "part_end_seconds", "number")
    return int(stable_hash(purpose, *(item[name] for name in names))[:13], 16) / 16**13
