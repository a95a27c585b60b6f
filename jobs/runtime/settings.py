"""Settings of a run from flags, a YAML file or both, and the help of the commands that take them.

One settings model defines all three: the field ``max_reject_share`` is the flag ``--max-reject-share`` and the key
``max_reject_share`` of the file. A mistake is refused with the place where it was written and the nearest valid name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vidshard.schemas.errors import UserError
from vidshard.schemas.fields import ReportSettings, Setting, Settings, setting_of
from vidshard.schemas.text import readable

Model = TypeVar("Model", bound=Settings)
T = TypeVar("T")

_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_SHOW_ALL = "vidshard.show_all"
_LAST_SECTIONS = ("Execution", "Settings file")


class SettingsError(UserError):
    """A setting is unknown, missing, given twice, or has an impossible value."""


class WholeNumber(click.IntRange):
    """Type of an option whose value is written in the digits 0 to 9; ``int`` takes those of any script."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; refused with click's message."""
        if isinstance(value, str) and not re.fullmatch(r"[-+]?[0-9]{1,15}", value.strip()):
            self.fail(f"{value!r:.80} is not a valid integer.", param, ctx)
        return super().convert(value, param, ctx)


class Decimal(click.FloatRange):
    """Type of an option whose value may have decimals, written in the digits 0 to 9."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number; refused with click's message."""
        if isinstance(value, str) and not value.isascii():
            self.fail(f"{value!r:.80} is not a valid float.", param, ctx)
        return super().convert(value, param, ctx)


class SectionedOption(click.Option):
    """An option with a section of ``--help-all``.

    Args:
        section: heading that the option stands under.
        common: whether ``--help`` lists the option.
    """

    def __init__(self, *args: Any, section: str, common: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section
        self.common = common

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """Names and help text; a switch that is off by default is listed without its ``--no-`` form."""
        record = super().get_help_record(ctx)
        if record is None or not self.secondary_opts or "[default: " in record[1]:
            return record
        return record[0].split(" / ")[0], record[1]


class OrderedGroup(click.Group):
    """A group whose help lists sub-commands in the order in which a newcomer meets them."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """Names of the sub-commands in the order of their definition."""
        return list(self.commands)


class SectionedCommand(click.Command):
    """A command with many options: ``--help`` lists the common ones, ``--help-all`` all of them by section."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        show_all = click.Option(
            ["--help-all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_print_all,
            help="Show all options, by section.",
        )
        self.params.append(show_all)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the common options, or every section in the order of the fields."""
        options = [option for option in self.get_params(ctx) if isinstance(option, click.Option)]
        listed: dict[str, list[tuple[str, str]]] = {}
        left_out = 0
        show_all = bool(ctx.meta.get(_SHOW_ALL))
        for option in sorted(options, key=_section_rank if show_all else _common_rank):
            record = option.get_help_record(ctx)
            if record is None:
                continue
            if show_all:
                listed.setdefault(_section(option), []).append(record)
            elif not isinstance(option, SectionedOption) or option.common:
                listed.setdefault("Common options", []).append(record)
            else:
                left_out += 1
        for section, records in listed.items():
            with formatter.section(section):
                formatter.write_dl(records)
        formatter.write_paragraph()
        if left_out:
            formatter.write_text(f"{left_out} more options: {ctx.command_path} --help-all")
        elif show_all:
            formatter.write_text("Every switch has a --no- form, which turns it off where a settings file turns it on.")


def _section(option: click.Option) -> str:
    return option.section if isinstance(option, SectionedOption) else "Help"


def _section_rank(option: click.Option) -> int:
    """Sort key that keeps the order of the fields, and puts how a run executes and the help last."""
    ranks = (*_LAST_SECTIONS, "Help")
    return 1 + ranks.index(_section(option)) if _section(option) in ranks else 0


def _common_rank(option: click.Option) -> int:
    """Sort key that puts required options first, and otherwise does as :func:`_section_rank`."""
    return -1 if (option.help or "").endswith("[required]") else _section_rank(option)


def _print_all(ctx: click.Context, _option: click.Parameter, is_given: bool) -> None:
    if is_given and not ctx.resilient_parsing:
        ctx.meta[_SHOW_ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


def options_of(
    model: type[Settings],
    *,
    leave_out: frozenset[str] = frozenset(),
    defaults: Mapping[str, Sequence[Any]] | None = None,
) -> Callable[[Any], Any]:
    """Decorator that gives a click command one option per field of a model, and ``--config``.

    Values arrive as text, None or an empty tuple where the flag was not given; :func:`resolve_settings` builds the
    model from them. Former names of a field are hidden options.

    Args:
        model: settings model.
        leave_out: fields without an option.
        defaults: defaults to show instead of the model's: one value, or one per stage of a training.
    """

    def decorate(function: Any) -> Any:
        function = click.option(
            "--config",
            "config_path",
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE",
            cls=SectionedOption,
            section="Settings file",
            common=True,
            help="YAML file of settings; its keys are the flags with _ for -. Flags win over the file.",
        )(function)
        for name, field in reversed(model.model_fields.items()):
            if name not in leave_out:
                known = defaults[name] if defaults and name in defaults else [field.default]
                function = _option(name, field, known)(function)
                for alias in setting_of(field).aliases:
                    function = _hidden_option(alias, field)(function)
        return function

    return decorate


def report_options(function: Any) -> Any:
    """Decorator that gives a click command without a settings model the flags of ``ReportSettings``."""
    for name in reversed(ReportSettings.model_fields):
        function = shared_option(ReportSettings, name)(function)
    return function


def shared_option(model: type[Settings], name: str) -> Callable[[Any], Any]:
    """Decorator that gives a click command without a settings model the flag of one field of a model.

    The value is None where the flag was not given.
    """
    field = model.model_fields[name]
    if field.annotation is bool:
        kind: dict[str, Any] = {"is_flag": True}
    else:
        choices = _choices(field)
        kind = {"type": click.Choice(choices)} if choices else {"metavar": setting_of(field).metavar}
    short = setting_of(field).short
    flags = ([short] if short else []) + [_flag(name), name]
    return click.option(*flags, default=None, help=field.description, **kind)


def _option(name: str, field: FieldInfo, defaults: Sequence[Any]) -> Callable[[Any], Any]:
    setting = setting_of(field)
    return click.option(
        *_flags(name, field),
        name,
        cls=SectionedOption,
        section=setting.section,
        common=setting.common,
        help=f"{field.description}{_default_text(defaults, field)}",
        **_value_of(field, setting),
    )


def _hidden_option(alias: str, field: FieldInfo) -> Callable[[Any], Any]:
    """The flag of a former name: it works, and the help does not list it."""
    return click.option(*_flags(alias, field), alias, hidden=True, **_value_of(field, setting_of(field)))


def _flags(name: str, field: FieldInfo) -> tuple[str, ...]:
    if field.annotation is not bool:
        return (_flag(name),)
    short = setting_of(field).short
    return (f"{_flag(name)}/--no-{_flag(name).removeprefix('--')}", *([short] if short else ()))


def _value_of(field: FieldInfo, setting: Setting) -> dict[str, Any]:
    """Click's description of the value: which one, how often, and what stands for it in the help."""
    if field.annotation is bool:
        return {"default": None}
    value: dict[str, Any] = {"default": None, "metavar": value_of(field)}
    if _choices(field):
        return value
    if setting.without_value is not None:
        return value | {"is_flag": False, "flag_value": setting.without_value}
    return value | {"multiple": get_origin(field.annotation) in (list, dict)}


def value_of(field: FieldInfo) -> str | None:
    """Placeholder for the value of a setting's flag, such as ``N`` or ``crop|pad``; None for one that is on or off."""
    return "|".join(_choices(field)) or setting_of(field).metavar


def _choices(field: FieldInfo) -> list[str]:
    """Values of a field that takes one of a few words, or None; empty for other fields."""
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if get_origin(kind) is Literal]
    return [text for kind in kinds for text in get_args(kind)]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _default_text(defaults: Sequence[Any], field: FieldInfo) -> str:
    if PydanticUndefined in defaults:
        return "  [required]"
    text = ", then ".join(dict.fromkeys(default_of(field, value) for value in defaults))
    return "" if text in ("", "off") else f"  [default: {text}]"


def default_of(field: FieldInfo, value: Any) -> str:
    """A default value in words; empty where there is none, or the help says what it is."""
    if value is None or value in ({}, []) or "Default: " in (field.description or ""):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ("x" if all(isinstance(part, int) for part in value) else ",").join(map(str, value))
    if isinstance(value, list):
        return ",".join(map(str, value))
    if setting_of(field).metavar == "BYTES":
        return f"{value >> 30}GiB" if value >= 1 << 30 else f"{value >> 20}MiB"
    return f"{value:g}" if isinstance(value, float) else str(value)


def resolve_settings(
    model: type[Model],
    flags: Mapping[str, Any],
    config_path: Path | None,
    *,
    spell: Callable[[str], str] | None = None,
) -> Model:
    """Build a model from a YAML file and flags, flags winning. Former names work, with a note on stderr.

    Args:
        model: settings model.
        flags: values by field name; None or an empty tuple where a flag was not given.
        config_path: YAML file, or None.
        spell: gives the text that messages name a field by; None for its flag.

    Raises:
        SettingsError: with one line per mistake.
    """
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    given = renamed(model, given, note=lambda old, new: f"{_flag(old)} is now {_flag(new)}")
    from_file, places = _read_settings(model, config_path) if config_path else ({}, {})
    values = {**from_file, **given}
    try:
        return model.model_validate(values)
    except ValidationError as error:

        def place(name: str) -> str:
            if config_path is None or name in given:
                return (spell or _flag)(name)
            return places.get(name, str(config_path))

        items = error.errors(include_url=False)
        lines = [_explain(model, dict(item), place, config_path) for item in items[:_MAX_MISTAKES]]
        if len(items) > _MAX_MISTAKES:
            lines.append(f"and {len(items) - _MAX_MISTAKES:,} more")
        raise SettingsError("\n       ".join(lines)) from error  # each below the first, behind "error: "


def renamed(model: type[Settings], values: Mapping[str, T], *, note: Callable[[str, str], str]) -> dict[str, T]:
    """The values by the present names of their fields, with a note on stderr for each former name.

    Args:
        note: gives the text of the note for a former name and the present one.

    Raises:
        SettingsError: a field is given by two of its names.
    """
    former = model.former_names()
    for old in values:
        if old in former:
            click.echo(f"note: {note(old, former[old])}", err=True)
    try:
        return model.current_names(values)
    except ValueError as error:
        raise SettingsError(str(error)) from error


def _read_settings(model: type[Settings], path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a YAML file by their present names, and ``file:line`` of each key."""
    values, places = _read_yaml(path)
    return renamed(model, values, note=lambda old, new: f"{places[old]}: {old} is now {new}"), places


class _Loader(yaml.SafeLoader):
    """Loader whose numbers are decimal, as in YAML 1.2: in YAML 1.1 ``10:20`` is 620, and ``010`` is 8."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(?:0|[1-9][0-9]*)\Z"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?\Z"), list("-+.0123456789")
)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Values, and ``file:line`` of each key, of a file that is read once, as it may be a pipe."""
    try:
        text = _read_text(path)
        _refuse_costly(path, text)
        values = yaml.load(text, Loader=_Loader)  # noqa: S506  derives from SafeLoader
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_repeated(path, root)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold a mapping of settings, not a {type(values).__name__}")
    nodes = [node for node, _ in root.value] if isinstance(root, yaml.MappingNode) else []
    places = {node.value: f"{path}:{node.start_mark.line + 1}" for node in nodes if isinstance(node, yaml.ScalarNode)}
    return {str(key): value for key, value in values.items()}, places


_MAX_SETTINGS_BYTES = 32 << 20
"""Largest settings file; one with 100,000 inputs takes some 10 MB."""
_MAX_SETTINGS_DEPTH = 16
_MAX_MISTAKES = 20
"""Mistakes that a message lists."""


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(_MAX_SETTINGS_BYTES + 1)
    if len(data) > _MAX_SETTINGS_BYTES:
        raise SettingsError(f"{path} is larger than {_MAX_SETTINGS_BYTES >> 20} MiB: list inputs in a manifest instead")
    return data.decode()


def _refuse_costly(path: Path, text: str) -> None:
    """Refuse aliases and deep nesting, with which a few lines of YAML stand for millions of values; and tags.

    The library's constructors of tags raise anything on a text that does not fit, as on ``!!timestamp x``.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise SettingsError(f"{path}: aliases ('*{event.anchor}') are not taken: write the value out")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise SettingsError(f"{path}: tags ('{readable(tag, 80)}') are not taken: leave them away")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_SETTINGS_DEPTH:
            raise SettingsError(f"{path}: nested more than {_MAX_SETTINGS_DEPTH} levels deep")


def _refuse_repeated(path: Path, node: yaml.Node | None) -> None:
    """Refuse a key that stands twice: YAML forbids it, and the library silently takes the last one."""
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                name, first = readable(key.value, 80), lines[key.value]
                raise SettingsError(f"{path}:{line}: '{name}' stands in line {first} already; take one away")
            lines[key.value] = line
            _refuse_repeated(path, value)


def _explain(
    model: type[Settings], item: Mapping[str, Any], place: Callable[[str], str], config_path: Path | None
) -> str:
    """One validation error for a person: where it was written, what is wrong, what would do."""
    name = str(item["loc"][0]) if item["loc"] else ""
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name[:80], model.model_fields, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else "--help-all lists all of them"
        return f"{place(name)}: unknown setting '{readable(name, 80)}'; {hint}"
    if item["type"] == "missing":
        where = "the command" if config_path is None else f"the command or {config_path}"
        return f"{'VIDEOS' if name == 'inputs' else _flag(name)} is missing: give it on {where} (see --help)"
    message = str(item["msg"]).removeprefix("Value error, ")
    if not name:
        return message if config_path is None else f"{message} (in the command or {config_path})"
    value = repr(item["input"])
    got = "" if value in message or isinstance(item["input"], tuple) else f", got {readable(value, 200)}"
    return f"{place(name)}: {readable(message, 1000)}{got}"
