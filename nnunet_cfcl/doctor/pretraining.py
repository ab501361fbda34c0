"""The doctor's checks of the planned pretraining, by the functions that the pretraining itself calls."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunet_cfcl.config import CONFIG_VARIABLE, Settings
from nnunet_cfcl.counterfactual.choice import choose_source, wants_generator
from nnunet_cfcl.data.attribute_table import ATTRIBUTES
from nnunet_cfcl.data.pool.find_cases import SILVER_LABELS
from nnunet_cfcl.data.pool.manifest import pool_command, read_manifest, silver_folder
from nnunet_cfcl.data.pool.silver_model import SilverModel
from nnunet_cfcl.data.pretraining_cases import PretrainingCases, SilverLeak, pretraining_cases, silver_leaks
from nnunet_cfcl.errors import CheckResult, UserError, first_line, isolated
from nnunet_cfcl.files.json_files import read_json
from nnunet_cfcl.nnunet import lookup
from nnunet_cfcl.nnunet.compatibility import build_network
from nnunet_cfcl.nnunet.decoder_tap import decoder_width
from nnunet_cfcl.nnunet.fold import FoldContext, Split
from nnunet_cfcl.nnunet.plan import check_single_stage, view_geometry
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
    """A planned pretraining and the checks of it.

    Args:
        trainer: a trainer with the pretraining phase.
        settings: the resolved settings, without the preset.
        dataset: full name of the dataset.
        plan: content of the plans file.
        plans: identifier of the plan.
        configuration: name of the configuration.
    """

    trainer: type[nnUNetTrainer]
    settings: Settings
    dataset: str
    plan: dict[str, Any]
    plans: str
    configuration: str

    def results(self) -> Iterator[CheckResult]:
        """Check stage, patch, method, network, cases and counterfactuals."""
        if not self.settings.pretrain.enabled:
            yield CheckResult("ok", "no pretraining (pretrain.enabled is false)")
            return
        manager = PlansManager(self.plan).get_configuration(self.configuration)
        yield _checked(lambda: check_single_stage(self.configuration, manager), "no previous stage required",
                       f"-c {manager.previous_stage_name}, or set pretrain.enabled to false for this stage in "
                       f"{_settings_file()}")
        views = self.trainer.method.adapt(self.settings).views
        yield _checked(lambda: check_patch(view_geometry(manager), views), "the views fit the patch",
                       f"set views.crop_fraction in {_settings_file()}, or another patch_size in {self.plans}.json",
                       keep_fix=True)
        yield _checked(lambda: self._objective(manager), f"pretraining method {self.trainer.method.name}",
                       f"change the setting in {_settings_file()}", keep_fix=True)
        yield from self._network_results(manager.batch_size)
        yield from self._data_results(lookup.preprocessed_folder(self.dataset, manager.configuration))

    def _objective(self, manager: ConfigurationManager) -> Objective:
        context = MethodContext(self.trainer.method.adapt(self.settings), view_geometry(manager),
                                len(manager.normalization_schemes), None, _no_loss)
        objective: Objective = self.trainer.method.build(context)
        return objective

    def _network_results(self, batch_size: int) -> Iterator[CheckResult]:
        # custom networks may need real tensors when built, which says nothing about the training
        with isolated() as errors:
            network = self._network()
        if errors:
            yield CheckResult("warn",
                              "decoder and norms not checked, as the network could not be built on the meta device "
                              f"({first_line(errors[0])})")
            return
        is_the_plans = self.trainer.build_network_architecture is nnUNetTrainer.build_network_architecture
        plan_again = lookup.plan_command(self.dataset, self.configuration, "nnUNetPlans")
        yield _checked(lambda: decoder_width(network), f"{type(network).__name__} has a decoder that can be pretrained",
                       f"{plan_again}, then -p nnUNetPlans" if is_the_plans
                       else "derive the trainer from one that builds the plan's own network")
        chosen, views = self.settings.pretrain, self.settings.counterfactual.count + 1
        patches, per_pass = chosen.images_per_step * views, chosen.patches_per_pass or batch_size
        cached = patches > per_pass and not self.trainer.method.separable
        yield _checked(lambda: check_norms(network) if cached else None,
                       f"{patches} patches per step of pretraining, at most {per_pass} per pass",
                       f"plan with InstanceNorm, or set pretrain.patches_per_pass to {patches} in {_settings_file()}")

    def _network(self) -> nn.Module:
        # some trainers modify the plan
        manager = PlansManager(copy.deepcopy(self.plan))
        channels = lookup.network_channels(self.dataset, self.plan, self.configuration)
        with torch.device("meta"):
            network: nn.Module = build_network(
                self.trainer, manager, manager.get_configuration(self.configuration), *channels, deep_supervision=True)
        return network

    def _data_results(self, folder: Path) -> Iterator[CheckResult]:
        """Check cases and counterfactuals of fold "all"; where a check fails, find the folds that can be pretrained."""
        try:
            known = lookup.preprocessed_cases(folder, "")
        except UserError:
            return  # `check_preprocessed` reports it
        found = list(self._fold_results(folder, "all", known, known))
        failed = [result for result in found if result.status == "FAIL"]
        # with the pool alone the fold makes no difference
        folds = _splits(folder.parent / "splits_final.json") if failed and self.settings.pretrain.data != "pool" else []
        served = [str(fold) for fold, (training, validation) in enumerate(folds) if training & known and all(
            result.status != "FAIL"
            for result in self._fold_results(folder, fold, training & known, validation & known))]
        if self.trainer.method.needs_labels:
            yield from self._leak_results(folder, known)
        for result in found:
            yield result if result.status != "FAIL" or not served else CheckResult(
                "warn", f"only fold {', '.join(served)} can be pretrained: {result.message}", result.fix)

    def _fold_results(
        self, folder: Path, fold: int | str, training: Iterable[str], validation: Iterable[str]
    ) -> Iterator[CheckResult]:
        log: list[str] = []
        context = self._context(folder, fold, (sorted(training), sorted(validation)), log)
        needs_labels, method = self.trainer.method.needs_labels, self.trainer.method
        try:
            cases = pretraining_cases(context, self.settings, needs_labels, unpack=False)
        except UserError as error:
            yield CheckResult.of(error)
            return
        yield CheckResult("ok", f"fold {fold}: {'; '.join(log)}")
        if needs_labels:
            yield from self._silver_results(folder)
        if method.counterfactuals:
            yield self._counterfactual_result(context, cases, folder)

    def _context(self, folder: Path, fold: int | str, split: Split, log: list[str]) -> FoldContext:
        """A fold with given cases: nnU-Net's own split would write a file, and the doctor writes nothing."""
        manager = PlansManager(self.plan)
        description = json.loads((folder.parent / "dataset.json").read_text())
        return FoldContext(
            trainer_class=self.trainer, plans=manager, configuration=manager.get_configuration(self.configuration),
            configuration_name=self.configuration, fold=fold, dataset_json=description,
            labels=manager.get_label_manager(description), preprocessed=folder, folder=Path(),
            device=torch.device("cpu"), settings=self.settings, log=log.append, split=lambda: split,
            loss=_no_loss, saves=False)

    def _counterfactual_result(self, asked: FoldContext, cases: PretrainingCases, folder: Path) -> CheckResult:
        """Check the attribute table where a generator would be trained, else the source that would be chosen."""
        try:
            known = known_attributes(folder.parent)
            if wants_generator(self.settings, folder, known is not None and bool(known.columns)):
                return self._attributes_result(known, asked, cases)
        except UserError as error:
            return CheckResult("FAIL", error.message, error.fix or f"correct {ATTRIBUTES}")
        return _checked(
            lambda: choose_source(self.settings, cases, folder, asked.schemes, len(asked.geometry.patch_size)),
            "counterfactuals available for all cases",
            f"nnunet_cfcl counterfactuals import -d {int(self.dataset[7:10])} -c {self.configuration} "
            f"-p {self.plans} -i IMAGES, or set counterfactual.source to acquisition in {_settings_file()}",
            keep_fix=True)

    def _attributes_result(
        self, known: KnownAttributes | None, asked: FoldContext, cases: PretrainingCases
    ) -> CheckResult:
        wanted = self.settings.counterfactual
        if known is None:
            return CheckResult("FAIL", f"counterfactual.source is 'generator', but nnUNet_raw/{self.dataset} has no "
                           f"{ATTRIBUTES}", f"nnunet_cfcl attributes discover -d {self.dataset}, or write it by hand")
        try:
            coding, interventions = coding_and_interventions(
                known, cases.cases, cases.known, asked.dataset_json["file_ending"], wanted.interventions,
                asked.log)
        except NothingToChange as reason:
            if wanted.source == "generator":
                raise
            return CheckResult("warn", f"no generator will be trained, acquisition is used: {reason.message}",
                               reason.fix or f"correct {ATTRIBUTES}")
        said = ", ".join(f"{one.name} ({one.kind})" for one in coding.attributes)
        return CheckResult("ok", f"a generator of counterfactuals will be trained on {said}; interventions: "
                       f"{', '.join(one.name for one in interventions)}")

    def _silver_results(self, folder: Path) -> Iterator[CheckResult]:
        """Warn where silver labels are asked for and missing, as the training then uses manual ones."""
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


    def _leak_results(self, folder: Path, known: set[str]) -> Iterator[CheckResult]:
        """Warn of folds whose validation patients the model that made the silver labels was trained on."""
        found: dict[SilverModel, dict[int, SilverLeak]] = {}
        for fold, (training, validation) in enumerate(_splits(folder.parent / "splits_final.json")):
            split = sorted(training & known), sorted(validation & known)
            # a fold that cannot be pretrained is reported by the other checks
            with isolated():
                for leak in silver_leaks(self._context(folder, fold, split, []), self.settings):
                    found.setdefault(leak.model, {})[fold] = leak
        for leaks in found.values():
            first = min(leaks)
            yield CheckResult("warn", leaks[first].message(*map(str, sorted(leaks))),
                              f"before the training of such a fold, {leaks[first].fix('FOLD')}")


def _no_loss() -> Any:
    """The doctor builds a method, but computes no loss."""


def _checked(check: Callable[[], object], ok: str, fix: str, keep_fix: bool = False) -> CheckResult:
    """Run a check; ``fix`` replaces the fix of its error, or precedes it (``keep_fix``)."""
    try:
        check()
    except UserError as error:
        return CheckResult("FAIL", error.message, f"{fix}, or {error.fix}" if keep_fix and error.fix else fix)
    return CheckResult("ok", ok)


def _settings_file() -> str:
    return os.environ.get(CONFIG_VARIABLE) or f"a JSON file named by {CONFIG_VARIABLE}"


def _splits(file: Path) -> list[tuple[set[str], set[str]]]:
    """Training and validation cases of each fold; none without a valid file, which `check_preprocessed` reports."""
    try:
        return [(set(map(str, split["train"])), set(map(str, split["val"]))) for split in read_json(file)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
