"""The mixin that puts a pretraining phase in front of any nnU-Net trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2.utilities.helpers import empty_cache

from nnunet_cfcl.atomic import write_text_atomically
from nnunet_cfcl.config import digest
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.losses import dvd_cl_loss
from nnunet_cfcl.nnunet.decoder_tap import decoder_width, last_decoder_map
from nnunet_cfcl.nnunet.pretraining_task import build_task
from nnunet_cfcl.pretraining.checkpoint import load_body, load_checkpoint
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
        return DualViewObjective(partial(dvd_cl_loss, temperature=chosen.temperature), chosen.points_per_image)

    def run_training(self) -> None:
        """Both phases, from wherever ``--c`` finds them."""
        if not self._holds_checkpoint:
            self._start()
        super().run_training()

    def _start(self) -> None:
        """All that precedes phase 2. Nobody tells a trainer of -pretrained_weights: its network is there already."""
        if self.was_initialized:
            self.print_to_log_file("Weights were given (-pretrained_weights): no pretraining, only fine-tuning.")
            self._begin({})
            self._write(self._skipped, json.dumps({"skipped": "weights were given with -pretrained_weights"}))
        else:
            if self._continues:
                self._check_not_skipped()
            self.initialize()
            if self.settings.pretrain.enabled:
                self._pretrain()
            else:
                self._begin({})
        self._save_start_of_phase_2()

    def _pretrain(self) -> None:
        task = build_task(self, self.settings, self.build_objective(), self.objective_name)
        width = decoder_width(self.network)
        with last_decoder_map(self.network) as network:
            # refuses what cannot be pretrained, before anything of an earlier run is touched
            pretraining = Pretraining(network, width, task)
            self._begin(task.identity)
            if not self._reuse(pretraining):
                self._check_device()
                self._announce(task)
                pretraining.run(resume=self._continues)
        empty_cache(self.device)
        self.print_to_log_file(f"Phase 1 done, its files are in {self.pretraining_folder}. Phase 2: fine-tuning.")

    def _begin(self, identity: Mapping[str, Any]) -> None:
        """Set an earlier run aside, unless this one continues it, and write down the settings of this one."""
        self.pretraining_folder.mkdir(parents=True, exist_ok=True)
        if not self._continues:
            # a new run must not be continued from the checkpoints of an older one
            self._set_aside(self._skipped, *(Path(self.output_folder) / name for name in NNUNET_CHECKPOINTS))
            self._set_aside(self.pretraining_folder / "checkpoint_latest.pth")
        settings = self.settings.to_dict()
        content = {
            "settings": settings, "settings_hash": digest(settings),
            "pretraining": dict(identity), "pretraining_hash": digest(identity),
        }
        self._write(self.pretraining_folder.parent / "config.json", json.dumps(content, indent=2))

    def _check_device(self) -> None:
        if self.is_ddp:
            raise UserError(
                "pretraining runs on one GPU in this version: use -num_gpus 1 until phase 2 begins, then continue with "
                "--c and any number of GPUs"
            )
        if self.device.type not in ("cpu", "cuda"):
            raise UserError(f"pretraining runs with -device cuda or cpu, found {self.device.type}")

    def _announce(self, task: PretrainingTask) -> None:
        chosen, count = self.settings.pretrain, self.settings.counterfactual.count
        patches = chosen.epochs * chosen.iterations_per_epoch * chosen.images_per_step * (count + 1)
        supervised = patches / (self.num_iterations_per_epoch * self.configuration_manager.batch_size)
        self.print_to_log_file(
            f"Phase 1: {self.objective_name} pretraining, {chosen.epochs} epochs, {len(task.reader.cases)} cases, "
            f"counterfactuals: {task.source.name}, hash {digest(task.identity)}. It processes as many patches as "
            f"{supervised:.0f} epochs of fine-tuning; pretrain.epochs and pretrain.iterations_per_epoch shorten it."
        )

    def _reuse(self, pretraining: Pretraining) -> bool:
        """Load a finished pretraining of the same identity; set aside one of another."""
        if not pretraining.final.exists():
            return False
        content = load_checkpoint(pretraining.final)
        if content["hash"] == digest(pretraining.task.identity):
            load_body(pretraining.network, content["network_weights"])
            self.print_to_log_file(f"Phase 1 was finished before, same settings: {pretraining.final} is reused.")
            return True
        self.print_to_log_file(f"{pretraining.final} was made with other settings or cases: phase 1 starts anew.")
        self._set_aside(pretraining.final)
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

    def _save_start_of_phase_2(self) -> None:
        """From here on ``--c`` finds phase 2, whose first epoch may take long or be killed."""
        self.current_epoch -= 1  # nnU-Net stores the epoch after the current one
        self.save_checkpoint(str(Path(self.output_folder) / "checkpoint_latest.pth"))
        self.current_epoch += 1

    @property
    def _writes_files(self) -> bool:
        return bool(self.local_rank == 0 and not self.disable_checkpointing)

    def _write(self, file: Path, text: str) -> None:
        if self._writes_files:
            write_text_atomically(file, text)

    def _set_aside(self, *files: Path) -> None:
        for file in files:
            if self._writes_files and file.exists():
                kept = file.replace(file.with_name(f"previous_{file.name}"))
                self.print_to_log_file(f"{file.name} of an earlier run is kept as {kept.name}")
