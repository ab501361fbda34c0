"""Resolution of the settings in three layers: defaults, the plan's ``"cfcl"`` block, the user's JSON file."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunet_cfcl.config.checks import SettingsError, checked_value
from nnunet_cfcl.config.schema import PretrainSettings, Settings
from nnunet_cfcl.config.table import settings_keys
from nnunet_cfcl.errors import shown
from nnunet_cfcl.files.json_files import read_json

CONFIG_VARIABLE = "nnUNet_cfcl_config"
#: Length to which an unknown key is cut before it is compared with the known ones.
LONGEST_KEY = 100

#: Lower bound of a learned temperature, close to CLIP's (Radford et al. 2021, arXiv 2103.00020: 0.01).
LOWEST_MOVING_TEMPERATURE = 0.02


def resolve_settings(
    plan_block: Mapping[str, Any] | None = None, file: str | os.PathLike[str] | None = None
) -> Settings:
    """Resolve the settings from the defaults, the plan's ``"cfcl"`` block and a JSON file; later layers win.

    Args:
        plan_block: the ``"cfcl"`` block of the plan's configuration, or None.
        file: a JSON file; None reads the one named by the environment variable ``nnUNet_cfcl_config``, if set.

    Raises:
        SettingsError: unknown key (the message names the nearest valid one), wrong type, value out of range, unreadable
            file.
    """
    settings = Settings()
    file = file if file is not None else os.environ.get(CONFIG_VARIABLE)
    layers = [("the plan's cfcl block", plan_block or {})]
    if file:
        layers.append((f"{file}", _read_json(Path(file))))
    for origin, layer in layers:
        for key, value in _flatten(layer, origin):
            settings = _with_value(settings, key, value, origin)
    _check_temperatures(settings.pretrain)
    _check_finetuning(settings)
    return settings


def _check_finetuning(settings: Settings) -> None:
    """Check before a pretraining starts that the data loading processes of the fine-tuning can read counterfactuals."""
    if not settings.finetune.counterfactual_probability:
        return
    if settings.counterfactual.store is False:
        raise SettingsError(
            "setting 'finetune.counterfactual_probability' needs stored counterfactuals, found counterfactual.store "
            "false", "set counterfactual.store to true")
    if settings.pretrain.data == "pool":
        raise SettingsError(
            "setting 'finetune.counterfactual_probability' needs counterfactuals of the training cases, found "
            "pretrain.data 'pool'", "set pretrain.data to 'training_and_pool'")


def _check_temperatures(settings: PretrainSettings) -> None:
    """Check the larger minimum of a learned temperature, and of one with weighted negatives."""
    lowest = min(settings.temperature, settings.image_temperature)
    if lowest < LOWEST_MOVING_TEMPERATURE and (settings.learn_temperature or settings.hard_negatives):
        raise SettingsError(
            f"settings 'pretrain.temperature' and 'pretrain.image_temperature' must be at least "
            f"{LOWEST_MOVING_TEMPERATURE} with pretrain.learn_temperature or pretrain.hard_negatives, found {lowest}")


def _read_json(file: Path) -> Mapping[str, Any]:
    try:
        content = read_json(file)
    except OSError as error:
        raise SettingsError(f"the settings file {file} cannot be read ({error.strerror})",
                            f"correct the path in the environment variable {CONFIG_VARIABLE}") from error
    except ValueError as error:
        raise SettingsError(f"the settings file {file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"the settings file {file} must hold a JSON object, found {type(content).__name__}")
    return content


def _flatten(layer: Any, origin: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(layer, Mapping):
        raise SettingsError(f"{origin} must be a JSON object of settings, found {shown(layer)}")
    for key, value in layer.items():
        dotted = f"{prefix}{key}"
        # no setting lies deeper; the limit also stops endless nesting
        if isinstance(value, Mapping) and prefix.count(".") < 2:
            yield from _flatten(value, origin, f"{dotted}.")
        else:
            yield dotted, value


def _with_value(settings: Settings, key: str, value: Any, origin: str) -> Settings:
    known = [name for name, _, _ in settings_keys()]
    if key not in known:
        near = difflib.get_close_matches(key[:LONGEST_KEY], known, n=1, cutoff=0.0)
        raise SettingsError(f"unknown setting '{key}' in {origin}", f"use the nearest valid key '{near[0]}'")
    section_name, _, name = key.rpartition(".")
    section = getattr(settings, section_name) if section_name else settings
    checked = checked_value(section, name, value, f"setting '{key}' in {origin}")
    changed: Any = replace(section, **{name: checked})
    whole: dict[str, Any] = {section_name: changed}
    return replace(settings, **whole) if section_name else changed
