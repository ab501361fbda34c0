"""Summaries per label and group, gaps between groups, and paired differences between methods, as flat records.

Every value is a mean over cases with a bootstrap interval over patients. A case with a label in exactly one of the
masks has no surface distance. Leaving it out would reward a method for missing a structure, so each distance also has
a penalised variant, which uses the image diagonal for these cases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nnunet_cfcl.evaluation.masks.measure import Measurements, MethodMetrics
from nnunet_cfcl.evaluation.masks.metrics import DISTANCES, METRICS
from nnunet_cfcl.evaluation.masks.tables import UNKNOWN
from nnunet_cfcl.evaluation.statistics import Draws, PatientSums, patient_sums

#: Penalised distance -> plain distance.
PENALISED = {f"{name}_penalised": name for name in DISTANCES}
SUMMARISED = (*METRICS, *PENALISED)

Groupings = Mapping[str, Mapping[str, tuple[str, ...]]]


def less_is_better(metric: str) -> bool:
    """Whether a metric of `SUMMARISED` is a distance."""
    return metric in DISTANCES or metric in PENALISED


@dataclass(frozen=True)
class Summary:
    """One metric of one method and label in a group of cases.

    Attributes:
        method: name of the method.
        label: number of the label.
        grouping: column, or `ALL`.
        group: value of the column.
        metric: one of `SUMMARISED`.
        cases: number of cases with a value.
        patients: number of patients with a value.
        both_empty: number of cases with the label in neither mask, which have no value.
        one_empty: number of cases with the label in exactly one mask: Dice and surface Dice are 0, distances undefined.
        mean: mean over the cases; NaN without cases.
        std: standard deviation over the cases; NaN with fewer than two.
        median: median over the cases; NaN without cases.
        low: lower end of the 95 % interval of the mean; NaN with fewer than two patients.
        high: upper end.
    """

    method: str
    label: int
    grouping: str
    group: str
    metric: str
    cases: int
    patients: int
    both_empty: int
    one_empty: int
    mean: float
    std: float
    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Gap:
    """Gap between the worst and the best group of a grouping; the group `UNKNOWN` is left out.

    Attributes:
        method: name of the method.
        label: number of the label.
        grouping: column.
        metric: one of `SUMMARISED`.
        worst: group with the worst mean.
        worst_mean: its mean.
        best: group with the best mean.
        best_mean: its mean.
        gap: distance between the two means, 0 or more.
        low: lower end of the 95 % interval for these two groups as if they had been chosen in advance.
        high: upper end.
    """

    method: str
    label: int
    grouping: str
    metric: str
    worst: str
    worst_mean: float
    best: str
    best_mean: float
    gap: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Paired difference of two methods in a group: mean of (method - against) over the cases with a value of both.

    Attributes:
        method: name of the evaluated method.
        against: name of the other method.
        label: number of the label.
        grouping: column, or `ALL`.
        group: value of the column.
        metric: one of `SUMMARISED`.
        cases: number of cases with a value of both methods.
        patients: number of patients with a value of both methods.
        left_out: number of other common cases, except those without the label in any mask.
        difference: mean difference.
        low: lower end of the 95 % interval; NaN with fewer than two patients.
        high: upper end.
        p_value: two-sided sign-flip test over patients, not corrected for multiple comparisons; NaN without cases.
    """

    method: str
    against: str
    label: int
    grouping: str
    group: str
    metric: str
    cases: int
    patients: int
    left_out: int
    difference: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True)
class Records:
    """Statistics of an evaluation."""

    summaries: tuple[Summary, ...]
    gaps: tuple[Gap, ...]
    differences: tuple[Difference, ...]


def summarise(measured: Measurements, groupings: Groupings, patient: Callable[[str], str], seed: int) -> Records:
    """Compute summaries, gaps and paired differences.

    Args:
        measured: metrics of all methods.
        groupings: grouping -> group -> cases, of any method.
        patient: gives the patient of a case.
        seed: seed of resamples and permutations.
    """
    draws = Draws(seed)
    views = [_MethodView(method, patient) for method in measured.methods]
    summaries = [record for view in views for record in _summaries(view, groupings, draws)]
    gaps = [record for view in views for record in _gaps(view, groupings, summaries, draws)]
    differences = [record for other in views[1:] for record in _differences(views[0], other, groupings, draws)]
    return Records(tuple(summaries), tuple(gaps), tuple(differences))


class _MethodView:
    """Access to the plain and penalised metrics of a method by label and metric."""

    def __init__(self, method: MethodMetrics, patient: Callable[[str], str]) -> None:
        self.method = method
        self.patients = [patient(case) for case in method.cases]
        self.rows = {case: row for row, case in enumerate(method.cases)}

    def values(self, label: int, metric: str) -> NDArray[np.float64]:
        """Values (cases,); NaN where the metric is undefined."""
        column = self.method.labels.index(label)
        found = self.method.values[:, column, METRICS.index(PENALISED.get(metric, metric))]
        return np.where(self.method.missed[:, column], self.method.diagonals, found) if metric in PENALISED else found

    def members(self, cases: tuple[str, ...]) -> NDArray[np.bool_]:
        """Mask (cases,) of the method's cases that are among ``cases``."""
        wanted = set(cases)
        return np.array([case in wanted for case in self.method.cases], bool)


def _summaries(view: _MethodView, groupings: Groupings, draws: Draws) -> list[Summary]:
    records = []
    for grouping, groups in groupings.items():
        for group, cases in groups.items():
            members = view.members(cases)
            for column, label in enumerate(view.method.labels):
                empty = int(np.isnan(view.method.values[members, column, 0]).sum())
                missed = int(view.method.missed[members, column].sum())
                for metric in SUMMARISED:
                    data, numbers = _described(np.where(members, view.values(label, metric), np.nan), view, draws)
                    records.append(Summary(view.method.name, label, grouping, group, metric, numbers[0],
                                           len(data.sums), empty, missed, *numbers[1:]))
    return records


def _described(
    values: NDArray[np.float64], view: _MethodView, draws: Draws
) -> tuple[PatientSums, tuple[int, float, float, float, float, float]]:
    data, known = patient_sums(values, view.patients), values[np.isfinite(values)]
    std = float(known.std(ddof=1)) if len(known) > 1 else np.nan
    median = float(np.median(known)) if len(known) else np.nan
    return data, (len(known), data.estimate, std, median, *draws.interval(data))


def _gaps(view: _MethodView, groupings: Groupings, summaries: list[Summary], draws: Draws) -> list[Gap]:
    known: dict[tuple[str, int, str], list[Summary]] = {}
    for record in summaries:
        if record.method == view.method.name and record.cases and record.group != UNKNOWN:
            known.setdefault((record.grouping, record.label, record.metric), []).append(record)
    records = []
    for (grouping, label, metric), groups in known.items():
        if len(groups) > 1:
            smallest, *_, largest = sorted(groups, key=lambda record: record.mean)
            masks = [view.members(groupings[grouping][record.group]) for record in (largest, smallest)]
            data = patient_sums(view.values(label, metric), view.patients, masks)
            worst, best = (largest, smallest) if less_is_better(metric) else (smallest, largest)
            records.append(Gap(view.method.name, label, grouping, metric, worst.group, worst.mean, best.group,
                               best.mean, data.estimate, *draws.interval(data)))
    return records


def _differences(first: _MethodView, other: _MethodView, groupings: Groupings, draws: Draws) -> list[Difference]:
    common = [case for case in first.method.cases if case in other.rows]
    places = [np.array([view.rows[case] for case in common]) for view in (first, other)]
    patients = [first.patients[row] for row in places[0]]
    absent = {label: np.isnan([view.values(label, "dice")[rows] for view, rows in zip((first, other), places)]).all(0)
              for label in first.method.labels}
    records = []
    for grouping, groups in groupings.items():
        for group, cases in groups.items():
            members = np.isin(common, cases)
            for label in first.method.labels:
                for metric in SUMMARISED:
                    both = [view.values(label, metric)[rows] for view, rows in zip((first, other), places)]
                    values = np.where(members, both[0] - both[1], np.nan)
                    # a label in none of the masks has no Dice either, and is not left out
                    lost = members & np.isnan(values) & ~absent[label]
                    data, count = patient_sums(values, patients), int(np.isfinite(values).sum())
                    records.append(Difference(
                        first.method.name, other.method.name, label, grouping, group, metric, count, len(data.sums),
                        int(lost.sum()), data.estimate, *draws.interval(data),
                        draws.p_value(data) if count else np.nan))
    return records
