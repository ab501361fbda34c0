"""Probe sets, features, label maps by nnU-Net's sliding window, weights of other architectures."""

import json
import re
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_cfcl.cli import main
from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.evaluation.probe import models as probe_models
from nnunet_cfcl.evaluation.probe import set as probe_set
from nnunet_cfcl.evaluation.probe.counterfactuals import probe_source
from nnunet_cfcl.evaluation.probe.features import Counterfactuals, dense_probe, read_features
from nnunet_cfcl.evaluation.probe.set import draw_probe_set
from nnunet_cfcl.nnunet.decoder_tap import last_decoder_map
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.runs.checkpoint import save_checkpoint
from nnunet_cfcl.trainers import nnUNetTrainerDVDCL
from tests.counterfactual.random_generator import CODING, INTERVENTIONS, random_generator

CPU = torch.device("cpu")
CASES = [f"toy_{number}" for number in range(6)]


def write_case(folder, case, shape=(1, 1, 24, 30), seed=0, ignored=False):
    """Write noise with a brighter organ and an upper edge outside of the image."""
    random = np.random.default_rng(seed)
    labels = np.zeros((1, *shape[1:]), np.int8)
    labels[:, :, 6:14, 8:20] = 1
    image = random.normal(size=shape) + 3 * labels
    labels[:, :, 0] = -1
    if ignored:
        labels[:, :, -1] = 2
    for file in folder.glob(f"{case}*"):
        file.unlink()
    nnUNetDatasetBlosc2.save_case(image.astype(np.float32), labels, {"spacing": [1, 1, 1]}, str(folder / case),
                                  chunks=shape, blocks=shape)


@pytest.fixture
def labelled(toy, toy_cases, settings_file):
    """The toy dataset with an organ in every case; two patients have two cases each."""
    settings_file({"counterfactual": {"source": "acquisition"}})
    for number, case in enumerate(CASES):
        write_case(toy_cases, case, seed=number)
    split = [{"train": CASES[:4], "val": CASES[4:]}]
    (toy_cases.parent / "splits_final.json").write_text(json.dumps(split))
    rows = [f"{case},p{number // 2},{'AB'[number % 2]}" for number, case in enumerate(CASES)]
    (toy / "nnUNet_raw" / toy_cases.parent.name / "attributes.csv").write_text(
        "\n".join(["case,patient,scanner", *rows]) + "\n")
    return toy_cases


def fold(trainer=nnUNetTrainerDVDCL, number="0", configuration="2d"):
    return FoldContext.find(trainer, "7", configuration, number, "nnUNetPlans", CPU, lambda *line, **_: None)


def test_the_set_depends_on_the_seed_and_not_on_the_trainer(labelled):
    first, other = draw_probe_set(fold(), 3, 2), draw_probe_set(fold(nnUNetTrainer), 3, 2)
    assert first.digest == other.digest and first.identity == other.identity
    for one, two in zip(first.validation_patches, other.validation_patches):
        assert one.box == two.box and torch.equal(one.voxels, two.voxels)
    assert draw_probe_set(fold(), 4, 2).digest != first.digest
    assert len(first.training) == len(first.validation) == 2


def test_the_digest_covers_the_labels_of_the_drawn_voxels(labelled):
    before = draw_probe_set(fold(), 0, 9).digest
    write_case(labelled, "toy_5", shape=(1, 1, 24, 31), seed=5)
    assert draw_probe_set(fold(), 0, 9).digest != before


def test_cases_are_evenly_spaced_and_unique():
    names = [f"{number:03d}" for number in range(100)]
    for seed in range(20):
        chosen = probe_set._spread(names, 7, seed, 0)
        assert len(set(chosen)) == 7 and chosen == sorted(chosen)
        gaps = np.diff([int(name) for name in chosen] + [int(chosen[0]) + 100])
        assert set(gaps.tolist()) <= {14, 15}
    assert len({tuple(probe_set._spread(names, 7, seed, 0)) for seed in range(20)}) > 5
    assert probe_set._spread(names[:3], 7, 0, 1) == names[:3]


def test_drawn_voxels_have_their_labels_and_classes_are_drawn_alike(labelled):
    drawn = draw_probe_set(fold(), 0, 9)
    for patch in (*drawn.training_patches, *drawn.validation_patches):
        labels = drawn.reader.labels(patch.case, patch.box.inside)[0].reshape(-1)
        assert (labels[patch.voxels.numpy()] == patch.labels).all() and (patch.labels >= 0).all()
        found, counts = np.unique(patch.labels, return_counts=True)
        assert found.tolist() == [0, 1] or len(found) == 1
    organ = 8 * 12 / (24 * 30)
    assert drawn.shares == pytest.approx({0: 1 - organ, 1: organ})


def test_the_ignore_label_is_neither_drawn_nor_counted(labelled, toy):
    description = toy / "nnUNet_preprocessed" / labelled.parent.name / "dataset.json"
    content = json.loads(description.read_text())
    description.write_text(json.dumps({**content, "labels": {"background": 0, "organ": 1, "ignore": 2}}))
    for number, case in enumerate(CASES):
        write_case(labelled, case, seed=number, ignored=True)
    drawn = draw_probe_set(fold(), 0, 9)
    assert drawn.shares == pytest.approx({0: 1 - 96 / 690, 1: 96 / 690})
    assert not any((patch.labels == 2).any() for patch in drawn.training_patches)


def test_a_training_case_of_a_validation_patient_is_left_out(labelled):
    (labelled.parent / "splits_final.json").write_text(json.dumps([{"train": CASES[:5], "val": CASES[5:]}]))
    assert draw_probe_set(fold(), 0, 9).training == tuple(CASES[:4])


def network_of(context):
    return context.build_network().eval()


def test_features_belong_to_their_voxels_with_and_without_counterfactuals(labelled):
    context = fold()
    drawn, network = draw_probe_set(context, 0, 9), network_of(context)
    patches, size = drawn.validation_patches, drawn.patch_size
    alone = read_features(network, drawn.reader, patches, CPU)
    pairs = read_features(network, drawn.reader, patches, CPU, lambda patch, image: image + patch.number)
    np.testing.assert_allclose(alone.features, pairs.features, atol=1e-5)
    assert alone.moved.size == 0 and not np.allclose(pairs.moved, pairs.features)
    patch = patches[1]
    image = np.zeros(size, np.float32)
    image[patch.inside] = drawn.reader.read(patch.case, patch.box.inside)[0, 0]
    with torch.no_grad(), last_decoder_map(network) as whole:
        maps = whole(torch.from_numpy(image)[None, None])[0].numpy()
    before = len(patches[0].labels)
    for row, voxel in enumerate(patch.voxels[:5].tolist()):
        place = np.unravel_index(voxel, [part.stop - part.start for part in patch.inside])
        place = tuple(at + part.start for at, part in zip(place, patch.inside))
        np.testing.assert_allclose(alone.features[before + row], maps[(slice(None), *place)], atol=1e-5)


def test_counterfactuals_do_not_depend_on_the_order_of_the_calls(labelled):
    context = fold()
    drawn = draw_probe_set(context, 0, 9)
    source = probe_source(context, drawn.reader, drawn.validation, print)
    assert source.name == "acquisition"
    patch = drawn.validation_patches[2]
    image = patch.box.pad(drawn.reader.read(patch.case, patch.box.inside))
    first, second = (Counterfactuals(source, (1.0, 1.0), 0) for _ in range(2))
    second(drawn.validation_patches[0], image)
    assert torch.equal(first(patch, image), second(patch, image)) and not torch.equal(first(patch, image), image)
    assert not torch.equal(first(patch, image), Counterfactuals(source, (1.0, 1.0), 1)(patch, image))
    assert not torch.equal(first(patch, image), first(replace(patch, number=patch.number + 1), image))


def test_an_untrained_generator_is_replaced_by_acquisitions_with_a_log_line(labelled, settings_file):
    settings_file({"counterfactual": {"source": "generator"}})
    context, logged = fold(), []
    drawn = draw_probe_set(context, 0, 9)
    assert probe_source(context, drawn.reader, drawn.validation, logged.append).name == "acquisition"
    assert len(logged) == 1 and "analytic acquisitions" in logged[0]


def judged_phase(is_judged, passed):
    """In the place of the generator phase: a random generator, judged or not."""
    def phase(context, ranks, logs_cases):
        judged = SimpleNamespace(generator=random_generator(), passed=passed)
        return SimpleNamespace(is_judged=lambda: is_judged, judged=lambda: judged)

    return phase


@pytest.mark.parametrize(("is_judged", "passed", "taken"), [
    (True, INTERVENTIONS[:1], "generator"), (True, (), "acquisition"), (False, INTERVENTIONS[:1], "acquisition")])
def test_a_generator_is_used_where_it_is_trained_and_judged(
        labelled, settings_file, monkeypatch, is_judged, passed, taken):
    settings_file({"counterfactual": {"source": "generator"}})
    monkeypatch.setattr("nnunet_cfcl.evaluation.probe.counterfactuals.GeneratorPhase", judged_phase(is_judged, passed))
    context, logged = fold(), []
    drawn = draw_probe_set(context, 0, 9)
    source = probe_source(context, drawn.reader, drawn.validation, logged.append)
    assert source.name == taken and bool(logged) == (taken == "acquisition")
    if taken == "generator":
        patch = drawn.validation_patches[0]
        image = patch.box.pad(drawn.reader.read(patch.case, patch.box.inside))
        # the case's own scanner is known, so that it is changed to another one
        changed = source.draw(torch.Generator().manual_seed(0), patch.case, patch.box, 1)
        assert not torch.equal(changed.parents, changed.others)
        assert torch.equal(changed.parents[0], CODING.encode({"scanner": "AB"[int(patch.case[-1]) % 2]}))
        assert not torch.equal(Counterfactuals(source, (1.0, 1.0), 0)(patch, image), image)


@pytest.mark.parametrize("cases", [CASES, CASES[:4]])
def test_a_store_is_used_where_it_has_the_validation_cases(labelled, settings_file, tmp_path, cases):
    store = CounterfactualStore.create(tmp_path / "store", ["other"], "by hand")
    for case in cases:
        store.write(case, "other", np.full((1, 1, 24, 30), 7, np.float32))
    settings_file({"counterfactual": {"source": "precomputed", "store": str(tmp_path / "store")}})
    context, logged = fold(), []
    drawn = draw_probe_set(context, 0, 9)
    source = probe_source(context, drawn.reader, drawn.validation, logged.append)
    assert source.name == ("precomputed" if cases == CASES else "acquisition")
    if cases == CASES:
        patch = drawn.validation_patches[0]
        changed = Counterfactuals(source, (1.0, 1.0), 0)(patch, torch.zeros(1, 16, 16))
        assert (changed[(0, *patch.inside)] == 7).all() and not logged
    else:
        assert "lacks 2 of 2 files" in logged[0]


def slow_probe(network, weight, bias, image, patch, step):
    """Class of every voxel: features of all windows in double precision, blended, then the linear layer."""
    size = [max(n, p) for n, p in zip(image.shape[2:], patch)]
    before = [(n - m) // 2 for n, m in zip(size, image.shape[2:])]
    after = [n - m - b for n, m, b in zip(size, image.shape[2:], before)]
    padded = np.pad(image, [(0, 0), (0, 0), *zip(before, after)])
    counts = [int(np.ceil((n - p) / (p * step))) + 1 for n, p in zip(size, patch)]
    starts = [[round(at * (n - p) / max(1, count - 1)) for at in range(count)]
              for n, p, count in zip(size, patch, counts)]
    gaussian = compute_gaussian(tuple(patch), dtype=torch.float64, device=CPU).numpy()
    total, weights = np.zeros((weight.shape[1], *size)), np.zeros(size)
    for y, x in product(*starts):
        here = (slice(None), slice(y, y + patch[0]), slice(x, x + patch[1]))
        with torch.no_grad(), last_decoder_map(network) as features:
            maps = features(torch.from_numpy(padded[:, 0][here])[None])[0].double().numpy()
        total[here] += maps * gaussian
        weights[here[1:]] += gaussian
    inside = tuple(slice(b, b + n) for b, n in zip(before, image.shape[2:]))
    blended = (total / weights)[(slice(None), *inside)]
    return np.tensordot(weight, blended, 1) + bias[:, None, None]


@pytest.mark.parametrize("shape", [(24, 30), (10, 40), (16, 16)])
def test_the_label_map_equals_the_probe_of_blended_features(labelled, shape):
    network, random = network_of(fold()), np.random.default_rng(1)
    image = random.normal(size=(1, 1, *shape)).astype(np.float32)
    weight, bias = random.normal(size=(3, 4)), 0.3 * random.normal(size=3)
    layer = network.train().decoder.seg_layers[-1]
    with dense_probe(network, weight, bias, fold().configuration, CPU) as predict:
        found = predict(image)
    assert network.training and network.decoder.seg_layers[-1] is layer and network.decoder.deep_supervision
    scores = slow_probe(network.eval(), weight, bias, image, (16, 16), 0.5)
    # half precision may flip near ties
    best, second = np.sort(scores, axis=0)[[-1, -2]]
    assert found.shape == (1, *shape) and len(np.unique(found)) > 1
    clear = best - second > 0.02
    assert clear.mean() > 0.9 and (found[0][clear] == scores.argmax(0)[clear]).all()


def test_scores_beyond_half_precision_do_not_change_the_label_map(labelled):
    network, random = network_of(fold()), np.random.default_rng(1)
    image = random.normal(size=(1, 1, 24, 30)).astype(np.float32)
    weight = 1e6 * random.normal(size=(2, 4))
    with dense_probe(network, weight, np.zeros(2), fold().configuration, CPU) as predict:
        found = predict(image)
    with dense_probe(network, weight / 1e5, np.zeros(2), fold().configuration, CPU) as predict:
        assert (predict(image) == found).mean() > 0.95


def save(tmp_path, weights, name="checkpoint.pth", **more):
    save_checkpoint({"network_weights": weights, **more}, tmp_path / name)
    return tmp_path / name


def test_reading_weights_accepts_numbers_and_text_and_rejects_objects(tmp_path):
    file = save(tmp_path, {"a": torch.ones(2)}, logging={"loss": [np.float32(1), np.float64(2)]}, cases=[np.str_("a")])
    assert torch.equal(probe_models.read_weights(file)["a"], torch.ones(2))
    file = save(tmp_path, {"a": torch.ones(2)}, other=UserError("an object"))
    with pytest.raises(UserError, match=r"run code\); fix: .*you trust this one, save {'network_weights': ...} alone"):
        probe_models.read_weights(file)


def test_all_weights_but_the_segmentation_layers_are_loaded(labelled):
    context = fold()
    network, other = network_of(context), network_of(context)
    for parameter in other.parameters():
        parameter.data += 1
    weights = {key: value for key, value in other.state_dict().items() if ".seg_layers." not in key}
    head = network.decoder.seg_layers[-1].weight.clone()
    weights["decoder.seg_layers.1.weight"] = torch.zeros(7, 4, 1, 1)
    probe_models.check_fit(network, weights, "it")
    before = probe_models.use_weights(network, network.state_dict())
    assert probe_models.use_weights(network, weights) != before
    assert torch.equal(network.decoder.seg_layers[-1].weight, head)
    assert torch.equal(network.encoder.stages[0][0].convs[0].conv.weight,
                       other.encoder.stages[0][0].convs[0].conv.weight)


def other_weights(context, change):
    weights = dict(network_of(context).state_dict())
    change(weights)
    return weights


FIRST = "encoder.stages.0.0.convs.0.conv.weight"
FAULTS = [
    (lambda weights: weights.pop(FIRST), ["1 keys are missing", FIRST]),
    (lambda weights: weights.update(odd=torch.ones(1)), ["1 keys are not the network's", "odd"]),
    (lambda weights: weights.update({FIRST: torch.ones(9, 1, 3, 3)}),
     [FIRST, "has shape [9, 1, 3, 3], expected [4, 1, 3, 3]"]),
]


@pytest.mark.parametrize(("change", "words"), FAULTS)
def test_the_error_for_another_architecture_lists_the_keys(labelled, tmp_path, capsys, change, words):
    file = save(tmp_path, other_weights(fold(), change))
    status = main(["probe", "-d", "7", "-c", "2d", "-f", "0", "--weights", str(file), "-o", str(tmp_path / "out"),
                   "-device", "cpu"])
    message = capsys.readouterr().err
    assert status == 1 and str(file) in message and all(word in message for word in words), message
    assert not (tmp_path / "out" / "probe.json").exists()


MISTAKES = [
    (["-f", "0"], "no model is named, expected at least one; fix: name a model with -tr TRAINER"),
    (["-f", "0", "--untrained"], "-o DIR is missing, .*; fix: name a folder with -o"),
    (["-f", "all", "--untrained", "-o", "OUT"], "fold all has no held-out validation cases"),
    (["-f", "0", "-tr", "nnUNetTrainerDVDC"], "-tr nnUNetTrainerDVDCL"),
    (["-f", "0", "-tr", "nnUNetTrainerDVDCL"],
     "no checkpoint_final.pth .*; fix: run nnUNetv2_train Dataset007_Toy 2d 0 -tr nnUNetTrainerDVDCL -p nnUNetPlans"),
    (["-f", "0", "--weights", "nowhere.pth", "-o", "OUT"], "there is no file nowhere.pth"),
    (["-f", "0", "--untrained", "--cases", "1", "-o", "OUT"], "--cases must be 2 or more"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[words[:30] for _, words in MISTAKES])
def test_a_wrong_argument_gives_one_error_line(labelled, tmp_path, capsys, arguments, words):
    arguments = [str(tmp_path / "out") if one == "OUT" else one for one in arguments]
    assert main(["probe", "-d", "7", "-c", "2d", *arguments, "-device", "cpu"]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nnunet_cfcl probe: ")]
    assert len(errors) == 1
    assert re.search(words, errors[0]), errors


def test_cases_without_labels_are_an_error(toy, settings_file, tmp_path, capsys):
    settings_file({})
    assert main(["probe", "-d", "7", "-c", "2d", "-f", "0", "--untrained", "-o", str(tmp_path), "-device", "cpu"]) == 1
    assert "expected two classes or more" in capsys.readouterr().err


def test_a_file_without_weights_is_an_error(tmp_path):
    torch.save({"model": 1}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"has no network_weights \(found: model\)"):
        probe_models.read_weights(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        probe_models.read_weights(tmp_path / "b.pth")


def test_files_are_named_by_the_shortest_unique_end_of_their_path(tmp_path):
    files = []
    for folder in ("a/fold_0", "b/fold_0", "c"):
        (tmp_path / folder).mkdir(parents=True)
        files.append(tmp_path / folder / "final.pth")
        files[-1].touch()
    models = probe_models.named_files([str(files[0]), str(files[1]), f"mine={files[2]}"])
    assert [model.name for model in models] == ["a/fold_0/final", "b/fold_0/final", "mine"]
    with pytest.raises(UserError, match="two models are named mine, .*; fix: write --weights NAME=FILE"):
        probe_models.check_names([models[2], models[2]])


def test_the_same_weights_give_the_same_metrics_on_the_same_set(labelled, tmp_path):
    file = save(tmp_path, network_of(fold()).state_dict())
    command = ["probe", "-d", "7", "-c", "2d", "-f", "0", "-device", "cpu"]
    assert main([*command, "--weights", f"one={file}", "--untrained", "-o", str(tmp_path / "both")]) == 0
    assert main([*command, "--untrained", "-o", str(tmp_path / "single")]) == 0
    one, untrained = json.loads((tmp_path / "both" / "probe.json").read_text())["models"]
    single = json.loads((tmp_path / "single" / "probe.json").read_text())["models"][0]
    for key in ("image_set", "weights_digest", "figures", "per_case", "probe_dice", "cases"):
        assert one[key] == untrained[key] == single[key], key
    # only the organ is bright
    assert one["figures"]["probe_dice"]["mean"] > 0.4 and one["figures"]["kmeans_accuracy"]["mean"] > 0.6
    assert (tmp_path / "both" / "probe.md").is_file() and (tmp_path / "both" / "probe.png").stat().st_size > 10000
