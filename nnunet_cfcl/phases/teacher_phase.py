"""Phase 3 of a fold: a teacher labels the pool, and the network goes on learning from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nnunet_cfcl.counterfactual.source import CounterfactualSource
from nnunet_cfcl.data.pretraining_reader import PretrainingCases
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.fold import FoldContext, check_device_type
from nnunet_cfcl.nnunet.live_training import LiveTraining
from nnunet_cfcl.phases.earlier_files import back_up
from nnunet_cfcl.phases.lazy_source import LazySource
from nnunet_cfcl.phases.teacher_task import build_teacher_task, planned_source, pool_cases, teacher_identity
from nnunet_cfcl.runs.checkpoint import load_checkpoint, read_plain, weights_digest
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.teacher.loop import TeacherTraining

#: nnU-Net's checkpoint at the end of phase 2, beside its other checkpoints.
END_OF_PHASE_2 = "checkpoint_phase_2.pth"


@dataclass(frozen=True)
class TeacherPhase:
    """Phase 3 of a fold.

    Args:
        fold: the fold that is trained.
        ranks: the processes that share every step.
        reader: the training cases and the pool.
        source: the counterfactuals, not generated yet where a generator makes them.
    """

    fold: FoldContext
    ranks: Ranks
    reader: PretrainingCases
    source: CounterfactualSource

    @classmethod
    def planned(cls, fold: FoldContext, ranks: Ranks) -> TeacherPhase | None:
        """Check, before the first phase, that phase 3 can run; None where the fold has no pool, which is logged.

        Args:
            fold: the fold to be trained.
            ranks: the processes that share every step.

        Raises:
            UserError: ``teacher.enabled`` or ``teacher.start_from`` is set but there is no pool; its cases or
                counterfactuals cannot be used; the device is neither cpu nor cuda.
        """
        wanted = fold.settings.teacher
        check_device_type(fold.device)
        reader = ranks.main_first(lambda: pool_cases(fold))
        if reader.pool or not wanted.weight:
            return cls(fold, ranks, reader, planned_source(fold, ranks, reader))
        images = f"nnUNet_raw/{fold.dataset}/imagesUn"
        if wanted.enabled or wanted.start_from:
            demand = "teacher.enabled is true" if wanted.enabled else "teacher.start_from is set"
            raise UserError(f"{demand}, but phase 3 learns from a pool of unlabelled images, and the fold has none "
                            f"({images})",
                            f"put images there and run `nnunet_cfcl pool -d {fold.dataset} -c "
                            f"{fold.configuration_name} -p {fold.plans.plans_name}`, or leave the setting out")
        if ranks.is_main:
            fold.log("Phase 3 is skipped: it learns from a pool of unlabelled images, and the fold has none "
                     f"({images}). The result of phase 2 is final.")
        return None

    def run(self, training: LiveTraining) -> None:
        """Train, continue, or load the result of a finished phase 3 into the network; called by every rank.

        Raises:
            UserError: files of an earlier run cannot be read; the phase fails, see `TeacherTraining`.
        """
        start = self.ranks.main_only(lambda: self._start(training.plain))
        identity = teacher_identity(self.fold, training, self.reader, self.source, start)
        finished = self.ranks.main_only(lambda: self._finished(digest(identity)))
        if finished is not None:
            self._log(f"Phase 3 was finished before with the same settings: {self._final} is reused.")
            training.plain.load_state_dict(finished)
            return
        if isinstance(self.source, LazySource):
            self.source.materialise()
        task = self.ranks.main_first(lambda: build_teacher_task(
            self.fold, self.ranks, training, self.reader, self.source, identity))
        phase = TeacherTraining(training.network, training.plain, training.optimizer(), task)
        resumes = self.ranks.main_only(lambda: self._resumes(phase))
        self._announce(phase)
        phase.run(resumes)
        training.plain.load_state_dict(phase.result.state_dict())
        self._log(f"Phase 3 done, its files are in {task.folder}. The weights of phase 2 are kept as {END_OF_PHASE_2}.")

    def _start(self, network: nn.Module) -> str:
        """Load the weights of phase 2 where a run was continued; returns their digest."""
        file = self.fold.folder / END_OF_PHASE_2
        if self.fold.saves:
            load_weights(network, file, "delete it and start the training again")
        return weights_digest(network.state_dict())

    @property
    def _final(self) -> Path:
        return TeacherTraining.final_in(self.fold.folder / "cfcl" / "teacher")

    def _finished(self, identity: str) -> dict[str, Any] | None:
        """The weights of a finished phase 3 of the same identity, or None."""
        if not self._final.exists():
            return None
        content = load_checkpoint(self._final)
        if content.get("hash") == identity:
            weights: dict[str, Any] = content["network_weights"]
            return weights
        back_up(self.fold, self.ranks, self._final)
        return None

    def _resumes(self, phase: TeacherTraining) -> bool:
        if not phase.latest.exists():
            return False
        if load_checkpoint(phase.latest).get("hash") == digest(phase.task.identity):
            return True
        self._log("Phase 3 begins anew: settings, cases or the weights of phase 2 differ from the earlier run's.")
        back_up(self.fold, self.ranks, phase.latest)
        return False

    def _announce(self, phase: TeacherTraining) -> None:
        task = phase.task
        length = f"{task.epochs} epochs of {task.iterations} steps, hash {digest(task.identity)}"
        if not phase.learns_pool:
            self._log(f"Phase 3: training goes on with the labelled images alone (teacher.weight 0). {length}")
            return
        groups = ", ".join(f"{len(cases)} {name}" for name, cases in task.groups.items())
        sees = {"counterfactual": f"counterfactuals: {task.source.name}", "intensity": "images with intensity effects",
                "noise": "images with noise"}[phase.settings.strong_view]
        both = ", and on the labelled scanner" if task.weak is not None else ""
        self._log(f"Phase 3: a moving-average teacher labels the pool ({groups}) as it is{both}; the student learns "
                  f"from {sees}. {length}")

    def _log(self, line: str) -> None:
        if self.ranks.is_main:
            self.fold.log(line)


def load_weights(network: nn.Module, file: Path, fix: str) -> None:
    """Load the weights of one of nnU-Net's checkpoints into a network without wrappers.

    Args:
        network: the network.
        file: the checkpoint.
        fix: fix of a file that cannot be used.

    Raises:
        UserError: the file is missing, damaged, or of another network.
    """
    content = read_plain(file, "checkpoint of nnU-Net", fix)
    try:
        network.load_state_dict(content["network_weights"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{file} has no weights of this network ({type(error).__name__}: "
                        f"{str(error).splitlines()[0]})", fix) from error
