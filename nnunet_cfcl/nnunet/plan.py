"""Properties of a plan's configuration that the pretraining reads."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_cfcl.errors import NotSupported
from nnunet_cfcl.views import ViewGeometry

PLAN_BLOCK = "cfcl"


def check_single_stage(name: str, configuration: ConfigurationManager) -> None:
    """Reject the second stage of a cascade.

    Args:
        name: name of the configuration, for the error.
        configuration: configuration to check.

    Raises:
        NotSupported: the configuration has a previous stage; the fix says how to train it.
    """
    if configuration.previous_stage_name is not None:
        raise NotSupported(
            f"'{name}' takes the previous stage's segmentation as input, which does not exist during pretraining",
            f"pretrain {configuration.previous_stage_name} first, then train this stage with pretrain.enabled set to "
            "false and the same trainer, under whose name nnU-Net looks for the first stage's masks"
        )


def view_geometry(configuration: ConfigurationManager) -> ViewGeometry:
    """Patch size in voxels and spacing in millimetres, both in array-axis order."""
    patch_size = tuple(int(n) for n in configuration.patch_size)
    spacing = tuple(float(s) for s in configuration.spacing)[-len(patch_size) :]
    return ViewGeometry(patch_size, spacing)


def settings_block(configuration: ConfigurationManager) -> dict[str, Any] | None:
    """The configuration's ``"cfcl"`` block of settings; None without one."""
    return configuration.configuration.get(PLAN_BLOCK)


def fingerprint(configuration: ConfigurationManager) -> dict[str, Any]:
    """Entries of a configuration that determine the pretrained weights: data, patch, spacing, network."""
    plan = configuration.configuration
    keys = ("data_identifier", "patch_size", "spacing", "normalization_schemes", "architecture")
    return {key: plan.get(key) for key in keys}
