"""Phase 0 of a trainer: the generator of counterfactuals, trained, judged, and put to work."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from nnunet_cfcl.counterfactual.choice import wants_generator
from nnunet_cfcl.counterfactual.gate.attribute_predictor import train_predictor
from nnunet_cfcl.counterfactual.gate.judges import Judges, evaluate, train_judges
from nnunet_cfcl.counterfactual.gate.report import write_report
from nnunet_cfcl.counterfactual.gate.results import GateReport
from nnunet_cfcl.counterfactual.generator.data import Patches, draw_patches
from nnunet_cfcl.counterfactual.generator.finetuning import CounterfactualFineTuning, finetuned_identity
from nnunet_cfcl.counterfactual.generator.generation import Generation, generate_counterfactuals
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.counterfactual.generator.source import GeneratorSource
from nnunet_cfcl.counterfactual.generator.training import GeneratorTask, GeneratorTraining
from nnunet_cfcl.counterfactual.generator.whole_cases import SlidingWindowCounterfactuals
from nnunet_cfcl.counterfactual.mixed import MixedSource
from nnunet_cfcl.counterfactual.source import (
    AcquisitionSource,
    CounterfactualSource,
    PrecomputedSource,
    zero_is_outside,
)
from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.data.pretraining_cases import PretrainingCases
from nnunet_cfcl.errors import UserError, first_line, listed
from nnunet_cfcl.files.atomic import replace_atomically, writable_folder, write_text_atomically
from nnunet_cfcl.files.checksummed_json import checksummed_text, read_checksummed
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.files.names import is_safe_filename
from nnunet_cfcl.nnunet.plan import fingerprint
from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows
from nnunet_cfcl.phases.attributes_of_cases import NothingToChange
from nnunet_cfcl.phases.generator_task import build_generator_task, has_attributes
from nnunet_cfcl.phases.lazy_source import LazySource
from nnunet_cfcl.runs.epoch_log import best_effort
from nnunet_cfcl.runs.lock import exclusive
from nnunet_cfcl.runs.ranks import Ranks

#: Patches that the judges learn from: so many times those that are looked at.
TRAINING_PATCHES = 8
#: Memory that the patches of either kind may take.
PATCH_BYTES = 2 << 30
#: Part of the seed of the teacher in fine-tuning, which must not be the judge.
TEACHER_SEED = 101


def lazy_generator_source(trainer: Any, ranks: Ranks) -> LazySource | None:
    """The counterfactuals of a generator where the settings and the dataset ask for one; None where they do not.

    Phase 0 is done when the promise is kept: whoever finds before that they are not needed, or cannot be used, has
    waited for nothing.

    Raises:
        UserError: see `build_generator_task`.
    """
    attributes = ranks.main_first(lambda: has_attributes(trainer))
    if not wants_generator(trainer.settings, trainer.preprocessed_dataset_folder, attributes):
        return None
    wanted = trainer.settings.counterfactual
    if isinstance(wanted.store, str):
        raise UserError(f"counterfactual.store names a folder ({wanted.store}), but counterfactual.source is "
                        "'generator', whose store lies beside the preprocessed data: leave counterfactual.store out, "
                        "or set the source to precomputed")
    if wanted.store is not False:
        writable_folder(Path(trainer.preprocessed_dataset_folder).parent,
                        "counterfactuals would be kept there: make it writable, or set counterfactual.store to false, "
                        "or counterfactual.source to acquisition")
    try:
        phase = GeneratorPhase(trainer, ranks, tells_cases=False)
    except NothingToChange as reason:
        if trainer.settings.counterfactual.source == "generator":
            raise
        if ranks.is_main:
            trainer.print_to_log_file(f"No generator is trained, acquisition is used instead: {reason}")
        return None

    def make() -> CounterfactualSource:
        source = phase.source()
        if ranks.is_main and not trainer.disable_checkpointing:
            phase.copy_report(Path(trainer.output_folder) / "cfcl" / "generator" / "report")
        return source

    return LazySource(phase.identity(), make)


@dataclass(frozen=True)
class Judged:
    """A generator and what the gate says about it.

    Attributes:
        generator: the one to use.
        passed, failed: its interventions.
    """

    generator: CounterfactualGenerator
    passed: tuple[Intervention, ...]
    failed: tuple[Intervention, ...]


class GeneratorPhase:
    """The generator of a trainer's fold.

    Args:
        trainer: an nnU-Net trainer with ``settings``, or what `bare_trainer` makes.
        ranks: the processes that share every step.
        tells_cases: see `build_generator_task`.

    Raises:
        UserError: see `build_generator_task`.
    """

    def __init__(self, trainer: Any, ranks: Ranks, tells_cases: bool = True) -> None:
        self.trainer, self.ranks = trainer, ranks
        self.task: GeneratorTask = ranks.main_first(lambda: build_generator_task(trainer, ranks, tells_cases))
        #: where the report on the generator that is used lies, once it is judged
        self.report_folder = self.task.folder / "report"

    def identity(self) -> dict[str, Any]:
        """All that decides about what `source` gives, the gate's verdicts included; nothing need be trained for it."""
        settings = self.task.settings
        # ranges of acquisitions decide about nothing where none can take an intervention's place
        name = f"generator or {AcquisitionSource.name}" if settings.gate.enabled else "generator"
        return {
            "source": name, "generator": digest(self.task.identity),
            "finetuning": finetuned_identity(self.task)["finetuned"], "gate": settings.to_dict()["gate"],
            "stored": settings.counterfactual.store is not False, "abduction": settings.counterfactual.abduction,
        }

    def trained(self) -> CounterfactualGenerator:
        """The generator as its own training leaves it; trained, gone on with, or loaded."""
        training_file = GeneratorTraining.final_in(self.task.folder)
        with exclusive(self.task.folder, self._log, self.ranks):
            if self.ranks.broadcast_object(training_file.exists()):
                self._log(f"The generator was trained before, same settings, cases and attributes: {training_file}")
            else:
                self._announce()
                GeneratorTraining(self.task).run(resume=True)
        return self._load(training_file)

    def judged(self) -> Judged:
        """The generator after the gate; fine-tuned first where an intervention does too little."""
        generator = trained = self.trained()
        # both generators have the same judges, which are trained where a verdict is not written down yet
        judges = cache(lambda: self._judges(trained))
        with exclusive(self.task.folder, self._log, self.ranks):
            found = self.ranks.main_only(lambda: self._verdicts(trained, judges))
            if found["ineffective"] and self.task.settings.generator.finetune_epochs:
                taught = self._finetuned(trained)
                again = self.ranks.main_only(lambda: self._verdicts(taught, judges))
                if len(again["passed"]) >= len(found["passed"]):
                    generator, found = taught, again
        self.report_folder = self.task.folder / found["report"]
        for name, words in found["words"].items():
            self._log(f"Gate, intervention '{name}': {words}")
        passes = {one: one.name in found["passed"] or not self.task.settings.gate.enabled
                  for one in self.task.interventions}
        return Judged(generator, tuple(one for one, passed in passes.items() if passed),
                      tuple(one for one, passed in passes.items() if not passed))

    def generated(self, judged: Judged) -> CounterfactualStore:
        """The store with the counterfactuals of all cases by the interventions that passed."""
        reader, settings = cast(PretrainingCases, self.task.reader), self.task.settings.counterfactual
        blender = SlidingWindowCounterfactuals(judged.generator, reader, self._windows(judged), self._patches_per_pass,
                                               self._masked)
        wanted = Generation(
            digest(judged.generator.identity), judged.passed, self.task.settings.seed, settings.abduction,
            # images are part of the generator's own identity
            digest(fingerprint(self.trainer.configuration_manager)))

        def generate() -> CounterfactualStore:
            return generate_counterfactuals(
                blender, self.task.cells, wanted, self.trainer.preprocessed_dataset_folder, self._log, reader.layout)

        # the first rank makes them all, which may take long; the others find everything there
        store = self.ranks.main_only(generate)
        return store if self.ranks.is_main else generate()

    def source(self) -> CounterfactualSource:
        """What phase 1 takes its counterfactuals from; acquisition if no intervention passed the gate."""
        judged, settings = self.judged(), self.task.settings
        acquisition = AcquisitionSource(self.task.reader, settings.acquisition, self._schemes, len(self.task.spacing))
        if not judged.passed:
            self._log(f"No intervention of the generator passed the gate: acquisition takes its place. See "
                      f"{self.report_folder}")
            return acquisition
        generated: CounterfactualSource
        if settings.counterfactual.store is False:
            generated = GeneratorSource(
                judged.generator, self.task.cells, judged.passed, self._windows(judged), self._patches_per_pass,
                settings.counterfactual.abduction, self._masked)
        else:
            generated = PrecomputedSource(self.generated(judged), "generator")
        if not judged.failed:
            return generated
        self._log(f"Acquisition takes the place of {', '.join(one.name for one in judged.failed)}, which did not pass "
                  f"the gate. See {self.report_folder}")
        return MixedSource(generated, acquisition, len(judged.passed), len(judged.failed))

    def copy_report(self, folder: Path) -> None:
        """The gate's report, into the fold's own folder; a file that cannot be copied costs a word in the log."""
        with best_effort(folder, self._log, "copy"):
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(self.report_folder.iterdir()):
                copy = folder / file.name
                with best_effort(copy, self._log, "copy"):
                    replace_atomically(copy, partial(shutil.copyfile, file))

    def _judges(self, generator: CounterfactualGenerator) -> Judges:
        """With judges trained on the generator's training patients."""
        held_out, gate = self._held_out_patches(), self.task.settings.gate
        self._log(f"Gate: {len(held_out)} patches of {len(set(held_out.cases))} held-out cases are looked at")
        return train_judges(generator, self._training_patches(), held_out, gate, self.task.settings.seed)

    def _verdicts(self, generator: CounterfactualGenerator, judges: Callable[[], Judges]) -> dict[str, Any]:
        """Names that passed, names of those that do too little, words about each; from the report if it is there."""
        names = [one.name for one in self.task.interventions]
        key = digest([generator.identity, self.task.settings.to_dict()["gate"], names])
        file, report_folder = self.task.folder / f"gate_{key}.json", self.task.folder / f"report_{key}"
        if not (file.exists() and report_folder.exists()):
            own = replace(judges(), generator=generator)
            report = evaluate(own, self.task.interventions, self.task.settings.gate)
            write_report(report_folder, report, generator, own.held_out, self.task.interventions, self.task.spacing)
            write_text_atomically(file, checksummed_text({**_summary(report), "report": report_folder.name}))
        try:
            found = read_checksummed(file)
            if not is_safe_filename(found["report"]):
                raise ValueError("its report lies elsewhere")
            if not {*found["passed"], *found["ineffective"]} <= set(names) or {*found["words"].keys()} != set(names):
                raise ValueError(f"expected verdicts on {listed(names)}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{file} cannot be read ({first_line(error)})"
            raise UserError(f"{reason}", "delete it and start again, with --c") from error
        return found

    def _finetuned(self, generator: CounterfactualGenerator) -> CounterfactualGenerator:
        """After counterfactual fine-tuning, now or before."""
        file = CounterfactualFineTuning.final_in(self.task.folder)
        if self.ranks.broadcast_object(file.exists()):
            taught = self._load(file)
            if digest(taught.identity) == digest(finetuned_identity(self.task)):
                return taught
        self._log("An intervention does too little: the generator is fine-tuned against an attribute predictor "
                  "(generator.finetune_epochs)")
        teacher = train_predictor(
            self._training_patches(), self.task.coding, "residual", self.task.settings.gate.predictor_steps,
            self.task.settings.seed + TEACHER_SEED, self.task.device, self.task.scale)
        CounterfactualFineTuning(self.task, generator, teacher).run(resume=True)
        return self._load(file)

    def _held_out_patches(self) -> Patches:
        """Those that are looked at."""
        count = max(self.task.settings.gate.cases, len(self.task.validation))
        return self._patches(self.task.validation, count, self.task.settings.seed)

    def _training_patches(self) -> Patches:
        """Those that judges and teacher learn from."""
        count = TRAINING_PATCHES * self.task.settings.gate.cases
        return self._patches(self.task.training, count, self.task.settings.seed + 1)

    def _patches(self, cases: Sequence[str], count: int, seed: int) -> Patches:
        """Patches of the cases, as many as fit; the ignore label says nothing about a voxel, as no label does."""
        task, ignored = self.task, self.trainer.label_manager.ignore_label
        size = task.sizes.resolutions[0].shape
        fitting = PATCH_BYTES // (4 * task.sizes.channels * math.prod(size))
        patches = draw_patches(task.reader, task.cells, cases, size, max(1, min(fitting, count)), seed)
        if patches.labels is None or ignored is None:
            return patches
        return replace(patches, labels=patches.labels.masked_fill(patches.labels == ignored, -1))

    def _load(self, file: Path) -> CounterfactualGenerator:
        """A generator of this task.

        Raises:
            UserError: it cannot be read, or was made for another plan, other cases, attributes or settings.
        """
        # other machines need not see the file, and hear of it if the first rank cannot read it
        state = self.ranks.main_only(lambda: CounterfactualGenerator.load(file).state())
        generator = CounterfactualGenerator.from_state(state, self.task.device)
        generator.zero_is_outside = self._masked
        found, expected = generator.identity, json.loads(json.dumps(dict(self.task.identity)))
        differing = [key for key in expected if json.loads(json.dumps(found.get(key))) != expected[key]]
        if differing:
            raise UserError(f"{file} was made with other {listed(differing)} than this run has: it was put there by "
                            "hand, or changed",
                            f"delete {file.parent} and train anew with `nnunet_cfcl generator train`")
        return generator

    def _windows(self, judged: Judged) -> SlidingWindows:
        return SlidingWindows(judged.generator.patch_size)

    @property
    def _patches_per_pass(self) -> int:
        # without a graph to keep, more of them fit
        return max(1, 2 * self.task.images_per_pass)

    @property
    def _schemes(self) -> Sequence[str]:
        schemes: Sequence[str] = self.trainer.configuration_manager.normalization_schemes
        return schemes

    @property
    def _masked(self) -> bool:
        return zero_is_outside(self._schemes)

    def _announce(self) -> None:
        task, chosen = self.task, self.task.settings.generator
        self._log(
            f"Phase 0: a generator of counterfactuals is trained, {chosen.epochs} epochs of "
            f"{chosen.iterations_per_epoch} steps of {chosen.images_per_step} patches of "
            f"{list(task.sizes.resolutions[0].shape)} voxels, {len(task.training)} cases and {len(task.validation)} "
            "held out, attributes "
            f"{', '.join(f'{one.name} ({one.kind})' for one in task.coding.attributes)}, interventions "
            f"{', '.join(one.name for one in task.interventions)}; its files are in {task.folder}")

    def _log(self, line: str) -> None:
        if self.ranks.is_main:
            self.trainer.print_to_log_file(line)


def _summary(report: GateReport) -> dict[str, Any]:
    verdicts = dict(zip((one.name for one in report.interventions), report.verdicts))
    return {"passed": [name for name, verdict in verdicts.items() if verdict.passed],
            "ineffective": [name for name, verdict in verdicts.items() if verdict.ineffective],
            "words": {name: verdict.summary for name, verdict in verdicts.items()}}
