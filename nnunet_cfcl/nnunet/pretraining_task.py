"""Turns an nnU-Net trainer into the task of the pretraining loop; every fact about nnU-Net ends here."""

from __future__ import annotations

from typing import Any, cast

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import nn

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.choice import choose_source
from nnunet_cfcl.nnunet.cases import PreprocessedCases
from nnunet_cfcl.nnunet.plan import check_single_stage, fingerprint, view_geometry
from nnunet_cfcl.pretraining.dual_view import Objective
from nnunet_cfcl.pretraining.loop import PretrainingTask

# they change the speed or the second phase, not what is learned in the first
FREE_SETTINGS = {"pretrain": ("enabled", "patches_per_pass")}


def build_task(
    trainer: nnUNetTrainer, settings: Settings, objective: Objective, objective_name: str
) -> PretrainingTask:
    """The pretraining of a trainer: its fold's training cases, its patch, its device, its compile switch.

    Raises:
        UserError: the configuration is a cascade's second stage, or the counterfactuals do not fit the cases.
    """
    configuration = trainer.configuration_manager
    check_single_stage(trainer.configuration_name, configuration)
    reader, geometry = _training_cases(trainer), view_geometry(configuration)
    schemes, dim = configuration.normalization_schemes, len(geometry.patch_size)
    source = choose_source(settings, reader, trainer.preprocessed_dataset_folder, schemes, dim)
    return PretrainingTask(
        reader=reader,
        source=source,
        objective=objective,
        geometry=geometry,
        settings=settings,
        patches_per_pass=settings.pretrain.patches_per_pass or configuration.batch_size,
        device=trainer.device,
        workers=get_allowed_n_proc_DA(),
        folder=trainer.pretraining_folder,
        identity=_identity(trainer, settings, objective_name, reader, source.identity()),
        log=trainer.print_to_log_file,
        checkpoints=not trainer.disable_checkpointing,
        compile=_compiled if trainer._do_i_compile() else lambda network: network,
    )


def _compiled(network: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(network))


def _training_cases(trainer: nnUNetTrainer) -> PreprocessedCases:
    """The fold's training cases, never its validation cases."""
    folder = trainer.preprocessed_dataset_folder
    training, _ = trainer.do_split()
    infer_dataset_class(folder).unpack_dataset(folder, num_processes=max(1, get_allowed_n_proc_DA() // 2))
    return PreprocessedCases(folder, training)


def _identity(
    trainer: nnUNetTrainer, settings: Settings, objective: str, reader: PreprocessedCases, source: dict[str, Any]
) -> dict[str, Any]:
    """All that decides about the pretrained weights; its digest says whether a finished phase 1 can be reused."""
    chosen = settings.to_dict()
    del chosen["finetune"]
    for section, names in FREE_SETTINGS.items():
        for name in names:
            del chosen[section][name]
    return {
        "objective": objective,
        "settings": chosen,
        "plan": fingerprint(trainer.configuration_manager),
        "cases": list(reader.cases),
        "images": reader.content(),
        "counterfactuals": source,
    }
