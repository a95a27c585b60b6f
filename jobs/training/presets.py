"""Presets: complete runs as functions. Read one to know what it does; change it with ``model_copy(update=...)``."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from vidshard.schemas.training import StageConfig, TrainRun


def tiny(videos: list[str], out: str) -> TrainRun:
    """Both stages of the tiny model on a CPU, in minutes. Shows that training works; reconstructions are blurred."""
    first = StageConfig(
        frames=5,
        size=(48, 48),
        steps=400,
        batch_size=4,
        learning_rate=3e-3,
        warmup_steps=10,
        schedule="cosine",
        final_rate_share=0.1,
        ema_decay=0.99,
        perceptual_weight=0,
        # The likelihood is a sum over a frame: with a smaller weight the codebook is unused for hundreds of steps.
        entropy_weight=100,
        entropy_affinity="distance",
        commitment_weight=0,
        entropy_anneal_steps=100,
        gan_start=300,
        discriminator_learning_rate=3e-4,
        discriminator_width=16,
        precision="float32",
    )
    second = first.model_copy(
        update={"trainable": "decoder", "size": (64, 64), "steps": 150, "learning_rate": 1e-3, "gan_start": 100}
    )
    return TrainRun(
        videos=videos,
        out=out,
        tokenizer="tiny",
        stages={"stage1": first, "stage2": second},
        clips_per_video=4,
        validation_share=0.1,
        checkpoint_steps=100,
        evaluate_steps=50,
        eval_clips=16,
    )


def small(videos: list[str], out: str) -> TrainRun:
    """The small model in the package, trained from crops on two CPU cores in two to three hours.

    Uses neither LPIPS nor a discriminator, since it aims at PSNR alone. The videos should be as small as the clips
    (`benchmarks.motion_corpus`): larger ones would be shrunk, and their detail differs from that of full frames. The
    entropy loss brings the codebook into use and hinders later: ``finetune``, which has 17 frames and most of the
    steps, is without it.
    """
    first = StageConfig(
        frames=9,
        size=(64, 64),
        fps=Fraction(8),
        steps=3500,
        batch_size=8,
        learning_rate=5e-4,
        warmup_steps=150,
        schedule="cosine",
        final_rate_share=0.2,
        max_grad_norm=60_000,  # losses are sums over a clip's pixels: only outliers are clipped
        ema_decay=0.998,
        perceptual_weight=0,
        gan_weight=0,
        learn_logvar=False,
        entropy_weight=100,
        entropy_affinity="distance",
        entropy_anneal_steps=500,
        commitment_weight=0,
    )
    longer = first.model_copy(
        update={
            "frames": 17,
            "steps": 4600,
            "batch_size": 6,
            "learning_rate": 4e-4,
            "warmup_steps": 100,
            "final_rate_share": 0.04,
            "entropy_weight": 0,
        }
    )
    second = longer.model_copy(
        update={"trainable": "decoder", "size": (128, 128), "steps": 600, "batch_size": 4, "learning_rate": 2e-4}
    )
    return TrainRun(
        videos=videos,
        out=out,
        tokenizer="fsq_causal_488_small_haar",
        stages={"stage1": first, "finetune": longer, "stage2": second},
        clips_per_video=2,
        validation_share=0.01,
        checkpoint_steps=250,
        evaluate_steps=250,
        eval_clips=48,
        log_steps=20,
    )


def paper_stage1(videos: list[str], out: str) -> TrainRun:
    """Stage 1 of the paper: all weights at 128x128, 17 frames at 3 per second, 50,000 steps of 16 clips.

    Tang et al., "VidTok", 2024, with the rates and weights of the released configurations. `jobs.training.sources`
    says where each value comes from.
    """
    return TrainRun(videos=videos, out=out, tokenizer="fsq_causal_488_32768", stages={"stage1": StageConfig()})


def paper_stage2(videos: list[str], out: str) -> TrainRun:
    """Stage 2 of the paper: the decoder alone at 256x256, 30,000 steps of 8 clips, from a first stage."""
    second = StageConfig(trainable="decoder", size=(256, 256), steps=30_000, batch_size=8)
    return TrainRun(videos=videos, out=out, tokenizer="fsq_causal_488_32768", stages={"stage2": second})


def paper(videos: list[str], out: str) -> TrainRun:
    """Both stages of the paper, one after the other."""
    first, second = paper_stage1(videos, out), paper_stage2(videos, out)
    return first.model_copy(update={"stages": first.stages | second.stages})


def long_video(videos: list[str], out: str) -> TrainRun:
    """Fine-tune v1.0 weights to a v1.1 model for long sequences: all weights, clips of 33 frames.

    VidTok 1.1 was fine-tuned so. Its resolution, steps and batch size are not published; those here are ours. The
    discriminator starts at once: released checkpoints hold a trained one, which ``--init-from`` loads.
    """
    stage = StageConfig(
        frames=33,
        size=(256, 256),
        steps=20_000,
        batch_size=8,
        warmup_steps=500,
        entropy_start_factor=1.0,
        gan_start=0,
        activation_checkpointing=True,
    )
    return TrainRun(videos=videos, out=out, tokenizer="fsq_causal_488_32768_v1_1", stages={"finetune": stage})


def domain(videos: list[str], out: str) -> TrainRun:
    """Fine-tune released weights to a domain: all weights, a gentle learning rate, no annealing of the entropy."""
    stage = StageConfig(
        size=(256, 256),
        steps=10_000,
        batch_size=8,
        warmup_steps=200,
        schedule="cosine",
        final_rate_share=0.1,
        ema_decay=0.999,
        entropy_start_factor=1.0,
        gan_start=2000,
    )
    return TrainRun(videos=videos, out=out, tokenizer="fsq_causal_488_32768", stages={"finetune": stage})


def vidtwin(videos: list[str], out: str) -> TrainRun:
    """VidTwin as in its paper's Table 6: all weights at 224x224, 16 frames at 8 per second, 24 clips a step.

    Wang et al., "VidTwin", CVPR 2025. The paper has 6 clips on each of 4 GPUs and does not publish the number of steps.
    Where it says nothing, this is the released configuration: losses, discriminator, no gradient clipping, no averages.
    That configuration starts its discriminator at optimizer step 20,001, of which it counts two per batch.
    """
    stage = StageConfig(
        frames=16,
        size=(224, 224),
        fps=Fraction(8),
        steps=100_000,
        batch_size=24,
        optimizer="adam",
        adam_betas=(0.9, 0.99),
        weight_decay=1e-4,
        learning_rate=1.6e-4,
        warmup_steps=5000,
        schedule="cosine",
        max_grad_norm=0,
        ema_decay=0,
        perceptual_weight=0.05,
        kl_weight=1e-3,
        gan_weight=0.05,
        gan_start=10_000,
        gan_loss="hinge",
        lecam_weight=0,
    )
    name = "vidtwin_structure_7_7_4_dynamics_7_8"
    return TrainRun(videos=videos, out=out, tokenizer=name, stages={"one_stage": stage})


def vidtwin_tiny(videos: list[str], out: str) -> TrainRun:
    """The tiny VidTwin on a CPU, in minutes. Shows that structure and dynamics separate; pictures are blurred."""
    paper = vidtwin(videos, out)
    stage = paper.stages["one_stage"].model_copy(
        update={
            "frames": 8,
            "size": (64, 64),
            "steps": 1000,
            "batch_size": 4,
            "learning_rate": 2e-3,
            "warmup_steps": 20,
            "final_rate_share": 0.05,
            "perceptual_weight": 0,
            "gan_start": 900,
            "discriminator_learning_rate": 3e-4,
            "discriminator_width": 16,
            "precision": "float32",
        }
    )
    return paper.model_copy(
        update={
            "tokenizer": "vidtwin_tiny",
            "stages": {"one_stage": stage},
            "clips_per_video": 4,
            "validation_share": 0.1,
            "checkpoint_steps": 200,
            "evaluate_steps": 200,
            "eval_clips": 16,
        }
    )


FIXED_MODEL = frozenset({"long_video"})
"""Presets whose purpose is the model that they name, whatever model the weights to start from state."""

TRAININGS: dict[str, Callable[[list[str], str], TrainRun]] = {
    preset.__name__: preset
    for preset in (tiny, small, paper_stage1, paper_stage2, paper, long_video, domain, vidtwin, vidtwin_tiny)
}
"""Training presets by name."""
