"""The dataset, plan and configuration that a pool belongs to."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from numpy.typing import NDArray

from nnunet_cfcl.data.pool.manifest import pool_command, pool_preprocessing
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet import lookup

Found = TypeVar("Found")


@dataclass(frozen=True)
class PoolDataset:
    """A dataset, its plan and one configuration; picklable.

    Attributes:
        name: ``DatasetXXX_NAME``.
        raw: ``nnUNet_raw/DatasetXXX_NAME``.
        preprocessed: ``nnUNet_preprocessed/DatasetXXX_NAME/<data_identifier>``, existing or not.
        plans: the dataset's plan.
        plans_name: plans identifier, the file name without ``.json``.
        configuration_name: name of one of the plan's configurations.
        dataset_json: content of the preprocessed dataset's dataset.json.
    """

    name: str
    raw: Path
    preprocessed: Path
    plans: PlansManager
    plans_name: str
    configuration_name: str
    dataset_json: dict[str, Any]

    @property
    def configuration(self) -> ConfigurationManager:
        return self.plans.get_configuration(self.configuration_name)

    @property
    def preprocessing(self) -> str:
        return pool_preprocessing(self.plans, self.configuration, self.dataset_json)

    @property
    def command(self) -> str:
        return pool_command(self.name, self.configuration_name, self.plans_name)

    @property
    def preprocess_command(self) -> str:
        """nnU-Net's command that preprocesses the training cases with this plan."""
        return lookup.preprocess_command(self.name, self.configuration_name, self.plans_name)

    def transposed(self, array: NDArray[Any]) -> NDArray[Any]:
        """Transpose (C, *S) from the reader's axis order to the plan's."""
        return array.transpose([0, *[axis + 1 for axis in self.plans.transpose_forward]])


def open_pool_dataset(dataset: str, configuration: str, plans: str) -> PoolDataset:
    """Find a dataset, its plan and its configuration.

    Args:
        dataset: name or number.
        configuration: name of one of the plan's configurations.
        plans: plans identifier.

    Raises:
        UserError: one of them or the raw dataset is missing; the fix names the closest match or a command.
    """
    name = lookup.find_dataset(dataset)
    plan = lookup.load_plan(name, plans, configuration)
    block = lookup.load_configuration(plan, plans, configuration)
    folder = lookup.preprocessed_folder(name, block)
    if not os.environ.get("nnUNet_raw") or not (raw := Path(os.environ["nnUNet_raw"]) / name).is_dir():
        raise UserError(f"no folder {name} in nnUNet_raw ({os.environ.get('nnUNet_raw') or 'not set'}), which holds "
                        "imagesUn, labelsSilver and attributes.csv", "export nnUNet_raw=/path/to/nnUNet_raw")
    dataset_json = load_json(str(folder.parent / "dataset.json"))
    return PoolDataset(name, raw, folder, PlansManager(plan), plans, configuration, dataset_json)
