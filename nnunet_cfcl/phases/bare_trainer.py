"""What phase 1, and whoever looks at a fold, needs of an nnU-Net trainer, without the constructor that sets up one
process per GPU of one machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet import versions
from nnunet_cfcl.nnunet.lookup import check_folders, find_dataset, load_configuration, load_plan
from nnunet_cfcl.nnunet.plan import settings_block


def bare_trainer(
    trainer_class: Any,
    dataset: str,
    configuration: str,
    fold: str,
    plans: str,
    device: torch.device,
    log: Callable[..., None],
) -> Any:
    """`bare_fold` of a trainer with a pretraining phase, with the attributes that phase 1 reads.

    Args:
        trainer_class: with `trainers.CounterfactualPretraining` among its bases.
        dataset, configuration, fold, plans, device, log: see `bare_fold`.

    Raises:
        UserError: see `bare_fold`; the pretraining is switched off.
    """
    trainer = bare_fold(trainer_class, dataset, configuration, fold, plans, device, log)
    if not trainer.settings.pretrain.enabled:
        raise UserError("pretrain.enabled is false, so there is no phase 1 to run: set it to true, or start "
                        "nnUNetv2_train at once")
    trainer.num_iterations_per_epoch = trainer.settings.finetune.iterations_per_epoch or 250  # nnU-Net's default
    trainer.network = build_network(trainer)
    return trainer


def bare_fold(
    trainer_class: Any,
    dataset: str,
    configuration: str,
    fold: str,
    plans: str,
    device: torch.device,
    log: Callable[..., None],
) -> Any:
    """An object of any nnU-Net trainer's class whose constructor has not run, with its plan, folders and ``settings``,
    without a network.

    nnU-Net's constructor takes the global rank for the local one and CUDA for granted wherever torch.distributed runs,
    which does not hold on several machines or on CPUs. The fold's cases are found by the class's own ``do_split``.

    Args:
        trainer_class: of the trainer.
        dataset: number or name.
        configuration: of the plan.
        fold: number or "all".
        plans: identifier of the plan.
        device: of this process.
        log: takes lines for the user, as nnU-Net's ``print_to_log_file``.

    Raises:
        UserError: nnU-Net's folders, the dataset, its plan or the configuration are missing; no such fold; settings
            that cannot be.
    """
    trainer = trainer_class.__new__(trainer_class)
    trainer.configuration_name, trainer.fold, trainer.device = configuration, _fold(fold), device
    _read_plan(trainer, *_find(dataset, configuration, plans))
    trainer.dataset_class = trainer.folder_with_segs_from_previous_stage = None
    trainer.is_ddp, trainer.disable_checkpointing, trainer.enable_deep_supervision = False, False, True
    trainer.local_rank, trainer.print_to_log_file = 0, log
    # nnU-Net's own trainers have none
    prepared = getattr(trainer_class, "prepared_settings", lambda plan: resolve_settings(settings_block(plan)))
    trainer.settings = prepared(trainer.configuration_manager)
    return trainer


def _find(dataset: str, configuration: str, plans: str) -> tuple[str, dict[str, Any]]:
    """The dataset's full name and its plan."""
    for finding in check_folders():
        finding.raise_on_failure()
    name = find_dataset(dataset)
    plan = load_plan(name, plans, configuration)
    load_configuration(plan, plans, configuration)
    return name, plan


def _fold(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise UserError(f"the fold must be a number from 0 or 'all', found '{text}'")
    return text if text == "all" else int(text)


def _read_plan(trainer: Any, name: str, plan: dict[str, Any]) -> None:
    """All that follows from the plan, as the constructor has it: the folders are those of the plan's dataset."""
    manager = trainer.plans_manager = PlansManager(plan)
    trainer.configuration_manager = manager.get_configuration(trainer.configuration_name)
    trainer.dataset_json = load_json(str(Path(str(nnUNet_preprocessed)) / name / "dataset.json"))
    trainer.label_manager = manager.get_label_manager(trainer.dataset_json)
    base = Path(str(nnUNet_preprocessed)) / manager.dataset_name
    trainer.preprocessed_dataset_folder_base = str(base)
    trainer.preprocessed_dataset_folder = str(base / trainer.configuration_manager.data_identifier)
    model = f"{type(trainer).__name__}__{manager.plans_name}__{trainer.configuration_name}"
    trainer.output_folder_base = str(Path(str(nnUNet_results)) / manager.dataset_name / model)
    trainer.output_folder = str(Path(trainer.output_folder_base) / f"fold_{trainer.fold}")


def build_network(trainer: Any) -> torch.nn.Module:
    """A bare trainer's network by its class's own ``build_network_architecture``, on its device: with the weights that
    its own `initialize` begins with, or, where the class seeds nothing, with those of the settings' seed."""
    if hasattr(trainer, "_seed"):
        trainer._seed()
    else:
        torch.manual_seed(trainer.settings.seed)
    network: torch.nn.Module = versions.build_network(
        trainer,
        trainer.plans_manager,
        trainer.configuration_manager,
        determine_num_input_channels(trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json),
        trainer.label_manager.num_segmentation_heads,
        trainer.enable_deep_supervision,
    )
    return network.to(trainer.device)
