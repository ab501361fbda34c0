"""The mixin that puts a pretraining phase in front of any nnU-Net trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2.utilities.helpers import empty_cache

from nnunet_cfcl.config import digest
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.losses import dvd_cl_loss
from nnunet_cfcl.nnunet.decoder_tap import decoder_width, last_decoder_map, plain_network
from nnunet_cfcl.nnunet.pretraining_task import build_task
from nnunet_cfcl.pretraining.checkpoint import load_checkpoint, replace_atomically, write_text
from nnunet_cfcl.pretraining.dual_view import DualViewObjective, Objective
from nnunet_cfcl.pretraining.loop import Pretraining, PretrainingTask
from nnunet_cfcl.trainers.finetuning import FineTuning

NNUNET_CHECKPOINTS = ("checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth")


class CounterfactualPretraining(FineTuning):
    """Phase 1 in front of the training of the nnU-Net trainer that follows it in the list of base classes.

    ``class Mine(CounterfactualPretraining, nnUNetTrainerDA5): pass`` is a whole trainer: `run_training` pretrains
    encoder and decoder by counterfactual contrastive learning (arXiv 2603.17110), leaves its files in ``fold_F/cfcl/``,
    and hands the network to the other base class. A subclass changes the objective by overriding `build_objective`.
    """

    objective_name = "DVD-CL"

    @property
    def pretraining_folder(self) -> Path:
        """Where phase 1 keeps its checkpoints, log and picture."""
        return Path(self.output_folder) / "cfcl" / "pretraining"

    def build_objective(self) -> Objective:
        """Points and loss of the pretraining (method section 4)."""
        chosen = self.settings.pretrain
        loss = partial(dvd_cl_loss, temperature=chosen.temperature)
        return DualViewObjective(lambda a, b, valid: loss(a, b, valid=valid), chosen.points_per_image)

    def run_training(self) -> None:
        """Both phases, from wherever ``--c`` finds them."""
        if not self._holds_checkpoint:
            self._start()
        super().run_training()

    def _start(self) -> None:
        """All that precedes phase 2. Nobody tells a trainer of -pretrained_weights: its network is there already."""
        weights_given = self.was_initialized
        self.pretraining_folder.mkdir(parents=True, exist_ok=True)
        if not self._continues and self.local_rank == 0:
            self._set_aside_old_run()
        self._write_config({})
        if weights_given:
            self.print_to_log_file("Weights were given (-pretrained_weights): no pretraining, only fine-tuning.")
            self._skipped.write_text(json.dumps({"skipped": "weights were given with -pretrained_weights"}))
        else:
            self._check_not_skipped()
            self.initialize()
            if self.settings.pretrain.enabled:
                self._pretrain()
        self._save_start_of_phase_2()

    def _pretrain(self) -> None:
        task = build_task(self, self.settings, self.build_objective(), self.objective_name)
        self._write_config(task.identity)
        final = task.folder / "checkpoint_final.pth"
        if final.exists() and self._reuse(final, task):
            return
        if self.is_ddp:
            raise UserError(
                "pretraining runs on one GPU in this version: use -num_gpus 1 until phase 2 begins, then continue with "
                "--c and any number of GPUs"
            )
        self._announce(task)
        width = decoder_width(self.network)
        with last_decoder_map(self.network) as network:
            Pretraining(network, width, task).run(resume=self._continues)
        empty_cache(self.device)
        self.print_to_log_file(f"Phase 1 done, its weights are in {final}. Phase 2: fine-tuning.")

    def _announce(self, task: PretrainingTask) -> None:
        chosen, count = self.settings.pretrain, self.settings.counterfactual.count
        patches = chosen.epochs * chosen.iterations_per_epoch * chosen.images_per_step * (count + 1)
        supervised = patches / (self.num_iterations_per_epoch * self.configuration_manager.batch_size)
        self.print_to_log_file(
            f"Phase 1: {self.objective_name} pretraining, {chosen.epochs} epochs, {len(task.reader.cases)} cases, "
            f"counterfactuals: {task.source.name}, hash {digest(task.identity)}. It processes as many patches as "
            f"{supervised:.0f} epochs of fine-tuning; pretrain.epochs and pretrain.iterations_per_epoch shorten it."
        )

    def _reuse(self, final: Path, task: PretrainingTask) -> bool:
        """Load a finished pretraining of the same identity; set aside one of another."""
        content = load_checkpoint(final)
        if content["hash"] == digest(task.identity):
            # the checkpoint lacks the last segmentation layer, which was swapped for the tap
            plain_network(self.network).load_state_dict(content["network_weights"], strict=False)
            self.print_to_log_file(f"Phase 1 was finished before with the same settings: reused from {final}")
            return True
        self.print_to_log_file(f"{final} was made with other settings or cases (hash {content['hash']}): set aside.")
        if self.local_rank == 0:
            _set_aside(final)
        return False

    @property
    def _skipped(self) -> Path:
        return self.pretraining_folder / "skipped.json"

    def _check_not_skipped(self) -> None:
        if self._skipped.exists():
            raise UserError(
                f"{self.output_folder} was started with -pretrained_weights and stopped before its first checkpoint, "
                "so there is nothing to continue: start again with -pretrained_weights FILE and without --c"
            )

    def _set_aside_old_run(self) -> None:
        """A new run must not be continued from the checkpoints of an older one."""
        self._skipped.unlink(missing_ok=True)
        for file in (*(Path(self.output_folder) / name for name in NNUNET_CHECKPOINTS), self._latest):
            if file.exists() and not self.disable_checkpointing:
                self.print_to_log_file(f"{file.name} of an earlier run is kept as {_set_aside(file).name}")

    @property
    def _latest(self) -> Path:
        return self.pretraining_folder / "checkpoint_latest.pth"

    def _write_config(self, identity: Mapping[str, Any]) -> None:
        settings = self.settings.to_dict()
        content = {"hash": digest(identity or settings), "settings": settings, "pretraining": dict(identity)}
        text = json.dumps(content, indent=2)
        replace_atomically(self.pretraining_folder.parent / "config.json", lambda file: write_text(file, text))

    def _save_start_of_phase_2(self) -> None:
        """From here on ``--c`` finds phase 2, whose first epoch may take long or be killed."""
        self.current_epoch -= 1  # nnU-Net stores the epoch after the current one
        self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_latest.pth"))
        self.current_epoch += 1


def _set_aside(file: Path) -> Path:
    return file.rename(file.with_name(f"previous_{file.name}"))
