"""What people configure of one stage of training. The defaults are stage 1 of the paper.

Tang et al., "VidTok: A Versatile and Open-Source Video Tokenizer", 2024, and the configurations released with it.
Stage 2 is ``trainable="decoder"`` at a higher resolution. All steps are batches, see `StageConfig.gan_start`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from schemas.runs import FrameSize, Rate, setting


class StageConfig(BaseModel):
    """Everything that decides one stage, but for the tokenizer and the videos."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    trainable: Literal["all", "decoder"] = setting(
        "all",
        section="Stage",
        help="What learns: all of the tokenizer, or its decoder alone. With 'decoder', encoder and head keep their "
        "bytes, so tokens made before stay valid.",
    )
    frames: int = setting(17, section="Stage", ge=1, metavar="T", help="Frames of a clip.")
    size: FrameSize = setting((128, 128), section="Stage", metavar="SIZE", help="Frame size: 128, or height x width.")
    fps: Rate = setting(
        Fraction(3), section="Stage", metavar="RATE", help="Frames per second of the clips; the paper found 3 best."
    )
    steps: int = setting(50_000, section="Stage", ge=1, metavar="N", help="Steps of the stage, one batch each.")
    clips_per_step: int = setting(
        16, section="Stage", ge=1, metavar="N", help="Clips of a batch, over all workers together."
    )
    accumulate: int = setting(
        1,
        section="Stage",
        ge=1,
        metavar="N",
        help="Take each worker's part of a batch in N pieces one after the other, where memory does not hold it.",
    )
    seed: int = setting(0, section="Stage", ge=0, metavar="SEED", help="Of everything random in a stage.")

    learning_rate: float = setting(1e-5, section="Optimiser", gt=0, metavar="RATE", help="Of Adam, for the tokenizer.")
    discriminator_learning_rate: float | None = setting(
        None, section="Optimiser", gt=0, metavar="RATE", help="For the discriminator. Default: the tokenizer's."
    )
    adam_betas: tuple[float, float] = setting(
        (0.9, 0.999), section="Optimiser", help="Decay of Adam's two averages, for both networks."
    )
    warmup_steps: int = setting(
        0,
        section="Optimiser",
        ge=0,
        metavar="N",
        help="The rate rises linearly over so many steps; the discriminator's from --gan-start on.",
    )
    schedule: Literal["constant", "cosine"] = setting(
        "constant", section="Optimiser", help="After that: as it is, or down along a cosine until the last step."
    )
    final_rate_share: float = setting(
        0.0, section="Optimiser", ge=0, le=1, metavar="SHARE", help="Where the cosine ends, as a share of the rate."
    )
    clip_norm: float = setting(
        20.0, section="Optimiser", gt=0, metavar="NORM", help="Longest gradient of either network; longer ones are cut."
    )
    ema_decay: float = setting(
        0.999,
        section="Optimiser",
        ge=0,
        lt=1,
        metavar="DECAY",
        help="Keep an average of the weights over about 1 / (1 - DECAY) steps, with a quicker one at the start; 0 for "
        "none.",
    )

    l1_weight: float = setting(1.0, section="Losses", ge=0, metavar="WEIGHT", help="Of the absolute difference.")
    perceptual_weight: float = setting(
        1.0, section="Losses", ge=0, metavar="WEIGHT", help="Of LPIPS with VGG, from the lpips package; 0 for none."
    )
    vgg_weights: str | None = setting(
        None,
        section="Losses",
        metavar="FILE",
        help="torchvision's vgg16 weights for LPIPS. Default: torchvision downloads them once, 528 MB.",
    )
    learn_logvar: bool = setting(
        True, section="Losses", help="Learn how large the differences are, one number that weighs L1 and LPIPS."
    )
    kl_weight: float = setting(1e-6, section="Losses", ge=0, metavar="WEIGHT", help="KL: of the divergence of a clip.")
    entropy_weight: float = setting(
        0.1,
        section="Losses",
        ge=0,
        metavar="WEIGHT",
        help="FSQ, LFQ: of the entropy of tokens less that of the codebook.",
    )
    entropy_start_factor: float = setting(
        3.0, section="Losses", ge=0, metavar="FACTOR", help="It begins at so many times that weight, and falls"
    )
    entropy_anneal_steps: int = setting(2000, section="Losses", ge=0, metavar="N", help="linearly over so many steps.")
    codebook_entropy_share: float = setting(
        1.0, section="Losses", ge=0, metavar="SHARE", help="The codebook's part in it: more spreads tokens more evenly."
    )
    commitment_weight: float = setting(
        0.25,
        section="Losses",
        ge=0,
        metavar="WEIGHT",
        help="FSQ, LFQ, VQ: of the encoder's squared distance from its codes.",
    )
    codebook_weight: float = setting(
        1.0, section="Losses", gt=0, metavar="WEIGHT", help="VQ: of the codebook's squared distance from the encoder."
    )

    discriminator: Literal["2d", "3d"] = setting(
        "2d", section="Adversary", help="Whether the discriminator sees single frames or whole clips."
    )
    gan_weight: float = setting(
        0.2,
        section="Adversary",
        ge=0,
        metavar="WEIGHT",
        help="Of the adversarial term, after it was made as strong as the others at the decoder's last layer; 0 for no "
        "discriminator.",
    )
    gan_start: int = setting(
        20_001,
        section="Adversary",
        ge=0,
        metavar="STEP",
        help="Steps without it at the start. Steps are batches: the reference counts two for each, so its 20001 is "
        "10000 here.",
    )
    """In batches, like every number of steps here. The reference's threshold is the same 20,001, but it is compared
    with Lightning's ``global_step``, which two optimisers raise twice a batch, so its adversary begins after some
    10,000 batches. Whoever wants what it does sets 10000; the paper's words mean what stands here. The annealing of
    the entropy was halved there, and is in batches in both."""
    gan_loss: Literal["softplus", "hinge"] = setting(
        "softplus",
        section="Adversary",
        help="How the tokenizer meets it: non-saturating over a frame's mean score, or the mean score itself.",
    )
    discriminator_width: int = setting(
        64, section="Adversary", ge=1, metavar="N", help="Channels of the discriminator's first layer."
    )
    lecam_weight: float = setting(
        0.005, section="Adversary", ge=0, metavar="WEIGHT", help="Of the discriminator's LeCam regularisation."
    )
    lecam_decay: float = setting(
        0.999, section="Adversary", ge=0, lt=1, metavar="DECAY", help="Of the average scores it holds to."
    )

    precision: Literal["float32", "bfloat16"] = setting(
        "bfloat16",
        section="Execution",
        help="What convolutions compute in. Weights, losses, quantizer and averages are float32 in either.",
    )
    recompute: bool = setting(
        False,
        section="Execution",
        help="Compute layers again for gradients rather than keep what they gave: a third more work, far less memory.",
    )
    divergence_l1: float = setting(
        1.0,
        section="Execution",
        gt=0,
        metavar="L1",
        help="Stop when the average L1 passes this; grey frames alone have at most 1.",
    )
    divergence_after: int = setting(
        500, section="Execution", ge=1, metavar="STEPS", help="Steps before that is looked at."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas must lie in [0, 1), got {self.adam_betas}")
        if self.l1_weight == self.perceptual_weight == 0:
            raise ValueError("l1_weight and perceptual_weight are both 0: nothing would hold the reconstruction")
        if self.clips_per_step % self.accumulate:
            raise ValueError(
                f"clips_per_step must be a multiple of accumulate, got {self.clips_per_step} and {self.accumulate}"
            )
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps must be below steps, got {self.warmup_steps} of {self.steps}")
        return self

    @property
    def has_adversary(self) -> bool:
        """Whether the discriminator ever matters."""
        return self.gan_weight > 0 and self.gan_start < self.steps
