"""Resolved tokenization run: the settings, their tokenizer, and all values that follow from both.

The same class is made from the settings of a new run (`ResolvedRun.of`) and from a stored output
(`ResolvedRun.from_provenance`), so that tokenize, decode, verify and evaluate interpret every setting alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import ValidationError

from vidshard.models.tokenizer import FAMILIES, Tokenizer, TokenizerConfig, parse_config
from vidshard.models.vidtok.lengths import Padding
from vidshard.models.vidtok.tiling import Tiling
from vidshard.models.weights import DEFAULT, SHIPPED, load_weights, preset_in_name
from vidshard.pipeline import storage
from vidshard.pipeline.clip_specs import clip_specs_of, encoded_frames, padding_of, payload_of, requested_tiling
from vidshard.pipeline.compiled import default_compile_cache
from vidshard.pipeline.encode_stage import EncoderSpec
from vidshard.pipeline.inputs import lerobot
from vidshard.pipeline.named_tokenizer import NamedTokenizer, find_tokenizer
from vidshard.pipeline.plan import clips_per_span
from vidshard.pipeline.quality import QualityAudit
from vidshard.pipeline.rows import INTERNAL_COLUMNS
from vidshard.pipeline.tokenizer_source import PRECISIONS, TokenizerSource
from vidshard.pipeline.versions import code_version, library_versions
from vidshard.pipeline.video.signals import signal_fields
from vidshard.schemas.errors import UserError
from vidshard.schemas.fields import PageSettings, ReportSettings
from vidshard.schemas.runs import AuditSettings, TokenizeRun, identity_settings
from vidshard.schemas.tokens import Payload, Provenance
from vidshard.schemas.video import ClipSpec, Limits

RANDOM_WEIGHTS_NOTICE = (
    "RANDOM WEIGHTS: this tokenizer was never trained (seed {seed}). Its tokens mean nothing and its "
    "reconstructions look like noise; they only show that the machinery works."
)


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """Tokenization run with its tokenizer and weights resolved."""

    run: TokenizeRun
    source: TokenizerSource
    notice: str | None
    """A warning for readers, such as that the weights are random."""
    source_hosts: tuple[str, ...] | None = ()
    """Web servers with private addresses that sources may be fetched from again; None for all."""

    @classmethod
    def of(cls, run: TokenizeRun) -> Self:
        """Resolve the settings of a new run, and refuse impossible ones.

        Raises:
            UserError: the tokenizer is unknown, the clip length or size is impossible, or the weights are missing or
                of another model.
        """
        run = _with_shipped_weights(run)
        if run.out != storage.public_uri(run.out):
            out = storage.public_uri(run.out)
            raise UserError(f"--out {out}: put the credentials into the environment, not the URL")
        named = _named(run)
        config = named.config
        run = _with_default_clip(run, config)
        run = _with_signals_of_datasets(run)
        _refuse_impossible(run, config)
        run = _with_weights(run, named)
        absolute: dict[str, Any] = {
            "out": storage.absolute(run.out),
            "inputs": [lerobot.absolute(i) for i in run.inputs],
            "vgg_weights": None if run.vgg_weights is None else storage.absolute(run.vgg_weights),
        }
        run = run.model_copy(update=absolute)
        source = TokenizerSource(config=config, weights=run.weights, ema=run.ema, seed=run.random_weights)
        notice = None if run.weights else RANDOM_WEIGHTS_NOTICE.format(seed=run.random_weights)
        return cls(run=run, source=source.with_digest(), notice=notice)

    @classmethod
    def from_provenance(
        cls, provenance: Provenance, *, weights: str | None = None, source_hosts: tuple[str, ...] | None = ()
    ) -> Self:
        """Resolve the run that made a shard.

        Args:
            weights: present location of its weights; None for the location in the provenance.
            source_hosts: web servers with private addresses that its sources may be fetched from; None for all.

        Raises:
            UserError: this vidshard does not know a setting or the tokenizer.
        """
        run = stored_run(provenance.run)
        try:
            config = parse_config(provenance.tokenizer)
        except ValueError as error:
            raise UserError(f"the shards were made by a tokenizer that this vidshard does not know: {error}") from error
        source = TokenizerSource.stored(
            config, source=provenance.weights_source, ema=run.ema, sha256=provenance.weights_sha256, weights=weights
        )
        return cls(run=run, source=source, notice=provenance.notice, source_hosts=source_hosts)

    @property
    def config(self) -> TokenizerConfig:
        """Complete configuration of the tokenizer."""
        return self.source.config

    @property
    def source_limits(self) -> Limits:
        """Limits for decoding a source again; what the output records decides nothing about addresses."""
        return replace(self.run.limits, private_hosts=self.source_hosts)

    @cached_property
    def clip_specs(self) -> list[ClipSpec]:
        """Clip settings for this tokenizer, one per bucket."""
        return clip_specs_of(self.run, self.config)

    @property
    def largest(self) -> ClipSpec:
        """Clip settings of the bucket whose clips take most memory."""
        return max(self.clip_specs, key=lambda spec: spec.clip_bytes)

    @property
    def clips_per_span(self) -> int:
        """Number of clips per span."""
        return clips_per_span(self.largest, self.run.clips_per_span)

    @property
    def payload(self) -> Payload:
        """Payload of a clip of the first frame size."""
        return payload_of(self.run, self.config, *self.run.sizes[0])

    def payload_of(self, spec: ClipSpec) -> Payload:
        """Payload of a clip of one bucket."""
        return payload_of(self.run, self.config, spec.height, spec.width)

    @property
    def encoded_frames(self) -> int:
        """Number of frames of a clip as it is encoded, padding included."""
        return encoded_frames(self.run, self.config)

    @property
    def padding(self) -> Padding | None:
        """Placement of the frames that pad clips to a valid length; None if they are not padded."""
        return padding_of(self.run, self.config)

    @property
    def tiling(self) -> Tiling | None:
        """Tiles in which frames are encoded; None if no frame is larger than a tile."""
        tiling = requested_tiling(self.run, self.config)
        return None if tiling is None or all(tiling.fits(*size) for size in self.run.sizes) else tiling

    @property
    def identity(self) -> dict[str, Any]:
        """Identity: the settings that decide what a token means, as JSON values."""
        identity = {
            "tokenizer": self.config.identity,
            "weights_sha256": self.source.sha256,
            # a resumed run compares spans: spans of another length would lose clips, or write them twice
            "clips_per_span": self.clips_per_span,
            **identity_settings(self.run, padded=self.padding is not None, tiled=self.tiling is not None),
        }
        return in_stored_order(identity, _IDENTITY_ORDER)

    @property
    def provenance(self) -> Provenance:
        """Provenance for the metadata of every shard."""
        weights = self.run.weights
        return Provenance(
            tokenizer=self.config.model_dump(mode="json"),
            weights_sha256=self.source.sha256,
            weights_source=storage.public_uri(weights) if weights else f"seed:{self.run.random_weights}",
            payload=self.payload,
            run=public_record(self.run),
            identity=self.identity,
            code_version=code_version(),
            libraries=library_versions(self.config.libraries),
            notice=self.notice,
            normalization=self.source.normalization,
        )

    def load_tokenizer(self, device: str, *, precision: str | None = None) -> Tokenizer:
        """Load the tokenizer with its weights.

        Args:
            device: device of the weights.
            precision: a key of ``PRECISIONS``; None for that of the run.

        Raises:
            UserError: the weights are missing, or have another digest than expected.
        """
        return self.source.load(device, PRECISIONS[precision or self.run.precision])

    def placed(self, *, device: Literal["cuda", "cpu"], precision: str) -> Self:
        """Copy of this run with its device and precision decided.

        Args:
            precision: a key of ``PRECISIONS``.
        """
        assert precision in PRECISIONS
        return replace(self, run=self.run.model_copy(update={"device": device, "precision": precision}))

    @property
    def is_placed(self) -> bool:
        """Whether device and precision are decided."""
        return self.run.device != "auto" and self.run.precision != "auto"

    def encoder_spec(
        self, *, batch_size: int, num_threads: int, most_clips: Mapping[tuple[int, int], int] | None = None
    ) -> EncoderSpec:
        """Settings of the encoders of a run that is placed.

        Args:
            batch_size: clips per forward pass.
            num_threads: CPU threads of one encoder.
            most_clips: largest batch by frame size (height, width), where it is below ``batch_size``.
        """
        assert self.is_placed
        return EncoderSpec(
            source=self.source,
            device=self.run.device,
            compile_cache=self._compile_cache,
            fuses_convolutions=self.run.gpu_kernels == "convolution",
            most_clips=tuple((most_clips or {}).items()),
            precision=self.run.precision,
            num_frames=self.largest.num_frames,
            continuous=self.largest if self.run.continuous else None,
            payload=self.payload,
            batch_size=batch_size,
            num_threads=num_threads,
            padding=self.padding,
            tiling=self.tiling,
            audit=self.audit,
        )

    @property
    def audit(self) -> QualityAudit | None:
        """Choice of the clips whose quality is measured; None without ``--audit``."""
        if not self.run.audit:
            return None
        seed = json.dumps(self.identity, sort_keys=True, default=str)
        return QualityAudit(share=self.run.audit, seed=seed, vgg_weights=self.run.vgg_weights)

    @property
    def _compile_cache(self) -> str | None:
        if self.run.gpu_kernels != "compiled" or self.run.device != "cuda":
            return None
        return self.run.compile_cache or default_compile_cache()


def stored_run(record: Any) -> TokenizeRun:
    """Parse the settings that an output records.

    Raises:
        UserError: this vidshard does not know one of them.
    """
    try:
        return TokenizeRun.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise UserError(
            f"the output was made with a setting that this vidshard does not know: {name}: {first['msg']}; use the "
            "vidshard that wrote it (`vidshard inspect` shows its code_version) or a newer one"
        ) from error


def stated_config(weights: str, *, ema: bool = False) -> TokenizerConfig:
    """Read the config that a weights file states.

    Raises:
        UserError: there is no such file, or it states no config; the message then suggests one from the file's name.
    """
    try:
        with storage.local_copy(storage.absolute(weights)) as path:
            assert path is not None
            return load_weights(path, ema=ema)[0]
    except ValueError as error:
        named = preset_in_name(storage.public_uri(weights))
        hint = f"by its name it is --tokenizer {named}" if named else "--tokenizer NAME says which model it is"
        raise UserError(f"{error} ({hint})") from error
    except (FileNotFoundError, storage.StorageError) as error:
        raise UserError(str(error)) from error


def _with_shipped_weights(run: TokenizeRun) -> TokenizeRun:
    """Add the weights of the package to a run that names their preset or no tokenizer, and no weights."""
    name = run.tokenizer or DEFAULT
    if name not in SHIPPED or run.weights is not None or run.random_weights is not None:
        return run
    return run.model_copy(update={"tokenizer": name, "weights": f"{storage.SHIPPED_SCHEME}{name}"})


def _named(run: TokenizeRun) -> NamedTokenizer:
    if run.tokenizer is not None:
        return find_tokenizer(run.tokenizer)
    if run.weights is None:
        raise UserError("--tokenizer is missing: name a model (see `vidshard tokenizers`), or give --weights that do")
    config = stated_config(run.weights, ema=run.ema)
    return NamedTokenizer(name=config.name, config=config)


def _with_signals_of_datasets(run: TokenizeRun) -> TokenizeRun:
    """Take every numeric feature of LeRobot datasets as a signal, where a run names no signals.

    Raises:
        UserError: what is asked for would break the promise that the cameras of an episode have the same clips.
        InputError: a dataset cannot be read.
    """
    datasets = [lerobot.Dataset.open(text) for text in run.inputs if lerobot.is_dataset(text)]
    if not datasets:
        return run
    if run.clip_placement == "random" and any(len(each.chosen_cameras(run.cameras)) > 1 for each in datasets):
        raise UserError(
            "--clip-placement random would place the clips of an episode's cameras at different times: use even, or "
            "name one of --cameras"
        )
    if run.signals is not None:
        if any(rule == "frames" for _, rule in run.signals):
            raise UserError("--signals: rows of LeRobot datasets have times: use nearest in place of frames")
        return run
    signals = dict(signal for each in datasets for signal in each.signals)
    return run.model_copy(update={"signals": list(signals.items())}) if signals else run


def _with_default_clip(run: TokenizeRun, config: TokenizerConfig) -> TokenizeRun:
    """Give a run the tokenizer's default clip length and frame size where it names none."""
    clip = config.default_clip
    given = run.model_fields_set
    length = {} if "frames" in given else {"frames": clip.num_frames}
    size = {} if "size" in given or run.buckets else {"size": (clip.height, clip.width)}
    return run.model_copy(update={**length, **size})


def _refuse_impossible(run: TokenizeRun, config: TokenizerConfig) -> None:
    """Raise UserError for settings that contradict the tokenizer or one another."""
    if run.keep_logvar and not config.has_logvar:
        raise UserError(f"--keep-logvar is for KL tokenizers; {config.name} gives tokens")
    if run.gpu_kernels != "fused" and config.family != "vidtok":
        raise UserError(
            f"--gpu-kernels {run.gpu_kernels} is for encoders of the VidTok family, which {config.name} is not"
        )
    try:
        for size in run.sizes:
            payload_of(run, config, *size)
            FAMILIES[config.family].check_clip(config, encoded_frames(run, config), *size)
        requested_tiling(run, config)
        clip_specs_of(run, config)
    except ValueError as error:
        raise UserError(str(error)) from error
    columns = [field.name for name, rule in run.signals or [] for field in signal_fields(name, rule)]
    taken = [name for name in columns if name in INTERNAL_COLUMNS or columns.count(name) > 1]
    if taken:
        raise UserError(f"--signals: the shards have another column '{taken[0]}': rename the manifest's")


def _with_weights(run: TokenizeRun, named: NamedTokenizer) -> TokenizeRun:
    """Pin the run's weights so that every node loads the same file, or choose seed 0 for a tiny tokenizer."""
    config = named.config
    if named.weights is not None or run.tokenizer not in (None, named.name):
        given = run.weights is not None or run.random_weights is not None
        run = run.model_copy(update={"tokenizer": named.name} | ({} if given else {"weights": named.weights}))
    if run.weights is not None:
        try:
            return run.model_copy(update={"weights": storage.pinned(storage.absolute(run.weights))})
        except storage.StorageError as error:
            raise UserError(str(error)) from error
    if run.random_weights is None:
        if "tiny" not in config.name.split("_"):
            raise UserError(
                f"no weights for {config.name}: give --weights FILE (.safetensors or .ckpt), or --random-weights 0 "
                f"to try the machinery with random ones; {DEFAULT} comes with its own"
            )
        return run.model_copy(update={"random_weights": 0})
    return run


def public_record(run: TokenizeRun) -> dict[str, Any]:
    """Settings of a run for display and storage, without credentials in URLs, and without what it tells meanwhile."""
    told = set(ReportSettings.model_fields) | set(PageSettings.model_fields)
    record = in_stored_order(run.model_dump(mode="json", exclude=told), _RUN_ORDER)
    record["inputs"] = [storage.public_uri(uri) for uri in run.inputs]
    if not run.audit:  # shards of a run without an audit are what they were before there was one
        record = {name: value for name, value in record.items() if name not in AuditSettings.model_fields}
    paths = ("out", "weights", "vgg_weights")
    return record | {name: storage.public_uri(record[name]) for name in paths if record.get(name)}


def in_stored_order(record: dict[str, Any], order: str) -> dict[str, Any]:
    """Sort the keys of a record as shards have had them since format version 1, other keys last.

    The bytes of a shard then do not depend on how the settings are grouped in the code.

    Args:
        order: names separated by white space.
    """
    names = order.split()
    return {name: record[name] for name in sorted(record, key=lambda n: names.index(n) if n in names else len(names))}


_RUN_ORDER = """
inputs signals image_fps limit out shard_size commit_minutes keep_logvar max_reject_share tokenizer weights ema
random_weights precision tile_size tile_overlap fps frames pad_frames continuous start end stride_seconds
clips_per_video clip_placement clip_seed min_seconds tail size damaged buckets resize retry_rejected recheck
grace_seconds lease_seconds batch_size encode_workers gpus_per_worker encode_threads decode_workers decode_timeout
decode_seconds_per_second decode_memory max_pixels max_seconds max_frames clips_per_span ray_address object_store
verbose
"""
_IDENTITY_ORDER = """
tokenizer weights_sha256 clips_per_span precision fps frames tail resize keep_logvar size buckets pad_frames tile_size
tile_overlap continuous start end stride_seconds clips_per_video signals clip_placement clip_seed min_seconds image_fps
damaged
"""
