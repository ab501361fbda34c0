"""Turns an nnU-Net trainer into the task of the pretraining loop; every fact about nnU-Net ends here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import nn

from nnunet_cfcl.config import Reader, Settings, identity_settings
from nnunet_cfcl.counterfactual.choice import choose_source
from nnunet_cfcl.counterfactual.source import AcquisitionSource, CounterfactualSource, OriginalSource
from nnunet_cfcl.data.pretraining_cases import PretrainingCases, pretraining_cases
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.experiment_loggers import pretraining_tracker
from nnunet_cfcl.nnunet.plan import check_single_stage, fingerprint, view_geometry
from nnunet_cfcl.nnunet.segmentation_loss import segmentation_loss
from nnunet_cfcl.pretraining.loop import PretrainingTask
from nnunet_cfcl.pretraining.methods import Method, MethodContext
from nnunet_cfcl.pretraining.objective import Objective
from nnunet_cfcl.runs.ranks import Ranks


def build_objective(trainer: Any, method: Method) -> Objective:
    """The method for a trainer's configuration and labels."""
    geometry = view_geometry(trainer.configuration_manager)
    channels = len(trainer.configuration_manager.normalization_schemes)
    ignore = trainer.label_manager.ignore_label
    return method.build(
        MethodContext(trainer.settings, geometry, channels, ignore, lambda: segmentation_loss(trainer)))


def build_task(
    trainer: Any, method: Method, objective: Objective, ranks: Ranks, generated: CounterfactualSource | None = None
) -> PretrainingTask:
    """The pretraining of a trainer: its cases, its patch, its device, its compile switch.

    Args:
        trainer: an nnU-Net trainer with ``settings``, or what `bare_trainer` makes.
        method: the pretraining method.
        objective: made from it by `build_objective`.
        ranks: the processes that share every step.
        generated: counterfactuals of a generator; None: others are chosen.

    Raises:
        UserError: the configuration is a cascade's second stage, there are no suitable cases, or the counterfactuals do
            not fit them.
    """
    configuration, settings = trainer.configuration_manager, trainer.settings
    check_single_stage(trainer.configuration_name, configuration)
    reader = pretraining_cases(trainer, settings, objective.needs_labels)
    geometry = view_geometry(configuration)
    schemes, dim = configuration.normalization_schemes, len(geometry.patch_size)
    source = OriginalSource() if not method.counterfactuals else generated or choose_source(
        settings, reader, trainer.preprocessed_dataset_folder, schemes, dim)
    identity = _identity(trainer, method, objective, reader, source.identity())
    return PretrainingTask(
        reader=reader,
        source=source,
        objective=objective,
        geometry=geometry,
        settings=settings,
        patches_per_pass=settings.pretrain.patches_per_pass or configuration.batch_size,
        device=trainer.device,
        workers=get_allowed_n_proc_DA(),
        folder=_folder(trainer, settings, identity),
        identity=identity,
        log=trainer.print_to_log_file,
        checkpoints=not trainer.disable_checkpointing,
        compile=_compiled if trainer._do_i_compile() else lambda network: network,
        ranks=ranks,
        ignore_label=trainer.label_manager.ignore_label,
        track=pretraining_tracker(trainer),
    )


def _compiled(network: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(network))


def _folder(trainer: Any, settings: Settings, identity: dict[str, Any]) -> Path:
    """In the fold; where phase 1 does not depend on the fold, beside the folds, which all use it."""
    if settings.pretrain.data == "pool":
        return Path(trainer.output_folder_base) / f"cfcl_pool_{digest(identity)}"
    return Path(trainer.output_folder) / "cfcl" / "pretraining"


def _identity(
    trainer: Any, method: Method, objective: Objective, reader: PretrainingCases, source: dict[str, Any]
) -> dict[str, Any]:
    """All that decides about the pretrained weights; its digest says whether a finished phase 1 can be reused."""
    content: dict[str, Any] = {
        "objective": method.name,
        "settings": _identity_settings(trainer.settings, method, source["source"]),
        "plan": fingerprint(trainer.configuration_manager),
        "cases": list(reader.cases),
        "images": reader.content(),
        "counterfactuals": source,
    }
    if objective.needs_labels:
        content["labels"] = {key: trainer.dataset_json.get(key) for key in ("labels", "regions_class_order")}
    if objective.tap == "segmentation":
        content["deep_supervision"] = bool(trainer.enable_deep_supervision)
    return content


def _identity_settings(settings: Settings, method: Method, source: str) -> dict[str, Any]:
    """Select the settings that decide the pretrained weights; counterfactuals of a generator or a store describe
    themselves."""
    acquisition: tuple[Reader, ...] = ("acquisition",) if AcquisitionSource.name in source else ()
    return identity_settings(settings, *method.reads, *acquisition)
