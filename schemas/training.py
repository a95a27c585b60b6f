"""Settings of training: of one stage, of a whole run, and of the ``vidshard train`` commands.

The defaults are stage 1 of Tang et al., "VidTok: A Versatile and Open-Source Video Tokenizer", 2024, with the
configurations released with it. Stage 2 is ``trainable="decoder"`` at a higher resolution. Steps are always counted in
batches; see ``gan_start`` for the one place where the released code counts otherwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, model_validator

from vidshard.schemas.fields import (
    ClusterSettings,
    FrameSize,
    PageSettings,
    Pairs,
    Rate,
    Rates,
    Settings,
    setting,
    setting_of,
)
from vidshard.schemas.uris import typed_hosts
from vidshard.schemas.video import ClipSpec, Limits

T = TypeVar("T")


def parse_betas(value: object) -> object:
    """Split ``0.9,0.999`` into its two numbers; other values stay as they are."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


CropPolicy = Literal["scaled", "native"]
"""Way in which frames of a video become frames of a clip."""
ShortVideos = Literal["reject", "repeat", "squeeze"]
"""Treatment of videos shorter than a clip."""
MADE = {
    "native": "cut at native resolution",
    "enlarged": "enlarged",
    "mirrored": "mirrored",
    "repeated": "lengthened by repeated frames",
    "squeezed": "sampled more densely",
    "other_fps": "of another frame rate",
}
"""Ways in which a training clip may be made, and words for them. It may have several, but not both ``native`` and
``enlarged``."""

Betas = Annotated[tuple[float, float], BeforeValidator(parse_betas)]
"""Decay rates of Adam's two moment estimates, each in [0, 1)."""


# One stage


class ClipSettings(Settings):
    """Clips and batches of a stage."""

    trainable: Literal["all", "decoder"] = setting(
        "all",
        section="Model",
        help="Weights that are trained. With 'decoder', which VidTok alone has, encoder and quantizer keep their "
        "weights, so tokens made before stay valid.",
    )
    frames: int = setting(
        17, section="Data", ge=1, le=1 << 16, metavar="T", common=True, help="Number of frames of a clip."
    )
    size: FrameSize = setting(
        (128, 128), section="Data", metavar="SIZE", common=True, help="Frame size: 128, or HEIGHTxWIDTH."
    )
    fps: Rate = setting(
        Fraction(3),
        section="Data",
        metavar="RATE",
        help="Frame rate of the clips, in frames per second. The VidTok paper found 3 best; VidTwin takes 8.",
    )
    more_fps: Rates | None = setting(
        None,
        section="Data",
        metavar="RATE[,RATE]",
        help="More frame rates of training clips, such as 15,30: each clip has --fps or one of these, if its video has "
        "frames and time enough. Held-out clips have --fps.",
    )
    crop: CropPolicy = setting(
        "scaled",
        section="Data",
        help="Cut of training clips. 'scaled' shrinks frames until they just cover the clip and takes the middle; "
        "'native' takes a random part without shrinking. Held-out clips are always scaled.",
    )
    flip_share: float = setting(
        0.0,
        section="Data",
        ge=0,
        le=1,
        metavar="SHARE",
        help="Share of the training clips that are mirrored left to right, such as 0.5. Held-out clips never are.",
    )
    short_videos: ShortVideos = setting(
        "reject",
        section="Data",
        help="Treatment of videos shorter than a clip: reject them, or repeat their last frame. 'squeeze' spreads the "
        "frames of a clip over the whole video.",
    )
    steps: int = setting(
        50_000, section="Optimizer", ge=1, metavar="N", common=True, help="Number of training steps, one batch each."
    )
    batch_size: int = setting(
        16,
        section="Optimizer",
        ge=1,
        metavar="N",
        common=True,
        aliases=("clips_per_step",),
        help="Number of clips in a batch, over all workers together.",
    )
    gradient_accumulation: int = setting(
        1,
        section="Optimizer",
        ge=1,
        metavar="N",
        aliases=("accumulate",),
        help="Gradient accumulation: each worker's part of a batch is split into N micro-batches, to save memory. "
        "Codebook entropy, adaptive weight and batch norm then see one micro-batch at a time.",
    )
    seed: int = setting(
        0, section="Execution", ge=0, lt=1 << 63, metavar="SEED", help="Seed of all random choices of a stage."
    )


class OptimizerSettings(Settings):
    """Adam, its learning rates, and the moving average of the weights."""

    optimizer: Literal["adam", "adamw"] = setting(
        "adam",
        section="Optimizer",
        help="Optimizer of both networks. Adam adds the weight decay to the gradients, AdamW applies it to the weights "
        "directly.",
    )
    learning_rate: float = setting(
        1e-5,
        section="Optimizer",
        gt=0,
        metavar="RATE",
        common=True,
        help="Adam learning rate of the tokenizer.",
    )
    discriminator_learning_rate: float | None = setting(
        None,
        section="Optimizer",
        gt=0,
        metavar="RATE",
        help="Adam learning rate of the discriminator. Default: the tokenizer's.",
    )
    adam_betas: Betas = setting(
        (0.9, 0.999),
        section="Optimizer",
        metavar="A,B",
        help="Adam betas of both networks: decay rates of the two moment estimates.",
    )
    weight_decay: float = setting(
        0.0,
        section="Optimizer",
        ge=0,
        metavar="DECAY",
        help="Weight decay of all weights of both networks, norms and biases included.",
    )
    warmup_steps: int = setting(
        0,
        section="Optimizer",
        ge=0,
        metavar="N",
        help="Number of steps of linear learning rate warm-up. The discriminator's warm-up begins at --gan-start.",
    )
    schedule: Literal["constant", "cosine"] = setting(
        "constant",
        section="Optimizer",
        help="Learning rate schedule after the warm-up: constant, or a cosine decay until the last step.",
    )
    final_rate_share: float = setting(
        0.0,
        section="Optimizer",
        ge=0,
        le=1,
        metavar="SHARE",
        help="Learning rate at the end of the cosine schedule, as a share of the full rate.",
    )
    max_grad_norm: float = setting(
        20.0,
        section="Optimizer",
        ge=0,
        metavar="NORM",
        aliases=("clip_norm",),
        help="Gradient clipping: the largest gradient norm of either network. With 0 gradients are not clipped.",
    )
    ema_decay: float = setting(
        0.0,
        section="Optimizer",
        ge=0,
        lt=1,
        metavar="DECAY",
        help="Decay of the moving average (EMA) of the weights, such as 0.999; a stage then exports the average. With "
        "0, as released, no average is kept.",
    )


class LossSettings(Settings):
    """Weights of the reconstruction and regularization losses."""

    l1_weight: float = setting(1.0, section="Losses", ge=0, metavar="WEIGHT", help="Weight of the L1 loss.")
    perceptual_weight: float = setting(
        1.0,
        section="Losses",
        ge=0,
        metavar="WEIGHT",
        help="Weight of the LPIPS loss (VGG16, from the package lpips). With 0 LPIPS is not loaded.",
    )
    vgg_weights: str | None = setting(
        None,
        section="Losses",
        metavar="FILE",
        help="File with torchvision's vgg16 weights for LPIPS. Default: torchvision downloads them once, 528 MB.",
    )
    learn_logvar: bool = setting(
        True,
        section="Losses",
        help="Learn the log variance of the reconstruction loss, one number that scales L1 and LPIPS.",
    )
    kl_weight: float = setting(
        1e-6,
        section="Losses",
        ge=0,
        metavar="WEIGHT",
        help="Weight of the KL divergence of a clip's latents, for tokenizers with continuous latents. It applies to "
        "each latent of a clip.",
    )
    entropy_weight: float = setting(
        0.1,
        section="Losses",
        ge=0,
        metavar="WEIGHT",
        help="Weight of the entropy loss of FSQ and LFQ: token entropy minus codebook entropy.",
    )
    entropy_affinity: Literal["dot", "distance"] = setting(
        "dot",
        section="Losses",
        help="Affinity of an encoder output to an FSQ code in the entropy loss: the dot product, as in VidTok, or the "
        "squared distance.",
    )
    entropy_start_factor: float = setting(
        3.0,
        section="Losses",
        ge=0,
        metavar="FACTOR",
        help="Entropy weight at step 0, as a multiple of --entropy-weight.",
    )
    entropy_anneal_steps: int = setting(
        2000,
        section="Losses",
        ge=0,
        metavar="N",
        help="Number of steps over which the entropy weight falls linearly to --entropy-weight.",
    )
    codebook_entropy_share: float = setting(
        1.0,
        section="Losses",
        ge=0,
        metavar="SHARE",
        help="Factor of the codebook entropy within the entropy loss. A larger one spreads tokens more evenly.",
    )
    commitment_weight: float = setting(
        0.25,
        section="Losses",
        ge=0,
        metavar="WEIGHT",
        help="Weight of the commitment loss of FSQ, LFQ and VQ: squared distance of the encoder's output to its codes.",
    )
    codebook_weight: float = setting(
        1.0,
        section="Losses",
        gt=0,
        metavar="WEIGHT",
        help="Weight of the codebook loss of VQ: squared distance of the codes to the encoder's output.",
    )


class DiscriminatorSettings(Settings):
    """The discriminator and its losses."""

    discriminator: Literal["2d", "3d"] = setting(
        "2d",
        section="Discriminator",
        help="Kind of discriminator: 2d sees single frames, 3d sees whole clips.",
    )
    gan_weight: float = setting(
        0.2,
        section="Discriminator",
        ge=0,
        metavar="WEIGHT",
        help="Weight of the adversarial loss, after its gradient is scaled to that of the reconstruction loss. With 0 "
        "there is no discriminator.",
    )
    gan_start: int = setting(
        10_000,
        section="Discriminator",
        ge=0,
        metavar="STEP",
        help="Step at which the discriminator starts, counted in batches. The released VidTok code counts two per "
        "batch, so its 20001 is 10000 here.",
    )
    """Counted in batches, like all steps. The released configurations state 20,001 and compare it with Lightning's
    ``global_step``, which two optimizers raise twice per batch: the discriminator starts at batch 10,000. The entropy's
    annealing was halved in the released code, and is counted in batches in both."""
    gan_loss: Literal["softplus", "hinge"] = setting(
        "softplus",
        section="Discriminator",
        help="Adversarial loss of the tokenizer: softplus is non-saturating over the mean score of a frame, or a clip "
        "in 3D. Hinge is the negative mean score.",
    )
    discriminator_width: int = setting(
        64,
        section="Discriminator",
        ge=1,
        le=4096,
        metavar="N",
        help="Number of channels of the discriminator's first layer.",
    )
    lecam_weight: float = setting(
        0.005,
        section="Discriminator",
        ge=0,
        metavar="WEIGHT",
        help="Weight of the LeCam regularization of the discriminator.",
    )
    lecam_decay: float = setting(
        0.999,
        section="Discriminator",
        ge=0,
        lt=1,
        metavar="DECAY",
        help="Decay of the moving averages of scores that LeCam uses.",
    )


class ComputeSettings(Settings):
    """Precision and memory of a stage, and when it counts as diverged."""

    precision: Literal["float32", "bfloat16"] = setting(
        "bfloat16",
        section="Execution",
        help="Compute type of convolutions and attention. Weights, losses, quantizer and averages are float32 in "
        "either case.",
    )
    activation_checkpointing: bool = setting(
        False,
        section="Execution",
        aliases=("recompute",),
        help="Activation checkpointing: layers are computed again in the backward pass. A third more work, far less "
        "memory.",
    )
    divergence_l1: float = setting(
        1.0,
        section="Execution",
        gt=0,
        metavar="L1",
        help="Average L1 loss above which a run stops as diverged. Plain gray frames have at most 1.",
    )
    divergence_after: int = setting(
        500, section="Execution", ge=1, metavar="STEPS", help="Number of steps before --divergence-l1 is checked."
    )
    max_skipped_batches: int = setting(
        0,
        section="Execution",
        ge=0,
        metavar="N",
        help="Largest number of batches in a row that are skipped because a loss or gradient is not finite; one more "
        "ends the run. With 0 the first one does.",
    )


# pydantic orders fields from the last base to the first.
class StageConfig(ComputeSettings, DiscriminatorSettings, LossSettings, OptimizerSettings, ClipSettings):
    """Everything that decides one training stage, except for the tokenizer and the videos."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas must lie in [0, 1), got {self.adam_betas}")
        if self.l1_weight == self.perceptual_weight == 0:
            raise ValueError("l1_weight and perceptual_weight are both 0: nothing would hold the reconstruction")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size must be a multiple of gradient_accumulation, got {self.batch_size} and "
                f"{self.gradient_accumulation}"
            )
        more_fps = self.more_fps or []
        if len({self.fps, *more_fps}) <= len(more_fps):
            raise ValueError("the same frame rate is given twice in fps and more_fps")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps must be below steps, got {self.warmup_steps} of {self.steps}")
        return self

    @classmethod
    def completed(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """Complete the stored record of a stage: present names, and defaults of settings that it is older than."""
        return {**cls().model_dump(mode="json"), **cls.current_names(record)}

    @property
    def has_discriminator(self) -> bool:
        """Whether the stage ever uses its discriminator."""
        return self.gan_weight > 0 and self.gan_start < self.steps

    def clip_spec(self, *, clips_per_video: int, placement: Literal["even", "random"] = "random") -> ClipSpec:
        """Clip specification of this stage: full clips only, a given number at places of each video."""
        return ClipSpec(
            fps=self.fps,
            num_frames=self.frames,
            height=self.size[0],
            width=self.size[1],
            tail="drop",
            clips_per_video=clips_per_video,
            placement=placement,
        )


# A whole run


WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth")
"""File suffixes that tell weights from the folder of a stage."""


def split_weight(text: str) -> tuple[str, float | None]:
    """Split ``clips/=0.7`` into a path and its weight; without a number after the last ``=`` all of it is the path.

    Raises:
        ValueError: the weight is not positive and finite.
    """
    match = re.fullmatch(r"(.+)=((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)", text)
    if match is None:
        return text, None
    if not 0 < float(match[2]) < math.inf:
        raise ValueError(f"a weight must be positive and finite, got {text!r}: leave the folder out instead")
    return match[1], float(match[2])


def join_weight(path: str, weight: float | None) -> str:
    """Join a path and its weight to the text that `split_weight` takes apart.

    A folder without weight whose name looks like one with a weight gets a ``/`` at its end.
    """
    if weight is not None:
        return f"{path}={weight!r}"
    return path if split_weight(path)[1] is None else f"{path}/"


_FORMER_METRICS = {"codebook_utilisation": "codebook_utilization"}
"""Present name of each metric by its former one, which earlier versions took and recorded."""


def current_metric(name: T) -> T | str:
    """Present name of a metric; what is no former name stays."""
    return _FORMER_METRICS.get(name, name) if isinstance(name, str) else name


def current_metrics(values: Mapping[str, T]) -> dict[str, T]:
    """Rename metrics that an earlier version recorded; others stay."""
    return {current_metric(name): value for name, value in values.items()}


Metric = Annotated[
    Literal["psnr", "ssim", "lpips", "l1", "codebook_utilization", "codebook_entropy_bits", "codebook_perplexity"],
    BeforeValidator(current_metric),
]
"""Metric of held-out clips. SSIM needs frames as large as its window, LPIPS a stage that trains with it, and the last
three a codebook that can be counted."""

LOWER_IS_BETTER = frozenset(["l1", "lpips"])
"""Metrics of held-out clips of which less is better; of all others more is."""


class DataSettings(Settings):
    """Videos of a training run, and what is trained on them."""

    videos: list[str] = setting(
        section="Data",
        min_length=1,
        metavar="PATH[=WEIGHT]",
        identity=True,
        common=True,
        help="Videos to train on: a file, folder, glob or manifest, local or at any URL that fsspec opens. Repeat it "
        "for several corpora, all with weights such as a/=0.7 and b/=0.3, or all without.",
    )
    allow_private: bool = setting(
        False,
        section="Data",
        identity=False,
        help="Let rows of manifests, and redirects, reach web servers with private addresses. Without it only servers "
        "that --videos names may have such addresses.",
    )
    validation_share: float = setting(
        0.05,
        section="Data",
        ge=0,
        lt=1,
        metavar="SHARE",
        identity=True,
        aliases=("held_out",),
        help="Share of the videos held out for validation, at least one. They are chosen by content, so copies cannot "
        "leak; a later stage holds out no video that an earlier one trained on.",
    )
    clips_per_video: int = setting(
        1,
        section="Data",
        ge=1,
        metavar="N",
        identity=True,
        help="Number of random clips drawn from each video per epoch. Each epoch draws others.",
    )
    # A cache saves decoding, but every epoch then has the same clips: the identity holds whether there is one.
    cache: str | None = setting(
        None,
        section="Data",
        metavar="FOLDER",
        identity="resolved",
        help="Folder for decoded clips, uint8 in Parquet. The clips of one epoch are decoded once and used in every "
        "epoch.",
    )
    tokenizer: str | None = setting(
        None,
        section="Model",
        metavar="NAME",
        identity=True,
        common=True,
        help="Tokenizer to train: a name from `vidshard tokenizers`, or a YAML file with such a name as `preset` and "
        "what differs from it.",
    )
    model: Pairs = setting(
        {},
        section="Model",
        metavar="KEY=VALUE",
        identity="resolved",
        help="Setting of the network that differs from --tokenizer, such as base_width=24. May be repeated; values are "
        "YAML.",
    )
    init_from: str | None = setting(
        None,
        section="Model",
        metavar="FROM",
        identity=True,
        common=True,
        aliases=("start_from", "from"),
        help="Stage or weights to start from: a finished stage such as runs/mine/stage1, or a weights file, URL or "
        "hf://OWNER/REPO/PATH.",
    )


class CheckpointSettings(Settings):
    """Output folder, checkpoints, evaluation and logging of a training run."""

    out: str = setting(
        section="Output",
        metavar="FOLDER",
        identity=False,
        common=True,
        help="Folder of the training run, local or remote.",
    )
    checkpoint_steps: int = setting(
        1000,
        section="Output",
        ge=1,
        metavar="N",
        identity=False,
        help="Number of steps between checkpoints. An interruption loses at most so many.",
    )
    keep_last: int = setting(
        2,
        section="Output",
        ge=1,
        metavar="K",
        identity=False,
        help="Number of most recent checkpoints to keep.",
    )
    best_by: Metric = setting(
        "psnr",
        section="Output",
        identity=False,
        help="Validation metric that selects the best checkpoint, which is also kept.",
    )
    evaluate_steps: int = setting(
        1000,
        section="Evaluation and logging",
        ge=1,
        metavar="N",
        identity=False,
        help="Number of steps between evaluations on held-out clips.",
    )
    eval_clips: int = setting(
        64,
        section="Evaluation and logging",
        ge=1,
        metavar="N",
        identity=False,
        help="Largest number of held-out clips in an evaluation.",
    )
    pictures: int = setting(
        4,
        section="Evaluation and logging",
        ge=0,
        metavar="N",
        identity=False,
        help="Number of held-out clips drawn beside their reconstructions at each evaluation. For VidTwin, those from "
        "structure and dynamics alone are drawn too.",
    )
    log_steps: int = setting(
        10,
        section="Evaluation and logging",
        ge=1,
        metavar="N",
        identity=False,
        help="Number of steps between records of losses and speed.",
    )
    wandb: str | None = setting(
        None,
        section="Evaluation and logging",
        metavar="PROJECT",
        identity=False,
        help="Weights & Biases project to log to as well.",
    )


class WorkerSettings(Settings):
    """Processes of a training run."""

    workers: int | None = setting(
        None,
        section="Execution",
        ge=1,
        metavar="N",
        identity=False,
        common=True,
        help="Number of training processes. Default: one per GPU, or one without GPUs.",
    )
    threads: int | None = setting(
        None,
        section="Execution",
        ge=1,
        metavar="N",
        identity=False,
        help="Number of threads of a worker on CPUs. Default: the CPUs divided by the workers.",
    )
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp",
        section="Execution",
        identity=False,
        help="Distribution of the weights: whole on every worker (DDP), or the tokenizer's sharded (FSDP2).",
    )
    compile: bool = setting(
        False,
        section="Execution",
        identity=False,
        help="Compile the tokenizer with torch.compile, for GPUs. On a CPU this takes many minutes.",
    )
    max_failures: int = setting(
        3,
        section="Execution",
        ge=0,
        metavar="N",
        identity=False,
        help="Number of restarts from the last checkpoint after workers died.",
    )


# pydantic orders fields from the last base to the first.
class RunSettings(ClusterSettings, WorkerSettings, CheckpointSettings, PageSettings, DataSettings):
    """Settings of a training run beside those of its stages."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        weights = [weight for _, weight in self.corpora]
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError("give every --videos a weight, as in a/=0.7 and b/=0.3, or none of them")
        return self

    @property
    def corpora(self) -> list[tuple[str, float | None]]:
        """Path and weight of each corpus."""
        return [split_weight(text) for text in self.videos]

    @property
    def limits(self) -> Limits:
        """Largest cost of one video, and the servers with private addresses that it may lie on."""
        return Limits(private_hosts=None if self.allow_private else typed_hosts([path for path, _ in self.corpora]))


class TrainRun(RunSettings):
    """A complete training run, as presets return it and ``run.json`` stores it."""

    stages: dict[str, StageConfig]
    """Stages by name, in order; each one starts from the tokenizer of the one before."""
    tokenizer_is_default: bool = False
    """Whether ``tokenizer`` is the preset's, so that weights to start from may state another one."""

    @property
    def identity(self) -> dict[str, object]:
        """Settings that decide what a run computes, as JSON values; a run resumes only with the same ones."""
        record = self.model_dump(mode="json")
        names = [name for name, field in RunSettings.model_fields.items() if setting_of(field).identity is True]
        own = {"model": record["model"]} if self.model else {}  # runs from before there was one have none
        return {name: record[name] for name in (*names, "stages")} | {"cached": self.cache is not None} | own


# The commands


class TrainFlags(RunSettings, StageConfig):
    """Flags and YAML keys of ``vidshard train``; the preset decides what they leave out."""

    preset: str | None = setting(
        None,
        section="Preset",
        metavar="NAME",
        identity=False,
        common=True,
        help="Preset that gives every setting not given here: tiny, small, paper_stage1, paper_stage2, paper, "
        "long_video, domain, vidtwin or vidtwin_tiny.",
    )
    stage1: Pairs = setting(
        {},
        section="Preset",
        metavar="KEY=VALUE",
        identity=False,
        common=True,
        help="Setting of stage 1 alone, such as steps=1000. May be repeated.",
    )
    stage2: Pairs = setting(
        {},
        section="Preset",
        metavar="KEY=VALUE",
        identity=False,
        common=True,
        help="Setting of stage 2 alone, such as size=256. May be repeated.",
    )
