"""Building blocks of settings: parsers of values, annotated types, and fields that know their flag and their identity.

A settings model is one closed pydantic class that defines the flags, the keys of the YAML file and the stored run. Each
field is made by :func:`setting`, which records its help text, its section of ``--help``, its former names and whether
it belongs to the identity of an output. ``jobs.runtime.settings`` turns such models into command-line options.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from vidshard.schemas.rejections import Reason
from vidshard.schemas.video import SignalRule, parse_rate

T = TypeVar("T")

LARGEST_NUMBER = 2**53
"""Largest number in a setting: JSON and float64 hold every whole number up to it."""
LARGEST_FLOAT = 10**9
"""Largest number in a setting with decimals: 31 years if it counts seconds, which timers take."""
_BYTES = {"": 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(value: object) -> int:
    """A number of bytes, from ``128MiB``, ``2GB`` or a plain number.

    Raises:
        ValueError: the value is neither.
    """
    match = _matched(r"(\d{1,18}(?:\.\d{1,18})?)\s*([a-zA-Z]*)", value)
    if not match or match[2].lower() not in _BYTES:
        raise ValueError(f"a size is a number of bytes or one such as 128MiB or 2GB, got {_shown(value)}")
    return int(Fraction(match[1]) * _BYTES[match[2].lower()])


def parse_size(value: object) -> tuple[int, int]:
    """A frame size (height, width) in pixels, from ``256``, ``256x448`` (height x width) or a pair.

    Raises:
        ValueError: the value is none of these.
    """
    if isinstance(value, (tuple, list)) and len(value) == 2:
        value = f"{value[0]}x{value[1]}"
    match = _matched(r"(\d{1,9})(?:\s*[xX]\s*(\d{1,9}))?", value)
    if not match or int(match[1]) < 1 or int(match[2] or 1) < 1:
        raise ValueError(f"a size is one side such as 256, or height x width such as 256x448, got {_shown(value)}")
    return int(match[1]), int(match[2] or match[1])


def parse_sizes(value: object) -> list[tuple[int, int]]:
    """Frame sizes, from ``256x256,256x448`` or a list.

    Raises:
        ValueError: an item is no size, or the same size is given twice.
    """
    sizes = [parse_size(part) for part in _items(value, "give sizes such as 256x256,256x448")]
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"the same size is given twice in {value!r}")
    return sizes


def parse_seconds(value: object) -> Fraction:
    """An exact, non-negative time in seconds, from ``90``, ``12.5``, ``1:30`` or ``1:02:03.5``.

    Raises:
        ValueError: the value is none of these, or has 60 minutes or seconds or more behind a colon.
    """
    match = _matched(r"(?:(?:(\d{1,9}):)?(\d{1,9}):)?(\d{1,15}(?:\.\d{1,15})?|\d{1,30}/0*[1-9]\d{0,29})", value)
    if not match:
        raise ValueError(f"a time is a number of seconds, or one such as 1:30 or 1:02:03.5, got {_shown(value)}")
    hours, minutes, seconds = match[1], match[2], Fraction(match[3])
    if (minutes is not None and seconds >= 60) or (hours is not None and int(minutes) >= 60):
        raise ValueError(
            f"minutes and seconds behind a colon are below 60, as in 1:30 or 1:02:03.5, got {_shown(value)}"
        )
    return int(hours or 0) * 3600 + int(minutes or 0) * 60 + seconds


def parse_signals(value: object) -> list[tuple[str, SignalRule]]:
    """Names and rules of signals, from ``actions=linear,poses=window``, or a list of such texts or of pairs.

    Raises:
        ValueError: an item has another form, or the same signal is given twice.
    """
    signals: list[tuple[str, SignalRule]] = []
    for part in _items(value, "give signals as NAME=RULE, such as actions=linear"):
        name, equals, rule = ("=".join(part) if isinstance(part, (list, tuple)) else str(part)).partition("=")
        if not equals or not all(part.isidentifier() for part in name.strip().split(".")):
            raise ValueError(f"a signal is given as NAME=RULE, such as actions=linear, got {part!r}")
        known = next((known for known in get_args(SignalRule) if known == rule.strip()), None)
        if known is None:
            raise ValueError(f"signal {name}: the rule is one of {', '.join(get_args(SignalRule))}, got {rule!r}")
        signals.append((name.strip(), known))
    if len({name for name, _ in signals}) < len(signals):
        raise ValueError(f"the same signal is given twice in {value!r}")
    return signals


def parse_episodes(value: object) -> list[tuple[int, int]]:
    """Intervals [start, end) of episodes, from ``0,7,10:20``, or a list of such texts or of pairs.

    Raises:
        ValueError: an item has another form, or is empty.
    """
    if value in ([], ()):
        return []
    intervals = []
    for part in _items(value, "give episodes such as 0,7,10:20"):
        for item in [":".join(map(str, part))] if isinstance(part, (list, tuple)) else str(part).split(","):
            match = _matched(r"(\d{1,9})(?::(\d{1,9}))?", item)
            start = int(match[1]) if match else 0
            end = int(match[2]) if match and match[2] else start + 1
            if match is None or end <= start:
                raise ValueError(f"episodes are numbers or START:END such as 0,7,10:20, got {item!r:.80}")
            intervals.append((start, end))
    return intervals


def parse_pairs(value: object) -> object:
    """A mapping, from texts such as ``steps=1000``; other values stay as they are.

    Raises:
        ValueError: a text has no ``=``.
    """
    if not isinstance(value, (list, tuple)):
        return value
    if any("=" not in str(pair) for pair in value):
        raise ValueError("give KEY=VALUE, such as steps=1000")
    return dict(str(pair).split("=", 1) for pair in value)


def parse_reasons(value: object) -> list[Reason]:
    """Reasons of rejections, from ``decode_timeout,unreadable`` or a list; ``all`` and an empty list give no reason.

    Raises:
        ValueError: an item is no reason of a rejection.
    """
    if value == []:
        return []
    names = [str(part).strip() for part in _items(value, "give reasons such as decode_timeout,unreadable, or 'all'")]
    if names == ["all"]:
        return []
    for name in names:
        if name not in list(Reason):
            raise ValueError(f"{name!r} is no reason of a rejection; these are: {', '.join(Reason)}")
    return [Reason(name) for name in names]


@dataclass(frozen=True)
class WorkerCount:
    """Number of workers, or the numbers between which a pool may grow and shrink."""

    least: int
    most: int | None
    """None for as many as fit."""

    def __str__(self) -> str:
        return f"{self.least}" if self.most == self.least else f"{self.least}..{self.most or ''}"


def parse_workers(value: object) -> WorkerCount:
    """A number of workers, from ``4``, ``2..8``, or ``2..`` for two and as many more as fit.

    Raises:
        ValueError: the value is none of these, or no worker is left.
    """
    if isinstance(value, WorkerCount):
        return value
    match = None if isinstance(value, bool) else _matched(r"(\d{1,6})(\.\.(\d{1,6})?)?", value)
    if match is None:
        raise ValueError(f"a number of workers is one such as 4, or a range such as 2..8 or 2.., got {_shown(value)}")
    least = int(match[1])
    most = least if match[2] is None else int(match[3]) if match[3] else None
    if least < 1 or (most is not None and most < least):
        raise ValueError(f"a range of workers begins with 1 or more and does not fall, got {_shown(value)}")
    return WorkerCount(least, most)


def _matched(pattern: str, value: object) -> re.Match[str] | None:
    """Match the text of a value whole, but for white space around it; ``\\d`` are the digits 0 to 9 alone."""
    return re.fullmatch(rf"\s*{pattern}\s*", str(value), re.ASCII)


def _shown(value: object) -> str:
    """A refused value in a message."""
    return f"{value!r:.80}"


def _workers_record(workers: WorkerCount) -> int | str:
    """As outputs have recorded it: a plain number if it is fixed."""
    return workers.least if workers.most == workers.least else str(workers)


def _items(value: object, usage: str) -> Sequence[object]:
    """The items of a comma-separated text or of a list, at least one."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ValueError(f"{usage}, got {_shown(value)}")
    return parts


def parse_rates(value: object) -> object:
    """Rates from ``8`` or ``8,30`` or a list; other values stay as they are."""
    if isinstance(value, (str, int, float, Fraction)):
        value = str(value).split(",")
    if not isinstance(value, (list, tuple)):
        return value
    return [parse_rate(part) if isinstance(part, str) else part for item in value for part in _split(item)]


def _split(item: object) -> list[object]:
    return list(item.split(",")) if isinstance(item, str) else [item]


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _sizes_text(sizes: list[tuple[int, int]]) -> str:
    return ",".join(map(_size_text, sizes))


def _signals_text(signals: list[tuple[str, str]]) -> str:
    return ",".join(f"{name}={rule}" for name, rule in signals)


def _episodes_text(episodes: list[tuple[int, int]]) -> list[str]:
    return [f"{start}:{end}" for start, end in episodes]


def _reasons_text(reasons: list[Reason]) -> str:
    return ",".join(reasons) or "all"


Rate = Annotated[Fraction, BeforeValidator(parse_rate), PlainSerializer(str)]
"""Frames per second, exact and positive."""
Rates = Annotated[list[Rate], BeforeValidator(parse_rates)]
"""Frame rates in frames per second."""
Seconds = Annotated[Fraction, BeforeValidator(parse_seconds), PlainSerializer(str)]
"""A time in seconds, exact and not negative."""
FrameSize = Annotated[tuple[int, int], BeforeValidator(parse_size), PlainSerializer(_size_text)]
"""(height, width) in pixels."""
FrameSizes = Annotated[list[tuple[int, int]], BeforeValidator(parse_sizes), PlainSerializer(_sizes_text)]
"""Distinct (height, width) pairs in pixels, at least one."""
Signals = Annotated[list[tuple[str, SignalRule]], BeforeValidator(parse_signals), PlainSerializer(_signals_text)]
"""(name, rule) of each signal, at least one."""
Episodes = Annotated[list[tuple[int, int]], BeforeValidator(parse_episodes), PlainSerializer(_episodes_text)]
"""Intervals [start, end) of episode indices; empty for all."""
Reasons = Annotated[list[Reason], BeforeValidator(parse_reasons), PlainSerializer(_reasons_text)]
"""Reasons of rejections; an empty list means every reason."""
Pairs = Annotated[dict[str, object], BeforeValidator(parse_pairs)]
"""Settings by name, whose values are not parsed yet."""
Workers = Annotated[WorkerCount, BeforeValidator(parse_workers), PlainSerializer(_workers_record)]
"""A number of workers, or a range of them."""
ByteSize = Annotated[int, BeforeValidator(parse_bytes), Field(ge=1)]
"""A positive number of bytes."""


@dataclass(frozen=True)
class With:
    """Identity of a setting that matters only when another one is set, as a seed does beside what it seeds."""

    other: str
    """Name of the other field; it is set when it differs from its default."""


@dataclass(frozen=True)
class Without:
    """Identity of a setting that matters only when another one is not set, because that one replaces it."""

    other: str
    """Name of the other field; it is set when it differs from its default."""


@dataclass(frozen=True)
class When:
    """Identity of a setting that matters only in a run of some kind, which only the resolved run knows."""

    kind: Literal["padded", "tiled"]
    """``padded``: clips are filled up for the tokenizer. ``tiled``: frames are encoded in tiles."""


Identity = bool | Literal["when set", "resolved"] | With | Without | When
"""Whether a setting belongs to the identity of an output.

``True``: always. ``False``: never. ``"when set"``: only if it differs from its default, so that outputs made before the
setting existed keep their identity. ``"resolved"``: not as written, because what the resolved run derives from it
stands in the identity (a digest of the weights for their path). ``With``, ``Without``, ``When``: on a condition.
"""


@dataclass(frozen=True)
class In:
    """Effect of a setting that a job has in one mode only."""

    mode: Literal["workers", "own_ray", "joined", "gpu"]
    """``workers``: stages run in processes of Ray. ``own_ray``: this command starts Ray. ``joined``: it joins one that
    runs. ``gpu``: encoders run on GPUs."""


_ELSEWHERE = {
    "workers": "with --local, which runs every stage in this process",
    "own_ray": "here: it is for a Ray that this command starts",
    "joined": "here: it is for a Ray cluster that this command joins (--ray-address)",
    "gpu": "on CPUs",
}
"""End of the sentence that a setting has no effect, by the mode that the job is not in."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Command-line flag of a field of a settings model, and its role in the identity."""

    section: str
    """Heading of ``--help-all`` that the flag stands under."""
    metavar: str | None
    """Placeholder of the flag's value in the help."""
    short: str | None
    """Short flag, such as ``-v``."""
    without_value: str | None
    """Value of the flag when it is given without one; None if it needs a value."""
    aliases: tuple[str, ...]
    """Former names of the field, still accepted as flags and keys."""
    identity: Identity | None
    """Role in the identity; None if the model has no identity of its own."""
    common: bool
    """Whether ``--help`` lists the flag; ``--help-all`` lists every flag."""
    effect: In | With | Without | None
    """When it has an effect; None for always."""

    def __call__(self, json_schema: dict[str, Any]) -> None:
        """Add the section to the field's JSON schema; pydantic calls this because it is ``json_schema_extra``."""
        json_schema["section"] = self.section


def setting(
    default: Any = ...,
    *,
    section: str,
    help: str,
    metavar: str | None = None,
    short: str | None = None,
    without_value: str | None = None,
    aliases: tuple[str, ...] = (),
    identity: Identity | None = None,
    common: bool = False,
    effect: In | With | Without | None = None,
    **limits: Any,
) -> Any:
    """Define a documented field of a settings model.

    Args:
        default: Value of the field when nothing is given; the field is required without it.
        help: Help text: one or two sentences that stand alone.
        limits: Bounds that pydantic checks, such as ``ge=1``.

    The other arguments are described in :class:`Setting`.
    """
    record = Setting(
        section=section,
        metavar=metavar,
        short=short,
        without_value=without_value,
        aliases=aliases,
        identity=identity,
        common=common,
        effect=effect or (identity if isinstance(identity, (With, Without)) else None),
    )
    return Field(default, description=help, json_schema_extra=record, **limits)


def setting_of(field: FieldInfo) -> Setting:
    """The record that :func:`setting` left in a field.

    Raises:
        TypeError: the field was made in another way.
    """
    if not isinstance(field.json_schema_extra, Setting):
        raise TypeError(f"a field of a settings model is made by setting(), got {field!r}")
    return field.json_schema_extra


def _kinds(annotation: object) -> tuple[object, ...]:
    return (annotation, *get_args(annotation))


class Settings(BaseModel):
    """Base of every settings model: closed, frozen, and open to former names of its fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_another_kind(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads ``off`` and ``no`` as false, which pydantic would take for the number 0."""
        if isinstance(value, bool) and bool not in _kinds(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("true, false, yes, no, on and off are no values here; put a word into quotes")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _of_a_size_that_can_be_computed_with(cls, value: Any) -> Any:
        most = LARGEST_FLOAT if isinstance(value, float) else LARGEST_NUMBER
        if isinstance(value, (int, float)) and abs(value) > most:
            raise ValueError(f"a number is at most {most:,} here")
        return value

    @model_validator(mode="before")
    @classmethod
    def _accept_former_names(cls, values: object) -> object:
        return cls.current_names(values) if isinstance(values, dict) else values

    @classmethod
    def former_names(cls) -> dict[str, str]:
        """Present name of each field by its former names."""
        return {
            alias: name
            for name, field in cls.model_fields.items()
            if isinstance(field.json_schema_extra, Setting)
            for alias in field.json_schema_extra.aliases
        }

    @classmethod
    def current_names(cls, values: Mapping[str, T]) -> dict[str, T]:
        """Rename former names of fields to present ones; unknown names stay.

        Raises:
            ValueError: a field is given by two of its names.
        """
        former = cls.former_names()
        renamed: dict[str, T] = {}
        for name, value in values.items():
            now = former.get(name, name)
            if now in renamed:
                raise ValueError(f"{now} is given twice: by this name and by a former one")
            renamed[now] = value
        return renamed


def check_identity(model: type[Settings]) -> None:
    """Refuse a model in which a field leaves its identity undecided, so that none can mix outputs by omission.

    Raises:
        TypeError: a field lacks ``identity=``, or names a field there that does not exist.
    """
    for name, field in model.model_fields.items():
        identity = setting_of(field).identity
        if identity is None:
            raise TypeError(f"{model.__name__}.{name}: say with identity= whether it decides what a token means")
        if isinstance(identity, (With, Without)) and identity.other not in model.model_fields:
            raise TypeError(f"{model.__name__}.{name}: identity={identity} names no field")


def identity_names(settings: Settings, kinds: Mapping[str, bool]) -> list[str]:
    """Names of the fields that belong to the identity, with the values that these settings have.

    Args:
        kinds: for each kind of :class:`When`, whether the run is of it.
    """
    fields = type(settings).model_fields

    def is_set(name: str) -> bool:
        return bool(getattr(settings, name) != fields[name].default)

    def counts(name: str) -> bool:
        match setting_of(fields[name]).identity:
            case "when set":
                return is_set(name)
            case With(other):
                return is_set(other)
            case Without(other):
                return not is_set(other)
            case When(kind):
                return kinds[kind]
            case identity:
                return identity is True

    return [name for name in fields if counts(name)]


def without_effect(settings: Settings, modes: Collection[str]) -> list[str]:
    """A sentence for each setting that differs from its default and changes nothing in this job.

    Args:
        modes: the modes of :class:`In` that the job is in.
    """
    fields = type(settings).model_fields

    def is_set(name: str) -> bool:
        return bool(getattr(settings, name) != fields[name].default)

    found = []
    for name, field in fields.items():
        why = None
        match setting_of(field).effect:
            case In(mode) if mode not in modes:
                why = _ELSEWHERE[mode]
            case With(other) if not is_set(other):
                why = f"without --{other.replace('_', '-')}"
            case Without(other) if is_set(other):
                why = f"beside --{other.replace('_', '-')}"
        if why is not None and is_set(name):
            found.append(f"--{name.replace('_', '-')} has no effect {why}")
    return found


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """Compare two records of settings, given as JSON values.

    Nested mappings are compared field by field under dotted names, such as ``stages.stage1.steps``.

    Args:
        before: Stored record.
        now: Record to compare with it.
        defaults: Values of fields that one of the records leaves out; None without it.

    Returns:
        ``NAME: VALUE there, VALUE now`` for each field that differs, sorted by name.
    """
    known, old, new = _flat(defaults or {}), _flat(before), _flat(now)
    pairs = {name: (old.get(name, known.get(name)), new.get(name, known.get(name))) for name in old.keys() | new.keys()}
    return [f"{name}: {old!r} there, {new!r} now" for name, (old, new) in sorted(pairs.items()) if old != new]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of dotted names; an empty mapping stays a value."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return flat


ProgressMode = Literal["none", "plain", "live"]
"""Display of progress: nothing, a line about every ten seconds, or one live line."""


class ReportSettings(Settings):
    """Settings of what a job tells while it runs. They are no part of what an output records about its run."""

    progress: ProgressMode | None = setting(
        None,
        section="Execution",
        identity=False,
        metavar="none|plain|live",
        help="Display of progress: 'live' is one line that changes, 'plain' a line about every ten seconds, 'none' "
        "nothing. Default: live on a terminal, plain elsewhere.",
    )
    log_json: str | None = setting(
        None,
        section="Execution",
        identity=False,
        metavar="FILE",
        help="Local file to append events to, one JSON object per line, for schedulers and log stores. "
        "docs/deploying.md lists the events.",
    )


class ClusterSettings(ReportSettings):
    """Settings of the Ray cluster, shared by every job that runs on one."""

    ray_address: str | None = setting(
        None,
        section="Execution",
        metavar="ADDRESS",
        identity=False,
        effect=In("workers"),
        help="Ray cluster to run on, such as 'auto' or head:6379. Default: $RAY_ADDRESS, or a private Ray on "
        "this machine.",
    )
    object_store: ByteSize | None = setting(
        None,
        section="Execution",
        metavar="BYTES",
        identity=False,
        effect=In("own_ray"),
        help="Size of Ray's shared memory for frames in flight, such as 2GiB, when Ray starts on this machine. "
        "Default: Ray's choice.",
    )
    verbose: bool = setting(
        False, section="Execution", short="-v", identity=False, help="Show Ray's own log and progress."
    )


class PageSettings(Settings):
    """Setting of the report, shared by every job that writes one."""

    report: str = setting(
        "auto",
        section="Output",
        metavar="auto|none|FILE",
        identity=False,
        help="Page about the run, one HTML file that needs no network. With auto it is report.html in the output, or "
        "none if $VIDSHARD_REPORT is 'none'.",
    )

    @field_validator("report", mode="after")
    @classmethod
    def _named_as_a_page(cls, value: str) -> str:
        if value not in ("auto", "none") and not value.lower().endswith((".html", ".htm")):
            raise ValueError(f"a report is auto, none or a file that ends in .html, got {value!r:.80}")
        return value
