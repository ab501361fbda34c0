"""The pretraining phase (phase 1) of a fold: reuse a finished pretraining, continue one, or start anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nnunet_cfcl.errors import UserError, listed
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.decoder_tap import tapped
from nnunet_cfcl.nnunet.fold import FoldContext, check_device_type
from nnunet_cfcl.phases.config_file import write_config
from nnunet_cfcl.phases.earlier_files import back_up
from nnunet_cfcl.phases.generator_phase import lazy_generator_source
from nnunet_cfcl.phases.pretraining_task import build_objective, build_task
from nnunet_cfcl.pretraining.loop import Pretraining, check_same_identity
from nnunet_cfcl.pretraining.methods import Method
from nnunet_cfcl.runs.checkpoint import load_body, load_checkpoint
from nnunet_cfcl.runs.lock import exclusive
from nnunet_cfcl.runs.ranks import Ranks


@dataclass(frozen=True)
class PretrainingPhase:
    """The pretraining phase of a fold.

    Args:
        fold: the fold that is trained.
        method: the pretraining method.
        continues: True: continue from ``checkpoint_latest.pth``, an error if it was made with other settings; False:
            start anew; None: continue if it was made with the same settings and cases.
        ranks: the processes that share every step.
    """

    fold: FoldContext
    method: Method
    continues: bool | None
    ranks: Ranks

    def run(self, network: nn.Module, before: Callable[[], None] = lambda: None) -> Path:
        """Pretrain a network, or load the weights of a finished pretraining; returns the folder of its files.

        Args:
            network: the fold's, initialised.
            before: called after all checks, before any file of an earlier run is changed.

        Raises:
            UserError: the configuration, the data or the device cannot be pretrained; the pretraining to continue has
                other settings.
        """
        objective = build_objective(self.fold, self.method)
        lazy = lazy_generator_source(self.fold, self.ranks) if self.method.counterfactuals else None
        with tapped(network, objective.tap) as part:
            task = self.ranks.main_first(lambda: build_task(
                self.fold, self.method, objective, self.ranks, lazy))
            # raises where nothing can be pretrained, before any file of an earlier run is touched
            pretraining = Pretraining(part.network, part.features, part.width, task)
            with exclusive(task.folder, self._log, self.ranks) if self._locks else nullcontext():
                finished = self.ranks.broadcast_object(self._finished(pretraining) if self.ranks.is_main else None)
                resume = finished is None and self._resumes(pretraining)
                before()
                self.write_config(task.identity, task.folder)
                if finished is not None:
                    load_body(part.network, finished, keep_heads=objective.tap != "segmentation")
                    self._log(f"Phase 1 was finished before with the same settings: {pretraining.final} is reused.")
                else:
                    # the generator is trained last: it takes hours, and all checks have passed by now
                    if lazy is not None:
                        lazy.materialise()
                    self._train(pretraining, resume)
        return task.folder

    def write_config(self, identity: Mapping[str, Any], pretraining_folder: Path | None = None) -> None:
        """Write `config.json` on the main rank, see `write_config`."""
        if self.ranks.is_main:
            write_config(self.fold, self.method.name, identity, pretraining_folder)

    def _train(self, pretraining: Pretraining, resume: bool) -> None:
        if not resume:
            back_up(self.fold, self.ranks, pretraining.latest)
        back_up(self.fold, self.ranks, pretraining.final)  # it has other settings, or it would have been reused
        self._announce(pretraining)
        pretraining.run(resume)

    def _finished(self, pretraining: Pretraining) -> dict[str, Any] | None:
        """The weights of a finished pretraining of the same identity, or None."""
        if not pretraining.final.exists():
            return None
        content = _load_pretrained(pretraining.final)
        if content["hash"] != digest(pretraining.task.identity):
            self._log(f"{pretraining.final} has other settings or cases and is not reused.")
            return None
        weights: dict[str, Any] = content["network_weights"]
        return weights

    def _resumes(self, pretraining: Pretraining) -> bool:
        """Whether there is a pretraining to continue; raises where it must not be continued, or cannot run here."""
        check_device_type(self.fold.device)
        found = self.ranks.main_first(lambda: self._can_resume(pretraining) if self.ranks.is_main else False)
        return bool(self.ranks.broadcast_object(found))

    def _can_resume(self, pretraining: Pretraining) -> bool:
        latest, identity = pretraining.latest, pretraining.task.identity
        if self.continues and not self._shared:
            for file in (latest, pretraining.final):
                if file.exists():
                    check_same_identity(_load_pretrained(file)["identity"], identity, file)
        elif self.continues is False and not self._shared:
            return False
        return latest.exists() and bool(_load_pretrained(latest)["hash"] == digest(identity))

    @property
    def _shared(self) -> bool:
        """Whether all folds share the pretraining: the first to come starts it, any of them continues it."""
        return bool(self.fold.settings.pretrain.data == "pool")

    @property
    def _locks(self) -> bool:
        """Whether to wait for the run of another fold; the same on all ranks."""
        return self._shared and self.fold.saves

    def _announce(self, pretraining: Pretraining) -> None:
        task, chosen = pretraining.task, pretraining.settings
        patches = pretraining.total_steps * pretraining.patches_per_step
        supervised = patches / (self.fold.iterations_per_epoch * self.fold.configuration.batch_size)
        self._log(
            f"Phase 1: {self.method.name} pretraining, {chosen.epochs} epochs, {len(task.reader.cases)} cases, "
            f"counterfactuals: {task.source.name}, hash {digest(task.identity)}"
            + (f", {self.ranks.count} processes" if self.ranks.count > 1 else "")
            + f". It processes as many patches as {supervised:.0f} epochs of fine-tuning; shorten it with "
            "pretrain.epochs and pretrain.iterations_per_epoch."
        )

    def _log(self, line: str) -> None:
        if self.ranks.is_main:
            self.fold.log(line)


def _load_pretrained(file: Path) -> dict[str, Any]:
    """Load a checkpoint of phase 1, finished or not.

    Raises:
        UserError: it cannot be read, or is not one of phase 1.
    """
    content = load_checkpoint(file)
    if missing := [key for key in ("hash", "identity", "network_weights") if key not in content]:
        raise UserError(f"{file} is not a checkpoint of phase 1, it lacks {listed(missing)}",
                        "remove it and start the training again")
    return content
