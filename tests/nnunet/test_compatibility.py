"""Differences between versions of nnU-Net, simulated with one version (all: tests/compatibility/matrix.py)."""

import sys
from types import SimpleNamespace

import pytest
from nnunetv2.training.dataloading import nnunet_dataset

from nnunet_cfcl.nnunet import compatibility
from nnunet_cfcl.trainers import lookup


class Newer:
    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, channels, heads, deep):
        return plans_manager, configuration_manager, channels, heads, deep


class Older:
    @staticmethod
    def build_network_architecture(architecture_class_name, arch_init_kwargs, kwargs_req_import, channels, heads, deep):
        return architecture_class_name, arch_init_kwargs, kwargs_req_import, channels, heads, deep


def test_a_trainer_written_for_either_version_builds_its_network():
    plan = SimpleNamespace(network_arch_class_name="U", network_arch_init_kwargs={"n": 1},
                           network_arch_init_kwargs_req_import=["n"])
    assert compatibility.build_network(Newer, "plans", plan, 2, 3, True) == ("plans", plan, 2, 3, True)
    assert compatibility.build_network(Older, "plans", plan, 2, 3, True) == ("U", {"n": 1}, ["n"], 2, 3, True)


@pytest.mark.parametrize(("plans", "typed", "expected"), [
    ({"continue_training": True}, ["nnUNetv2_train"], True),
    ({"continue_training": False}, ["nnUNetv2_train", "--c"], False),
    ({}, ["/bin/nnUNetv2_train", "4", "2d", "0", "--c"], True), ({}, ["/bin/nnUNetv2_train", "4", "2d", "0"], False),
    ({}, ["pytest", "--c"], False),
])
def test_continuation_is_read_from_the_plans_or_from_the_command_line(plans, typed, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", typed)
    assert compatibility.asked_to_continue(plans) == expected


def test_the_block_layout_is_nnunets_in_both_places_of_its_function(monkeypatch):
    expected = compatibility.block_layout((1, 8, 100, 90), (64, 64), 4)
    function = nnunet_dataset.comp_blosc2_params
    monkeypatch.delattr(nnunet_dataset, "comp_blosc2_params")
    monkeypatch.setattr(nnunet_dataset.nnUNetDatasetBlosc2, "comp_blosc2_params", staticmethod(function), raising=False)
    assert compatibility.block_layout((1, 8, 100, 90), (64, 64), 4) == expected


def test_an_nnunet_that_does_not_read_the_variable_finds_its_own_trainers_and_ours_need_install(toy, monkeypatch):
    monkeypatch.setattr(compatibility, "reads_external_trainers", lambda: False)
    monkeypatch.setattr(lookup, "reads_external_trainers", lambda: False)
    assert compatibility.look_up("nnUNetTrainer_250epochs").__name__ == "nnUNetTrainer_250epochs"
    found = lookup.check_trainer("nnUNetTrainerDVDCL")
    assert (found.status, found.fix) == ("FAIL", "nnunet_cfcl install")
