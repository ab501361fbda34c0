"""Settings: layers, types, ranges, messages."""

import json

import pytest

from nnunet_cfcl.config import Settings, SettingsError, resolve_settings, settings_keys
from nnunet_cfcl.files.hashing import digest


def test_a_low_temperature_is_rejected_if_it_is_learned_or_negatives_are_weighted():
    assert resolve_settings({"pretrain.temperature": 0.005}).pretrain.temperature == 0.005
    for more in ({"pretrain.learn_temperature": True}, {"pretrain.hard_negatives": 1.0}):
        with pytest.raises(SettingsError, match=r"pretrain.temperature.*at least 0.02.*found 0.005"):
            resolve_settings({"pretrain.temperature": 0.005, **more})


def test_the_file_wins_over_the_plan_which_wins_over_the_defaults(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"pretrain": {"epochs": 3}}))
    settings = resolve_settings({"pretrain": {"epochs": 2, "images_per_step": 5}}, file)
    assert (settings.pretrain.epochs, settings.pretrain.images_per_step) == (3, 5)
    assert settings.pretrain.points_per_image == Settings().pretrain.points_per_image


def test_the_environment_variable_names_the_file(tmp_path, monkeypatch):
    file = tmp_path / "settings.json"
    file.write_text('{"seed": 7}')
    monkeypatch.setenv("nnUNet_cfcl_config", str(file))
    assert resolve_settings().seed == 7


def test_dotted_keys_equal_nested_ones():
    assert resolve_settings({"finetune.mirror_axes": []}) == resolve_settings({"finetune": {"mirror_axes": []}})


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"pretrain": {"epoch": 2}}, ["pretrain.epoch", "nearest", "pretrain.epochs"]),
        ({"pretrian": {"epochs": 2}}, ["pretrian.epochs", "pretrain.epochs"]),
        ({"pretrain": {"epochs": 2.5}}, ["pretrain.epochs", "integer", "2.5"]),
        ({"pretrain": {"epochs": "2"}}, ["pretrain.epochs", "integer", "'2'"]),
        ({"pretrain": {"epochs": 0}}, ["pretrain.epochs", ">= 1"]),
        ({"pretrain": {"epochs": None}}, ["pretrain.epochs", "integer"]),
        ({"seed": True}, ["seed", "integer"]),
        ({"pretrain": {"temperature": float("nan")}}, ["pretrain.temperature"]),
        ({"views": {"crop_fraction": 0.1}}, ["views.crop_fraction", "list of 2"]),
        ({"views": {"crop_fraction": [0.5, 0.1]}}, ["views.crop_fraction", "low <= high"]),
        ({"counterfactual": {"source": "magic"}}, ["counterfactual.source", "acquisition"]),
        ({"finetune": {"mirror_axes": [3]}}, ["finetune.mirror_axes", "<= 2"]),
        ({"pretrain": 3}, ["pretrain"]),
        ({"counterfactual": {"store": 3}}, ["counterfactual.store", "text", "3"]),
        ({"counterfactual": {"interventions": "scanner"}}, ["counterfactual.interventions", "list", "'scanner'"]),
        ({"counterfactual": {"interventions": [1]}}, ["counterfactual.interventions", "text", "1"]),
        ({"counterfactual": {"abduction": "mode"}}, ["counterfactual.abduction", "'mean'", "'sample'"]),
        ({"generator": {"epoch": 2}}, ["generator.epoch", "nearest", "generator.epochs"]),
        ({"generator": {"patch_size": 64}}, ["generator.patch_size", "list", "64"]),
        ({"generator": {"patch_size": [64, 0]}}, ["generator.patch_size", ">= 1", "0"]),
        ({"generator": {"width": 3}}, ["generator.width", ">= 4"]),
        ({"generator": {"memory_gb": 0}}, ["generator.memory_gb", ">= 0.01"]),
        ({"generator": {"validation_share": 0.6}}, ["generator.validation_share", ">= 0.01 and <= 0.5", "0.6"]),
        ({"generator": {"prior": "paper"}}, ["generator.prior", "exogenous", "conditional"]),
        ({"generator": {"scale": 0}}, ["generator.scale", ">= 0.0001"]),
        ({"generator": {"mirror_axes": [0, 3]}}, ["generator.mirror_axes", "<= 2"]),
        ({"gate": {"anatomy": 1.2}}, ["gate.anatomy", "<= 1"]),
        ({"gate": {"enabled": "no"}}, ["gate.enabled", "true or false", "'no'"]),
    ],
)
def test_a_wrong_setting_is_an_error_that_names_the_setting(block, words):
    with pytest.raises(SettingsError) as error:
        resolve_settings(block)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_file_without_a_json_object_is_an_error_that_names_the_file(tmp_path, content):
    file = tmp_path / "settings.json"
    file.write_text(content)
    with pytest.raises(SettingsError, match="settings.json"):
        resolve_settings(None, file)


def test_a_missing_file_is_an_error_that_names_the_environment_variable(tmp_path):
    with pytest.raises(SettingsError, match="nnUNet_cfcl_config"):
        resolve_settings(None, tmp_path / "none.json")


def test_null_leaves_an_optional_setting_unset():
    assert resolve_settings({"finetune": {"epochs": None}}).finetune.epochs is None


@pytest.mark.parametrize("store", [None, False, True, "folder"])
def test_a_store_is_a_folder_a_boolean_or_null(store):
    found = resolve_settings({"counterfactual.store": store}).counterfactual.store
    assert found == store and type(found) is type(store)


def test_optional_settings_of_the_generator_take_values_of_their_type():
    settings = resolve_settings({
        "generator": {"patch_size": [64, 32], "width": 8, "scale": 1, "mirror_axes": []},
        "counterfactual": {"interventions": ["scanner", "scanner+disease"]}})
    assert settings.generator.patch_size == (64, 32) and settings.generator.width == 8
    assert settings.generator.scale == 1.0 and isinstance(settings.generator.scale, float)
    assert settings.counterfactual.interventions == ("scanner", "scanner+disease")
    assert resolve_settings(json.loads(json.dumps(settings.to_dict()))) == settings


def test_settings_survive_a_round_trip_through_json():
    settings = resolve_settings({"views": {"crop_fraction": [0.2, 0.9]}, "finetune": {"mirror_axes": [0, 1]}})
    assert resolve_settings(json.loads(json.dumps(settings.to_dict()))) == settings


def test_the_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_every_setting_states_its_meaning_and_has_a_valid_default():
    keys = list(settings_keys())
    assert all(meaning for _, _, meaning in keys)
    assert resolve_settings({key: default for key, default, _ in keys}) == Settings()


@pytest.mark.parametrize(
    ("block", "words"),
    [({"counterfactual.store": False},
      "needs stored counterfactuals, found counterfactual.store false; fix: set counterfactual.store to true"),
     ({"pretrain.data": "pool"},
      "of the training cases, found pretrain.data 'pool'; fix: set pretrain.data to 'training_and_pool'")],
)
def test_fine_tuning_with_counterfactuals_that_cannot_exist_is_rejected_before_the_pretraining(block, words):
    assert resolve_settings({**block, "finetune.acquisition_probability": 0.5})
    with pytest.raises(SettingsError, match=words):
        resolve_settings({**block, "finetune.counterfactual_probability": 0.5})
