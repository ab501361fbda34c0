"""Phantom: synthetic patients from a known structural causal model, with exact counterfactuals.

Used for demonstrations and as ground truth in tests and benchmarks. Patients are drawn by seed and index; scanner and
disease are the attributes to intervene on.
"""

from nnunet_cfcl.phantom.dataset import Case, phantom_cases, write_phantom_dataset
from nnunet_cfcl.phantom.scanner import (
    SCANNER_A,
    SCANNER_B,
    SCANNERS,
    AcquisitionNoise,
    ScannerParameters,
    apply_scanner,
    draw_acquisition_noise,
)
from nnunet_cfcl.phantom.scm import (
    INTERVENTIONS,
    Attributes,
    Patient,
    Rendering,
    counterfactual,
    draw_patient,
    intervene,
    render,
)
from nnunet_cfcl.phantom.sheet import contact_sheet

__all__ = [
    "INTERVENTIONS",
    "SCANNERS",
    "SCANNER_A",
    "SCANNER_B",
    "AcquisitionNoise",
    "Attributes",
    "Case",
    "Patient",
    "Rendering",
    "ScannerParameters",
    "apply_scanner",
    "contact_sheet",
    "counterfactual",
    "draw_acquisition_noise",
    "draw_patient",
    "intervene",
    "phantom_cases",
    "render",
    "write_phantom_dataset",
]
