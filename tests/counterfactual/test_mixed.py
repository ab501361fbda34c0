"""Counterfactuals of two sources in one batch: proportions, and the right source of every row."""

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.counterfactual.generator.source import GeneratorSource
from nnunet_cfcl.counterfactual.mixed import MixedParameters, MixedSource
from nnunet_cfcl.counterfactual.source import AcquisitionSource, OriginalSource, take
from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows
from nnunet_cfcl.pretraining.data import PretrainingDataset
from nnunet_cfcl.pretraining.objectives.dual_view import DualViewObjective
from nnunet_cfcl.pretraining.render import render_views
from nnunet_cfcl.views import CropBox, ViewGeometry
from tests.counterfactual.random_generator import INTERVENTIONS, random_generator

BOX = CropBox((0, 0, 0), (1, 4, 4), (1, 4, 4), 2)
Z_SCORE = ["ZScoreNormalization"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Marks(NamedTuple):
    mark: Tensor
    case: Tensor


class Marked:
    """A source whose counterfactuals are the index of their intervention, consecutive from ``first``."""

    def __init__(self, first: int, count: int) -> None:
        self._first, self._count, self.name = first, count, f"marked {first}"

    def identity(self):
        return {"source": self.name, "interventions": self._count}

    def draw(self, generator, case, box, count):
        rounds = [torch.randperm(self._count, generator=generator) for _ in range(-(-count // self._count))]
        return Marks(self._first + torch.cat(rounds)[:count], torch.full((count,), int(case)))

    def apply(self, originals, drawn, spacing):
        assert len(originals) == len(drawn.mark) > 0
        return originals + drawn.mark.view(-1, 1, 1, 1) + 1000 * drawn.case.view(-1, 1, 1, 1)


def mixed(passed: int, failed: int) -> MixedSource:
    """Mixed source: interventions 0, 1, ... passed; acquisitions count from 100."""
    return MixedSource(Marked(0, passed), Marked(100, 50), passed, failed)


def marks_of(source: MixedSource, count: int, seed: int) -> list[int]:
    drawn = source.draw(rng(seed), "0", BOX, count)
    return [int(value) for value in source.apply(torch.zeros(count, 1, 4, 4), drawn, (1.0, 1.0))[:, 0, 0, 0]]


@pytest.mark.parametrize(("passed", "failed"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_every_intervention_is_drawn_and_failed_ones_are_acquisitions(passed, failed):
    source, number = mixed(passed, failed), passed + failed
    for seed in range(20):
        marks = marks_of(source, number, seed)
        assert sorted(mark for mark in marks if mark < 100) == list(range(passed))
        assert sum(mark >= 100 for mark in marks) == failed


@pytest.mark.parametrize("count", [4, 5, 7, 8])
def test_interventions_repeat_only_where_there_are_fewer_than_counterfactuals(count):
    source = mixed(2, 2)
    for seed in range(20):
        counts = Counter(min(mark, 100) for mark in marks_of(source, count, seed))
        assert sum(counts.values()) == count
        assert max(counts[0], counts[1]) - min(counts[0], counts[1]) <= 1
        assert abs(counts[100] - count / 2) <= 1


def test_with_fewer_counterfactuals_each_intervention_is_drawn_equally_often_at_every_position():
    counts, places = Counter(), Counter()
    for seed in range(900):
        marks = marks_of(mixed(2, 1), 2, seed)
        assert len({min(mark, 100) for mark in marks}) == 2
        counts.update(min(mark, 100) for mark in marks)
        places[min(marks[0], 100)] += 1
    assert all(abs(counts[mark] - 600) < 75 for mark in (0, 1, 100))  # 5 standard deviations
    assert all(abs(places[mark] - 300) < 71 for mark in (0, 1, 100))


def test_the_draw_is_that_of_the_generator_and_its_rows_fit_their_number():
    source = mixed(2, 3)
    one, other = (source.draw(rng(5), "3", BOX, 6) for _ in range(2))
    assert torch.equal(one.is_generated, other.is_generated) and torch.equal(one.generated.mark, other.generated.mark)
    assert all(len(field) == 6 for field in (*one.generated, *one.acquired, one.is_generated))
    alone = source.draw(rng(1), "3", BOX, 1)
    assert len(alone.generated.mark) == len(alone.is_generated) == 1


def test_rows_are_given_to_their_own_source_whatever_their_order():
    drawn = MixedParameters(Marks(torch.arange(4), torch.zeros(4)), Marks(100 + torch.arange(4), torch.zeros(4)),
                            torch.tensor([False, True, True, False]))
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 3, 3) / 10
    found = mixed(2, 2).apply(images, drawn, (1.0, 1.0))
    assert found.shape == images.shape
    torch.testing.assert_close(found[:, 1, 2, 2], torch.tensor([100.0, 1.1, 2.2, 103.3]))
    assert torch.equal(images[:, 0, 0, 0], torch.arange(4.0) / 10)  # the originals stay


@pytest.mark.parametrize("rows", [[0, 0, 0], [1, 1, 1]])
def test_a_source_without_rows_is_not_called(rows):
    drawn = MixedParameters(Marks(torch.arange(3), torch.zeros(3)), Marks(torch.arange(3), torch.zeros(3)),
                            torch.tensor(rows).bool())
    assert mixed(1, 1).apply(torch.zeros(3, 1, 2, 2), drawn, (1.0, 1.0))[:, 0, 0, 0].tolist() == [0, 1, 2]


def test_mixtures_of_other_sources_or_numbers_have_another_identity():
    found = [mixed(*numbers).identity() for numbers in ((1, 1), (1, 2), (2, 1))]
    assert all(one != other for n, one in enumerate(found) for other in found[:n])


# ---------------------------------------------------------------- take


def test_rows_are_taken_of_nested_tuples_by_one_index_or_two():
    nested = MixedParameters(Marks(torch.arange(6).view(2, 3), torch.zeros(2, 3)),
                             Marks(torch.arange(10, 16).view(2, 3), torch.zeros(2, 3)), torch.eye(2, 3).bool())
    one = take(nested, torch.tensor([1]))
    assert one.generated.mark.tolist() == [[3, 4, 5]] and isinstance(one, MixedParameters)
    two = take(nested, torch.tensor([1, 0]), torch.tensor([2, 0]))
    assert two.generated.mark.tolist() == [5, 0] and two.acquired.mark.tolist() == [15, 10]
    assert two.is_generated.tolist() == [False, True] and isinstance(two.acquired, Marks)
    nothing = OriginalSource().draw(rng(), "0", BOX, 3)
    assert take(nothing, torch.tensor([0])) == nothing


# ---------------------------------------------------------------- views


@pytest.fixture
def batch_and_source(cases_in_memory):
    """A collated batch of three images with three counterfactuals each, of a real generator and real acquisitions."""
    reader = cases_in_memory((1, 1, 40, 44))
    settings = resolve_settings({"pretrain": {"images_per_step": 3, "points_per_image": 10},
                                 "counterfactual": {"count": 3}})
    generator = random_generator()
    cells = {case: {"scanner": "A", "disease": "no"} for case in reader.cases}
    source = MixedSource(
        GeneratorSource(generator, cells, INTERVENTIONS[:2], SlidingWindows(generator.patch_size), 4, "mean", False),
        AcquisitionSource(reader, settings.acquisition, Z_SCORE, 2), 2, 1)
    geometry = ViewGeometry((24, 28), (1.0, 1.0))
    data = PretrainingDataset(reader, source, DualViewObjective(10), geometry, settings, 2)
    return default_collate([data[index] for index in range(3)]), source, geometry, settings


def test_a_collated_batch_keeps_the_nested_parameters(batch_and_source):
    drawn = batch_and_source[0]["counterfactual"]
    assert isinstance(drawn, MixedParameters)
    assert drawn.is_generated.shape == (3, 3) and (drawn.is_generated.sum(1) == 2).all()
    assert drawn.generated.others.shape[:2] == (3, 3)
    for image in range(3):  # both interventions of each image
        rows = drawn.is_generated[image]
        assert sorted(drawn.generated.intervention[image][rows].tolist()) == [0, 1]


def test_views_of_any_rows_are_those_of_the_whole_batch_and_of_the_right_source(batch_and_source):
    batch, source, geometry, settings = batch_and_source
    every = [(image, view) for image in range(3) for view in range(4)]
    device = torch.device("cpu")
    whole = dict(zip(every, render_views(batch, every, source, geometry, settings.views, device), strict=True))
    for rows in ([(1, 3), (0, 0), (2, 1)], [(2, 2)], [(1, 0)]):
        found = render_views(batch, rows, source, geometry, settings.views, device)
        for row, view in zip(rows, found, strict=True):
            torch.testing.assert_close(view, whole[row], rtol=1e-4, atol=1e-4)
    drawn = batch["counterfactual"]
    for image in range(3):
        for number in range(3):
            index = torch.tensor([image]), torch.tensor([number])
            of_generator = bool(drawn.is_generated[image, number])
            maker, parameters = ((source.generated, drawn.generated) if of_generator else
                                 (source._acquisition, drawn.acquired))
            crop = batch["image"][image : image + 1]
            expected = maker.apply(crop, take(parameters, *index), geometry.spacing)
            mixed_ = source.apply(crop, take(drawn, *index), geometry.spacing)
            torch.testing.assert_close(mixed_, expected)
            assert not torch.equal(expected, crop)
