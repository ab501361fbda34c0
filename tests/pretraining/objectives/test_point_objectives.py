"""DVD and MVD objectives: where views are read, which loss is asked, with labels, without, and mixed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from nnunet_cfcl.losses import dvd_cl_loss, mvd_cl_loss, s_dvd_cl_loss, s_mvd_cl_loss
from nnunet_cfcl.pretraining.data import PretrainingDataset
from nnunet_cfcl.pretraining.objective import ImageViews
from nnunet_cfcl.pretraining.objectives.dual_view import DualViewObjective
from nnunet_cfcl.pretraining.objectives.multi_view import MultiViewObjective
from nnunet_cfcl.pretraining.pixel_encoder import PixelEncoder
from nnunet_cfcl.pretraining.point_labels import PointLabels
from nnunet_cfcl.views import ViewGeometry, read_labels, tissue_box, to_canonical

IMAGES, VIEWS, POINTS = 3, 3, 20
LABELS = PointLabels(balanced_share=0.5, ignore=3)


def organs(reader, without: tuple[str, ...] = ()):
    """Every case has two organs and a stripe to be ignored, each voxel a confidence of its own."""
    maps = {}
    for number, case in enumerate(reader.cases):
        labels = np.zeros(reader.shape(case)[1:], np.int16)
        labels[..., 5:15, 5:20], labels[..., 16:20, 8:30], labels[..., 18:22] = 1, 2, 3
        confidence = (np.arange(labels.size).reshape(labels.shape) * 7 + number) % 101
        maps[case] = np.stack([labels, confidence]).astype(np.int16)
    return {case: pair for case, pair in maps.items() if case not in without}


@pytest.fixture
def batch(make_task, cases_in_memory):
    """Factory: a collated batch of an objective, over images of which some have no labels."""

    def make(objective, dim=2, without=()):
        shape = (1, 1, 40, 44) if dim == 2 else (1, 20, 24, 32)
        reader = cases_in_memory(shape, count=IMAGES)
        reader = cases_in_memory(shape, count=IMAGES, label_maps=organs(reader, without))
        task = make_task(dim=dim, objective=objective, reader=reader)
        data = PretrainingDataset(task.reader, task.source, objective, task.geometry, task.settings, steps=2)
        return task, default_collate([data[index] for index in range(IMAGES)])

    return make


def model(temperature=0.3, learned=False) -> PixelEncoder:
    settings = SimpleNamespace(
        projection_hidden=8, projection_dim=4, temperature=temperature, learn_temperature=learned)
    return PixelEncoder(torch.nn.Identity(), 6, settings)


def embeddings(drawn, rows_per_image: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES * rows_per_image, 8, generator=generator).requires_grad_()


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("make", [lambda: DualViewObjective(POINTS), lambda: MultiViewObjective(POINTS, 0.1)])
def test_views_are_read_where_their_points_lie_in_the_patient(batch, make, dim):
    objective = make()
    _, collated = batch(objective, dim)
    rows = [(image, view) for image in range(IMAGES) for view in range(VIEWS)]
    points = collated["drawn"]["points"]
    for (image, view), coordinates in zip(rows, objective.inputs(collated, rows, torch.device("cpu")), strict=True):
        if isinstance(objective, MultiViewObjective):
            expected = points[image, view]
        else:
            expected = points[image].flatten(0, 1) if view == 0 else points[image, view - 1]
        found = to_canonical(coordinates[None], collated["matrices"][image, view][None])[0]
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_dvd_is_the_mean_over_the_pairs_of_views(batch):
    objective = DualViewObjective(POINTS)
    _, collated = batch(objective)
    drawn = collated["drawn"]
    drawn["valid"][1, :, 3:7] = False
    z = embeddings(drawn, 2 * (VIEWS - 1) * POINTS)
    loss, statistics = objective.loss(model(), z, drawn)
    split = z.view(IMAGES, 2, VIEWS - 1, POINTS, 8)
    expected = [dvd_cl_loss(split[:, 0, i], split[:, 1, i], 0.3, drawn["valid"][:, i]).loss for i in range(VIEWS - 1)]
    torch.testing.assert_close(loss, torch.stack(expected).mean())
    assert statistics["positives"] == 1 and "temperature" not in statistics


def test_mvd_is_the_pools_loss_with_positions_in_shares_of_the_crop(batch):
    objective = MultiViewObjective(POINTS, 0.2)
    task, collated = batch(objective)
    drawn = collated["drawn"]
    drawn["valid"][1, :, 3:7] = False
    z = embeddings(drawn, VIEWS * POINTS)
    loss, statistics = objective.loss(model(), z, drawn)
    longest = max(collated["image"].shape[2:])
    shape = (IMAGES, VIEWS, POINTS)
    expected = mvd_cl_loss(z.view(*shape, 8), drawn["points"] / longest, 0.3, 0.2, drawn["valid"]).loss
    torch.testing.assert_close(loss, expected)
    positions = drawn["positions"][drawn["valid"]]
    assert positions.min() >= 0 and positions.max() <= 1 and 0 < statistics["positives"] <= 1


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("make", [lambda: DualViewObjective(POINTS, LABELS),
                                  lambda: MultiViewObjective(POINTS, 0.1, LABELS)])
def test_points_have_the_labels_and_confidences_of_their_voxels_and_none_is_ignored(batch, make, dim):
    task, collated = batch(make(), dim)
    drawn, maps = collated["drawn"], collated["labels"]
    assert drawn["labelled"].all() and drawn["valid"].any()
    for image in range(IMAGES):
        where = drawn["valid"][image]
        found = read_labels(maps[image, 0], drawn["points"][image], task.geometry.spacing)
        assert torch.equal(drawn["labels"][image][where], found[where])
        assert set(found[where].tolist()) <= {0, 1, 2}
        percent = read_labels(maps[image, 1], drawn["points"][image], task.geometry.spacing)
        torch.testing.assert_close(drawn["weights"][image][where], percent[where] / 100)


def test_labels_weights_and_background_reach_the_supervised_losses(batch):
    dual, multi = DualViewObjective(POINTS, LABELS), MultiViewObjective(POINTS, 0.1, LABELS)
    drawn = batch(dual)[1]["drawn"]
    z = embeddings(drawn, 2 * (VIEWS - 1) * POINTS)
    a, b = z.view(IMAGES, 2, VIEWS - 1, POINTS, 8).unbind(1)
    labels, valid, weights = drawn["labels"], drawn["valid"], drawn["weights"]
    expected = [s_dvd_cl_loss(a[:, i], b[:, i], labels[:, i], labels[:, i], 0.3, 0, valid[:, i], weights[:, i]).loss
                for i in range(VIEWS - 1)]
    torch.testing.assert_close(dual.loss(model(), z, drawn)[0], torch.stack(expected).mean())
    drawn = batch(multi)[1]["drawn"]
    z = embeddings(drawn, VIEWS * POINTS)
    pooled = z.view(IMAGES, VIEWS, POINTS, 8)
    expected_loss = s_mvd_cl_loss(pooled, drawn["labels"], 0.3, 0, drawn["valid"], drawn["weights"]).loss
    torch.testing.assert_close(multi.loss(model(), z, drawn)[0], expected_loss)


def test_images_without_labels_are_contrasted_without_and_are_no_negatives_of_the_others(batch):
    objective = MultiViewObjective(POINTS, 0.3, LABELS)
    drawn = batch(objective, without=("case_1",))[1]["drawn"]
    known = drawn["labelled"]
    assert known.sum() == 2
    z = embeddings(drawn, VIEWS * POINTS)
    pooled = z.view(IMAGES, VIEWS, POINTS, 8)
    loss, statistics = objective.loss(model(), z, drawn)
    supervised = s_mvd_cl_loss(
        pooled[known], drawn["labels"][known], 0.3, 0, drawn["valid"][known], drawn["weights"][known]).loss
    plain = mvd_cl_loss(pooled[~known], drawn["positions"][~known], 0.3, 0.3, drawn["valid"][~known]).loss
    anchors = int(((drawn["labels"] > 0) & drawn["valid"] & (drawn["weights"] > 0))[known].sum())
    distances = torch.cdist(*[drawn["positions"][~known].flatten(1, 2)] * 2)[0]
    others = int(((distances < 0.3).sum(1) > 1)[drawn["valid"][~known].flatten()].sum())
    torch.testing.assert_close(loss, (anchors * supervised + others * plain) / (anchors + others))


def test_a_batch_without_any_label_is_the_unsupervised_loss(batch):
    supervised, plain = DualViewObjective(POINTS, LABELS), DualViewObjective(POINTS)
    nothing = ("case_0", "case_1", "case_2")
    drawn = batch(supervised, without=nothing)[1]["drawn"]
    z = embeddings(drawn, 2 * (VIEWS - 1) * POINTS)
    torch.testing.assert_close(
        supervised.loss(model(), z, drawn)[0],
        plain.loss(model(), z, {key: drawn[key] for key in ("points", "valid")})[0])


def test_a_small_organ_gets_its_share_of_the_points():
    geometry = ViewGeometry((32, 32), (1.0, 1.0))
    labels = torch.zeros(32, 32, dtype=torch.int16)
    labels[10:12, 10:12], labels[14:30, 4:28] = 1, 2
    image = ImageViews(torch.eye(2, 3)[None] * 16, geometry, (32, 32), tissue_box((0, 0), (32, 32), (32, 32), (1, 1)),
                       labels, torch.full_like(labels, 100))
    objective = MultiViewObjective(400, 0.1, PointLabels(0.5))
    drawn = objective.draw(torch.Generator().manual_seed(0), image)
    counts = drawn["labels"][drawn["valid"]].bincount(minlength=3)
    assert counts[1] >= 100 and counts[2] >= 100
    uniform = MultiViewObjective(400, 0.1, PointLabels(0.0)).draw(torch.Generator().manual_seed(0), image)
    assert uniform["labels"].flatten().bincount(minlength=3)[1] < 10


def test_a_learned_temperature_gets_a_gradient_and_is_reported():
    objective, learned = DualViewObjective(5), model(learned=True)
    drawn = {"points": torch.zeros(2, 1, 5, 2), "valid": torch.ones(2, 1, 5, dtype=torch.bool)}
    z = torch.randn(2 * 2 * 5, 8, generator=torch.Generator().manual_seed(0))
    loss, statistics = objective.loss(learned, z, drawn)
    loss.backward()
    assert statistics["temperature"] == pytest.approx(0.3)
    (parameter,) = learned.loss_parameters()
    assert parameter.grad is not None and abs(float(parameter.grad)) > 1e-3


def test_the_ignore_radius_is_in_millimetres_of_the_patient(batch):
    plain, band = DualViewObjective(POINTS), DualViewObjective(POINTS, ignore_radius=4.0)
    drawn = batch(plain)[1]["drawn"]
    z = embeddings(drawn, 2 * (VIEWS - 1) * POINTS)
    a, b = z.view(IMAGES, 2, VIEWS - 1, POINTS, 8).unbind(1)
    expected = [dvd_cl_loss(a[:, i], b[:, i], 0.3, drawn["valid"][:, i], positions=drawn["points"][:, i],
                            ignore_radius=4.0).loss for i in range(VIEWS - 1)]
    found = band.loss(model(), z, drawn)[0]
    torch.testing.assert_close(found, torch.stack(expected).mean())
    assert found < plain.loss(model(), z, drawn)[0]
