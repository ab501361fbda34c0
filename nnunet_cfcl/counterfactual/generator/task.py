"""The task of training a generator, which its loop, its fine-tuning and its pictures read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nnunet_cfcl.counterfactual.generator.data import Cells
from nnunet_cfcl.counterfactual.generator.generator import IntensityScale
from nnunet_cfcl.counterfactual.generator.hvae_sizes import HVAESizes
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding
from nnunet_cfcl.data.reader import CaseReader
from nnunet_cfcl.runs.epochs import TrainingTask


@dataclass(frozen=True, kw_only=True)
class GeneratorTask(TrainingTask):
    """Everything that the training of a generator depends on; see `TrainingTask` for the other fields.

    Attributes:
        reader: reader of the cases.
        cells: case -> attribute -> value.
        training, validation: cases; no patient is in both.
        coding: the encoding of the attributes.
        interventions: the changes of attributes to be learned.
        scale: the scale of the intensities.
        sizes: the sizes of the model.
        images_per_pass: number of images whose graph fits into memory.
        spacing: (D,) in mm, for the pictures.
    """

    reader: CaseReader
    cells: Mapping[str, Cells]
    training: Sequence[str]
    validation: Sequence[str]
    coding: AttributeCoding
    interventions: Sequence[Intervention]
    scale: IntensityScale
    sizes: HVAESizes
    images_per_pass: int
    spacing: Sequence[float]

    @property
    def changed(self) -> list[Attribute]:
        """The attributes that some intervention changes, each once."""
        return list(dict.fromkeys(attribute for one in self.interventions for attribute in one.attributes))
