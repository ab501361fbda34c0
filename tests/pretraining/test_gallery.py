"""The picture of the views: a readable PNG, with points where they belong."""

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch.utils.data import default_collate

from nnunet_cfcl.pretraining import gallery
from nnunet_cfcl.pretraining.data import PretrainingDataset
from nnunet_cfcl.pretraining.render import render_views

IMAGES, VIEWS = 2, 3


@pytest.fixture(params=[2, 3], ids=["2D", "3D"])
def drawn(request, make_task):
    """A batch and its views (B, V, C, *patch)."""
    task = make_task(dim=request.param)
    data = PretrainingDataset(task.reader, task.source, task.objective, task.geometry, task.settings, steps=1)
    batch = default_collate([data[index] for index in range(IMAGES)])
    rows = [(image, view) for image in range(IMAGES) for view in range(VIEWS)]
    views = render_views(batch, rows, task.source, task.geometry, task.settings.views, torch.device("cpu"))
    return batch, views.unflatten(0, (IMAGES, VIEWS))


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures drawn since."""
    kept: list[Figure] = []

    def figure(*arguments, **named):
        kept.append(Figure(*arguments, **named))
        return kept[-1]

    monkeypatch.setattr(gallery, "Figure", figure)
    return kept


def coloured_pixels(file) -> int:
    picture = matplotlib.image.imread(file)[..., :3]
    close = [np.abs(picture - np.array(to_rgb(colour))).max(-1) < 0.02 for colour in gallery.COLOURS]
    return int(np.any(close, axis=0).sum())


def test_the_picture_is_a_png_with_a_panel_per_image_and_view_and_coloured_points(drawn, tmp_path, figures):
    batch, views = drawn
    gallery.plot_views(batch, views, tmp_path / "views.png")
    assert (tmp_path / "views.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width = matplotlib.image.imread(tmp_path / "views.png").shape[:2]
    assert (height, width) == (460, 660)
    axes = figures[0].axes
    assert len(axes) == IMAGES * VIEWS
    assert [axis.get_title() for axis in axes[:VIEWS]] == ["original", "counterfactual 1", "counterfactual 2"]
    for axis, view in zip(axes, views.flatten(0, 1), strict=True):
        volume = view[0].numpy()
        shown = volume if volume.ndim == 2 else volume[len(volume) // 2]
        np.testing.assert_array_equal(axis.images[0].get_array(), shown)
    assert coloured_pixels(tmp_path / "views.png") > 50


def test_a_batch_without_valid_points_is_drawn_without_points(drawn, tmp_path):
    batch, views = drawn
    nothing = {**batch, "drawn": {**batch["drawn"], "valid": torch.zeros_like(batch["drawn"]["valid"])}}
    gallery.plot_views(nothing, views, tmp_path / "views.png")
    assert coloured_pixels(tmp_path / "views.png") == 0


def test_a_method_without_points_is_drawn_without_points(drawn, tmp_path):
    batch, views = drawn
    gallery.plot_views({**batch, "drawn": {}}, views, tmp_path / "views.png", "view")
    assert coloured_pixels(tmp_path / "views.png") == 0


def test_an_image_without_valid_points_leaves_those_of_the_others(drawn, tmp_path, figures):
    batch, views = drawn
    valid = batch["drawn"]["valid"].clone()
    valid[0] = False
    gallery.plot_views({**batch, "drawn": {**batch["drawn"], "valid": valid}}, views, tmp_path / "views.png")
    counts = [len(axis.collections[0].get_offsets()) for axis in figures[0].axes]
    assert counts[:VIEWS] == [0] * VIEWS and min(counts[VIEWS:]) > 0


@pytest.mark.parametrize("size", [(10, 16), (4, 10, 16)])
def test_a_point_at_the_centre_of_a_pixel_is_drawn_on_that_pixel(size, tmp_path, figures):
    """Matrices are identities, so points are normalised coordinates; pixel k of n lies at (2 k + 1) / n - 1."""
    dim, pixels = len(size), torch.tensor([[0, 0], [9, 15], [3, 12]])
    points = torch.zeros(3, dim)
    points[:, -2:] = (2 * pixels + 1) / torch.tensor(size[-2:]) - 1
    matrices = torch.eye(dim, dim + 1).expand(1, 2, -1, -1)
    drawn = {"points": points[None, None], "valid": torch.ones(1, 1, 3, dtype=torch.bool)}
    batch = {"drawn": drawn, "matrices": matrices}
    gallery.plot_views(batch, torch.zeros(1, 2, 1, *size), tmp_path / "views.png")
    for axis in figures[0].axes:
        np.testing.assert_allclose(axis.collections[0].get_offsets(), pixels.flip(1), atol=1e-5)


def test_a_point_beyond_a_view_is_drawn_only_in_the_others_in_its_own_colour(tmp_path, figures):
    """Views 1 and 2 are shifted by half a view to the left and to the right, each shows one of the two points."""
    points = torch.tensor([[0.0, -0.5], [0.0, 0.75]])
    matrices = torch.eye(2, 3).repeat(1, 3, 1, 1)
    matrices[0, 1, 1, 2], matrices[0, 2, 1, 2] = -1.0, 1.0
    drawn = {"points": points.expand(1, 2, 2, 2), "valid": torch.tensor([[[True, True], [False, False]]])}
    batch = {"drawn": drawn, "matrices": matrices}
    gallery.plot_views(batch, torch.zeros(1, 3, 1, 8, 8), tmp_path / "views.png")
    original, left, right = (axis.collections[0] for axis in figures[0].axes)
    np.testing.assert_allclose(original.get_offsets(), [[1.5, 3.5], [6.5, 3.5]])
    np.testing.assert_allclose(left.get_offsets(), [[5.5, 3.5]])
    np.testing.assert_allclose(right.get_offsets(), [[2.5, 3.5]])
    np.testing.assert_allclose([*left.get_facecolors(), *right.get_facecolors()], original.get_facecolors())
    assert not np.allclose(*original.get_facecolors())
