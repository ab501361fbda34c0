"""Where the supported versions of nnU-Net differ, asked for what is there, never for a number.

| since | change |
|---|---|
| 2.7 | a network is built from the plan's objects, no longer from three of its entries; a trainer is told of ``--c`` |
| 2.8 | trainers are also looked for in the folders of ``nnUNet_extTrainer``; the layout of files is a function |

The table of what has been tried is made by ``python -m tests.compatibility.matrix``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nnunetv2
from nnunetv2.training.dataloading import nnunet_dataset


def reads_external_trainers() -> bool:
    """Whether nnU-Net looks for trainers in the folders of ``nnUNet_extTrainer``."""
    return importlib.util.find_spec("nnunetv2.utilities.find_objects") is not None


def look_up(name: str) -> type | None:
    """nnU-Net's own look-up of a trainer; None if it finds nothing.

    Raises:
        AssertionError: the class found is no trainer.
    """
    if not reads_external_trainers():
        return _look_up_inside(name)
    find = importlib.import_module("nnunetv2.utilities.find_objects").recursive_find_trainer_class_by_name
    try:
        found: type = find(name)
    except RuntimeError as error:
        if "Could not find requested nnunet trainer" not in str(error):
            raise
        return None
    return found


def _look_up_inside(name: str) -> type | None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer"
    found: type | None = recursive_find_python_class(str(folder), name, "nnunetv2.training.nnUNetTrainer")
    assert found is None or issubclass(found, nnUNetTrainer), f"{name} is no trainer"
    return found


def build_network(
    trainer_class: Any, plans: Any, configuration: Any, input_channels: int, output_channels: int,
    deep_supervision: bool,
) -> Any:
    """A trainer's own network, as nnU-Net's `initialize` has it built.

    Args:
        trainer_class: the trainer's class.
        plans, configuration: the plan's ``PlansManager`` and ``ConfigurationManager``.
        input_channels, output_channels: of the network.
        deep_supervision: whether it returns its lower resolutions too.
    """
    build = trainer_class.build_network_architecture
    channels = (input_channels, output_channels, deep_supervision)
    # trainers written for an older nnU-Net keep the older arguments under a newer one
    if "plans_manager" in inspect.signature(build).parameters:
        return build(plans, configuration, *channels)
    return build(configuration.network_arch_class_name, configuration.network_arch_init_kwargs,
                 configuration.network_arch_init_kwargs_req_import, *channels)


def asked_to_continue(plans: Mapping[str, Any]) -> bool:
    """Whether ``nnUNetv2_train`` was given ``--c``, by the plans that a trainer's constructor is given."""
    if "continue_training" in plans:
        return bool(plans["continue_training"])
    # 2.6 tells only those trainers that have a checkpoint
    return Path(sys.argv[0]).stem in ("nnUNetv2_train", "run_training") and "--c" in sys.argv[1:]


def block_layout(shape: Sequence[int], patch_size: Sequence[int], itemsize: int) -> tuple[Any, Any]:
    """Blocks and chunks of an array (C, Z, Y, X) of ``itemsize`` bytes a voxel, as nnU-Net's preprocessing chooses
    them for a patch."""
    home = nnunet_dataset if hasattr(nnunet_dataset, "comp_blosc2_params") else nnunet_dataset.nnUNetDatasetBlosc2
    blocks, chunks = home.comp_blosc2_params(tuple(shape), tuple(patch_size), itemsize)
    return blocks, chunks
