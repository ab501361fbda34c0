"""What training images are replaced by in phase 2, according to the settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.choice import choose_source
from nnunet_cfcl.counterfactual.source import AcquisitionSource, CounterfactualSource
from nnunet_cfcl.data.pretraining_cases import PretrainingCases, pretraining_cases
from nnunet_cfcl.nnunet.plan import view_geometry
from nnunet_cfcl.phases.generator_phase import lazy_generator_source
from nnunet_cfcl.phases.replaced_images import ReplacedImages, Replacement
from nnunet_cfcl.runs.ranks import Ranks


def with_replacements(trainer: Any, cases: Any, ranks: Ranks) -> Any:
    """nnU-Net's dataset of training cases, with ``finetune.counterfactual_probability`` and
    ``finetune.acquisition_probability``; the dataset itself where both are 0.

    The images whose intensities an acquisition may aim at are those of a pretraining with the same settings, so that a
    pretraining is compared with an augmentation that has seen as much. Where no generator is there yet, phase 0 makes
    one.

    Args:
        trainer: nnU-Net's, with ``settings``.
        cases: its dataset of training cases.
        ranks: the processes that share every step.

    Raises:
        UserError: see `pretraining_cases`, `choose_source` and `lazy_generator_source`.
    """
    chosen = trainer.settings.finetune
    if not (chosen.counterfactual_probability or chosen.acquisition_probability):
        return cases
    reader = ranks.main_first(lambda: pretraining_cases(trainer, _with_training_cases(trainer.settings), False))
    configuration, geometry = trainer.configuration_manager, view_geometry(trainer.configuration_manager)
    replacements = []
    if chosen.counterfactual_probability:
        source = _counterfactuals(trainer, reader, ranks)
        replacements.append(Replacement(source, chosen.counterfactual_probability))
    if chosen.acquisition_probability:
        acquisition = AcquisitionSource(reader, trainer.settings.acquisition, configuration.normalization_schemes,
                                        len(geometry.patch_size))
        replacements.append(Replacement(acquisition, chosen.acquisition_probability))
    for one in replacements if ranks.is_main else ():
        trainer.print_to_log_file(f"Fine-tuning: a training image is replaced with probability {one.probability:g} "
                                  f"(counterfactuals: {one.source.name})")
    return ReplacedImages(cases, replacements, geometry.spacing, reader.cases)


def _counterfactuals(trainer: Any, reader: PretrainingCases, ranks: Ranks) -> CounterfactualSource:
    """Those of a pretraining with the same settings."""
    lazy = lazy_generator_source(trainer, ranks)
    if lazy is not None:
        lazy.materialise()
        return lazy
    configuration = trainer.configuration_manager
    return choose_source(trainer.settings, reader, trainer.preprocessed_dataset_folder,
                         configuration.normalization_schemes, len(configuration.patch_size))


def _with_training_cases(settings: Settings) -> Settings:
    """The pool alone lacks the images that are to be replaced."""
    if settings.pretrain.data != "pool":
        return settings
    return replace(settings, pretrain=replace(settings.pretrain, data="training_and_pool"))
