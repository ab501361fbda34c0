"""Fine-tuning with replaced images, with and without a pretraining: in this process, on real volumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.phases.replaced_images import ReplacedImages
from nnunet_cfcl.trainers import nnUNetTrainerCFCLScratch, nnUNetTrainerDVDCL

pytestmark = pytest.mark.end_to_end


def _log(trainer) -> str:
    return Path(trainer.log_file).read_text()


def _validation_is_untouched(trainer) -> bool:
    return not isinstance(trainer.dataloader_val.data_loader._data, ReplacedImages)


@pytest.mark.parametrize("trainer_class", [nnUNetTrainerCFCLScratch, nnUNetTrainerDVDCL])
def test_acquisition_effects_reach_the_training_images_alone(make_trainer, trainer_class):
    trainer = make_trainer(trainer_class, finetune={"epochs": 1, "acquisition_probability": 1.0})
    trainer.run_training()
    assert "replaced with probability 1 (counterfactuals: acquisition)" in _log(trainer)
    assert isinstance(trainer.dataloader_train.data_loader._data, ReplacedImages)
    assert _validation_is_untouched(trainer)


def test_with_replacements_two_runs_are_the_same_and_differ_from_one_without(make_trainer, tmp_path):
    def weights(**finetune):
        trainer = make_trainer(nnUNetTrainerCFCLScratch, finetune={"epochs": 1, **finetune})
        trainer.run_training()
        return trainer.network.state_dict()

    first, again, plain = weights(acquisition_probability=0.5), weights(acquisition_probability=0.5), weights()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], plain[key]) for key in first)


def test_counterfactuals_of_a_store_replace_training_images(make_trainer, tmp_path):
    trainer = make_trainer(nnUNetTrainerCFCLScratch)
    folder = Path(trainer.preprocessed_dataset_folder)
    cases = infer_dataset_class(str(folder))(str(folder))
    store = CounterfactualStore.create(tmp_path / "store", ["dark"], "test")
    for case in cases.identifiers:
        image = np.asarray(cases.load_case(case)[0][:])
        store.write(case, "dark", image - 100)
    precomputed = {"source": "precomputed", "store": str(store.folder)}
    trainer = make_trainer(nnUNetTrainerCFCLScratch, counterfactual=precomputed,
                           finetune={"epochs": 1, "counterfactual_probability": 1.0})
    trainer.on_train_start()
    assert "replaced with probability 1 (counterfactuals: precomputed)" in _log(trainer)
    images = next(trainer.dataloader_train)["data"]
    assert images.mean() < -20  # nnU-Net's own are standardised
    assert abs(next(trainer.dataloader_val)["data"].mean()) < 5
