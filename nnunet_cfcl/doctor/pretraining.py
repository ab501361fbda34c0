"""The doctor's checks of what the pretraining refuses, by the pretraining's own functions and in their words."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_cfcl.config import CONFIG_VARIABLE, Settings
from nnunet_cfcl.counterfactual.choice import choose_source, wants_generator
from nnunet_cfcl.data.attribute_table import ATTRIBUTES
from nnunet_cfcl.data.pool.manifest import pool_command, read_manifest, silver_folder
from nnunet_cfcl.data.pool.sources import SILVER_LABELS
from nnunet_cfcl.data.pretraining_cases import PretrainingCases, pretraining_cases
from nnunet_cfcl.errors import CheckResult, UserError, first_line
from nnunet_cfcl.files.json_files import read_json
from nnunet_cfcl.nnunet import check_dataset
from nnunet_cfcl.nnunet.decoder_tap import decoder_width
from nnunet_cfcl.nnunet.plan import check_single_stage, view_geometry
from nnunet_cfcl.nnunet.versions import build_network
from nnunet_cfcl.phases.attributes_of_cases import (
    KnownAttributes,
    NothingToChange,
    coding_and_interventions,
    known_attributes,
)
from nnunet_cfcl.pretraining.gradient_cache import check_norms
from nnunet_cfcl.pretraining.methods import MethodContext
from nnunet_cfcl.pretraining.objective import Objective
from nnunet_cfcl.views import check_patch


@dataclass(frozen=True)
class PlannedPretraining:
    """What is to be pretrained.

    Args:
        trainer: a trainer with the pretraining phase.
        settings: the resolved settings, without the preset.
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

    def findings(self) -> Iterator[CheckResult]:
        """Stage, patch, method, network, cases, counterfactuals, as `CounterfactualPretraining` would refuse them."""
        if not self.settings.pretrain.enabled:
            yield CheckResult("ok", "no pretraining (pretrain.enabled is false)")
            return
        manager = PlansManager(self.plan).get_configuration(self.configuration)
        yield _checked(lambda: check_single_stage(self.configuration, manager), "no previous stage needed",
                       f"-c {manager.previous_stage_name}, or set pretrain.enabled to false for this stage in "
                       f"{_settings_file()}")
        views = self.trainer.method.adapt(self.settings).views
        yield _checked(lambda: check_patch(view_geometry(manager), views), "the views fit the patch",
                       f"set views.crop_fraction in {_settings_file()}, or another patch_size in {self.plans}.json")
        yield _checked(lambda: self._objective(manager), f"method {self.trainer.method.name}",
                       f"change the setting in {_settings_file()}")
        yield from self._network_findings(manager.batch_size)
        yield from self._data_findings(check_dataset.preprocessed_folder(self.dataset, manager.configuration))

    def _objective(self, manager: ConfigurationManager) -> Objective:
        context = MethodContext(self.trainer.method.adapt(self.settings), view_geometry(manager),
                                len(manager.normalization_schemes), None, lambda: _untrained)
        objective: Objective = self.trainer.method.build(context)
        return objective

    def _network_findings(self, batch_size: int) -> Iterator[CheckResult]:
        try:
            network = self._network()
        # other people's networks may compute with real numbers when built, which says nothing about the training
        except Exception as error:
            yield CheckResult("warn",
                              "decoder and norms not checked, the network could not be built on the meta device "
                                  f"({first_line(error)})")
            return
        is_the_plans = self.trainer.build_network_architecture is nnUNetTrainer.build_network_architecture
        plan_again = check_dataset.plan_command(self.dataset, self.configuration, "nnUNetPlans")
        yield _checked(lambda: decoder_width(network), f"{type(network).__name__} has the decoder to be pretrained",
                       f"{plan_again}, then -p nnUNetPlans" if is_the_plans
                       else "derive the trainer from one that builds the plan's own network")
        chosen, views = self.settings.pretrain, self.settings.counterfactual.count + 1
        patches, per_pass = chosen.images_per_step * views, chosen.patches_per_pass or batch_size
        cached = patches > per_pass and not self.trainer.method.separable
        yield _checked(lambda: check_norms(network) if cached else None,
                       f"{patches} patches per step of pretraining, at most {per_pass} per pass",
                       f"plan with InstanceNorm, or set pretrain.patches_per_pass to {patches} in {_settings_file()}")

    def _network(self) -> nn.Module:
        # some trainers change the plan they are given
        manager = PlansManager(copy.deepcopy(self.plan))
        channels = check_dataset.network_channels(self.dataset, self.plan, self.configuration)
        with torch.device("meta"):
            network: nn.Module = build_network(
                self.trainer, manager, manager.get_configuration(self.configuration), *channels, deep_supervision=True)
        return network

    def _data_findings(self, folder: Path) -> Iterator[CheckResult]:
        """Of the cases and counterfactuals of fold "all"; where these fail, whether single folds can be pretrained."""
        try:
            known = check_dataset.preprocessed_cases(folder, "")
        except UserError:
            return  # a finding of `check_preprocessed` already
        found = list(self._fold_findings(folder, "all", known, known))
        failed = [finding for finding in found if finding.status == "FAIL"]
        # with the pool alone the fold makes no difference
        folds = _splits(folder.parent / "splits_final.json") if failed and self.settings.pretrain.data != "pool" else []
        served = [str(fold) for fold, (training, validation) in enumerate(folds) if training & known and all(
            finding.status != "FAIL"
            for finding in self._fold_findings(folder, fold, training & known, validation & known))]
        for finding in found:
            yield finding if finding.status != "FAIL" or not served else CheckResult(
                "warn", f"only fold {', '.join(served)} can be pretrained: {finding.message}", finding.fix)

    def _fold_findings(
        self, folder: Path, fold: int | str, training: Iterable[str], validation: Iterable[str]
    ) -> Iterator[CheckResult]:
        description = json.loads((folder.parent / "dataset.json").read_text())
        asked = _Fold(str(folder), self.configuration, PlansManager(self.plan), description, fold, sorted(training),
                      sorted(validation))
        needs_labels, method = self.trainer.method.needs_labels, self.trainer.method
        try:
            cases = pretraining_cases(asked, self.settings, needs_labels, unpack=False)
        except UserError as error:
            yield CheckResult.of(error)
            return
        yield CheckResult("ok", f"fold {fold}: {'; '.join(asked.log)}")
        if needs_labels:
            yield from self._silver_findings(folder)
        if method.counterfactuals:
            yield self._counterfactual_finding(asked, cases, folder)

    def _counterfactual_finding(self, asked: _Fold, cases: PretrainingCases, folder: Path) -> CheckResult:
        """Of the table of attributes where a generator is to be trained on it, else of the source that is chosen."""
        try:
            known = known_attributes(folder.parent)
            if wants_generator(self.settings, str(folder), known is not None and bool(known.columns)):
                return self._attributes_finding(known, asked, cases)
        except UserError as error:
            return CheckResult("FAIL", error.message, error.fix or f"correct {ATTRIBUTES}")
        block = asked.plans_manager.get_configuration(self.configuration)
        return _checked(
            lambda: choose_source(self.settings, cases, str(folder), block.normalization_schemes,
                                  len(block.patch_size)),
            "counterfactuals for all cases",
            f"nnunet_cfcl counterfactuals import -d {int(self.dataset[7:10])} -c {self.configuration} "
            f"-p {self.plans} -i IMAGES, or set counterfactual.source to acquisition in {_settings_file()}")

    def _attributes_finding(self, known: KnownAttributes | None, asked: _Fold, cases: PretrainingCases) -> CheckResult:
        wanted = self.settings.counterfactual
        if known is None:
            return CheckResult("FAIL", f"counterfactual.source is 'generator', but nnUNet_raw/{self.dataset} has no "
                           f"{ATTRIBUTES}", f"nnunet_cfcl attributes discover -d {self.dataset}, or write it by hand")
        try:
            coding, interventions = coding_and_interventions(
                known, cases.cases, cases.known, asked.dataset_json["file_ending"], wanted.interventions,
                asked.log.append)
        except NothingToChange as reason:
            if wanted.source == "generator":
                raise
            return CheckResult("warn", f"no generator will be trained, acquisition is used: {reason.message}",
                               reason.fix or f"correct {ATTRIBUTES}")
        said = ", ".join(f"{one.name} ({one.kind})" for one in coding.attributes)
        return CheckResult("ok", f"a generator of counterfactuals will be trained on {said}; interventions: "
                       f"{', '.join(one.name for one in interventions)}")

    def _silver_findings(self, folder: Path) -> Iterator[CheckResult]:
        """The training takes manual labels where silver ones are missing; whoever asked for these may want to know."""
        wanted = self.settings.silver
        if self.settings.pretrain.data == "pool" or wanted.training_cases == "manual":
            return
        manifest = read_manifest(silver_folder(folder))
        if not manifest or not manifest.with_silver(wanted.min_quality):
            yield CheckResult(
                "warn", "silver.training_cases is 'silver', but no training case has a silver label to use: the manual "
                        "ones are used",
                f"put label maps of training cases into nnUNet_raw/{self.dataset}/{SILVER_LABELS} and run "
                f"{pool_command(self.dataset, self.configuration, self.plans)}")


@dataclass(frozen=True)
class _Fold:
    """What `pretraining_cases` reads of a trainer, for a fold whose cases are given."""

    preprocessed_dataset_folder: str
    configuration_name: str
    plans_manager: PlansManager
    dataset_json: dict[str, Any]
    fold: int | str
    training: list[str]
    validation: list[str]
    log: list[str] = field(default_factory=list)

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's own writes a file where there is none."""
        return self.training, self.validation

    def print_to_log_file(self, line: str) -> None:
        """Kept for the finding."""
        self.log.append(line)


def _untrained(logits: Any, labels: Tensor) -> Tensor:
    raise NotImplementedError("the doctor trains nothing")


def _checked(check: Callable[[], object], ok: str, fix: str) -> CheckResult:
    try:
        check()
    except UserError as error:
        return CheckResult("FAIL", str(error), fix)
    return CheckResult("ok", ok)


def _settings_file() -> str:
    return os.environ.get(CONFIG_VARIABLE) or f"a JSON file named by {CONFIG_VARIABLE}"


def _splits(file: Path) -> list[tuple[set[str], set[str]]]:
    """Training and validation cases of each fold; none if there is no sound file, of which `check_preprocessed` speaks.
    """
    try:
        return [(set(map(str, split["train"])), set(map(str, split["val"]))) for split in read_json(file)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
