"""Every setting, its default, its meaning and its range; resolved from defaults, plan and settings file."""

from nnunet_cfcl.config.checks import Reader, SettingsError, setting
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
)
from nnunet_cfcl.config.table import identity_settings, settings_keys, settings_table

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
    "Reader",
    "Settings",
    "SettingsError",
    "SilverSettings",
    "ViewSettings",
    "identity_settings",
    "resolve_settings",
    "setting",
    "settings_keys",
    "settings_table",
]
