"""The verb ``nnunet_cfcl attributes``: proposes acquisition groups where nobody wrote the scanners down."""

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
#: Slices of a volume that are described, around its middle.
SLICES = 32
#: Cases of each group that are shown: the nearest to its centre, and the nearest to another group.
TYPICAL, DOUBTFUL = 3, 2


def add_attributes_parser(subparsers: Any) -> None:
    """Adds the verb ``attributes``."""
    parser = subparsers.add_parser("attributes", help="propose acquisition groups (scanners) and write attributes.csv")
    verbs = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    discover = verbs.add_parser(
        "discover", help="cluster the preprocessed cases by their intensities and noise",
        description=f"Writes the column {COLUMN} into attributes.csv of the raw dataset, and a picture beside it. It "
        "is a proposal: look at the picture, rename the groups, mend what is wrong.")
    discover.add_argument("-d", dest="dataset", required=True, help="dataset name or number")
    discover.add_argument("-c", dest="configuration", help="configuration (default: the first preprocessed one)")
    discover.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
    discover.add_argument("-n", dest="count", type=int, choices=range(2, MOST_GROUPS + 1),
                          help="number of groups, where you know it (default: as many as can be told apart)")
    discover.add_argument("-np", dest="processes", type=int, default=2, help="processes (default: %(default)s)")
    discover.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    discover_attributes(arguments.dataset, arguments.configuration, arguments.plans, arguments.processes,
                        arguments.count)
    return 0


def discover_attributes(
    dataset: str | int, configuration: str | None = None, plans: str = "nnUNetPlans", processes: int = 1,
    count: int | None = None, say: Callable[[str], object] = print,
) -> AcquisitionGroups:
    """Group the preprocessed cases of a dataset and its pool; write ``attributes.csv`` if there are groups.

    A table that is there keeps its rows and columns. Nothing but the picture is written if all cases look alike.

    Args:
        dataset: name or number.
        configuration: one of the plan's; None: the first that is preprocessed, 3D before 2D.
        plans: name of the plans.
        processes: cases read at the same time.
        count: number of groups; None: as many as can be told apart.
        say: gets the messages.

    Raises:
        UserError: no preprocessed cases, fewer than `FEWEST_CASES`, one that is not finite, or a table that has the
            column already.
    """
    configuration = configuration or _first_preprocessed(str(dataset), plans)
    target = open_pool_dataset(str(dataset), configuration, plans)
    table = read_attribute_table(target.raw)
    if table is not None and COLUMN in table.columns:
        raise UserError(f"{target.raw / ATTRIBUTES} has the column {COLUMN} already", "rename or delete it to discover "
                        "groups again")
    cases = _cases(target)
    if len(cases) < FEWEST_CASES:
        raise UserError(f"groups are looked for in {FEWEST_CASES} cases or more, found {len(cases)} in "
                        f"{target.preprocessed}", "write the column by hand, or add images (imagesUn) and run "
                        f"{target.command}")
    with PoolWorkers(target, processes) as workers:
        described = dict(workers.each(_Description, cases, "describing"))
    found = find_acquisition_groups(np.stack([described[case] for case in cases]), count)
    names = [string.ascii_uppercase[group] for group in found.groups]
    replace_atomically(target.raw / PICTURE, lambda file: _plot(found, cases, names, file))
    if found.count > 1:
        groups = dict(zip((case.name for case in cases), names))
        write_text_atomically(target.raw / ATTRIBUTES, _with_column(table, groups))
    _report(found, names, target, say)
    return found


def _first_preprocessed(dataset: str, plans: str) -> str:
    """Name of a configuration with preprocessed cases, else of any: what is missing is said when it is opened."""
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
    """A preprocessed case, the folder it lies in and nnU-Net's class that reads that folder."""

    folder: Path
    storage: type
    name: str

    def middle(self, slices: int) -> NDArray[np.float32]:
        """(C, z, Y, X) of at most so many slices around its middle.

        Raises:
            UserError: the file is damaged.
        """
        image = open_case(self.storage(str(self.folder), [self.name]), self.name, {})[0]
        first = max(0, (image.array.shape[1] - slices) // 2)
        return image.read((slice(None), slice(first, first + slices)), np.float32)


def _cases(target: PoolDataset) -> list[_Case]:
    """The labelled cases, and those of the pool where it is preprocessed."""
    labelled = lookup.preprocessed_cases(target.preprocessed, target.preprocess_command)
    storage = infer_dataset_class(str(target.preprocessed))
    pool = pool_folder(target.preprocessed)
    manifest = read_manifest(pool)
    return [*(_Case(target.preprocessed, storage, case) for case in sorted(labelled)),
            *(_Case(pool, storage, case) for case in (manifest.cases if manifest else ()))]


class _Description:
    """`describe_acquisition` of a case; for worker processes, which hand it the dataset."""

    def __init__(self, dataset: PoolDataset) -> None:
        pass

    def __call__(self, case: _Case) -> NDArray[np.float64]:
        image = case.middle(SLICES)
        if not np.isfinite(image).all():
            raise UserError(f"case '{case.name}' holds values that are not finite", "`nnunet_cfcl doctor --data` lists "
                            "every such case")
        return describe_acquisition(image)


def _report(found: AcquisitionGroups, names: Sequence[str], target: PoolDataset, say: Callable[[str], object]) -> None:
    say(f"number of groups: their agreement when resampled (asked for: {STABLE:g} or more), chance of such gaps within "
        f"one group (asked for: {CHANCE:g} or less)")
    for number, cut in found.tried.items():
        say(f"  {number}: {cut.stability:.2f}, {cut.chance:.2g}")
    if found.count == 1:
        say(f"all {len(names)} cases look alike or differ without a gap, no table is written; look at "
            f"{target.raw / PICTURE}, and if you know of groups give their number with -n")
        return
    sizes = ", ".join(f"{name} {names.count(name)}" for name in sorted(set(names)))
    say(f"{len(names)} cases in {found.count} groups ({sizes}), column {COLUMN} of {target.raw / ATTRIBUTES}")
    say(f"this is a proposal: look at {target.raw / PICTURE}, then rename the groups and mend the table")


def _with_column(table: AttributeTable | None, groups: dict[str, str]) -> str:
    """The table with one column more, cases that it did not have at its end."""
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
    """The plane of the descriptions, and the middle slices of some cases of each group, as PNG."""
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
    """(number of a case, whether it is doubtful) of some cases of a group; a single group has no doubtful ones."""
    unsure = DOUBTFUL if found.count > 1 else 0
    points = found.plane[members]
    typical = members[np.argsort(np.linalg.norm(points - points.mean(0), axis=1))[: TYPICAL + DOUBTFUL - unsure]]
    doubtful = members[np.argsort(found.margin[members])[:unsure]]
    return [*((int(case), False) for case in typical), *((int(case), True) for case in doubtful)]
