"""nnU-Net's dataset with images of other acquisitions, through nnU-Net's own data loader."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunet_cfcl.config import AcquisitionSettings
from nnunet_cfcl.counterfactual.source import AcquisitionSource, NoParameters, PrecomputedSource
from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.phases.replaced_images import ReplacedImage, ReplacedImages, Replacement

SHAPE = (2, 3, 20, 24)
CASES = ["a", "b"]


class Negated:
    """Every counterfactual is the negative."""

    name = "negative"

    def draw(self, generator, case, box, count):
        return NoParameters()

    def apply(self, originals, drawn, spacing):
        return -originals


@pytest.fixture
def folder(tmp_path) -> str:
    for number, case in enumerate(CASES):
        image = 1 + np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) + 1e4 * number
        mask = (np.arange(np.prod(SHAPE[1:])).reshape(1, *SHAPE[1:]) % 3).astype(np.int8)
        places = {label: np.argwhere(mask == label) for label in (1, 2)}
        nnUNetDatasetBlosc2.save_case(image, mask, {"class_locations": places}, str(tmp_path / case))
    return str(tmp_path)


def load(folder: str) -> nnUNetDatasetBlosc2:
    return nnUNetDatasetBlosc2(folder, list(CASES))


def loader(cases, dim: int) -> nnUNetDataLoader:
    labels = SimpleNamespace(all_labels=[0, 1, 2], has_ignore_label=False)
    patch = (28, 16) if dim == 2 else (2, 28, 16)
    return nnUNetDataLoader(cases, 4, patch, patch, labels, 0.5)


def batch(cases, dim: int) -> dict[str, torch.Tensor]:
    np.random.seed(3)  # noqa: NPY002 - nnU-Net's loader draws from it
    return next(loader(cases, dim))


@pytest.mark.parametrize("dim", [2, 3])
def test_with_probability_1_nnunets_loader_gives_the_replaced_images_with_the_masks_of_the_originals(folder, dim):
    replaced = ReplacedImages(load(folder), [Replacement(Negated(), 1.0)], [1.0] * dim, CASES)
    found = batch(replaced, dim)
    assert (found["data"] <= 0).all() and (found["data"] < 0).any()
    # the same places of the originals, whose intensities name the voxel
    originals = {case: np.asarray(load(folder).load_case(case)[0][:]) for case in CASES}
    masks = {case: np.asarray(load(folder).load_case(case)[1][:]) for case in CASES}
    for image, mask, case in zip(-found["data"], found["target"], found["keys"]):
        inside = image[0] > 0
        voxels = (image[0][inside] - 1 - 1e4 * CASES.index(case)).long().numpy()
        np.testing.assert_array_equal(originals[case].reshape(2, -1)[0][voxels], image[0][inside])
        np.testing.assert_array_equal(masks[case].ravel()[voxels], mask[0][inside])
        # where nnU-Net pads
        assert (image[:, ~inside] == 0).all() and (mask[0][~inside] == -1).all()


def test_with_probability_0_and_for_cases_that_the_source_does_not_know_images_stay(folder):
    never = ReplacedImages(load(folder), [Replacement(Negated(), 0.0)], [1.0, 1.0], CASES)
    unknown = ReplacedImages(load(folder), [Replacement(Negated(), 1.0)], [1.0, 1.0], ["b"])
    for cases, kept in ((never, CASES), (unknown, ["a"])):
        for case in CASES:
            image = np.asarray(cases.load_case(case)[0][(slice(None), slice(0, 1), slice(0, 5), slice(0, 5))])
            assert (image > 0).all() == (case in kept)


def test_images_are_replaced_as_often_as_their_probability_says_and_the_second_takes_of_what_is_left(folder):
    first, second = Negated(), Negated()
    cases = ReplacedImages(load(folder), [Replacement(first, 0.3), Replacement(second, 0.5)], [1.0, 1.0], CASES)
    np.random.seed(0)  # noqa: NPY002
    sources = [getattr(cases.load_case("a")[0], "_source", None) for _ in range(2000)]
    shares = [sum(one is source for one in sources) / 2000 for source in (first, second, None)]
    # three standard errors of a share of 2000
    np.testing.assert_allclose(shares, [0.3, 0.35, 0.35], atol=0.032)


@pytest.mark.parametrize("dim", [2, 3])
def test_an_acquisition_is_that_of_the_pretraining_at_the_same_box(folder, dim):
    reader = PreprocessedCases(folder, CASES)
    source = AcquisitionSource(reader, AcquisitionSettings(probability=1.0), ["ZScoreNormalization"] * 2, dim)
    image = ReplacedImage(load(folder).load_case("a")[0], "a", source, [1.0] * dim, seed=5)
    region = (slice(None), slice(1, 2) if dim == 2 else slice(0, 3), slice(2, 18), slice(0, 24))
    found = image[region]
    original = reader.read("a", region[1:])
    assert found.shape == original.shape and found.dtype == np.float32
    assert np.isfinite(found).all() and not np.allclose(found, original)
    np.testing.assert_array_equal(found, image[region])


def test_precomputed_counterfactuals_are_read_at_the_box(folder, tmp_path):
    store = CounterfactualStore.create(tmp_path / "store", ["scanner"], "test")
    other = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    store.write("a", "scanner", other)
    image = ReplacedImage(load(folder).load_case("a")[0], "a", PrecomputedSource(store), [1.0, 1.0], seed=0)
    region = (slice(None), slice(2, 3), slice(4, 20), slice(3, 11))
    np.testing.assert_array_equal(image[region], other[region])


def test_the_dataset_goes_to_worker_processes(folder):
    reader = PreprocessedCases(folder, CASES)
    source = AcquisitionSource(reader, AcquisitionSettings(), ["ZScoreNormalization"] * 2, 2)
    cases = ReplacedImages(load(folder), [Replacement(source, 1.0)], [1.0, 1.0], CASES)
    there, back = batch(cases, 2), batch(pickle.loads(pickle.dumps(cases)), 2)
    torch.testing.assert_close(there["data"], back["data"], rtol=0, atol=0)
