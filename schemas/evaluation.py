"""Settings of ``vidshard evaluate``: what is measured, on which clips, and where the scores go."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Self

from pydantic import model_validator

from vidshard.schemas.fields import ClusterSettings, FrameSize, PageSettings, Rates, setting

Average = Literal["frames", "clips", "videos"]
"""Mean over all frames alike, over the means of clips, or over the means of videos."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Clips and average with which a paper measured."""

    fps: Fraction
    size: tuple[int, int]
    causal_frames: int
    """Frames of a clip for causal tokenizers."""
    noncausal_frames: int
    average: Average
    data: str
    """Data set that the published figures are of."""


PROTOCOLS: dict[str, Protocol] = {
    "mcl_jcv": Protocol(
        fps=Fraction(30), size=(256, 256), causal_frames=17, noncausal_frames=16, average="frames", data="MCL-JCV"
    ),
    "webvid_val": Protocol(
        fps=Fraction(30), size=(256, 256), causal_frames=17, noncausal_frames=16, average="frames", data="WebVid-Val"
    ),
    "vidtwin": Protocol(
        fps=Fraction(25), size=(224, 224), causal_frames=17, noncausal_frames=16, average="clips", data="MCL-JCV"
    ),
    "long_video": Protocol(
        fps=Fraction(30), size=(256, 256), causal_frames=129, noncausal_frames=128, average="frames", data="any"
    ),
}
"""Protocols by name. VidTok's tables are at 30 frames per second and 256x256, VidTwin's at 25 and 224x224. The papers
have no table of long videos; 129 frames are 1 + 8 chunks of 16, as the released v1.1 code cuts a video of 136."""


class EvaluateRun(ClusterSettings, PageSettings):
    """One evaluation of reconstructions: the flags of ``vidshard evaluate``."""

    inputs: list[str] = setting(
        default_factory=list,
        section="Input",
        metavar="VIDEOS",
        identity=False,
        help="Videos: files, folders, globs or manifests, local or at any URL that fsspec opens.",
    )
    tokens: str | None = setting(
        None,
        section="Input",
        metavar="OUTPUT",
        identity=True,
        common=True,
        help="Output of `vidshard tokenize` to evaluate instead of VIDEOS: its stored tokens are decoded and compared.",
    )
    fetch_sources: bool = setting(
        False,
        section="Input",
        identity=False,
        help="With --from, read source videos from remote storage too. The output names them; give this only if you "
        "trust it.",
    )
    allow_private: bool = setting(
        False,
        section="Input",
        identity=False,
        help="Let rows of manifests, --fetch-sources and redirects reach web servers with private addresses. Without "
        "it only servers that VIDEOS or --from names may have such addresses.",
    )
    limit: int | None = setting(
        None, section="Input", ge=1, metavar="N", identity=False, help="Largest number of videos."
    )
    out: str = setting(
        "evaluation",
        section="Output",
        metavar="FOLDER",
        identity=False,
        common=True,
        help="Folder of the scores and tables.",
    )
    format: Literal["text", "markdown", "csv", "json"] = setting(
        "text", section="Output", identity=False, help="Format of the printed table."
    )
    commit_clips: int = setting(
        256,
        section="Output",
        ge=1,
        metavar="N",
        identity=False,
        help="Number of clips after which scores are stored. An interruption loses at most so many.",
    )
    tokenizer: list[str] = setting(
        default_factory=list,
        section="Tokenizers",
        metavar="NAME[=WEIGHTS]",
        identity=False,
        common=True,
        help="Tokenizer to measure: a preset, PRESET=WEIGHTS, a weights file that states its model, "
        "diffusers:FOLDER, or diffusers:OWNER/REPO. Repeat it to compare several on the same frames.",
    )
    ema: bool = setting(
        False, section="Tokenizers", identity=False, help="Take the averaged (EMA) weights of every weights file."
    )
    precision: Literal["float32", "tf32", "float16", "bfloat16"] = setting(
        "float32",
        section="Tokenizers",
        identity=True,
        help="Precision of the networks. The published figures are of float32.",
    )
    protocol: Literal["mcl_jcv", "webvid_val", "vidtwin", "long_video"] | None = setting(
        None,
        section="Clips",
        identity=False,
        common=True,
        help="Protocol of a paper: frame rate, clip length, frame size and average. Flags win over it.",
    )
    fps: Rates | None = setting(
        None,
        section="Clips",
        metavar="RATE[,RATE]",
        identity=False,
        common=True,
        help="Frame rate of the clips, or several, such as 8,30. Default: that of the protocol, or 8.",
    )
    frames: int | None = setting(
        None,
        section="Clips",
        ge=1,
        le=1 << 16,
        metavar="T",
        identity=False,
        common=True,
        help="Number of frames of a clip. Default: that of the protocol, or of each tokenizer.",
    )
    size: FrameSize | None = setting(
        None,
        section="Clips",
        metavar="SIZE",
        identity=False,
        common=True,
        help="Frame size: 256, or HEIGHTxWIDTH. Default: that of the protocol, or of each tokenizer.",
    )
    clips_per_video: int | None = setting(
        None,
        section="Clips",
        ge=1,
        metavar="N",
        identity=False,
        help="Number of clips of each video, evenly placed. Default: all clips, one after the other.",
    )
    average: Average | None = setting(
        None,
        section="Metrics",
        identity=False,
        help="Average that the table shows. Default: that of the protocol, or frames; scores.json holds all three.",
    )
    lpips: bool = setting(True, section="Metrics", identity=False, help="Measure LPIPS with VGG16.")
    vgg_weights: str | None = setting(
        None,
        section="Metrics",
        metavar="FILE",
        identity=False,
        common=True,
        help="File with torchvision's vgg16 weights for LPIPS. Default: torchvision downloads them once, 528 MB.",
    )
    i3d: str | None = setting(
        None,
        section="Metrics",
        metavar="FILE",
        identity=False,
        help="I3D as TorchScript, for FVD. Its program is executed, so give only a file that you trust.",
    )
    batch_size: int = setting(
        1, section="Execution", ge=1, metavar="N", identity=False, help="Number of clips in a forward pass."
    )
    workers: int | None = setting(
        None,
        section="Execution",
        ge=1,
        metavar="N",
        identity=False,
        help="Number of processes that reconstruct and score. Default: one per GPU, or one for every four CPUs.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if bool(self.inputs) == (self.tokens is not None):
            raise ValueError("give VIDEOS, or an output of tokens with --from")
        if self.tokens is not None:
            fixed = ("tokenizer", "protocol", "fps", "frames", "size", "clips_per_video", "ema")
            if given := [name for name in fixed if getattr(self, name)]:
                raise ValueError(
                    f"--from takes tokenizer and clips as the output has them: leave --{given[0].replace('_', '-')} out"
                )
        if self.fps is not None and len(set(self.fps)) < len(self.fps):
            raise ValueError("the same frame rate is given twice")
        return self

    @property
    def shown_average(self) -> Average:
        """Average that the table shows."""
        return self.average or (PROTOCOLS[self.protocol].average if self.protocol else "frames")
