"""Counterfactual images: the same patient, acquired differently."""

from nnunet_cfcl.counterfactual.acquisition.effects import AcquisitionParameters, apply_acquisition, draw_acquisition
from nnunet_cfcl.counterfactual.acquisition.quantiles import intensity_quantiles
from nnunet_cfcl.counterfactual.store import CounterfactualStore, default_store_root, find_store

__all__ = [
    "AcquisitionParameters",
    "CounterfactualStore",
    "apply_acquisition",
    "default_store_root",
    "draw_acquisition",
    "find_store",
    "intensity_quantiles",
]
