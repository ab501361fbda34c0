"""The supported versions of nnU-Net, and the functions that differ between them.

Every function detects a feature rather than comparing version numbers.

| since | change |
|---|---|
| 2.7 | a network is built from the plan's objects instead of three of its entries; ``--c`` is passed to the trainer |
| 2.8 | trainers are also looked up in the folders of ``nnUNet_extTrainer``; the blosc2 layout is a free function |

``python -m tests.compatibility.matrix`` measures the table of tested versions. Importing this module imports neither
torch nor nnU-Net, so that the doctor can use it in a broken installation.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

# every version from the oldest on has been tested (docs/reference/compatibility.md); a new major version may change
# internals that this package relies on
NNUNET_VERSIONS = ((2, 6), (3,))


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``"2.15.0+cu132"`` -> ``(2, 15, 0)``, ``"3.0rc1"`` -> ``(3, 0)``."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[:next((i for i, letter in enumerate(part) if not letter.isdigit()), len(part))]
        if digits:
            numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def reads_external_trainers() -> bool:
    """Whether nnU-Net looks trainers up in the folders of ``nnUNet_extTrainer``."""
    return importlib.util.find_spec("nnunetv2.utilities.find_objects") is not None


def look_up(name: str) -> type | None:
    """Look a trainer up with nnU-Net's own function; None if there is none.

    Raises:
        AssertionError: the class found is not a trainer.
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
    import nnunetv2
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = Path(nnunetv2.__path__[0]) / "training" / "nnUNetTrainer"
    found: type | None = recursive_find_python_class(str(folder), name, "nnunetv2.training.nnUNetTrainer")
    assert found is None or issubclass(found, nnUNetTrainer), f"{name} is not a trainer"
    return found


def build_network(
    trainer: nnUNetTrainer | type[nnUNetTrainer], plans: Any, configuration: Any, input_channels: int,
    output_channels: int, deep_supervision: bool,
) -> Any:
    """Build a trainer's network as nnU-Net's ``initialize`` does.

    Args:
        trainer: the trainer or its class.
        plans, configuration: the plan's ``PlansManager`` and ``ConfigurationManager``.
        input_channels, output_channels: numbers of image channels and of segmentation heads.
        deep_supervision: whether the network also returns its lower resolutions.
    """
    build = trainer.build_network_architecture
    channels = (input_channels, output_channels, deep_supervision)
    # trainers written for an older nnU-Net keep its signature under a newer one
    if "plans_manager" in inspect.signature(build).parameters:
        return build(plans, configuration, *channels)
    return build(configuration.network_arch_class_name, configuration.network_arch_init_kwargs,
                 configuration.network_arch_init_kwargs_req_import, *channels)


def asked_to_continue(plans: Mapping[str, Any]) -> bool:
    """Whether ``nnUNetv2_train`` was called with ``--c``.

    Args:
        plans: plans as passed to the trainer's constructor.
    """
    if "continue_training" in plans:
        return bool(plans["continue_training"])
    # nnU-Net 2.6 passes the flag on only when it finds a checkpoint to load
    return Path(sys.argv[0]).stem in ("nnUNetv2_train", "run_training") and "--c" in sys.argv[1:]


def block_layout(shape: Sequence[int], patch_size: Sequence[int], itemsize: int) -> tuple[Any, Any]:
    """Blosc2 blocks and chunks that nnU-Net's preprocessing chooses for an array.

    Args:
        shape: (C, Z, Y, X).
        patch_size: the configuration's patch size in voxels.
        itemsize: bytes per voxel.
    """
    from nnunetv2.training.dataloading import nnunet_dataset

    home = nnunet_dataset if hasattr(nnunet_dataset, "comp_blosc2_params") else nnunet_dataset.nnUNetDatasetBlosc2
    blocks, chunks = home.comp_blosc2_params(tuple(shape), tuple(patch_size), itemsize)
    return blocks, chunks
