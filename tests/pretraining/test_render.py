"""Rendered views against the same computation done by hand, one view at a time."""

from typing import NamedTuple

import pytest
import torch
from torch.utils.data import default_collate

from nnunet_cfcl.counterfactual import AcquisitionParameters, apply_acquisition
from nnunet_cfcl.pretraining.data import PretrainingDataset
from nnunet_cfcl.pretraining.render import render_views
from nnunet_cfcl.views import IntensityParameters, apply_affine_views, apply_intensity

IMAGES, VIEWS = 3, 3
ALL = [(image, view) for image in range(IMAGES) for view in range(VIEWS)]


class Label(NamedTuple):
    value: torch.Tensor


class LabelSource:
    """Every counterfactual is constant: its own number, drawn for an image and its view."""

    name = "label"

    def __init__(self) -> None:
        self.rows = 0

    def apply(self, originals, drawn, spacing):
        self.rows += len(originals)
        assert len(drawn.value) == len(originals)
        return drawn.value.view(-1, *[1] * (originals.ndim - 1)).expand_as(originals)


@pytest.fixture(params=[2, 3], ids=["2D", "3D"])
def task(request, make_task):
    settings = {"acquisition": {"probability": 1.0}, "views": {"jitter_probability": 1.0, "blur_probability": 0.7,
                                                               "solarise_probability": 0.5}}
    return make_task(settings, dim=request.param)


@pytest.fixture
def batch(task):
    data = PretrainingDataset(task.reader, task.source, task.objective, task.geometry, task.settings, steps=1)
    return default_collate([data[index] for index in range(IMAGES)])


@pytest.fixture
def labels() -> Label:
    """10 (image + 1) + view - 1 for the counterfactual in view 1, 2."""
    return Label(10.0 * torch.arange(1, IMAGES + 1)[:, None] + torch.arange(VIEWS - 1))


def render(task, batch, rows, source=None) -> torch.Tensor:
    return render_views(batch, rows, source or task.source, task.geometry, task.settings.views, torch.device("cpu"))


def by_hand(task, batch, image: int, view: int) -> torch.Tensor:
    crop, spacing = batch["image"][image : image + 1].clone(), task.geometry.spacing
    if view > 0:
        drawn = AcquisitionParameters(*(field[image, view - 1][None] for field in batch["counterfactual"]))
        crop = apply_acquisition(crop, drawn, spacing, inside=(crop != 0).any(1, keepdim=True))
    patch = apply_affine_views(crop, batch["matrices"][image, view][None], task.geometry)
    effects = IntensityParameters(*(field[image, view][None] for field in batch["intensity"]))
    return apply_intensity(patch, effects, task.settings.views, spacing)[0]


def test_every_row_equals_the_view_computed_alone_by_hand(task, batch):
    rendered = render(task, batch, ALL)
    expected = torch.stack([by_hand(task, batch, *row) for row in ALL])
    assert rendered.dtype == torch.float32 and rendered.shape == (len(ALL), 1, *task.geometry.patch_size)
    torch.testing.assert_close(rendered, expected, rtol=1e-5, atol=1e-5)
    distances = (expected.flatten(1)[:, None] - expected.flatten(1)).abs().mean(-1)
    assert (distances + torch.eye(len(ALL)) > 1e-2).all(), "two rows are alike: mixing them up would not be seen"


@pytest.mark.parametrize("rows", [ALL[::-1], [(2, 1), (0, 0), (2, 0), (1, 2), (0, 2)], [(1, 1)], [(1, 0)],
                                  [(0, 0), (1, 0)], [(2, 2), (2, 2)]])
def test_rows_come_in_the_order_asked_for_and_do_not_depend_on_their_company(task, batch, rows):
    whole = render(task, batch, ALL)
    expected = torch.stack([whole[ALL.index(row)] for row in rows])
    torch.testing.assert_close(render(task, batch, rows), expected, rtol=1e-5, atol=1e-5)


def test_rendering_twice_gives_the_same_bits_and_leaves_the_batch_as_it_is(task, batch):
    crops = batch["image"].clone()
    torch.manual_seed(1)
    first = render(task, batch, ALL)
    torch.manual_seed(2)
    assert torch.equal(render(task, batch, ALL), first)
    assert torch.equal(batch["image"], crops)


def test_view_0_is_never_altered_and_view_i_is_its_own_counterfactual(task, batch, labels):
    rows = [(1, 0), (2, 2), (0, 1), (0, 0), (1, 1), (2, 0), (1, 2)]
    source, labelled = LabelSource(), {**batch, "counterfactual": labels}
    rendered = render(task, labelled, rows, source)
    for patch, (image, view) in zip(rendered, rows, strict=True):
        if view == 0:
            torch.testing.assert_close(patch, by_hand(task, batch, image, 0), rtol=1e-5, atol=1e-5)
        else:
            torch.testing.assert_close(patch, torch.full_like(patch, 10 * (image + 1) + view - 1), rtol=1e-5, atol=1e-4)
    assert source.rows == 4


def test_the_source_is_not_asked_when_only_originals_are_rendered(task, batch, labels):
    source = LabelSource()
    render(task, {**batch, "counterfactual": labels}, [(image, 0) for image in range(IMAGES)], source)
    assert source.rows == 0
