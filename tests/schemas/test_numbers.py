"""Numbers in settings: what is written as one, and what is refused, for every setting of every command at once."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.support.cli import run
from vidshard.jobs.runtime.settings import SettingsError, resolve_settings
from vidshard.schemas.evaluation import EvaluateRun
from vidshard.schemas.fields import LARGEST_NUMBER, Settings, parse_episodes, parse_seconds, parse_workers
from vidshard.schemas.runs import TokenizeRun
from vidshard.schemas.text import counted
from vidshard.schemas.training import RunSettings, StageConfig, split_weight

MODELS = (TokenizeRun, EvaluateRun, RunSettings, StageConfig)
GIVEN = {"inputs": ["clips/"], "out": "tokens/", "videos": ["clips/"]}
FOREIGN = ("٣", "３", "१२", "1٣", "٣:00", "²")
HUGE = ("9" * 20, "9" * 400, "9" * 5000, "1e400", "1/0", "0/0", "9" * 400 + "/7", "1/" + "9" * 400, "1e300")
NO_NUMBERS = ("nan", "inf", "-inf", "1:60", "1:00:60", "1:60:00", "--")


def _numbers_taken(model: type[Settings], text: object) -> list[str]:
    """Names of the settings that take a text for a number, a pair or a list of numbers."""
    names = []
    for name in model.model_fields:
        given = {key: value for key, value in GIVEN.items() if key in model.model_fields}
        try:
            value = getattr(model(**{**given, name: text}), name)
        except ValidationError:
            continue
        if name == "episodes" and ":" in str(text):
            continue  # START:END, which is no time
        parts = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(part, (int, float, Fraction, tuple)) for part in parts):
            names.append(name)
    return names


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("text", [*FOREIGN, *NO_NUMBERS], ids=ascii)
def test_no_setting_takes_foreign_digits_or_a_text_for_a_number(model: type[Settings], text: str) -> None:
    assert _numbers_taken(model, text) == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("text", HUGE, ids=lambda text: f"{text:.8}-{len(text)}")
def test_no_setting_takes_a_number_that_nothing_can_compute_with(model: type[Settings], text: str) -> None:
    assert _numbers_taken(model, text) == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("truth", [True, False])
def test_no_setting_takes_a_truth_of_yaml_for_a_number(model: type[Settings], truth: bool) -> None:
    switches = [name for name, field in model.model_fields.items() if field.annotation is bool]
    assert set(_numbers_taken(model, truth)) <= set(switches)


def test_minutes_and_seconds_behind_a_colon_are_below_sixty() -> None:
    assert parse_seconds("1:02:03.5") == Fraction("3723.5")
    assert parse_seconds("90:00") == 5400
    with pytest.raises(ValueError, match="below 60"):
        parse_seconds("10:99")


def test_numbers_of_a_file_are_decimal_and_a_colon_is_no_sum_of_sixties(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("episodes: 10:20\nwait_for_gpus: 10:00\nstart: 1:30\nlimit: 010\ncommit_minutes: 1.5\n")
    settings = resolve_settings(TokenizeRun, {"inputs": ("a",), "out": "o"}, config)
    assert settings.episodes == parse_episodes("10:20") == [(10, 20)]
    assert [settings.wait_for_gpus, settings.start, settings.limit] == [600, 90, 10]
    config.write_text("wait_for_gpus: 10:99\n")
    with pytest.raises(SettingsError, match=r"run\.yaml:1: minutes and seconds behind a colon are below 60"):
        resolve_settings(TokenizeRun, {"inputs": ("a",), "out": "o"}, config)


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "tokens/", "--rows", "٣"),
        ("verify", "tokens/", "--exact", "0.٣"),
        ("verify", "tokens/", "--seed", "٣"),
        ("decode", "tokens/", "--all", "x/", "--workers", "３"),
        ("export", "tokens/", "x/", "--to", "webdataset", "--limit", "٣"),
    ],
)
def test_no_flag_of_a_command_takes_foreign_digits(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "is not a valid" in result.output


def test_a_folder_that_ends_in_foreign_digits_has_no_weight() -> None:
    assert split_weight("clips=0.7") == ("clips", 0.7)
    assert split_weight("clips=٣") == ("clips=٣", None)


def test_what_is_written_as_a_number_stays_one() -> None:
    assert parse_workers(" 2..8 ") == parse_workers("2..8")
    given = {"inputs": ["a"], "out": "b", "shard_size": "1.5GiB", "limit": LARGEST_NUMBER, "fps": "30000/1001"}
    settings = TokenizeRun.model_validate(given)
    assert [settings.shard_size, settings.limit, settings.fps] == [3 << 29, LARGEST_NUMBER, Fraction(30000, 1001)]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1, "1 node"),
        (2, "2 nodes"),
        (0, "0 nodes"),
        (12_345_678, "12,345,678 nodes"),
        (1.0, "1 node"),
        (0.5, "0.5 nodes"),
    ],
)
def test_a_number_has_its_noun_in_the_right_form(number: float, text: str) -> None:
    assert counted(number, "node") == text
