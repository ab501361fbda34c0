"""The mixin that puts a pretraining phase in front of any nnU-Net trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_cfcl.config import Settings
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.atomic import write_text_atomically
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.phases.pretraining_phase import PretrainingPhase
from nnunet_cfcl.pretraining import methods
from nnunet_cfcl.pretraining.methods import Method
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.trainers.finetuning import FineTuning


class CounterfactualPretraining(FineTuning):
    """Mixin that pretrains the network (phase 1) before the nnU-Net trainer beside it trains (phase 2).

    ``class Mine(CounterfactualPretraining, nnUNetTrainerDA5): pass`` is a complete trainer: `run_training` pretrains
    encoder and decoder by counterfactual contrastive learning (arXiv 2603.17110), writes to ``fold_F/cfcl/``, and
    passes the network on to the other base class. A subclass sets another ``method``.
    """

    method: ClassVar[Method] = methods.DVD_CL

    @classmethod
    def prepared_settings(cls, configuration: ConfigurationManager) -> Settings:
        """Resolve the settings, with the preset of the method's views."""
        return cls.method.adapt(super().prepared_settings(configuration))

    @property
    def epochs_before(self) -> int:
        """Number of pretraining epochs."""
        return self.settings.pretrain.epochs if self.settings.pretrain.enabled else 0

    @property
    def pretrains_body_alone(self) -> bool:
        """False if the segmentation layers are pretrained too, or nothing is."""
        return self.settings.pretrain.enabled and self.method.tap != "segmentation"

    @property
    def pretraining_folder(self) -> Path:
        """Folder of the pretraining's checkpoints, log and figures, unless all folds share one pretraining."""
        return Path(self.output_folder) / "cfcl" / "pretraining"

    def _start(self) -> None:
        """Run phase 1, or continue it with ``--c``. A network that exists already means -pretrained_weights, of which
        nnU-Net does not inform the trainer."""
        phase = PretrainingPhase(FoldContext.of(self), self.method, self._continues, Ranks.current())
        if self.was_initialized:
            self.print_to_log_file("Weights were given (-pretrained_weights): no pretraining, only fine-tuning.")
            self._back_up_earlier()
            phase.write_config({})
            if self._writes_files:
                self._skipped.parent.mkdir(parents=True, exist_ok=True)
                write_text_atomically(self._skipped, json.dumps({"skipped": "given with -pretrained_weights"}))
        else:
            if self._continues:
                self._check_not_skipped()
            self.initialize()
            self._pretrain(phase)
        self._save("checkpoint_latest.pth")  # before the first epoch, so that --c continues phase 2 from here on

    def _pretrain(self, phase: PretrainingPhase) -> None:
        if not self.settings.pretrain.enabled:
            self._back_up_earlier()
            phase.write_config({})
            return
        folder = phase.run(self.network, before=self._back_up_earlier)
        empty_cache(self.device)
        self.print_to_log_file(f"Phase 1 done, its files are in {folder}. Phase 2: fine-tuning.")

    @property
    def files_of_a_run(self) -> list[Path]:
        """Files by which a run is continued."""
        return [self._skipped, *super().files_of_a_run]

    @property
    def _skipped(self) -> Path:
        return self.pretraining_folder / "skipped.json"

    def _check_not_skipped(self) -> None:
        if self._skipped.exists():
            raise UserError(
                f"{self.output_folder} was started with -pretrained_weights and stopped before its first checkpoint, "
                "so there is nothing to continue", "start again with -pretrained_weights FILE and without --c"
            )


class CounterfactualTeacher(FineTuning):
    """Mixin that lets phase 3 follow the nnU-Net trainer beside it: a teacher labels the pool (method section 8).

    ``class Mine(CounterfactualTeacher, nnUNetTrainerDA5): pass`` is a complete trainer without pretraining;
    ``class Mine(CounterfactualTeacher, CounterfactualPretraining, nnUNetTrainerDA5)`` one with it. Without a pool phase
    3 is skipped.
    """

    teaches = True
