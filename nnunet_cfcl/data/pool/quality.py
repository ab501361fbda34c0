"""Quality of predicted labels, from the probabilities that their model saved beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

from nnunet_cfcl.data.pool.check import read_probabilities
from nnunet_cfcl.data.pool.dataset import PoolDataset
from nnunet_cfcl.data.pool.find_cases import RawCase, SilverSource
from nnunet_cfcl.data.pool.silver_labels import voxel_confidence
from nnunet_cfcl.errors import isolated


class LabelQuality(NamedTuple):
    """Quality of a label according to the model that predicted it.

    Attributes:
        value: mean confidence of the voxels of the predicted foreground, 0 to 1; without foreground, of all voxels.
        is_empty: whether there is no foreground.
    """

    value: float
    is_empty: bool


def label_quality(
    probabilities: NDArray[np.floating], labels: NDArray[np.integer], manager: LabelManager
) -> LabelQuality:
    """Measure the quality of a label by the mean of `voxel_confidence`.

    Background is left out because most of it is certain in any image: it would make all qualities equal.

    Args:
        probabilities: (H, *S) as saved by nnU-Net, one map per label or region.
        labels: (*S) integers.
        manager: label manager of the dataset.
    """
    confidence, foreground = voxel_confidence(probabilities, labels, manager), labels != 0
    is_empty = not foreground.any()
    return LabelQuality(float(confidence.mean() if is_empty else confidence[foreground].mean()), is_empty)


@dataclass(frozen=True)
class LabelReading:
    """Read predicted labels and measure their quality; picklable.

    Args:
        dataset: dataset, plan and configuration.
        must_agree: whether a label other than nnU-Net makes of its probabilities counts as cut short.
    """

    dataset: PoolDataset
    must_agree: bool

    def __call__(self, case: RawCase) -> LabelQuality | None:
        """The quality of a case's silver label; None if a file is missing, or was cut short by a kill."""
        quality = None
        # readers raise anything where a file is cut short
        with isolated():
            quality = self._quality(case.silver) if case.silver else None
        return quality

    def _quality(self, silver: SilverSource) -> LabelQuality | None:
        manager = self.dataset.plans.get_label_manager(self.dataset.dataset_json)
        labels = np.asarray(self.dataset.plans.image_reader_writer_class().read_seg(str(silver.label))[0][0])
        probabilities = read_probabilities(silver.probabilities) if silver.probabilities else None
        if probabilities is None or probabilities.shape[1:] != labels.shape:
            return None
        if self.must_agree and not np.array_equal(manager.convert_probabilities_to_segmentation(probabilities), labels):
            return None
        return label_quality(probabilities, labels, manager)
