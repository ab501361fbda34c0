"""Data of the generator: patches, attributes, and the split by patient."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.counterfactual.acquisition.quantiles import intensity_quantiles
from nnunet_cfcl.counterfactual.generator.data import (
    GeneratorDataset,
    case_quantiles,
    draw_patches,
    split_patients,
)
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.runs.batches import batches
from tests.conftest import CasesInMemory

SCANNER, DISEASE = Attribute("scanner", "categorical", ("A", "B", "C")), Attribute("disease", "binary", ("no", "yes"))
AGE = Attribute("age", "continuous", (), 60.0, 10.0)
CODING = AttributeCoding((SCANNER, DISEASE, AGE))
#: Where every attribute lies in the encoding.
PLACES = {"scanner": slice(0, 4), "disease": slice(4, 6), "age": slice(6, 8)}
INTERVENTIONS = (Intervention((SCANNER,)), Intervention((DISEASE,)), Intervention((SCANNER, DISEASE)))
IMAGES_PER_STEP = 4


def cells_of(count: int) -> dict[str, dict[str, str]]:
    return {f"case_{n}": {"scanner": "ABC"[n % 3], "disease": ("no", "yes")[n % 2], "age": str(50 + n), "remark": "x"}
            for n in range(count)}


def numbered(count: int, shape: tuple[int, ...]) -> CasesInMemory:
    """No two voxels of any two cases are equal, and none is zero."""
    size = int(np.prod(shape))
    return CasesInMemory({f"case_{n}": 1.0 + n * size + np.arange(size).reshape(shape) for n in range(count)})


def dataset(reader, patch=(12, 10), seed=0, steps=20, interventions=INTERVENTIONS, cells=None, **settings):
    chosen = {"images_per_step": IMAGES_PER_STEP, "parents_dropped": 0.0, **settings}
    resolved = resolve_settings({f"generator.{name}": value for name, value in chosen.items()})
    cells = cells_of(len(reader.cases)) if cells is None else cells
    return GeneratorDataset(
        reader, cells, reader.cases, CODING, interventions, patch, resolved.generator, seed, steps)


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------- samples


@pytest.mark.parametrize(("shape", "patch"), [((2, 1, 20, 18), (12, 10)), ((1, 5, 20, 18), (12, 10)),
                                              ((1, 9, 14, 12), (8, 8, 8)), ((1, 4, 6, 5), (8, 8, 8))])
def test_samples_have_the_shape_of_the_patch_whatever_that_of_the_case(shape, patch):
    sample = dataset(numbered(5, shape), patch)[7]
    assert sample.image.shape == (shape[0], *patch) and sample.image.dtype == torch.float32
    assert sample.parents.shape == sample.others.shape == (CODING.width,)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_its_samples_one_by_one_in_any_number_of_workers(workers):
    data = dataset(numbered(5, (1, 1, 20, 18)), parents_dropped=0.3, mirror_axes=[0, 1])
    indices = [3, 0, 17, 4, 42, 41, 9]
    found = list(batches(data, indices, 3, workers))
    assert [len(batch.image) for batch in found] == [3, 3, 1]
    for batch, part in zip(found, ([3, 0, 17], [4, 42, 41], [9]), strict=True):
        assert same(batch, default_collate([data[index] for index in part]))


def test_samples_depend_on_the_seed_the_step_and_the_image_alone():
    reader = numbered(5, (1, 1, 20, 18))
    first, again = dataset(reader, parents_dropped=0.3), dataset(reader, parents_dropped=0.3, steps=500)
    for index in (11, 3, 0):
        assert same(first[index], again[index])
    assert not same(first[3], dataset(reader, parents_dropped=0.3, seed=1)[3])
    assert len(first) == 20 * IMAGES_PER_STEP and len(again) == 500 * IMAGES_PER_STEP


def test_all_cases_have_their_turn_in_every_round_in_an_order_of_its_own():
    reader = numbered(7, (1, 1, 12, 10))
    data = dataset(reader, shift=0.0)
    case_of = {float(reader.arrays[case].min()): case for case in reader.cases}
    rounds = [[case_of[float(data[7 * number + n].image.min())] for n in range(7)] for number in range(5)]
    assert all(sorted(one) == list(reader.cases) for one in rounds)
    assert len({tuple(one) for one in rounds}) == 5


def test_without_a_shift_a_patch_lies_inside_the_image_and_anywhere_in_it():
    reader = numbered(1, (1, 1, 14, 11))
    seen = set()
    for index in range(200):
        image = dataset(reader, shift=0.0, steps=50)[index].image[0]
        row, column = divmod(int(image[0, 0]) - 1, 11)
        expected = torch.from_numpy(reader.arrays["case_0"][0, 0, row : row + 12, column : column + 10]).float()
        assert torch.equal(image, expected)
        seen.add((row, column))
    assert len(seen) == 3 * 2


@pytest.mark.parametrize("shape", [(1, 1, 12, 10), (1, 1, 5, 4), (1, 1, 40, 30), (1, 1, 1, 1)])
def test_a_shifted_patch_goes_beyond_the_image_repeats_its_border_and_keeps_a_voxel_of_it(shape):
    reader = numbered(1, shape)
    image = reader.arrays["case_0"][0, 0]
    padded = np.pad(image, 40, mode="edge")
    beyond = 0
    for index in range(60):
        patch = dataset(reader, shift=0.5)[index].image[0].numpy()
        windows = np.lib.stride_tricks.sliding_window_view(padded, patch.shape)
        assert (windows == patch).all((2, 3)).any()
        rows, columns = np.isin(image, patch).any(1), np.isin(image, patch).any(0)
        assert rows.any() and columns.any()
        beyond += rows.sum() < min(12, shape[2]) or columns.sum() < min(10, shape[3])
    assert beyond > 0 or shape == (1, 1, 1, 1)


def test_the_only_voxel_of_an_image_is_never_lost():
    data = dataset(CasesInMemory({"case_0": np.full((1, 1, 1, 1), 7.0)}), (3, 3), shift=0.5)
    assert all((data[index].image == 7).all() for index in range(40))


def test_a_patch_of_a_volume_is_shifted_along_its_own_axes_only():
    """A slice that a 2D model takes of a volume is always one of the volume's."""
    reader = numbered(1, (1, 3, 6, 6))
    slices = {int((dataset(reader, (6, 6), shift=0.5)[index].image.max() - 1) // 36) for index in range(40)}
    assert slices == {0, 1, 2}
    volume = dataset(reader, (6, 6, 6), shift=0.5)
    assert {int((volume[index].image[0, :, 3, 3] - 1).max() // 36) for index in range(40)} >= {0, 1}


def test_axes_are_mirrored_half_of_the_time_each_by_itself():
    reader = numbered(1, (1, 1, 12, 10))
    data = dataset(reader, shift=0.0, mirror_axes=[0, 1, 1], steps=100)
    image = torch.from_numpy(reader.arrays["case_0"][0]).float()
    counts = Counter()
    for index in range(400):
        patch = data[index].image
        counts[next(axes for axes in ((), (1,), (2,), (1, 2)) if torch.equal(patch, image.flip(axes)))] += 1
    assert len(counts) == 4
    # named twice, an axis is still mirrored once at most
    assert abs(counts[()] + counts[2,] - 200) < 50
    alone = dataset(reader, shift=0.0, mirror_axes=[], steps=100)
    assert all(torch.equal(alone[index].image, image) for index in range(20))


def test_mirroring_an_axis_that_2d_images_have_not_does_nothing():
    reader = numbered(1, (1, 1, 12, 10))
    assert same(dataset(reader, mirror_axes=[2])[5], dataset(reader, mirror_axes=[])[5])


def test_patches_reach_the_images_borders_as_often_as_windows_of_the_generation_do():
    patches = draw_patches(numbered(1, (1, 30, 9, 9)), {}, ["case_0"], (12, 9, 9), 600, 0)
    first = ((patches.images[:, 0, 0, 0, 0] - 1) / 81).long()  # the slice that a patch begins with
    # windows of 12 in 30 voxels begin at 0, 6, 12 and 18: a quarter of them lies at either end
    assert 0.15 < (first == 0).float().mean() < 0.3 and 0.15 < (first == 18).float().mean() < 0.3
    assert len(first.unique()) == 19


def test_another_place_is_tried_where_a_patch_has_no_contrast():
    image = np.zeros((1, 1, 60, 60))
    image[0, 0, 30, 30] = 1
    reader = CasesInMemory({"case_0": image})
    data = dataset(reader, (30, 30), steps=25)
    contrast = sum(bool(data[index].image.any()) for index in range(100))
    # one place in four would have it
    assert contrast > 70


def test_a_case_without_any_contrast_is_taken_as_it_is():
    image = dataset(CasesInMemory({"case_0": np.full((1, 1, 20, 20), 3.0)}))[0].image
    assert (image == 3).all()


def test_intensities_that_are_not_finite_are_named_with_their_case():
    image = np.zeros((1, 1, 20, 20))
    image[..., 10, 10] = np.nan
    with pytest.raises(UserError, match="case 'case_0' holds values that are not finite"):
        dataset(CasesInMemory({"case_0": image}), (20, 20))[0]


# ---------------------------------------------------------------- attributes


def test_parents_are_those_of_the_case_where_nothing_is_hidden():
    reader = numbered(5, (1, 1, 12, 10))
    data, cells = dataset(reader, shift=0.0), cells_of(5)
    for index in range(25):
        case = f"case_{int(data[index].image.min() - 1) // 120}"
        assert torch.equal(data[index].parents, CODING.encode(cells[case]))


@pytest.mark.parametrize("hidden", [0.0, 0.4])
def test_others_differ_from_the_parents_in_the_attributes_of_the_intervention_and_nowhere_else(hidden):
    for intervention in INTERVENTIONS:
        data = dataset(numbered(5, (1, 1, 12, 10)), interventions=[intervention], parents_dropped=hidden)
        changed = {attribute.name for attribute in intervention.attributes}
        for index in range(60):
            sample = data[index]
            differing = {name for name, place in PLACES.items() if not torch.equal(sample.parents[place],
                                                                                  sample.others[place])}
            assert differing == changed
            for name in changed:
                assert sample.others[PLACES[name]][-1] == 0  # a value, never unknown


def test_every_intervention_has_its_share():
    data = dataset(numbered(5, (1, 1, 12, 10)), steps=100)
    counts = Counter()
    for index in range(300):
        sample = data[index]
        counts[tuple(name for name, place in PLACES.items()
                     if not torch.equal(sample.parents[place], sample.others[place]))] += 1
    assert set(counts) == {("scanner",), ("disease",), ("scanner", "disease")}
    assert min(counts.values()) > 60


def test_every_attribute_is_hidden_as_often_as_asked_for_and_independently():
    data = dataset(numbered(4, (1, 1, 12, 10)), parents_dropped=0.25, steps=200)
    unknown = torch.stack([torch.stack([data[index].parents[place][-1] for place in PLACES.values()])
                           for index in range(800)])
    assert (unknown.mean(0) - 0.25).abs().max() < 0.08  # 5 standard deviations
    assert (torch.corrcoef(unknown.T) - torch.eye(3)).abs().max() < 0.2


def test_what_the_table_does_not_say_is_unknown_and_may_become_anything():
    reader = numbered(1, (1, 1, 12, 10))
    data = dataset(reader, cells={"case_0": {"scanner": "NA", "age": "60"}}, interventions=INTERVENTIONS[:1], steps=20)
    samples = [data[index] for index in range(60)]
    assert all(torch.equal(one.parents, CODING.encode({"age": "60"})) for one in samples)
    assert {int(one.others[:3].argmax()) for one in samples} == {0, 1, 2}
    assert torch.equal(dataset(reader, cells={})[0].parents, CODING.encode({}))


# ---------------------------------------------------------------- patches


def labelled_cases() -> CasesInMemory:
    reader = numbered(3, (1, 4, 10, 9))
    labels = reader.arrays["case_1"][0] % 5
    reader.label_maps = {"case_1": np.stack([labels, np.full(labels.shape, 100)])}
    return reader


@pytest.mark.parametrize("patch", [(6, 5), (12, 12), (3, 6, 5), (6, 12, 12)])
def test_patches_come_from_the_cases_in_turn_with_their_labels_and_attributes(patch):
    reader, cells = labelled_cases(), cells_of(2)
    found = draw_patches(reader, cells, ["case_2", "case_1"], patch, 5, 3)
    assert found.cases == ("case_2", "case_1", "case_2", "case_1", "case_2") and len(found) == 5
    assert found.cells == ({}, cells["case_1"], {}, cells["case_1"], {})
    assert found.images.shape == (5, 1, *patch) and found.labels is not None
    assert found.labels.shape == (5, *patch) and found.labels.dtype == torch.int16
    assert (found.labels[0::2] == -1).all()
    for image, labels in zip(found.images[1::2, 0], found.labels[1::2], strict=True):
        inside = labels >= 0
        assert inside.any() and torch.equal(labels[inside], image[inside].to(torch.int16) % 5)
        # padding is no anatomy; where the image is large enough there is none
        assert inside.all() == all(n <= m for n, m in zip(patch[-2:], (10, 9), strict=True)) or len(patch) == 3
    assert torch.equal(found.parents(CODING)[1], CODING.encode(cells["case_1"]))


def test_patches_are_the_same_for_the_same_seed_and_a_longer_list_begins_with_the_shorter():
    reader, cells = labelled_cases(), cells_of(3)
    few, many = (draw_patches(reader, cells, reader.cases, (6, 5), count, 3) for count in (4, 9))
    other = draw_patches(reader, cells, reader.cases, (6, 5), 4, 4)
    assert torch.equal(few.images, many.images[:4]) and torch.equal(few.labels, many.labels[:4])
    assert not torch.equal(few.images, other.images)


def test_without_any_labels_there_are_none():
    assert draw_patches(numbered(2, (1, 1, 10, 9)), {}, ["case_0"], (6, 5), 2, 0).labels is None


def test_the_quantiles_are_those_of_a_few_slices_in_the_middle():
    reader = numbered(2, (2, 40, 6, 5))
    tables = case_quantiles(reader, reader.cases)
    assert torch.equal(tables[1], intensity_quantiles(reader.arrays["case_1"][:, 12:28].astype(np.float32)))
    thin = numbered(1, (1, 3, 6, 5))
    assert torch.equal(case_quantiles(thin, ["case_0"])[0],
                       intensity_quantiles(thin.arrays["case_0"].astype(np.float32)))


# ---------------------------------------------------------------- patients


def split(count=60, patients=None, values=None, share=0.2, seed=0):
    cases = [f"c{n:02d}" for n in range(count)]
    patients = {} if patients is None else patients
    return cases, *split_patients(cases, patients, values or {}, share, seed)


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_and_no_case_is_on_both_sides_and_none_is_lost(seed):
    random = np.random.default_rng(seed)
    patients = {f"c{n:02d}": f"p{random.integers(15)}" for n in range(40)}  # the rest are their own patients
    values = {f"c{n:02d}": ("ABC"[random.integers(3)],) for n in range(60)}
    cases, training, validation = split(patients=patients, values=values, seed=seed)
    assert sorted(training + validation) == cases and training == sorted(training) and validation
    names = [{patients.get(case, case) for case in side} for side in (training, validation)]
    assert not names[0] & names[1]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_every_value_of_two_patients_or_more_is_on_both_sides_in_its_share(share):
    values = {f"c{n:02d}": ("A",) if n < 40 else ("B",) if n < 58 else ("C", "") for n in range(60)}
    _, training, validation = split(values=values, share=share)
    for one in set(values.values()):
        sides = [sum(values[case] == one for case in side) for side in (training, validation)]
        assert min(sides) >= 1 and abs(sides[1] - share * sum(sides)) <= 1
    assert len(validation) == round(share * 60)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("count", "beyond"), [(20, 2), (60, 0), (99, 0)])
def test_many_combinations_of_values_do_not_take_more_than_their_share(count, beyond, seed):
    """Sixty combinations, most of them of one or two patients; twenty patients are too few for twelve values."""
    random = np.random.default_rng(seed)
    values = {f"c{n:02d}": tuple(str(random.integers(number)) for number in (3, 4, 5)) for n in range(count)}
    _, training, validation = split(count, values=values, seed=seed)
    assert 0 <= len(validation) - round(0.2 * count) <= beyond
    for place in range(3):
        for value in {one[place] for one in values.values()}:
            sides = [sum(values[case][place] == value for case in side) for side in (training, validation)]
            assert min(sides) >= 1 or sum(sides) == 1


def test_pairs_of_patients_do_not_lose_one_each():
    values = {f"c{n:02d}": ("AB"[n % 2], str(n // 2 % 10)) for n in range(40)}
    assert len(split(40, values=values)[2]) == 10  # the ten values of two or more patients need as many


def test_a_combination_of_one_patient_may_be_validated_on_if_others_teach_its_values():
    values = {f"c{n:02d}": ("ABCDE"[n % 5], "12345"[n // 5]) for n in range(25)}
    _, training, validation = split(25, values=values)
    assert len(validation) == 5 and {values[case] for case in validation}.isdisjoint(values[case] for case in training)


def test_a_patient_of_its_own_value_is_learned_from():
    values = {f"c{n:02d}": (str(n),) for n in range(5)}
    assert split(5, values=values)[1:] == ([f"c{n:02d}" for n in range(5)], [])


def test_without_values_one_of_two_patients_is_kept_aside():
    assert [len(side) for side in split(2, share=0.05)[1:]] == [1, 1]
    assert [len(side) for side in split(1)[1:]] == [1, 0]


@pytest.mark.parametrize("seed", range(10))
def test_patients_of_several_values_stand_for_the_rarest(seed):
    """Ten patients of scanner A, two of which were also seen by B: both sides need one of these."""
    patients = {f"c{n:02d}": f"p{n % 10}" for n in range(12)}
    values = {f"c{n:02d}": ("A" if n < 10 else "B",) for n in range(12)}
    _, training, validation = split(12, patients, values, seed=seed)
    for side in (training, validation):
        assert {values[case] for case in side} == {("A",), ("B",)}


def test_the_split_depends_on_the_seed_and_not_on_the_order_of_the_cases():
    cases, training, validation = split()
    assert split_patients(cases[::-1], {}, {}, 0.2, 0) == (training, validation)
    assert split(seed=1)[2] != validation
