"""Choice of the counterfactual source of a run, best first (architecture, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.source import AcquisitionSource, CounterfactualSource, PrecomputedSource
from nnunet_cfcl.counterfactual.store import CounterfactualStore, default_store_root, find_store
from nnunet_cfcl.data.reader import CaseReader
from nnunet_cfcl.errors import UserError


def wants_generator(settings: Settings, preprocessed_folder: str | Path, has_attributes: bool) -> bool:
    """Whether counterfactuals come from a generator that is trained on the dataset's attributes.

    Args:
        settings: settings with ``counterfactual.source`` and ``counterfactual.store``.
        preprocessed_folder: nnU-Net's preprocessed data, with imported stores beside it.
        has_attributes: whether the dataset has an attribute table.
    """
    wanted = settings.counterfactual
    if wanted.source != "auto":
        return wanted.source == "generator"
    imported = isinstance(wanted.store, str) or find_store(Path(preprocessed_folder)) is not None
    return has_attributes and not imported


def choose_source(
    settings: Settings, reader: CaseReader, preprocessed_folder: str | Path, schemes: Sequence[str], dim: int
) -> CounterfactualSource:
    """Choose the source of a run without a generator: a store of precomputed counterfactuals, else acquisition.

    Args:
        settings: settings with ``counterfactual.source`` and ``counterfactual.store``.
        reader: reader of the run's cases.
        preprocessed_folder: nnU-Net's preprocessed data, with the dataset's stores beside it.
        schemes: nnU-Net's normalisation scheme of each channel.
        dim: number of spatial axes, 2 or 3.

    Raises:
        UserError: precomputed counterfactuals are required and there is no store, or the store does not match the
            cases.
    """
    wanted = settings.counterfactual
    if wanted.source in ("acquisition", "generator"):
        return AcquisitionSource(reader, settings.acquisition, schemes, dim)
    folder = Path(wanted.store) if isinstance(wanted.store, str) else find_store(Path(preprocessed_folder))
    if folder is not None:
        store = CounterfactualStore.open(folder)
        store.check({case: reader.shape(case) for case in reader.cases}, reader.known)
        return PrecomputedSource(store)
    if wanted.source == "precomputed":
        root = default_store_root(Path(preprocessed_folder))
        raise UserError(
            f"counterfactual.source is 'precomputed' but {root} holds no store",
            "create one with `nnunet_cfcl counterfactuals import`, or set counterfactual.store to its folder",
        )
    return AcquisitionSource(reader, settings.acquisition, schemes, dim)
