"""A toy dataset in nnU-Net's folders: six 2D cases with a raw side, a plan and preprocessed files."""

import json
import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

DATASET = "Dataset007_Toy"
CASES = [f"toy_{i}" for i in range(6)]
LABELS = {"background": 0, "organ": 1}


def plan() -> dict:
    """A plan for 16 x 16 patches with a small network; ``2d_small`` inherits from ``2d``."""
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3, "features_per_stage": [4, 8, 8], "conv_op": "torch.nn.modules.conv.Conv2d",
            "kernel_sizes": [[3, 3]] * 3, "strides": [[1, 1], [2, 2], [2, 2]], "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1], "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True}},
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"]}
    resampling = {"resampling_fn_data": "resample_data_or_seg_to_shape",
                  "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
                  "resampling_fn_seg": "resample_data_or_seg_to_shape",
                  "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
                  "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                  "resampling_fn_probabilities_kwargs":
                      {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}}
    configuration = {"data_identifier": "nnUNetPlans_2d", "preprocessor_name": "DefaultPreprocessor", "batch_size": 4,
                     "patch_size": [16, 16], "median_image_size_in_voxels": [24.0, 24.0], "spacing": [1.0, 1.0],
                     "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False],
                     "batch_dice": True, "architecture": architecture, **resampling}
    return {"dataset_name": DATASET, "plans_name": "nnUNetPlans", "image_reader_writer": "NaturalImage2DIO",
            "original_median_spacing_after_transp": [999.0, 1.0, 1.0],
            "original_median_shape_after_transp": [1, 24, 24], "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2], "label_manager": "LabelManager",
            "experiment_planner_used": "ExperimentPlanner",
            "foreground_intensity_properties_per_channel": {"0": {"mean": 0.0, "std": 1.0}},
            "configurations": {"2d": configuration,
                               "2d_small": {"inherits_from": "2d", "batch_size": 2, "cfcl": {"pretrain.epochs": 3}}}}


def save_preprocessed(folder: Path, case: str, image: np.ndarray) -> None:
    """Writes a case (C, 1, Y, X) as nnU-Net's preprocessing does."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    labels = np.zeros((1, *image.shape[1:]), np.int8)
    nnUNetDatasetBlosc2.save_case(image.astype(np.float32), labels, {"spacing": [1, 1, 1]}, str(folder / case),
                                  chunks=(1, *image.shape[1:]), blocks=(1, *image.shape[1:]))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """nnU-Net's three folders, set in the environment, holding `DATASET`; returns their parent."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / variable / DATASET).mkdir(parents=True)
        monkeypatch.setenv(variable, str(tmp_path / variable))
    for variable in ("nnUNet_extTrainer", "nnUNet_cfcl_config", "nnUNet_n_proc_DA"):
        monkeypatch.delenv(variable, raising=False)
    raw, preprocessed = tmp_path / "nnUNet_raw" / DATASET, tmp_path / "nnUNet_preprocessed" / DATASET
    description = {"channel_names": {"0": "xray"}, "labels": LABELS, "numTraining": len(CASES), "file_ending": ".png"}
    for folder in (raw, preprocessed):
        (folder / "dataset.json").write_text(json.dumps(description))
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plan()))
    (raw / "imagesTr").mkdir()
    (preprocessed / "nnUNetPlans_2d").mkdir()
    generator = np.random.default_rng(0)
    for case in CASES:
        (raw / "imagesTr" / f"{case}_0000.png").touch()
        save_preprocessed(preprocessed / "nnUNetPlans_2d", case, generator.normal(size=(1, 1, 24, 24)))
    return tmp_path


@pytest.fixture
def change_plan(toy):
    """A function that changes the toy plan on disk: it is given the plan's dictionary."""
    file = toy / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"

    def change(edit):
        content = plan()
        edit(content)
        file.write_text(json.dumps(content))

    return change


@pytest.fixture
def toy_cases(toy) -> Path:
    """The folder of the toy dataset's preprocessed cases."""
    return toy / "nnUNet_preprocessed" / DATASET / "nnUNetPlans_2d"


@pytest.fixture
def save_case(toy_cases):
    """A function (case, image (C, 1, Y, X)) that replaces a preprocessed toy case."""

    def save(case, image):
        for file in toy_cases.glob(f"{case}*"):
            file.unlink()
        save_preprocessed(toy_cases, case, image)

    return save


@pytest.fixture
def settings_file(toy, monkeypatch):
    """A function that writes sections of settings into a file, which nnU-Net's environment names from then on, with the
    plugin's trainers; it returns a function that changes some of them."""
    from nnunet_cfcl.nnunet.installation import trainers_path

    def begin(short):
        file = toy / "settings.json"
        monkeypatch.setenv("nnUNet_cfcl_config", str(file))
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        monkeypatch.setenv("nnUNet_extTrainer", str(trainers_path()))

        def change(**sections):
            file.write_text(json.dumps({key: {**short.get(key, {}), **sections.get(key, {})}
                                        for key in {*short, *sections}}))

        change()
        return change

    return begin


@pytest.fixture
def kill_first_child():
    """A block in which the first child process that is started gets a SIGKILL."""

    @contextmanager
    def block():
        over = threading.Event()

        def kill():
            while not over.wait(0.01):
                if children := multiprocessing.active_children():
                    os.kill(children[0].pid, signal.SIGKILL)
                    return

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            yield
        finally:
            over.set()
            killer.join()

    return block()
