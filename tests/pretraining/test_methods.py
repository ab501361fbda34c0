"""Every method uses the settings it names, and no others."""

import json

import pytest
import torch
from torch import nn

from nnunet_cfcl.config import Settings, resolve_settings
from nnunet_cfcl.pretraining import methods
from nnunet_cfcl.pretraining.methods import METHOD_SETTINGS, Method, MethodContext
from nnunet_cfcl.views import ViewGeometry

METHODS = {method.name: method for method in vars(methods).values() if isinstance(method, Method)}
# what the reader of the labels uses
OF_THE_READER = ("silver.min_quality", "silver.confidence", "silver.training_cases")
# the supervised method uses no points
NOT_IN_SEGMENTATION = ("silver.balanced_share",)
OTHERS = {"silver.confidence": False, "silver.training_cases": "silver", "pretrain.learn_temperature": True}


def loss(logits, labels):
    raise NotImplementedError


def made_from(method: Method, settings: Settings) -> str:
    """Everything about objective and model that settings can decide."""
    objective = method.build(MethodContext(settings, ViewGeometry((32, 32), (1.0, 1.0)), 1, None, lambda: loss))
    torch.manual_seed(0)
    model = objective.build_model(nn.Conv2d(1, 6, 1), 6, settings.pretrain)
    own = {key: value.tolist() for key, value in model.additions().items() if value.numel() < 2}
    scalars = {key: str(value) for key, value in vars(model).items() if isinstance(value, (int, float))}
    temperature = getattr(model, "temperature", None)
    shapes = {key: tuple(value.shape) for key, value in model.additions().items()}
    start = None if temperature is None else float(torch.as_tensor(temperature()).detach())
    return json.dumps([repr(objective), own, scalars, shapes, start])


def other(key: str) -> Settings:
    section, name = key.split(".")
    default = getattr(getattr(Settings(), section), name)
    return resolve_settings({key: OTHERS.get(key, default + 3 if isinstance(default, int) else default * 0.9 + 0.02)})


@pytest.mark.parametrize("key", [key for key in METHOD_SETTINGS if key not in OF_THE_READER])
@pytest.mark.parametrize("name", METHODS)
def test_a_setting_that_is_not_named_changes_nothing_and_one_that_is_does(name, key):
    method = METHODS[name]
    same = made_from(method, Settings()) == made_from(method, other(key))
    if name == "supervised" and key in NOT_IN_SEGMENTATION:
        assert same
    else:
        assert same == (key in method.unused())


@pytest.mark.parametrize("name", METHODS)
def test_silver_settings_decide_for_the_methods_that_need_labels(name):
    method = METHODS[name]
    assert all((key in method.unused()) != method.example().needs_labels for key in OF_THE_READER)
