"""The arms of the study: which trainer, with which settings; everything else is the same for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way to come to a network.

    Attributes:
        trainer: of the plugin.
        settings: dotted settings in which it differs from the preset.
        silver: it learns from silver labels.
        longer: the pretraining's patches are spent on more fine-tuning steps instead.
        like: name of the arm with the very same pretraining, which is taken from there where it is finished.
    """

    trainer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    silver: bool = False
    longer: bool = False
    like: str = ""

    @property
    def needs_generator(self) -> bool:
        """Its counterfactuals are a generator's."""
        return self.settings.get("counterfactual.source") == "generator"


_PLAIN = {
    "SilverSeg": Arm("nnUNetTrainerSilverSeg", silver=True),
    "SimCLR": Arm("nnUNetTrainerSimCLR"),
    "VADeR": Arm("nnUNetTrainerVADeR"),
    "SSDCL": Arm("nnUNetTrainerSSDCL", silver=True),
    "MAE": Arm("nnUNetTrainerMAE"),
}
_COUNTERFACTUAL = {
    "CFSimCLR": Arm("nnUNetTrainerCFSimCLR"),
    "DVDCL": Arm("nnUNetTrainerDVDCL"),
    "MVDCL": Arm("nnUNetTrainerMVDCL"),
    "SDVDCL": Arm("nnUNetTrainerSDVDCL", silver=True),
    "SMVDCL": Arm("nnUNetTrainerSMVDCL", silver=True),
}
_SOURCES = ("acquisition", "generator", "precomputed")


def _with_source(arm: Arm, source: str) -> Arm:
    return Arm(arm.trainer, {**arm.settings, "counterfactual.source": source}, arm.silver, arm.longer)


def _scratch(longer: bool = False, **settings: Any) -> Arm:
    return Arm("nnUNetTrainerCFCLScratch", {"finetune." + key: value for key, value in settings.items()}, longer=longer)


#: Name in the tables -> arm. After the @ stands where the counterfactuals come from; "precomputed" are the true ones of
#: the phantom.
ARMS: dict[str, Arm] = {
    "Scratch": _scratch(),
    "ScratchLong": _scratch(longer=True),
    "ScratchAug": _scratch(acquisition_probability=0.5),
    "ScratchAugLong": _scratch(longer=True, acquisition_probability=0.5),
    **{f"ScratchCF{long}@{source}": _with_source(_scratch(bool(long), counterfactual_probability=0.5), source)
       for source in ("generator", "precomputed") for long in ("", "Long")},
    **_PLAIN,
    **{f"{name}@{source}": _with_source(arm, source) for name, arm in _COUNTERFACTUAL.items() for source in _SOURCES},
    # does pretraining add to the same images in fine-tuning?
    **{f"{name}@{source}{mark}": Arm(
        arm.trainer, {"counterfactual.source": source, f"finetune.{key}_probability": 0.5}, arm.silver,
        like=f"{name}@{source}")
       for name, arm in _COUNTERFACTUAL.items()
       for source, mark, key in (("acquisition", "+Aug", "acquisition"), ("generator", "+CF", "counterfactual"),
                                 ("precomputed", "+CF", "counterfactual"))},
}
