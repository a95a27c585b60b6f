"""Settings of a tokenization run: one closed model behind the flags, the YAML file and the stored ``run.json``.

The model is composed of one small model per section of ``--help-all``; their fields form a single flat namespace. Every
field states ``identity=``: whether it decides what a token means, so that outputs with different values must not mix.
Checks here need no file; ``pipeline.resolved_run`` checks the rest.

To add a setting, add a field to its section. The flag, the YAML key and the help follow from it.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from vidshard.schemas.fields import (
    ByteSize,
    ClusterSettings,
    Episodes,
    FrameSize,
    FrameSizes,
    In,
    PageSettings,
    Rate,
    Reasons,
    Seconds,
    Settings,
    Signals,
    When,
    With,
    Without,
    Workers,
    check_identity,
    identity_names,
    setting,
)
from vidshard.schemas.uris import typed_hosts
from vidshard.schemas.video import (
    ClipPlacement,
    ClipSpec,
    Limits,
    Part,
    ResizePolicy,
    TailPolicy,
)


class InputSettings(Settings):
    """Videos to read."""

    inputs: list[str] = setting(
        section="Input",
        identity=False,
        min_length=1,
        help="Videos: files, folders (searched recursively), globs, manifests or LeRobot datasets (lerobot:FOLDER), "
        "local or at any URL that fsspec opens. A manifest is a .parquet, .csv or .jsonl file with a 'uri' column; its "
        "other columns are copied to the token rows.",
    )
    limit: int | None = setting(
        None,
        section="Input",
        identity=False,
        common=True,
        ge=1,
        metavar="N",
        help="Take only the first N videos: rows of manifests, datasets and archives come first, then files, sorted. "
        "Default: all.",
    )
    image_fps: Rate = setting(
        Fraction(24),
        section="Input",
        identity="when set",
        metavar="RATE",
        help="Frame rate of image archives. A .tar or .zip of images is one video, with its images in natural order "
        "of their names.",
    )
    allow_schemes: list[str] = setting(
        [],
        section="Input",
        identity=False,
        metavar="SCHEME,...",
        help="Schemes that rows of manifests may name, such as s3,https; 'file' is for local paths. Default: local "
        "files, object stores, hf, http and https; a remote manifest may not name local files.",
    )
    allow_under: list[str] = setting(
        [],
        section="Input",
        identity=False,
        metavar="FOLDER",
        help="Folder, local or remote, that must hold what rows of manifests name; may be given several times. "
        "Default: any.",
    )
    allow_private: bool = setting(
        False,
        section="Input",
        identity=False,
        help="Let rows of manifests, and redirects, reach web servers with private addresses. Without it only servers "
        "that an input names may have such addresses.",
    )
    signals: Signals | None = setting(
        None,
        section="Input",
        identity="when set",
        metavar="NAME=RULE,...",
        help="Signals sampled at each frame: NAME is a manifest column of paths (.parquet, .npz, .npy, .json, .jsonl), "
        "RULE is previous, nearest, linear, window or frames. Default: every numeric feature of LeRobot datasets, with "
        "nearest.",
    )

    cameras: list[str] = setting(
        [],
        section="Input",
        identity=False,
        metavar="NAME,...",
        help="Cameras of LeRobot datasets, such as observation.images.top or top. Default: all.",
    )
    episodes: Episodes = setting(
        [],
        section="Input",
        identity=False,
        metavar="LIST",
        help="Episodes of LeRobot datasets, such as 0,7 or 10:20, which are 10 to 19. Default: all.",
    )

    @field_validator("cameras", mode="before")
    @classmethod
    def _camera_names(cls, value: Any) -> Any:
        values = [value] if isinstance(value, str) else list(value) if isinstance(value, tuple) else value
        if not isinstance(values, list):
            return values
        return [name.strip() for text in values for name in str(text).split(",") if name.strip()]

    @field_validator("allow_schemes", "allow_under", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        values = [value] if isinstance(value, str) else value
        return list(values) if isinstance(values, tuple) else values

    @field_validator("allow_schemes", mode="after")
    @classmethod
    def _separate(cls, values: list[str]) -> list[str]:
        names = [name.strip().lower().removesuffix("://") for value in values for name in value.split(",")]
        for name in names:
            if not re.fullmatch(r"[a-z][a-z0-9+.-]*", name):
                raise ValueError(f"a scheme is a name such as s3, got {name!r:.80}")
        return names

    @field_validator("allow_under", mode="after")
    @classmethod
    def _of_a_place(cls, values: list[str]) -> list[str]:
        for value in values:
            scheme, separator, rest = value.partition("://")
            if not value.strip() or (separator and scheme.lower() != "file" and not rest.strip("/")):
                raise ValueError(f"a folder is a path or a URL with a server or bucket, got {value!r:.80}")
        return values


class OutputSettings(Settings):
    """Files to write, and when the run counts as failed."""

    out: str = setting(
        section="Output",
        identity=False,
        common=True,
        metavar="FOLDER",
        help="Output folder, local or remote, for shards/, rejects/, plan/ and run.json.",
    )
    shard_size: ByteSize = setting(
        128 << 20,
        section="Output",
        identity=False,
        metavar="BYTES",
        help="Target size of a shard file, such as 128MiB. --commit-minutes can make shards smaller.",
    )
    commit_minutes: float = setting(
        10.0,
        section="Output",
        identity=False,
        gt=0,
        metavar="MINUTES",
        help="Longest time that finished clips wait to be committed in a shard. A crash loses about this much work "
        "at most.",
    )
    keep_logvar: bool = setting(
        False,
        section="Output",
        identity=True,
        help="Store the log-variance of KL latents beside their mean.",
    )
    max_reject_share: float = setting(
        1.0,
        section="Output",
        identity=False,
        ge=0.0,
        le=1.0,
        metavar="SHARE",
        help="Largest share of videos that may be rejected, in whole or in part; above it the run fails with exit "
        "code 1. With 1, rejections never fail a run.",
    )
    recut_share: float = setting(
        0.001,
        section="Output",
        identity=False,
        ge=0.0,
        le=1.0,
        metavar="SHARE",
        help="Share of the spans that are decoded a second time, cut otherwise, and compared. A span whose clips "
        "differ is rejected with `cut_dependent`.",
    )
    max_internal_error_share: float = setting(
        0.01,
        section="Output",
        identity=False,
        ge=0.0,
        le=1.0,
        metavar="SHARE",
        help="Largest share of videos that may be rejected with `internal_error`, and with `not_finite`; above it the "
        "run fails with exit code 1. Fewer than ten such videos fail no run.",
    )


class AuditSettings(Settings):
    """Settings of the quality audit: a share of the clips is decoded again and compared with its frames."""

    audit: float = setting(
        0.0,
        section="Quality audit",
        identity=False,
        ge=0.0,
        le=1.0,
        metavar="SHARE",
        help="Share of the clips, such as 0.01, that are decoded again while tokenizing and compared with their "
        "frames. PSNR, SSIM and LPIPS are stored in their rows, and the summary names the worst videos.",
    )
    audit_min_psnr: float = setting(
        20.0,
        section="Quality audit",
        identity=False,
        effect=With("audit"),
        ge=0.0,
        le=80.0,
        metavar="DB",
        help="PSNR in dB below which --audit warns, of the mean of all audited clips or of single ones.",
    )
    vgg_weights: str | None = setting(
        None,
        section="Quality audit",
        identity=False,
        effect=With("audit"),
        metavar="FILE",
        help="File with torchvision's vgg16 weights, for LPIPS in --audit. Default: torchvision's download if it is "
        "on the machine; without either LPIPS is null.",
    )


class TokenizerSettings(Settings):
    """Tokenizer and weights. The identity holds the tokenizer's configuration and a digest of the weights instead."""

    tokenizer: str | None = setting(
        None,
        section="Tokenizer",
        identity="resolved",
        common=True,
        metavar="NAME",
        help="Tokenizer: a name of `vidshard tokenizers`, diffusers:FOLDER, or diffusers:OWNER/REPO. Default: that "
        "of --weights, or fsq_causal_488_small_haar, which is included.",
    )
    weights: str | None = setting(
        None,
        section="Tokenizer",
        identity="resolved",
        common=True,
        metavar="FILE",
        help="Weights of the tokenizer: a .safetensors or .ckpt file, a URL, or hf://OWNER/REPO[@REVISION]/PATH on "
        "the Hugging Face Hub. They must fit the tokenizer exactly.",
    )
    ema: bool = setting(
        False,
        section="Tokenizer",
        identity="resolved",
        help="Use the averaged (EMA) weights of a training checkpoint instead of those of its last step.",
    )
    random_weights: int | None = setting(
        None,
        section="Tokenizer",
        identity="resolved",
        ge=0,
        le=2**32 - 1,
        metavar="SEED",
        help="Use random weights from this seed, to try the pipeline without a trained model. The tokens mean "
        "nothing, and every shard says so.",
    )
    precision: Literal["auto", "float32", "tf32", "float16", "bfloat16"] = setting(
        "auto",
        section="Tokenizer",
        identity=True,
        help="Floating-point type of the encoder; some tokens differ between types, so an output holds one type. With "
        "auto it is that of the output, or else float16 on GPUs, except for `diffusers:`, and float32 on CPUs.",
    )
    tile_size: FrameSize | None = setting(
        None,
        section="Tokenizer",
        identity=When("tiled"),
        metavar="SIZE",
        help="Encode in overlapping, blended tiles, such as 512 or 256x448, to save memory; an output holds one tile "
        "size, as some tokens change. Default: whole frames.",
    )
    tile_overlap: int = setting(
        64,
        section="Tokenizer",
        identity=When("tiled"),
        effect=With("tile_size"),
        ge=0,
        metavar="PIXELS",
        help="Minimum overlap of neighboring tiles. More overlap is slower and closer to encoding whole frames.",
    )

    @model_validator(mode="after")
    def _one_source_of_weights(self) -> Self:
        if self.weights is not None and self.random_weights is not None:
            raise ValueError("give either weights or random_weights, not both")
        if self.ema and self.weights is None:
            raise ValueError("ema takes averaged weights from a file: give weights too, or leave ema out")
        return self


class SamplingSettings(Settings):
    """Settings of sampling: frame rate, clip length and frame size."""

    fps: Rate = setting(
        Fraction(8),
        section="Sampling",
        identity=True,
        common=True,
        metavar="RATE",
        help="Frame rate of the clips, such as 8, 7.5 or 30000/1001. Each grid time takes the source frame on screen "
        "at that moment.",
    )
    frames: int = setting(
        17,
        section="Sampling",
        identity=True,
        common=True,
        ge=1,
        metavar="T",
        help="Frames per clip; most causal tokenizers need 1 plus a multiple of their temporal stride. Default: "
        "that of the tokenizer (`vidshard tokenizers`).",
    )
    size: FrameSize = setting(
        (256, 256),
        section="Sampling",
        identity=Without("buckets"),
        common=True,
        metavar="SIZE",
        help="Frame size, such as 256 or 256x448 (height x width): multiples of the tokenizer's spatial stride. "
        "Default: that of the tokenizer.",
    )
    buckets: FrameSizes | None = setting(
        None,
        section="Sampling",
        identity="when set",
        metavar="SIZES",
        help="Several frame sizes instead of --size, such as 256x256,256x448; each video gets the one nearest to its "
        "aspect ratio. A shard holds one bucket, named in its column 'bucket'.",
    )
    resize: ResizePolicy = setting(
        "crop",
        section="Sampling",
        identity=True,
        help="Resize policy: 'crop' fills the frame and cuts the edges, 'pad' adds black bars, 'stretch' ignores the "
        "aspect ratio.",
    )
    tail: TailPolicy = setting(
        "pad",
        section="Sampling",
        identity=True,
        help="Last clip of a video if it is incomplete: 'pad' repeats its last frame and records num_valid_frames, "
        "'drop' leaves it out.",
    )
    pad_frames: Literal["refuse", "repeat-last", "repeat-first"] = setting(
        "refuse",
        section="Sampling",
        identity=When("padded"),
        help="Padding of clips whose --frames the tokenizer does not take: refuse the run, or repeat their last or "
        "first frame. `vidshard decode` removes the padding.",
    )
    continuous: bool = setting(
        False,
        section="Sampling",
        identity="when set",
        help="Encode each video as one sequence, in which every clip continues the one before; for causal tokenizers. "
        "The column continues_previous marks such rows.",
    )
    damaged: Literal["reject", "keep"] = setting(
        "reject",
        section="Sampling",
        identity="when set",
        help="Spans with damaged video: 'reject' leaves out the whole span, 'keep' stores its undamaged clips. The "
        "column decode_errors counts the damaged places, and rejects/ lists what is missing.",
    )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) in pixels of every frame size of the run."""
        return self.buckets or [self.size]


class PartSettings(Settings):
    """Settings of the part of each video to tokenize, and of the density of its clips."""

    start: Seconds | None = setting(
        None,
        section="Parts of videos",
        identity="when set",
        metavar="TIME",
        help="Start of the part to tokenize, counted from the first frame: 90, 12.5 or 1:30. A manifest's columns "
        "start_seconds and end_seconds set parts per row.",
    )
    end: Seconds | None = setting(
        None,
        section="Parts of videos",
        identity="when set",
        metavar="TIME",
        help="End of the part to tokenize, counted from the first frame: 90, 12.5 or 1:30. Default: the video's end.",
    )
    stride_seconds: Seconds | None = setting(
        None,
        section="Parts of videos",
        identity="when set",
        metavar="SECONDS",
        help="Time between the starts of consecutive clips; below a clip's length clips overlap, above it they leave "
        "gaps. Default: the length of a clip.",
    )
    clips_per_video: int | None = setting(
        None,
        section="Parts of videos",
        identity="when set",
        ge=1,
        metavar="N",
        help="Largest number of clips from each video, or from each part that a manifest names. Default: all.",
    )
    clip_placement: ClipPlacement = setting(
        "even",
        section="Parts of videos",
        identity=With("clips_per_video"),
        help="Placement of the N clips of --clips-per-video in N equal stretches: in the middle of each, or at a "
        "random position.",
    )
    clip_seed: int = setting(
        0,
        section="Parts of videos",
        identity=With("clips_per_video"),
        effect=With("clip_placement"),
        ge=0,
        metavar="SEED",
        help="Random seed of --clip-placement random.",
    )
    min_seconds: Seconds = setting(
        Fraction(0),
        section="Parts of videos",
        identity="when set",
        metavar="SECONDS",
        help="Leave out clips that hold less video than this. A video with no other clips is rejected as too short.",
    )

    @property
    def part(self) -> Part:
        """Part of each video that is tokenized, unless a manifest names another one.

        Raises:
            ValueError: the part is empty.
        """
        return Part.of(float(self.start or 0), None if self.end is None else float(self.end))


class ResumeSettings(Settings):
    """Interrupting a run and continuing an output."""

    retry_rejected: Reasons | None = setting(
        None,
        section="Resuming",
        identity=False,
        metavar="[REASON,...]",
        without_value="all",
        help="Process only what earlier runs rejected for these reasons, listed in rejects/. Without a reason: all "
        "rejections except copies of other videos.",
    )
    recheck: bool = setting(
        False,
        section="Resuming",
        identity=False,
        help="Ask remote storage whether the files of manifests were replaced, with one request per file. Local files "
        "and listed folders are always checked.",
    )
    grace_seconds: float = setting(
        20.0,
        section="Resuming",
        identity=False,
        ge=0,
        metavar="SECONDS",
        help="Time to finish and commit started work after Ctrl-C or SIGTERM. A second signal ends the run at once.",
    )
    lease_seconds: float = setting(
        60.0,
        section="Resuming",
        identity=False,
        ge=1,
        metavar="SECONDS",
        help="Time without a sign of life after which the lease of a run on another machine expires. Two runs never "
        "write to one output at once.",
    )


class LimitSettings(Settings):
    """Largest cost of one video; a video above a limit is rejected."""

    decode_timeout: float = setting(
        600.0,
        section="Limits of a video",
        identity=False,
        gt=0,
        metavar="SECONDS",
        help="Time limit for decoding a span; a span that takes longer is rejected. Long spans get the time of "
        "--decode-seconds-per-second if that is more.",
    )
    decode_seconds_per_second: float = setting(
        30.0,
        section="Limits of a video",
        identity=False,
        gt=0,
        metavar="SECONDS",
        help="Time limit for decoding each second of video in a long span.",
    )
    sandbox: Literal["auto", "required", "off"] = setting(
        "auto",
        section="Limits of a video",
        identity=False,
        help="Confinement of the processes that decode videos: no network, programs, secrets or other files. "
        "With required, the run is refused where the kernel lacks a part of it.",
    )
    videos_per_decoder: int = setting(
        16,
        section="Limits of a video",
        identity=False,
        ge=1,
        metavar="N",
        help="Number of videos that a decoding process sees before it is replaced, as a hostile one could falsify "
        "later ones. Each new process costs about 15 ms of a CPU.",
    )
    decoders: list[str] = setting(
        ["default"],
        section="Limits of a video",
        identity=False,
        metavar="NAME,...",
        help="Video decoders of FFmpeg that may run, such as default,cinepak; 'default' stands for those that carry "
        "nearly all video, and 'all' for every one. Videos of other codecs are rejected.",
    )
    decode_memory: ByteSize = setting(
        4 << 30,
        section="Limits of a video",
        identity=False,
        metavar="BYTES",
        help="Memory limit of a decoding process, such as 4GiB; the interpreter takes about 100 MB of it. A video "
        "that needs more is rejected.",
    )
    max_pixels: int = setting(
        8192 * 8192,
        section="Limits of a video",
        identity=False,
        ge=1,
        le=2**31 - 1,
        metavar="N",
        help="Reject videos with more pixels per frame than this.",
    )
    max_seconds: float = setting(
        48 * 3600.0,
        section="Limits of a video",
        identity=False,
        gt=0,
        metavar="SECONDS",
        help="Reject videos longer than this.",
    )
    max_frames: int = setting(
        20_000_000,
        section="Limits of a video",
        identity=False,
        ge=1,
        metavar="N",
        help="Reject videos with more frames than this.",
    )
    max_clips: int = setting(
        100_000,
        section="Limits of a video",
        identity=False,
        ge=1,
        metavar="N",
        help="Reject videos, or parts of them, with more clips than this by their header. A small file can claim to "
        "last for days.",
    )

    @field_validator("decoders", mode="before")
    @classmethod
    def _decoder_names(cls, value: Any) -> Any:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, (list, tuple)):
            return values
        names = [name.strip() for each in values for name in str(each).split(",")]
        for name in names:
            if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", name):
                raise ValueError(f"a decoder is a name of FFmpeg such as h264, got {name!r:.80}")
        return names


class ExecutionSettings(Settings):
    """Settings of execution: device, processes, threads, batch sizes and clips per span."""

    device: Literal["auto", "cuda", "cpu"] = setting(
        "auto",
        section="Execution",
        identity=False,
        help="Device of the encoders. With auto they use GPUs where Ray, or this machine with --local, has them; a GPU "
        "that PyTorch cannot use ends the run.",
    )
    batch_size: int | None = setting(
        None,
        section="Execution",
        identity=False,
        common=True,
        ge=1,
        metavar="N",
        help="Clips per forward pass, from one video or several. Default: 8 on a GPU, 1 on a CPU.",
    )
    encode_workers: Workers | None = setting(
        None,
        section="Execution",
        identity=False,
        effect=In("workers"),
        metavar="N|MIN..MAX",
        help="Number of encoder processes, or a range such as 2..8 or 2.. in which it follows the cluster. Default: "
        "one per GPU share, or one per four CPUs; on a joined cluster more as nodes join.",
    )
    wait_for_gpus: Seconds = setting(
        Fraction(0),
        section="Execution",
        identity=False,
        effect=In("joined"),
        metavar="TIME",
        help="Longest time to wait for the first GPU node of a joined cluster, such as 600 or 10:00. Nodes that join "
        "later are used too.",
    )
    gpus_per_worker: float = setting(
        1.0,
        section="Execution",
        identity=False,
        effect=In("gpu"),
        gt=0,
        le=1,
        metavar="SHARE",
        help="GPUs per encoder process, at most 1; with a fraction, several processes share a GPU. Ignored on CPUs.",
    )
    gpu_kernels: Literal["fused", "convolution", "compiled"] = setting(
        "fused",
        section="Execution",
        identity=False,
        effect=In("gpu"),
        help="Kernels of encoders on GPUs: fused ones, those with norms in the convolutions too, or compiled ones that "
        "torch.compile makes. Compiling takes minutes for each frame size and batch size; CPUs ignore the setting.",
    )
    compile_cache: str | None = setting(
        None,
        section="Execution",
        identity=False,
        effect=With("gpu_kernels"),
        metavar="FOLDER",
        help="Folder for compiled kernels, shared by all encoders that see it. Default: ~/.cache/vidshard/compiled.",
    )
    encode_threads: int | None = setting(
        None,
        section="Execution",
        identity=False,
        ge=1,
        metavar="N",
        help="CPU threads per encoder process. Default: the CPUs divided by the encoder processes.",
    )
    decode_workers: int | None = setting(
        None,
        section="Execution",
        identity=False,
        effect=In("workers"),
        ge=1,
        metavar="N",
        help="Largest number of videos to decode at once. Default: one per free CPU.",
    )
    clips_per_span: int | None = setting(
        None,
        section="Execution",
        # a resumed run compares spans: others would lose clips or write them twice, so their resolved length counts
        identity="resolved",
        ge=1,
        metavar="N",
        help="Clips per span, the unit of work and of resuming. Default: as many as fit 32 MiB of frames, and more "
        "with --continuous.",
    )


class TokenizeRun(
    # pydantic collects the fields of the last base first
    ClusterSettings,
    ExecutionSettings,
    LimitSettings,
    ResumeSettings,
    PartSettings,
    SamplingSettings,
    TokenizerSettings,
    AuditSettings,
    PageSettings,
    OutputSettings,
    InputSettings,
):
    """A complete tokenization run: the fields of all sections in one flat namespace."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a field that does not decide about its identity."""
        super().__pydantic_init_subclass__(**kwargs)
        check_identity(cls)

    @model_validator(mode="after")
    def _possible_clips(self) -> Self:
        _ = self.part, self.clip_specs  # both refuse impossible settings
        return self

    @property
    def limits(self) -> Limits:
        """Largest cost of one video."""
        return Limits(
            max_pixels=self.max_pixels,
            max_seconds=self.max_seconds,
            max_frames=self.max_frames,
            max_clips=self.max_clips,
            timeout_seconds=self.decode_timeout,
            seconds_per_second=self.decode_seconds_per_second,
            memory_bytes=self.decode_memory,
            sandbox=self.sandbox,
            videos_per_decoder=self.videos_per_decoder,
            decoders=tuple(self.decoders),
            image_fps=self.image_fps,
            private_hosts=None if self.allow_private else typed_hosts([*self.inputs, self.out]),
        )

    @property
    def clip_specs(self) -> list[ClipSpec]:
        """Clip settings, one per frame size.

        Raises:
            ValueError: the settings contradict each other.
        """
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


def identity_settings(run: TokenizeRun, *, padded: bool, tiled: bool) -> dict[str, Any]:
    """Settings of a run that belong to the identity of its output, as JSON values.

    The tokenizer, the digest of its weights and the resolved length of a span complete the identity; the resolved run
    adds them.

    Args:
        padded: whether clips are padded for the tokenizer.
        tiled: whether frames are encoded in tiles.
    """
    record = run.model_dump(mode="json")
    kinds = {"padded": padded, "tiled": tiled}
    return {name: record[name] for name in identity_names(run, kinds)}
