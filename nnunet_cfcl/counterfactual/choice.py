"""Which source of counterfactuals a run uses, best first (architecture, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.source import AcquisitionSource, CounterfactualSource, PrecomputedSource
from nnunet_cfcl.counterfactual.store import CounterfactualStore, default_store_root, find_store
from nnunet_cfcl.data.reader import CaseReader
from nnunet_cfcl.errors import UserError


def wants_generator(settings: Settings, preprocessed_folder: str | Path, has_attributes: bool) -> bool:
    """Whether counterfactuals are to come from a generator that is trained on the dataset's attributes.

    Args:
        settings: ``counterfactual.source`` and ``counterfactual.store`` decide.
        preprocessed_folder: nnU-Net's preprocessed data; stores that were brought in lie beside it.
        has_attributes: there is a table of attributes.
    """
    wanted = settings.counterfactual
    if wanted.source != "auto":
        return wanted.source == "generator"
    brought_in = isinstance(wanted.store, str) or find_store(Path(preprocessed_folder)) is not None
    return has_attributes and not brought_in


def choose_source(
    settings: Settings, reader: CaseReader, preprocessed_folder: str | Path, schemes: Sequence[str], dim: int
) -> CounterfactualSource:
    """Without a generator: the store of precomputed counterfactuals where there is one and it is wanted, else analytic
    acquisitions.

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
            f"counterfactual.source is 'precomputed' but {root} holds no store: make one with `nnunet_cfcl "
            "counterfactuals import`, or name its folder with counterfactual.store"
        )
    return AcquisitionSource(reader, settings.acquisition, schemes, dim)
