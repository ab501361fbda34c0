"""Counterfactuals that change one attribute to a given value, found by the generator's record."""

import json

import numpy as np
import pytest
import torch

from nnunet_cfcl.counterfactual.generator.generation import RECORD
from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.counterfactual.targeted import TargetedCounterfactuals
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.views import CropBox


@pytest.fixture
def store(tmp_path):
    made = CounterfactualStore.create(tmp_path, ["scanner", "disease", "scanner+disease"], "generator:test")

    def record(before: str, new: str) -> dict:
        old = {"scanner": before, "disease": "none"}
        return {"scanner": {"before": old, "after": {**old, "scanner": new}},
                "disease": {"before": old, "after": {**old, "disease": "effusion"}},
                "scanner+disease": {"before": old, "after": {"scanner": new, "disease": "effusion"}}}

    content = {"of_b": record("B", "A"), "of_a": record("A", "B"), "of_c": record("C", "B")}
    (tmp_path / RECORD).write_text(json.dumps(content))
    for case in content:
        for number, name in enumerate(made.interventions):
            made.write(case, name, np.full((1, 1, 6, 8), number + 1.0, np.float32))
    return made


def box(size=(10, 12)) -> CropBox:
    return CropBox((0, -2, -2), (1, *size), (1, 6, 8), 2)


def test_the_intervention_to_the_value_alone_is_read_and_padded_as_the_image(store):
    found = TargetedCounterfactuals(store, "scanner", "A")
    assert len(found) == 1
    crop = found.read("of_b", box())
    assert crop.shape == (1, 10, 12) and torch.equal(crop[:, 2:8, 2:10], torch.ones(1, 6, 8))
    assert crop.sum() == 48


@pytest.mark.parametrize("case", ["of_a", "of_c", "unknown"])
def test_cases_that_are_not_changed_to_the_value_have_none(store, case):
    assert TargetedCounterfactuals(store, "scanner", "A").read(case, box()) is None


def test_a_store_without_a_record_has_none(store):
    (store.folder / RECORD).unlink()
    assert len(TargetedCounterfactuals(store, "scanner", "A")) == 0


def test_a_missing_file_is_named(store):
    store.path("of_b", "scanner").unlink()
    with pytest.raises(UserError, match="counterfactual 'scanner' of case of_b is missing"):
        TargetedCounterfactuals(store, "scanner", "A").read("of_b", box())
