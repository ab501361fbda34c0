"""nnU-Net's own prediction of given cases by one trained fold, with saved probabilities."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_cfcl.errors import UserError, first_line, foreign_errors_as


class MaskPredictor(nnUNetPredictor):
    """nnU-Net's predictor for masks alone: `chromap.nnunet.hook` leaves it as it is, whatever its variable says."""

    offers_chromaps = False


def load_predictor(fold_folder: Path, checkpoint: str, device: torch.device, fix: str) -> MaskPredictor:
    """Load a trained fold into nnU-Net's predictor, with its default settings.

    Args:
        fold_folder: ``nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_F``.
        checkpoint: name of a file in it.
        device: device that predicts.
        fix: fix of the error.

    Raises:
        UserError: nnU-Net cannot load the model.
    """
    predictor = MaskPredictor(device=device, allow_tqdm=sys.stderr.isatty())
    with foreign_errors_as(lambda error: UserError(
            f"nnU-Net cannot load the model {fold_folder} ({first_line(error)})", fix)):
        predictor.initialize_from_trained_model_folder(
            str(fold_folder.parent), [fold_folder.name.removeprefix("fold_")], checkpoint)
    return predictor


def predict_cases(
    predictor: nnUNetPredictor, images: Sequence[Sequence[Path]], outputs: Sequence[Path], processes: int
) -> None:
    """Predict cases with nnU-Net's function; existing files are overwritten.

    Writes the mask, ``.npz`` (key ``probabilities``) and ``.pkl`` of every case, and JSON files about the run, under
    their final names: a kill may leave one cut short.

    Args:
        predictor: predictor with a loaded model.
        images: for every case the files of its channels.
        outputs: for every case its path without file ending; all in one existing folder.
        processes: number of processes that preprocess, and that export; 1: everything in this process.
    """
    files = [[str(file) for file in channels] for channels in images]
    targets = [str(output) for output in outputs]
    if processes <= 1:
        predictor.predict_from_files_sequential(files, targets, save_probabilities=True, overwrite=True)
        return
    predictor.predict_from_files(
        files, targets, save_probabilities=True, overwrite=True, num_processes_preprocessing=processes,
        num_processes_segmentation_export=processes)
