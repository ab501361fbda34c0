"""Probe of a fold: measure models on the same images, compare them, and write the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nnunet_cfcl.data.attributes import is_missing
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.evaluation.probe import figure, report
from nnunet_cfcl.evaluation.probe.counterfactuals import probe_source
from nnunet_cfcl.evaluation.probe.features import Counterfactuals
from nnunet_cfcl.evaluation.probe.measure import Probe, comparable_groups
from nnunet_cfcl.evaluation.probe.models import (
    UNTRAINED,
    ProbedModel,
    check_fit,
    check_names,
    find_any_trainer,
    fold_checkpoint,
    named_files,
    read_weights,
    use_weights,
)
from nnunet_cfcl.evaluation.probe.report import ProbeResult
from nnunet_cfcl.evaluation.probe.results import ModelMetrics, paired_differences
from nnunet_cfcl.evaluation.probe.set import draw_probe_set
from nnunet_cfcl.files.atomic import writable_folder
from nnunet_cfcl.nnunet.decoder_tap import decoder_width
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.nnunet.fold_files import FINAL
from nnunet_cfcl.nnunet.plan import check_single_stage
from nnunet_cfcl.phases.attributes_of_cases import known_attributes

#: Default number of training cases, and of validation cases.
CASES = 32


@dataclass(frozen=True)
class ProbeRequest:
    """Arguments of a probe.

    Attributes:
        dataset: number or name of the dataset.
        configuration: configuration of the plan.
        fold: number of the fold.
        plans: identifier of the plans.
        trainer: trainer whose trained fold is probed; None: no trained fold.
        checkpoint: checkpoint in the folder of the fold.
        weights: further checkpoints, as ``FILE`` or ``NAME=FILE``.
        untrained: whether to probe the initial weights of a training.
        out: folder of the results; None: ``cfcl/probe`` in the folder of the fold.
        cases: most training cases, and most validation cases.
        by: column of attributes.csv whose groups are compared.
        seed: seed of cases, voxels, counterfactuals, clusters and resamples.
        step_size: step of the sliding window relative to the patch.
        device: cpu, cuda or mps.

    Raises:
        UserError: no model or no folder is named, or a number is out of range.
    """

    dataset: str
    configuration: str
    fold: str
    plans: str = "nnUNetPlans"
    trainer: str | None = None
    checkpoint: str = FINAL
    weights: tuple[str, ...] = ()
    untrained: bool = False
    out: Path | None = None
    cases: int = CASES
    by: str = "scanner"
    seed: int = 0
    step_size: float = 0.5
    device: str = "cuda"

    def __post_init__(self) -> None:
        if not (self.trainer or self.weights or self.untrained):
            raise UserError("no model is named, expected at least one",
                            "name a model with -tr TRAINER, --weights FILE or --untrained")
        if self.out is None and self.trainer is None:
            raise UserError("-o DIR is missing, expected a folder, since without -tr no fold has one",
                            "name a folder with -o")
        if self.cases < 2 or self.seed < 0 or not 0 < self.step_size <= 1:
            raise UserError("--cases must be 2 or more, --seed 0 or more, -step_size above 0 and at most 1; found "
                            f"{self.cases}, {self.seed} and {self.step_size:g}")


def run_probe(request: ProbeRequest, log: Callable[[str], object] = print) -> ProbeResult:
    """Measure every model on the same images and write ``probe.json``, ``probe.md`` and ``probe.png``.

    Args:
        request: models, images and folder.
        log: receives the messages.

    Raises:
        UserError: a model does not exist or has another architecture, the folder cannot be written, or
            `FoldContext.find` or `draw_probe_set` reject the fold.
    """
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        log(line)

    def no_log(*line: Any, **_: Any) -> None:
        """Suppress nnU-Net's report of the split."""

    fold = FoldContext.find(find_any_trainer(request.trainer), request.dataset, request.configuration, request.fold,
                            request.plans, torch.device(request.device), no_log)
    models = _models(request, fold.folder)
    out = writable_folder(request.out or fold.folder / "cfcl" / "probe", "name another folder with -o")
    probe = _probe(request, fold, note)
    measured = tuple(_measure(probe, fold, models))
    result = ProbeResult(
        probe, measured, tuple(paired_differences(measured, probe.patients, request.seed)), fold.dataset,
        request.configuration, request.plans, fold.fold, _label_names(fold.dataset_json), tuple(notes))
    report.write_report(out, result)
    figure.draw(out / figure.FIGURE, result)
    for line in (*report.remarks(result)[len(notes):], *report.short_summary(result)):
        log(line)
    log(f"Look at {out / report.PAGE} and {out / figure.FIGURE}")
    return result


def _models(request: ProbeRequest, fold_folder: Path) -> list[ProbedModel]:
    models = []
    if request.trainer:
        name = request.trainer if request.checkpoint == FINAL else f"{request.trainer}, {request.checkpoint}"
        models.append(ProbedModel(name, fold_checkpoint(fold_folder, request.checkpoint)))
    models += named_files(request.weights)
    if request.untrained:
        models.append(ProbedModel(UNTRAINED, None))
    check_names(models)
    return models


def _probe(request: ProbeRequest, fold: FoldContext, log: Callable[[str], object]) -> Probe:
    check_single_stage(request.configuration, fold.configuration)
    images = draw_probe_set(fold, request.seed, request.cases)
    source = probe_source(fold, images.reader, images.validation, log)
    ignored = fold.labels.ignore_label
    labels = tuple(label for label in fold.labels.all_labels if label not in (0, ignored))
    return Probe(
        images, Counterfactuals(source, fold.geometry.spacing, request.seed), fold.configuration,
        torch.device(request.device), labels, request.by,
        comparable_groups(_groups(fold, request.by, images.validation)), request.seed, request.step_size)


def _groups(fold: FoldContext, column: str, cases: Sequence[str]) -> dict[str, str]:
    """Read case -> group, for cases whose group is known."""
    known = known_attributes(fold.preprocessed.parent)
    cells: Mapping[str, str] = {} if known is None else known.columns.get(column, {})
    return {case: cells[case] for case in cases if case in cells and not is_missing(cells[case])}


def _measure(probe: Probe, fold: FoldContext, models: Sequence[ProbedModel]) -> list[ModelMetrics]:
    """Measure every model, after the weights of all have been checked."""
    network = fold.build_network()
    decoder_width(network)
    for model in models:
        if model.file is not None:
            check_fit(network, read_weights(model.file), str(model.file))
    initial = {key: value.detach().clone() for key, value in network.state_dict().items()}
    measured = []
    for model in models:
        loaded = use_weights(network, initial if model.file is None else read_weights(model.file))
        measured.append(probe.measure(network, model.name, model.file, loaded))
    return measured


def _label_names(description: Mapping[str, Any]) -> dict[int, str]:
    """Read label -> name, without labels that occur only as parts of regions."""
    plain = {name: value if isinstance(value, list) else [value] for name, value in description["labels"].items()}
    return {int(value[0]): name for name, value in plain.items() if len(value) == 1}
