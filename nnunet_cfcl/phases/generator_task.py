"""Build the generator's training task from a fold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_results
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_cfcl.config import identity_settings
from nnunet_cfcl.counterfactual.gate.verdict import FEWEST_CASES
from nnunet_cfcl.counterfactual.generator.data import case_quantiles, split_patients
from nnunet_cfcl.counterfactual.generator.generator import IntensityScale
from nnunet_cfcl.counterfactual.generator.hvae_planning import plan_sizes
from nnunet_cfcl.counterfactual.generator.task import GeneratorTask
from nnunet_cfcl.data.attributes import AttributeCoding, is_missing
from nnunet_cfcl.data.pretraining_cases import pretraining_cases
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.nnunet.plan import check_single_stage, fingerprint
from nnunet_cfcl.phases.attributes_of_cases import NothingToChange, coding_and_interventions, known_attributes
from nnunet_cfcl.runs.ranks import Ranks

GENERATORS = "cfcl_generators"


def has_attributes(fold: FoldContext) -> bool:
    """Whether the dataset has an attribute table with a column besides case and patient.

    Raises:
        UserError: the table cannot be read.
    """
    known = known_attributes(fold.preprocessed.parent)
    return known is not None and bool(known.columns)


def build_generator_task(fold: FoldContext, ranks: Ranks, logs_cases: bool = True) -> GeneratorTask:
    """Build the generator's task of a fold: cases, plan, attributes, device.

    Args:
        fold: the fold that is trained.
        ranks: the processes that share every step.
        logs_cases: log the number of cases of each kind; False where the pretraining logs them.

    Raises:
        UserError: the configuration is a cascade's second stage; the dataset has no attribute table; a patch size that
            the plan's pooling does not divide; see also `coding_and_interventions`.
        NothingToChange: too few patients, or a network without strides.
    """
    settings, configuration = fold.settings, fold.configuration
    check_single_stage(fold.configuration_name, configuration)
    known = known_attributes(fold.preprocessed.parent)
    if known is None:
        raise UserError(
            f"a generator learns from attributes, but there is no attributes.csv in nnUNet_raw/{fold.dataset}",
            f"write one (docs/how-to/attributes.md), or let `nnunet_cfcl attributes discover -d {fold.dataset}` "
            "propose one")
    # only the gate uses labels, to check that the anatomy is kept
    reader = pretraining_cases(
        fold if logs_cases else replace(fold, log=_silent), settings, needs_labels=settings.pretrain.data != "pool")
    coding, interventions = coding_and_interventions(
        known, reader.cases, reader.known, fold.dataset_json["file_ending"], settings.counterfactual.interventions,
        fold.log)
    cells = known.cells(reader.cases)
    changed = dict.fromkeys(attribute.name for one in interventions for attribute in one.attributes)
    values = {case: tuple(one.get(name, "") for name in changed) for case, one in cells.items()}
    training, validation = split_patients(
        reader.cases, reader.patients, values, settings.generator.validation_share, settings.seed)
    fewest = FEWEST_CASES if settings.gate.enabled else 1
    if len(validation) < fewest:
        raise NothingToChange(
            f"the gate needs at least {fewest} held-out cases of unseen patients, but of the "
            f"{len(reader.cases)} cases only {len(validation)} can be held out", "add cases, raise "
            "generator.validation_share, or set counterfactual.source to acquisition")
    geometry = fold.geometry
    sizes, images_per_pass = plan_sizes(
        geometry.patch_size, pooling_strides(configuration), len(configuration.normalization_schemes), coding.width,
        settings.generator)
    identity = {
        "generator": identity_settings(settings, "generator")["generator"], "seed": settings.seed,
        "sizes": asdict(sizes),
        "plan": fingerprint(configuration), "attributes": coding.to_json(), "cells": digest(_seen(cells, coding)),
        "interventions": [one.name for one in interventions], "training": training, "validation": validation,
        "images": reader.image_content(),
    }
    return GeneratorTask(
        reader=reader, cells=cells, training=training, validation=validation, coding=coding,
        interventions=interventions, scale=IntensityScale.of_quantiles(case_quantiles(reader, training)), sizes=sizes,
        images_per_pass=images_per_pass, settings=settings, spacing=geometry.spacing, device=fold.device,
        workers=get_allowed_n_proc_DA(), folder=generators_folder(fold) / digest(identity), identity=identity,
        log=fold.log, ranks=ranks)


def generators_folder(fold: FoldContext) -> Path:
    """``nnUNet_results/DatasetXXX/cfcl_generators``, shared by trainers, and by folds with the same cases."""
    return Path(str(nnUNet_results)) / fold.dataset / GENERATORS


def pooling_strides(configuration: ConfigurationManager) -> list[tuple[int, ...]]:
    """Read the strides (D,) of every stage of the plan's network.

    Raises:
        NothingToChange: the plan's network has no strides.
    """
    network = configuration.configuration.get("architecture", {})
    strides = network.get("arch_kwargs", {}).get("strides")
    if not strides:
        name = network.get("network_class_name", "network")
        raise NothingToChange(f"the plan's {name} has no strides, which define the generator's resolutions",
                              "set counterfactual.source to acquisition")
    dim = len(configuration.patch_size)
    return [tuple(stride) if not isinstance(stride, int) else (stride,) * dim for stride in strides]


def _silent(*line: Any, **ignored: Any) -> None:
    """Log nothing."""


def _seen(cells: Mapping[str, Mapping[str, str]], coding: AttributeCoding) -> dict[str, dict[str, str]]:
    """The known attribute values of every case, as the generator is conditioned on them."""
    return {case: {one.name: cell for one in coding.attributes if not is_missing(cell := cells[case].get(one.name, ""))}
            for case in cells}
