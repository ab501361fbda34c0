"""From drawn voxels to metrics per case, JSON, a Markdown page and a plot."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from nnunet_cfcl.evaluation.probe import figure as probe_figure
from nnunet_cfcl.evaluation.probe import report as probe_report
from nnunet_cfcl.evaluation.probe.features import SampledFeatures
from nnunet_cfcl.evaluation.probe.linear_probe import FeatureScale
from nnunet_cfcl.evaluation.probe.measure import comparable_groups, voxel_metrics
from nnunet_cfcl.evaluation.probe.results import METRICS, Estimate, ModelMetrics, paired_differences

CASES = ("a", "b", "c")


def sampled(shift=0.0, apart=10.0, sd=1.0):
    """Three cases, the last without the second class; counterfactuals are shifted along the second axis."""
    random = np.random.default_rng(0)
    labels = np.concatenate([np.repeat([0, 1], 300), np.repeat([0, 1], 300), np.repeat([0], 300)])
    features = sd * random.normal(size=(len(labels), 2))
    features[labels == 1, 0] += apart
    moved = features + np.array([0.0, shift])
    return SampledFeatures(features, moved, labels.astype(np.int16), np.repeat(CASES, [600, 600, 300]))


IDENTITY = FeatureScale(np.zeros(2), np.ones(2))


def test_two_separate_classes_are_clusters_with_a_known_distance_over_std():
    values, means, apart = voxel_metrics(sampled(), IDENTITY, CASES, 0)
    assert (values["kmeans_accuracy"] == 1).all()
    np.testing.assert_allclose(values["class_distance"], 10 / np.sqrt(2), rtol=0.06)
    assert (values["counterfactual_distance"] == 0).all()
    assert apart == pytest.approx(10, rel=0.02) and means.shape == (3, 2, 2) and np.isnan(means[2, 1]).all()


def test_the_counterfactual_distance_is_relative_to_the_distance_between_classes():
    values = voxel_metrics(sampled(shift=5.0, sd=0.01), IDENTITY, CASES, 0)[0]
    np.testing.assert_allclose(values["counterfactual_distance"], 0.5, rtol=1e-3)


def test_metrics_of_a_case_without_voxels_are_nan():
    values, means, _ = voxel_metrics(sampled(), IDENTITY, (*CASES, "d"), 0)
    assert all(np.isnan(column[3]) for column in values.values()) and np.isnan(means[3]).all()


def test_groups_of_one_case_are_not_compared():
    assert comparable_groups({"a": "x", "b": "x", "c": "y"}) == {}
    assert comparable_groups({"a": "x", "b": "x", "c": "y", "d": "y", "e": "z"}) == dict(zip("abcd", "xxyy"))


def model(name, offset, gap=True):
    values = {key: np.array([0.5, 0.6, np.nan]) + offset for key in METRICS}
    estimates = {key: Estimate(0.55 + offset, 0.5, 0.6) for key in METRICS}
    if gap:
        estimates["scanner_gap"] = Estimate(0.2, float("nan"), float("nan"), 0.1)
    return ModelMetrics(name, None, "0" * 12, CASES, values, {1: values["probe_dice"]}, estimates,
                              {1: Estimate(0.55, 0.5, 0.6)}, (2,))


@pytest.fixture
def result():
    patch = SimpleNamespace(labels=np.zeros(7))
    images = SimpleNamespace(
        training=("t",), validation=CASES, training_patches=[patch], validation_patches=[patch] * 2)
    source = SimpleNamespace(name="acquisition", identity=lambda: {"source": "acquisition"})
    probe = SimpleNamespace(images=images, change=SimpleNamespace(source=source), seed=0, groups={"a": "x"},
                            column="scanner", labels=(1,), image_set="abc", patients=["p", "q", "q"])
    models = (model("one", 0.0), model("two|2", 0.1))
    differences = tuple(paired_differences(models, probe.patients, 0))
    return probe_report.ProbeResult(probe, models, differences, "Dataset001_A", "2d", "nnUNetPlans", 0, {1: "organ"})


def test_models_are_compared_case_by_case(result):
    assert [(one.model, one.figure, one.cases) for one in result.differences] == [
        ("two|2", metric, 2) for metric in METRICS]
    assert all(one.difference == pytest.approx(0.1) for one in result.differences)


def test_the_json_is_strict_and_has_the_documented_keys(result, tmp_path):
    probe_report.write_report(tmp_path, result)
    content = json.loads((tmp_path / "probe.json").read_text(), parse_constant=pytest.fail)
    first = content["models"][0]
    assert [one["model"] for one in content["models"]] == ["one", "two|2"]
    for key in first:
        assert f'"{key}"' in probe_report.__doc__, key
    assert first["figures"]["probe_dice"] == {
        "mean": 0.55, "low": 0.5, "high": 0.6, "by_chance": None, "more_is_better": True}
    assert first["figures"]["scanner_gap"]["by_chance"] == 0.1
    assert first["per_case"][0] == {"case": "a", "patient": "p", "group": "x", **dict.fromkeys(METRICS, 0.5),
                                    "dice": {"1": 0.5}}
    assert first["per_case"][2]["probe_dice"] is None
    assert first["meaning"].keys() == first["figures"].keys() and first["voxels"] == {"training": 7, "validation": 14}


def test_the_page_lists_every_model_and_warns_of_few_patients_and_unseen_labels(result):
    page = probe_report.page(result)
    assert "| one | 0.550 [0.500, 0.600]" in page and "two\\|2" in page and "by chance 0.100" in page
    assert "of 2 patients only: their intervals are unreliable" in page and "no voxel of 2 was drawn" in page
    assert "+0.100" in page and "1 (organ)" in page


def test_the_plot_has_a_panel_with_coloured_bars_for_every_metric(result, tmp_path):
    probe_figure.draw(tmp_path / "probe.png", result)
    drawn = np.asarray(Image.open(tmp_path / "probe.png").convert("RGB")).astype(int)
    assert drawn.shape[0] > 500 and drawn.shape[1] > 900
    coloured = np.abs(drawn - drawn.mean(-1, keepdims=True)).max(-1) > 30
    # a third of the width each: bars in all six panels
    thirds = [part for row in np.array_split(coloured[80:], 2) for part in np.array_split(row, 3, axis=1)]
    assert len(thirds) == 6 and all(part.mean() > 0.02 for part in thirds)
