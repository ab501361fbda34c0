"""The sources of counterfactuals: the crop of the case, drawn reproducibly, in any worker."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from nnunet_cfcl.config import AcquisitionSettings
from nnunet_cfcl.counterfactual import CounterfactualStore
from nnunet_cfcl.counterfactual.source import AcquisitionSource, PrecomputedSource, StoredImages
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.views import CropBox, draw_crop_box

MARGIN = 40
SHAPE = (2, 6, 20, 18)
ALWAYS = AcquisitionSettings(probability=1.0)
Z_SCORE = ["ZScoreNormalization"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def crop_of(array: np.ndarray, box: CropBox) -> np.ndarray:
    """The crop, by padding the whole image (C, Z, Y, X) with zeros far beyond its border."""
    padded = np.pad(array, [(0, 0), *[(MARGIN, MARGIN)] * 3])
    crop = padded[(slice(None), *(slice(MARGIN + s, MARGIN + s + n) for s, n in zip(box.start, box.size, strict=True)))]
    return crop.astype(np.float32) if box.dim == 3 else crop[:, 0].astype(np.float32)


@pytest.fixture
def make_store(tmp_path):
    """Factory: {intervention: {case: array}} -> store."""

    def make(images: dict) -> CounterfactualStore:
        store = CounterfactualStore.create(tmp_path / "store", list(images), "test")
        for name, arrays in images.items():
            for case, array in arrays.items():
                store.write(case, name, array)
        return store

    return make


@pytest.fixture
def volumes() -> dict[str, np.ndarray]:
    """One image per intervention in which no two voxels are equal."""
    count = int(np.prod(SHAPE))
    return {name: np.arange(n * count + 1, (n + 1) * count + 1, dtype=np.float32).reshape(SHAPE)
            for n, name in enumerate(("bright", "dark"))}


@pytest.fixture
def precomputed(make_store, volumes):
    return PrecomputedSource(make_store({name: {"case": array} for name, array in volumes.items()}))


@pytest.fixture
def labelled(make_store):
    """Factory: a source of ``count`` interventions, the n-th of which is n everywhere."""

    def make(count: int) -> PrecomputedSource:
        return PrecomputedSource(make_store({f"cf{n}": {"case": np.full((1, 1, 8, 8), n)} for n in range(count)}))

    return make


def drawn_labels(source: PrecomputedSource, count: int, seed: int) -> list[int]:
    images = source.draw(rng(seed), "case", CropBox((0, 2, 2), (1, 4, 4), (1, 8, 8), 2), count).images
    return [int(label) for label in images[:, 0, 0, 0]]


# ---------------------------------------------------------------- precomputed


@pytest.mark.parametrize(
    ("start", "size", "dim"),
    [
        pytest.param((1, 3, 2), (4, 11, 9), 3, id="inside"),
        pytest.param((-2, 9, -1), (9, 11, 21), 3, id="padded on both sides and at the end only"),
        pytest.param((-3, -4, 0), (11, 24, 1), 3, id="padded before, one column"),
        pytest.param((5, 3, 2), (1, 11, 9), 2, id="the last slice"),
        pytest.param((0, -5, 9), (1, 29, 9), 2, id="a padded slice"),
    ],
)
def test_stored_crops_equal_the_same_box_of_the_padded_stored_image(precomputed, volumes, start, size, dim):
    box = CropBox(start, size, SHAPE[1:], dim)
    images = precomputed.draw(rng(), "case", box, 2).images
    assert images.shape == (2, 2, *size[-dim:]) and images.dtype == torch.float32
    order = ["bright", "dark"] if images.amax(dim=tuple(range(1, dim + 2))).diff() > 0 else ["dark", "bright"]
    for crop, name in zip(images, order, strict=True):
        np.testing.assert_array_equal(crop.numpy(), crop_of(volumes[name], box))


def test_no_intervention_repeats_while_there_are_enough(labelled):
    source = labelled(3)
    for count in (1, 2, 3):
        draws = [drawn_labels(source, count, seed) for seed in range(20)]
        assert all(len(set(labels)) == count for labels in draws)
        assert {label for labels in draws for label in labels} == {0, 1, 2}
    assert len({tuple(drawn_labels(source, 3, seed)) for seed in range(40)}) == 6


@pytest.mark.parametrize("count", [3, 4, 5])
def test_with_fewer_interventions_than_counterfactuals_each_repeats_as_rarely_as_possible(labelled, count):
    source = labelled(2)
    for seed in range(10):
        labels = drawn_labels(source, count, seed)
        assert len(labels) == count
        occurrences = [labels.count(label) for label in (0, 1)]
        assert max(occurrences) - min(occurrences) <= 1
        assert set(labels[:2]) == {0, 1}


def test_stored_crops_are_a_function_of_the_generator_alone_also_after_pickling(labelled):
    source = labelled(4)
    again = pickle.loads(pickle.dumps(source))
    draws = [drawn_labels(source, 4, seed) for seed in range(10)]
    assert draws == [drawn_labels(again, 4, seed) for seed in range(10)]
    assert again.identity() == source.identity()
    assert source.identity()["interventions"] == ["cf0", "cf1", "cf2", "cf3"]


def test_stores_of_another_source_or_preprocessing_have_another_identity(tmp_path):
    """A finished pretraining must not be reused with other images."""
    described = [("a", "", ""), ("b", "", ""), ("a", "plans", ""), ("a", "", "hash")]
    stores = [CounterfactualStore.create(tmp_path / str(n), ["dark"], *words) for n, words in enumerate(described)]
    assert len({json.dumps(PrecomputedSource(store).identity(), sort_keys=True) for store in stores}) == 4


def test_a_nan_in_a_stored_file_is_named_with_case_and_intervention(make_store):
    spoilt = np.ones((1, 4, 12, 12), np.float32)
    spoilt[0, 2, 7, 9] = np.nan
    source = PrecomputedSource(make_store({"dark": {"patient_7": spoilt}}))
    with pytest.raises(UserError, match=r"counterfactual 'dark' of case 'patient_7' holds values that are not finite"):
        source.draw(rng(), "patient_7", CropBox((2, 7, 9), (1, 1, 1), (4, 12, 12), 3), 1)
    for start in [(1, 7, 9), (3, 7, 9), (2, 6, 9), (2, 8, 9), (2, 7, 8), (2, 7, 10)]:
        crop = source.draw(rng(), "patient_7", CropBox(start, (1, 1, 1), (4, 12, 12), 3), 1).images
        assert crop.item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_apply_returns_the_stored_crops_in_the_type_of_the_originals(precomputed, dtype):
    images = torch.randn(3, 2, 5, 4, generator=rng())
    applied = precomputed.apply(torch.zeros(3, 2, 5, 4, dtype=dtype), StoredImages(images), (1.0, 1.0))
    assert applied.dtype == dtype and torch.equal(applied, images.to(dtype))


def test_stored_crops_are_collated_image_by_image(precomputed):
    box = CropBox((0, 0, 0), (1, 20, 18), SHAPE[1:], 2)
    samples = [precomputed.draw(rng(seed), "case", box, 2) for seed in range(3)]
    batch = default_collate(samples)
    assert isinstance(batch, StoredImages) and batch.images.shape == (3, 2, 2, 20, 18)
    assert all(torch.equal(batch.images[n], sample.images) for n, sample in enumerate(samples))


# ---------------------------------------------------------------- acquisition


def acquired(source: AcquisitionSource, originals: torch.Tensor, seed: int, spacing=(1.0, 1.0)) -> torch.Tensor:
    """Counterfactuals of crops that stand for ``case_0``, one each."""
    box = CropBox((0, 0, 0), (1, 24, 24), (1, 40, 44), 2)
    return source.apply(originals, source.draw(rng(seed), "case_0", box, len(originals)), spacing)


@pytest.fixture
def crop(cases_in_memory) -> torch.Tensor:
    """(1, 1, 24, 24) of ``case_0``, without an exact zero."""
    return torch.from_numpy(cases_in_memory().read("case_0", (slice(0, 1), slice(5, 29), slice(6, 30)))[:, 0])[None]


def test_acquisitions_are_reproducible_also_after_pickling(cases_in_memory, crop):
    source = AcquisitionSource(cases_in_memory(), ALWAYS, Z_SCORE, 2)
    copies = [pickle.loads(pickle.dumps(source)), AcquisitionSource(cases_in_memory(), ALWAYS, Z_SCORE, 2)]
    first = acquired(source, crop.expand(3, -1, -1, -1), 5)
    copies.append(pickle.loads(pickle.dumps(source)))
    assert all(torch.equal(acquired(copy, crop.expand(3, -1, -1, -1), 5), first) for copy in copies)
    assert torch.equal(acquired(source, crop.expand(3, -1, -1, -1), 5), first)
    assert not torch.allclose(first[0], first[1]) and not torch.allclose(first[0], crop[0])
    assert not torch.allclose(acquired(source, crop, 6), acquired(source, crop, 5))


def test_the_numbers_drawn_do_not_depend_on_the_place_of_the_crop(cases_in_memory):
    source = AcquisitionSource(cases_in_memory(), ALWAYS, Z_SCORE, 2)
    boxes = [draw_crop_box(rng(seed), (1, 40, 44), (24, 24)) for seed in range(2)]
    one, other = (source.draw(rng(), "case_0", box, 2) for box in boxes)
    assert boxes[0] != boxes[1] and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_padding_stays_zero_under_z_scoring_while_everything_else_changes(cases_in_memory, crop):
    source = AcquisitionSource(cases_in_memory(), ALWAYS, Z_SCORE, 2)
    padded = crop.clone()
    padded[..., :5, :], padded[..., -3:] = 0, 0
    for seed in range(5):
        result = acquired(source, padded, seed)
        assert (result[..., :5, :] == 0).all() and (result[..., -3:] == 0).all()
        assert (result[..., 5:, :-3] != padded[..., 5:, :-3]).float().mean() > 0.9


def test_padding_of_a_volume_stays_zero(cases_in_memory):
    source = AcquisitionSource(cases_in_memory((1, 12, 20, 18)), ALWAYS, Z_SCORE, 3)
    volume = torch.randn(1, 1, 12, 20, 18, generator=rng())
    volume[:, :, :4] = 0
    drawn = source.draw(rng(), "case_1", CropBox((-4, 0, 0), (12, 20, 18), (12, 20, 18), 3), 1)
    result = source.apply(volume, drawn, (2.0, 1.0, 1.0))
    assert (result[:, :, :4] == 0).all() and (result[:, :, 4:] != volume[:, :, 4:]).float().mean() > 0.9


def test_a_voxel_that_is_zero_in_one_channel_only_is_inside_the_patient(cases_in_memory):
    source = AcquisitionSource(cases_in_memory((2, 1, 40, 44)), ALWAYS, Z_SCORE * 2, 2)
    image = torch.randn(1, 2, 24, 24, generator=rng())
    image[:, 0, :12], image[:, :, :3] = 0, 0
    result = acquired(source, image, 0)
    assert (result[:, :, :3] == 0).all()
    assert (result[:, 0, 3:12] != 0).float().mean() > 0.9


def test_without_z_scoring_a_zero_is_an_intensity_like_any_other(cases_in_memory, crop):
    source = AcquisitionSource(cases_in_memory(), ALWAYS, ["NoNormalization"], 2)
    image = crop.clone()
    image[..., :5, :] = 0
    assert (acquired(source, image, 0)[..., :5, :] != 0).float().mean() > 0.9


@pytest.mark.parametrize(
    "voxel", [(0, 0, 0, 0), (0, 8, 299, 279), (0, 4, 150, 140), (0, 0, 255, 255), (0, 8, 44, 24)],
    ids=["first", "last", "middle", "end of the first box", "begin of the last box"],
)
def test_a_nan_that_the_table_of_a_large_case_reads_names_the_case(cases_in_memory, voxel):
    """Tables read five boxes along the diagonal of a case, at most 4 x 256 x 256 voxels each."""
    reader = cases_in_memory((1, 9, 300, 280), count=1)
    reader.arrays["case_0"][voxel] = np.nan
    source = AcquisitionSource(reader, ALWAYS, Z_SCORE, 2)
    with pytest.raises(UserError, match=r"case_0.*not finite"):
        source.draw(rng(), "case_0", CropBox((0, 20, 20), (1, 24, 24), (9, 300, 280), 2), 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_case_that_is_not_finite_is_named_also_as_the_target_of_another_one(cases_in_memory, value):
    reader = cases_in_memory(count=3)
    reader.arrays["case_2"][0, 0, 39, 43] = value
    source = AcquisitionSource(reader, ALWAYS, Z_SCORE, 2)
    box = CropBox((0, 0, 0), (1, 24, 24), (1, 40, 44), 2)
    with pytest.raises(UserError, match=r"case_2.*not finite"):
        source.draw(rng(), "case_0", box, 30)


def test_the_table_of_a_case_is_read_once(cases_in_memory):
    reader, reads = cases_in_memory(count=1), []
    original = reader.read
    reader.read = lambda case, box: reads.append(case) or original(case, box)
    source = AcquisitionSource(reader, ALWAYS, Z_SCORE, 2)
    box = CropBox((0, 0, 0), (1, 24, 24), (1, 40, 44), 2)
    source.draw(rng(), "case_0", box, 2)
    before = len(reads)
    source.draw(rng(1), "case_0", box, 2)
    assert before > 0 and len(reads) == before
