"""Selection and reading of the pretraining's cases, from files written by nnU-Net's own storage class."""

import json
import multiprocessing
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.data.patients import store_patients
from nnunet_cfcl.data.pool.manifest import (
    CaseRecord,
    Manifest,
    pool_folder,
    pool_preprocessing,
    read_manifest,
    silver_folder,
    write_manifest,
)
from nnunet_cfcl.data.pool.silver_model import SilverModel
from nnunet_cfcl.data.pretraining_cases import pretraining_cases
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.fold import FoldContext

DATASET = "Dataset007_Toy"
FOLDS = [0, 1, 2, 3, 4, "all"]
DATA = ["training_and_pool", "training", "pool"]
SHAPE = (1, 1, 30, 26)
LAYOUT = {"chunks": (1, 1, 16, 16), "blocks": (1, 1, 8, 8)}
BOX = (slice(0, 1), slice(7, 23), slice(3, 20))
PATIENTS = {**{f"toy_{n}": f"p{n}" for n in range(5)}, "toy_5": "p0", **{f"un_{n}": f"p{n}" for n in range(5)},
            "un_5": "other", "un_6": ""}


def settings(data="training_and_pool", **silver):
    return resolve_settings({"pretrain": {"data": data}, "silver": silver})


def random_labels(seed, shape=SHAPE):
    """(2, Z, Y, X) labels from -1 to 3 and confidences from 0 to 100."""
    random = np.random.default_rng(seed)
    return np.concatenate([random.integers(-1, 4, shape), random.integers(0, 101, shape)]).astype(np.int16)


class Log(list):
    """The lines that were logged."""

    def __call__(self, *parts, **ignored):
        self.append(" ".join(map(str, parts)))


@pytest.fixture
def make_fold(toy):
    """Factory: (number of the fold) -> its context, whose ``log`` is a `Log`."""

    def make(fold=0):
        return FoldContext.find(
            nnUNetTrainer, DATASET, "2d", str(fold), "nnUNetPlans", torch.device("cpu"), Log())

    return make


@pytest.fixture
def save(make_fold):
    """A function that puts cases into the pool, or silver labels beside the training cases: case -> its quality, -1 for
    a case without a label, None for a label of unknown quality. Returns the (2, Z, Y, X) that were stored."""

    def fill(qualities, silver_of_training=False):
        owner = make_fold()
        folder = (silver_folder if silver_of_training else pool_folder)(owner.preprocessed)
        folder.mkdir(exist_ok=True)
        found = read_manifest(folder)
        records, stored = dict(found.cases) if found else {}, {}
        for seed, (case, quality) in enumerate(qualities.items()):
            shape = (1, 1, 24, 24) if silver_of_training else SHAPE
            stored[case] = random_labels(seed, shape)
            if silver_of_training:
                nnUNetDatasetBlosc2.save_seg(stored[case], str(folder / case))
            else:
                image = np.random.default_rng(99 + seed).normal(size=shape).astype(np.float32)
                nnUNetDatasetBlosc2.save_case(image, stored[case], {}, str(folder / case), **LAYOUT)
            files = tuple(sorted(path.name for path in folder.glob(f"{case}[._]*")))
            records[case] = CaseRecord(shape, quality != -1, 1.0 if quality in (None, -1) else quality,
                                       quality is not None, False, files, "", f"{seed}")
        preprocessing = pool_preprocessing(owner.plans, owner.configuration, owner.dataset_json)
        write_manifest(folder, Manifest(preprocessing, True, records))
        return stored

    return fill


@pytest.fixture
def name_patients(toy):
    def write(patients=PATIENTS):
        rows = "".join(f"{case},x,{patient}\n" for case, patient in patients.items())
        (toy / "nnUNet_raw" / DATASET / "attributes.csv").write_text("case,scanner,patient\n" + rows)

    return write


@pytest.fixture
def patients_and_pool(name_patients, save):
    name_patients()
    save({f"un_{n}": [0.3, None, -1, 0.9][n % 4] for n in range(7)})


# --- nothing of the validation


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("fold", FOLDS)
def test_no_validation_case_and_no_image_of_its_patient_is_selected(make_fold, patients_and_pool, toy, fold, data):
    cases = pretraining_cases(make_fold(fold), settings(data), needs_labels=True).cases
    labelled, pool = {f"toy_{n}" for n in range(6)}, {f"un_{n}" for n in range(7)}
    if fold == "all":
        training, validation = labelled, set()
    else:
        split = json.loads((toy / "nnUNet_preprocessed" / DATASET / "splits_final.json").read_text())[fold] if (
            data != "pool") else {"train": [], "val": []}
        training, validation = set(split["train"]), set(split["val"])
    validation = labelled if data == "pool" else validation
    offered = {"training": training, "pool": pool, "training_and_pool": training | pool}[data]
    kept_away = {PATIENTS[case] for case in validation}
    assert not kept_away & {PATIENTS[case] for case in cases} and not validation & set(cases)
    # and nothing else is missing
    assert set(cases) == {case for case in offered if PATIENTS[case] not in kept_away}
    assert validation or len(cases) == len(offered)


def test_the_folds_of_the_toy_dataset_leave_out_images_of_pool_and_training_set(make_fold, patients_and_pool):
    lines = [line for fold in FOLDS[:5] for owner in [make_fold(fold)]
             if pretraining_cases(owner, settings(), needs_labels=False) for line in owner.log if "phase 1" in line]
    assert all("cases of the pool (" in line and "left out: same patient as a validation case)" in line
               for line in lines)
    assert any("training cases (1 left out: same patient as a validation case)" in line for line in lines)


@pytest.mark.parametrize("needs_labels", [False, True])
def test_the_pool_alone_is_the_same_for_every_fold_and_without_a_split(
    make_fold, patients_and_pool, toy, needs_labels
):
    readers = [pretraining_cases(make_fold(fold), settings("pool"), needs_labels) for fold in FOLDS]
    assert {reader.cases for reader in readers} == {("un_5", "un_6")}
    assert len({reader.content() for reader in readers}) == 1
    assert not (toy / "nnUNet_preprocessed" / DATASET / "splits_final.json").exists()


def test_a_case_that_a_split_names_in_both_parts_is_not_used(make_fold, toy):
    split = {"train": ["toy_0", "toy_1", "toy_2"], "val": ["toy_2", "toy_3"]}
    (toy / "nnUNet_preprocessed" / DATASET / "splits_final.json").write_text(json.dumps([split]))
    assert pretraining_cases(make_fold(0), settings(), needs_labels=False).cases == ("toy_0", "toy_1")


def test_a_patient_named_like_a_validation_case_is_that_cases_patient(make_fold, save, name_patients):
    validation = make_fold(0).split()[1]
    name_patients({"un_0": validation[0], "un_1": "someone"})
    save({"un_0": -1, "un_1": -1})
    assert pretraining_cases(make_fold(0), settings(), needs_labels=False).cases[-1] == "un_1"


@pytest.mark.parametrize("data", DATA)
def test_the_log_reports_that_patients_are_not_known(make_fold, save, name_patients, data):
    save({"un_0": -1})
    owner = make_fold(0)
    pretraining_cases(owner, settings(data), needs_labels=False)
    assert any("patients are not known" in line and "attributes.csv" in line for line in owner.log)
    owner = make_fold("all")
    pretraining_cases(owner, settings(data), needs_labels=False)
    assert any("patients are not known" in line for line in owner.log) == (data == "pool")


def test_the_log_lists_the_cases_whose_patient_is_not_known(make_fold, save, name_patients):
    save({"un_0": -1})
    name_patients({f"toy_{n}": f"p{n}" for n in range(6)})
    owner = make_fold(0)
    pretraining_cases(owner, settings(), needs_labels=False)
    assert any("names no patient for 1 cases" in line and line.endswith(": un_0") for line in owner.log)


@pytest.mark.parametrize("data", DATA)
def test_without_the_raw_dataset_the_same_cases_are_left_out(
        make_fold, patients_and_pool, toy, toy_cases, monkeypatch, data):
    store_patients(toy_cases.parent, PATIENTS)
    reached = [pretraining_cases(make_fold(fold), settings(data), needs_labels=False).cases for fold in FOLDS]
    (toy / "nnUNet_raw" / DATASET / "attributes.csv").unlink()
    assert [pretraining_cases(make_fold(fold), settings(data), needs_labels=False).cases for fold in FOLDS] == reached
    monkeypatch.delenv("nnUNet_raw")
    assert [pretraining_cases(make_fold(fold), settings(data), needs_labels=False).cases for fold in FOLDS] == reached
    (toy_cases.parent / "cfcl_patients.json").unlink()
    assert [pretraining_cases(make_fold(fold), settings(data), needs_labels=False).cases for fold in FOLDS] != reached


def test_a_table_changed_since_the_pool_was_preprocessed_takes_precedence_and_is_logged(
        make_fold, patients_and_pool, toy_cases):
    store_patients(toy_cases.parent, {"un_5": "p0"})
    owner = make_fold(0)
    assert "un_5" in pretraining_cases(owner, settings("pool"), needs_labels=False).cases
    said = [line for line in owner.log if "attributes.csv changed since" in line]
    assert len(said) == 1 and said[0].endswith("run nnunet_cfcl pool -d 7 -c 2d again")
    store_patients(toy_cases.parent, {case: patient for case, patient in PATIENTS.items() if patient})
    owner = make_fold(0)
    pretraining_cases(owner, settings("pool"), needs_labels=False)
    assert not any("changed since" in line for line in owner.log)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("suffix", ["_0000", "_0000.png", ".png"])
def test_file_names_instead_of_case_names_are_rejected(make_fold, save, name_patients, data, suffix):
    save({"un_0": -1})
    name_patients({"toy_0": "a", f"toy_1{suffix}": "a", f"un_0{suffix}": "b", "test_7": "c"})
    with pytest.raises(UserError, match=f"2 names of files where names of cases .*: toy_1{suffix}, un_0{suffix};"):
        pretraining_cases(make_fold(0), settings(data), needs_labels=False)
    name_patients({"toy_0": "a", "test_7": "c"})
    assert pretraining_cases(make_fold(0), settings(data), needs_labels=False).cases


def test_a_table_of_unknown_cases_is_rejected_with_and_without_the_raw_dataset(
        make_fold, name_patients, toy_cases, monkeypatch):
    name_patients({"scan_1": "a", "scan_2": "a"})
    with pytest.raises(UserError, match="none of the 6 known cases, such as toy_0, but 2 others: scan_1, scan_2"):
        pretraining_cases(make_fold(0), settings(), needs_labels=False)
    store_patients(toy_cases.parent, {"toy_0_0000": "a"})
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(UserError, match="1 names of files .*: toy_0_0000; fix: write them without _0000"):
        pretraining_cases(make_fold(0), settings(), needs_labels=False)


def test_an_empty_selection_is_an_error_with_the_reason(make_fold, save, name_patients):
    name_patients({**{f"toy_{n}": "one" for n in range(6)}, "un_0": "one"})
    save({"un_0": -1})
    with pytest.raises(UserError, match="no cases: all 1 are labelled cases or of their patients"):
        pretraining_cases(make_fold(0), settings("pool"), needs_labels=False)
    with pytest.raises(UserError, match="all 5 are validation cases or of their patients"):
        pretraining_cases(make_fold(0), settings(), needs_labels=False)


# --- which cases


def test_without_a_pool_the_training_cases_are_used_alone(make_fold):
    owner = make_fold(0)
    reader = pretraining_cases(owner, settings(), needs_labels=False)
    assert reader.cases == tuple(sorted(owner.split()[0])) and reader.labelled == ()
    assert reader.known == tuple(f"toy_{n}" for n in range(6))
    assert any("phase 1 has 4 training cases" in line for line in owner.log)


@pytest.mark.parametrize("data", DATA)
def test_all_cases_of_dataset_and_pool_are_known_used_or_not(make_fold, save, data):
    save({"un_0": -1, "un_1": -1})
    reader = pretraining_cases(make_fold(0), settings(data), needs_labels=False)
    assert reader.known == (*(f"toy_{n}" for n in range(6)), "un_0", "un_1")


def test_a_pool_that_was_never_preprocessed_is_an_error_that_names_the_command(make_fold, toy):
    images = toy / "nnUNet_raw" / DATASET / "imagesUn"
    images.mkdir()
    (images / "un_0_0000.png").touch()
    for data in ("training_and_pool", "pool"):
        with pytest.raises(UserError, match="never preprocessed.*nnunet_cfcl pool -d 7 -c 2d"):
            pretraining_cases(make_fold(0), settings(data), needs_labels=False)
    assert pretraining_cases(make_fold(0), settings("training"), needs_labels=False).cases


@pytest.mark.parametrize("folder_is_there", [True, False])
def test_an_empty_or_missing_pool_is_an_error_if_it_is_the_only_data(make_fold, toy, folder_is_there):
    if folder_is_there:
        (toy / "nnUNet_raw" / DATASET / "imagesUn").mkdir()
    with pytest.raises(UserError, match=f"{DATASET}/imagesUn and run nnunet_cfcl pool -d 7 -c 2d"):
        pretraining_cases(make_fold(0), settings("pool"), needs_labels=False)
    assert pretraining_cases(make_fold(0), settings(), needs_labels=False).cases


def test_all_cases_in_both_pool_and_training_set_are_listed(make_fold, save):
    save({"toy_1": -1, "un_0": -1, "toy_4": None})
    for data in ("training_and_pool", "pool"):
        with pytest.raises(UserError, match="2 cases are in both the pool and the training set: toy_1, toy_4;"):
            pretraining_cases(make_fold(0), settings(data), needs_labels=False)


def test_all_training_cases_without_preprocessed_files_are_listed(make_fold, toy):
    split = {"train": ["toy_0", "lost_1", "lost_0"], "val": ["toy_3"]}
    (toy / "nnUNet_preprocessed" / DATASET / "splits_final.json").write_text(json.dumps([split]))
    with pytest.raises(UserError, match="2 training cases .*lost_0, lost_1; fix: run nnUNetv2_preprocess -d 7"):
        pretraining_cases(make_fold(0), settings(), needs_labels=False)


def test_a_dataset_that_is_not_preprocessed_is_an_error_that_names_the_command(make_fold, toy):
    owner = make_fold(0)
    shutil.rmtree(owner.preprocessed)
    with pytest.raises(UserError, match="no preprocessed cases in .*nnUNetPlans_2d; fix: run nnUNetv2_preprocess -d 7"):
        pretraining_cases(owner, settings("pool"), needs_labels=False)


def test_a_pool_preprocessed_by_the_command_is_read(make_fold, toy):
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

    from nnunet_cfcl.data.pool.run import preprocess_pool

    raw = toy / "nnUNet_raw" / DATASET
    random = np.random.default_rng(0)
    for folder in ("imagesUn", "labelsSilver"):
        (raw / folder).mkdir()
    label = random.integers(0, 2, (1, 24, 20)).astype(np.uint8)
    for n in range(2):
        NaturalImage2DIO().write_seg(random.integers(1, 255, (1, 24, 20)).astype(np.uint8),
                                     str(raw / "imagesUn" / f"un_{n}_0000.png"), {})
    NaturalImage2DIO().write_seg(label, str(raw / "labelsSilver" / "un_1.png"), {})
    (raw / "labelsSilver" / "silver.csv").write_text("case,quality\nun_1,0.8\n")
    preprocess_pool("7", "2d", processes=1, log=lambda line: None)
    reader = pretraining_cases(make_fold("all"), settings("pool"), needs_labels=True)
    assert reader.cases == ("un_0", "un_1") and reader.labelled == ("un_1",)
    assert reader.shape("un_0") == (1, 1, 24, 20)
    whole = (slice(0, 1), slice(0, 24), slice(0, 20))
    assert abs(reader.read("un_0", whole).mean()) < 1e-3
    labels, confidence = reader.labels("un_1", whole)
    np.testing.assert_array_equal(labels, label)
    assert (confidence == 80).all()


# --- labels


def test_a_silver_label_of_the_pool_is_used_unless_its_quality_is_given_and_low(make_fold, save):
    stored = save({"un_0": None, "un_1": 0.69, "un_2": -1, "un_3": 0.7})
    owner = make_fold(0)
    reader = pretraining_cases(owner, settings("pool"), needs_labels=True)
    assert reader.labelled == ("un_0", "un_3")
    assert [reader.has_labels(case) for case in reader.cases] == [True, False, False, True]
    assert reader.labels("un_1", BOX) is None and reader.labels("un_2", BOX) is None
    for case in reader.labelled:
        labels, confidence = reader.labels(case, BOX)
        assert labels.dtype == confidence.dtype == np.int16
        np.testing.assert_array_equal(labels, stored[case][0][BOX])
        np.testing.assert_array_equal(confidence, stored[case][1][BOX])
    assert owner.log[-1] == "labels: 0 manual, 2 silver (1 more are not used: quality below 0.7)"


def test_labels_without_confidence_are_certain_wherever_they_exist(make_fold, save):
    stored = save({"un_0": 0.9})
    reader = pretraining_cases(make_fold(0), settings("pool", confidence=False), needs_labels=True)
    labels, confidence = reader.labels("un_0", BOX)
    np.testing.assert_array_equal(confidence, np.where(stored["un_0"][0][BOX] >= 0, 100, 0))


def test_labels_below_the_minimum_quality_are_not_used(make_fold, save):
    save({"un_0": 0.5, "un_1": 0.3})
    for least, labelled in ((0.2, ("un_0", "un_1")), (0.4, ("un_0",))):
        assert pretraining_cases(make_fold(0), settings("pool", min_quality=least), True).labelled == labelled


@pytest.mark.parametrize("regions", [False, True])
def test_manual_labels_keep_their_values_including_the_ignore_label(make_fold, toy, toy_cases, regions):
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3} if regions else {
        "background": 0, "a": 1, "b": 2, "ignore": 3}
    file = toy / "nnUNet_preprocessed" / DATASET / "dataset.json"
    description = {**json.loads(file.read_text()), "labels": labels, "regions_class_order": [1, 2]}
    file.write_text(json.dumps(description))
    owner = make_fold(0)
    case = sorted(owner.split()[0])[0]
    stored = random_labels(5)[:1].astype(np.int8)
    for path in toy_cases.glob(f"{case}[._]*"):
        path.unlink()
    image = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
    nnUNetDatasetBlosc2.save_case(image, stored, {}, str(toy_cases / case), **LAYOUT)
    reader = pretraining_cases(owner, settings(), needs_labels=True)
    assert owner.labels.ignore_label == 3 and owner.labels.has_regions == regions
    found, confidence = reader.labels(case, BOX)
    np.testing.assert_array_equal(found, stored[0][BOX])
    assert set(np.unique(found)) == {-1, 0, 1, 2, 3}
    np.testing.assert_array_equal(confidence, np.where(found == -1, 0, 100))


def test_without_silver_labels_the_manual_labels_are_used_and_logged(make_fold, save):
    save({"un_0": -1, "un_1": 0.1})
    owner = make_fold(0)
    reader = pretraining_cases(owner, settings(), needs_labels=True)
    assert reader.labelled == tuple(sorted(owner.split()[0]))
    assert any("no silver labels to use (1 more are not used: quality below 0.7): the fold's 4 manual labels are used"
               in line for line in owner.log)


def test_silver_labels_of_training_cases_are_used_only_if_the_setting_says_so(make_fold, save):
    training = sorted(make_fold(0).split()[0])
    stored = save({training[0]: None, training[1]: 0.1, make_fold(0).split()[1][0]: 0.9}, silver_of_training=True)
    box = (slice(0, 1), slice(3, 20), slice(0, 9))
    manual = pretraining_cases(make_fold(0), settings(), needs_labels=True)
    silver = pretraining_cases(make_fold(0), settings(training_cases="silver"), needs_labels=True)
    assert manual.labelled == silver.labelled == silver.cases == tuple(training)
    assert (manual.labels(training[0], box)[0] == 0).all()
    labels, confidence = silver.labels(training[0], box)
    np.testing.assert_array_equal(labels, stored[training[0]][0][box])
    np.testing.assert_array_equal(confidence, stored[training[0]][1][box])
    assert (silver.labels(training[1], box)[0] == 0).all()
    assert manual.content() != silver.content()


def test_a_method_without_labels_gets_none(make_fold, save):
    save({"un_0": 0.9})
    reader = pretraining_cases(make_fold(0), settings(), needs_labels=False)
    assert reader.labelled == () and not any(reader.has_labels(case) for case in reader.cases)
    assert all(reader.labels(case, (slice(0, 1), slice(0, 2), slice(0, 2))) is None for case in reader.cases)


def test_a_pool_without_labels_is_an_error_for_a_method_that_needs_them(make_fold, save):
    save({"un_0": -1, "un_1": 0.1})
    with pytest.raises(UserError, match="none of the 2 cases .*labelsSilver.*run nnunet_cfcl pool -d 7 -c 2d.*"
                                        "'training_and_pool'"):
        pretraining_cases(make_fold(0), settings("pool"), needs_labels=True)


# --- labels of a model that knows the validation


@pytest.fixture
def labelled_by(make_fold, save):
    """A function that gives three cases of the pool labels, two of them of the model of a fold (2d, nnU-Net's)."""

    def label(number, plans="nnUNetPlans", qualities=(0.9, 0.9, 0.9)):
        save({f"un_{n}": quality for n, quality in enumerate(qualities)})
        folder = pool_folder(make_fold().preprocessed)
        training = tuple(sorted(map(str, make_fold(number).split()[0])))
        model = SilverModel("nnUNetTrainer", plans, "2d", str(number), "abc", training)
        manifest = replace(read_manifest(folder), model=model, model_cases=("un_0", "un_1"))
        write_manifest(folder, manifest)
        assert read_manifest(folder) == manifest
        return model

    return label


def warnings(owner, *arguments, **silver):
    pretraining_cases(owner, settings(*arguments, **silver), needs_labels=True)
    return [line for line in owner.log if line.startswith("WARNING")]


@pytest.mark.parametrize("data", ["training_and_pool", "pool"])
@pytest.mark.parametrize("model", [0, 3, "all"])
def test_labels_of_a_model_that_knows_validation_patients_are_warned_of(make_fold, labelled_by, data, model):
    labelled_by(model)
    for number in range(5):
        validation = make_fold(number).split()[1]
        found = warnings(make_fold(number), data)
        assert len(found) == (number != model)
        for line in found:
            assert f"the silver labels are of nnUNetTrainer__nnUNetPlans__2d/fold_{model}, which was trained on" in line
            assert f"validation figures of fold {number} are not independent" in line and validation[0] in line
            assert line.endswith(f"label again with nnunet_cfcl silver -d 7 -c 2d -f {number} -tr nnUNetTrainer")
    assert warnings(make_fold("all"), data) == []


def test_a_model_knows_a_patient_by_another_image_of_it(make_fold, labelled_by, name_patients, toy):
    split = [{"train": ["toy_0", "toy_1"], "val": ["toy_2"]}, {"train": ["toy_1", "toy_3"], "val": ["toy_0"]}]
    (toy / "nnUNet_preprocessed" / DATASET / "splits_final.json").write_text(json.dumps(split))
    labelled_by(1)
    assert warnings(make_fold(0)) == []
    name_patients({"toy_2": "p", "toy_3": "p", "un_0": "q"})
    assert "(such as p)" in warnings(make_fold(0))[0]


def test_there_is_no_warning_where_no_label_of_the_model_is_used(make_fold, labelled_by):
    labelled_by(1, qualities=(0.3, 0.3, 0.9))
    assert warnings(make_fold(0)) == [] and warnings(make_fold(0), "training") == []
    assert len(warnings(make_fold(0), min_quality=0.2)) == 1
    owner = make_fold(0)
    pretraining_cases(owner, settings(min_quality=0.2), needs_labels=False)
    assert not any(line.startswith("WARNING") for line in owner.log)


def test_the_labels_of_another_plans_model_have_to_be_preprocessed_for_this_plan_afterwards(make_fold, labelled_by):
    labelled_by(1, "otherPlans")
    assert warnings(make_fold(0))[0].endswith(
        "label again with nnunet_cfcl silver -d 7 -c 2d -f 0 -tr nnUNetTrainer -p otherPlans, "
        "then run nnunet_cfcl pool -d 7 -c 2d")


def test_the_labelling_model_is_no_part_of_the_content_that_identifies_a_pretraining(make_fold, labelled_by):
    labelled_by(1)
    folder = pool_folder(make_fold().preprocessed)
    known = pretraining_cases(make_fold(0), settings(), needs_labels=True).content()
    write_manifest(folder, replace(read_manifest(folder), model=None, model_cases=()))
    assert pretraining_cases(make_fold(0), settings(), needs_labels=True).content() == known


# --- reading


def test_boxes_of_training_and_pool_are_those_slices_of_the_whole_image(make_fold, save, toy_cases):
    save({"un_0": None})
    reader = pretraining_cases(make_fold(0), settings(), needs_labels=True)
    for case, folder in ((reader.cases[0], toy_cases), ("un_0", pool_folder(toy_cases))):
        whole = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)[0][:]
        box = (slice(0, 1), slice(5, 18), slice(7, 24))
        part = reader.read(case, box)
        assert part.dtype == np.float32 and reader.shape(case) == whole.shape
        np.testing.assert_array_equal(part, whole[(slice(None), *box)])


def test_a_pickled_reader_reads_the_same(make_fold, save):
    save({"un_0": None})
    reader = pretraining_cases(make_fold(0), settings(), needs_labels=True)
    before = reader.read("un_0", BOX), *reader.labels("un_0", BOX)
    again = pickle.loads(pickle.dumps(reader))
    assert (again.cases, again.known, again.labelled, again.content()) == (
        reader.cases, reader.known, reader.labelled, reader.content())
    for expected, found in zip(before, (again.read("un_0", BOX), *again.labels("un_0", BOX)), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_spawned_worker_reads_the_same(make_fold, save):
    save({"un_0": None})
    reader = pretraining_cases(make_fold(0), settings("pool"), needs_labels=True)
    with multiprocessing.get_context("spawn").Pool(1) as workers:
        image = workers.apply(reader.read, ("un_0", BOX))
        labels, confidence = workers.apply(reader.labels, ("un_0", BOX))
    np.testing.assert_array_equal(image, reader.read("un_0", BOX))
    np.testing.assert_array_equal(np.stack([labels, confidence]), np.stack(reader.labels("un_0", BOX)))


# --- what makes two phases 1 the same


def replace_files(folder, case, ending, image, labels):
    """Replace one of the two files of a case by that of another image and labels."""
    nnUNetDatasetBlosc2.save_case(image, labels, {}, str(folder / "new"), **LAYOUT)
    shutil.move(folder / f"new{ending}", folder / f"{case}{ending}")
    for path in folder.glob("new*"):
        path.unlink()


def test_a_copy_elsewhere_has_the_same_digest(make_fold, save, toy, tmp_path_factory, monkeypatch):
    save({"un_0": 0.9, "un_1": -1})
    before = pretraining_cases(make_fold(0), settings(), needs_labels=True).content()
    other = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(toy, other)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.setenv(variable, str(other / variable))
    owner = make_fold(0)
    assert other in owner.preprocessed.parents
    assert pretraining_cases(owner, settings(), needs_labels=True).content() == before


def test_other_labels_change_the_digest_only_of_a_method_that_uses_them(make_fold, save, toy_cases):
    save({"un_0": 0.9})
    case = make_fold(0).split()[0][0]
    plain, supervised = (pretraining_cases(make_fold(0), settings(), needs).content() for needs in (False, True))
    assert plain != supervised
    labels = np.random.default_rng(7).integers(0, 4, (1, 1, 24, 24)).astype(np.int8)
    replace_files(toy_cases, case, "_seg.b2nd", labels.astype(np.float32), labels)
    assert pretraining_cases(make_fold(0), settings(), needs_labels=False).content() == plain
    assert pretraining_cases(make_fold(0), settings(), needs_labels=True).content() != supervised


def test_another_silver_label_or_quality_changes_the_digest(make_fold, save, toy_cases):
    save({"un_0": 0.9, "un_1": 0.1})
    folder = pool_folder(toy_cases)
    manifest = read_manifest(folder)
    before = pretraining_cases(make_fold(0), settings(), needs_labels=True).content()
    for case, change, same in (("un_0", {"content": "x"}, False), ("un_0", {"quality": 0.8}, False),
                               ("un_1", {"quality": 0.2}, True)):
        record = replace(manifest.cases[case], **change)
        write_manifest(folder, replace(manifest, cases={**manifest.cases, case: record}))
        assert (pretraining_cases(make_fold(0), settings(), needs_labels=True).content() == before) == same


def test_another_image_of_the_pool_changes_the_digest_of_those_that_use_the_pool(make_fold, save, toy_cases):
    save({"un_0": -1})
    before = {data: pretraining_cases(make_fold(0), settings(data), False).content() for data in DATA}
    assert len(set(before.values())) == 3
    replace_files(pool_folder(toy_cases), "un_0", ".b2nd", np.zeros(SHAPE, np.float32), random_labels(0))
    after = {data: pretraining_cases(make_fold(0), settings(data), False).content() for data in DATA}
    assert [data for data in DATA if after[data] == before[data]] == ["training"]


def test_case_names_are_plain_strings_also_right_after_nnunet_created_the_split(toy, make_fold):
    (toy / "nnUNet_preprocessed" / DATASET / "splits_final.json").unlink(missing_ok=True)
    owner = make_fold()
    split = owner.split
    owner = replace(owner, split=lambda: tuple([np.str_(case) for case in cases] for cases in split()))
    reader = pretraining_cases(owner, settings("training"), False)
    assert {type(case) for case in (*reader.cases, *reader.patients)} <= {str}
