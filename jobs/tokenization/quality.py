"""Quality of a run's clips: what audited ones say about weights, colors and range of values, while it runs and after.

A wrong checkpoint shows in the PSNR alone. A wrong order of colors or a wrong range of values also shows in what would
mend it: then the warning names the cause.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
from rich.console import Console

from vidshard.jobs.runtime.progress import warn
from vidshard.jobs.runtime.terminal import print_field
from vidshard.models.codebook_use import CodebookUse
from vidshard.pipeline.output.quality import NUM_WORST, AuditFigures, OutputQuality, PoorClip
from vidshard.pipeline.rows import QUALITY
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.text import counted
from vidshard.schemas.uris import shown_uri

FEWEST_CLIPS = 10
"""Number of audited clips after which a run that is still going warns for the first time."""
COLOR_GAIN = 1.0
"""Gain in dB, with red and blue exchanged, above which their order counts as wrong. Right weights gained 0.3 dB at most
on natural videos (a parking lot without colors); exchanged ones 2.5 to 5.9 dB (four videos, fsq_causal_488_small)."""
RANGE_GAIN = 3.0
"""Gain in dB, with the best scale and offset of all values, above which their range counts as wrong."""
RANGE_CORRELATION = 0.9
"""Correlation of source and reconstruction below which no other range would help."""
NUM_NAMED = 5
"""Number of the worst videos that are named."""


@dataclass(frozen=True, kw_only=True)
class CodebookFigures:
    """Use of the codebook of a payload column."""

    column: str
    size: int
    tokens: int
    """Number of tokens of the clips."""
    used: int
    """Number of different tokens among them."""
    ceiling: int
    """Largest number of different tokens that could have occurred: min(tokens, size)."""
    used_of_ceiling: float
    dead: int
    """Number of tokens of the codebook that never occurred."""
    perplexity: float
    entropy_bits: float

    @classmethod
    def of(cls, column: str, use: CodebookUse) -> CodebookFigures:
        """Figures of a count of tokens."""
        return cls(
            column=column,
            size=use.codebook_size,
            tokens=use.num_tokens,
            used=use.num_used,
            ceiling=use.ceiling,
            used_of_ceiling=use.share_of_ceiling,
            dead=use.codebook_size - use.num_used,
            perplexity=use.perplexity,
            entropy_bits=use.entropy_bits,
        )

    def __str__(self) -> str:
        return (
            f"{self.used:,} of {self.size:,} tokens used, {self.used_of_ceiling:.1%} of the {self.ceiling:,} that "
            f"could be; perplexity {self.perplexity:,.0f}, {self.dead:,} dead codes"
        )


@dataclass(frozen=True, kw_only=True)
class QualitySummary:
    """Quality of all audited clips of an output, by this run and by earlier ones: part of ``summary.json``."""

    share: float
    """Share of the clips that this run audits."""
    min_psnr: float
    """PSNR in dB below which the run warns."""
    num_clips: int
    num_failed: int
    """Number of chosen clips that could not be decoded for want of memory."""
    psnr: float | None
    """Mean in dB over the audited clips; None without one."""
    ssim: float | None
    lpips: float | None
    """Mean over the audited clips; None where VGG16 was not at hand."""
    psnr_histogram: dict[str, int]
    """Number of clips by whole dB, rounded down."""
    worst: Sequence[PoorClip]
    """Clips with the lowest PSNR, one of each video, the worst first."""
    codebooks: Sequence[CodebookFigures]
    """Use of the codebook by all clips, audited or not; empty for latents."""
    num_shards: int
    num_shards_without: int
    """Number of shards without such figures, which a run without ``--audit`` wrote."""
    findings: Sequence[str]
    """Reasons to distrust the output; empty if there are none."""

    @classmethod
    def of(cls, run: TokenizeRun, quality: OutputQuality) -> QualitySummary:
        """Sum up the quality of an output."""
        figures = quality.figures
        return cls(
            share=run.audit,
            min_psnr=run.audit_min_psnr,
            num_clips=figures.num_clips,
            num_failed=figures.num_failed,
            psnr=figures.mean("psnr"),
            ssim=figures.mean("ssim"),
            lpips=figures.mean("lpips"),
            psnr_histogram=dict(sorted(figures.psnr_histogram.items(), key=lambda item: int(item[0]))),
            worst=figures.worst,
            codebooks=[CodebookFigures.of(name, use) for name, use in quality.codebooks.items() if use.num_tokens],
            num_shards=quality.num_shards,
            num_shards_without=quality.num_without,
            findings=findings(figures, run.audit_min_psnr),
        )

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def findings(figures: AuditFigures, min_psnr: float) -> list[str]:
    """Reasons to distrust what was encoded, by its audited clips; none if there are none."""
    found: list[str] = []
    mean = figures.mean("psnr")
    if mean is None:
        return found
    if mean < min_psnr:
        found.append(
            f"the mean PSNR of {figures.num_clips} audited clips is {mean:.1f} dB, below --audit-min-psnr "
            f"{min_psnr:g}: are these the weights of this tokenizer and version, trained on such videos?"
        )
    elif low := [clip for clip in figures.worst if clip.psnr < min_psnr]:
        found.append(
            f"audited clips of {'at least ' if len(low) == NUM_WORST else ''}{len(low)} videos have a PSNR below "
            f"--audit-min-psnr {min_psnr:g}"
        )
    return [*found, *_causes(figures.moments)]


def _causes(moments: Sequence[float]) -> list[str]:
    """Causes that would explain the error: red and blue exchanged, another range of values."""
    count, real, fake, real_real, real_fake, fake_fake, exchanged = moments
    error = real_real - 2 * real_fake + fake_fake
    if not count or error <= 0:
        return []
    causes = []
    if _gain(error, exchanged) > COLOR_GAIN:
        causes.append(
            f"with red and blue exchanged the reconstructions are {_gain(error, exchanged):.1f} dB better: the weights "
            "take another order of colors than RGB"
        )
    real_variance = real_real - real * real / count
    fake_variance = fake_fake - fake * fake / count
    covariance = real_fake - real * fake / count
    if min(real_variance, fake_variance) <= 0:
        return causes
    scale = covariance / fake_variance
    offset = (real - scale * fake) / count
    gain = _gain(error, real_variance - covariance * scale)
    correlation = covariance / math.sqrt(real_variance * fake_variance)
    if gain > RANGE_GAIN and correlation > RANGE_CORRELATION:
        causes.append(
            f"scaled by {scale:.2f} and moved by {offset:+.2f} the reconstructions are {gain:.1f} dB better: the "
            "weights take another range of values than [-1, 1]"
        )
    return causes


def _gain(before: float, after: float) -> float:
    """Gain in dB between two squared errors."""
    return 10 * math.log10(before / max(after, 1e-12 * before))


@dataclass(kw_only=True)
class QualityWatch:
    """Audited clips of a run as they come, to warn long before its end."""

    min_psnr: float
    console: Console
    figures: AuditFigures = field(default_factory=AuditFigures)
    _checked: int = 0
    _has_warned: bool = False

    def take(self, receipts: pa.Table) -> None:
        """Take receipts that came out; warns once, after at least `FEWEST_CLIPS` audited clips."""
        if self._has_warned or QUALITY.name not in receipts.schema.names:
            return
        for row in receipts.select(["uri", "span_id", QUALITY.name]).to_pylist():
            for number, scores in enumerate(row[QUALITY.name]):
                if scores is not None:
                    self.figures.take(scores, f"clip {number} of span {row['span_id']}", shown_uri(row["uri"]))
        if self.figures.num_clips < max(FEWEST_CLIPS, 2 * self._checked):
            return
        self._checked = self.figures.num_clips
        mean = self.figures.mean("psnr")
        if (mean is not None and mean < self.min_psnr) or _causes(self.figures.moments):
            self._has_warned = True
            for finding in findings(self.figures, self.min_psnr):
                warn(self.console, f"audit: {finding}")


def print_quality(quality: QualitySummary, console: Console) -> None:
    """Print the lines of the summary about quality, with warnings."""

    line = partial(print_field, console)
    if quality.psnr is None:
        line("audit", f"no clip was audited: --audit {quality.share:g} chose none")
    else:
        ssim = "" if quality.ssim is None else f", SSIM {quality.ssim:.3f}"
        lpips = ", LPIPS not measured" if quality.lpips is None else f", LPIPS {quality.lpips:.3f}"
        line("audit", f"PSNR {quality.psnr:.2f} dB{ssim}{lpips}: means of {counted(quality.num_clips, 'clip')}")
    if quality.num_failed:
        line("", f"{quality.num_failed} chosen clips were not audited: too little memory to decode them")
    for codebook in quality.codebooks:
        line("codebook", f"{codebook.column}: {codebook}" if len(quality.codebooks) > 1 else str(codebook))
    if quality.num_shards_without:
        line("", f"{quality.num_shards_without} of {quality.num_shards} shards have no such figures")
    for finding in quality.findings:
        warn(console, f"audit: {finding}")
    if quality.findings:
        for clip in quality.worst[:NUM_NAMED]:
            line("worst", f"{clip.psnr:.1f} dB: {clip.clip_id} of {shown_uri(clip.uri)}")
