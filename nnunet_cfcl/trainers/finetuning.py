"""Phase 2: nnU-Net's own training, with settings suited to pretrained weights and checkpoints that survive a kill."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_cfcl.config import Settings, resolve_settings
from nnunet_cfcl.errors import reason
from nnunet_cfcl.files.atomic import replace_atomically
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.experiment_loggers import put_after_pretraining
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.nnunet.frozen_body import freeze_body
from nnunet_cfcl.nnunet.plan import settings_block
from nnunet_cfcl.nnunet.versions import asked_to_continue
from nnunet_cfcl.nnunet.warmup import WarmUp
from nnunet_cfcl.phases.config_file import write_config
from nnunet_cfcl.phases.replacements import with_replacements
from nnunet_cfcl.runs.checkpoint import check_checkpoint
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.runs.seeds import seed_everything
from nnunet_cfcl.runs.watchdog import beat, show_stack_on_signal, watched

if TYPE_CHECKING:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer as Trainer
else:
    # a mixin: the nnU-Net trainer comes after it in the list of base classes, whichever it is
    Trainer = object


class FineTuning(Trainer):
    """Mixin: reads the settings, applies the ``finetune`` section to the nnU-Net trainer beside it, seeds it."""

    # nnU-Net's, set by the trainer underneath
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
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.settings: Settings = self.prepared_settings(self.configuration_manager)
        self._apply_finetune_settings()
        self._sign_checkpoints()
        put_after_pretraining(self, self.epochs_before)

    @property
    def epochs_before(self) -> int:
        """Epochs of a pretraining that precede nnU-Net's."""
        return 0

    @property
    def pretrains_body_alone(self) -> bool:
        """Whether all weights but those of the segmentation layers come from a pretraining."""
        return False

    @classmethod
    def prepared_settings(cls, configuration: ConfigurationManager) -> Settings:
        """The settings, resolved for a plan's configuration."""
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
        """nnU-Net's, after all that precedes its first epoch, which a checkpoint makes needless. Its epochs are
        watched, see `runs.watchdog.watched`."""
        if not self._holds_checkpoint:
            self._start()
        show_stack_on_signal()  # also of the data loading processes, which nnU-Net forks before its first epoch
        with ExitStack() as watch:
            self._watch = watch
            try:
                super().run_training()
            finally:
                self._watch = None

    def _start(self) -> None:
        if self.local_rank == 0:
            write_config(FoldContext.of(self), "none")

    def initialize(self) -> None:
        """nnU-Net's, from the settings' seed: two trainers with the same seed start from the same weights."""
        self._seed()
        super().initialize()

    def on_train_start(self) -> None:
        """nnU-Net's, seeded after the weights are drawn, so that trainers with and without pretraining go on alike."""
        if not self.was_initialized:
            self.initialize()
        self._seed(1 + self.current_epoch, self.local_rank)
        super().on_train_start()

    def on_epoch_start(self) -> None:
        """nnU-Net's, seeded: an epoch's draws do not depend on what was drawn, or stopped, before. With
        ``nnUNet_n_proc_DA=0`` the whole fine-tuning is reproducible, also by a run that was killed and continued, while
        nnU-Net's worker processes draw their augmentations unseeded."""
        # What nnU-Net does before and after its epochs has processes of its own, and may be silent for long; an epoch
        # that somebody else begins may never end.
        if self._watch is not None:
            self._watch.enter_context(watched(f"fine-tuning epoch {self.current_epoch}", self.print_to_log_file))
        self._seed(1 + self.current_epoch, self.local_rank)
        super().on_epoch_start()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's, which is progress."""
        beat()
        outputs: dict[str, Any] = super().train_step(batch)
        return outputs

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """nnU-Net's, which is progress."""
        beat()
        outputs: dict[str, Any] = super().validation_step(batch)
        return outputs

    def on_epoch_end(self) -> None:
        """nnU-Net's, with the checkpoint; then the epoch is over."""
        super().on_epoch_end()
        if self._watch is not None:
            self._watch.close()

    def on_train_end(self) -> None:
        """nnU-Net's; then the colour space of CHRO-maps is fitted, which must not cost a finished training."""
        super().on_train_end()
        if not self.settings.chromap.fit or self.local_rank != 0 or self.disable_checkpointing:
            return
        try:
            # not before it is needed: nnU-Net imports this module whenever it looks a trainer up
            from nnunet_cfcl.chromap.nnunet.spaces import fit_after_training

            file = fit_after_training(FoldContext.of(self), self.network)
            self.print_to_log_file(f"Colour space of CHRO-maps: {file}")
        # whatever it is, the model is trained
        except Exception as error:
            self.print_to_log_file(f"No colour space of CHRO-maps ({reason(error)}); they get one from "
                                   "the images that are predicted")

    def get_tr_and_val_datasets(self) -> tuple[Any, Any]:
        """nnU-Net's, with ``finetune.counterfactual_probability`` and ``finetune.acquisition_probability``."""
        training, validation = super().get_tr_and_val_datasets()
        return with_replacements(FoldContext.of(self), training, Ranks.current()), validation

    def configure_optimizers(self, *arguments: Any, **named: Any) -> tuple[torch.optim.Optimizer, Any]:
        """The nnU-Net trainer's own, with a linear warm-up, in which pretrained weights may stay frozen for a while."""
        optimizer, schedule = super().configure_optimizers(*arguments, **named)
        if not isinstance(schedule, WarmUp):
            schedule = WarmUp(schedule, optimizer, self.num_epochs, self.settings.finetune.warmup_fraction)
            epochs = round(self.settings.finetune.frozen_fraction * self.num_epochs)
            if self.pretrains_body_alone and epochs:
                freeze_body(optimizer, self.network, lambda: self.current_epoch < epochs)
                self.print_to_log_file(f"In the first {epochs} epochs of phase 2 the segmentation layers alone learn "
                                       "(finetune.frozen_fraction).")
        return optimizer, schedule

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, Any, Any, Any]:
        """nnU-Net's, with ``finetune.rotation_deg`` and ``finetune.mirror_axes`` (also for prediction)."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        chosen = self.settings.finetune
        patch_size = self.configuration_manager.patch_size
        if chosen.rotation_deg is not None:
            angle = float(np.deg2rad(chosen.rotation_deg))
            rotation = (-angle, angle)
            # as nnU-Net computes it for its own angles: the crop that still holds the rotated, scaled patch
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
        """nnU-Net's, to a temporary file that is then renamed: a kill while writing loses nothing."""
        if self.local_rank == 0:  # the others of several GPUs write nothing and must not rename what this one writes
            save = super().save_checkpoint
            replace_atomically(filename, lambda temporary: save(str(temporary)))

    def load_checkpoint(self, filename_or_checkpoint: dict[str, Any] | str) -> None:
        """nnU-Net's, of a file that is as it was written; afterwards `run_training` knows that phase 2 has begun.

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
            self.print_to_log_file("The settings differ from those that this run was begun with; the new ones hold.")

    def _sign_checkpoints(self) -> None:
        # init_args is the one part of nnU-Net's checkpoint that a trainer can add to without writing the file twice
        settings = self.settings.to_dict()
        signature = {"settings": settings, "settings_hash": digest(settings)}
        self.my_init_kwargs = {**self.my_init_kwargs, "cfcl": signature}

    def _seed(self, *part: int) -> None:
        seed_everything(self.settings.seed, *part)
