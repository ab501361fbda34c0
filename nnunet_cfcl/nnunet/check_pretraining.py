"""The doctor's checks of what the pretraining refuses, by the pretraining's own functions and in their words."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_cfcl import trainers
from nnunet_cfcl.config import CONFIG_VARIABLE, Settings
from nnunet_cfcl.counterfactual.choice import choose_source
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet import check_dataset, check_environment
from nnunet_cfcl.nnunet.cases import PreprocessedCases
from nnunet_cfcl.nnunet.decoder_tap import decoder_width
from nnunet_cfcl.nnunet.finding import CheckFailed, Finding
from nnunet_cfcl.nnunet.installation import plugin_trainers
from nnunet_cfcl.nnunet.plan import check_single_stage, view_geometry
from nnunet_cfcl.pretraining.gradient_cache import check_norms
from nnunet_cfcl.views import check_patch


def pretraining_trainer(name: str) -> type[nnUNetTrainer] | None:
    """The trainer's class if it has our pretraining phase; None also if there is none, which `check_trainer` reports.

    The package's own trainers are known even while nnU-Net does not find them.
    """
    if name in plugin_trainers():
        return getattr(trainers, name)
    try:
        found = check_environment.look_up_trainer(name)
    except Exception:  # whatever breaks the look-up is a finding of `check_trainer` already
        return None
    return found if found is not None and issubclass(found, trainers.CounterfactualPretraining) else None


@dataclass(frozen=True)
class PlannedPretraining:
    """What is to be pretrained.

    Args:
        trainer: a trainer with the pretraining phase.
        settings: the resolved settings.
        dataset: full name of the dataset.
        plan: content of the plans file.
        plans: its identifier.
        configuration: name of one of its configurations.
    """

    trainer: type[nnUNetTrainer]
    settings: Settings
    dataset: str
    plan: dict[str, Any]
    plans: str
    configuration: str

    def findings(self) -> Iterator[Finding]:
        """Stage, patch, network and counterfactuals, as `CounterfactualPretraining` would refuse them."""
        if not self.settings.pretrain.enabled:
            yield Finding("ok", "no pretraining (pretrain.enabled is false)")
            return
        manager = PlansManager(self.plan).get_configuration(self.configuration)
        yield _checked(lambda: check_single_stage(self.configuration, manager), "no previous stage needed",
                       f"-c {manager.previous_stage_name}, or -tr nnUNetTrainer for this stage")
        yield _checked(lambda: check_patch(view_geometry(manager), self.settings.views), "the views fit the patch",
                       f"set views.crop_fraction in {_settings_file()}, or another patch_size in {self.plans}.json")
        yield from self._network_findings(manager.batch_size)
        yield from self._counterfactual_findings(manager.configuration)

    def _network_findings(self, batch_size: int) -> Iterator[Finding]:
        try:
            network = self._network()
        # other people's networks may compute with real numbers when built, which says nothing about the training
        except Exception as error:
            yield Finding("warn", "decoder and norms not checked, the network could not be built on the meta device "
                                  f"({check_environment.first_line(error)})")
            return
        is_the_plans = self.trainer.build_network_architecture is nnUNetTrainer.build_network_architecture
        plan_again = check_dataset.plan_command(self.dataset, self.configuration, "nnUNetPlans")
        yield _checked(lambda: decoder_width(network), f"{type(network).__name__} has the decoder to be pretrained",
                       f"{plan_again}, then -p nnUNetPlans" if is_the_plans
                       else "derive the trainer from one that builds the plan's own network")
        chosen, views = self.settings.pretrain, self.settings.counterfactual.count + 1
        patches, per_pass = chosen.images_per_step * views, chosen.patches_per_pass or batch_size
        yield _checked(lambda: check_norms(network) if patches > per_pass else None,
                       f"{patches} patches per step of pretraining, at most {per_pass} per pass",
                       f"plan with InstanceNorm, or set pretrain.patches_per_pass to {patches} in {_settings_file()}")

    def _network(self) -> nn.Module:
        # some trainers change the plan they are given
        manager = PlansManager(copy.deepcopy(self.plan))
        channels = check_dataset.network_channels(self.dataset, self.plan, self.configuration)
        with torch.device("meta"):
            return self.trainer.build_network_architecture(
                manager, manager.get_configuration(self.configuration), *channels)

    def _counterfactual_findings(self, block: dict[str, Any]) -> Iterator[Finding]:
        folder = check_dataset.preprocessed_folder(self.dataset, block)
        try:
            known = check_dataset.preprocessed_cases(folder, "")
        except CheckFailed:
            return  # a finding of `check_preprocessed` already

        def check(cases: set[str]) -> Finding:
            reader = PreprocessedCases(str(folder), sorted(cases))
            schemes, dim = block["normalization_schemes"], len(block["patch_size"])
            return _checked(lambda: choose_source(self.settings, reader, str(folder), schemes, dim),
                            "counterfactuals for all cases", mend)

        mend = (f"nnunet_cfcl counterfactuals import -d {int(self.dataset[7:10])} -c {self.configuration} "
                f"-p {self.plans} -i IMAGES, or set counterfactual.source to acquisition in {_settings_file()}")
        finding = check(known)
        # a training needs the counterfactuals of its fold's training cases only
        folds = _training_cases(folder.parent / "splits_final.json") if finding.status == "FAIL" else []
        served = [str(fold) for fold, cases in enumerate(folds)
                  if cases & known and check(cases & known).status == "ok"]
        if served:
            finding = Finding("warn", f"only fold {', '.join(served)} can be pretrained: {finding.what}", mend)
        yield finding


def _checked(check: Callable[[], object], ok: str, mend: str) -> Finding:
    try:
        check()
    except UserError as error:
        return Finding("FAIL", str(error), mend)
    return Finding("ok", ok)


def _settings_file() -> str:
    return os.environ.get(CONFIG_VARIABLE) or f"a JSON file named by {CONFIG_VARIABLE}"


def _training_cases(splits: Path) -> list[set[str]]:
    """The training cases of each fold; none if there is no sound file, of which `check_preprocessed` speaks."""
    try:
        return [set(map(str, split["train"])) for split in json.loads(splits.read_text())]
    except (OSError, ValueError, KeyError, TypeError):
        return []
