"""The gate's report as files."""

import json
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from nnunet_cfcl.config import GateSettings
from nnunet_cfcl.counterfactual.gate import report as gate_report
from nnunet_cfcl.counterfactual.gate.cases import subset
from nnunet_cfcl.counterfactual.gate.evaluation import judge
from nnunet_cfcl.counterfactual.gate.report import draw_figures, page, write_report
from nnunet_cfcl.counterfactual.generator.data import Patches
from tests.counterfactual import random_generator
from tests.counterfactual.gate.drawn_figures import keep_figures
from tests.counterfactual.phantom_generators import INTERVENTIONS, Nothing, TrueCounterfactuals, phantoms, scale_of

QUICK = GateSettings(predictor_steps=2, segmenter_steps=2)


@pytest.fixture(scope="module")
def made():
    """A generator, held-out patients, and a report of barely trained judges."""
    torch.set_num_threads(1)
    training, held_out = phantoms(12, test=False), phantoms(16, test=True)
    generator = TrueCounterfactuals(held_out.every, scale_of(training.patches))
    return generator, held_out, judge(generator, training.patches, held_out.patches, INTERVENTIONS, QUICK, 0)


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """All figures that the test draws."""
    return keep_figures(monkeypatch, gate_report)


def test_the_folder_holds_json_page_and_two_figures_and_no_other_file(made, tmp_path):
    generator, held_out, report = made
    folder = tmp_path / "new" / "report"
    for _ in range(2):  # a second time it is replaced
        write_report(folder, report, generator, held_out.patches, INTERVENTIONS, (2.0, 2.0))
    assert sorted(file.name for file in folder.iterdir()) == [
        "contact_sheet.png", "figures.png", "report.json", "report.md"]
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))
    for name in ("contact_sheet.png", "figures.png"):
        picture = matplotlib.image.imread(folder / name)
        assert min(picture.shape[:2]) > 400 and picture.std() > 0.05
    assert (folder / "report.md").read_text() == page(report)


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_a_row_and_a_verdict_for_every_intervention(made):
    _, _, report = made
    text = page(report)
    for one, verdict in zip(report.interventions, report.verdicts, strict=True):
        assert f"- **{one.name}**: {verdict.summary}." in text
        cells = row(text, one.name)
        assert len(cells) == len(row(text, "intervention")) == 8
        assert cells[1] == ("yes" if verdict.passed else "**no**")
        assert cells[4] == f"{one.reversibility:.2f}" and cells[6] == f"{one.distance_ratio:.2f}"
    effect = report.interventions[0].effectiveness[0]
    assert row(text, "scanner")[2] == f"scanner {effect.share:.2f} ({effect.accuracy:.2f})"
    assert "16 images of 16 held-out cases, with networks trained on 12 other cases" in text
    assert f"{len(report.passed)} of 3 interventions passed" in text and "effectiveness 0.8" in text


def test_without_labels_the_page_shows_structure_agreement_with_that_of_unrelated_patients(made):
    _, _, report = made
    one = replace(report.interventions[0], dice_originals=None, dice_counterfactuals=None)
    text = page(replace(report, interventions=(one,), verdicts=report.verdicts[:1]))
    assert row(text, "scanner")[5] == f"{one.structure:.2f} ({one.structure_unrelated:.2f})"


def test_bars_and_histograms_show_the_metrics_of_the_report(made, tmp_path, figures):
    _, _, report = made
    named = replace(report.interventions[0], name=r"$\foo$")  # no mathematics
    draw_figures(replace(report, interventions=(named, *report.interventions[1:])), tmp_path / "named.png")
    figures.clear()
    draw_figures(report, tmp_path / "figures.png")
    bars, *histograms = figures[0].axes
    effects = [one for figure in report.interventions for one in figure.effectiveness]
    kept = [one for figure in report.interventions for one in figure.kept]
    assert len(effects) == 4 and len(kept) == 2
    heights = [bar.get_height() for bar in bars.patches]
    assert heights == pytest.approx([one.share for one in effects + kept] + [one.accuracy for one in effects + kept])
    drawn = [axes for axes in histograms if axes.patches]
    # scanner and disease to either value, both to four combinations
    assert len(drawn) == 2 + 2 + 4
    target = report.interventions[0].targets[0]
    assert drawn[0].get_title() == "to scanner A\n(8 images, 8 real)"
    densities = [patch.get_data().values for patch in drawn[0].patches]
    one = target.histograms[0]
    np.testing.assert_allclose(densities, np.sqrt([one.originals, one.counterfactuals, one.real]))


def test_of_many_groups_the_largest_are_drawn(made, tmp_path, figures):
    _, _, report = made
    one = report.interventions[2]
    targets = tuple(replace(one.targets[0], values={"site": f"S{n}"}, counterfactuals=n) for n in (3, 9, 1, 7, 5, 2))
    few = replace(report, interventions=(replace(one, targets=targets),), verdicts=report.verdicts[2:])
    draw_figures(few, tmp_path / "figures.png")
    drawn = [axes.get_title().split("\n")[0] for axes in figures[0].axes[1:] if axes.patches]
    assert drawn == ["to site S9", "to site S7", "to site S5", "to site S3"]


def test_a_histogram_is_a_density(made):
    _, _, report = made
    for target in report.interventions[2].targets:
        one = target.histograms[0]
        for density in (one.originals, one.counterfactuals, one.real):
            # half a percent on either side of all images together may be missing
            assert 0.9 < float(np.asarray(density) @ np.diff(one.edges)) <= 1 + 1e-9


def test_unknown_metrics_are_dashes_and_the_figures_are_still_drawn(made, tmp_path):
    _, held_out, _ = made
    training = phantoms(12, test=False)
    generator = Nothing(held_out.every, scale_of(training.patches))
    few = subset(held_out.patches, range(4))
    report = judge(generator, training.patches, few, INTERVENTIONS, QUICK, 0)
    write_report(tmp_path, report, generator, few, INTERVENTIONS, (2.0, 2.0))
    text = (tmp_path / "report.md").read_text()
    assert row(text, "scanner")[2:] == ["-", "-", "-", "- (-)", "-", "-, -"]
    assert "only 4 held-out cases" in text and "Composition -, reconstruction -" in text
    assert (tmp_path / "figures.png").stat().st_size > 1000


@pytest.mark.parametrize("dim", [2, 3])
def test_a_real_generator_is_judged_and_reported_in_2d_and_3d(dim, tmp_path):
    """Two channels, three scanners, an age, an unknown cell; the weights are random."""
    generator = random_generator.random_generator(dim, channels=2)

    def patches(count: int, seed: int) -> Patches:
        images = torch.randn((count, 2, *generator.patch_size), generator=torch.Generator().manual_seed(seed))
        cells = [{"scanner": "ABC"[n % 3], "disease": ("no", "yes", "")[n // 3 % 3], "age": "61"} for n in range(count)]
        return Patches(images, tuple(f"{seed}_{n}" for n in range(count)), tuple(cells))

    held_out, interventions = patches(18, 1), random_generator.INTERVENTIONS
    report = judge(generator, patches(18, 0), held_out, interventions, QUICK, 0)
    assert [one.images for one in report.interventions] == [18, 12, 12]
    assert report.composition == pytest.approx(0, abs=1e-5)
    assert set(report.predictor) == {"scanner", "disease"} and report.reconstruction > 0
    write_report(tmp_path, report, generator, held_out, interventions, (3.0, 1.0, 1.0)[-dim:])
    assert len(json.loads((tmp_path / "report.json").read_text())["interventions"]) == 3
