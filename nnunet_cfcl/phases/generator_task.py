"""Turns an nnU-Net trainer into the task of the generator's training; every fact about nnU-Net ends here."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.gate.verdict import FEWEST_CASES
from nnunet_cfcl.counterfactual.generator.data import case_quantiles, split_patients
from nnunet_cfcl.counterfactual.generator.generator import IntensityScale
from nnunet_cfcl.counterfactual.generator.hvae_planning import plan_sizes
from nnunet_cfcl.counterfactual.generator.training import GeneratorTask
from nnunet_cfcl.data.attributes import AttributeCoding, is_missing
from nnunet_cfcl.data.pretraining_cases import pretraining_cases
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.plan import check_single_stage, fingerprint, view_geometry
from nnunet_cfcl.phases.attributes_of_cases import NothingToChange, coding_and_interventions, known_attributes
from nnunet_cfcl.runs.ranks import Ranks

GENERATORS = "cfcl_generators"
#: These change the speed, the memory or the pictures, or what may come after the generator's own training.
NOT_DECIDING = ("samples_every", "memory_gb", "finetune_epochs", "finetune_lr", "finetune_slack")


def has_attributes(trainer: Any) -> bool:
    """Whether there is a table of attributes with a column beside case and patient.

    Raises:
        UserError: it cannot be read.
    """
    known = known_attributes(Path(trainer.preprocessed_dataset_folder_base))
    return known is not None and bool(known.columns)


def build_generator_task(trainer: Any, ranks: Ranks, tells_cases: bool = True) -> GeneratorTask:
    """The generator of a trainer's fold: its cases, its plan, its attributes, its device.

    Args:
        trainer: an nnU-Net trainer with ``settings``, or what `bare_trainer` makes.
        ranks: the processes that share every step.
        tells_cases: say in the log how many cases there are, and of which kind; False: phase 1 does so.

    Raises:
        UserError: the configuration is a cascade's second stage; there is no table of attributes, or see
            `coding_and_interventions`; a patch that cannot be pooled as the plan has it.
        NothingToChange: too few patients, or a network without strides.
    """
    settings, configuration = trainer.settings, trainer.configuration_manager
    check_single_stage(trainer.configuration_name, configuration)
    known = known_attributes(Path(trainer.preprocessed_dataset_folder_base))
    if known is None:
        dataset = trainer.plans_manager.dataset_name
        raise UserError(f"a generator learns from attributes, but there is no attributes.csv in nnUNet_raw/{dataset}: "
                        "write one (docs/how-to/attributes.md), or let "
                        f"`nnunet_cfcl attributes discover -d {dataset}` propose one")
    # labels only serve the gate, which looks whether the anatomy is kept
    reader = pretraining_cases(
        trainer if tells_cases else _silent(trainer), settings, needs_labels=settings.pretrain.data != "pool")
    coding, interventions = coding_and_interventions(
        known, reader.cases, reader.known, trainer.dataset_json["file_ending"], settings.counterfactual.interventions,
        trainer.print_to_log_file)
    cells = known.cells(reader.cases)
    changed = dict.fromkeys(attribute.name for one in interventions for attribute in one.attributes)
    values = {case: tuple(one.get(name, "") for name in changed) for case, one in cells.items()}
    training, validation = split_patients(
        reader.cases, reader.patients, values, settings.generator.validation_share, settings.seed)
    fewest = FEWEST_CASES if settings.gate.enabled else 1
    if len(validation) < fewest:
        raise NothingToChange(
            f"a generator is judged on at least {fewest} cases of patients it has not seen, but of the "
            f"{len(reader.cases)} cases only {len(validation)} can be kept aside", "add cases, raise "
            "generator.validation_share, or set counterfactual.source to acquisition")
    geometry = view_geometry(configuration)
    sizes, images_per_pass = plan_sizes(
        geometry.patch_size, pooling_strides(configuration), len(configuration.normalization_schemes), coding.width,
        settings.generator)
    identity = {
        "generator": _deciding(settings), "seed": settings.seed, "sizes": asdict(sizes),
        "plan": fingerprint(configuration), "attributes": coding.to_json(), "cells": digest(_seen(cells, coding)),
        "interventions": [one.name for one in interventions], "training": training, "validation": validation,
        "images": reader.image_content(),
    }
    return GeneratorTask(
        reader=reader, cells=cells, training=training, validation=validation, coding=coding,
        interventions=interventions, scale=IntensityScale.of_quantiles(case_quantiles(reader, training)), sizes=sizes,
        images_per_pass=images_per_pass, settings=settings, spacing=geometry.spacing, device=trainer.device,
        workers=get_allowed_n_proc_DA(), folder=generators_folder(trainer) / digest(identity), identity=identity,
        log=trainer.print_to_log_file, ranks=ranks)


def generators_folder(trainer: Any) -> Path:
    """``nnUNet_results/DatasetXXX/cfcl_generators``: trainers share generators, and folds those of the pool alone."""
    return Path(str(nnUNet_results)) / trainer.plans_manager.dataset_name / GENERATORS


def pooling_strides(configuration: ConfigurationManager) -> list[tuple[int, ...]]:
    """Strides of every stage of the plan's network, (D,) each.

    Raises:
        UserError: the plan's network does not say.
    """
    network = configuration.configuration.get("architecture", {})
    strides = network.get("arch_kwargs", {}).get("strides")
    if not strides:
        name = network.get("network_class_name", "network")
        raise NothingToChange(f"the plan's {name} names no strides, from which the generator takes its resolutions",
                              "set counterfactual.source to acquisition")
    dim = len(configuration.patch_size)
    return [tuple(stride) if not isinstance(stride, int) else (stride,) * dim for stride in strides]


def _silent(trainer: Any) -> Any:
    """A copy of the trainer that says nothing."""
    silent = copy.copy(trainer)
    silent.print_to_log_file = lambda *line, **ignored: None
    return silent


def _seen(cells: Mapping[str, Mapping[str, str]], coding: AttributeCoding) -> dict[str, dict[str, str]]:
    """What the generator is told of every case."""
    return {case: {one.name: cell for one in coding.attributes if not is_missing(cell := cells[case].get(one.name, ""))}
            for case in cells}


def _deciding(settings: Settings) -> dict[str, Any]:
    chosen = settings.to_dict()["generator"]
    # their effect on the model is in its sizes
    return {key: value for key, value in chosen.items() if key not in NOT_DECIDING}
