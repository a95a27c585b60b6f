"""What people configure of a training: of one stage (the defaults are stage 1 of the paper), and of the whole run.

Tang et al., "VidTok: A Versatile and Open-Source Video Tokenizer", 2024, and the configurations released with it.
Stage 2 is ``trainable="decoder"`` at a higher resolution. All steps are batches, see `StageConfig.gan_start`.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, model_validator

from vidshard.schemas.fields import ClusterSettings, FrameSize, Rate, Settings, setting
from vidshard.schemas.video import ClipSpec


def parse_betas(value: object) -> object:
    """Two numbers from ``0.9,0.999``; other values as they are."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Betas = Annotated[tuple[float, float], BeforeValidator(parse_betas)]


class StageConfig(Settings):
    """Everything that decides one stage, but for the tokenizer and the videos."""

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
        help="Take each worker's part of a batch in N pieces one after the other, where memory does not hold it. The "
        "entropy of the codebook, the adaptive weight and batch norm then see a piece at a time.",
    )
    seed: int = setting(0, section="Stage", ge=0, lt=1 << 63, metavar="SEED", help="Of everything random in a stage.")

    learning_rate: float = setting(1e-5, section="Optimizer", gt=0, metavar="RATE", help="Of Adam, for the tokenizer.")
    discriminator_learning_rate: float | None = setting(
        None, section="Optimizer", gt=0, metavar="RATE", help="For the discriminator. Default: the tokenizer's."
    )
    adam_betas: Betas = setting(
        (0.9, 0.999), section="Optimizer", metavar="A,B", help="Decay of Adam's two averages, for both networks."
    )
    warmup_steps: int = setting(
        0,
        section="Optimizer",
        ge=0,
        metavar="N",
        help="The rate rises linearly over so many steps; the discriminator's from --gan-start on.",
    )
    schedule: Literal["constant", "cosine"] = setting(
        "constant", section="Optimizer", help="After that: as it is, or down along a cosine until the last step."
    )
    final_rate_share: float = setting(
        0.0, section="Optimizer", ge=0, le=1, metavar="SHARE", help="Where the cosine ends, as a share of the rate."
    )
    clip_norm: float = setting(
        20.0, section="Optimizer", gt=0, metavar="NORM", help="Longest gradient of either network; longer ones are cut."
    )
    ema_decay: float = setting(
        0.999,
        section="Optimizer",
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
    with Lightning's ``global_step``, which two optimizers raise twice a batch, so its adversary begins after some
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

    def clip_spec(self, *, clips_per_video: int, placement: Literal["even", "random"] = "random") -> ClipSpec:
        """How videos become clips of this stage: whole ones only, at so many places of each video."""
        return ClipSpec(
            fps=self.fps,
            num_frames=self.frames,
            height=self.size[0],
            width=self.size[1],
            tail="drop",
            clips_per_video=clips_per_video,
            placement=placement,
        )


WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
"""By which a file of weights is told from the folder of a stage."""


def split_weight(text: str) -> tuple[str, float | None]:
    """A path and its weight, from ``clips/=0.7``; without a number behind the last ``=`` all of it is the path.

    Raises:
        ValueError: a weight that is not positive.
    """
    match = re.fullmatch(r"(.+)=((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)", text)
    if match is None:
        return text, None
    if not 0 < float(match[2]) < math.inf:
        raise ValueError(f"a weight must be positive and finite, got {text!r}: leave the folder out instead")
    return match[1], float(match[2])


def join_weight(path: str, weight: float | None) -> str:
    """The text that `split_weight` makes these of, but for a ``/`` behind a folder that looks as if it had a weight."""
    if weight is not None:
        return f"{path}={weight!r}"
    return path if split_weight(path)[1] is None else f"{path}/"


Metric = Literal["psnr", "ssim", "lpips", "l1", "codebook_utilisation", "codebook_entropy_bits", "codebook_perplexity"]
"""What is measured on held-out clips, where it can be: SSIM of frames as large as its window, LPIPS where it is trained
with, the use of a codebook where there is one that can be counted."""

LOWER_IS_BETTER = frozenset(["l1", "lpips"])
"""Of what is measured on held-out clips; of everything else more is better."""


class RunSettings(ClusterSettings):
    """What decides a training run beside its stages."""

    videos: list[str] = setting(
        section="Data",
        min_length=1,
        metavar="PATH[=WEIGHT]",
        help="Videos: a file, folder, glob or manifest, local or any URL that fsspec opens. Give it once for each "
        "corpus; a/=0.7 and b/=0.3 draw so many of the clips from each. Without weights every video is drawn as often.",
    )
    held_out: float = setting(
        0.05,
        section="Data",
        ge=0,
        lt=1,
        metavar="SHARE",
        help="Share of the videos, at least one, that is never trained on: a reconstruction is measured on them. "
        "Chosen by content, so copies cannot leak; a second stage measures on none that the first trained on.",
    )
    clips_per_video: int = setting(
        1, section="Data", ge=1, metavar="N", help="Random clips of each video in an epoch; each epoch takes others."
    )
    cache: str | None = setting(
        None,
        section="Data",
        metavar="FOLDER",
        help="Decode the clips of one epoch once, keep them there as uint8 Parquet, and take these in every epoch.",
    )
    tokenizer: str | None = setting(
        None, section="Model", metavar="NAME", help="What to train: a name from `vidshard tokenizers`."
    )
    start_from: str | None = setting(
        None,
        section="Model",
        metavar="FROM",
        help="Begin with a finished stage, such as runs/mine/stage1, or with weights: a file, URL or hf://OWNER/REPO/"
        "PATH. In YAML: start_from.",
    )
    out: str = setting(section="Output", metavar="FOLDER", help="Folder of the run, local or remote.")
    checkpoint_steps: int = setting(
        1000,
        section="Output",
        ge=1,
        metavar="N",
        help="Keep a checkpoint every N steps: what an interruption can cost.",
    )
    keep_last: int = setting(2, section="Output", ge=1, metavar="K", help="Keep so many of the last checkpoints,")
    best_by: Metric = setting("psnr", section="Output", help="and the best by this figure of held-out clips.")
    evaluate_steps: int = setting(
        1000, section="Watching", ge=1, metavar="N", help="Look at held-out clips every N steps."
    )
    eval_clips: int = setting(64, section="Watching", ge=1, metavar="N", help="How many of them at most.")
    pictures: int = setting(4, section="Watching", ge=0, metavar="N", help="Of so many, draw the frames side by side.")
    log_steps: int = setting(
        10, section="Watching", ge=1, metavar="N", help="Write down losses and speed every N steps."
    )
    wandb: str | None = setting(
        None, section="Watching", metavar="PROJECT", help="Also log to this project of Weights & Biases."
    )
    workers: int | None = setting(
        None, section="Execution", ge=1, metavar="N", help="Training processes. Default: one for each GPU, or one."
    )
    threads: int | None = setting(
        None, section="Execution", ge=1, metavar="N", help="Threads of a worker on CPUs. Default: CPUs by workers."
    )
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", section="Execution", help="Whole weights on every worker, or the tokenizer's sharded (FSDP2)."
    )
    compile: bool = setting(
        False,
        section="Execution",
        help="Compile the tokenizer: torch.compile. For GPUs: on a CPU it takes many minutes.",
    )
    max_failures: int = setting(
        3, section="Execution", ge=0, metavar="N", help="Go on from the last checkpoint so often after a worker died."
    )

    @model_validator(mode="after")
    def _corpora_that_can_be(self) -> Self:
        weights = [weight for _, weight in self.corpora]
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError("give every --videos a weight, as in a/=0.7 and b/=0.3, or none of them")
        return self

    @property
    def corpora(self) -> list[tuple[str, float | None]]:
        """Paths and their weights."""
        return [split_weight(text) for text in self.videos]


IDENTITY = ("videos", "held_out", "clips_per_video", "tokenizer", "start_from")
"""Settings that decide what a run computes; with other ones it is another run. A cache only saves decoding, but its
clips are the same in every epoch."""


class TrainRun(RunSettings):
    """A complete training run, as presets return it and as it is stored."""

    stages: dict[str, StageConfig]
    """One after the other: each goes on with the tokenizer of the one before."""

    @property
    def identity(self) -> dict[str, object]:
        """What must be the same for a run to go on."""
        record = self.model_dump(mode="json")
        return {name: record[name] for name in (*IDENTITY, "stages")} | {"cached": self.cache is not None}


class TrainFlags(RunSettings, StageConfig):
    """What the command line and a YAML file say: of what they don't, the preset decides."""

    preset: str | None = setting(
        None,
        section="Settings",
        metavar="NAME",
        help="Where everything starts that is not said: tiny, small, paper_stage1, paper_stage2, paper, long_video or "
        "domain.",
    )
    stage1: dict[str, object] = setting(
        {}, section="Settings", metavar="KEY=VALUE", help="A setting of stage 1 alone, such as steps=1000."
    )
    stage2: dict[str, object] = setting(
        {}, section="Settings", metavar="KEY=VALUE", help="A setting of stage 2 alone, such as size=256."
    )
