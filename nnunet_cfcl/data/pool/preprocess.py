"""Preprocessing of one case of the pool, or one silver label of a training case, with nnU-Net's preprocessor."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetDatasetBlosc2
from numpy.typing import NDArray

from nnunet_cfcl.data.pool.check import read_probabilities
from nnunet_cfcl.data.pool.dataset import PoolDataset
from nnunet_cfcl.data.pool.find_cases import RawCase, SilverSource
from nnunet_cfcl.data.pool.manifest import CaseRecord, pool_folder, silver_folder
from nnunet_cfcl.data.pool.silver_labels import silver_channels, to_preprocessed_grid, voxel_confidence
from nnunet_cfcl.errors import UserError, foreign_errors_as
from nnunet_cfcl.files.atomic import refusals_named
from nnunet_cfcl.files.chunk_checksums import add_checksums
from nnunet_cfcl.nnunet.compatibility import block_layout


def scratch_folder(folder: Path) -> Path:
    """Folder for the files of unfinished cases; only finished files are moved to ``folder``."""
    return folder.with_name(f"{folder.name}.tmp")


@dataclass(frozen=True)
class CasePreprocessing:
    """Preprocess checked cases one at a time; picklable.

    Args:
        dataset: dataset, plan and configuration.
    """

    dataset: PoolDataset

    def __call__(self, case: RawCase) -> CaseRecord:
        """Preprocess a case and write its files, all of them or none.

        Raises:
            UserError: the image is not finite after normalisation, or not on the grid of its preprocessed training
                case.
            RuntimeError: any other failure; the message names the case.
        """
        signature = case.signature()
        with foreign_errors_as(lambda error: RuntimeError(f"case {case.name} could not be preprocessed")):
            image, segmentation, properties = self._preprocessed(case)
            channels = self._silver_channels(case.silver, segmentation[0], properties)
        self._check(case, image, properties)
        files = self._write(case, image, channels, properties)
        silver = case.silver
        return CaseRecord(
            shape=tuple(map(int, image.shape)),
            silver=silver is not None,
            quality=1.0 if silver is None or silver.quality is None else silver.quality,
            quality_given=silver is not None and silver.quality is not None,
            probabilities=silver is not None and silver.probabilities is not None,
            files=files,
            sources=signature,
            content=_checksum(channels) if case.training else _checksum(image, channels),
        )

    def _preprocessed(self, case: RawCase) -> tuple[NDArray[np.float32], NDArray[np.integer], dict[str, Any]]:
        data = self.dataset
        return data.configuration.preprocessor_class(verbose=False).run_case(
            [str(file) for file in case.images], str(case.silver.label) if case.silver else None,
            data.plans, data.configuration, data.dataset_json)

    def _silver_channels(
        self, silver: SilverSource | None, labels: NDArray[np.integer], properties: Mapping[str, Any]
    ) -> NDArray[np.int16]:
        if silver is None:
            return silver_channels(None, None, None, labels.shape)
        confidence = None
        if silver.probabilities is not None:
            confidence = to_preprocessed_grid(self._raw_confidence(silver), properties, labels.shape, self.dataset)
        return silver_channels(labels, confidence, silver.quality, labels.shape)

    def _raw_confidence(self, silver: SilverSource) -> NDArray[np.float32]:
        assert silver.probabilities is not None
        raw, _ = self.dataset.plans.image_reader_writer_class().read_seg(str(silver.label))
        probabilities = read_probabilities(silver.probabilities)
        assert probabilities is not None
        return voxel_confidence(probabilities, raw[0], self.dataset.plans.get_label_manager(self.dataset.dataset_json))

    def _check(self, case: RawCase, image: NDArray[np.float32], properties: Mapping[str, Any]) -> None:
        if not np.isfinite(image).all():
            raise UserError(f"case {case.name} ({case.images[0]}) is not finite after normalisation",
                            f"correct or remove the image, then run {self.dataset.command}")
        if case.training:
            data, _, _, original = self._training_storage()(str(self.dataset.preprocessed), [case.name]).load_case(
                case.name)
            box = [[list(map(int, bounds)) for bounds in found["bbox_used_for_cropping"]]
                   for found in (properties, original) if "bbox_used_for_cropping" in found]
            if tuple(data.shape) != tuple(image.shape) or any(found != box[0] for found in box):
                raise UserError(f"the raw image of training case {case.name} changed since it was preprocessed",
                                f"run {self.dataset.preprocess_command}, then {self.dataset.command}")

    def _training_storage(self) -> Any:
        return infer_dataset_class(str(self.dataset.preprocessed))

    def _write(
        self, case: RawCase, image: NDArray[np.float32], channels: NDArray[np.int16], properties: dict[str, Any]
    ) -> tuple[str, ...]:
        """Write the case's files into the pool's or the silver labels' folder and return their names."""
        folder = (silver_folder if case.training else pool_folder)(self.dataset.preprocessed)
        scratch = scratch_folder(folder) / case.name
        shutil.rmtree(scratch, ignore_errors=True)
        with refusals_named(folder / case.name, scratch / "probe"):
            scratch.mkdir(parents=True)
            if case.training:
                self._save_silver(str(scratch / case.name), channels)
            else:
                self._save_case(str(scratch / case.name), image.astype(np.float32, copy=False), channels, properties)
            for file in scratch.glob("*.b2nd"):
                add_checksums(file)
            return _publish(scratch, folder)

    def _save_case(
        self, target: str, image: NDArray[np.float32], channels: NDArray[np.int16], properties: dict[str, Any]
    ) -> None:
        blocks, chunks = self._layout(image)
        blocks_seg, chunks_seg = self._layout(channels)
        nnUNetDatasetBlosc2.save_case(image, channels, properties, target, chunks=chunks, blocks=blocks,
                                      chunks_seg=chunks_seg, blocks_seg=blocks_seg)

    def _save_silver(self, target: str, channels: NDArray[np.int16]) -> None:
        storage = self._training_storage()
        if issubclass(storage, nnUNetDatasetBlosc2):
            blocks, chunks = self._layout(channels)
            storage.save_seg(channels, target, chunks_seg=chunks, blocks_seg=blocks)
        else:
            storage.save_seg(channels, target)

    def _layout(self, array: NDArray[Any]) -> Any:
        """Blosc2 blocks and chunks that nnU-Net's preprocessing chooses."""
        return block_layout(array.shape, self.dataset.configuration.patch_size, array.itemsize)


def _publish(scratch: Path, folder: Path) -> tuple[str, ...]:
    """Move finished files from ``scratch`` to ``folder`` and remove ``scratch``."""
    files = sorted(scratch.iterdir())
    for file in files:
        with open(file, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(file, folder / file.name)
    scratch.rmdir()
    return tuple(file.name for file in files)


def _checksum(*arrays: NDArray[Any]) -> str:
    value = 0
    for array in arrays:
        value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return f"{value:08x}"
