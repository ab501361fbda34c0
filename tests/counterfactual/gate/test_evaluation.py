"""The gate's verdicts on generators of known quality, built from phantom patients."""

import json
from dataclasses import replace

import pytest
import torch

from nnunet_cfcl.config import GateSettings
from nnunet_cfcl.counterfactual.gate import evaluation as gate
from nnunet_cfcl.counterfactual.gate.attribute_predictor import train_predictor
from nnunet_cfcl.counterfactual.gate.cases import subset
from nnunet_cfcl.counterfactual.gate.evaluation import evaluate, judge
from nnunet_cfcl.counterfactual.gate.judges import Judges, train_judges
from nnunet_cfcl.counterfactual.generator.data import Patches
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding
from tests.counterfactual.phantom_generators import (
    CODING,
    DISEASE,
    INTERVENTIONS,
    SCANNER,
    AnotherPatient,
    DiseaseWithScanner,
    MovesAnatomy,
    Nothing,
    OnlyScanner,
    Restless,
    TrueCounterfactuals,
    phantoms,
    scale_of,
)
from tests.runs.watching import is_watched

SETTINGS = GateSettings(predictor_steps=300, segmenter_steps=100)
QUICK = GateSettings(predictor_steps=2, segmenter_steps=2)


@pytest.fixture(scope="module")
def training():
    return phantoms(96, test=False)


@pytest.fixture(scope="module")
def held_out():
    return phantoms(24, test=True)


@pytest.fixture(scope="module")
def judges(training, held_out):
    torch.set_num_threads(1)
    generator = TrueCounterfactuals(held_out.every, scale_of(training.patches))
    return train_judges(generator, training.patches, held_out.patches, SETTINGS, 0)


@pytest.fixture
def judged(judges, held_out):
    """Function: class of a generator -> {name of the intervention: (metrics, verdict)}."""

    def judge_class(kind, **changes):
        generator = kind(held_out.every, judges.generator.scale)
        report = evaluate(replace(judges, generator=generator, **changes), INTERVENTIONS, SETTINGS)
        return {one.name: (one, verdict) for one, verdict in zip(report.interventions, report.verdicts)}

    return judge_class


def test_true_counterfactuals_pass_with_nearly_perfect_metrics(judged):
    for metrics, verdict in judged(TrueCounterfactuals).values():
        assert verdict.passed, verdict.summary
        for one in metrics.effectiveness:
            assert one.accuracy > 0.9 and one.share > 0.9
        assert metrics.reversibility == 0 and metrics.dice_originals > 0.85 and metrics.dice_ratio > 0.95
        assert metrics.structure > metrics.structure_unrelated + 0.2
        assert metrics.images == metrics.cases == 24


def test_the_true_scanner_change_matches_the_target_intensities_and_keeps_the_disease(judged):
    metrics, _ = judged(TrueCounterfactuals)["scanner"]
    assert metrics.distance_ratio < 0.3 and metrics.distance_after < 3 * metrics.distance_real
    assert [one.attribute for one in metrics.kept] == ["disease"] and metrics.kept[0].share > 0.8
    assert [target.values for target in metrics.targets] == [{"scanner": "A"}, {"scanner": "B"}]
    assert [(target.counterfactuals, target.real) for target in metrics.targets] == [(12, 12), (12, 12)]


def test_the_disease_changes_a_small_part_of_the_image_the_scanner_nearly_all(judged):
    found = judged(TrueCounterfactuals)
    assert found["disease"][0].changed_share < 0.2 < 0.7 < found["scanner"][0].changed_share
    assert found["disease"][0].change < found["scanner"][0].change


def test_a_generator_without_effect_is_ineffective_although_it_keeps_the_anatomy(judged):
    for metrics, verdict in judged(Nothing).values():
        assert not verdict.passed and verdict.ineffective and "the images do not change" in verdict.summary
        assert all(one.share < 0.1 for one in metrics.effectiveness)
        assert metrics.change == 0 and metrics.structure == pytest.approx(1) and metrics.reversibility is None


def test_right_intensities_in_the_wrong_place_fail_because_of_the_anatomy_alone(judged):
    for metrics, verdict in judged(MovesAnatomy).values():
        assert not verdict.passed and not verdict.ineffective
        assert len(verdict.reasons) == 1 and verdict.reasons[0].startswith("anatomy (Dice"), verdict.summary
        assert metrics.dice_ratio < 0.9


def test_without_labels_a_displaced_anatomy_is_detected_by_its_edges(judged, judges):
    unlabelled = {"segmenter": None, "held_out": replace(judges.held_out, labels=None)}
    for metrics, verdict in judged(MovesAnatomy, **unlabelled).values():
        assert metrics.dice_originals is None and not verdict.passed
        assert len(verdict.reasons) == 1 and verdict.reasons[0].startswith("anatomy (structure agreement)")
    for _, verdict in judged(TrueCounterfactuals, **unlabelled).values():
        assert verdict.passed, verdict.summary


def test_a_generator_of_one_attribute_passes_with_that_attribute_only(judged):
    found = judged(OnlyScanner)
    assert found["scanner"][1].passed
    for name in ("disease", "scanner+disease"):
        assert found[name][1].ineffective and "effectiveness of disease" in found[name][1].summary


def test_an_attribute_that_changes_along_with_another_is_detected(judged):
    found = judged(DiseaseWithScanner)
    assert "disease changes too" in found["scanner"][1].summary and not found["scanner"][1].passed
    assert not found["scanner"][1].ineffective and found["disease"][1].passed
    # both are asked for there, so that it comes as called
    assert found["scanner+disease"][1].passed


def test_another_patient_of_the_target_group_does_not_pass(judged):
    for _, verdict in judged(AnotherPatient).values():
        assert not verdict.passed and not verdict.ineffective
        assert "reversibility" in verdict.summary or "anatomy" in verdict.summary


def test_a_generator_that_always_changes_images_fails_because_of_composition(judges, held_out):
    generator = Restless(held_out.every, judges.generator.scale)
    report = evaluate(replace(judges, generator=generator), INTERVENTIONS[:1], SETTINGS)
    assert report.composition == pytest.approx(0.2 / float(judges.std), rel=1e-3)
    assert "composition" in report.verdicts[0].summary


class Broken(TrueCounterfactuals):
    """Not finite where the disease is changed."""

    def change(self, image, patient, before, after):
        made = self.every[after][patient]
        return made if before[1] == after[1] else made.clone().index_fill_(1, torch.tensor([3]), float("nan"))


def test_non_finite_counterfactuals_never_pass(judges, held_out):
    generator = Broken(held_out.every, judges.generator.scale)
    report = evaluate(replace(judges, generator=generator), INTERVENTIONS, SETTINGS)
    assert report.passed == ("scanner",)
    assert report.verdicts[1].summary == "not passed: 24 of 24 counterfactuals are not finite"
    json.dumps(report.to_json(), allow_nan=False)


def test_the_report_lists_the_interventions_that_passed_and_is_plain_json(judges):
    report = evaluate(judges, INTERVENTIONS, SETTINGS)
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["passed"] == ["scanner", "disease", "scanner+disease"] == list(report.passed)
    assert content["interventions"][0]["verdict"]["passed"] is True
    assert content["interventions"][0]["dice_ratio"] == pytest.approx(report.interventions[0].dice_ratio)
    assert content["settings"]["effectiveness"] == 0.8 and content["training_cases"] == 96
    # 0.9 x is what the phantom's generator calls a reconstruction
    expected = 0.1 * float((judges.held_out.images.abs() / judges.std).mean())
    assert report.reconstruction == pytest.approx(expected, rel=1e-4)
    assert report.composition == 0 and set(report.predictor) == {"scanner", "disease"}


def test_the_same_arguments_give_the_same_report(training, held_out):
    generator = TrueCounterfactuals(held_out.every, scale_of(training.patches))
    arguments = (generator, training.patches, held_out.patches, INTERVENTIONS[:1], QUICK)
    one, same = (judge(*arguments, 3) for _ in range(2))
    assert one == same and judge(*arguments, 4) != one


def test_the_number_of_images_is_limited_and_balanced_over_the_groups(training, held_out):
    generator = TrueCounterfactuals(held_out.every, scale_of(training.patches))
    report = judge(generator, training.patches, held_out.patches, INTERVENTIONS[2:], replace(QUICK, cases=12), 0)
    assert report.images == 12 and [target.real for target in report.interventions[0].targets] == [3] * 4


def test_training_cases_among_the_held_out_cases_raise(training, held_out):
    generator = TrueCounterfactuals(held_out.every, scale_of(training.patches))
    with pytest.raises(ValueError, match="held-out and training cases must be disjoint"):
        judge(generator, training.patches, training.patches, INTERVENTIONS, QUICK, 0)
    with pytest.raises(ValueError, match="expected training and held-out patches"):
        judge(generator, training.patches, subset(held_out.patches, []), INTERVENTIONS, QUICK, 0)


def with_cells(patches: Patches, **changes) -> Patches:
    return replace(patches, cells=tuple({**cells, **{name: value(n, cells) for name, value in changes.items()}}
                                        for n, cells in enumerate(patches.cells)))


def on(judges: Judges, patches: Patches) -> Judges:
    """The same judges with other held-out patches."""
    return replace(judges, held_out=patches, predicted=judges.predictor.predictions(patches.images))


def test_with_few_cases_every_metric_is_unknown_and_the_intervention_fails(judges, held_out):
    report = evaluate(on(judges, subset(held_out.patches, range(5))), INTERVENTIONS, SETTINGS)
    assert report.composition is None and report.reconstruction is None and not report.passed
    assert all("only 5 held-out cases" in verdict.summary for verdict in report.verdicts)
    assert report.interventions[0].structure is None and report.interventions[0].effectiveness == ()


def test_cases_of_unknown_value_are_excluded_from_that_intervention_only(judges):
    patches = with_cells(judges.held_out, scanner=lambda n, cells: "" if n < 10 else cells["scanner"])
    report = evaluate(on(judges, patches), INTERVENTIONS, SETTINGS)
    assert [one.images for one in report.interventions] == [14, 24, 14]
    scanner = report.interventions[0].effectiveness[0]
    assert sum(value.real for value in scanner.values) == 14 == sum(value.counterfactuals for value in scanner.values)
    # what a counterfactual's disease was taken for before is that of its own original
    assert report.interventions[0].kept[0].share > 0.8 and report.interventions[0].dice_originals > 0.85


def test_a_group_without_a_held_out_case_cannot_be_judged(judges, held_out):
    only_a = [n for n, cells in enumerate(held_out.patches.cells) if cells["scanner"] == "A"]
    patches = subset(held_out.patches, only_a)
    report = evaluate(on(judges, patches), INTERVENTIONS, SETTINGS)
    metrics, verdict = report.interventions[0], report.verdicts[0]
    assert "no held-out case has scanner B" in verdict.reasons[0] and not verdict.passed and not verdict.ineffective
    assert metrics.effectiveness[0].accuracy is None and metrics.effectiveness[0].share > 0.9
    assert metrics.distance_after is None and metrics.targets[0].histograms[0].real is None
    assert "fewer than two values of scanner occur in the held-out cases" in report.verdicts[1].summary
    json.dumps(report.to_json(), allow_nan=False)


class ThreeSites:
    """Two channels; a site's images have its brightness in channel 1, and nothing else."""

    device = torch.device("cpu")
    site, age = Attribute("site", "categorical", ("A", "B", "C")), Attribute("age", "continuous", (), 50, 10)
    coding = AttributeCoding((site, age))

    def __init__(self, deaf: int | None = None) -> None:
        self.deaf = deaf

    def patches(self, count: int, seed: int) -> Patches:
        random = torch.Generator().manual_seed(seed)
        images = torch.randn((count, 2, 24, 24), generator=random)
        images[:, 1] += 2.0 * (torch.arange(count) % 3).view(-1, 1, 1)
        return Patches(images, tuple(f"{seed}_{n}" for n in range(count)),
                       tuple({"site": "ABC"[n % 3], "age": "60"} for n in range(count)))

    def counterfactuals(self, images, parents, others):
        steps = others[:, :3].argmax(1) - parents[:, :3].argmax(1)
        if self.deaf is not None:
            steps[others[:, :3].argmax(1) == self.deaf] = 0
        made = images.clone()
        made[:, 1] += 2.0 * steps.view(-1, 1, 1)
        return made

    def reconstruct(self, images, parents):
        return images


@pytest.mark.parametrize("deaf, passes", [(None, True), (1, False)])
def test_several_channels_and_values_are_judged_value_by_value(deaf, passes):
    """One site of three that is never reached lowers the mean of three values to two thirds."""
    generator = ThreeSites(deaf)
    training, held_out = generator.patches(90, 0), generator.patches(30, 1)
    generator.scale = scale_of(training)
    report = judge(generator, training, held_out, [Intervention((ThreeSites.site,))],
                   GateSettings(predictor_steps=120), 0)
    metrics, verdict = report.interventions[0], report.verdicts[0]
    assert verdict.passed is passes, verdict.summary
    assert metrics.kept == () and set(report.predictor) == {"site"}
    shares = {value.value: value.share for value in metrics.effectiveness[0].values}
    assert shares["A"] > 0.9 and shares["C"] > 0.9 and (shares["B"] > 0.9) is passes
    assert len(metrics.targets[0].histograms) == 2 and verdict.ineffective is not passes


def test_the_accuracy_of_an_attribute_is_unknown_if_a_value_has_no_real_case():
    generator = ThreeSites()
    training, held_out = generator.patches(90, 0), generator.patches(30, 1)
    generator.scale = scale_of(training)
    without_c = subset(held_out, [n for n, cells in enumerate(held_out.cells) if cells["site"] != "C"])
    report = judge(generator, training, without_c, [Intervention((ThreeSites.site,))],
                   GateSettings(predictor_steps=120), 0)
    effect = report.interventions[0].effectiveness[0]
    assert effect.accuracy is None
    assert {value.value: value.real for value in effect.values} == {"A": 10, "B": 10, "C": 0}
    assert report.verdicts[0].reasons[0].startswith("no held-out case has site C")
    assert report.predictor["site"] > 0.9  # of the values that there are


def test_the_predictor_of_the_gate_is_not_one_that_another_part_trains_with_its_seed(judges, training):
    other = train_predictor(training.patches, CODING, "plain", 1, 0, "cpu", judges.generator.scale)
    quick = GateSettings(predictor_steps=1, segmenter_steps=1)
    own = train_judges(judges.generator, training.patches, judges.held_out, quick, 0)
    assert not torch.allclose(other.head.weight, own.predictor.head.weight, atol=1e-3)
    assert own.predictor.attributes == (SCANNER, DISEASE)


def test_the_gate_is_watched_and_every_intervention_is_progress(judges, monkeypatch):
    noted = []
    monkeypatch.setattr(gate, "beat", lambda: noted.append(is_watched()))
    evaluate(judges, INTERVENTIONS, SETTINGS)
    assert noted == [True] * len(INTERVENTIONS)
