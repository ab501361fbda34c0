"""The verb `silver` with an untrained model of the toy plan: labels, resuming, refusals, and its record."""

import json
import shutil

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from skimage import io

from nnunet_cfcl import cli
from nnunet_cfcl.chromap.nnunet.hook import VARIABLE
from nnunet_cfcl.data.pool import labelling as room
from nnunet_cfcl.data.pool.manifest import pool_folder, read_manifest
from nnunet_cfcl.data.pool.quality import LabelQuality, label_quality
from nnunet_cfcl.data.pool.run import preprocess_pool
from nnunet_cfcl.data.pool.silver_model import SilverModel, read_record
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files import folder_swap
from nnunet_cfcl.nnunet import prediction
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.nnunet.prediction import load_predictor

DATASET = "Dataset007_Toy"
MODEL = "nnUNetTrainer__nnUNetPlans__2d"
COMMAND = ["silver", "-d", "7", "-c", "2d", "-tr", "nnUNetTrainer", "-device", "cpu", "-np", "1", "-f"]
CASES = ("a", "b", "c")
PLAIN = LabelManager({"background": 0, "a": 1, "b": 2}, None)
NESTED = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])


class Log(list):
    """The lines that were logged."""

    def __call__(self, *parts, **ignored):
        self.append(" ".join(map(str, parts)))

    @property
    def text(self):
        return "\n".join(self)


@pytest.fixture
def raw(toy):
    """The raw dataset with a pool of `CASES`."""
    folder = toy / "nnUNet_raw" / DATASET
    (folder / "imagesUn").mkdir()
    for case in CASES:
        add(folder, case)
    return folder


@pytest.fixture
def labels(raw):
    return raw / "labelsSilver"


@pytest.fixture
def fold(toy):
    """Factory: number -> the context of a fold of nnU-Net's own trainer."""

    def make(number=0):
        return FoldContext.find(nnUNetTrainer, DATASET, "2d", str(number), "nnUNetPlans", torch.device("cpu"), Log())

    return make


@pytest.fixture
def finish(toy, fold):
    """A function that writes a finished training of a fold: random weights that depend on a seed."""

    def write(number=0, seed=0):
        owner = fold(number)
        owner.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        network = owner.build_network()
        if seed:
            with torch.no_grad():
                list(network.parameters())[-1].add_(seed)
        torch.save({"network_weights": network.state_dict(), "trainer_name": "nnUNetTrainer",
                    "init_args": {"configuration": "2d"}, "inference_allowed_mirroring_axes": (0,)},
                   owner.folder / "checkpoint_final.pth")
        for name, source in (("plans.json", "nnUNetPlans.json"), ("dataset.json", "dataset.json")):
            shutil.copy(owner.preprocessed.parent / source, owner.folder.parent / name)
        return owner

    return write


def add(raw, case):
    pixels = np.random.default_rng(sum(case.encode())).integers(1, 255, (20, 28)).astype(np.uint8)
    io.imsave(raw / "imagesUn" / f"{case}_0000.png", pixels, check_contrast=False)


def label(owner):
    log = Log()
    record = room.label_pool(owner, log=log)
    return record, log.text


def states(folder):
    """Name -> time and content."""
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


# --- labels


def test_the_pool_is_labelled_and_preprocessed_with_qualities_and_confidences(labels, finish):
    owner = finish()
    record, log = label(owner)
    assert {file.name for file in labels.iterdir()} == {
        "silver.csv", "silver_model.json", *(f"{case}{end}" for case in CASES for end in (".png", ".npz"))}
    qualities = dict(line.split(",") for line in (labels / "silver.csv").read_text().splitlines()[1:])
    for case in CASES:
        mask = io.imread(labels / f"{case}.png")
        probabilities = np.load(labels / f"{case}.npz")["probabilities"][:, 0]
        np.testing.assert_array_equal(mask, probabilities.argmax(0))
        chosen = probabilities.max(0)[mask > 0] if mask.any() else probabilities.max(0)
        assert float(qualities[case]) == pytest.approx(chosen.mean(), abs=1e-4)
    manifest = read_manifest(pool_folder(owner.preprocessed))
    assert manifest.with_silver() == CASES == manifest.model_cases and manifest.model == record.model
    assert all(one.probabilities and one.quality == float(qualities[case]) for case, one in manifest.cases.items())
    training = tuple(sorted(map(str, owner.split()[0])))
    assert record == read_record(labels)
    assert record.model == SilverModel("nnUNetTrainer", "nnUNetPlans", "2d", "0", record.model.checkpoint, training)
    assert f"{MODEL}/fold_0: 3 cases of imagesUn are labelled" in log and "3 new silver labels in" in log
    assert "use them in trainings of fold 0, and label again for another fold" in log
    assert "next: nnUNetv2_train 7 2d 0 -tr nnUNetTrainerSDVDCL" in log
    assert not list(labels.parent.glob("labelsSilver.*"))


def test_a_second_run_keeps_everything(labels, finish, monkeypatch):
    label(finish())
    before = states(labels)
    monkeypatch.setattr(room, "predict_cases", None)
    _, log = label(finish())
    assert f"all 3 cases of imagesUn have labels of {MODEL}/fold_0 already" in log and "(0 new, 3 with" in log
    assert states(labels) == before


def test_new_images_are_labelled_beside_the_kept_labels_and_labels_of_lost_images_removed(raw, labels, finish):
    label(finish())
    (labels / "silver.csv").write_text("case,quality\na,0.25\nb,0.5\nc,0.75\n")
    before = states(labels)
    add(raw, "d")
    (raw / "imagesUn" / "b_0000.png").unlink()
    record, log = label(finish())
    assert "1 cases of imagesUn are labelled, 2 labels are kept, 1 labels without an image are removed" in log
    assert sorted(record.labels) == ["a", "c", "d"]
    after = states(labels)
    assert {name for name in after if after[name] == before.get(name)} == {"a.png", "a.npz", "c.png", "c.npz"}
    # a quality that was changed by hand is kept too
    assert (labels / "silver.csv").read_text().startswith("case,quality\na,0.2500\nc,0.7500\nd,")


def test_a_changed_image_is_labelled_again(raw, labels, finish):
    label(finish())
    before = states(labels)
    io.imsave(raw / "imagesUn" / "b_0000.png", np.full((20, 28), 9, np.uint8), check_contrast=False)
    _, log = label(finish())
    assert "1 cases of imagesUn are labelled, 2 labels are kept" in log
    assert states(labels)["a.npz"] == before["a.npz"] and states(labels)["b.npz"] != before["b.npz"]


def test_labels_of_another_model_are_replaced(labels, finish):
    label(finish())
    before = states(labels)
    record, log = label(finish(seed=3))
    assert "3 cases of imagesUn are labelled, 3 labels of another model are replaced" in log
    assert record.model.checkpoint not in before["silver_model.json"][1].decode()
    after = states(labels)
    assert all(after[name] != before[name] for name in before)


def test_a_model_of_fold_all_was_trained_on_all_cases(labels, finish):
    record, log = label(finish("all"))
    assert record.model.fold == "all" and record.model.training == tuple(f"toy_{n}" for n in range(6))
    assert "figures of numbered folds trained with them are not independent" in log


@pytest.mark.end_to_end
def test_several_processes_make_the_same_labels(labels, finish):
    label(finish())
    alone = {name: content for name, (_, content) in states(labels).items() if name.endswith((".png", ".csv"))}
    shutil.rmtree(labels)
    room.label_pool(finish(), processes=2, log=Log())
    assert {name: states(labels)[name][1] for name in alone} == alone


# --- interruptions


@pytest.fixture
def killed(monkeypatch):
    """A function that kills the prediction after its first case, and cuts files of the second short."""

    def stop(predictor, images, outputs, processes):
        prediction.predict_cases(predictor, images[:2], outputs[:2], processes)
        mask = outputs[1].with_name(f"{outputs[1].name}.png")
        mask.write_bytes(mask.read_bytes()[:40])
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "predict_cases", stop)


def test_a_run_that_was_killed_publishes_nothing_and_goes_on(labels, finish, killed, monkeypatch):
    owner = finish()
    with pytest.raises(KeyboardInterrupt):
        label(owner)
    assert not labels.exists()
    assert preprocess_pool("7", "2d", log=Log())[0].with_silver() == ()
    monkeypatch.setattr(room, "predict_cases", prediction.predict_cases)
    _, log = label(owner)
    assert "2 cases of imagesUn are labelled, 1 were before an interruption" in log
    assert sorted(read_record(labels).labels) == list(CASES)
    first = states(labels)
    shutil.rmtree(labels)
    label(owner)
    assert {name: states(labels)[name][1] for name in first if name.endswith(".png")} == {
        name: content for name, (_, content) in first.items() if name.endswith(".png")}


def test_unfinished_labels_of_another_model_or_image_are_not_gone_on_with(raw, labels, finish, killed, monkeypatch):
    owner = finish()
    with pytest.raises(KeyboardInterrupt):
        label(owner)
    io.imsave(raw / "imagesUn" / "a_0000.png", np.full((20, 28), 9, np.uint8), check_contrast=False)
    with pytest.raises(KeyboardInterrupt):
        label(owner)
    monkeypatch.setattr(room, "predict_cases", prediction.predict_cases)
    _, log = label(finish(seed=2))
    assert "3 cases of imagesUn are labelled" in log and "interruption" not in log


def test_labels_of_the_earlier_model_stay_until_the_new_ones_are_complete(labels, finish, killed, monkeypatch):
    monkeypatch.setattr(room, "predict_cases", prediction.predict_cases)
    label(finish())
    before = states(labels)
    monkeypatch.setattr(room, "predict_cases", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        label(finish(seed=1))
    assert states(labels) == before


def test_a_kill_between_the_two_renamings_is_repaired(labels, finish):
    label(finish())
    before = states(labels)
    labels.rename(folder_swap._former(labels))
    _, log = label(finish())
    assert "already" in log and states(labels) == before


def test_a_case_that_nnunet_leaves_without_a_label_is_named(labels, finish, monkeypatch):
    monkeypatch.setattr(room, "predict_cases", lambda *arguments: None)
    with pytest.raises(UserError, match="nnU-Net left 3 cases without a readable label: a, b, c; fix: run nnunet_cfcl "
                                        "silver -d 7 -c 2d -f 0 -tr nnUNetTrainer again"):
        label(finish())
    assert not labels.exists()


# --- refusals


@pytest.mark.parametrize("name", ["a.png", "toy_0.png", "silver.csv", "a.npz", "folder"])
def test_files_of_others_are_never_replaced(labels, finish, name):
    labels.mkdir()
    if name == "folder":
        (labels / name).mkdir()
    else:
        (labels / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds 1 files that nnunet_cfcl silver did not make.*: {name}; .*fix: mv "):
        label(finish())
    assert [file.name for file in labels.iterdir()] == [name]


def test_a_label_that_was_corrected_by_hand_is_never_replaced(labels, finish):
    label(finish())
    io.imsave(labels / "b.png", np.ones((20, 28), np.uint8), check_contrast=False)
    before = states(labels)
    with pytest.raises(UserError, match="1 files that nnunet_cfcl silver did not make, or that were changed.*: b.png;"):
        label(finish(seed=1))
    assert states(labels) == before
    # the pool takes it, and no longer for the model's
    manifest, _ = preprocess_pool("7", "2d", log=Log())
    assert manifest.with_silver() == CASES and manifest.model_cases == ("a", "c")


def test_a_label_that_was_deleted_is_made_again(labels, finish):
    label(finish())
    (labels / "b.png").unlink()
    _, log = label(finish())
    assert "1 cases of imagesUn are labelled, 2 labels are kept" in log and (labels / "b.png").exists()


def test_a_damaged_record_is_an_error_of_both_commands(labels, finish):
    label(finish())
    text = (labels / "silver_model.json").read_text()
    (labels / "silver_model.json").write_text(text.replace('"fold": "0"', '"fold": "1"'))
    with pytest.raises(UserError, match="silver_model.json is not a readable record.*its checksum is wrong"):
        label(finish())
    with pytest.raises(UserError, match="silver_model.json is not a readable record.*delete it to keep the labels"):
        preprocess_pool("7", "2d", log=Log())
    (labels / "silver_model.json").unlink()
    assert preprocess_pool("7", "2d", log=Log())[0].model is None


def test_images_are_checked_before_anything_is_predicted(raw, labels, finish):
    (raw / "imagesUn" / "b_0000.png").write_bytes(b"nothing")
    (raw / "imagesUn" / "odd.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match="2 problems in .*then run nnunet_cfcl silver -d 7 -c 2d -f 0 "):
        label(finish())
    assert not labels.exists() and not list(raw.glob("labelsSilver*"))


def run(capsys, *arguments):
    """The error line of the command."""
    assert cli.main([*COMMAND, *arguments]) == 1
    return capsys.readouterr().err


def test_every_missing_part_is_one_line_with_its_fix(raw, toy, finish, capsys, change_plan):
    assert "run nnUNetv2_train 7 2d 0 -tr nnUNetTrainer\n" in run(capsys, "0")
    owner = finish()
    (owner.folder / "checkpoint_final.pth").rename(owner.folder / "checkpoint_latest.pth")
    assert "is not finished (finished: none); fix: run nnUNetv2_train 7 2d 0 -tr nnUNetTrainer --c" in run(capsys, "0")
    finish()
    assert "the training did not begin (finished: fold_0)" in run(capsys, "1")
    assert "no plan otherPlans" in run(capsys, "0", "-p", "otherPlans")
    assert "nnU-Net finds no trainer nnUNetTrainerNone" in run(capsys, "0", "-tr", "nnUNetTrainerNone")
    assert "no configuration 3d" in run(capsys, "0", "-c", "3d")
    (owner.folder.parent / "plans.json").rename(owner.folder / "away")
    assert "is no model folder: it has no plans.json" in run(capsys, "0")
    (owner.folder / "away").rename(owner.folder.parent / "plans.json")
    (owner.folder / "checkpoint_final.pth").write_bytes((owner.folder / "checkpoint_final.pth").read_bytes()[:-40])
    assert "checkpoint_final.pth is damaged" in run(capsys, "0")
    finish()
    shutil.rmtree(raw / "imagesUn")
    assert "there are no images to label in" in run(capsys, "0")
    change_plan(lambda plan: plan["configurations"].update(second={"inherits_from": "2d", "previous_stage": "2d"}))
    assert "'second' is a cascade's second stage" in run(capsys, "0", "-c", "second")


# --- quality


def test_the_quality_is_the_mean_confidence_of_the_predicted_foreground():
    background = np.array([[0.9, 0.2], [0.1, 0.3]])
    probabilities = np.stack([background, [[0.05, 0.7], [0.3, 0.1]], [[0.05, 0.1], [0.6, 0.6]]])
    labels = probabilities.argmax(0)
    assert labels.tolist() == [[0, 1], [2, 2]]
    assert label_quality(probabilities, labels, PLAIN) == (pytest.approx((0.7 + 0.6 + 0.6) / 3), False)


def test_without_foreground_the_quality_is_that_of_the_whole_image():
    probabilities = np.stack([np.array([[0.9, 0.8]]), np.array([[0.1, 0.1]]), np.array([[0.0, 0.1]])])
    assert label_quality(probabilities, np.zeros((1, 2), int), PLAIN) == (pytest.approx(0.85), True)


def test_with_regions_the_quality_is_that_of_the_least_certain_region():
    probabilities = np.array([[[0.9, 0.8, 0.1]], [[0.2, 0.6, 0.0]]])
    found = label_quality(probabilities, np.array([[1, 2, 0]]), NESTED)
    assert found == LabelQuality(pytest.approx((0.8 + 0.6) / 2), False)


# --- CHRO-maps


def test_no_chro_maps_are_made_whatever_the_environment_asks_for(labels, finish, monkeypatch):
    from nnunet_cfcl.chromap.nnunet import hook

    owner = finish()
    monkeypatch.setenv(VARIABLE, "1")
    # as nnU-Net's look-up does when it imports the plugin's trainers
    monkeypatch.setattr("nnunetv2.inference.predict_from_raw_data.recursive_find_trainer_class_by_name",
                        lambda name: hook.offer_chromaps() or nnUNetTrainer)
    predictor = load_predictor(owner.folder, "checkpoint_final.pth", torch.device("cpu"), "")
    assert type(predictor) is prediction.MaskPredictor
    label(owner)
    assert not list(labels.parent.rglob("chromap"))


def test_the_record_is_plain_json_with_version_and_checksum(labels, finish):
    label(finish())
    content = json.loads((labels / "silver_model.json").read_text())
    assert content.keys() == {"format", "version", "model", "labels", "checksum"}
    assert content["model"].keys() == {"trainer", "plans", "configuration", "fold", "checkpoint", "training"}
    assert content["labels"]["a"].keys() == {"images", "label"}
