"""Silver labels on the preprocessed voxel grid, stored as two channels: label map and confidence in percent."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

from nnunet_cfcl.data.cases import open_case
from nnunet_cfcl.data.pool.dataset import PoolDataset
from nnunet_cfcl.data.pool.manifest import pool_folder, read_manifest, silver_folder
from nnunet_cfcl.errors import UserError

NO_LABEL = -1
CERTAIN = 100


class SilverLabels:
    """Reader of boxes of silver labels of pool and training cases; picklable, safe in worker processes.

    Args:
        preprocessed_folder: ``nnUNet_preprocessed/DatasetXXX/<data_identifier>``.
        min_quality: minimum quality in [0, 1]; cases below it count as unlabelled.

    Attributes:
        cases: cases with a silver label, of the pool and of the training set, sorted.

    Raises:
        UserError: a manifest cannot be read.
    """

    def __init__(self, preprocessed_folder: str | os.PathLike[str], min_quality: float = 0.0) -> None:
        self._folder = Path(preprocessed_folder)
        pool, silver = (read_manifest(kind(self._folder)) for kind in (pool_folder, silver_folder))
        self._pool = frozenset(pool.with_silver(min_quality)) if pool else frozenset()
        self.cases: tuple[str, ...] = tuple(sorted(self._pool.union(silver.with_silver(min_quality) if silver else ())))
        self._pool_storage, self._training_storage = self._storage(pool_folder(self._folder)), self._silver_storage()
        self._verified: dict[Path, set[int]] = {}

    def _storage(self, folder: Path, *further: str) -> Any:
        cases = [case for case in self.cases if (case in self._pool) == (not further)]
        return infer_dataset_class(str(folder))(str(folder), cases, *further) if cases else None

    def _silver_storage(self) -> Any:
        # opened like the previous stage's labels of a cascade, which nnU-Net reads from a second folder
        return self._storage(self._folder, str(silver_folder(self._folder)))

    def read(self, case: str, box: tuple[slice, ...]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """Read labels and confidence of the spatial ``box`` (three slices inside the case).

        Returns:
            Label map (z, y, x), negative where unknown, and confidence (z, y, x) in percent, 0 to 100.

        Raises:
            UserError: the file cannot be read or is damaged.
        """
        storage = self._pool_storage if case in self._pool else self._training_storage
        # the labels of a pool case, or the second folder's labels of a training case
        segmentation = open_case(storage, case, self._verified)[-1]
        labels, confidence = segmentation.read((slice(None), *box), np.int16)
        return labels, confidence


def voxel_confidence(
    probabilities: NDArray[np.floating], labels: NDArray[Any], manager: LabelManager
) -> NDArray[np.float32]:
    """Probability of a label map, voxel by voxel, according to the model that predicted it.

    With plain labels this is the probability of the chosen label. With regions, a label states for every region whether
    the voxel is inside; the confidence is that of the least certain statement. For nested regions it equals the
    probability of the label if that is background or in the innermost region, otherwise it is an upper bound. A mean
    over the regions would hide one uncertain region among many certain ones.

    Args:
        probabilities: (H, *S) as saved by nnU-Net, one map per label or region.
        labels: (*S) integers; voxels with the ignore label get confidence 1, as they are never used.
        manager: label manager of the dataset.

    Returns:
        Confidence (*S) in [0, 1].
    """
    if manager.has_regions:
        confidence = np.ones(labels.shape, dtype=np.float32)
        for probability, region in zip(probabilities, manager.foreground_regions):
            inside = np.isin(labels, region)
            np.minimum(confidence, np.where(inside, probability, 1 - probability), out=confidence)
    else:
        confidence = np.zeros(labels.shape, dtype=np.float32)
        for probability, label in zip(probabilities, manager.all_labels):
            np.copyto(confidence, probability, where=labels == label)
    if manager.has_ignore_label:
        confidence[labels == manager.ignore_label] = 1
    return np.clip(confidence, 0, 1)


def to_preprocessed_grid(
    volume: NDArray[np.float32], properties: Mapping[str, Any], shape: Sequence[int], dataset: PoolDataset
) -> NDArray[np.float32]:
    """Transpose, crop and resample a map from the raw image's grid to the preprocessed case's, as for probabilities.

    Args:
        volume: (*S) on the raw image's grid, in the axis order of nnU-Net's reader.
        properties: properties of the case from nnU-Net's preprocessing: ``bbox_used_for_cropping`` and ``spacing``.
        shape: (Z, Y, X) of the preprocessed case.
        dataset: dataset, plan and configuration.

    Returns:
        The map (Z, Y, X).

    Raises:
        UserError: the plan's preprocessor does not report its crop, or its resampling gives another shape.
    """
    if "bbox_used_for_cropping" not in properties:
        raise UserError(f"the plan's preprocessor {dataset.configuration.preprocessor_name} does not report its crop "
                        "(bbox_used_for_cropping), which probabilities need", "remove the .npz files from labelsSilver")
    box = (slice(None), *(slice(int(low), int(high)) for low, high in properties["bbox_used_for_cropping"]))
    current = [properties["spacing"][axis] for axis in dataset.plans.transpose_forward]
    target = list(dataset.configuration.spacing)
    # a 2D configuration keeps the spacing between slices
    target = target if len(target) == len(current) else [current[0], *target]
    cropped = dataset.transposed(volume[None])[box]
    resampled = np.asarray(dataset.configuration.resampling_fn_probabilities(cropped, tuple(shape), current, target))
    if resampled.shape[1:] != tuple(shape):
        raise UserError(f"the plan's preprocessor {dataset.configuration.preprocessor_name} gives shape "
                        f"{tuple(shape)}, but its resampling of probabilities {resampled.shape[1:]}",
                        "remove the .npz files from labelsSilver")
    return resampled[0].astype(np.float32)


def silver_channels(
    labels: NDArray[Any] | None, confidence: NDArray[np.floating] | None, quality: float | None, shape: Sequence[int]
) -> NDArray[np.int16]:
    """Stack label map and confidence into the two channels that are stored.

    Args:
        labels: preprocessed label map (Z, Y, X), -1 outside of the image; None without a label.
        confidence: confidence (Z, Y, X) in [0, 1]; None without saved probabilities.
        quality: quality of the case in [0, 1]; None if not given.
        shape: (Z, Y, X) of the preprocessed case.

    Returns:
        (2, Z, Y, X) int16: labels, -1 where unknown; confidence x quality in percent, 100 where neither is known.
    """
    channels = np.empty((2, *shape), dtype=np.int16)
    channels[0] = NO_LABEL if labels is None else labels
    product = np.float32(1 if quality is None else quality) * (1 if confidence is None else confidence)
    channels[1] = np.rint(CERTAIN * np.clip(product, 0, 1))
    return channels
