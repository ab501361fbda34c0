"""Masks as without maps, maps of the features that made the masks, and nothing that costs a mask."""

import json
import os

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from PIL import Image

from nnunet_cfcl.chromap.color_space import ColorSpace
from nnunet_cfcl.chromap.nnunet import session as chromap_session
from nnunet_cfcl.chromap.nnunet import writer as chromap_writer
from nnunet_cfcl.chromap.nnunet.hook import VARIABLE
from nnunet_cfcl.chromap.nnunet.predictor import ChromapPredictor, WithChromaps
from nnunet_cfcl.chromap.nnunet.session import ChromapRequest
from nnunet_cfcl.chromap.nnunet.spaces import weights_digest
from nnunet_cfcl.chromap.plane_accumulator import PlaneAccumulator
from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.errors import UserError
from tests.toy_dataset import LABELS, plan

SHAPES = {"a": (24, 30), "b": (24, 24), "tiny": (7, 40)}


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model folder with two folds of random weights, and a folder of images beside it."""
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"chromap": {"reducer": "pca", "samples": 2000}}))
    monkeypatch.setenv("nnUNet_cfcl_config", str(settings))
    monkeypatch.delenv(VARIABLE, raising=False)
    folder = tmp_path / "model"
    content = plan()
    description = {"channel_names": {"0": "xray"}, "labels": LABELS, "numTraining": 6, "file_ending": ".png"}
    architecture = content["configurations"]["2d"]["architecture"]
    for fold in range(2):
        (folder / f"fold_{fold}").mkdir(parents=True)
        torch.manual_seed(fold)
        network = get_network_from_plans(
            architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"], 1, 2,
            deep_supervision=False)
        torch.save({"network_weights": network.state_dict(), "trainer_name": "nnUNetTrainer",
                    "init_args": {"configuration": "2d"}, "inference_allowed_mirroring_axes": (0, 1)},
                   folder / f"fold_{fold}" / "checkpoint_final.pth")
    (folder / "plans.json").write_text(json.dumps(content))
    (folder / "dataset.json").write_text(json.dumps(description))
    images = tmp_path / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        values = random.normal(size=shape).cumsum(0).cumsum(1)
        values = 255 * (values - values.min()) / np.ptp(values)
        Image.fromarray(values.astype(np.uint8)).save(images / f"{name}_0000.png")
    return tmp_path


def predictor_of(model, kind=ChromapPredictor, folds=(0,), **request):
    predictor = kind(device=torch.device("cpu"), allow_tqdm=False)
    if request:
        predictor.chromap_request = ChromapRequest(**request)
    predictor.initialize_from_trained_model_folder(str(model / "model"), folds)
    return predictor


def predict(model, predictor, out, **options):
    # no worker processes: a second each in tests
    (model / out).mkdir(exist_ok=True)
    predictor.predict_from_files_sequential(str(model / "images"), str(model / out), **options)
    return {name: np.asarray(Image.open(model / out / f"{name}.png")) for name in SHAPES}


def picture(model, out, name):
    return np.asarray(Image.open(model / out / "chromap" / f"{name}.png"))


@pytest.mark.parametrize("folds", [(0,), (0, 1)])
def test_masks_are_those_of_the_stock_predictor_and_every_case_has_a_map(model, folds):
    stock = predict(model, predictor_of(model, nnUNetPredictor, folds), "stock")
    ours = predict(model, predictor_of(model, folds=folds), "ours")
    for name, shape in SHAPES.items():
        np.testing.assert_array_equal(ours[name], stock[name])
        assert picture(model, "ours", name).shape == (*shape, 3)
    names = {file.name for file in (model / "ours").iterdir()}
    assert names == {file.name for file in (model / "stock").iterdir()} | {"chromap"}
    summary = json.loads((model / "ours/chromap/summary.json").read_text())
    assert set(summary["cases"]) == set(SHAPES) and not summary["failures"]
    assert 0.2 < summary["cases"]["a"]["seam_contrast"] < 5


def test_with_worker_processes_it_is_the_same(model):
    predict(model, predictor_of(model), "sequential")
    predictor_of(model).predict_from_files(
        str(model / "images"), str(model / "workers"), num_processes_preprocessing=1,
        num_processes_segmentation_export=1)
    for name in SHAPES:
        np.testing.assert_array_equal(picture(model, "workers", name), picture(model, "sequential", name))


def test_a_map_is_the_first_folds_whatever_other_folds_say(model):
    predict(model, predictor_of(model), "one")
    predict(model, predictor_of(model, folds=(0, 1)), "two")
    for name in SHAPES:
        np.testing.assert_array_equal(picture(model, "one", name), picture(model, "two", name))


def test_the_blended_map_is_what_one_pass_over_one_patch_gives(model):
    """An image as large as the patch has one window: its colours are those of the network's features there."""
    predictor = predictor_of(model)
    for file in (model / "images").iterdir():
        file.unlink()
    values = np.random.default_rng(1).integers(0, 255, (16, 16)).astype(np.uint8)
    Image.fromarray(values).save(model / "images" / "patch_0000.png")
    predictor.make_chromaps(str(model / "images"), str(model / "out"))
    space = ColorSpace.load(model / "out/chromap/chromap_space.npz")
    image = (values - values.mean()) / values.std()
    caught = []
    network = predictor.network.eval()
    handle = network.decoder.seg_layers[-1].register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    with torch.no_grad():
        network(torch.from_numpy(image)[None, None].float())
    handle.remove()
    colors = np.asarray(space.color(space.place(space.reduce(caught[0][0])))).astype(int)
    grey = np.clip((values - np.percentile(values, 0.5)) / np.ptp(np.percentile(values, [0.5, 99.5])), 0, 1) * 255
    expected = 0.5 * colors + 0.5 * grey[..., None]
    found = picture(model, "out", "patch").astype(int)
    assert np.abs(found - expected).mean() < 2 and np.percentile(np.abs(found - expected), 99) < 12


def test_maps_alone_are_those_beside_the_masks(model):
    predict(model, predictor_of(model), "masks")
    predictor_of(model).make_chromaps(str(model / "images"), str(model / "alone"))
    for name in SHAPES:
        np.testing.assert_array_equal(picture(model, "alone", name), picture(model, "masks", name))
    assert {file.name for file in (model / "alone").iterdir()} == {"chromap"}


def test_features_may_be_averaged_over_mirrored_passes(model, monkeypatch):
    predict(model, predictor_of(model), "plain")
    settings = {"chromap": {"reducer": "pca", "samples": 2000, "mirroring": True}}
    (model / "settings.json").write_text(json.dumps(settings))
    predict(model, predictor_of(model), "mirrored")
    # a picture that is its own mirror image, in a network averaged over mirrored passes, is mapped symmetrically
    values = np.random.default_rng(1).integers(0, 255, (16, 8)).astype(np.uint8)
    for file in (model / "images").iterdir():
        file.unlink()
    Image.fromarray(np.concatenate([values, values[:, ::-1]], 1)).save(model / "images" / "even_0000.png")
    predictor_of(model).make_chromaps(str(model / "images"), str(model / "even"))
    even = picture(model, "even", "even").astype(int)
    assert np.abs(even - even[:, ::-1]).max() <= 4
    assert (picture(model, "plain", "a") != picture(model, "mirrored", "a")).any()


def test_the_models_own_colours_are_used_where_it_has_some(model, capsys):
    predict(model, predictor_of(model), "first")
    assert "no colour space of its own" in capsys.readouterr().out
    (model / "model/fold_0/cfcl").mkdir()
    (model / "first/chromap/chromap_space.npz").rename(model / "model/fold_0/cfcl/chromap_space.npz")
    predict(model, predictor_of(model), "second")
    assert "no colour space of its own" not in capsys.readouterr().out
    assert not (model / "second/chromap/chromap_space.npz").exists()
    np.testing.assert_array_equal(picture(model, "first", "a"), picture(model, "second", "a"))


def test_a_colour_space_of_another_model_is_refused_and_the_masks_are_there(model):
    predict(model, predictor_of(model, folds=(1,)), "other")
    space = model / "other/chromap/chromap_space.npz"
    stock = predict(model, predictor_of(model, nnUNetPredictor), "stock")
    with pytest.raises(UserError, match="colour space of another model"):
        predict(model, predictor_of(model, space=space, strict=True), "ours")
    np.testing.assert_array_equal(np.asarray(Image.open(model / "ours/a.png")), stock["a"])


def test_an_interrupted_run_is_continued_with_its_colours_and_the_maps_it_lacks(model, capsys):
    before = predict(model, predictor_of(model), "out")
    maps = {name: picture(model, "out", name) for name in SHAPES}
    (model / "out/b.png").unlink()
    (model / "out/chromap/a.png").unlink()
    (model / "out/chromap/b.png").unlink()
    capsys.readouterr()
    after = predict(model, predictor_of(model), "out", overwrite=False)
    assert "no colour space of its own" not in capsys.readouterr().out
    for name in SHAPES:
        np.testing.assert_array_equal(after[name], before[name])
        np.testing.assert_array_equal(picture(model, "out", name), maps[name])


@pytest.mark.parametrize("place", ["place", "reduce"])
def test_a_map_that_fails_costs_no_mask_and_says_why(model, monkeypatch, capsys, place):
    stock = predict(model, predictor_of(model, nnUNetPredictor), "stock")

    def fail(self, *arguments):
        raise RuntimeError("out of paint")

    predictor = predictor_of(model)
    monkeypatch.setattr(ColorSpace, place, fail)
    ours = predict(model, predictor, "ours")
    for name in SHAPES:
        np.testing.assert_array_equal(ours[name], stock[name])
    said = capsys.readouterr().out
    assert "out of paint" in said and "no CHRO-map" in said
    assert not list((model / "ours/chromap").glob("*.png"))


def test_a_folder_that_cannot_be_made_costs_no_mask(model, capsys):
    (model / "ours").mkdir()
    (model / "ours/chromap").touch()
    ours = predict(model, predictor_of(model), "ours")
    assert len(ours) == 3 and "cannot write" in capsys.readouterr().out


def test_a_network_of_another_kind_costs_no_mask(model, monkeypatch, capsys):
    def refuse(network):
        raise UserError("Primus has no decoder of nnU-Net's U-Net kind")

    monkeypatch.setattr(chromap_session, "decoder_width", refuse)
    assert len(predict(model, predictor_of(model), "ours")) == 3
    assert "Primus has no decoder" in capsys.readouterr().out


def test_where_nnunet_begins_again_on_the_cpu_the_map_begins_again_too(model):
    predict(model, predictor_of(model), "whole")
    predictor = predictor_of(model)
    predictor.perform_everything_on_device = True  # as on a GPU: a failure is tried again on the CPU
    calls = []

    class Breaks(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.decoder = network, network.decoder

        def load_state_dict(self, weights, *options):
            return self.network.load_state_dict(weights, *options)

        def forward(self, x):
            calls.append(1)
            if len(calls) == 3:
                raise RuntimeError("out of memory")
            return self.network(x)

    space = ColorSpace.load(model / "whole/chromap/chromap_space.npz")
    (model / "model/fold_0/cfcl").mkdir()
    space.save(model / "model/fold_0/cfcl/chromap_space.npz")
    predictor.network = Breaks(predictor.network)
    predict(model, predictor, "again")
    for name in SHAPES:
        np.testing.assert_array_equal(picture(model, "again", name), picture(model, "whole", name))


def test_embedding_and_palette_are_asked_for(model):
    import nibabel

    predict(model, predictor_of(model), "hsv")
    predict(model, predictor_of(model, embedding=True, palette="oklch"), "oklch")
    assert (picture(model, "hsv", "a") != picture(model, "oklch", "a")).any()
    embedding = nibabel.load(model / "oklch/chromap/a_embedding.nii.gz")
    assert embedding.shape == (30, 24, 1, 1, 2) and np.abs(np.asarray(embedding.dataobj)).max() <= 1.001


def test_the_digest_of_weights_changes_with_any_of_them():
    weights = {"a": torch.arange(4.0), "b": torch.ones(2, 2)}
    same = {"b": torch.ones(2, 2), "a": torch.arange(4.0)}
    other = {"a": torch.arange(4.0), "b": torch.tensor([[1, 1], [1, 1.0001]])}
    assert weights_digest(weights) == weights_digest(same) != weights_digest(other)


def test_the_stock_predictor_writes_maps_where_the_variable_is_set(model, monkeypatch):
    """As in `nnUNetv2_predict`: the trainer is looked up while the predictor is being prepared."""
    from nnunet_cfcl.nnunet.installation import trainers_path

    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_path()))
    file = model / "model/fold_0/checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    torch.save({**content, "trainer_name": "nnUNetTrainerDVDCL"}, file)
    assert type(predictor_of(model, nnUNetPredictor)) is nnUNetPredictor
    monkeypatch.setenv(VARIABLE, "1")
    predictor = predictor_of(model, nnUNetPredictor)
    assert isinstance(predictor, WithChromaps)
    assert predictor.chromap_request.fold_folder == model / "model/fold_0"
    predict(model, predictor, "out")
    assert (model / "out/chromap/a.png").is_file()

    class Own(nnUNetPredictor):
        pass

    own = predictor_of(model, Own)
    assert isinstance(own, WithChromaps) and isinstance(own, Own)
    assert os.environ[VARIABLE] == "1" and resolve_settings().chromap.reducer == "pca"


def break_once(monkeypatch, owner, name, failing):
    """The ``failing``-th call of a method raises."""
    right, calls = getattr(owner, name), []

    def sometimes(self, *arguments):
        calls.append(1)
        if len(calls) == failing:
            raise RuntimeError("once")
        return right(self, *arguments)

    monkeypatch.setattr(owner, name, sometimes)


@pytest.mark.parametrize("name", ["coordinates", "add"])
@pytest.mark.parametrize("workers", [False, True])
def test_a_case_that_fails_leaves_the_others_their_own_maps(model, monkeypatch, capsys, name, workers):
    predict(model, predictor_of(model), "whole")
    (model / "model/fold_0/cfcl").mkdir()
    (model / "whole/chromap/chromap_space.npz").rename(model / "model/fold_0/cfcl/chromap_space.npz")
    predictor = predictor_of(model)
    break_once(monkeypatch, PlaneAccumulator, name, 1)
    if workers:
        predictor.predict_from_files(str(model / "images"), str(model / "out"), num_processes_preprocessing=1,
                                     num_processes_segmentation_export=1)
    else:
        predict(model, predictor, "out")
    assert "no CHRO-map of a: RuntimeError: once" in capsys.readouterr().out
    assert not (model / "out/chromap/a.png").exists()
    for other in ("b", "tiny"):
        np.testing.assert_array_equal(picture(model, "out", other), picture(model, "whole", other))
    summary = json.loads((model / "out/chromap/summary.json").read_text())
    assert set(summary["cases"]) == {"b", "tiny"} and set(summary["failures"]) == {"a"}


def test_maps_that_were_missing_and_fail_again_change_nothing_of_the_run(model, monkeypatch, capsys):
    predict(model, predictor_of(model), "out")
    (model / "out/chromap/a.png").unlink()
    predictor = predictor_of(model)

    def fail(self, x):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(type(predictor.network), "forward", fail)
    predict(model, predictor, "out", overwrite=False)
    assert "no CHRO-map of a: RuntimeError: CUDA out of memory" in capsys.readouterr().out
    assert json.loads((model / "out/chromap/summary.json").read_text())["failures"]


def test_an_earlier_map_does_not_pass_for_a_new_one(model, monkeypatch):
    predict(model, predictor_of(model), "out")
    break_once(monkeypatch, PlaneAccumulator, "coordinates", 1)
    predict(model, predictor_of(model), "out")
    assert not (model / "out/chromap/a.png").exists() and (model / "out/chromap/b.png").exists()


def test_a_damaged_summary_is_written_anew(model):
    predict(model, predictor_of(model), "out")
    (model / "out/chromap/summary.json").write_text('{"cases": ')
    predict(model, predictor_of(model, strict=True), "out")
    assert set(json.loads((model / "out/chromap/summary.json").read_text())["cases"]) == set(SHAPES)


def test_an_image_that_cannot_be_read_does_not_cost_the_others_their_colours(model):
    (model / "images/a_0000.png").write_bytes(b"no picture")
    predictor_of(model).make_chromaps(str(model / "images"), str(model / "out"))
    assert {file.name for file in (model / "out/chromap").glob("*.png")} == {"b.png", "tiny.png"}


def test_parts_of_a_prediction_share_the_colours_of_the_first(model):
    for part in range(2):
        predictor_of(model).predict_from_files(
            str(model / "images"), str(model / "parts"), num_processes_preprocessing=1,
            num_processes_segmentation_export=1, num_parts=2, part_id=part)
    weights = {json.loads((model / f"parts/chromap/summary_part_{part}.json").read_text())["color_space"]["weights"]
               for part in range(2)}
    assert len(weights) == 1 and len(list((model / "parts/chromap").glob("*.png"))) == 3


def test_coordinates_of_a_written_volume_are_not_kept(model, monkeypatch):
    monkeypatch.setattr(chromap_writer, "is_picture", lambda properties, shape: False)
    kept = []
    finish = chromap_writer.ChromapWriter.finish

    def look(self):
        self._collect()
        kept.extend(case.coordinates.untyped_storage().nbytes() for case in self._volumes)
        finish(self)

    monkeypatch.setattr(chromap_writer.ChromapWriter, "finish", look)
    predict(model, predictor_of(model), "out")
    assert kept == [0, 0, 0]
