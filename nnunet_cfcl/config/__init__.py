"""Every setting, its default, its meaning and its range; resolved from defaults, plan and settings file."""

from nnunet_cfcl.config.checks import SettingsError, setting
from nnunet_cfcl.config.resolution import CONFIG_VARIABLE, resolve_settings
from nnunet_cfcl.config.schema import (
    AcquisitionSettings,
    BaselineSettings,
    ChromapSettings,
    CounterfactualSettings,
    FinetuneSettings,
    GateSettings,
    GeneratorSettings,
    PretrainSettings,
    Settings,
    SilverSettings,
    ViewSettings,
    settings_keys,
    settings_table,
)

__all__ = [
    "CONFIG_VARIABLE",
    "AcquisitionSettings",
    "BaselineSettings",
    "ChromapSettings",
    "CounterfactualSettings",
    "FinetuneSettings",
    "GateSettings",
    "GeneratorSettings",
    "PretrainSettings",
    "Settings",
    "SettingsError",
    "SilverSettings",
    "ViewSettings",
    "resolve_settings",
    "setting",
    "settings_keys",
    "settings_table",
]
