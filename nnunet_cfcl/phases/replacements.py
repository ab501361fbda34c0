"""Counterfactuals in the fine-tuning's training images, as the settings ask for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.choice import choose_source
from nnunet_cfcl.counterfactual.source import AcquisitionSource, CounterfactualSource
from nnunet_cfcl.data.pretraining_cases import PretrainingCases, pretraining_cases
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.phases.generator_phase import lazy_generator_source
from nnunet_cfcl.phases.replaced_images import ReplacedImages, Replacement
from nnunet_cfcl.runs.ranks import Ranks


def with_replacements(fold: FoldContext, cases: Any, ranks: Ranks) -> Any:
    """Wrap nnU-Net's dataset of training cases for ``finetune.counterfactual_probability`` and
    ``finetune.acquisition_probability``; return it unchanged where both are 0.

    Acquisition effects aim at the intensities of the cases that a pretraining with the same settings would use, so that
    augmentation and pretraining are compared on equal data. A missing generator is trained first.

    Args:
        fold: the fold that is trained.
        cases: nnU-Net's dataset of the fold's training cases.
        ranks: the processes that share every step.

    Raises:
        UserError: see `pretraining_cases`, `choose_source` and `lazy_generator_source`.
    """
    chosen = fold.settings.finetune
    if not (chosen.counterfactual_probability or chosen.acquisition_probability):
        return cases
    reader = ranks.main_first(lambda: pretraining_cases(fold, _with_training_cases(fold.settings), False))
    geometry = fold.geometry
    replacements = []
    if chosen.counterfactual_probability:
        source = _counterfactuals(fold, reader, ranks)
        replacements.append(Replacement(source, chosen.counterfactual_probability))
    if chosen.acquisition_probability:
        acquisition = AcquisitionSource(reader, fold.settings.acquisition, fold.schemes,
                                        len(geometry.patch_size))
        replacements.append(Replacement(acquisition, chosen.acquisition_probability))
    for replacement in replacements if ranks.is_main else ():
        fold.log(f"Fine-tuning: training images are replaced with probability {replacement.probability:g} "
                 f"(counterfactuals: {replacement.source.name})")
    return ReplacedImages(cases, replacements, geometry.spacing, reader.cases)


def _counterfactuals(fold: FoldContext, reader: PretrainingCases, ranks: Ranks) -> CounterfactualSource:
    """The counterfactual source of a pretraining with the same settings."""
    lazy = lazy_generator_source(fold, ranks)
    if lazy is not None:
        lazy.materialise()
        return lazy
    return choose_source(fold.settings, reader, fold.preprocessed, fold.schemes, len(fold.geometry.patch_size))


def _with_training_cases(settings: Settings) -> Settings:
    """Add the training cases where the pretraining uses the pool alone: their images are replaced."""
    if settings.pretrain.data != "pool":
        return settings
    return replace(settings, pretrain=replace(settings.pretrain, data="training_and_pool"))
