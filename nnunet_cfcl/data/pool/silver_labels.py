"""Silver labels on the preprocessed voxel grid: two channels, the label map and its confidence in percent."""

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
    """Reads boxes of silver labels of pool and training cases; picklable, safe in worker processes.

    Args:
        preprocessed_folder: ``nnUNet_preprocessed/DatasetXXX/<data_identifier>``.
        min_quality: cases of a lower quality count as unlabelled.

    Attributes:
        cases: the cases with a silver label, of the pool and of the training set, sorted.

    Raises:
        UserError: a manifest cannot be read.
    """

    def __init__(self, preprocessed_folder: str | os.PathLike[str], min_quality: float = 0.0) -> None:
        self._folder = Path(preprocessed_folder)
        pool, silver = (read_manifest(kind(self._folder)) for kind in (pool_folder, silver_folder))
        self._pool = frozenset(pool.with_silver(min_quality)) if pool else frozenset()
        self.cases: tuple[str, ...] = tuple(sorted(self._pool.union(silver.with_silver(min_quality) if silver else ())))
        self._pool_storage, self._training_storage = self._storage(pool_folder(self._folder)), self._silver_storage()
        self._sound: dict[Path, set[int]] = {}

    def _storage(self, folder: Path, *further: str) -> Any:
        cases = [case for case in self.cases if (case in self._pool) == (not further)]
        return infer_dataset_class(str(folder))(str(folder), cases, *further) if cases else None

    def _silver_storage(self) -> Any:
        # nnU-Net reads a cascade's labels from such a folder, beside the training case
        return self._storage(self._folder, str(silver_folder(self._folder)))

    def read(self, case: str, box: tuple[slice, ...]) -> tuple[NDArray[np.int16], NDArray[np.int16]]:
        """Labels and confidence of the spatial ``box`` (three slices inside the case).

        Returns:
            Label map (z, y, x), below 0 where it says nothing, and confidence (z, y, x) in percent, 0 to 100.

        Raises:
            UserError: the file cannot be read, or is not as it was written.
        """
        storage = self._pool_storage if case in self._pool else self._training_storage
        # a pool case's own labels, or those beside the training case
        segmentation = open_case(storage, case, self._sound)[-1]
        labels, confidence = segmentation.read((slice(None), *box), np.int16)
        return labels, confidence


def voxel_confidence(
    probabilities: NDArray[np.floating], labels: NDArray[Any], manager: LabelManager
) -> NDArray[np.float32]:
    """How probable a label map is, voxel by voxel, according to the model that made it.

    With plain labels it is the probability of the label chosen. With regions a label says of every region whether the
    voxel is inside; the confidence is that of the least certain of these statements. For nested regions and a label
    that is background or lies in the innermost region that is exactly the probability of the label, otherwise an upper
    bound of it; a mean over the regions would hide one undecided region among many certain ones.

    Args:
        probabilities: (H, *S) as nnU-Net saves them, one map per label or region.
        labels: (*S) integers; a voxel with the ignore label has confidence 1, as it is never used.
        manager: the dataset's labels.

    Returns:
        (*S) in [0, 1].
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
    """Carries a map from the raw image to its preprocessed case: transposed, cropped, resampled as probabilities are.

    Args:
        volume: (*S) on the raw image's grid, axes as nnU-Net's reader gives them.
        properties: what nnU-Net's preprocessing wrote of the case: ``bbox_used_for_cropping`` and ``spacing``.
        shape: (Z, Y, X) of the preprocessed case.
        dataset: the plan and its configuration.

    Returns:
        (Z, Y, X).

    Raises:
        UserError: the preprocessor of the plan does not say how it cropped, or has another geometry.
    """
    if "bbox_used_for_cropping" not in properties:
        raise UserError(f"the plan's preprocessor {dataset.configuration.preprocessor_name} does not tell the crop "
                        "(bbox_used_for_cropping): take the .npz files away from labelsSilver")
    box = (slice(None), *(slice(int(low), int(high)) for low, high in properties["bbox_used_for_cropping"]))
    current = [properties["spacing"][axis] for axis in dataset.plans.transpose_forward]
    target = list(dataset.configuration.spacing)
    # a 2D configuration keeps the distance of the slices
    target = target if len(target) == len(current) else [current[0], *target]
    cropped = dataset.transposed(volume[None])[box]
    resampled = np.asarray(dataset.configuration.resampling_fn_probabilities(cropped, tuple(shape), current, target))
    if resampled.shape[1:] != tuple(shape):
        raise UserError(f"the plan's preprocessor {dataset.configuration.preprocessor_name} gives shape "
                        f"{tuple(shape)}, its resampling of probabilities {resampled.shape[1:]}: take the .npz files "
                        "away from labelsSilver")
    return resampled[0].astype(np.float32)


def silver_channels(
    labels: NDArray[Any] | None, confidence: NDArray[np.floating] | None, quality: float | None, shape: Sequence[int]
) -> NDArray[np.int16]:
    """The two channels that are stored.

    Args:
        labels: (Z, Y, X) as nnU-Net's preprocessing gives them, with its -1 outside of the image; None without label.
        confidence: (Z, Y, X) in [0, 1], None where no probabilities were saved.
        quality: of the case, in [0, 1], None where none was given.
        shape: (Z, Y, X).

    Returns:
        (2, Z, Y, X): labels, -1 where there are none; confidence x quality in percent, 100 where neither is known.
    """
    channels = np.empty((2, *shape), dtype=np.int16)
    channels[0] = NO_LABEL if labels is None else labels
    product = np.float32(1 if quality is None else quality) * (1 if confidence is None else confidence)
    channels[1] = np.rint(CERTAIN * np.clip(product, 0, 1))
    return channels
