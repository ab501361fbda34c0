"""All settings of the plugin: declaration, check, resolution.

A setting is declared once, in `schema`, with its default, meaning and range, the methods that read it, and whether a
run's result depends on it. `resolve_settings` merges the defaults, the plan's ``"cfcl"`` block and the settings file.
"""

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
    TeacherSettings,
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
    "TeacherSettings",
    "ViewSettings",
    "identity_settings",
    "resolve_settings",
    "setting",
    "settings_keys",
    "settings_table",
]
