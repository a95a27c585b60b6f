"""What people configure. One closed model is the definition of the flags, the YAML file and the stored run.

A field's description is its help text, its ``section`` the heading under which ``--help`` lists it. Only what
can be judged without opening a file is checked here; the job checks the rest before any work starts.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from pydantic import model_validator

from vidshard.schemas.fields import (
    ByteSize,
    ClusterSettings,
    FrameSize,
    FrameSizes,
    Rate,
    Reasons,
    Seconds,
    Signals,
    setting,
)
from vidshard.schemas.video import (
    ClipPlacement,
    ClipSpec,
    Limits,
    Part,
    ResizePolicy,
    TailPolicy,
)


class TokenizeRun(ClusterSettings):
    """Everything that decides a tokenization run."""

    inputs: list[str] = setting(
        section="Input",
        min_length=1,
        help="Videos, or images in .tar or .zip: files, folders (searched recursively), globs, or manifests (.parquet, "
        ".csv, .jsonl with a 'uri' column; every further column travels to the token rows). Local, or any URL that "
        "fsspec opens, such as s3://bucket/clips/*.mp4.",
    )
    signals: Signals | None = setting(
        None,
        section="Input",
        metavar="NAME=RULE,...",
        help="Timestamped signals beside the frames, such as robot actions: a manifest's column NAME holds the path of "
        "a .parquet, .npz or .npy file for each row, and every clip row gets the values at its frames' times. RULE is "
        "previous, nearest, linear, or window for all samples between two frames. Times are seconds after the video's "
        "first frame.",
    )
    image_fps: Rate = setting(
        Fraction(24),
        section="Input",
        metavar="RATE",
        help="A .tar or .zip of images is one video: its images in natural order of their names, so many a second.",
    )
    limit: int | None = setting(
        None, section="Input", ge=1, metavar="N", help="Take only the first N videos, in sorted order."
    )

    out: str = setting(
        section="Output",
        metavar="FOLDER",
        help="Folder for the result, local or remote: shards/*.parquet, rejects/*.parquet, plan/*.parquet, run.json.",
    )
    shard_size: ByteSize = setting(
        128 << 20,
        section="Output",
        metavar="BYTES",
        help="Aim for shards of this size, such as 128MiB. See also --commit-minutes.",
    )
    commit_minutes: float = setting(
        10.0,
        section="Output",
        gt=0,
        metavar="MINUTES",
        help="Commit a smaller shard rather than hold finished clips longer than this: what an interruption can cost.",
    )
    keep_logvar: bool = setting(
        False, section="Output", help="For KL tokenizers: store the log-variance beside the mean."
    )
    max_reject_share: float = setting(
        1.0,
        section="Output",
        ge=0.0,
        le=1.0,
        metavar="SHARE",
        help="Fail (exit code 1) when more than this share of the videos is rejected, in whole or in part. "
        "The default never fails: rejects are counted, and listed in rejects/.",
    )

    tokenizer: str | None = setting(
        None,
        section="Tokenizer",
        metavar="NAME",
        help="Which model: a name from `vidshard tokenizers`. Not needed with --weights that say so themselves "
        "(`vidshard convert`). Without either: fsq_causal_488_small, a small model whose weights come with vidshard.",
    )
    weights: str | None = setting(
        None,
        section="Tokenizer",
        metavar="FILE",
        help="Its weights: .safetensors, or a .ckpt (read without executing anything). Must fit the model exactly. "
        "Local, any URL that fsspec opens, or a file of the Hugging Face Hub: hf://OWNER/REPO/PATH, or "
        "hf://OWNER/REPO@REVISION/PATH (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT as everywhere).",
    )
    ema: bool = setting(
        False,
        section="Tokenizer",
        help="Take the averaged (EMA) weights that training kept beside those of its last step.",
    )
    random_weights: int | None = setting(
        None,
        section="Tokenizer",
        ge=0,
        metavar="SEED",
        help="Use seeded random weights instead, to try the machinery. The tokens mean nothing; the summary and "
        "every shard say so.",
    )
    precision: Literal["float32", "bfloat16"] = setting(
        "float32",
        section="Tokenizer",
        help="Compute type of the encoder; the quantizer always computes in float32. Part of the tokens' identity: "
        "bfloat16 changes some of them.",
    )
    tile_size: FrameSize | None = setting(
        None,
        section="Tokenizer",
        metavar="SIZE",
        help="For frames too large for the memory: encode them in overlapping tiles of this size, such as 512 or "
        "256x448, and blend. Part of the tokens' identity: tiles change some of them. Default: whole frames.",
    )
    tile_overlap: int = setting(
        64,
        section="Tokenizer",
        ge=0,
        metavar="PIXELS",
        help="What neighbouring tiles share at least; more is nearer to the whole frame, and slower.",
    )

    fps: Rate = setting(
        Fraction(8),
        section="Sampling",
        metavar="RATE",
        help="Frames per second of the time grid: 8, 7.5 or 30000/1001. Each grid time takes the frame on screen at "
        "that moment, whatever the source's rate.",
    )
    frames: int = setting(
        17,
        section="Sampling",
        ge=1,
        metavar="T",
        help="Frames per clip; for most causal tokenizers 1 plus a multiple of the temporal stride, else see "
        "--pad-frames.",
    )
    pad_frames: Literal["refuse", "repeat-last", "repeat-first"] = setting(
        "refuse",
        section="Sampling",
        help="When the tokenizer does not take clips of --frames: refuse the run, or encode every clip with as few "
        "copies as it takes of its last frame after it, or of its first before it. `vidshard decode` takes them off.",
    )
    continuous: bool = setting(
        False,
        section="Sampling",
        help="Encode each video as one sequence: every row carries on from the one before, as its column "
        "continues_previous says, and holds as many latents as a clip of --frames by itself. For causal tokenizers.",
    )
    start: Seconds | None = setting(
        None,
        section="Parts",
        metavar="TIME",
        help="Begin so long after each video's first frame: 90, 12.5 or 1:30. A manifest's columns start_seconds and "
        "end_seconds say it for each row, and several rows may name parts of one video.",
    )
    end: Seconds | None = setting(
        None, section="Parts", metavar="TIME", help="End so long after each video's first frame."
    )
    stride_seconds: Seconds | None = setting(
        None,
        section="Parts",
        metavar="SECONDS",
        help="From the start of one clip to that of the next: less than a clip's length for clips that overlap, more "
        "for gaps. Default: clips follow one another.",
    )
    clips_per_video: int | None = setting(
        None,
        section="Parts",
        ge=1,
        metavar="N",
        help="At most so many clips of each video, or of each part that a manifest names. Default: all.",
    )
    clip_placement: ClipPlacement = setting(
        "even",
        section="Parts",
        help="Where --clips-per-video lie: the middle of each of N equal stretches, or a random place in each.",
    )
    clip_seed: int = setting(0, section="Parts", ge=0, metavar="SEED", help="Which random places.")
    min_seconds: Seconds = setting(
        Fraction(0),
        section="Parts",
        metavar="SECONDS",
        help="Leave out clips that hold less video than this; a video with no other is rejected as too short.",
    )
    tail: TailPolicy = setting(
        "pad",
        section="Sampling",
        help="A last clip that is not full: 'pad' repeats its last frame and records num_valid_frames, 'drop' leaves "
        "it out.",
    )
    size: FrameSize = setting(
        (256, 256),
        section="Sampling",
        metavar="SIZE",
        help="Frame size: 256 for a square, 256x448 for height x width; divisible by the tokenizer's spatial stride.",
    )
    damaged: Literal["reject", "keep"] = setting(
        "reject",
        section="Sampling",
        help="A stretch of video with damage in it: 'reject' it whole, or 'keep' those of its clips that lie before or "
        "beside the damage, each of them whole; rejects/ says what is missing, the column decode_errors how many "
        "damaged places there were.",
    )
    buckets: FrameSizes | None = setting(
        None,
        section="Sampling",
        metavar="SIZES",
        help="Several frame sizes instead of --size, such as 256x256,256x448,448x256 (height x width): each video gets "
        "the one whose aspect ratio is nearest to its own. Batches and shards hold one size each; the column 'bucket' "
        "says which.",
    )
    resize: ResizePolicy = setting(
        "crop",
        section="Sampling",
        help="'crop' scales until the frame is covered and cuts the centre, 'stretch' ignores the aspect ratio, "
        "'pad' scales until it fits and adds black bars.",
    )

    retry_rejected: Reasons | None = setting(
        None,
        section="Going on",
        metavar="[REASON,...]",
        without_value="all",
        help="Try again what an earlier run of this output rejected for these reasons (see rejects/), or, without a "
        "reason, all of it but copies of other videos; and do nothing else.",
    )
    recheck: bool = setting(
        False,
        section="Going on",
        help="Ask remote storage about each file that a manifest names whether it was replaced, a request for each. "
        "Local files and listed ones are always looked at.",
    )
    grace_seconds: float = setting(
        20.0,
        section="Going on",
        ge=0,
        metavar="SECONDS",
        help="After Ctrl-C or SIGTERM finish what is begun for at most so long, commit it and end; a second one ends "
        "at once.",
    )
    lease_seconds: float = setting(
        60.0,
        section="Going on",
        ge=1,
        metavar="SECONDS",
        help="Two runs at once on one output are refused; a run on another machine that gave no sign of life for so "
        "long is taken for dead, and its place taken.",
    )

    batch_size: int | None = setting(
        None,
        section="Execution",
        ge=1,
        metavar="N",
        help="Clips per forward pass, from as many videos as it takes. Default: 8 on a GPU, 1 on a CPU.",
    )
    encode_workers: int | None = setting(
        None,
        section="Execution",
        ge=1,
        metavar="N",
        help="Encoder processes. Default: one for each GPU share; without GPUs one for each four CPUs.",
    )
    gpus_per_worker: float = setting(
        1.0,
        section="Execution",
        gt=0,
        metavar="SHARE",
        help="GPUs of one encoder, a fraction to let several share one. Ignored where there are no GPUs.",
    )
    encode_threads: int | None = setting(
        None,
        section="Execution",
        ge=1,
        metavar="N",
        help="Threads of one encoder on a CPU. Default: the CPUs divided by the encoders.",
    )
    decode_workers: int | None = setting(
        None,
        section="Execution",
        ge=1,
        metavar="N",
        help="Decode at most N videos at once. Default: as many as there are free CPUs.",
    )
    decode_timeout: float = setting(
        600.0,
        section="Execution",
        gt=0,
        metavar="SECONDS",
        help="Give up on a stretch of video that takes longer than this to decode, and reject it; a long stretch has "
        "the time that --decode-seconds-per-second gives it, if that is more.",
    )
    decode_seconds_per_second: float = setting(
        30.0,
        section="Execution",
        gt=0,
        metavar="SECONDS",
        help="Time to decode one second of a long stretch of video.",
    )
    decode_memory: ByteSize = setting(
        4 << 30,
        section="Execution",
        metavar="BYTES",
        help="Memory of one decoding process, such as 4GiB, about 100 MB of it the interpreter's; a video that "
        "needs more is rejected.",
    )
    max_pixels: int = setting(
        8192 * 8192,
        section="Execution",
        ge=1,
        le=2**31 - 1,
        metavar="N",
        help="Reject videos with larger pictures than this.",
    )
    max_seconds: float = setting(
        48 * 3600.0, section="Execution", gt=0, metavar="SECONDS", help="Reject videos that are longer."
    )
    max_frames: int = setting(
        20_000_000, section="Execution", ge=1, metavar="N", help="Reject videos that have more frames."
    )
    clips_per_span: int | None = setting(
        None,
        section="Execution",
        ge=1,
        metavar="N",
        help="Clips in one unit of work. Default: as many as fit 32 MiB of frames.",
    )

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> TokenizeRun:
        if self.weights is not None and self.random_weights is not None:
            raise ValueError("give either weights or random_weights, not both")
        if self.ema and self.weights is None:
            raise ValueError("ema takes averaged weights from a file: give weights too, or leave ema out")
        return self

    @model_validator(mode="after")
    def _parts_that_can_be(self) -> TokenizeRun:
        _ = self.part, self.clip_specs  # they refuse what cannot be
        return self

    @property
    def limits(self) -> Limits:
        """What one video may cost."""
        return Limits(
            max_pixels=self.max_pixels,
            max_seconds=self.max_seconds,
            max_frames=self.max_frames,
            timeout_seconds=self.decode_timeout,
            seconds_per_second=self.decode_seconds_per_second,
            memory_bytes=self.decode_memory,
            image_fps=self.image_fps,
        )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The (height, width) of every frame size there is."""
        return self.buckets or [self.size]

    @property
    def part(self) -> Part:
        """Which part of a video is meant where no manifest says so."""
        return Part.of(float(self.start or 0), None if self.end is None else float(self.end))

    @property
    def clip_specs(self) -> list[ClipSpec]:
        """How videos become clips, one for each frame size."""
        return [
            ClipSpec(
                fps=self.fps,
                num_frames=self.frames,
                height=height,
                width=width,
                tail=self.tail,
                resize=self.resize,
                stride_seconds=self.stride_seconds,
                min_seconds=self.min_seconds,
                clips_per_video=self.clips_per_video,
                placement=self.clip_placement,
                placement_seed=self.clip_seed,
            )
            for height, width in self.sizes
        ]
