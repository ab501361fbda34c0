"""Preprocessing of external counterfactuals exactly like their originals."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from numpy.typing import NDArray

from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.data.pool.find_cases import find_raw_pool
from nnunet_cfcl.data.pool.manifest import pool_command, pool_folder, preprocessing_digest, read_manifest
from nnunet_cfcl.errors import UserError


@dataclass(frozen=True)
class Job:
    """One counterfactual to import: its case, intervention, image files (one per channel) and store."""

    case: str
    intervention: str
    files: tuple[str, ...]
    store: CounterfactualStore


@dataclass(frozen=True)
class Importer:
    """Preprocess one counterfactual at a time; picklable.

    Attributes:
        training: the preprocessed training cases, in ``folder``.
        pool: the preprocessed cases of the pool, in its folder.
        originals: raw images and label of every case, see `_originals`; None if the normalisation is not masked.
    """

    folder: Path
    training: frozenset[str]
    pool: frozenset[str]
    plans: PlansManager
    configuration_name: str
    dataset_json: dict[str, Any]
    originals: Mapping[str, Mapping[str, Any]] | None

    @property
    def configuration(self) -> ConfigurationManager:
        return self.plans.get_configuration(self.configuration_name)

    @property
    def file_ending(self) -> str:
        return str(self.dataset_json["file_ending"])

    @property
    def pool_command(self) -> str:
        return pool_command(self.folder.parent.name, self.configuration_name, self.plans.plans_name)

    @property
    def preprocessing(self) -> str:
        return preprocessing_digest(self.plans, self.configuration)

    def __call__(self, job: Job) -> None:
        data, _, _, properties = self._load(job.case)
        if not self._is_current(job, tuple(data.shape)):
            array = self._preprocessed(job, tuple(data.shape), properties)
            # cases in nnU-Net's old npz format have no blocks
            chunks, blocks = getattr(data, "chunks", None), getattr(data, "blocks", None)
            job.store.write(job.case, job.intervention, array, chunks, blocks)

    def shape(self, case: str) -> tuple[int, ...]:
        """Shape (C, Z, Y, X) of the preprocessed case."""
        return tuple(self._load(case)[0].shape)

    def _home(self, case: str) -> Path:
        """Folder of the preprocessed original."""
        return pool_folder(self.folder) if case in self.pool else self.folder

    def _load(self, case: str) -> Any:
        home = str(self._home(case))
        return infer_dataset_class(home)(home, [case]).load_case(case)

    def _is_current(self, job: Job, shape: tuple[int, ...]) -> bool:
        written = job.store.path(job.case, job.intervention)
        sources = [*job.files, str(self._home(job.case) / f"{job.case}.pkl")]
        if not written.exists() or any(os.path.getmtime(path) > written.stat().st_mtime for path in sources):
            return False
        try:
            return job.store.shape(job.case, job.intervention) == shape
        except UserError:
            return False

    def _preprocessed(self, job: Job, shape: tuple[int, ...], properties: Mapping[str, Any]) -> NDArray[np.float32]:
        what = f"counterfactual '{job.intervention}' of case {job.case}"
        data = self._read(job.files)
        expected = (shape[0], *properties["shape_before_cropping"])
        if data.shape != expected:
            raise UserError(f"{what} has shape {data.shape}, expected {expected} like its case (channels first, axes "
                            "in the plan's order)", "resample it to the voxel grid of the case's raw image")
        box = (slice(None), *(slice(int(low), int(high)) for low, high in properties["bbox_used_for_cropping"]))
        data = data[box]
        mask = self._nonzero_mask(job.case, box, data.shape[1:])
        preprocessor = self.configuration.preprocessor_class(verbose=False)
        statistics = self.plans.foreground_intensity_properties_per_channel
        data = preprocessor._normalize(data, mask, self.configuration, statistics)
        data = self.configuration.resampling_fn_data(data, shape[1:], *self._spacings(properties))
        array = np.asarray(data, dtype=np.float32)
        if not np.isfinite(array).all():
            raise UserError(f"{what} ({', '.join(job.files)}) is not finite after normalisation",
                            "create the image again")
        return array

    def _read(self, files: Sequence[str]) -> NDArray[np.float32]:
        """Read images as float32 (C, *S), axes in the plan's order."""
        data, _ = self.plans.image_reader_writer_class().read_images(list(files))
        return data.astype(np.float32).transpose([0, *[axis + 1 for axis in self.plans.transpose_forward]])

    def _nonzero_mask(self, case: str, box: tuple[slice, ...], shape: tuple[int, ...]) -> NDArray:
        """Mask (1, *S) for masked normalisation: 0 inside, -1 outside of the original's nonzero region."""
        if self.originals is None:
            return np.zeros((1, *shape), dtype=np.int8)
        if case not in self.originals:
            raise UserError(f"the raw images of case {case}, which masked normalisation needs, are missing",
                            "restore them in nnUNet_raw")
        original = self.originals[case]
        segmentation = self._read_label(original["label"]) if original["label"] else None
        _, mask, bounds = crop_to_nonzero(self._read(original["images"]), segmentation)
        if tuple(slice(int(low), int(high)) for low, high in bounds) != box[1:]:
            again = self.pool_command if case in self.pool else "nnUNetv2_preprocess"
            raise UserError(f"the raw images of case {case} changed after preprocessing", f"run {again} again")
        return mask

    def _read_label(self, file: str) -> NDArray:
        """Read a label file (1, *S), axes in the plan's order."""
        segmentation, _ = self.plans.image_reader_writer_class().read_seg(file)
        return segmentation.transpose([0, *[axis + 1 for axis in self.plans.transpose_forward]]).copy()

    def _spacings(self, properties: Mapping[str, Any]) -> tuple[list[float], list[float]]:
        """Current and target spacing in mm; in 2D configurations the slice distance is kept."""
        current = [properties["spacing"][axis] for axis in self.plans.transpose_forward]
        target = list(self.configuration.spacing)
        return current, target if len(target) == len(current) else [current[0], *target]


def importer_of(dataset: str, configuration_name: str, plans_name: str) -> Importer:
    """Importer of a dataset, from its plan, preprocessed cases and pool."""
    name = _dataset_name(dataset)
    base = _environment_folder("nnUNet_preprocessed") / name
    plans_file = base / f"{plans_name}.json"
    if not plans_file.is_file():
        raise UserError(f"no plan {plans_file}",
                        f"run nnUNetv2_plan_and_preprocess -d {dataset}, or choose other plans with -p")
    plans = PlansManager(str(plans_file))
    if configuration_name not in plans.available_configurations:
        raise UserError(f"{plans_file} has the configurations {', '.join(plans.available_configurations)}, found "
                        f"'{configuration_name}'", "choose one of them with -c")
    configuration = plans.get_configuration(configuration_name)
    folder = base / configuration.data_identifier
    if not folder.is_dir():
        raise UserError(f"no preprocessed data {folder}",
                        f"run nnUNetv2_preprocess -d {dataset} -c {configuration_name}")
    _check_preprocessor(configuration)
    dataset_json = load_json(str(base / "dataset.json"))
    training = frozenset(infer_dataset_class(str(folder)).get_identifiers(str(folder)))
    manifest = read_manifest(pool_folder(folder))
    pool = frozenset(manifest.cases if manifest else ()) - training
    originals = _originals(name, dataset_json) if any(configuration.use_mask_for_norm) else None
    return Importer(folder, training, pool, plans, configuration_name, dataset_json, originals)


def _dataset_name(dataset: str) -> str:
    try:
        return maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"no unique dataset '{dataset}': {error}", "choose a dataset of nnUNet_raw with -d") from error


def _environment_folder(variable: str) -> Path:
    if not (value := os.environ.get(variable)):
        raise UserError(f"the environment variable {variable} is not set", f"set {variable}, which nnU-Net needs too")
    return Path(value)


def _check_preprocessor(configuration: ConfigurationManager) -> None:
    # an overridden run_case_npy may change images in any way, which the import cannot reproduce
    if configuration.preprocessor_class.run_case_npy is not DefaultPreprocessor.run_case_npy:
        raise UserError(f"the plan's preprocessor {configuration.preprocessor_name} overrides run_case_npy; the import "
                        "supports nnU-Net's own only", "fill the store with CounterfactualStore.write")


def _originals(name: str, dataset_json: dict[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Raw images and label of every case, which determine the mask of the originals' normalisation.

    The label is the silver label in the pool, None without one.
    """
    raw = _environment_folder("nnUNet_raw") / name
    if not raw.is_dir():
        raise UserError(f"no raw dataset {raw}, whose images masked normalisation needs",
                        "restore it, or set nnUNet_raw to its folder")
    pool = {case.name: {"images": [str(file) for file in case.images],
                        "label": str(case.silver.label) if case.silver else None}
            for case in find_raw_pool(raw, dataset_json).cases if not case.training}
    # the function expands paths in place
    return {**pool, **get_filenames_of_train_images_and_targets(str(raw), copy.deepcopy(dataset_json))}
