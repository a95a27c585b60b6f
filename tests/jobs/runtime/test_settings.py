"""Settings from flags, from YAML and from both; and what happens when they are wrong."""

from __future__ import annotations

import os
import threading
from fractions import Fraction
from pathlib import Path

import pytest

from tests.support.cli import run
from vidshard.jobs.runtime.settings import SettingsError, resolve_settings
from vidshard.pipeline.resolved_run import ResolvedRun
from vidshard.schemas.runs import TokenizeRun

REQUIRED = {"inputs": ("clips",), "out": "tokens", "tokenizer": "tiny"}


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("tokenizer: tiny\nfps: 30000/1001\nframes: 9\nsize: 256x448\nshard_size: 2MiB\n")
    settings = resolve_settings(TokenizeRun, {"inputs": ("a",), "out": "o", "frames": "5", "fps": None}, config)
    assert settings.frames == 5
    assert settings.fps == Fraction(30000, 1001)
    assert settings.size == (256, 448)
    assert settings.shard_size == 2 << 20


def test_the_stored_run_reads_back_as_the_same_run() -> None:
    settings = resolve_settings(TokenizeRun, {**REQUIRED, "fps": "7.5", "size": "64x128"}, None)
    assert TokenizeRun.model_validate(settings.model_dump(mode="json")) == settings


def test_an_unknown_key_is_refused_with_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("fps: 8\n\nframse: 9\n")
    with pytest.raises(SettingsError, match=r"run\.yaml:3: unknown setting 'framse'; did you mean 'frames'\?"):
        resolve_settings(TokenizeRun, REQUIRED, config)


def test_an_unknown_flag_is_refused_with_the_nearest_name() -> None:
    result = run("tokenize", "a", "--tokeniser", "tiny")
    assert result.exit_code == 2
    assert "--tokenizer" in result.output


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("fps", "0", "positive"),
        ("fps", "fast", "30000/1001"),
        ("fps", "1/0", "30000/1001"),
        ("size", "12by12", "height x width"),
        ("frames", "many", "integer"),
        ("frames", "0", "greater than or equal to 1"),
        ("max_reject_share", "2", "less than or equal to 1"),
        ("shard_size", "huge", "128MiB"),
        ("tail", "wrap", "'pad' or 'drop'"),
        ("keep_logvar", "perhaps", "boolean"),
    ],
)
def test_a_wrong_value_is_refused_with_its_flag_and_what_would_do(name: str, value: str, words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve_settings(TokenizeRun, {**REQUIRED, name: value}, None)
    assert f"--{name.replace('_', '-')}: " in str(caught.value)
    assert words in str(caught.value)


def test_every_mistake_is_named_at_once(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("frames: none\nfsp: 3\n")
    with pytest.raises(SettingsError) as caught:
        resolve_settings(TokenizeRun, {}, config)
    for words in ("VIDEOS is missing", "--out is missing", "run.yaml:1", "run.yaml:2"):
        assert words in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", "a: b: c", "\x00"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(SettingsError, match=r"run\.yaml"):
        resolve_settings(TokenizeRun, REQUIRED, config)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("inputs: [a]\nfps: 8\nout: tokens\nfps: 3\n")
    with pytest.raises(SettingsError, match=r"run\.yaml:4: 'fps' stands in line 2 already"):
        resolve_settings(TokenizeRun, {}, config)


def test_yaml_that_wants_to_build_objects_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("out: !!python/object/apply:os.system ['touch canary']\n")
    with pytest.raises(SettingsError, match=r"run\.yaml: tags"):
        resolve_settings(TokenizeRun, REQUIRED, config)


def test_help_lists_every_setting_with_its_default() -> None:
    result = run("tokenize", "--help-all")
    assert result.exit_code == 0
    text = " ".join(result.output.split())
    for name, field in TokenizeRun.model_fields.items():
        assert name == "inputs" or f"--{name.replace('_', '-')}" in text
        assert field.description, f"{name} has no help text"
    assert "Default: that of the tokenizer" in text
    assert "[default: 128MiB]" in text


@pytest.mark.parametrize("command", ["tokenize", "inspect", "decode", "tokenizers", "convert", "demo"])
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert command in run("--help").output


@pytest.mark.parametrize("given", [{}, {"random_weights": "1"}])
def test_averaged_weights_need_a_file(given: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match="give weights too"):
        resolve_settings(TokenizeRun, {**REQUIRED, "ema": True, **given}, None)


def test_weights_and_random_weights_exclude_each_other() -> None:
    with pytest.raises(SettingsError, match="not both"):
        resolve_settings(TokenizeRun, {**REQUIRED, "weights": "a", "random_weights": "1"}, None)


@pytest.mark.parametrize("name", ["tiny", "tiny_kl"])
def test_an_output_made_before_there_were_ablations_and_vq_can_be_continued(name: str, tmp_path: Path) -> None:
    run = TokenizeRun(inputs=["-"], out=str(tmp_path / "out"), tokenizer=name)
    assert {*ResolvedRun.of(run).identity["tokenizer"]}.isdisjoint({"architecture", "vq_codebook_size"})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: &a [x]\nb: *a\n", "aliases"),
        ("&a [*a]", "aliases"),
        ("[" * 5000, "nested"),
        ("a: " + "{a: " * 300, "nested"),
        ("\x00", "YAML"),
    ],
)
def test_a_settings_file_that_stands_for_millions_of_values_is_refused(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SettingsError, match=problem):
        resolve_settings(TokenizeRun, {"inputs": ("x",), "out": "o"}, tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "!!int '': 1",
        "fps: !!timestamp x",
        "!!bool x: 1",
        "fps: !!float ''",
        "limit: !!int 0x" + "f" * 5000,
        "!!str {=: fps}: 1",
        "fps: !x 8",
        '"\\ud800": 1',
    ],
)
def test_yaml_that_the_library_stumbles_over_is_refused_by_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"inputs: [clips]\nout: tokens\n{text}\n")
    with pytest.raises(SettingsError, match=r"run\.yaml"):
        resolve_settings(TokenizeRun, {}, path)


@pytest.mark.parametrize("text", ["retry_rejected: " + "x" * 100_000, "x" * 1000 + ": 1", "clip_seed: " + "9" * 4000])
def test_a_long_value_in_yaml_is_shown_short(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"inputs: [clips]\nout: tokens\n{text}\n")
    with pytest.raises(SettingsError) as caught:
        resolve_settings(TokenizeRun, {}, path)
    assert len(str(caught.value)) < 1500 + len(str(path))


def test_thousands_of_mistakes_in_yaml_are_one_short_message(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"inputs: [clips]\nout: tokens\nallow_schemes: [{'1,' * 5000}]\n")
    with pytest.raises(SettingsError, match=r"and 4,980 more") as caught:
        resolve_settings(TokenizeRun, {}, path)
    assert len(str(caught.value).splitlines()) == 21


def test_a_settings_file_that_is_a_pipe_is_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "run.yaml"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("size: 64\nfps: abc\n",), daemon=True)
    writer.start()
    result = run("tokenize", "clips/", "--out", tmp_path / "out", "--config", pipe)
    writer.join()
    assert result.exit_code == 2
    assert "run.yaml:2: a rate is a number" in " ".join(result.output.split())
