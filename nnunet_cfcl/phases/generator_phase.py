"""The generator phase (phase 0) of a fold: train the counterfactual generator, judge it, generate counterfactuals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from nnunet_cfcl.counterfactual.choice import wants_generator
from nnunet_cfcl.counterfactual.gate.attribute_predictor import train_predictor
from nnunet_cfcl.counterfactual.gate.evaluation import evaluate
from nnunet_cfcl.counterfactual.gate.judges import Judges, train_judges
from nnunet_cfcl.counterfactual.gate.metrics import GATE_VERSION
from nnunet_cfcl.counterfactual.gate.report import write_report
from nnunet_cfcl.counterfactual.gate.results import GateReport
from nnunet_cfcl.counterfactual.generator.data import Patches, draw_patches
from nnunet_cfcl.counterfactual.generator.finetuning import CounterfactualFineTuning, finetuned_identity
from nnunet_cfcl.counterfactual.generator.generation import Generation, generate_counterfactuals
from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.counterfactual.generator.source import GeneratorSource
from nnunet_cfcl.counterfactual.generator.task import GeneratorTask
from nnunet_cfcl.counterfactual.generator.training import GeneratorTraining
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
from nnunet_cfcl.errors import UserError, best_effort, first_line, listed
from nnunet_cfcl.files.atomic import replace_atomically, writable_folder, write_text_atomically
from nnunet_cfcl.files.checksummed_json import checksummed_text, read_checksummed
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.files.lenient_json import read_json_object
from nnunet_cfcl.files.names import is_safe_filename
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.nnunet.plan import fingerprint
from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows
from nnunet_cfcl.phases.attributes_of_cases import NothingToChange
from nnunet_cfcl.phases.generator_task import build_generator_task, has_attributes
from nnunet_cfcl.phases.lazy_source import LazySource
from nnunet_cfcl.runs.lock import exclusive
from nnunet_cfcl.runs.ranks import Ranks

#: Training patches of the judges, as a multiple of the held-out patches.
TRAINING_PATCHES = 8
#: Memory limit of the patches of either kind.
PATCH_BYTES = 2 << 30
#: Seed offset of the fine-tuning's attribute predictor, which must differ from the gate's judge.
TEACHER_SEED = 101


def lazy_generator_source(fold: FoldContext, ranks: Ranks) -> LazySource | None:
    """The generator's counterfactuals where settings and dataset ask for a generator, else None.

    Nothing is trained until the source is materialised.

    Raises:
        UserError: see `build_generator_task`.
    """
    attributes = ranks.main_first(lambda: has_attributes(fold))
    if not wants_generator(fold.settings, fold.preprocessed, attributes):
        return None
    wanted = fold.settings.counterfactual
    if isinstance(wanted.store, str):
        raise UserError(f"counterfactual.store names a folder ({wanted.store}), but counterfactual.source is "
                        "'generator', whose store lies beside the preprocessed data",
                        "leave counterfactual.store out, or set the source to precomputed")
    if wanted.store is not False:
        writable_folder(fold.preprocessed.parent,
                        "make it writable for the counterfactuals, or set counterfactual.store to false, or "
                        "counterfactual.source to acquisition")
    try:
        phase = GeneratorPhase(fold, ranks, logs_cases=False)
    except NothingToChange as reason:
        if fold.settings.counterfactual.source == "generator":
            raise
        if ranks.is_main:
            fold.log(f"No generator is trained, acquisition effects are used instead: {reason}")
        return None

    def make() -> CounterfactualSource:
        source = phase.source()
        if ranks.is_main and fold.saves:
            phase.copy_report(fold.folder / "cfcl" / "generator" / "report")
        return source

    return LazySource(phase.identity(), make)


@dataclass(frozen=True)
class Judged:
    """A generator and its interventions, sorted by the gate.

    Attributes:
        generator: the generator, fine-tuned if that helped.
        passed, failed: interventions that passed and failed the gate.
    """

    generator: CounterfactualGenerator
    passed: tuple[Intervention, ...]
    failed: tuple[Intervention, ...]


class GeneratorPhase:
    """The generator phase of a fold: train, judge, fine-tune, generate.

    Args:
        fold: the fold that is trained.
        ranks: the processes that share every step.
        logs_cases: see `build_generator_task`.

    Raises:
        UserError: see `build_generator_task`.
    """

    def __init__(self, fold: FoldContext, ranks: Ranks, logs_cases: bool = True) -> None:
        self.fold, self.ranks = fold, ranks
        self.task: GeneratorTask = ranks.main_first(lambda: build_generator_task(fold, ranks, logs_cases))
        #: folder of the gate's report on the generator in use, once it is judged
        self.report_folder = self.task.folder / "report"

    def identity(self) -> dict[str, Any]:
        """Everything that determines the counterfactuals of `source`, known before any training."""
        settings = self.task.settings
        # acquisition effects only matter where they may replace an intervention that fails
        name = f"generator or {AcquisitionSource.name}" if settings.gate.enabled else "generator"
        return {
            "source": name, "generator": digest(self.task.identity),
            "finetuning": finetuned_identity(self.task)["finetuned"], "gate": self._gate,
            "stored": settings.counterfactual.store is not False, "abduction": settings.counterfactual.abduction,
        }

    def trained(self) -> CounterfactualGenerator:
        """Train the generator, continue its training, or load it if it is finished."""
        training_file = GeneratorTraining.final_in(self.task.folder)
        with exclusive(self.task.folder, self._log, self.ranks):
            if self.ranks.broadcast_object(training_file.exists()):
                self._log(
                    f"The generator was trained before with the same settings, cases and attributes: {training_file}")
            else:
                self._announce()
                GeneratorTraining(self.task).run(resume=True)
        return self._load(training_file)

    def judged(self) -> Judged:
        """Judge the generator; fine-tune and judge it again where an intervention is ineffective."""
        generator = trained = self.trained()
        # both generators have the same judges, trained only if a verdict is missing
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
        """Generate the counterfactuals of all cases for the interventions that passed; returns their store."""
        reader, settings = cast(PretrainingCases, self.task.reader), self.task.settings.counterfactual
        blender = SlidingWindowCounterfactuals(judged.generator, reader, self._windows(judged), self._patches_per_pass,
                                               self._masked)
        wanted = Generation(
            digest(judged.generator.identity), judged.passed, self.task.settings.seed, settings.abduction,
            # the images are part of the generator's own identity
            digest(fingerprint(self.fold.configuration)))

        def generate() -> CounterfactualStore:
            return generate_counterfactuals(
                blender, self.task.cells, wanted, str(self.fold.preprocessed), self._log, reader.layout)

        # the main rank generates, which may take long; the other ranks then find a complete store
        store = self.ranks.main_only(generate)
        return store if self.ranks.is_main else generate()

    def source(self) -> CounterfactualSource:
        """The counterfactual source of the pretraining; acquisition effects if no intervention passed the gate."""
        judged, settings = self.judged(), self.task.settings
        acquisition = AcquisitionSource(
            self.task.reader, settings.acquisition, self.fold.schemes, len(self.task.spacing))
        if not judged.passed:
            self._log(f"No intervention of the generator passed the gate: acquisition effects replace it. See "
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
        self._log(f"Acquisition effects replace {', '.join(one.name for one in judged.failed)}, which did not pass "
                  f"the gate. See {self.report_folder}")
        return MixedSource(generated, acquisition, len(judged.passed), len(judged.failed))

    def copy_report(self, folder: Path) -> None:
        """Copy the gate's report into the fold's own folder; a failed copy is logged."""
        with best_effort(folder, self._log, "copy"):
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(self.report_folder.iterdir()):
                copy = folder / file.name
                with best_effort(copy, self._log, "copy"):
                    replace_atomically(copy, partial(shutil.copyfile, file))

    def _judges(self, generator: CounterfactualGenerator) -> Judges:
        """Train the judges on the generator's training patients."""
        held_out, gate = self._held_out_patches(), self.task.settings.gate
        self._log(f"Gate: judging on {len(held_out)} patches of {len(set(held_out.cases))} held-out cases")
        return train_judges(generator, self._training_patches(), held_out, gate, self.task.settings.seed)

    def _verdicts(self, generator: CounterfactualGenerator, judges: Callable[[], Judges]) -> dict[str, Any]:
        """Passed and ineffective interventions and a summary of each, read from an earlier verdict if there is one."""
        names = [one.name for one in self.task.interventions]
        file, report_folder = self._verdict_files(generator.identity)
        if not self._is_written(generator.identity):
            own = replace(judges(), generator=generator)
            report = evaluate(own, self.task.interventions, self.task.settings.gate)
            write_report(report_folder, report, generator, own.held_out, self.task.interventions, self.task.spacing)
            write_text_atomically(file, checksummed_text({**_summary(report), "report": report_folder.name}))
        try:
            found = read_checksummed(file)
            if not is_safe_filename(found["report"]):
                raise ValueError("its report is not a name in the same folder")
            if not {*found["passed"], *found["ineffective"]} <= set(names) or {*found["words"].keys()} != set(names):
                raise ValueError(f"expected verdicts on {listed(names)}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} cannot be read ({first_line(error)})",
                            "delete it and start again, with --c") from error
        return found

    def _verdict_files(self, identity: Mapping[str, Any]) -> tuple[Path, Path]:
        """The file with the verdicts on a generator of this identity, and the folder of its report."""
        names = [one.name for one in self.task.interventions]
        key = digest([dict(identity), self._gate, names])
        return self.task.folder / f"gate_{key}.json", self.task.folder / f"report_{key}"

    @property
    def _gate(self) -> dict[str, Any]:
        """Everything besides the generator that verdicts depend on; the first version of the metrics has no number."""
        gate: dict[str, Any] = self.task.settings.to_dict()["gate"]
        return {**gate, "version": GATE_VERSION} if GATE_VERSION > 1 else gate

    def is_judged(self) -> bool:
        """Whether `judged` would train nothing: the generator is trained and there are verdicts on it, and so is its
        fine-tuning where the gate found an intervention ineffective."""
        file, _ = self._verdict_files(self.task.identity)
        if not (GeneratorTraining.final_in(self.task.folder).is_file() and self._is_written(self.task.identity)):
            return False
        if not (read_json_object(file, []).get("ineffective") and self.task.settings.generator.finetune_epochs):
            return True
        return (CounterfactualFineTuning.final_in(self.task.folder).is_file()
                and self._is_written(finetuned_identity(self.task)))

    def _is_written(self, identity: Mapping[str, Any]) -> bool:
        """Whether verdicts and report of a generator of this identity are there."""
        file, report_folder = self._verdict_files(identity)
        return file.is_file() and report_folder.is_dir()

    def _finetuned(self, generator: CounterfactualGenerator) -> CounterfactualGenerator:
        """Fine-tune the generator against an attribute predictor, or load it if that was done."""
        file = CounterfactualFineTuning.final_in(self.task.folder)
        if self.ranks.broadcast_object(file.exists()):
            taught = self._load(file)
            if digest(taught.identity) == digest(finetuned_identity(self.task)):
                return taught
        self._log("An intervention is ineffective: the generator is fine-tuned against an attribute predictor "
                  "(generator.finetune_epochs)")
        teacher = train_predictor(
            self._training_patches(), self.task.coding, "residual", self.task.settings.gate.predictor_steps,
            self.task.settings.seed + TEACHER_SEED, self.task.device, self.task.scale)
        CounterfactualFineTuning(self.task, generator, teacher).run(resume=True)
        return self._load(file)

    def _held_out_patches(self) -> Patches:
        """Patches of held-out patients, to judge on."""
        count = max(self.task.settings.gate.cases, len(self.task.validation))
        return self._patches(self.task.validation, count, self.task.settings.seed)

    def _training_patches(self) -> Patches:
        """Patches of training patients, for the judges and the fine-tuning's predictor."""
        count = TRAINING_PATCHES * self.task.settings.gate.cases
        return self._patches(self.task.training, count, self.task.settings.seed + 1)

    def _patches(self, cases: Sequence[str], count: int, seed: int) -> Patches:
        """Draw at most ``count`` patches that fit into memory; the ignore label counts as unlabelled."""
        task, ignored = self.task, self.fold.labels.ignore_label
        size = task.sizes.resolutions[0].shape
        fitting = PATCH_BYTES // (4 * task.sizes.channels * math.prod(size))
        patches = draw_patches(task.reader, task.cells, cases, size, max(1, min(fitting, count)), seed)
        if patches.labels is None or ignored is None:
            return patches
        return replace(patches, labels=patches.labels.masked_fill(patches.labels == ignored, -1))

    def _load(self, file: Path) -> CounterfactualGenerator:
        """Load a generator of this task.

        Raises:
            UserError: it cannot be read, or has another plan, other cases, attributes or settings.
        """
        # ranks on other machines need not see the file; its errors reach all of them
        state = self.ranks.main_only(lambda: CounterfactualGenerator.load(file).state())
        generator = CounterfactualGenerator.from_state(state, self.task.device)
        generator.zero_is_outside = self._masked
        found, expected = generator.identity, json.loads(json.dumps(dict(self.task.identity)))
        differing = [key for key in expected if json.loads(json.dumps(found.get(key))) != expected[key]]
        if differing:
            raise UserError(f"{file} differs from this run in {listed(differing)}: it was copied or changed by hand",
                            f"delete {file.parent} and train anew with `nnunet_cfcl generator train`")
        return generator

    def _windows(self, judged: Judged) -> SlidingWindows:
        return SlidingWindows(judged.generator.patch_size)

    @property
    def _patches_per_pass(self) -> int:
        # without a graph to keep, more patches fit
        return max(1, 2 * self.task.images_per_pass)

    @property
    def _masked(self) -> bool:
        return zero_is_outside(self.fold.schemes)

    def _announce(self) -> None:
        task, chosen = self.task, self.task.settings.generator
        self._log(
            f"Phase 0: training a counterfactual generator, {chosen.epochs} epochs of "
            f"{chosen.iterations_per_epoch} steps of {chosen.images_per_step} patches of "
            f"{list(task.sizes.resolutions[0].shape)} voxels, {len(task.training)} cases and {len(task.validation)} "
            "held out, attributes "
            f"{', '.join(f'{one.name} ({one.kind})' for one in task.coding.attributes)}, interventions "
            f"{', '.join(one.name for one in task.interventions)}; its files are in {task.folder}")

    def _log(self, line: str) -> None:
        if self.ranks.is_main:
            self.fold.log(line)


def _summary(report: GateReport) -> dict[str, Any]:
    verdicts = dict(zip((one.name for one in report.interventions), report.verdicts))
    return {"passed": [name for name, verdict in verdicts.items() if verdict.passed],
            "ineffective": [name for name, verdict in verdicts.items() if verdict.ineffective],
            "words": {name: verdict.summary for name, verdict in verdicts.items()}}
