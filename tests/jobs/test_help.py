"""Help as a newcomer reads it: every text stands alone, and the first screen shows what most runs need."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from vidshard.jobs.cli import vidshard
from vidshard.jobs.runtime.settings import SectionedCommand
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.training import TrainFlags

MAX_WORDS = 25


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands(vidshard))
SECTIONED = [path for path, command in COMMANDS.items() if isinstance(command, SectionedCommand)]
TEXTS: dict[tuple[str, ...], str] = {
    **{("vidshard", *path): command.help or "" for path, command in COMMANDS.items()},
    **{
        ("vidshard", *path, option.opts[0]): re.sub(r"  \[.*\]$", "", option.help or "")
        for path, command in COMMANDS.items()
        for option in command.params
        if isinstance(option, click.Option) and not option.hidden
    },
    **{
        (model.__name__, name): field.description or ""
        for model in (TokenizeRun, TrainFlags)
        for name, field in model.model_fields.items()
    },
}


def paragraphs(text: str) -> list[str]:
    """The prose of a help text; blocks after ``\\b`` are examples and tables."""
    return [part for part in text.split("\n\n") if part.strip() and not part.lstrip().startswith("\b")]


@pytest.mark.parametrize("name", TEXTS, ids=" ".join)
def test_every_help_text_stands_alone(name: tuple[str, ...]) -> None:
    text = TEXTS[name]
    assert text, "no help text"
    for paragraph in paragraphs(text):
        sentences = re.split(r"(?<=[.?!])\s+(?=[A-Z`-])", " ".join(paragraph.split()))
        assert paragraph.strip()[0].isupper() or paragraph.lstrip().startswith("`"), paragraph
        assert not re.match(r"(Of|It|Its|And|What|How|Where)\b", paragraph.strip()), paragraph
        assert paragraph.rstrip().endswith("."), paragraph
        for sentence in sentences:
            assert len(sentence.split()) <= MAX_WORDS, f"{len(sentence.split())} words: {sentence}"
        assert len(sentences) <= 4, paragraph
    if name[-1].startswith("-") or name[0] != "vidshard":
        assert len(re.split(r"(?<=[.])\s+(?=[A-Z`-])", text)) <= 2, text


def test_every_option_shows_its_values_as_a_user_writes_them() -> None:
    for path, command in COMMANDS.items():
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                assert option.metavar != "VALUE", f"{path}: {option.opts[0]} has neither a metavar nor choices"
                default = re.search(r"  \[default: (.*)\]$", option.help or "")
                assert not re.search(r"[\[{(']", default[1] if default else ""), f"{path}: {option.opts[0]}: {default}"


@pytest.mark.parametrize("path", SECTIONED, ids=" ".join)
def test_the_first_screen_shows_what_most_runs_need(path: tuple[str, ...]) -> None:
    short = CliRunner().invoke(vidshard, [*path, "--help"], terminal_width=80, prog_name="vidshard").output
    assert len(short.splitlines()) <= 45, short
    assert "--out" in short
    assert f"more options: vidshard {' '.join(path)} --help-all" in short


@pytest.mark.parametrize("path", SECTIONED, ids=" ".join)
def test_help_all_lists_every_option_of_a_command(path: tuple[str, ...]) -> None:
    text = CliRunner().invoke(vidshard, [*path, "--help-all"], prog_name="vidshard").output
    for option in COMMANDS[path].params:
        if isinstance(option, click.Option):
            assert (option.opts[-1] in text) != option.hidden, option.opts


def test_the_help_of_the_program_names_every_command_and_exit_code_on_one_screen() -> None:
    text = CliRunner().invoke(vidshard, ["--help"], terminal_width=80, prog_name="vidshard").output
    assert "..." not in text.partition("Commands:")[2], "a summary is cut off"
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 45
    for word in (*vidshard.commands, "130", "143"):
        assert re.search(rf"^ +{word}\b", text, re.MULTILINE), word


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_no_line_of_help_is_wider_than_a_terminal(path: tuple[str, ...]) -> None:
    text = CliRunner().invoke(vidshard, [*path, "--help"], terminal_width=80, prog_name="vidshard").output
    assert [line for line in text.splitlines() if len(line) > 80] == []
