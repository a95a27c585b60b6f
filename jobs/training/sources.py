"""Sources of the settings in the presets that follow a publication: paper, released files, or a decision of ours.

One entry for each setting of a stage, so that nobody takes a decision of ours for a published value. A test compares
every stated value with the preset, and `docs/training.md` prints the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

Kind = Literal["paper", "released", "ours"]
"""Origin of a value: the paper, the released code with its configurations and README, or our decision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Source of one setting in one preset."""

    kind: Kind
    value: Any
    """The value there, in our units; for "ours" the value of the preset."""
    note: str = ""
    """Remark that belongs to the value."""


def _paper(value: Any, note: str = "") -> Source:
    return Source(kind="paper", value=value, note=note)


def _released(value: Any, note: str = "") -> Source:
    return Source(kind="released", value=value, note=note)


def _ours(value: Any, note: str = "") -> Source:
    return Source(kind="ours", value=value, note=note)


_UNSAID = "whether batches or optimizer steps (two per batch) are meant is not said; batches here"

_VIDTOK = {
    "trainable": _paper("all"),
    "frames": _paper(17),
    "size": _paper((128, 128)),
    "fps": _paper(Fraction(3)),
    "more_fps": _released(None),
    "crop": _released("scaled"),
    "flip_share": _released(0.0),
    "short_videos": _ours("reject", "released: squeezed, or the last frame repeated, by the reader of videos"),
    "steps": _released(50_000, _UNSAID),
    "batch_size": _released(16, "2 clips a GPU"),
    "gradient_accumulation": _ours(1),
    "seed": _ours(0),
    "optimizer": _released("adam"),
    "learning_rate": _released(1e-5),
    "discriminator_learning_rate": _released(None, "both networks have one rate"),
    "adam_betas": _released((0.9, 0.999)),
    "weight_decay": _released(0.0),
    "warmup_steps": _released(0),
    "schedule": _released("constant"),
    "final_rate_share": _ours(0.0, "not used with a constant rate"),
    "max_grad_norm": _released(20.0),
    "ema_decay": _released(0.0, "commented out in all 23 configurations"),
    "l1_weight": _released(1.0),
    "perceptual_weight": _released(1.0, "the released code has dropout in LPIPS from its first pictures on; none here"),
    "vgg_weights": _ours(None, "torchvision's download"),
    "learn_logvar": _released(True),
    "kl_weight": _released(1e-6),
    "entropy_weight": _released(0.1),
    "entropy_affinity": _released("dot"),
    "entropy_start_factor": _released(3.0),
    "entropy_anneal_steps": _released(2000),
    "codebook_entropy_share": _ours(
        1.0,
        "the released code divides this gradient by the number of ranks; 0.125 is what its 8 ranks of 2 clips did",
    ),
    "commitment_weight": _released(0.25),
    "codebook_weight": _ours(1.0, "VQ alone, whose configuration is not published"),
    "discriminator": _released("2d"),
    "gan_weight": _released(0.2),
    "gan_start": _released(10_000, "stated as global step 20,001, which two optimizers raise twice per batch"),
    "gan_loss": _released("softplus"),
    "discriminator_width": _released(64),
    "lecam_weight": _released(0.005),
    "lecam_decay": _released(0.999),
    "precision": _released("bfloat16", "bf16-mixed"),
    "activation_checkpointing": _ours(False),
    "divergence_l1": _ours(1.0),
    "divergence_after": _ours(500),
    "max_skipped_batches": _ours(0),
}

_VIDTOK_STAGE_2 = _VIDTOK | {
    "trainable": _paper("decoder"),
    "size": _paper((256, 256)),
    "steps": _released(30_000, _UNSAID),
    "batch_size": _released(8, "1 or 2 clips a GPU"),
}

_VIDTWIN = {
    "trainable": _paper("all"),
    "frames": _paper(16),
    "size": _paper((224, 224)),
    "fps": _paper(Fraction(8)),
    "more_fps": _released(None),
    "crop": _released("scaled"),
    "flip_share": _released(0.0),
    "short_videos": _ours("reject", "released: squeezed, or the last frame repeated, by the reader of videos"),
    "steps": _ours(100_000, "not published"),
    "batch_size": _paper(24, "6 clips on each of 4 GPUs; released: 2 on each of 4"),
    "gradient_accumulation": _ours(1),
    "seed": _ours(0),
    "optimizer": _paper("adam", "released: adamw"),
    "learning_rate": _paper(1.6e-4, "released: 3e-5"),
    "discriminator_learning_rate": _ours(None, "the tokenizer's; released: 1.5e-5"),
    "adam_betas": _paper((0.9, 0.99), "released: 0 and 0.9"),
    "weight_decay": _paper(1e-4),
    "warmup_steps": _paper(5000),
    "schedule": _paper("cosine"),
    "final_rate_share": _ours(0.0, "released: about 0.85 on 4 GPUs"),
    "max_grad_norm": _released(0.0),
    "ema_decay": _released(0.0),
    "l1_weight": _released(1.0),
    "perceptual_weight": _released(0.05),
    "vgg_weights": _ours(None, "torchvision's download"),
    "learn_logvar": _released(True),
    "kl_weight": _released(1e-3),
    "entropy_weight": _ours(0.1, "no effect: latents are continuous"),
    "entropy_affinity": _ours("dot", "no effect"),
    "entropy_start_factor": _ours(3.0, "no effect"),
    "entropy_anneal_steps": _ours(2000, "no effect"),
    "codebook_entropy_share": _ours(1.0, "no effect"),
    "commitment_weight": _ours(0.25, "no effect"),
    "codebook_weight": _ours(1.0, "no effect"),
    "discriminator": _released("2d"),
    "gan_weight": _released(0.05),
    "gan_start": _released(10_000, "stated as global step 20,001, two per batch"),
    "gan_loss": _released("hinge"),
    "discriminator_width": _released(64),
    "lecam_weight": _released(0.0),
    "lecam_decay": _ours(0.999, "no effect: LeCam has no weight"),
    "precision": _ours("bfloat16", "released: float16 within the blocks"),
    "activation_checkpointing": _ours(False),
    "divergence_l1": _ours(1.0),
    "divergence_after": _ours(500),
    "max_skipped_batches": _ours(0),
}

SOURCES: dict[str, dict[str, Source]] = {
    "paper_stage1": _VIDTOK,
    "paper_stage2": _VIDTOK_STAGE_2,
    "vidtwin": _VIDTWIN,
}
"""Source of every setting by preset and name of the setting: VidTok (Tang et al., 2024) and VidTwin (Wang et al., CVPR
2025, Table 6). All other presets are ours; where they leave a setting out, it is that of ``paper_stage1``."""
