"""CHRO-maps of validation cases of a trained fold, from the raw images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.fold_files import FINAL, FoldPlace, raw_folder
from nnunet_cfcl.nnunet.installation import trainers_path


def write_validation_chromaps(place: FoldPlace, cases: Sequence[str], out: Path, device: str) -> dict[str, Path]:
    """Compute the maps that are missing or older than the model.

    Args:
        place: location of the fold.
        cases: cases to map.
        out: folder of the maps, which are written to its subfolder ``chromap``.
        device: device of PyTorch.

    Returns:
        Case -> picture.

    Raises:
        UserError: model or images are missing, or a map cannot be computed.
    """
    import torch

    from nnunet_cfcl.chromap.nnunet.predictor import ChromapPredictor
    from nnunet_cfcl.chromap.nnunet.session import ChromapRequest
    from nnunet_cfcl.chromap.nnunet.writer import FOLDER

    checkpoint = place.folder / FINAL
    if not checkpoint.is_file():
        raise UserError(f"there is no {FINAL}, expected the checkpoint of a finished training",
                        "continue with nnUNetv2_train ... --c")
    pictures = {case: out / FOLDER / f"{case}.png" for case in cases}
    for picture in pictures.values():
        if picture.is_file() and picture.stat().st_mtime < checkpoint.stat().st_mtime:
            picture.unlink()
    if all(picture.is_file() for picture in pictures.values()):
        return pictures
    # finds the plugin's trainers where the user has not set the variable
    os.environ.setdefault("nnUNet_extTrainer", str(trainers_path()))
    predictor = ChromapPredictor(device=torch.device(device), allow_tqdm=False)
    predictor.chromap_request = ChromapRequest(strict=True)
    with redirect_stdout(StringIO()):
        predictor.initialize_from_trained_model_folder(str(place.folder.parent), [place.fold], FINAL)
        files = _channel_files(place, cases, predictor.dataset_json)
        predictor.make_chromaps(files, str(out), overwrite=False)
    return {case: picture for case, picture in pictures.items() if picture.is_file()}


def _channel_files(place: FoldPlace, cases: Sequence[str], description: dict[str, object]) -> list[list[str]]:
    """List the image files of each case, one per channel."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    raw = raw_folder(place.dataset)
    if raw is None:
        raise UserError(f"there is no raw dataset {place.dataset} in nnUNet_raw, expected the images of the fold",
                        "set nnUNet_raw as for the training")
    known = get_filenames_of_train_images_and_targets(str(raw), description)
    if missing := [case for case in cases if case not in known]:
        raise UserError(f"the raw dataset {place.dataset} has no images of {missing[0]}")
    return [list(known[case]["images"]) for case in cases]
