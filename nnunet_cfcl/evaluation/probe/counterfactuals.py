"""Choice of a probe's counterfactuals: those of the settings where they exist already, else analytic acquisitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nnunet_cfcl.counterfactual.choice import choose_source, wants_generator
from nnunet_cfcl.counterfactual.generator.source import GeneratorSource
from nnunet_cfcl.counterfactual.source import AcquisitionSource, CounterfactualSource, zero_is_outside
from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.data.pool.manifest import pool_folder, read_manifest
from nnunet_cfcl.data.pretraining_cases import Labels, PretrainingCases
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows
from nnunet_cfcl.phases.attributes_of_cases import NothingToChange, known_attributes
from nnunet_cfcl.phases.generator_phase import GeneratorPhase
from nnunet_cfcl.phases.generator_task import has_attributes
from nnunet_cfcl.runs.ranks import Ranks

#: Windows in one forward pass of a generator.
PER_PASS = 4


def probe_source(
    fold: FoldContext, reader: PreprocessedCases, validation: Sequence[str], log: Callable[[str], object]
) -> CounterfactualSource:
    """Choose the counterfactuals of a probe; nothing is trained.

    Args:
        fold: fold to probe, with its settings.
        reader: reader of all cases of the probe, whose intensities are the targets of acquisitions.
        validation: cases whose counterfactuals are needed.
        log: receives the reason where the counterfactuals of the settings cannot be used.
    """
    settings, folder, schemes = fold.settings, fold.preprocessed, fold.schemes
    dim = len(fold.configuration.patch_size)
    try:
        if wants_generator(settings, folder, has_attributes(fold)):
            return _generated(fold, validation)
        held_out = PreprocessedCases(str(folder), list(validation))
        pool = read_manifest(pool_folder(folder))
        known = {*held_out.known, *(pool.cases if pool else ())}
        found = choose_source(settings, PretrainingCases([held_out], known, Labels()), folder, schemes, dim)
        if not isinstance(found, AcquisitionSource):
            return found
    except UserError as error:
        log(f"the probe uses analytic acquisitions as counterfactuals: {error}")
    cases = PretrainingCases([reader], reader.known, Labels())
    return AcquisitionSource(cases, settings.acquisition, schemes, dim)


def _generated(fold: FoldContext, validation: Sequence[str]) -> CounterfactualSource:
    """Source of the fold's generator with the interventions that passed the gate.

    Raises:
        UserError: the generator is not trained and judged yet, or no intervention passed.
    """
    phase = GeneratorPhase(fold, Ranks(), logs_cases=False)
    if not phase.is_judged():
        raise NothingToChange("the generator of the settings is not trained and judged yet",
                              "run nnunet_cfcl generator report, which does both")
    judged = phase.judged()
    if not judged.passed:
        raise NothingToChange("no intervention of the generator passed the gate")
    known = known_attributes(fold.preprocessed.parent)
    return GeneratorSource(
        judged.generator, {} if known is None else known.cells(list(validation)), judged.passed,
        SlidingWindows(judged.generator.patch_size), PER_PASS, fold.settings.counterfactual.abduction,
        zero_is_outside(fold.schemes))
