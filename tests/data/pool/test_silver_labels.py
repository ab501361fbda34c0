"""Confidence of silver labels against slow loops and closed forms."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_cfcl.data.pool.silver_labels import silver_channels, voxel_confidence

PLAIN = LabelManager({"background": 0, "a": 1, "b": 2}, None)
WITH_IGNORE = LabelManager({"background": 0, "a": 1, "b": 2, "ignore": 3}, None)
# as in brain tumours: whole contains core contains enhancing
NESTED = LabelManager({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [1, 2, 3])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_with_plain_labels_the_confidence_is_the_probability_of_the_chosen_label(seed):
    random = np.random.default_rng(seed)
    probabilities = random.dirichlet(np.ones(3), size=(2, 3, 4)).transpose(3, 0, 1, 2)
    labels = random.integers(0, 3, (2, 3, 4))
    found = voxel_confidence(probabilities, labels, PLAIN)
    for voxel in itertools.product(*map(range, labels.shape)):
        assert found[voxel] == pytest.approx(probabilities[(labels[voxel], *voxel)], abs=1e-6)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_with_regions_the_confidence_is_that_of_the_least_certain_region(seed):
    random = np.random.default_rng(seed)
    probabilities, labels = random.random((3, 2, 3, 4)), random.integers(0, 4, (2, 3, 4))
    found = voxel_confidence(probabilities, labels, NESTED)
    regions = [{1, 2, 3}, {2, 3}, {3}]
    for voxel in itertools.product(*map(range, labels.shape)):
        statements = [probabilities[(r, *voxel)] if labels[voxel] in region else 1 - probabilities[(r, *voxel)]
                      for r, region in enumerate(regions)]
        assert found[voxel] == pytest.approx(min(statements), abs=1e-6)


def test_for_nested_regions_background_and_the_innermost_region_get_exactly_their_probability():
    # P(0), P(1), P(2), P(3) of one voxel, summed up to the regions
    of_labels = np.array([0.1, 0.2, 0.3, 0.4])
    regions = np.array([of_labels[1:].sum(), of_labels[2:].sum(), of_labels[3]]).reshape(3, 1, 1, 1)
    for label in (0, 3):
        found = voxel_confidence(regions, np.full((1, 1, 1), label), NESTED)
        assert found.item() == pytest.approx(of_labels[label])
    for label in (1, 2):
        assert voxel_confidence(regions, np.full((1, 1, 1), label), NESTED).item() >= of_labels[label]


def test_a_label_that_its_own_probabilities_contradict_is_not_confident():
    certain = np.array([0.99, 0.01, 0.0]).reshape(3, 1, 1, 1)
    assert voxel_confidence(certain, np.full((1, 1, 1), 1), PLAIN).item() == pytest.approx(0.01)
    assert voxel_confidence(certain, np.full((1, 1, 1), 3), NESTED).item() == pytest.approx(0)


def test_the_ignore_label_has_no_probability_and_does_not_fail():
    probabilities = np.full((3, 1, 1, 2), 1 / 3)
    found = voxel_confidence(probabilities, np.array([[[3, 1]]]), WITH_IGNORE)
    np.testing.assert_allclose(found, [[[1, 1 / 3]]], rtol=1e-6)


@pytest.mark.parametrize(("confidence", "quality", "percent"), [
    (None, None, 100), (None, 0.8, 80), (0.5, None, 50), (0.5, 0.8, 40), (None, 0.0, 0), (1.0 + 1e-7, 1.0, 100)])
def test_the_second_channel_is_confidence_times_quality_in_percent(confidence, quality, percent):
    labels = np.arange(8).reshape(2, 2, 2) - 1
    volume = None if confidence is None else np.full((2, 2, 2), confidence, np.float32)
    channels = silver_channels(labels, volume, quality, (2, 2, 2))
    assert channels.dtype == np.int16
    np.testing.assert_array_equal(channels[0], labels)
    assert (channels[1] == percent).all()


def test_a_case_without_a_label_is_unknown_everywhere():
    channels = silver_channels(None, None, None, (1, 2, 3))
    assert channels.shape == (2, 1, 2, 3)
    assert (channels[0] == -1).all() and (channels[1] == 100).all()
