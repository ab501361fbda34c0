"""`nnunet_cfcl report` on synthetic folders of folds: complete, interrupted, empty, broken and hostile."""

import base64
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from nnunet_cfcl import cli
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.evaluation.report import metrics as report_metrics
from nnunet_cfcl.evaluation.report.blocks import duration, metric_text
from nnunet_cfcl.evaluation.report.fold_folder import read_fold, setting_rows
from nnunet_cfcl.evaluation.report.metrics import method_names
from nnunet_cfcl.evaluation.report.pictures import BrokenPicture, embed
from nnunet_cfcl.evaluation.report.plots import compared_curves, pretraining_curves
from nnunet_cfcl.nnunet.fold_files import read_training
from tests.evaluation.report.fold_folders import (
    CASES,
    DATASET,
    Page,
    fold_folder,
    training_log,
    write_complete,
    write_config,
    write_dataset,
    write_gate,
    write_picture,
    write_pretraining,
    write_probe,
    write_training,
    write_validation,
)

PLAIN = {"html", "head", "meta", "link", "title", "style", "body", "header", "h1", "h2", "h3", "p", "b", "nav", "ul",
         "li", "a", "main", "div", "section", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "span",
         "figure", "img", "figcaption", "details", "summary", "footer"}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "rel", "href", "class", "id", "aria-label", "role",
              "tabindex", "scope", "src", "alt", "width", "height", "open"}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """nnU-Net's three folders in the working folder."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / f"nnUNet_{name}").mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / f"nnUNet_{name}"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(*arguments):
    assert cli.main(["report", *map(str, arguments), "-np", "1", "-device", "cpu"]) == 0


def page_of(fold, *more):
    report(fold, *more)
    return Page(fold / "cfcl" / "report" / "report.html")


def error_of(capsys, *arguments):
    assert cli.main(["report", *map(str, arguments), "-np", "1"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def check_is_harmless(page):
    """Check that the page has only the template's elements, no scripts, no external content and valid anchors."""
    assert {tag for tag, _ in page.elements} <= PLAIN
    assert {name for _, attributes in page.elements for name in attributes} <= ATTRIBUTES
    policy, = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert all(re.match(r"data:image/(png|jpeg|svg\+xml);base64,[A-Za-z0-9+/=]+$", image["src"]) for image in
               page.all("img"))
    assert all(image["alt"] for image in page.all("img"))
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert {link["href"] for link in page.all("a")} <= {f"#{name}" for name in names}
    assert [link["href"] for link in page.all("link")] == ["data:,"]
    assert "url(" not in page.source and "@import" not in page.source
    assert all(head.get("scope") in ("row", "col") for head in page.all("th"))


def test_the_page_of_a_complete_fold_has_all_sections(root, capsys):
    write_dataset(root)
    fold = write_complete(root)
    page = page_of(fold)
    check_is_harmless(page)
    assert re.search(r"Look at .*/fold_0/cfcl/report/report\.html \(\d\.\d MB\)", capsys.readouterr().out)
    overview = page.text("fold1-overview")
    assert "4 of 4 epochs, 6 min 00 s" in overview and "3 of 3 epochs, 37 s" in overview.replace("38 s", "37 s")
    assert "2026-05-01 10:00" in overview and "10 masks" in overview and "2.9.0, cpu" in overview
    assert "1 of 2 passed" in overview and "replace the others" in overview
    assert "1 of 117 settings differ" in re.sub(r"of \d+ settings differ", "of 117 settings differ",
                                                page.text("fold1-settings"))
    assert "pretrain.epochs 4 200" in page.text("fold1-settings")
    gate = page.text("fold1-gate")
    assert "scanner passed" in gate and "disease not passed" in gate and "the way back does not lead" in gate
    probe = page.text("fold1-probe")
    assert "0.500 [0.400, 0.600]" in probe and "1 (organ)" in probe and "Dice of a linear classifier" in probe
    # two plots of curves, views, two of the gate, three CHRO-maps, metrics, probe
    assert len(page.all("img")) == 10


def test_the_metrics_equal_those_of_evaluate_by_group(root):
    write_dataset(root)
    fold = write_complete(root)
    page = page_of(fold)
    text = page.text("fold1-metrics")
    # squares of 12 x 12, shifted by one row (11 of 12 overlap) or not; sites and shifts alternate
    dice = {"north": 11 / 12, "south": 1.0}
    assert "By site" in text and "By age" not in text
    assert all(f"{group} 5 (5) {value:.3f}" in text for group, value in dice.items())
    assert f"10 (10) {np.mean(list(dice.values())):.3f} [" in text
    assert f"{1 - 11 / 12:.3f} [0.083, 0.083]; worst north, best south" in text
    written = json.loads((fold / "cfcl/report/evaluation/metrics.json").read_text())
    assert written["settings"]["by"] == ["site"]


def test_the_page_warns_that_fold_all_was_trained_on_its_validation_cases(root):
    write_dataset(root)
    words = ("Caution: fold all was trained on these cases: the metrics of nnUNetTrainerDVDCL do not generalise to "
             "other cases")
    assert words in page_of(write_complete(root, fold="all")).text("fold1-metrics")
    assert "fold all" not in page_of(write_complete(root)).text("fold1-metrics")


def test_metrics_are_reused_until_a_mask_changes(root, monkeypatch):
    write_dataset(root)
    fold = write_complete(root)
    calls, plain = [], report_metrics.evaluate
    monkeypatch.setattr(report_metrics, "evaluate", lambda *a, **b: (calls.append(a), plain(*a, **b)))
    report(fold)
    report(fold)
    assert len(calls) == 1
    write_validation(fold, error=3)
    page = page_of(fold)
    assert len(calls) == 2 and f"{1 - 3 / 12:.3f}" in page.text("fold1-metrics")


@pytest.mark.parametrize("kind", ["empty", "killed", "stock"])
def test_the_page_reports_what_is_missing(root, kind):
    write_dataset(root)
    fold = fold_folder(root)
    if kind == "killed":
        write_config(fold, {"pretrain": {"epochs": 9}})
        log = write_pretraining(fold, epochs=2, finished=False) / "log.jsonl"
        log.write_text(log.read_text() + '{"epoch": 2, "lo')
    if kind == "stock":
        write_training(fold)
        write_validation(fold)
    page = page_of(fold)
    check_is_harmless(page)
    overview, gate = page.text("fold1-overview"), page.text("fold1-gate")
    words = {"empty": "not started there is no log",
             "killed": "not finished 2 of 9 epochs, 3 min 00 s: stopped or running; resume with --c",
             "stock": "pretraining none the trainer has no pretraining"}
    assert words[kind] in overview and "log.jsonl" not in overview
    assert ("analytic interventions on the acquisition" if kind == "killed" else "no report of a generator's") in gate
    assert ("were not measured" in page.text("fold1-metrics")) == (kind != "stock")
    assert "nnunet_cfcl probe" in page.text("fold1-probe")
    assert ("There are no curves of a pretraining" in page.text("fold1-curves")) == (kind != "killed")


def test_failed_chromaps_are_reported_and_can_be_omitted(root):
    write_dataset(root)
    fold = fold_folder(root)
    write_training(fold)
    (fold / "checkpoint_final.pth").unlink()
    write_validation(fold)
    for file in (fold / "validation" / "chromap").iterdir():
        file.unlink()
    assert "No CHRO-maps could be computed: there is no checkpoint_final.pth" in page_of(fold).text("fold1-chromaps")
    (fold / "checkpoint_final.pth").write_bytes(b"no checkpoint")
    assert "No CHRO-maps could be computed" in page_of(fold).text("fold1-chromaps")
    assert "fold1-chromaps" not in page_of(fold, "--no-chromap").texts


def test_maps_of_a_named_folder_are_shown(root):
    fold = write_complete(root)
    for number in range(5):
        write_picture(root / "maps" / "chromap" / f"named_{number}.png")
    text = page_of(fold, "--chromap", root / "maps").text("fold1-chromaps")
    assert all(f"named_{number}" in text for number in (0, 2, 4)) and "named_1" not in text
    (root / "none").mkdir()
    assert "has no CHRO-maps" in page_of(fold, "--chromap", root / "none").text("fold1-chromaps")


HOSTILE = '"><img src=x onerror=alert(1)>\'&amp;{{7*7}}<b>ü\N{RIGHT-TO-LEFT OVERRIDE}'


def test_all_texts_from_names_and_files_are_escaped(root):
    dataset = f"Dataset902_{HOSTILE}"
    write_dataset(root, groups=(f"<script>{HOSTILE}</script>", "south"), dataset=dataset)
    fold = write_complete(root, f"nnUNetTrainer{HOSTILE}", dataset=dataset)
    script = f"<script>alert(1)</script>{HOSTILE}"
    write_config(fold, {script: {script: script}, "seed": script}, method=script, settings_hash=script,
                 pretraining={"counterfactuals": {"source": script}}, pretraining_folder=script)
    (fold / "cfcl" / "probe" / "probe.json").unlink()
    (fold / "cfcl" / "probe" / "probe.png").unlink()
    (fold / "cfcl" / "probe").rmdir()
    write_probe(fold, model=script)
    (fold / "cfcl" / "generator" / "report" / "report.json").write_text(json.dumps({"interventions": [
        {"name": script, "verdict": {"passed": False, "reasons": [script]}, "effectiveness": script, "kept": [script]}],
        "images": script, "settings": {"effectiveness": script}}))
    write_picture(fold / "validation" / "chromap" / f"{HOSTILE}.png")
    page = page_of(fold)
    check_is_harmless(page)
    assert f"<title>nnUNetTrainer{HOSTILE}" not in page.source
    assert all(script in page.text(f"fold1-{section}") for section in ("overview", "settings", "gate", "probe"))
    assert f"<script>{HOSTILE}</script>" in page.text("fold1-metrics")
    assert "{{7*7}}" in page.text() and "49" not in page.text("fold1-gate")
    assert f"CHRO-map of {HOSTILE}" in [image["alt"] for image in page.all("img")]


def test_a_comparison_of_hostile_names_is_escaped_too(root):
    write_dataset(root)
    folds = [write_complete(root, f"nnUNetTrainer{name}<i>$\\frac$", error) for name, error in (("A", 1), ("B", 2))]
    report(*folds, "-o", root / "out.html")
    page = Page(root / "out.html")
    check_is_harmless(page)
    assert "nnUNetTrainerA" in page.text("comparison-differences")


def test_logs_with_values_other_than_numbers_are_plotted_where_possible(root):
    fold = fold_folder(root)
    write_config(fold)
    lines = [{"epoch": 0, "loss": math.nan, "seconds": "long"}, {"epoch": "<b>", "loss": "x", "uniformity": -0.001},
             {"epoch": 2, "loss": 1.0, "uniformity": -0.001}]
    folder = write_pretraining(fold)
    (folder / "log.jsonl").write_text('7\n[1]\nno json\n' + "".join(json.dumps(line) + "\n" for line in lines))
    page = page_of(fold)
    check_is_harmless(page)
    assert "log.jsonl has 3 lines that are no JSON objects, the first in line 1" in page.text("fold1-overview")
    assert "the embeddings have collapsed" in page.text("fold1-curves")
    assert any("Curves of the pretraining" in image["alt"] for image in page.all("img"))


BREAKABLE = ("config.json", "pretraining/views.png", "generator/report/report.json", "generator/report/figures.png",
             "probe/probe.json", "probe/probe.png")


@pytest.mark.parametrize("content", [b"", b"[1, 2]", b"\xff\xfe\x00", b'{"a": "\xc3'])
def test_broken_files_are_listed_and_the_page_is_still_written(root, content):
    fold = write_complete(root)
    for name in BREAKABLE:
        (fold / "cfcl" / name).write_bytes(content)
    page = page_of(fold, "--no-chromap")
    check_is_harmless(page)
    for name in BREAKABLE:
        broken = name.rpartition("/")[2]
        assert re.search(rf"{re.escape(broken)} (cannot be read|holds no JSON object)", page.text()), name


@pytest.mark.parametrize("content", [{"settings": [1], "pretraining": "x", "pretraining_folder": 3, "method": None},
                                     {"settings": {"pretrain": 7, "seed": {"x": {"y": 1}}}, "settings_hash": 5}])
def test_a_config_of_another_structure_does_not_raise(root, content):
    fold = write_complete(root)
    (fold / "cfcl" / "config.json").write_text(json.dumps(content))
    check_is_harmless(page_of(fold, "--no-chromap"))


def test_settings_changed_by_hand_are_reported(root):
    fold = fold_folder(root)
    write_config(fold, {"pretrain": {"epochs": 5}, "future": {"option": 1}})
    assert "changed by hand" not in page_of(fold).text("fold1-overview")
    content = json.loads((fold / "cfcl/config.json").read_text())
    content["settings"]["pretrain"]["epochs"] = 6
    (fold / "cfcl/config.json").write_text(json.dumps(content))
    assert "changed by hand" in page_of(fold).text("fold1-overview")
    rows = {row.key: row for row in setting_rows(read_fold(fold))}
    assert [key for key, row in rows.items() if row.differs] == ["pretrain.epochs", "future.option"]
    assert rows["views.crop_fraction"].value == list(rows["views.crop_fraction"].default)
    assert not rows["future.option"].known


def test_without_truth_the_page_shows_nnunets_own_dice(root):
    fold = write_complete(root)
    text = page_of(fold).text("fold1-metrics")
    assert "neither in nnUNet_preprocessed" in text and "foreground mean 0.750" in text


def test_an_invalid_table_of_attributes_removes_the_groups_and_not_the_metrics(root):
    write_dataset(root)
    fold = write_complete(root)
    file = root / "nnUNet_raw" / DATASET / "attributes.csv"
    file.write_text(file.read_text() + "case_0,again,1\n")
    text = page_of(fold).text("fold1-metrics")
    assert "cases are not grouped" in text and "case_0" in text and "10 (10) 0.958" in text


def test_an_unknown_column_is_an_error_before_anything_is_written(root, capsys):
    write_dataset(root)
    fold = write_complete(root)
    error = error_of(capsys, fold, "--by", "scaner")
    assert "no column 'scaner' to group by" in error and "site" in error
    assert "; fix: name one of them with --by" in error
    assert not (fold / "cfcl" / "report").exists()


def test_further_evaluations_are_shown(root):
    write_dataset(root)
    fold = write_complete(root)
    truth = root / "nnUNet_preprocessed" / DATASET / "gt_segmentations"
    assert cli.main(["evaluate", "-p", str(fold / "validation"), "-g", str(truth), "-o", str(root / "more"), "-np",
                     "1"]) == 0
    (root / "none").mkdir()
    page = page_of(fold, "--evaluation", root / "more", root / "none")
    assert "1 (organ) 10 (10) 0.958" in page.text("more-evaluation1")
    assert "holds no evaluation" in page.text("more-evaluation2")


def test_several_folds_are_compared_with_the_first(root, capsys):
    write_dataset(root)
    first, other = (write_complete(root, f"nnUNetTrainer{name}", error) for name, error in (("Good", 1), ("Poor", 4)))
    write_config(other, {"pretrain": {"epochs": 7}, "seed": 5})
    report(first, other)
    assert str(root / "report.html") in capsys.readouterr().out
    page = Page(root / "report.html")
    check_is_harmless(page)
    text = page.text("comparison-differences")
    assert "nnUNetTrainerGood minus each other trainer" in text
    # shifted by 1, 0, 1, ... and by 4, 3, 4, ... of 12 rows
    assert "nnUNetTrainerPoor 1 (organ) 10 +0.250 [+0.250, +0.250], p 0.002" in text
    assert "nnUNetTrainerGood 10 (10) 0.958" in text and "nnUNetTrainerPoor 10 (10) 0.708" in text
    settings = page.text("comparison-compared-settings")
    assert "pretrain.epochs 4 7" in settings and "seed 0 5" in settings and "pretrain.temperature" not in settings
    assert "the same in" not in settings and "fold2-overview" in page.texts
    assert sum("Curves of all folds" in image["alt"] for image in page.all("img")) == 1


def test_a_comparison_with_an_empty_fold_reports_it(root):
    write_dataset(root)
    report(write_complete(root), fold_folder(root, "nnUNetTrainerOther"), "-o", "new/out.html")
    page = Page(root / "new" / "out.html")
    check_is_harmless(page)
    assert "nnUNetTrainerOther was not measured" in page.text("comparison-differences")
    assert "nnUNetTrainerDVDCL" in page.text("comparison-differences")


def test_folds_without_common_cases_have_metrics_and_no_differences(root):
    write_dataset(root)
    folds = [fold_folder(root, fold=str(number)) for number in range(2)]
    for number, fold in enumerate(folds):
        write_validation(fold, cases=CASES[5 * number:5 * number + 5])
    report(*folds, "-o", root / "out.html")
    page = Page(root / "out.html")
    text = page.text("comparison-differences")
    assert "minus each other trainer" not in text and text.count("1 (organ) 5 (5)") == 2
    assert "different folds" in page.text("comparison-table")
    assert "nnUNetTrainerDVDCL fold 1" in page.text()


def test_the_page_warns_of_probes_on_different_images(root):
    folds = [fold_folder(root, f"nnUNetTrainer{name}") for name in "AB"]
    for name, fold in zip(("aaaa", "bbbb"), folds):
        write_probe(fold, image_set=name)
    report(*folds, "-o", root / "out.html")
    text = Page(root / "out.html").text("comparison-compared-probes")
    assert "measured on different images" in text and "nnUNetTrainerA: trained" in text


def test_folds_of_different_datasets_or_configurations_are_an_error(root, capsys):
    fold = fold_folder(root)
    assert "different datasets" in error_of(capsys, fold, fold_folder(root, dataset="Dataset903_Other"))
    assert "different configurations" in error_of(capsys, fold, fold_folder(root, configuration="3d_fullres"))
    assert "named twice" in error_of(capsys, fold, fold / ".." / "fold_0")
    assert "2 folders of CHRO-maps for 1 folds" in error_of(capsys, fold, "--chromap", "a", "b")


@pytest.mark.parametrize(("which", "words"), [
    ("nowhere", ["does not exist", "TRAINER__PLANS__CONFIGURATION/fold_F"]),
    ("nnUNet_results", ["is not the folder of a fold", "fold_0; fix: name one of these folds"]),
    ("file.txt", ["is a file"]),
    ("empty", ["it holds nothing"]),
    ("nnUNet_results/fold_0", ["is not the folder of a fold"]),
])
def test_the_error_for_another_folder_says_what_was_found(root, capsys, which, words):
    fold_folder(root)
    (root / "empty").mkdir()
    (root / "file.txt").write_text("")
    if which.endswith("fold_0"):
        (root / which).mkdir()
    error = error_of(capsys, root / which)
    assert all(word in error for word in words), error


def test_logs_of_a_resumed_training_are_joined_and_a_new_training_replaces_them(root):
    fold, problems = fold_folder(root), []
    # 2026_10 sorts before 2026_5
    (fold / "training_log_2026_5_1_10_00_00.txt").write_text(training_log(range(4), day=1, done=False))
    (fold / "training_log_2026_10_1_10_00_00.txt").write_text(training_log([2, 3, 4], day=2))
    found = read_training(fold, problems)
    assert [line["epoch"] for line in found.epochs] == [0, 1, 2, 3, 4] and not problems
    assert [line["train_loss"] for line in found.epochs] == pytest.approx([0.499, 0.399, 0.298, 0.198, 0.098])
    assert found.epochs[3] == pytest.approx({"epoch": 3, "learning_rate": 0.006, "train_loss": 0.198, "val_loss": 0.3,
                                             "pseudo_dice": math.nan, "seconds": 12.5}, nan_ok=True)
    assert found.dice == 0.75 and (found.started.day, found.ended.day) == (1, 2)
    (fold / "training_log_2026_10_3_10_00_00.txt").write_text(training_log([0], day=3, done=False))
    assert [line["epoch"] for line in read_training(fold, problems).epochs] == [0]


def test_a_log_of_arbitrary_bytes_does_not_raise(root):
    fold = fold_folder(root)
    (fold / "training_log_x.txt").write_bytes(b"\xff\x00 2026-99-99 10:00:00: Epoch 1\n2026-13-01 10:00:00: Epoch 2\n")
    assert read_training(fold, []).epochs == ()


def test_pictures_are_bounded_in_size_and_flattened(tmp_path):
    found = embed(write_picture(tmp_path / "wide.png", (2400, 300)), "alt", most_width=800)
    assert (found.width, found.height) == (800, 100)
    kind, _, content = found.uri.partition(";base64,")
    assert kind == "data:image/jpeg" or len(content) < 500_000
    clear = tmp_path / "clear.png"
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(clear)
    decoded = Image.open(BytesIO(base64.b64decode(embed(clear, "alt").uri.partition(",")[2])))
    assert decoded.mode == "RGB" and decoded.getpixel((0, 0)) == (255, 255, 255)
    tall = embed(write_picture(tmp_path / "tall.png", (10, 900)), "alt", most_width=100)
    assert tall.height == 400


def test_pictures_that_cannot_be_shown_are_an_error(tmp_path):
    (tmp_path / "text.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(BrokenPicture, match=r"text\.png cannot be read"):
        embed(tmp_path / "text.png", "alt")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    with pytest.raises(BrokenPicture, match="9000 x 9000 pixels, too many to show"):
        embed(tmp_path / "huge.png", "alt")


def _svg(picture):
    return ElementTree.fromstring(base64.b64decode(picture.uri.partition(",")[2]))


def test_curves_are_reproducible_svg_and_none_without_values(root):
    fold = fold_folder(root)
    assert pretraining_curves(read_fold(fold)) is None
    write_pretraining(fold)
    picture = pretraining_curves(read_fold(fold))
    assert picture == pretraining_curves(read_fold(fold))
    groups = [one.get("id", "") for one in _svg(picture).iter("{http://www.w3.org/2000/svg}g")]
    # loss, alignment, uniformity, positives, gradient norm, learning rate; no panel for the temperature
    assert sum(name.startswith("axes_") for name in groups) == 6
    assert "loss" in picture.alt and "temperature" not in picture.alt


def test_dollar_signs_in_a_name_are_not_a_formula_in_the_legend(root):
    fold = fold_folder(root)
    write_pretraining(fold)
    assert compared_curves({"$\\frac$": read_fold(fold)}) is not None


def test_names_of_methods_are_short_unique_and_safe(root):
    folds = [read_fold(fold_folder(root, name, fold=fold)) for name, fold in (
        ("_nnU", "0"), ("nnU", "0"), ("NNU", "1"), ("a/../b".replace("/", ";"), "0"))]
    names = list(method_names(folds))
    assert len({name.casefold() for name in names}) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9][\w .+()-]*", name) for name in names)
    assert list(method_names(folds[1:2])) == ["nnU"]
    assert names[:3] == ["nnU fold 0", "nnU fold 0 (2)", "NNU fold 1"]


@pytest.mark.parametrize(("seconds", "words"), [(0, "0 s"), (59.6, "1 min 00 s"), (3660, "1 h 01 min"),
                                                (90000, "1 d 01 h"), (12, "12 s")])
def test_durations_have_the_two_largest_units(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(("values", "words"), [
    ((math.nan, 1, 2), "none"), ((0.5,), "0.500"), ((0.5, 0.25, 0.75), "0.500 [0.250, 0.750]"),
    ((0.5, math.nan, 1), "0.500")])
def test_values_with_an_interval_have_brackets(values, words):
    assert metric_text(*values).replace("\N{NO-BREAK SPACE}", " ") == words


def test_a_read_only_folder_is_reported_from_a_temporary_folder(root, monkeypatch):
    write_dataset(root)
    fold = write_complete(root)

    def denied(folder, fix=""):
        if folder == fold / "cfcl" / "report":
            raise UserError("cannot write")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    monkeypatch.setattr("nnunet_cfcl.evaluation.report.page.writable_folder", denied)
    report(fold, "-o", root / "out.html")
    assert "10 (10) 0.958" in Page(root / "out.html").text("fold1-metrics")
    assert not (fold / "cfcl" / "report").exists()


def test_a_gate_that_is_switched_off_is_reported(root):
    fold = fold_folder(root)
    write_gate(fold)
    file = fold / "cfcl" / "generator" / "report" / "report.json"
    content = json.loads(file.read_text())
    content["settings"]["enabled"] = False
    file.write_text(json.dumps(content))
    page = page_of(fold)
    assert "switched off" in page.text("fold1-gate") and "used nevertheless" in page.text("fold1-overview")
