"""The pool's dataset: draws by (seed, step, image), groups in turn, views inside the image, weak counterfactuals."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.counterfactual.source import OriginalSource
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.teacher.data import PoolDataset, teacher_views
from nnunet_cfcl.views import ViewGeometry, apply_affine_views, crop_size
from tests.conftest import CasesInMemory
from tests.teacher.conftest import squares

GEOMETRY = ViewGeometry((16, 20), (1.0, 1.0))


def dataset(reader=None, groups=None, seed: int = 0, weak=None, **settings) -> PoolDataset:
    reader = reader or squares(count=7)
    groups = groups or {"rare": reader.cases[:1], "frequent": reader.cases[1:]}
    resolved = resolve_settings({"seed": seed, **settings})
    return PoolDataset(reader, groups, OriginalSource(), GEOMETRY, resolved, 4, weak)


def test_a_sample_depends_on_seed_step_and_image_alone():
    one, other = dataset(), dataset()
    [other[index] for index in (3, 9, 1)]
    for key in ("image", "matrix"):
        assert torch.equal(one[5][key], other[5][key]) and not torch.equal(one[5][key], dataset(seed=1)[5][key])
    assert one[5]["intensity"].brightness == other[5]["intensity"].brightness


def test_a_rare_scanner_is_seen_as_often_as_a_frequent_one_and_every_case_in_turn():
    data = dataset()
    counts = Counter(data._case(index) for index in range(240))
    assert sum(count for (group, _), count in counts.items() if group == 0) == 120
    assert {count for (group, _), count in counts.items() if group == 1} == {20}


def test_one_view_per_image_zooms_in_at_most_to_the_setting():
    areas = torch.stack([dataset(**{"teacher.crop_fraction": [0.6, 0.9]})[index]["matrix"][:, :2].det().abs() * 4
                         for index in range(100)]) / (16 * 20)
    assert areas.min() > 0.59 and areas.max() < 0.91


def test_views_of_an_image_as_large_as_the_crop_read_no_padding():
    settings = resolve_settings({})
    size = crop_size(GEOMETRY, teacher_views(settings))
    reader = CasesInMemory({"one": torch.ones(1, 1, *size).numpy()})
    sample = dataset(reader, {"all": reader.cases})[0]
    assert apply_affine_views(sample["image"][None], sample["matrix"][None], GEOMETRY).min() > 0.999


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_strong_views_are_solarised_as_counterfactuals_are_in_phase_1(probability):
    data = dataset(**{"views.solarise_probability": probability, "teacher.intensity_probability": 1.0})
    assert [bool(data[index]["intensity"].solarise) for index in (0, 1)] == [bool(probability)] * 2


def test_a_share_of_the_views_has_intensity_effects():
    settings = {"views.jitter_probability": 1.0, "teacher.intensity_probability": 0.3}
    changed = [float(dataset(**settings)[index]["intensity"].brightness) != 1 for index in range(200)]
    assert 0.2 < np.mean(changed) < 0.4


def test_an_image_without_a_weak_counterfactual_is_shown_twice():
    class Some:
        def identity(self):
            return {}

        def read(self, case, box):
            return None if case == "case_0" else torch.full((1, *box.size[1:]), 5.0)

    data = dataset(weak=Some())
    for index in range(8):
        sample = data[index]
        expected = sample["image"] if data._case(index)[1] == "case_0" else torch.full_like(sample["image"], 5.0)
        assert torch.equal(sample["weak"], expected)
    assert "weak" not in dataset()[0]


def test_an_image_that_is_not_finite_is_named():
    reader = CasesInMemory({"broken": torch.full((1, 1, 24, 28), torch.nan).numpy()})
    with pytest.raises(UserError, match="broken"):
        dataset(reader, {"all": reader.cases})[0]
