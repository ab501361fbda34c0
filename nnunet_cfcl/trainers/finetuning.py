"""Phase 2: nnU-Net's own training, with settings for pretrained weights, seeds and atomic checkpoints; then phase 3."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_cfcl.config import Settings, resolve_settings
from nnunet_cfcl.errors import UserError, isolated, reason
from nnunet_cfcl.files.atomic import replace_atomically
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.compatibility import asked_to_continue
from nnunet_cfcl.nnunet.decoder_tap import plain_network
from nnunet_cfcl.nnunet.experiment_loggers import put_after_pretraining
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.nnunet.frozen_body import freeze_body
from nnunet_cfcl.nnunet.live_training import LiveTraining
from nnunet_cfcl.nnunet.plan import settings_block
from nnunet_cfcl.nnunet.warmup import WarmUp
from nnunet_cfcl.phases.config_file import write_config
from nnunet_cfcl.phases.earlier_files import back_up
from nnunet_cfcl.phases.replacements import with_replacements
from nnunet_cfcl.phases.teacher_phase import END_OF_PHASE_2, TeacherPhase, load_weights
from nnunet_cfcl.runs.checkpoint import check_checkpoint
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.runs.seeds import seed_everything
from nnunet_cfcl.runs.watchdog import beat, watched

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as Trainer
else:
    # a mixin: any nnU-Net trainer follows it in the list of base classes
    Trainer = object


#: nnU-Net's checkpoints, and that of phase 2 where phase 3 follows; a run is continued from the first.
CHECKPOINTS = ("checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth", END_OF_PHASE_2)


class FineTuning(Trainer):
    """Mixin that resolves the settings, applies their ``finetune`` section to the nnU-Net trainer, and seeds it."""

    #: Whether phase 3 follows, unless the setting ``teacher.enabled`` says otherwise.
    teaches: ClassVar[bool] = False

    # set by the nnU-Net trainer
    num_epochs: int
    num_iterations_per_epoch: int
    num_val_iterations_per_epoch: int
    initial_lr: float
    my_init_kwargs: dict[str, Any]

    def __init__(
        self,
        plans: dict[str, Any],
        configuration: str,
        fold: int | str,
        dataset_json: dict[str, Any],
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net reads this signature
    ) -> None:
        self._continues = asked_to_continue(plans)
        self._holds_checkpoint = False
        self._watch: ExitStack | None = None
        self._teacher: TeacherPhase | None = None
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings: Settings = self.prepared_settings(self.configuration_manager)
        self._apply_finetune_settings()
        self._sign_checkpoints()
        put_after_pretraining(self, self.epochs_before)

    @property
    def epochs_before(self) -> int:
        """Number of pretraining epochs before nnU-Net's training."""
        return 0

    @property
    def pretrains_body_alone(self) -> bool:
        """Whether exactly the weights outside the segmentation layers are pretrained."""
        return False

    @classmethod
    def wants_teacher(cls, settings: Settings) -> bool:
        """Whether phase 3 follows: ``teacher.enabled``; null: as the class ``teaches``, or if weights to start from are
        given."""
        chosen = settings.teacher
        return cls.teaches or bool(chosen.start_from) if chosen.enabled is None else chosen.enabled

    @classmethod
    def prepared_settings(cls, configuration: ConfigurationManager) -> Settings:
        """Resolve the settings for a configuration of the plan."""
        return resolve_settings(settings_block(configuration))

    def _apply_finetune_settings(self) -> None:
        chosen = self.settings.finetune
        self.num_epochs = chosen.epochs or self.num_epochs
        self.num_iterations_per_epoch = chosen.iterations_per_epoch or self.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = chosen.val_iterations_per_epoch or self.num_val_iterations_per_epoch
        if chosen.initial_lr is not None:
            self.initial_lr = chosen.initial_lr
        self.save_every = 1

    def run_training(self) -> None:
        """Run nnU-Net's training, preceded by the earlier phases unless a checkpoint was loaded.

        Its epochs are watched, see `runs.watchdog.watched`.

        Raises:
            UserError: see `TeacherPhase.planned`, before any phase begins.
        """
        if self.wants_teacher(self.settings):
            self._teacher = TeacherPhase.planned(FoldContext.of(self), Ranks.current())
        if not self._holds_checkpoint:
            if self._teacher and self.settings.teacher.start_from:
                self._start_from(Path(self.settings.teacher.start_from))
            else:
                self._start()
        with ExitStack() as watch:
            self._watch = watch
            try:
                super().run_training()
            finally:
                self._watch = None

    def _start(self) -> None:
        self._back_up_earlier()
        if self.local_rank == 0:
            write_config(FoldContext.of(self), "none")

    def _start_from(self, file: Path) -> None:
        """Begin with phase 3, from the weights of a finished training."""
        if self.was_initialized:
            raise UserError("weights were given twice, by -pretrained_weights and by teacher.start_from",
                            "leave one of them out")
        self.initialize()
        load_weights(plain_network(self.network), file, "correct teacher.start_from, or leave it out")
        self._back_up_earlier()
        if self.local_rank == 0:
            write_config(FoldContext.of(self), "none")
        self.print_to_log_file(f"Phases 0 to 2 are left out: phase 3 begins with the weights in {file}.")
        self.current_epoch = self.num_epochs
        self._save(CHECKPOINTS[0])

    @property
    def files_of_a_run(self) -> list[Path]:
        """Files by which a run is continued."""
        folder = Path(self.output_folder)
        return [*(folder / name for name in CHECKPOINTS), *(folder / "cfcl" / "teacher" / name for name in CHECKPOINTS)]

    def _back_up_earlier(self) -> None:
        """Back up the files of an earlier run, which a new run must not continue."""
        if not self._continues:
            back_up(FoldContext.of(self), Ranks.current(), *self.files_of_a_run)

    def _save(self, name: str) -> None:
        """Write a checkpoint of nnU-Net with the present epoch as the next one."""
        self.current_epoch -= 1  # nnU-Net adds 1
        self.save_checkpoint(str(Path(self.output_folder) / name))
        self.current_epoch += 1

    @property
    def _writes_files(self) -> bool:
        return bool(self.local_rank == 0 and not self.disable_checkpointing)

    def initialize(self) -> None:
        """Seed, then initialise as nnU-Net does: trainers with the same seed start from the same weights."""
        self._seed()
        super().initialize()

    def on_train_start(self) -> None:
        """Seed again after initialisation, so that trainers with and without pretraining continue alike."""
        if not self.was_initialized:
            self.initialize()
        self._first_epoch = self.current_epoch
        self._seed(1 + self.current_epoch, self.local_rank)
        super().on_train_start()

    def on_epoch_start(self) -> None:
        """Seed by the epoch, so that a continued run draws what an uninterrupted one would.

        With ``nnUNet_n_proc_DA=0`` the fine-tuning is reproducible; nnU-Net's worker processes draw their augmentations
        unseeded.
        """
        # only epochs: before and after them nnU-Net may be silent for long, and a test may start an epoch alone
        if self._watch is not None:
            self._watch.enter_context(watched(f"fine-tuning epoch {self.current_epoch}", self.print_to_log_file))
        self._seed(1 + self.current_epoch, self.local_rank)
        super().on_epoch_start()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run nnU-Net's step and report progress to the watchdog."""
        beat()
        outputs: dict[str, Any] = super().train_step(batch)
        return outputs

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run nnU-Net's step and report progress to the watchdog."""
        beat()
        outputs: dict[str, Any] = super().validation_step(batch)
        return outputs

    def on_epoch_end(self) -> None:
        """End nnU-Net's epoch, which writes the checkpoint, and stop watching."""
        super().on_epoch_end()
        if self._watch is not None:
            self._watch.close()

    def on_train_end(self) -> None:
        """Run phase 3, end nnU-Net's training, then fit the colour space of CHRO-maps, whose failure is only logged."""
        if self._teacher is not None:
            self._save_end_of_phase_2()
            self._teacher.run(LiveTraining.of(self))
            empty_cache(self.device)
        super().on_train_end()
        if not self.settings.chromap.fit or self.local_rank != 0 or self.disable_checkpointing:
            return
        with isolated() as errors:
            # imported late: nnU-Net imports this module whenever it looks up a trainer
            from nnunet_cfcl.chromap.nnunet.spaces import fit_after_training

            file = fit_after_training(FoldContext.of(self), self.network)
            self.print_to_log_file(f"Colour space of CHRO-maps: {file}")
        for error in errors:  # the model is trained, whatever fails here
            self.print_to_log_file(f"No colour space of CHRO-maps ({reason(error)}); prediction will fit one "
                                   "to its own images")

    def _save_end_of_phase_2(self) -> None:
        """Keep nnU-Net's checkpoint of phase 2, unless this run begins after it; ``--c`` then continues phase 3.

        Raises:
            UserError: the run was finished, but the weights of phase 2 are gone.
        """
        folder = Path(self.output_folder)
        kept, finished = folder / END_OF_PHASE_2, folder / "cfcl" / "teacher" / "checkpoint_final.pth"
        if self._first_epoch < self.num_epochs or not kept.exists():
            if self._first_epoch >= self.num_epochs and finished.exists():
                raise UserError(f"{kept} is missing, which the finished phase 3 began with",
                                f"copy it back; `nnUNetv2_train ... --val` validates without it; or delete {finished}, "
                                "and phase 3 begins with the weights of checkpoint_final.pth")
            self._save(END_OF_PHASE_2)
            self._save(CHECKPOINTS[0])
        Ranks.current().wait()

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """Build nnU-Net's datasets, with counterfactuals among the training images, see `with_replacements`."""
        training, validation = super().get_tr_and_val_datasets()
        return with_replacements(FoldContext.of(self), training, Ranks.current()), validation

    def configure_optimizers(self, *arguments: Any, **named: Any) -> tuple[torch.optim.Optimizer, Any]:
        """Configure as the nnU-Net trainer does, with a linear warm-up and optionally frozen pretrained weights."""
        optimizer, schedule = super().configure_optimizers(*arguments, **named)
        if not isinstance(schedule, WarmUp):
            schedule = WarmUp(schedule, optimizer, self.num_epochs, self.settings.finetune.warmup_fraction)
            epochs = round(self.settings.finetune.frozen_fraction * self.num_epochs)
            if self.pretrains_body_alone and self.current_epoch < epochs:
                freeze_body(optimizer, self.network, lambda: self.current_epoch < epochs)
                self.print_to_log_file(f"In the first {epochs} epochs of phase 2 only the segmentation layers are "
                                       "trained (finetune.frozen_fraction).")
        return optimizer, schedule

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, Any, Any, Any]:
        """Configure as nnU-Net does, with ``finetune.rotation_deg`` and ``mirror_axes`` (also for prediction)."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        chosen = self.settings.finetune
        patch_size = self.configuration_manager.patch_size
        if chosen.rotation_deg is not None:
            angle = float(np.deg2rad(chosen.rotation_deg))
            rotation = (-angle, angle)
            # nnU-Net's formula: the crop that contains the rotated, scaled patch
            initial_patch_size = get_patch_size(patch_size, rotation, rotation, rotation, (0.85, 1.25))
            if dummy_2d:
                initial_patch_size[0] = patch_size[0]
        if chosen.mirror_axes is not None:
            dim = len(patch_size)
            # nnU-Net's prediction takes None for no mirroring and fails on an empty tuple
            mirror_axes = tuple(axis for axis in chosen.mirror_axes if axis < dim) or None
            self.inference_allowed_mirroring_axes = mirror_axes
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def save_checkpoint(self, filename: str) -> None:
        """Save to a temporary file, then rename it, so that a kill while writing loses nothing."""
        if self.local_rank == 0:  # other ranks write nothing and must not rename this file
            save = super().save_checkpoint
            replace_atomically(filename, lambda temporary: save(str(temporary)))

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """Load nnU-Net's checkpoint after verifying it; `run_training` then continues phase 2.

        Raises:
            UserError: the file is damaged.
        """
        if not isinstance(filename_or_checkpoint, dict):
            fix = "delete it, and --c goes on from checkpoint_best.pth, if there is one"
            check_checkpoint(filename_or_checkpoint, fix)
        super().load_checkpoint(filename_or_checkpoint)
        self._holds_checkpoint = True
        before = self.my_init_kwargs.get("cfcl", {}).get("settings", {})
        self._sign_checkpoints()
        if before != self.settings.to_dict():
            self.print_to_log_file("The settings differ from those at the start of this run; the new ones apply.")

    def _sign_checkpoints(self) -> None:
        # init_args is the only part of nnU-Net's checkpoint that can be extended without writing the file twice
        settings = self.settings.to_dict()
        signature = {"settings": settings, "settings_hash": digest(settings)}
        self.my_init_kwargs = {**self.my_init_kwargs, "cfcl": signature}

    def _seed(self, *part: int) -> None:
        seed_everything(self.settings.seed, *part)
