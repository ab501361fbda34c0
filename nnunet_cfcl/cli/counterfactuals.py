"""The verb ``nnunet_cfcl counterfactuals``: import of external counterfactuals, preprocessed like their originals."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_cfcl.cli.counterfactual_importer import Importer, Job, importer_of
from nnunet_cfcl.counterfactual.store import CounterfactualStore, default_store_root, split_name
from nnunet_cfcl.data.pool.find_cases import POOL_IMAGES
from nnunet_cfcl.data.pool.manifest import check_pool_is_current
from nnunet_cfcl.errors import UserError, listed
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.runs.workers import with_each

SOURCE = "import"


def add_counterfactuals_parser(subparsers: Any) -> None:
    """Add the verb ``counterfactuals`` with its part ``import``."""
    parser = subparsers.add_parser("counterfactuals", help="import counterfactual images from elsewhere")
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True)
    importer = parts.add_parser(
        "import", help="preprocess CASE__INTERVENTION_0000.ext files like their cases, into a store",
        description="Every training case needs one image per intervention, on the voxel grid of its raw image; a case "
        "of the pool (imagesUn) needs one per intervention or none. Run nnUNetv2_plan_and_preprocess first, and "
        "nnunet_cfcl pool if there is a pool. Files that are up to date are skipped.")
    importer.add_argument("-d", dest="dataset", required=True, help="dataset name or number")
    importer.add_argument("-c", dest="configuration", required=True, help="configuration, e.g. 3d_fullres")
    importer.add_argument("-p", dest="plans", default="nnUNetPlans", help="plans (default: %(default)s)")
    importer.add_argument("-i", dest="folder", required=True, type=Path, help="folder with the counterfactual images")
    importer.add_argument("-o", dest="store", type=Path, help="store folder (default: beside the preprocessed data)")
    importer.add_argument("-np", dest="processes", type=int, default=2, help="processes (default: %(default)s)")
    importer.set_defaults(run=_run_import)


def _run_import(arguments: argparse.Namespace) -> int:
    store = import_counterfactuals(arguments.dataset, arguments.configuration, arguments.folder, arguments.plans,
                                   arguments.store, arguments.processes)
    print(f"{store.folder}: interventions {', '.join(store.interventions)}")
    return 0


def import_counterfactuals(
    dataset: str | int,
    configuration: str,
    folder: str | os.PathLike[str],
    plans: str = "nnUNetPlans",
    store_folder: str | os.PathLike[str] | None = None,
    processes: int = 1,
) -> CounterfactualStore:
    """Preprocess raw counterfactuals exactly like their originals and write them into a store.

    Crop, mask of masked normalisation, spacing and shape are the original's; the statistics of the normalisation are
    the counterfactual's own, as for a real image of the other scanner (method 6.9). Interrupted imports are resumed:
    files newer than their images and the preprocessed case are kept.

    Every training case needs every intervention. A case of the pool needs all of them or none: a training with the pool
    rejects a store that lacks its cases, a training without it (``pretrain.data: training``) does not need them.

    Args:
        dataset: name or number of the dataset.
        configuration: nnU-Net's configuration, already preprocessed.
        folder: folder of images named CASE__INTERVENTION_0000.ext (one file per channel), with the dataset's file
            ending.
        plans: name of the plans.
        store_folder: folder of the store; None: :func:`~nnunet_cfcl.counterfactual.store.default_store_root`.
        processes: number of processes that preprocess images.

    Returns:
        The store, complete and checked.

    Raises:
        UserError: a dataset, plan or preprocessed case is missing; the name or shape of a file is wrong; a training
            case, or a case of the pool with any intervention, lacks an intervention; an image is not finite; the pool
            is out of date and images of its cases are given; a process was killed.
    """
    importer = importer_of(str(dataset), configuration, plans)
    images = _find_images(Path(folder), importer.file_ending)
    interventions = sorted({intervention for _, intervention in images})
    target = store_folder or default_store_root(importer.folder) / digest([SOURCE, importer.preprocessing])
    _check_cases(importer, {case for case, _ in images}, Path(folder))
    store = CounterfactualStore.create(target, interventions, SOURCE, importer.folder.name, importer.preprocessing)
    cases = _check_complete(importer, images, store, Path(folder))
    jobs = [Job(case, name, files, store) for (case, name), files in images.items()]
    for _ in with_each(importer, jobs, processes, "importing counterfactuals"):
        pass
    store.check({case: importer.shape(case) for case in cases}, importer.pool)
    return store


def _find_images(folder: Path, ending: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """Map (case, intervention) to its files, one per channel in order."""
    pattern = re.compile(r"(?P<stem>.+)_(?P<channel>\d{4})" + re.escape(ending))
    found: dict[tuple[str, str], dict[int, str]] = {}
    for path in sorted(folder.glob(f"*{ending}")):
        match = pattern.fullmatch(path.name)
        if match is None:
            raise UserError(f"{path} must be named CASE__INTERVENTION_0000{ending} (four digits for the channel)",
                            "rename the file")
        found.setdefault(split_name(match["stem"]), {})[int(match["channel"])] = str(path)
    if not found:
        raise UserError(f"no files CASE__INTERVENTION_0000{ending} in {folder}",
                        f"set -i to the folder of the images, with the dataset's file ending {ending}")
    for (case, name), channels in found.items():
        if sorted(channels) != list(range(len(channels))):
            raise UserError(f"expected channels 0000, 0001, ... of counterfactual '{name}' of case {case} in {folder}, "
                            f"found {sorted(channels)}", "add or rename the files of the channels")
    return {key: tuple(channels[index] for index in sorted(channels)) for key, channels in found.items()}


def _check_cases(importer: Importer, found: set[str], folder: Path) -> None:
    """Reject images of cases that are not preprocessed, or in a pool that is out of date."""
    if unknown := sorted(found - importer.training - importer.pool):
        raise UserError(f"{folder} has counterfactuals of {len(unknown)} cases that are not in {importer.folder} or "
                        f"its pool: {listed(unknown)}",
                        f"preprocess cases of {POOL_IMAGES} with {importer.pool_command}, or correct the file names: "
                        "the name of the case precedes the last '__'")
    if found & importer.pool:
        check_pool_is_current(importer.folder, importer.plans, importer.configuration_name, importer.dataset_json)


def _check_complete(
    importer: Importer, images: Mapping[tuple[str, str], Any], store: CounterfactualStore, folder: Path
) -> list[str]:
    """Cases of the complete store: all training cases, and cases of the pool with any intervention."""
    def has(case: str, name: str) -> bool:
        return (case, name) in images or store.path(case, name).exists()

    begun = {case for case in importer.pool if any(has(case, name) for name in store.interventions)}
    cases = sorted(importer.training | begun)
    if missing := [f"{case}__{name}" for case in cases for name in sorted(store.interventions) if not has(case, name)]:
        raise UserError(f"{folder} lacks {len(missing)} counterfactuals: {listed(missing)}",
                        "add them: every training case needs every intervention, and so does a case of the pool with "
                        "any intervention")
    return cases
