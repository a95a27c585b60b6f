"""Fields of settings models: former names, and what the models refuse."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from vidshard.jobs.runtime.settings import SettingsError, options_of, resolve_settings
from vidshard.schemas.fields import Settings, setting


class Sample(Settings):
    """A model with two renamed settings."""

    gradient_accumulation: int = setting(1, section="Stage", aliases=("accumulate",), help="Pieces of a batch.")
    activation_checkpointing: bool = setting(False, section="Stage", aliases=("recompute",), help="Compute again.")


@click.command()
@options_of(Sample)
def command(config_path: Path | None, **flags: object) -> None:
    """Print the settings."""
    click.echo(repr(resolve_settings(Sample, flags, config_path)))


def test_a_former_flag_works_with_a_note_and_is_not_in_the_help() -> None:
    result = CliRunner().invoke(command, ["--accumulate", "4", "--recompute"])
    assert result.stdout == "Sample(gradient_accumulation=4, activation_checkpointing=True)\n"
    assert "note: --accumulate is now --gradient-accumulation" in result.stderr
    assert "note: --recompute is now --activation-checkpointing" in result.stderr
    assert "accumulate" not in CliRunner().invoke(command, ["--help"]).output


def test_a_former_key_of_a_file_works_with_a_note_and_yields_to_the_flag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("\naccumulate: 4\n")
    assert resolve_settings(Sample, {}, config).gradient_accumulation == 4
    assert "run.yaml:2: accumulate is now gradient_accumulation" in capsys.readouterr().err
    assert resolve_settings(Sample, {"gradient_accumulation": "2"}, config).gradient_accumulation == 2


def test_a_stored_run_with_former_names_is_valid() -> None:
    assert Sample.model_validate({"accumulate": 3, "recompute": True}).gradient_accumulation == 3


def test_a_setting_given_by_two_of_its_names_is_refused() -> None:
    with pytest.raises(SettingsError, match="gradient_accumulation is given twice"):
        resolve_settings(Sample, {"accumulate": "2", "gradient_accumulation": "2"}, None)
    with pytest.raises(ValidationError, match="given twice"):
        Sample.model_validate({"accumulate": 2, "gradient_accumulation": 2})
