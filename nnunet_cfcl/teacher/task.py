"""Everything that phase 3 depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from nnunet_cfcl.counterfactual.source import CounterfactualSource
from nnunet_cfcl.data.reader import CaseReader
from nnunet_cfcl.runs.epochs import Line, TrainingTask
from nnunet_cfcl.teacher.data import WeakView
from nnunet_cfcl.views import ViewGeometry


@dataclass(frozen=True, kw_only=True)
class TeacherTask(TrainingTask):
    """Everything that phase 3 depends on; see `TrainingTask` for the other fields.

    Attributes:
        reader: reader of the cases.
        groups: the pool's cases, scanner by scanner.
        source: source of the counterfactuals.
        weak: counterfactuals on the labelled scanner; None: there are none.
        geometry: patch size and spacing.
        labelled: nnU-Net's batches of labelled images: ``data`` (N, C, *patch), ``target``, a list under deep
            supervision.
        segmentation_loss: nnU-Net's loss of its network's outputs and a target.
        output_weights: weights of the outputs under deep supervision, from full to lowest resolution.
        heads: names of the classes, background first, or of the regions.
        regions: whether the network predicts regions.
        ignore_label: label of unlabelled voxels; None: there is none.
        expected_shares: (heads,) shares of the manual labels.
        epochs, iterations: length of the phase.
        images_per_step: number of images of the pool in a step, over all ranks.
        compile: wraps the teacher's network, e.g. ``torch.compile``.
        validate: mean Dice of a network on nnU-Net's validation batches; None: it is not measured.
        track: passes every epoch's line on to experiment loggers.
    """

    reader: CaseReader
    groups: Mapping[str, Sequence[str]]
    source: CounterfactualSource
    geometry: ViewGeometry
    labelled: Iterator[Mapping[str, Any]]
    segmentation_loss: Callable[[Any, Any], Tensor]
    output_weights: Sequence[float]
    heads: Sequence[str]
    regions: bool
    expected_shares: Tensor
    epochs: int
    iterations: int
    images_per_step: int
    weak: WeakView | None = None
    ignore_label: int | None = None
    compile: Callable[[nn.Module], nn.Module] = field(default=lambda network: network)
    validate: Callable[[nn.Module], float] | None = None
    track: Callable[[Line], None] = field(default=lambda line: None)
