"""Every method reads the settings declared for it, and no others; its attributes are those of its objective."""

import json
from dataclasses import fields, is_dataclass

import pytest
import torch
from torch import nn

from nnunet_cfcl.config import Settings, resolve_settings
from nnunet_cfcl.pretraining import methods
from nnunet_cfcl.pretraining.methods import Method, MethodContext
from nnunet_cfcl.pretraining.objective import Objective
from nnunet_cfcl.views import ViewGeometry

METHODS = {method.name: method for method in vars(methods).values() if isinstance(method, Method)}
#: Settings that change the cases and their labels, not the objective.
LABEL_FILES = ("silver.min_quality", "silver.confidence", "silver.training_cases")
#: Share of the crops with foreground, and of the points; the supervised method draws no points.
NOT_IN_SEGMENTATION = ("silver.balanced_share",)
OTHERS = {"silver.confidence": False, "silver.training_cases": "silver", "pretrain.learn_temperature": True}


def readers() -> dict[str, tuple[str, ...]]:
    """Readers of every setting that only some methods read, by dotted key."""
    found = {}
    for section in fields(Settings):
        part = getattr(Settings(), section.name)
        for one in fields(part) if is_dataclass(part) else ():
            if read_by := (*section.metadata["read_by"], *one.metadata["read_by"]):
                found[f"{section.name}.{one.name}"] = read_by
    return {key: names for key, names in found.items() if not key.startswith(("generator.", "acquisition."))}


READERS = readers()


def loss(logits, labels):
    raise NotImplementedError


def build(method: Method, settings: Settings) -> Objective:
    return method.build(MethodContext(settings, ViewGeometry((32, 32), (1.0, 1.0)), 1, None, lambda: loss))


def made_from(method: Method, settings: Settings) -> str:
    """Everything about objective and model that settings can decide."""
    objective = build(method, settings)
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


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("attribute", ["tap", "separable", "needs_labels"])
def test_the_attributes_of_a_method_are_those_of_its_objective(name, attribute):
    assert getattr(METHODS[name], attribute) == getattr(build(METHODS[name], Settings()), attribute)


@pytest.mark.parametrize("key", [key for key in READERS if key not in LABEL_FILES])
@pytest.mark.parametrize("name", METHODS)
def test_a_setting_changes_the_methods_that_read_it_and_no_other(name, key):
    method = METHODS[name]
    changes = made_from(method, Settings()) != made_from(method, other(key))
    if name == "supervised" and key in NOT_IN_SEGMENTATION:
        assert not changes
    else:
        assert changes == bool(set(READERS[key]) & set(method.reads))


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_that_need_labels_read_the_settings_of_the_label_files(name):
    method = METHODS[name]
    assert all(("labels" in READERS[key] and "labels" in method.reads) == method.needs_labels for key in LABEL_FILES)


def test_every_setting_that_only_some_methods_read_is_read_by_one():
    assert {reader for method in METHODS.values() for reader in method.reads} == {
        reader for read_by in READERS.values() for reader in read_by}
    assert len(READERS) == 17
