"""What the pretraining needs to know of a plan."""

from __future__ import annotations

from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_cfcl.errors import NotSupported
from nnunet_cfcl.views import ViewGeometry

PLAN_BLOCK = "cfcl"


def check_single_stage(name: str, configuration: ConfigurationManager) -> None:
    """Refuse a cascade's second stage.

    Raises:
        NotSupported: names the first stage, and says how to train the second.
    """
    if configuration.previous_stage_name is not None:
        raise NotSupported(
            f"'{name}' takes the previous stage's segmentation as input, which pretraining has not: pretrain "
            f"{configuration.previous_stage_name}", "train this stage with pretrain.enabled set to false, and with the "
            "same trainer, by whose name nnU-Net finds the masks"
        )


def view_geometry(configuration: ConfigurationManager) -> ViewGeometry:
    """Patch size in voxels and spacing in millimetres, in array-axis order."""
    patch_size = tuple(int(n) for n in configuration.patch_size)
    spacing = tuple(float(s) for s in configuration.spacing)[-len(patch_size) :]
    return ViewGeometry(patch_size, spacing)


def settings_block(configuration: ConfigurationManager) -> dict[str, Any] | None:
    """The ``"cfcl"`` block of the plan's configuration, or None."""
    return configuration.configuration.get(PLAN_BLOCK)


def fingerprint(configuration: ConfigurationManager) -> dict[str, Any]:
    """What of a configuration decides about the pretrained weights: data, patch, spacing, network."""
    plan = configuration.configuration
    keys = ("data_identifier", "patch_size", "spacing", "normalization_schemes", "architecture")
    return {key: plan.get(key) for key in keys}
