"""The checks of ``nnunet_cfcl doctor`` in order: one line for each, with the fix of a failure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from nnunet_cfcl.doctor import cases as check_cases
from nnunet_cfcl.doctor import dataset as check_dataset
from nnunet_cfcl.doctor import device as check_device
from nnunet_cfcl.doctor import environment as check_environment
from nnunet_cfcl.errors import CheckResult, UserError, first_line, isolated
from nnunet_cfcl.nnunet import lookup


@dataclass(frozen=True)
class Training:
    """The training to check, named as in ``nnUNetv2_train DATASET CONFIGURATION -p PLANS -tr TRAINER``."""

    dataset: str | None = None
    configuration: str | None = None
    plans: str = "nnUNetPlans"
    trainer: str = "nnUNetTrainerDVDCL"
    device: str = "cuda"


def examine(training: Training, scan_data: bool = False) -> Iterator[CheckResult]:
    """Run all checks, the quick ones first; a check that raises is reported as failed.

    Args:
        training: training to check; without a dataset only the installation is checked.
        scan_data: whether to read every preprocessed case.
    """
    yield from _guarded("nnU-Net's version", check_environment.check_nnunet)
    yield from _guarded("torch", check_environment.check_torch)
    yield from _guarded("nnU-Net's folders", lookup.check_folders)
    yield from _guarded("the trainer", lambda: _check_trainer(training.trainer))
    yield from _guarded("the device", lambda: check_device.check_device(training.device))
    if training.dataset is None:
        yield from _guarded("the settings", lambda: _settings_result(None))
        yield from _guarded("memory", lambda: check_device.check_memory(training.device, None))
    else:
        yield from _guarded("the dataset", lambda: _examine_dataset(training, scan_data))


def _guarded(what: str, check: Callable[[], CheckResult | Iterable[CheckResult]]) -> Iterator[CheckResult]:
    # in a broken installation anything may fail: the other checks are still of use
    with isolated() as errors:
        found = check()
        yield from [found] if isinstance(found, CheckResult) else found
    for error in errors:
        yield CheckResult.of(error) if isinstance(error, UserError) else CheckResult(
            "FAIL", f"{what} could not be checked ({first_line(error)})",
            "correct the failures above; if there are none, report this as a bug")


def _check_trainer(name: str) -> CheckResult:
    # imports torch and nnU-Net, without which the doctor must still run
    from nnunet_cfcl.trainers.lookup import check_trainer

    return check_trainer(name)


def _examine_dataset(training: Training, scan_data: bool) -> Iterator[CheckResult]:
    assert training.dataset is not None
    dataset = lookup.find_dataset(training.dataset)
    yield CheckResult("ok", f"dataset {dataset}")
    plan = lookup.load_plan(dataset, training.plans, training.configuration)
    yield CheckResult("ok", f"plan {training.plans} with configurations {', '.join(plan['configurations'])}")
    if training.configuration is None:
        return
    block = lookup.load_configuration(plan, training.plans, training.configuration)
    yield CheckResult("ok", f"configuration {training.configuration}, patch {list(block['patch_size'])}, "
                        f"batch {block['batch_size']}")
    yield from _guarded("the pretraining", lambda: _pretraining_results(training, dataset, plan, block))
    yield from _guarded("memory", lambda: _memory_results(training, dataset, plan, block))
    yield from check_dataset.check_preprocessed(dataset, training.plans, training.configuration, block)
    if scan_data:
        command = lookup.preprocess_command(dataset, training.configuration, training.plans)
        yield from check_cases.scan_cases(lookup.preprocessed_folder(dataset, block), command)


def _settings_result(block: dict[str, Any] | None) -> CheckResult:
    settings = check_dataset.check_settings(block)
    return CheckResult("ok", f"settings: {settings.pretrain.epochs} epochs of pretraining, "
                         f"{settings.pretrain.images_per_step} images per step")


def _pretraining_results(
    training: Training, dataset: str, plan: dict[str, Any], block: dict[str, Any],
) -> Iterator[CheckResult]:
    yield _settings_result(block)
    # imports torch and nnU-Net, without which the doctor must still run
    from nnunet_cfcl.doctor.pretraining import PlannedPretraining
    from nnunet_cfcl.doctor.teacher import check_pool
    from nnunet_cfcl.trainers.lookup import known_trainer, pretraining_trainer

    trainer, settings = pretraining_trainer(training.trainer), check_dataset.check_settings(block)
    if trainer is None and known_trainer(training.trainer) is not None:
        yield CheckResult("ok", f"{training.trainer} has no pretraining, the pretraining settings are ignored")
    elif trainer is not None and training.configuration is not None:
        yield from PlannedPretraining(
            trainer, settings, dataset, plan, training.plans, training.configuration).results()
    found: Any = known_trainer(training.trainer)
    if training.configuration is not None and hasattr(found, "wants_teacher") and found.wants_teacher(settings):
        yield check_pool(settings, dataset, training.plans, training.configuration, block)


def _memory_results(training: Training, dataset: str, plan: dict[str, Any],
                    block: dict[str, Any]) -> list[CheckResult]:
    channels = lookup.network_channels(dataset, plan, training.configuration)
    return list(check_device.check_memory(training.device, check_device.training_gib(block, *channels)))
