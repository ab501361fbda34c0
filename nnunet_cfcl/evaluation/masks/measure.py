"""Metrics of all cases of one or several methods; every file is read once, in parallel processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nnunet_cfcl.errors import UserError, listed
from nnunet_cfcl.evaluation.masks.metrics import METRICS, LabelMetrics, case_metrics, diagonal
from nnunet_cfcl.evaluation.masks.tables import LabelScheme, MaskFolder
from nnunet_cfcl.nnunet.label_files import LabelFile, geometry_difference, read_label_file
from nnunet_cfcl.runs.workers import with_each


@dataclass(frozen=True)
class MethodMetrics:
    """Metrics of one method.

    Attributes:
        name: name of the method.
        folder: folder of its predictions.
        cases: cases with both a prediction and a truth, sorted.
        labels: evaluated labels, sorted; the same for all methods.
        values: (cases, labels, metrics) in the order of `METRICS`; NaN where a metric is undefined.
        missed: (cases, labels) whether the label is in exactly one of truth and prediction.
        diagonals: (cases,) image diagonals in mm or pixels.
        without_prediction: cases with a truth but no prediction.
        without_truth: cases with a prediction but no truth.
    """

    name: str
    folder: Path
    cases: tuple[str, ...]
    labels: tuple[int, ...]
    values: NDArray[np.float64]
    missed: NDArray[np.bool_]
    diagonals: NDArray[np.float64]
    without_prediction: tuple[str, ...]
    without_truth: tuple[str, ...]


@dataclass(frozen=True)
class Measurements:
    """Metrics of all methods.

    Attributes:
        methods: the evaluated method, then the methods it is compared with.
        in_pixels: whether distances are in pixels, for files without a physical size.
        undeclared: labels in the masks that are not in dataset.json and not evaluated.
    """

    methods: tuple[MethodMetrics, ...]
    in_pixels: bool
    undeclared: tuple[int, ...]


@dataclass(frozen=True)
class _Job:
    """Files of one case: the truth and the available predictions."""

    case: str
    truth: Path
    predictions: Mapping[str, Path]
    labels: tuple[int, ...] | None
    ignore: int | None
    tolerance: float


@dataclass(frozen=True)
class _Result:
    case: str
    metrics: Mapping[str, Mapping[int, LabelMetrics]]
    diagonal: float
    in_pixels: bool
    present: frozenset[int]


def measure(truth: MaskFolder, methods: Sequence[MaskFolder], scheme: LabelScheme, tolerance: float, processes: int
            ) -> Measurements:
    """Compare the predictions of every method with the truth.

    Args:
        truth: true masks.
        methods: predicted masks of one or more methods.
        scheme: labels to evaluate.
        tolerance: tolerance of the normalised surface Dice in mm or pixels.
        processes: number of worker processes; 1 works in this process.

    Raises:
        UserError: a method has no case in common with the truth or with the first method, a file cannot be read, two
            files have different grids, or a process was killed.
    """
    jobs = _jobs(truth, methods, scheme, tolerance)
    # workers finish in any order
    results = sorted((result for _, result in with_each(_run, jobs, processes, "evaluating")), key=attrgetter("case"))
    if len({result.in_pixels for result in results}) > 1:
        odd = next(result.case for result in results if result.in_pixels != results[0].in_pixels)
        raise UserError(f"{truth.folder} mixes files in millimetres and files in pixels, such as {results[0].case} and "
                        f"{odd}", "evaluate them separately")
    present = frozenset().union(*(result.present for result in results)) - {0, scheme.ignore}
    labels = tuple(sorted(present if scheme.names is None else scheme.names))
    if not labels:
        raise UserError(f"{truth.folder} and the predictions contain only background (0), expected labels of 1 or more")
    found = tuple(_method_metrics(method, truth, results, labels) for method in methods)
    return Measurements(found, results[0].in_pixels, tuple(sorted(present - set(labels))))


def _jobs(truth: MaskFolder, methods: Sequence[MaskFolder], scheme: LabelScheme, tolerance: float) -> list[_Job]:
    for method in methods:
        # differences need cases in common with the first method
        for wanted in (truth, methods[0]):
            if not set(method.files) & set(wanted.files) & set(truth.files):
                names = [listed(sorted(folder.files), 3) for folder in (method, wanted)]
                raise UserError(f"{method.folder} and {wanted.folder} have no case in common: found {names[0]}, "
                                f"expected {names[1]}", "name the files of a case alike")
    labels = None if scheme.names is None else tuple(scheme.names)
    jobs = [_Job(case, file, {method.name: method.files[case] for method in methods if case in method.files},
                 labels, scheme.ignore, tolerance) for case, file in sorted(truth.files.items())]
    return [job for job in jobs if job.predictions]


def _run(job: _Job) -> _Result:
    truth = read_label_file(job.truth)
    present = set(np.unique(truth.labels).tolist())
    metrics = {}
    for name, file in job.predictions.items():
        prediction = read_label_file(file)
        _check_grids(truth, prediction)
        present |= set(np.unique(prediction.labels).tolist())
        metrics[name] = case_metrics(truth.labels, prediction.labels, truth.spacing, job.tolerance, job.labels,
                                     job.ignore)
    return _Result(job.case, metrics, diagonal(truth.labels.shape, truth.spacing), truth.in_pixels, frozenset(present))


def _check_grids(truth: LabelFile, prediction: LabelFile) -> None:
    if different := geometry_difference(truth, prediction):
        raise UserError(f"{truth.file} and {prediction.file} have {different}, expected the same voxel grid",
                        "predict the image of this truth again, or resample one of the files")


def _method_metrics(method: MaskFolder, truth: MaskFolder, results: Sequence[_Result], labels: tuple[int, ...]
                    ) -> MethodMetrics:
    mine = [result for result in results if method.name in result.metrics]
    # without a dataset.json, a label in neither mask of a case is not measured
    rows = [[result.metrics[method.name].get(label, LabelMetrics()) for label in labels] for result in mine]
    values = np.array([[one.values for one in row] for row in rows]).reshape(len(mine), len(labels), len(METRICS))
    return MethodMetrics(
        method.name, method.folder, tuple(result.case for result in mine), labels, values,
        np.array([[one.missed for one in row] for row in rows]), np.array([result.diagonal for result in mine]),
        tuple(sorted(set(truth.files) - set(method.files))), tuple(sorted(set(method.files) - set(truth.files))))
