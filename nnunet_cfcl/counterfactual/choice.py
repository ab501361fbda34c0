"""Which source of counterfactuals a run uses, best first (architecture, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.source import AcquisitionSource, CaseReader, CounterfactualSource, PrecomputedSource
from nnunet_cfcl.counterfactual.store import CounterfactualStore, default_store_root, find_store
from nnunet_cfcl.errors import UserError


def choose_source(
    settings: Settings, reader: CaseReader, preprocessed_folder: str, schemes: Sequence[str], dim: int
) -> CounterfactualSource:
    """The store of precomputed counterfactuals where there is one and it is wanted, else analytic acquisitions.

    Args:
        settings: ``counterfactual.source`` and ``counterfactual.store`` decide.
        reader: the cases of the run.
        preprocessed_folder: nnU-Net's preprocessed data; the dataset's own stores lie beside it.
        schemes: nnU-Net's normalisation scheme of each channel.
        dim: 2 or 3.

    Raises:
        UserError: precomputed counterfactuals are asked for and there is no store, or it does not fit the cases.
    """
    wanted = settings.counterfactual
    if wanted.source == "acquisition":
        return AcquisitionSource(reader, settings.acquisition, schemes, dim)
    folder = Path(wanted.store) if wanted.store else find_store(Path(preprocessed_folder))
    if folder is not None:
        store = CounterfactualStore.open(folder)
        store.check({case: reader.shape(case) for case in reader.cases}, reader.known)
        return PrecomputedSource(store)
    if wanted.source == "precomputed":
        root = default_store_root(Path(preprocessed_folder))
        raise UserError(
            f"counterfactual.source is 'precomputed' but {root} holds no store: make one with `nnunet_cfcl "
            "counterfactuals import`, or name its folder with counterfactual.store"
        )
    return AcquisitionSource(reader, settings.acquisition, schemes, dim)
