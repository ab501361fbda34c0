"""Other configurations, networks and trainers, in this process, on real preprocessed volumes."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.phases.pretraining_task import build_objective, build_task
from nnunet_cfcl.pretraining.data import PretrainingDataset
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.trainers import CounterfactualPretraining, nnUNetTrainerCFCLScratch, nnUNetTrainerDVDCL

pytestmark = pytest.mark.end_to_end

DATASET = "Dataset004_Hippocampus"


def _finished(trainer) -> None:
    trainer.run_training()
    assert os.path.exists(trainer.pretraining_folder / "checkpoint_final.pth")
    assert os.path.exists(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
    assert all(torch.isfinite(value).all() for value in trainer.network.state_dict().values())


def _residual_encoder(configurations) -> None:
    network = configurations["3d_fullres"]["architecture"]
    network["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
    network["arch_kwargs"]["n_blocks_per_stage"] = network["arch_kwargs"].pop("n_conv_per_stage")


def test_a_residual_encoder_plan_trains(make_trainer):
    _finished(make_trainer(plan=_residual_encoder))


def test_3d_lowres_trains(make_trainer):
    _finished(make_trainer(configuration="3d_lowres"))


def _other_trainers():
    from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerDA5 import nnUNetTrainerDA5
    from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
        nnUNetTrainerNoDeepSupervision,
    )

    return nnUNetTrainerDA5, nnUNetTrainerNoDeepSupervision


@pytest.mark.parametrize("number", [0, 1])
def test_other_peoples_trainers_are_pretrained_by_the_mixin(make_trainer, number):
    class Mine(CounterfactualPretraining, _other_trainers()[number]):
        pass

    _finished(make_trainer(Mine))


def test_a_compiled_network_is_trained_in_both_phases_as_one_that_is_not(make_trainer, monkeypatch, tmp_path):
    # nnU-Net never compiles on a CPU; the eager backend captures the same graphs without a compiler's rounding
    compiled = []

    def compile_eagerly(network, **named):
        compiled.append(type(network).__name__)
        return torch._dynamo.optimize("eager")(network)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    weights = []
    for wanted in (False, True):
        class Mine(nnUNetTrainerDVDCL):
            def _do_i_compile(self, wanted=wanted) -> bool:
                return wanted

        trainer = make_trainer(Mine)
        trainer.run_training()
        network = getattr(trainer.network, "_orig_mod", trainer.network)
        weights.append({key: value.clone() for key, value in network.state_dict().items()})
        shutil.rmtree(tmp_path / DATASET)
        assert bool(compiled) == wanted
    # phase 1 compiles anew, with its tap in place of the heads
    assert len(compiled) >= 2
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.allclose(weights[0][key], weights[1][key], atol=1e-5) for key in weights[0])


def test_the_network_is_the_stock_one_again_after_phase_1(make_trainer):
    trainer = make_trainer()
    trainer.initialize()
    before = list(trainer.network.state_dict())
    heads = trainer.network.decoder.seg_layers[-1]
    trainer.was_initialized = False
    trainer.initialize = lambda: setattr(trainer, "was_initialized", True)
    trainer._start()
    assert list(trainer.network.state_dict()) == before
    assert trainer.network.decoder.seg_layers[-1] is heads and trainer.network.decoder.deep_supervision


def test_two_runs_with_one_seed_end_with_the_same_weights(make_trainer, tmp_path):
    def run():
        trainer = make_trainer()
        trainer.run_training()
        return trainer.network.state_dict()

    first = run()
    for file in (tmp_path / DATASET).rglob("*.pth"):
        file.unlink()
    second = run()
    assert all(torch.equal(first[key], second[key]) for key in first)


class Killed(Exception):
    """Where a run is stopped."""


def test_a_fine_tuning_that_was_killed_and_continued_ends_with_the_weights_of_an_undisturbed_one(make_trainer):
    short = {"epochs": 2, "iterations_per_epoch": 2}
    undisturbed = make_trainer(nnUNetTrainerCFCLScratch, finetune=short)
    undisturbed.run_training()

    class Stopped(nnUNetTrainerCFCLScratch):
        def on_epoch_end(self) -> None:
            super().on_epoch_end()
            raise Killed

    stopped = make_trainer(Stopped, finetune=short)
    with pytest.raises(Killed):
        stopped.run_training()
    continued = make_trainer(nnUNetTrainerCFCLScratch, continues=True, finetune=short)
    continued.load_checkpoint(str(Path(stopped.output_folder) / "checkpoint_latest.pth"))
    assert continued.current_epoch == 1
    continued.run_training()
    expected, found = undisturbed.network.state_dict(), continued.network.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_with_and_without_a_pretraining_fine_tuning_sees_the_same_batches(make_trainer):
    batches = []
    for trainer_class in (nnUNetTrainerCFCLScratch, nnUNetTrainerDVDCL):
        trainer = make_trainer(trainer_class, pretrain={"epochs": 1, "iterations_per_epoch": 1})
        if trainer_class is nnUNetTrainerDVDCL:
            trainer.initialize()  # as a pretraining leaves it
        trainer.on_train_start()
        trainer.on_epoch_start()
        batches.append(next(trainer.dataloader_train)["data"])
    assert torch.equal(*batches)


def test_finetuning_settings_reach_nnunet(make_trainer):
    finetune = {"epochs": 7, "iterations_per_epoch": 3, "val_iterations_per_epoch": 2, "initial_lr": 0.02,
                "mirror_axes": [1], "rotation_deg": 10, "warmup_fraction": 0.5}
    trainer = make_trainer(finetune=finetune)
    trainer.initialize()
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch) == (7, 3, 2)
    rotation, _, _, mirror = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert mirror == trainer.inference_allowed_mirroring_axes == (1,)
    assert rotation == pytest.approx((-0.1745, 0.1745), abs=1e-4)
    rates = []
    for epoch in range(7):
        trainer.lr_scheduler.step(epoch)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.02 / 5) and rates[0] < rates[1] < rates[2] < rates[3]
    assert rates[6] == pytest.approx(0.02 * (1 - 6 / 7) ** 0.9)


def test_without_settings_finetuning_is_nnunets(make_trainer):
    trainer = make_trainer(finetune={"epochs": None, "iterations_per_epoch": None, "mirror_axes": None})
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (1000, 250)
    assert trainer.initial_lr == 1e-2
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] == (0, 1, 2)


def test_no_mirroring_is_none_to_nnunet(make_trainer):
    trainer = make_trainer(finetune={"mirror_axes": []})
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] is None
    assert trainer.inference_allowed_mirroring_axes is None


def _batch_norm(configurations) -> None:
    arguments = configurations["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm3d"


def _small_patch(configurations) -> None:
    configurations["3d_fullres"]["patch_size"] = [8, 8, 8]


@pytest.mark.parametrize(
    ("plan", "words"), [(_batch_norm, "BatchNorm3d.*instance norm"), (_small_patch, "patch.*views.crop_fraction")]
)
def test_plans_that_cannot_be_pretrained_are_refused_before_training(make_trainer, plan, words):
    trainer = make_trainer(plan=plan)
    earlier = Path(trainer.output_folder) / "checkpoint_final.pth"
    earlier.write_text("a model trained before")
    with pytest.raises(UserError, match=words):
        trainer.run_training()
    assert not (trainer.pretraining_folder / "log.jsonl").exists()
    assert earlier.read_text() == "a model trained before"


def test_precomputed_counterfactuals_without_a_store_are_refused_with_the_command_that_makes_one(make_trainer):
    with pytest.raises(UserError, match="nnunet_cfcl counterfactuals import"):
        make_trainer(counterfactual={"source": "precomputed"}).run_training()


def test_weights_given_and_lost_are_not_replaced_by_a_silent_pretraining(make_trainer):
    trainer = make_trainer(continues=True)
    trainer.pretraining_folder.mkdir(parents=True)
    (trainer.pretraining_folder / "skipped.json").write_text("{}")
    with pytest.raises(UserError, match="-pretrained_weights"):
        trainer.run_training()


def test_only_the_first_of_several_gpus_writes_checkpoints(make_trainer):
    trainer = make_trainer()
    trainer.initialize()
    file = Path(trainer.output_folder) / "checkpoint_latest.pth"
    (file.with_name(f"{file.name}.tmp")).write_text("being written by the first")
    trainer.local_rank = 1
    trainer.save_checkpoint(str(file))
    assert not file.exists() and file.with_name(f"{file.name}.tmp").exists()


def test_the_objective_and_the_cases_can_be_sent_to_spawned_processes(make_trainer):
    trainer = make_trainer()
    trainer.initialize()
    fold = FoldContext.of(trainer)
    task = build_task(fold, trainer.method, build_objective(fold, trainer.method), Ranks())
    data = PretrainingDataset(task.reader, task.source, task.objective, task.geometry, task.settings, steps=1)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[0]["image"], data[0]["image"]) and torch.equal(
        copy[0]["drawn"]["points"], data[0]["drawn"]["points"])


def test_a_run_without_checkpoints_leaves_a_finished_model_alone(make_trainer):
    trainer = make_trainer()
    trainer.disable_checkpointing = True
    earlier = Path(trainer.output_folder) / "checkpoint_final.pth"
    earlier.write_text("a model trained before")
    trainer.run_training()
    assert earlier.read_text() == "a model trained before"
