"""The verb ``nnunet_cfcl probe``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.atomic import writable_folder

if TYPE_CHECKING:
    from nnunet_cfcl.evaluation.probe.measure import Probe
    from nnunet_cfcl.evaluation.probe.models import ProbedModel
    from nnunet_cfcl.evaluation.probe.report import ProbeResult
    from nnunet_cfcl.evaluation.probe.results import ModelMetrics

    SubParsers = argparse._SubParsersAction[argparse.ArgumentParser]

#: Cases of either part, unless told otherwise.
CASES = 32


def add_probe_parser(subparsers: SubParsers) -> None:
    """Register the verb `probe`; parsed arguments carry its function as `run`."""
    parser = subparsers.add_parser(
        "probe", help="measure what frozen features tell: linear probe, clusters, invariance",
        description="Linear probe Dice, k-means accuracy, distance between classes and invariance to counterfactuals "
        "and scanners of the last decoder map, on a fold's validation cases, the same voxels for every model; writes "
        "probe.json, probe.md and probe.png. Nothing is trained but the linear probe.")
    parser.add_argument("-d", dest="dataset", required=True, help="dataset name or number")
    parser.add_argument("-c", dest="configuration", required=True, help="configuration, e.g. 3d_fullres")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
    parser.add_argument("-f", dest="fold", required=True, help="fold with validation cases, 0 to 4")
    parser.add_argument("-tr", dest="trainer", help="trainer whose trained fold is probed; any of nnU-Net's")
    parser.add_argument("-chk", dest="checkpoint", default="checkpoint_final.pth",
                        help="checkpoint in the fold's folder (default: %(default)s)")
    parser.add_argument("--weights", nargs="+", default=[], metavar="FILE",
                        help="checkpoints with network_weights (nnU-Net's, a pretraining's), or NAME=FILE")
    parser.add_argument("--untrained", action="store_true", help="also the weights that a training begins with")
    parser.add_argument("-o", dest="out", type=Path, metavar="DIR",
                        help="folder to write to (default with -tr: fold_F/cfcl/probe)")
    parser.add_argument("--cases", type=int, default=CASES, metavar="N",
                        help="training and validation cases, at most (default: %(default)s each)")
    parser.add_argument("--by", default="scanner", metavar="COLUMN",
                        help="column of attributes.csv whose groups are compared (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    parser.add_argument("-step_size", type=float, default=0.5,
                        help="distance of sliding windows relative to the patch (default: %(default)s)")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="default: %(default)s")
    parser.set_defaults(run=_run)


@dataclass(frozen=True)
class ProbeRequest:
    """What is to be probed, see the verb's arguments."""

    dataset: str
    configuration: str
    fold: str
    plans: str = "nnUNetPlans"
    trainer: str | None = None
    checkpoint: str = "checkpoint_final.pth"
    weights: tuple[str, ...] = ()
    untrained: bool = False
    out: Path | None = None
    cases: int = CASES
    by: str = "scanner"
    seed: int = 0
    step_size: float = 0.5
    device: str = "cuda"


def _run(arguments: argparse.Namespace) -> int:
    known = {name: getattr(arguments, name) for name in ProbeRequest.__dataclass_fields__}
    probe(ProbeRequest(**{**known, "weights": tuple(arguments.weights)}))
    return 0


def probe(request: ProbeRequest, say: Callable[[str], object] = print) -> ProbeResult:
    """Measure every model on the same images and write the three files.

    Args:
        request: what is to be probed.
        say: gets the messages.

    Raises:
        UserError: no model is named, or it is not there or of another architecture; see `bare_fold`, `draw_probe_set`;
            the folder cannot be written.
    """
    _check(request)
    # here because they import nnU-Net, for which --help should not wait
    import torch

    from nnunet_cfcl.doctor.device import check_device
    from nnunet_cfcl.evaluation.probe import figure as probe_figure
    from nnunet_cfcl.evaluation.probe import report as probe_report
    from nnunet_cfcl.evaluation.probe.models import find_any_trainer
    from nnunet_cfcl.evaluation.probe.results import paired_differences
    from nnunet_cfcl.phases.bare_trainer import bare_fold

    check_device(request.device).raise_on_failure()
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    def quiet(*line: Any, **_: Any) -> None:
        """nnU-Net tells at length which split it reads."""

    trainer = bare_fold(find_any_trainer(request.trainer), request.dataset, request.configuration, request.fold,
                        request.plans, torch.device(request.device), quiet)
    models = _models(request, Path(trainer.output_folder))
    out = writable_folder(request.out or Path(trainer.output_folder) / "cfcl" / "probe", "name another with -o")
    bench = _bench(request, trainer, note)
    measured = tuple(_measure(bench, trainer, models))
    probed = probe_report.ProbeResult(
        bench, measured, tuple(paired_differences(measured, bench.patients, request.seed)),
        trainer.plans_manager.dataset_name, request.configuration, request.plans, trainer.fold,
        _label_names(trainer.dataset_json), tuple(notes))
    probe_report.write_report(out, probed)
    probe_figure.draw(out / probe_figure.FIGURE, probed)
    for line in (*probe_report.remarks(probed)[len(notes):], *probe_report.short_summary(probed)):
        say(line)
    say(f"Look at {out / probe_report.PAGE} and {out / probe_figure.FIGURE}")
    return probed


def _check(request: ProbeRequest) -> None:
    if not (request.trainer or request.weights or request.untrained):
        raise UserError("no model is named, expected -tr TRAINER, --weights FILE or --untrained")
    if request.out is None and request.trainer is None:
        raise UserError("-o DIR is missing: without -tr there is no fold's folder to write to")
    if request.cases < 2 or request.seed < 0 or not 0 < request.step_size <= 1:
        raise UserError("--cases must be 2 or more, --seed 0 or more, -step_size above 0 and at most 1; found "
                        f"{request.cases}, {request.seed} and {request.step_size:g}")


def _models(request: ProbeRequest, fold_folder: Path) -> list[ProbedModel]:
    from nnunet_cfcl.evaluation.probe.models import UNTRAINED, ProbedModel, check_names, fold_checkpoint, named_files

    models = []
    if request.trainer:
        usual = request.checkpoint == "checkpoint_final.pth"
        name = request.trainer if usual else f"{request.trainer}, {request.checkpoint}"
        models.append(ProbedModel(name, fold_checkpoint(fold_folder, request.checkpoint)))
    models += named_files(request.weights)
    if request.untrained:
        models.append(ProbedModel(UNTRAINED, None))
    check_names(models)
    return models


def _bench(request: ProbeRequest, trainer: Any, note: Callable[[str], object]) -> Probe:
    import torch

    from nnunet_cfcl.evaluation.probe.counterfactuals import probe_source
    from nnunet_cfcl.evaluation.probe.features import Counterfactuals
    from nnunet_cfcl.evaluation.probe.measure import Probe, comparable_groups
    from nnunet_cfcl.evaluation.probe.set import draw_probe_set
    from nnunet_cfcl.nnunet.plan import check_single_stage, view_geometry

    check_single_stage(request.configuration, trainer.configuration_manager)
    material = draw_probe_set(trainer, request.seed, request.cases)
    source = probe_source(trainer, material.reader, material.validation, note)
    ignored = trainer.label_manager.ignore_label
    labels = tuple(label for label in trainer.label_manager.all_labels if label not in (0, ignored))
    return Probe(
        material, Counterfactuals(source, view_geometry(trainer.configuration_manager).spacing, request.seed),
        trainer.configuration_manager, torch.device(request.device), labels, request.by,
        comparable_groups(_cells(trainer, request.by, material.validation)), request.seed, request.step_size)


def _cells(trainer: Any, column: str, cases: tuple[str, ...]) -> dict[str, str]:
    """Case -> group, of the cases whose group is known."""
    from nnunet_cfcl.data.attributes import is_missing
    from nnunet_cfcl.phases.attributes_of_cases import known_attributes

    known = known_attributes(Path(trainer.preprocessed_dataset_folder_base))
    cells: Mapping[str, str] = {} if known is None else known.columns.get(column, {})
    return {case: cells[case] for case in cases if case in cells and not is_missing(cells[case])}


def _measure(bench: Probe, trainer: Any, models: list[ProbedModel]) -> list[ModelMetrics]:
    """The figures of every model, whose weights are checked before the first one is measured."""
    from nnunet_cfcl.evaluation.probe.models import check_fit, read_weights, use_weights
    from nnunet_cfcl.nnunet.decoder_tap import decoder_width
    from nnunet_cfcl.phases.bare_trainer import build_network

    network = build_network(trainer)
    decoder_width(network)
    for model in models:
        if model.file is not None:
            check_fit(network, read_weights(model.file), str(model.file))
    begun = {key: value.detach().clone() for key, value in network.state_dict().items()}
    measured = []
    for model in models:
        loaded = use_weights(network, begun if model.file is None else read_weights(model.file))
        measured.append(bench.measure(network, model.name, model.file, loaded))
    return measured


def _label_names(description: Mapping[str, Any]) -> dict[int, str]:
    """Of the labels that are not only parts of regions."""
    plain = {name: value if isinstance(value, list) else [value] for name, value in description["labels"].items()}
    return {int(value[0]): name for name, value in plain.items() if len(value) == 1}
