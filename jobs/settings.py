"""Settings of a run from flags, from a YAML file, or from both, all defined by one pydantic model.

A field of the model is a flag (``reject_share`` is ``--reject-share``) and a key of the file. What a person wrote
wrongly is refused with the place it was written and the nearest valid name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vidshard.schemas.fields import Settings, setting_of

Model = TypeVar("Model", bound=Settings)


class SettingsError(click.UsageError):
    """A setting is unknown, missing or has an impossible value."""


class SectionedCommand(click.Command):
    """A command whose ``--help`` lists its options under the sections of the model's fields."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one block of options for each section, in the order of the fields."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                section = getattr(parameter, "section", "Settings")
                sections.setdefault(section, []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


class SectionedOption(click.Option):
    """An option that knows the section of ``--help`` it belongs to."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


def options_of(
    model: type[Settings],
    *,
    leave_out: frozenset[str] = frozenset(),
    defaults: Mapping[str, Sequence[Any]] | None = None,
) -> Callable[[Any], Any]:
    """Decorator that gives a click command one option for each field of a model, and ``--config``.

    Values arrive as text, None where the flag was not given; :func:`resolve_settings` makes the model of them.

    Args:
        model: whose fields they are.
        leave_out: fields without an option.
        defaults: what the help shows in place of the model's defaults: those of each stage of the work, in order.
    """

    def decorate(function: Any) -> Any:
        for name, field in reversed(model.model_fields.items()):
            if name not in leave_out:
                known = defaults[name] if defaults and name in defaults else [field.default]
                function = _option(name, field, known)(function)
                for alias in setting_of(field).aliases:
                    function = _hidden_option(alias, field)(function)
        return click.option(
            "--config",
            "config_path",
            type=click.Path(dir_okay=False, path_type=Path),
            metavar="FILE",
            cls=SectionedOption,
            section="Settings",
            help="Read settings from a YAML file; its keys are the flags with _ for -. Flags win.",
        )(function)

    return decorate


def _option(name: str, field: FieldInfo, defaults: Sequence[Any]) -> Callable[[Any], Any]:
    setting = setting_of(field)
    flag = _flag(name)
    text = (field.description or "") + ("" if field.annotation is bool else _default_text(defaults))
    shared: dict[str, Any] = {"cls": SectionedOption, "section": setting.section, "default": None}
    if field.annotation is bool:
        short = (setting.short,) if setting.short else ()
        return click.option(f"{flag}/--no-{flag.removeprefix('--')}", name, *short, help=text, **shared)
    if setting.without_value is not None:
        shared |= {"is_flag": False, "flag_value": setting.without_value}
    if get_origin(field.annotation) is Literal:
        metavar = "|".join(get_args(field.annotation))
    else:
        metavar = setting.metavar or "VALUE"
    return click.option(flag, name, metavar=metavar, help=text, **shared)


def _hidden_option(alias: str, field: FieldInfo) -> Callable[[Any], Any]:
    """The flag of a former name: it works, and the help does not list it."""
    flag = _flag(alias)
    if field.annotation is bool:
        return click.option(f"{flag}/--no-{flag.removeprefix('--')}", alias, default=None, hidden=True)
    return click.option(flag, alias, default=None, hidden=True)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _default_text(defaults: Sequence[Any]) -> str:
    if PydanticUndefined in defaults:
        return "  [required]"
    texts = ["none" if value is None else _text_of(value) for value in defaults]
    if set(texts) == {"none"}:
        return ""
    return f"  [default: {texts[0] if len(set(texts)) == 1 else ', then '.join(texts)}]"


def _text_of(value: Any) -> str:
    if isinstance(value, tuple):
        return ("x" if all(isinstance(part, int) for part in value) else ",").join(map(str, value))
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1 << 20:
        return f"{value >> 20}MiB"
    return str(value)


def resolve_settings(model: type[Model], flags: Mapping[str, Any], config_path: Path | None) -> Model:
    """Build the model from a YAML file and flags, flags winning.

    Args:
        flags: by field name; None, or an empty tuple, for what was not given.

    Raises:
        SettingsError: with one line for each thing that is wrong.
    """
    from_file = _read_yaml(config_path) if config_path else {}
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    former = model.former_names()
    for alias in former.keys() & given.keys():
        click.echo(f"note: {_flag(alias)} is now {_flag(former[alias])}", err=True)
    for alias in former.keys() & from_file.keys():
        click.echo(f"note: {_line_of(config_path, alias)}: {alias} is now {former[alias]}", err=True)
    try:
        given = model.current_names(given)
        values = {**model.current_names(from_file), **given}
    except ValueError as error:
        raise SettingsError(str(error)) from error
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, dict(item), given, config_path) for item in error.errors(include_url=False)]
        raise SettingsError("\n".join(lines)) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
        _refuse_repeated(path, yaml.compose(path.read_text(), Loader=yaml.SafeLoader))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold a mapping of settings, not a {type(values).__name__}")
    return {str(key): value for key, value in values.items()}


def _refuse_repeated(path: Path, node: yaml.Node | None) -> None:
    """YAML forbids a key that stands twice; the library takes the last one and says nothing."""
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise SettingsError(
                    f"{path}:{line}: '{key.value}' stands in line {lines[key.value]} already; take one away"
                )
            lines[key.value] = line
            _refuse_repeated(path, value)


def _explain(model: type[Settings], item: Mapping[str, Any], given: Mapping[str, Any], path: Path | None) -> str:
    """One validation error for a person: where it was written, what is wrong, what would do."""
    name = str(item["loc"][0]) if item["loc"] else ""
    flag = _flag(name)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, model.model_fields, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"valid keys: {', '.join(model.model_fields)}"
        return f"{_line_of(path, name)}: unknown setting '{name}'; {hint}"
    if item["type"] == "missing":
        where = "the command" if path is None else f"the command or {path}"
        return f"{'VIDEOS' if name == 'inputs' else flag} is missing: give it on {where} (see --help)"
    message = str(item["msg"]).removeprefix("Value error, ")
    if not name:
        return message
    where = flag if name in given else _line_of(path, name)
    got = "" if repr(item["input"]) in message else f", got {item['input']!r}"
    return f"{where}: {message}{got}"


def _line_of(path: Path | None, key: str) -> str:
    """``file:line`` of a key in a YAML file."""
    if path is None:
        return _flag(key)
    root = yaml.compose(path.read_text(), Loader=yaml.SafeLoader)
    for node, _ in root.value if isinstance(root, yaml.MappingNode) else ():
        if node.value == key:
            return f"{path}:{node.start_mark.line + 1}"
    return str(path)
