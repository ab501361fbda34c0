"""Tables and plots of the study, computed from the files of its runs.

Metrics are those of the report half of the test patients (--half development for choices). Each difference has two
intervals: over patients (BCa bootstrap of the differences averaged over seeds: variation between patients) and over
seeds (Student's t of the seeds' mean differences: variation between trainings).

    python benchmarks/domain_shift/results.py --work study --preset nano --dataset chest_xrays --out docs/results
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from arms import ARMS
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from presets import PRESETS
from scipy.stats import t
from study_data import DATASETS, DEVELOPMENT, REPORT, StudyDataset

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.evaluation.plain_tables import markdown_table, without_nan
from nnunet_cfcl.evaluation.statistics import LEVEL, Draws, patient_sums
from nnunet_cfcl.files.atomic import replace_atomically, write_text_atomically
from nnunet_cfcl.nnunet.label_files import read_label_file

#: Arms without pretraining and phase 3.
BASELINES = tuple(name for name, arm in ARMS.items() if name.startswith("Scratch") and not arm.after)


def rivals(arm: str) -> tuple[str, ...]:
    """The arms that an arm is compared with: those without pretraining; after the same training, all others, and it."""
    before = ARMS[arm].after
    return (*BASELINES, *([before, *(name for name, other in ARMS.items() if other.after == before)] if before else []))


@dataclass(frozen=True)
class Finished:
    """Metrics of one run on the cases of one half.

    Attributes:
        arm: arm of the run.
        seed: seed of the run.
        hash: hash of everything that determines the run.
        values: metric -> (cases,), in the order of `Cases.names`; Dice in percent, a mean over the labels.
        seconds: duration of the training.
    """

    arm: str
    seed: int
    hash: str
    values: dict[str, NDArray[np.float64]]
    seconds: float


@dataclass(frozen=True)
class Cases:
    """Test cases of one half."""

    names: tuple[str, ...]
    patients: tuple[str, ...]
    scanner: NDArray[np.str_]
    group: NDArray[np.str_]


def read_cases(file: Path, half: str, columns: Sequence[str]) -> Cases:
    """From the dataset's test.csv."""
    with open(file, newline="") as table:
        rows = sorted((row for row in csv.DictReader(table) if row["half"] == half), key=lambda row: row["case"])
    groups = [", ".join(row[column] for column in columns) for row in rows]
    return Cases(tuple(row["case"] for row in rows), tuple(row["patient"] for row in rows),
                 np.array([row["scanner"] for row in rows]), np.array(groups))


def read_run(folder: Path, cases: Cases, truth: Path, sided: bool) -> Finished:
    """The figures of a finished run."""
    identity = json.loads((folder / "run.json").read_text())
    with open(folder / "evaluation" / "metrics.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    values = {}
    for figure, column, scale in (("dice", "dice", 100.0), ("hd95", "hd95_mm", 1.0)):
        found: dict[str, list[float]] = {case: [] for case in cases.names}
        for row in rows:
            if row["case"] in found:
                found[row["case"]].append(scale * float(row[column]))
        if missing := [case for case in cases.names if not found[case]]:
            raise UserError(f"{folder} has no figures of {len(missing)} test cases, such as {missing[0]}: delete it "
                            "and run the study again")
        # a missed label has no distance: NaN, and counted separately
        values[figure] = np.array([np.mean(found[case]) for case in cases.names])
    values["missed"] = (~np.isfinite(values["hd95"])).astype(float)
    if sided:
        values |= sides(folder / "predictions", truth, cases.names)
    times = folder / "seconds.txt"
    seconds = sum(float(line) for line in times.read_text().split()) if times.exists() else float("nan")
    return Finished(identity["arm"], identity["seed"], identity["hash"], values, seconds)


def sides(predictions: Path, truth: Path, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Compute the Dice of both lungs as one label in percent, and whether swapped sides fit better (0 or 1)."""
    binary, swapped = [], []
    for name in names:
        found, true = (read_label_file(folder / f"{name}.png").labels for folder in (predictions, truth))
        binary.append(100 * _dice(found > 0, true > 0))
        right = np.mean([_dice(found == label, true == label) for label in (1, 2)])
        crossed = np.mean([_dice(found == 3 - label, true == label) for label in (1, 2)])
        swapped.append(float(crossed > right))
    return {"binary": np.array(binary), "swapped": np.array(swapped)}


def _dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    total = int(one.sum() + other.sum())
    return 2 * int((one & other).sum()) / total if total else 1.0


@dataclass(frozen=True)
class Difference:
    """Difference between an arm and a baseline, seed by seed and case by case.

    Attributes:
        mean: mean over seeds and cases.
        patients: 95 % interval over patients.
        seeds: 95 % interval over seeds.
        p: p value of the sign-flip test over patients.
        of_seeds: mean difference of every seed.
    """

    mean: float
    patients: tuple[float, float]
    seeds: tuple[float, float]
    p: float
    of_seeds: tuple[float, ...]


def difference(arm: Sequence[Finished], baseline: Sequence[Finished], mask: NDArray[np.bool_], cases: Cases,
               draws: Draws) -> Difference | None:
    """Compare the Dice of two arms; None without a common seed."""
    other = {run.seed: run.values["dice"] for run in baseline}
    pairs = np.array([run.values["dice"][mask] - other[run.seed][mask] for run in arm if run.seed in other])
    if not len(pairs):
        return None
    patients = [name for name, member in zip(cases.patients, mask) if member]
    data = patient_sums(pairs.mean(0), patients)
    of_seeds = np.nanmean(pairs, axis=1)
    reach = float(t.ppf(0.5 + LEVEL / 2, len(pairs) - 1) * of_seeds.std(ddof=1) / np.sqrt(len(pairs))) \
        if len(pairs) > 1 else float("nan")
    mean = float(of_seeds.mean())
    return Difference(mean, draws.interval(data), (mean - reach, mean + reach), draws.p_value(data),
                      tuple(float(one) for one in of_seeds))


@dataclass(frozen=True)
class Results:
    """Results of one label budget.

    Attributes:
        dataset: dataset of the study.
        budget: number of labelled cases.
        cases: cases of the half.
        runs: arm -> finished runs, in the order of the preset.
        differences: (arm, baseline, scanner) -> difference of the Dice.
    """

    dataset: StudyDataset
    budget: int
    cases: Cases
    runs: dict[str, list[Finished]]
    differences: dict[tuple[str, str, str], Difference]

    @property
    def scanners(self) -> tuple[str, str]:
        """The labelled cases' own, the other."""
        return self.dataset.own, self.dataset.other

    def mask(self, scanner: str) -> NDArray[np.bool_]:
        """(cases,) of a scanner."""
        return np.asarray(self.cases.scanner == scanner)

    def mean(self, arm: str, figure: str, mask: NDArray[np.bool_]) -> tuple[float, float]:
        """Compute the mean over seeds and cases and the std over seeds, without seeds that have no value."""
        means = [mean for run in self.runs[arm] if np.isfinite(mean := _mean(run.values[figure][mask]))]
        spread = float(np.std(means, ddof=1)) if len(means) > 1 else float("nan")
        return float(np.mean(means)) if means else float("nan"), spread


def collect(root: Path, dataset: StudyDataset, budget: int, arms: Sequence[str], half: str) -> Results:
    """Read every finished run of a label budget."""
    raw = root / "raw" / dataset.folder(budget)
    cases = read_cases(raw / "test.csv", half, dataset.groups)
    runs = {}
    for arm in arms:
        folders = sorted(file.parent.parent for file in root.glob(f"runs/{arm}_{budget}_*/evaluation/metrics.csv"))
        if folders:
            runs[arm] = [read_run(folder, cases, raw / "labelsTs", dataset.sided) for folder in folders]
    draws, differences = Draws(0), {}
    for arm in runs:
        for baseline in dict.fromkeys(rivals(arm)):
            for scanner in (dataset.own, dataset.other):
                found = difference(runs[arm], runs.get(baseline, []), cases.scanner == scanner, cases, draws)
                if arm != baseline and found:
                    differences[arm, baseline, scanner] = found
    return Results(dataset, budget, cases, runs, differences)


def table_of_means(results: Results) -> str:
    """Markdown: a row per arm."""
    groups = sorted(set(results.cases.group))
    own, other = results.scanners
    shown: list[tuple[str, Callable[[str], str]]] = [
        ("runs", lambda arm: str(len(results.runs[arm]))),
        (f"Dice, {own}", lambda arm: _with_spread(results.mean(arm, "dice", results.mask(own)))),
        (f"Dice, {other}", lambda arm: _with_spread(results.mean(arm, "dice", results.mask(other)))),
        ("worst group", lambda arm: _worst(results, arm, groups)),
        (f"HD95, {other}", lambda arm: f"{results.mean(arm, 'hd95', results.mask(other))[0]:.1f}"),
        (f"label missed, {other}", lambda arm: f"{100 * results.mean(arm, 'missed', results.mask(other))[0]:.1f} %"),
    ]
    if results.dataset.sided:
        shown += [
            (f"binary Dice, {other}", lambda arm: f"{results.mean(arm, 'binary', results.mask(other))[0]:.1f}"),
            (f"swapped, {other}", lambda arm: f"{100 * results.mean(arm, 'swapped', results.mask(other))[0]:.1f} %"),
        ]
    shown.append(("minutes", lambda arm: f"{np.mean([run.seconds for run in results.runs[arm]]) / 60:.1f}"))
    rows = [[arm, *(cell(arm) for _, cell in shown)] for arm in results.runs]
    return markdown_table(["arm", *(title for title, _ in shown)], rows)


def table_of_differences(results: Results, baseline: str) -> str:
    """Format a Markdown table with a row per arm and scanner; empty without the baseline."""
    rows = []
    for (arm, against, scanner), one in results.differences.items():
        if against == baseline:
            rows.append([arm, scanner, f"{one.mean:+.2f}", _interval(one.patients), f"{one.p:.3f}",
                         _interval(one.seeds), ", ".join(f"{value:+.2f}" for value in one.of_seeds)])
    columns = [f"minus {baseline}", "scanner", "Dice", "over patients", "p", "over seeds", "every seed"]
    return markdown_table(columns, rows) if rows else ""


def folded(summary: str, table: str) -> str:
    """Markdown: a table folded away under its summary; empty for an empty table."""
    return f'<details markdown="1">\n<summary>{summary}</summary>\n\n{table}\n\n</details>' if table else ""


def _mean(values: NDArray[np.float64]) -> float:
    """Mean over the cases with a value; NaN where no case has one."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def _with_spread(mean: tuple[float, float]) -> str:
    return f"{mean[0]:.2f} ± {mean[1]:.2f}" if np.isfinite(mean[1]) else f"{mean[0]:.2f}"


def _worst(results: Results, arm: str, groups: Sequence[str]) -> str:
    means = {group: results.mean(arm, "dice", results.cases.group == group)[0] for group in groups}
    worst = min(means, key=means.__getitem__)
    return f"{means[worst]:.2f} ({worst})"


def _interval(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:+.2f}, {ends[1]:+.2f}]" if np.isfinite(ends[0]) else "-"


def draw(results: Results, file: Path) -> None:
    """Plot the mean Dice of every seed (left) and the differences to the first arm with both intervals (right)."""
    arms, places = list(results.runs), np.arange(len(results.runs))
    compared = BASELINES[0] if BASELINES[0] in arms else arms[0]
    figure = Figure(figsize=(12, 1.5 + 0.5 * len(arms)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for shift, scanner, colour in ((-0.15, results.dataset.own, "tab:blue"), (0.15, results.dataset.other, "tab:red")):
        for place, arm in zip(places, arms):
            values = [np.nanmean(run.values["dice"][results.mask(scanner)]) for run in results.runs[arm]]
            left.plot(values, [place + shift] * len(values), "o", color=colour, alpha=0.5, markersize=5)
            left.plot([np.mean(values)], [place + shift], "|", color=colour, markersize=16, markeredgewidth=2)
            one = results.differences.get((arm, compared, scanner))
            if one:
                right.plot(one.patients, [place + shift] * 2, color=colour, linewidth=4, alpha=0.4)
                if np.isfinite(one.seeds[0]):
                    right.plot(one.seeds, [place + shift] * 2, color=colour, linewidth=1)
                label = scanner if place == places[-1] else None
                right.plot([one.mean], [place + shift], "o", color=colour, label=label)
    left.set(yticks=places, yticklabels=arms, xlabel="Dice in percent: a dot per seed, the mean as a bar")
    left.invert_yaxis()
    right.axvline(0, color="grey", linewidth=1)
    right.set(xlabel=f"Dice minus that of {compared}: thick over patients, thin over seeds (95 %)")
    right.legend(fontsize=8)
    for panel in (left, right):
        panel.grid(axis="x", alpha=0.3)
    replace_atomically(file, lambda target: figure.savefig(target, dpi=110, format="png"))


def to_json(results: Results) -> dict[str, object]:
    """Collect every value of the tables and the hash of every run."""
    return {
        "labels": results.budget, "cases": len(results.cases.names), "patients": len(set(results.cases.patients)),
        "runs": [{"arm": run.arm, "seed": run.seed, "hash": run.hash, "training_seconds": run.seconds,
                  **{f"{figure}_{scanner}": _mean(values[results.mask(scanner)])
                     for figure, values in run.values.items() for scanner in results.scanners}}
                 for runs in results.runs.values() for run in runs],
        "differences": [{"arm": arm, "against": baseline, "scanner": scanner, "dice": one.mean,
                         "over_patients": list(one.patients), "over_seeds": list(one.seeds), "p": one.p,
                         "of_seeds": list(one.of_seeds)}
                        for (arm, baseline, scanner), one in results.differences.items()],
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="nano", choices=sorted({preset for preset, _ in PRESETS}))
    parser.add_argument("--dataset", default="chest_xrays", choices=tuple(DATASETS))
    parser.add_argument("--work", type=Path, required=True, help="folder of the study")
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), metavar="ARM", help="default: the preset's")
    parser.add_argument("--name", default="", help="added to the names of the files")
    parser.add_argument("--half", default=REPORT, choices=(DEVELOPMENT, REPORT))
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"), help="folder to write to")
    return parser.parse_args()


def main() -> None:
    """Write DATASET_PRESET.json and a plot per label budget, and print the tables."""
    arguments = parse_arguments()
    dataset, preset = DATASETS[arguments.dataset], PRESETS[arguments.preset, arguments.dataset]
    root, name = arguments.work / f"{arguments.preset}_{arguments.dataset}", f"{arguments.dataset}_{arguments.preset}"
    name += f"_{arguments.name}" if arguments.name else ""
    name += "" if arguments.half == REPORT else f"_{arguments.half}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    written = []
    for budget in preset.labels:
        results = collect(root, dataset, budget, arguments.arms or preset.arms, arguments.half)
        if not results.runs:
            continue
        draw(results, arguments.out / f"{name}_{budget}.png")
        against = dict.fromkeys(baseline for _, baseline, _ in results.differences)
        differences = (folded(f"Differences to {baseline}", table_of_differences(results, baseline))
                       for baseline in against)
        tables = (table_of_means(results), *differences)
        print(f"{budget} labelled cases, {len(results.cases.names)} test cases ({arguments.half})\n")
        print("\n\n".join(filter(None, tables)), end="\n\n")
        written.append(to_json(results))
    content = {"half": arguments.half, "settings": preset.settings, "results": written}
    text = json.dumps(without_nan(content), indent=1, allow_nan=False)
    write_text_atomically(arguments.out / f"{name}.json", text + "\n")


if __name__ == "__main__":
    main()
