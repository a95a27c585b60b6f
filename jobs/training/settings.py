"""Settings of a training run: flags and a YAML file, laid over a preset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidshard.jobs.runtime.settings import SettingsError, renamed, resolve_settings
from vidshard.jobs.training.presets import FIXED_MODEL, TRAININGS
from vidshard.schemas.training import WEIGHT_SUFFIXES, RunSettings, StageConfig, TrainFlags, TrainRun


def training_run(
    preset: str | None, stages: Sequence[str], flags: Mapping[str, Any], config_path: Path | None = None
) -> TrainRun:
    """Complete the settings of flags and file with those of a preset.

    Args:
        preset: name of the preset, unless flags or file name another one; None if they must name it.
        stages: stages of the preset that the run takes; empty for all of them.
        flags: values by field name of `TrainFlags`; None or an empty tuple where a flag was not given.
        config_path: YAML file, or None.

    Raises:
        SettingsError: a setting, the preset or a stage is unknown or impossible.
    """
    flagged = resolve_settings(TrainFlags, flags, config_path)
    given = {name: getattr(flagged, name) for name in flagged.model_fields_set}
    chosen_preset = flagged.preset or preset
    if chosen_preset is None:
        raise SettingsError(f"--preset is missing: name one of {', '.join(TRAININGS)}")
    base = _preset_run(chosen_preset, flagged, stages)
    stages = stages or tuple(base.stages)
    for name in ("stage1", "stage2"):
        if name in given and (name not in stages or len(stages) == 1):
            raise SettingsError(
                f"{name}: settings of one stage of several are for `vidshard train two_stage`; with a single stage "
                "give them directly, as in steps: 1000"
            )
    changes = {name: value for name, value in given.items() if name in RunSettings.model_fields}
    if flagged.init_from is not None and not flagged.init_from.endswith(WEIGHT_SUFFIXES):
        changes.setdefault("tokenizer", None)  # the stage that it starts from names its tokenizer
    named = "tokenizer" in changes or chosen_preset in FIXED_MODEL
    chosen = {stage: _stage(stage, base.stages[stage], given) for stage in stages}
    values = {**dict(base), **changes, "stages": chosen, "tokenizer_is_default": not named}
    return resolve_settings(TrainRun, values, None)


def preset_defaults(preset: str, stages: Sequence[str]) -> dict[str, list[Any]]:
    """Defaults of a training command for its help: one value per field, or one per stage for settings of stages."""
    run = TRAININGS[preset](["videos"], "out")
    of_stages = {name: [getattr(run.stages[stage], name) for stage in stages] for name in StageConfig.model_fields}
    of_run = {name: [getattr(run, name)] for name in RunSettings.model_fields if name not in ("videos", "out")}
    return {**of_stages, **of_run, "preset": [preset]}


def _preset_run(name: str, flagged: TrainFlags, stages: Sequence[str]) -> TrainRun:
    if name not in TRAININGS:
        raise SettingsError(f"--preset: no preset {name!r}; these are: {', '.join(TRAININGS)}")
    run = TRAININGS[name](flagged.videos, flagged.out)
    own = list(run.stages)
    if len(stages) > 1 and set(own) > set(stages):
        raise SettingsError(
            f"--preset {name} has the stages {', '.join(own)}, and two-stage training would leave "
            f"{', '.join(stage for stage in own if stage not in stages)} out: use `vidshard train run --preset {name}`"
        )
    for stage in stages:
        if stage not in run.stages:
            remedy = f": use `vidshard train {own[0]} --preset {name}`" if len(own) == 1 else ""
            wanted = "two-stage training takes a preset with both stages; " if len(stages) == 2 else ""
            raise SettingsError(f"{wanted}--preset {name} has no {stage}; it has {', '.join(own)}{remedy}")
    return run


def _stage(name: str, base: StageConfig, given: Mapping[str, Any]) -> StageConfig:
    """One stage: its own settings over those of all stages, over the preset's."""
    of_all = {key: value for key, value in given.items() if key in StageConfig.model_fields}
    own = renamed(StageConfig, given.get(name, {}), note=lambda old, new: f"{name}: {old} is now {new}")
    values = {**base.model_dump(), **of_all, **own}
    return resolve_settings(StageConfig, values, None, spell=lambda key: f"{name}: {key}")
