"""The verb ``nnunet_cfcl attributes``: proposes acquisition groups where the scanners are not recorded."""

from __future__ import annotations

import argparse
import csv
import io
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from numpy.typing import NDArray

from nnunet_cfcl.counterfactual.acquisition.groups import (
    CHANCE,
    FEWEST_CASES,
    MOST_GROUPS,
    STABLE,
    AcquisitionGroups,
    describe_acquisition,
    find_acquisition_groups,
)
from nnunet_cfcl.data.attribute_table import ATTRIBUTES, CASE, AttributeTable, read_attribute_table
from nnunet_cfcl.data.cases import open_case
from nnunet_cfcl.data.pool.dataset import PoolDataset, open_pool_dataset
from nnunet_cfcl.data.pool.manifest import pool_folder, read_manifest
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.atomic import replace_atomically, write_text_atomically
from nnunet_cfcl.files.figure_text import names_as_they_are
from nnunet_cfcl.nnunet import lookup
from nnunet_cfcl.runs.workers import PoolWorkers

COLUMN, PICTURE = "acquisition_group", "attributes_discovered.png"
#: Number of central slices of a volume that are described.
SLICES = 32
#: Numbers of cases shown of each group: nearest to its mean, and nearest to another group.
TYPICAL, DOUBTFUL = 3, 2


def add_attributes_parser(subparsers: Any) -> None:
    """Add the verb ``attributes``."""
    parser = subparsers.add_parser("attributes", help="propose acquisition groups (scanners) and write attributes.csv")
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    discover = verbs.add_parser(
        "discover", help="cluster the preprocessed cases by their intensities and noise",
        description=f"Write the column {COLUMN} of attributes.csv in the raw dataset, with a figure beside it. The "
        "groups are a proposal: check the figure, rename the groups and correct wrong entries.")
    discover.add_argument("-d", dest="dataset", required=True, help="dataset name or number")
    discover.add_argument("-c", dest="configuration", help="configuration (default: the first preprocessed one)")
    discover.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
    discover.add_argument("-n", dest="count", type=int, choices=range(2, MOST_GROUPS + 1),
                          help="number of groups, if known (default: as many as can be distinguished)")
    discover.add_argument("-np", dest="processes", type=int, default=2, help="processes (default: %(default)s)")
    discover.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    discover_attributes(arguments.dataset, arguments.configuration, arguments.plans, arguments.processes,
                        arguments.count)
    return 0


def discover_attributes(
    dataset: str | int, configuration: str | None = None, plans: str = "nnUNetPlans", processes: int = 1,
    count: int | None = None, log: Callable[[str], object] = print,
) -> AcquisitionGroups:
    """Group the preprocessed cases of a dataset and its pool; write ``attributes.csv`` if there are groups.

    An existing table keeps its rows and columns. If there is a single group, only the figure is written.

    Args:
        dataset: name or number of the dataset.
        configuration: configuration of the plan; None: the first preprocessed configuration, 3D before 2D.
        plans: name of the plans.
        processes: number of processes that read cases.
        count: number of groups; None: as many as can be distinguished.
        log: function that prints a message.

    Raises:
        UserError: there are no preprocessed cases or fewer than `FEWEST_CASES`, a case is not finite, or the table
            already has the column.
    """
    configuration = configuration or _first_preprocessed(str(dataset), plans)
    target = open_pool_dataset(str(dataset), configuration, plans)
    table = read_attribute_table(target.raw)
    if table is not None and COLUMN in table.columns:
        raise UserError(f"{target.raw / ATTRIBUTES} already has the column {COLUMN}",
                        "rename or delete the column to discover groups again")
    cases = _cases(target)
    if len(cases) < FEWEST_CASES:
        raise UserError(f"expected at least {FEWEST_CASES} cases, found {len(cases)} in {target.preprocessed}",
                        f"write the column by hand, or add images (imagesUn) and run {target.command}")
    with PoolWorkers(target, processes) as workers:
        described = dict(workers.each(_Description, cases, "describing"))
    found = find_acquisition_groups(np.stack([described[case] for case in cases]), count)
    names = [string.ascii_uppercase[group] for group in found.groups]
    replace_atomically(target.raw / PICTURE, lambda file: _plot(found, cases, names, file))
    if found.count > 1:
        groups = dict(zip((case.name for case in cases), names))
        write_text_atomically(target.raw / ATTRIBUTES, _with_column(table, groups))
    _report(found, names, target, log)
    return found


def _first_preprocessed(dataset: str, plans: str) -> str:
    """Name of a configuration with preprocessed cases, else of any, which raises the error when it is opened."""
    name = lookup.find_dataset(dataset)
    plan = lookup.load_plan(name, plans, None)
    known = sorted(plan["configurations"], key=lambda one: (not one.startswith("3d_fullres"), one))
    for configuration in known:
        block = lookup.load_configuration(plan, plans, configuration)
        if lookup.preprocessed_folder(name, block).is_dir():
            return str(configuration)
    return str(known[0])


@dataclass(frozen=True)
class _Case:
    """A preprocessed case, its folder and nnU-Net's class that reads the folder."""

    folder: Path
    storage: type
    name: str

    def middle(self, slices: int) -> NDArray[np.float32]:
        """Read at most ``slices`` central slices, (C, z, Y, X).

        Raises:
            UserError: the file is damaged.
        """
        image = open_case(self.storage(str(self.folder), [self.name]), self.name, {})[0]
        first = max(0, (image.array.shape[1] - slices) // 2)
        return image.read((slice(None), slice(first, first + slices)), np.float32)


def _cases(target: PoolDataset) -> list[_Case]:
    """The labelled cases, and the pool's cases if it is preprocessed."""
    labelled = lookup.preprocessed_cases(target.preprocessed, target.preprocess_command)
    storage = infer_dataset_class(str(target.preprocessed))
    pool = pool_folder(target.preprocessed)
    manifest = read_manifest(pool)
    return [*(_Case(target.preprocessed, storage, case) for case in sorted(labelled)),
            *(_Case(pool, storage, case) for case in (manifest.cases if manifest else ()))]


class _Description:
    """`describe_acquisition` of a case, in the form of a worker process's task, which gets the dataset."""

    def __init__(self, dataset: PoolDataset) -> None:
        pass

    def __call__(self, case: _Case) -> NDArray[np.float64]:
        image = case.middle(SLICES)
        if not np.isfinite(image).all():
            raise UserError(f"case '{case.name}' holds values that are not finite",
                            "list all such cases with `nnunet_cfcl doctor --data`")
        return describe_acquisition(image)


def _report(found: AcquisitionGroups, names: Sequence[str], target: PoolDataset, log: Callable[[str], object]) -> None:
    log(f"number of groups: stability under resampling (accepted from {STABLE:g}), p-value of the gaps (accepted up to "
        f"{CHANCE:g})")
    for number, cut in found.tried.items():
        log(f"  {number}: {cut.stability:.2f}, {cut.chance:.2g}")
    if found.count == 1:
        log(f"all {len(names)} cases form one group, no table written; see {target.raw / PICTURE}, and pass the number "
            "of groups with -n if it is known")
        return
    sizes = ", ".join(f"{name} {names.count(name)}" for name in sorted(set(names)))
    log(f"{len(names)} cases in {found.count} groups ({sizes}), column {COLUMN} of {target.raw / ATTRIBUTES}")
    log(f"the groups are a proposal: check {target.raw / PICTURE}, then rename the groups and correct the table")


def _with_column(table: AttributeTable | None, groups: dict[str, str]) -> str:
    """CSV text of the table with the new column; new cases are appended."""
    known = table or AttributeTable((), {})
    cases = [*known.cases, *sorted(groups.keys() - set(known.cases))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([CASE, *known.columns, COLUMN])
    for row, case in enumerate(cases):
        cells = [column[row] if row < len(known.cases) else "" for column in known.columns.values()]
        writer.writerow([case, *cells, groups.get(case, "")])
    return text.getvalue()


@names_as_they_are
def _plot(found: AcquisitionGroups, cases: Sequence[_Case], names: Sequence[str], file: Path) -> None:
    """Plot the descriptions' principal plane and the central slices of some cases of each group, as PNG."""
    groups, columns = sorted(set(names)), TYPICAL + DOUBTFUL
    figure = Figure(figsize=(5 + 2 * columns, max(4.5, 2.2 * len(groups))), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(1, 2, width_ratios=[5, 2 * columns])
    scatter, panels = parts[0].subplots(), parts[1].subplots(len(groups), columns, squeeze=False)
    for row, group in enumerate(groups):
        members = np.flatnonzero(np.array(names) == group)
        scatter.scatter(*found.plane[members].T, s=12, color=f"C{row}", label=f"{group}: {len(members)} cases")
        for panel in panels[row]:
            panel.set_axis_off()
        for panel, (index, doubtful) in zip(panels[row], _examples(found, members), strict=False):
            picture = cases[index].middle(1)[0, 0]
            low, high = np.quantile(picture, (0.01, 0.99))
            panel.imshow(picture, cmap="gray", vmin=low, vmax=high)
            panel.set_title(f"{group}{', doubtful' if doubtful else ''}\n{cases[index].name}", fontsize=8,
                            color=f"C{row}")
            if doubtful:
                scatter.plot(*found.plane[index], "o", color="black", fillstyle="none", markersize=7)
    if found.count > 1:
        scatter.plot([], [], "o", color="black", fillstyle="none", markersize=7, label="doubtful, shown")
    scatter.set(title="Intensity and noise statistics", xlabel="1st principal component",
                ylabel="2nd principal component")
    parts[0].legend(loc="outside upper center", ncols=2)
    figure.savefig(file, dpi=90, format="png")


def _examples(found: AcquisitionGroups, members: NDArray[np.intp]) -> list[tuple[int, bool]]:
    """Example cases of a group: (index, whether it is doubtful); a single group has no doubtful cases."""
    unsure = DOUBTFUL if found.count > 1 else 0
    points = found.plane[members]
    typical = members[np.argsort(np.linalg.norm(points - points.mean(0), axis=1))[: TYPICAL + DOUBTFUL - unsure]]
    doubtful = members[np.argsort(found.margin[members])[:unsure]]
    return [*((int(case), False) for case in typical), *((int(case), True) for case in doubtful)]
