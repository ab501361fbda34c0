"""Which counterfactuals a probe looks at: those that the settings name where they are there already, else analytic
acquisitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nnunet_cfcl.counterfactual.choice import choose_source, wants_generator
from nnunet_cfcl.counterfactual.generator.finetuning import CounterfactualFineTuning
from nnunet_cfcl.counterfactual.generator.source import GeneratorSource
from nnunet_cfcl.counterfactual.generator.training import GeneratorTraining
from nnunet_cfcl.counterfactual.source import AcquisitionSource, CounterfactualSource, zero_is_outside
from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.data.pool.manifest import pool_folder, read_manifest
from nnunet_cfcl.data.pretraining_cases import Labels, PretrainingCases
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.lenient_json import read_json_object
from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows
from nnunet_cfcl.phases.attributes_of_cases import NothingToChange, known_attributes
from nnunet_cfcl.phases.generator_task import has_attributes
from nnunet_cfcl.runs.ranks import Ranks

#: Windows that a generator takes at once.
PER_PASS = 4


def probe_source(
    trainer: Any, reader: PreprocessedCases, validation: Sequence[str], log: Callable[[str], object]
) -> CounterfactualSource:
    """The counterfactuals of a probe; nothing is trained for it.

    Args:
        trainer: of `bare_fold`; its settings decide.
        reader: of all cases of the probe; acquisitions aim at their intensities.
        validation: the cases whose counterfactuals are wanted.
        log: is told why others than the settings' are taken.
    """
    settings, folder = trainer.settings, Path(trainer.preprocessed_dataset_folder)
    schemes = trainer.configuration_manager.normalization_schemes
    dim = len(trainer.configuration_manager.patch_size)
    try:
        if wants_generator(settings, str(folder), has_attributes(trainer)):
            return _generated(trainer, validation)
        held_out = PreprocessedCases(str(folder), list(validation))
        pool = read_manifest(pool_folder(folder))
        known = {*held_out.known, *(pool.cases if pool else ())}
        found = choose_source(settings, PretrainingCases([held_out], known, Labels()), str(folder), schemes, dim)
        if not isinstance(found, AcquisitionSource):
            return found
    except UserError as error:
        log(f"counterfactuals of the probe are analytic acquisitions: {error}")
    cases = PretrainingCases([reader], reader.known, Labels())
    return AcquisitionSource(cases, settings.acquisition, schemes, dim)


def _generated(trainer: Any, validation: Sequence[str]) -> CounterfactualSource:
    """Of the fold's generator and the interventions that passed its gate.

    Raises:
        UserError: there is none yet, or no intervention passed.
    """
    # trainers are built on this room
    from nnunet_cfcl.phases.generator_phase import GeneratorPhase

    phase = GeneratorPhase(trainer, Ranks(), tells_cases=False)
    if not _is_judged(phase.task.folder, trainer.settings.generator.finetune_epochs > 0):
        raise NothingToChange("the generator that the settings ask for is not trained and judged yet (`nnunet_cfcl "
                              "generator report` does both)")
    judged = phase.judged()
    if not judged.passed:
        raise NothingToChange("no intervention of the generator passed the gate")
    known = known_attributes(Path(trainer.preprocessed_dataset_folder_base))
    return GeneratorSource(
        judged.generator, {} if known is None else known.cells(list(validation)), judged.passed,
        SlidingWindows(judged.generator.patch_size), PER_PASS, trainer.settings.counterfactual.abduction,
        zero_is_outside(trainer.configuration_manager.normalization_schemes))


def _is_judged(folder: Path, finetunes: bool) -> bool:
    """Whether a generator is finished, its fine-tuning too where the gate asked for one and there is one."""
    reports = [read_json_object(file, []) for file in folder.glob("gate_*.json")]
    wanted = finetunes and any(one.get("ineffective") for one in reports)
    return (GeneratorTraining.final_in(folder).is_file() and bool(reports)
            and (not wanted or CounterfactualFineTuning.final_in(folder).is_file()))
