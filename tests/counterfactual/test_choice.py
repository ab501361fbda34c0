"""Choice of the source of a run, and errors for stores that do not match."""

import re
from pathlib import Path

import numpy as np
import pytest

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.counterfactual import CounterfactualStore, default_store_root
from nnunet_cfcl.counterfactual.choice import choose_source, wants_generator
from nnunet_cfcl.counterfactual.source import AcquisitionSource, PrecomputedSource
from nnunet_cfcl.counterfactual.store import GENERATED
from nnunet_cfcl.errors import UserError

SHAPE = (1, 1, 20, 18)


@pytest.fixture
def preprocessed(tmp_path) -> Path:
    return tmp_path / "Dataset001_X" / "nnUNetPlans_2d"


@pytest.fixture
def reader(cases_in_memory):
    """Cases 0, 1 and 2 are in use, case 3 is in the dataset only."""
    cases = cases_in_memory(SHAPE, count=4)
    cases.cases = cases.known[:3]
    return cases


@pytest.fixture
def fill(reader):
    """Factory: a complete store of the cases in use; the dictionary replaces or adds shapes, None leaves a case out."""

    def make(folder: Path, changes: dict | None = None) -> Path:
        store = CounterfactualStore.create(folder, ["vendorB", "low_field"], "test")
        for case, shape in {**dict.fromkeys(reader.cases, SHAPE), **(changes or {})}.items():
            for name in store.interventions:
                if shape:
                    store.write(case, name, np.zeros(shape))
        return folder

    return make


@pytest.fixture
def choose(reader, preprocessed):
    def make(source: str, store: Path | None = None):
        wanted = {"source": source, "store": str(store) if store else None}
        return choose_source(
            resolve_settings({"counterfactual": wanted}), reader, str(preprocessed), ["ZScoreNormalization"], 2)

    return make


@pytest.mark.parametrize("source", ["auto", "acquisition"])
def test_without_a_store_acquisitions_are_drawn(choose, source):
    chosen = choose(source)
    assert isinstance(chosen, AcquisitionSource)
    assert chosen.identity() == {"source": "acquisition", "schemes": ["ZScoreNormalization"]}


def test_precomputed_without_a_store_raises_with_the_folder_and_the_command(choose, preprocessed):
    message = rf"{re.escape(str(default_store_root(preprocessed)))} holds no store.*counterfactuals import"
    with pytest.raises(UserError, match=message):
        choose("precomputed")


@pytest.mark.parametrize("source", ["auto", "precomputed"])
def test_the_only_store_of_the_dataset_is_used(choose, fill, preprocessed, source):
    fill(default_store_root(preprocessed) / "abc")
    chosen = choose(source)
    assert isinstance(chosen, PrecomputedSource)
    assert chosen.identity()["interventions"] == ["vendorB", "low_field"]


def test_acquisition_is_used_if_set_although_there_is_a_store(choose, fill, preprocessed):
    fill(default_store_root(preprocessed) / "abc", {"case_0": (1, 1, 3, 3)})
    assert isinstance(choose("acquisition"), AcquisitionSource)


@pytest.mark.parametrize("source", ["auto", "precomputed"])
def test_of_several_stores_one_must_be_named(choose, fill, preprocessed, source):
    named = fill(default_store_root(preprocessed) / "aaa")
    CounterfactualStore.create(default_store_root(preprocessed) / "bbb", ["vendorC"], "test")
    with pytest.raises(UserError, match=r"found 2 counterfactual stores, expected one: .*aaa, .*bbb; fix: "
                                        r".*counterfactual\.store"):
        choose(source)
    assert choose(source, named).identity()["interventions"] == ["vendorB", "low_field"]


@pytest.mark.parametrize("source", ["auto", "precomputed"])
def test_a_store_elsewhere_is_used_when_it_is_named(choose, fill, tmp_path, source):
    assert isinstance(choose(source, fill(tmp_path / "elsewhere")), PrecomputedSource)


@pytest.mark.parametrize("source", ["auto", "precomputed"])
def test_a_named_folder_without_a_store_is_an_error_and_not_ignored(choose, tmp_path, source):
    with pytest.raises(UserError, match="nowhere is not a counterfactual store"):
        choose(source, tmp_path / "nowhere")


@pytest.mark.parametrize("source", ["auto", "precomputed"])
def test_a_store_that_lacks_a_case_names_the_missing_files(choose, fill, preprocessed, source):
    fill(default_store_root(preprocessed) / "abc", {"case_1": None})
    with pytest.raises(UserError, match=r"lacks 2 of 6 files: case_1__low_field\.b2nd, case_1__vendorB\.b2nd"):
        choose(source)


@pytest.mark.parametrize("shape", [(1, 1, 20, 19), (2, 1, 20, 18), (1, 2, 20, 18)])
def test_a_counterfactual_of_the_wrong_shape_is_named_with_both_shapes(choose, fill, preprocessed, shape):
    fill(default_store_root(preprocessed) / "abc", {"case_2": shape})
    found, expected = re.escape(str(shape)), re.escape(str(SHAPE))
    with pytest.raises(UserError, match=rf"case_2__\w+\.b2nd has shape {found}, expected {expected}"):
        choose("auto")


def test_a_counterfactual_of_an_unknown_case_is_named(choose, fill, preprocessed):
    fill(default_store_root(preprocessed) / "abc", {"stranger": SHAPE})
    with pytest.raises(UserError, match=r"holds 2 files of cases not in the dataset.*stranger__low_field\.b2nd"):
        choose("auto")


def test_cases_of_the_dataset_that_are_not_used_may_be_in_the_store_in_any_shape(choose, fill, preprocessed):
    fill(default_store_root(preprocessed) / "abc", {"case_3": (1, 1, 5, 5)})
    assert isinstance(choose("auto"), PrecomputedSource)


# ---------------------------------------------------------------- a generator


def wants(preprocessed, attributes=True, **counterfactual) -> bool:
    return wants_generator(resolve_settings({"counterfactual": counterfactual}), str(preprocessed), attributes)


@pytest.mark.parametrize("store", [None, False])
def test_a_generator_is_used_if_there_are_attributes_and_no_other_source_is_set(preprocessed, store):
    assert wants(preprocessed, store=store)
    assert not wants(preprocessed, attributes=False, store=store)


@pytest.mark.parametrize(("source", "wanted"), [("generator", True), ("acquisition", False), ("precomputed", False)])
@pytest.mark.parametrize("attributes", [True, False])
def test_the_source_of_the_settings_decides(preprocessed, fill, source, wanted, attributes):
    assert wants(preprocessed, attributes, source=source) == wanted
    fill(default_store_root(preprocessed) / "abc")
    assert wants(preprocessed, attributes, source=source) == wanted


def test_an_imported_store_takes_precedence_over_a_generator(preprocessed, fill, tmp_path):
    assert not wants(preprocessed, store=str(tmp_path / "elsewhere"))
    fill(default_store_root(preprocessed) / "abc")
    assert not wants(preprocessed)


def test_a_generated_store_does_not_take_precedence_over_its_generator(preprocessed):
    CounterfactualStore.create(default_store_root(preprocessed) / "abc", ["scanner"], f"{GENERATED} abc")
    assert wants(preprocessed)


def test_a_generator_without_passed_interventions_is_replaced_by_acquisitions(choose, fill, preprocessed):
    fill(default_store_root(preprocessed) / "abc")
    assert isinstance(choose("generator"), AcquisitionSource)
