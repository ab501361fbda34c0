"""Arms of the study: trainer and settings; everything else is the same for all arms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Arm:
    """Arm of the study.

    Attributes:
        trainer: trainer of the plugin.
        settings: dotted settings that differ from the preset.
        silver: whether the arm uses silver labels.
        longer: whether the compute of the pretraining is spent on more fine-tuning steps instead.
        like: arm with the same pretraining, which is reused where it is finished.
        times: factor of the number of fine-tuning epochs.
        after: arm with whose weights this one begins; its phases 0 to 2 are those of that arm.
        offline: the pool, labelled once by the model of ``after``, is added to the labelled images, on which the
            training goes on at the cost of phase 3 (one round of offline pseudo-labels).
    """

    trainer: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    silver: bool = False
    longer: bool = False
    like: str = ""
    times: int = 1
    after: str = ""
    offline: bool = False

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
#: Cost of phase 3 relative to the short fine-tuning, which gives it as many steps.
PHASE_3_COST = 7 / 3
_SOURCES = ("acquisition", "generator", "precomputed")


def _with_source(arm: Arm, source: str) -> Arm:
    return Arm(arm.trainer, {**arm.settings, "counterfactual.source": source}, arm.silver, arm.longer)


def _later(name: str, base: Arm) -> dict[str, Arm]:
    """Phase 3 after an arm, its rivals of equal cost, and changes of one thing at a time."""
    def after(**settings: Any) -> Arm:
        changed = {"budget": PHASE_3_COST, **settings}
        own = {key if "." in key else f"teacher.{key}": value for key, value in changed.items()}
        return Arm("nnUNetTrainerCFCLTeacher", {"counterfactual.source": "acquisition", **base.settings, **own},
                   after=name)

    return {
        f"{name}+Teacher": after(),
        f"{name}+Continued": after(weight=0),
        f"{name}+FixMatch": after(strong_view="intensity"),
        f"{name}+MeanTeacher": after(strong_view="noise", mix_probability=0, confidence=0.5),
        f"{name}+PseudoLabels": replace(after(weight=0), offline=True),
        **{f"{name}+Teacher{change}": after(**settings) for change, settings in _ABLATIONS.items()},
    }


#: Changes of one thing at a time in phase 3, tried on the development half.
_ABLATIONS: dict[str, dict[str, Any]] = {
    "NoMask": {"confidence": 0.5}, "Strict": {"confidence": 0.95}, "NoMix": {"mix_probability": 0},
    "NoPaste": {"paste_labelled": False}, "Noise": {"strong_view": "noise"}, "Student": {"result": "student"},
    "ConstantDecay": {"rising_decay": False}, "LowRate": {"lr_factor": 0.2},
    "AcquisitionOnly": {"intensity_probability": 0.0}, "AllIntensity": {"intensity_probability": 1.0},
}


def _scratch(longer: bool = False, **settings: Any) -> Arm:
    return Arm("nnUNetTrainerCFCLScratch", {"finetune." + key: value for key, value in settings.items()}, longer=longer)


#: Name in the tables -> arm. The source of the counterfactuals follows the @; "precomputed" are the phantom's true
#: counterfactuals.
ARMS: dict[str, Arm] = {
    "Scratch": _scratch(),
    "ScratchLong": _scratch(longer=True),
    "ScratchAug": _scratch(acquisition_probability=0.5),
    "ScratchAugLong": _scratch(longer=True, acquisition_probability=0.5),
    "ScratchAug5x": Arm("nnUNetTrainerCFCLScratch", {"finetune.acquisition_probability": 0.5}, times=5),
    **{f"ScratchCF{long}@{source}": _with_source(_scratch(bool(long), counterfactual_probability=0.5), source)
       for source in ("generator", "precomputed") for long in ("", "Long")},
    **_PLAIN,
    **{f"{name}@{source}": _with_source(arm, source) for name, arm in _COUNTERFACTUAL.items() for source in _SOURCES},
    # whether pretraining improves on the same images in fine-tuning
    **{f"{name}@{source}{mark}": Arm(
        arm.trainer, {"counterfactual.source": source, f"finetune.{key}_probability": 0.5}, arm.silver,
        like=f"{name}@{source}")
       for name, arm in _COUNTERFACTUAL.items()
       for source, mark, key in (("acquisition", "+Aug", "acquisition"), ("generator", "+CF", "counterfactual"),
                                 ("precomputed", "+CF", "counterfactual"))},
}
ARMS |= {name: arm for base in ("ScratchAug5x", "DVDCL@acquisition+Aug", "DVDCL@generator+CF")
         for name, arm in _later(base, ARMS[base]).items()}
