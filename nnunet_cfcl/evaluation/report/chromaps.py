"""CHRO-maps of some validation cases of a trained fold, from its raw images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.fold_files import FINAL, FoldPlace, raw_folder
from nnunet_cfcl.nnunet.installation import trainers_path


def make_validation_chromaps(place: FoldPlace, cases: Sequence[str], out: Path, device: str) -> dict[str, Path]:
    """Draw the maps that are not there yet, or are older than the model.

    Args:
        place: of the fold.
        cases: to be drawn.
        out: maps go to its folder ``chromap``.
        device: of PyTorch.

    Returns:
        Case -> its picture.

    Raises:
        UserError: model or images are missing, or a map cannot be made.
    """
    import torch

    from nnunet_cfcl.chromap.nnunet.predictor import ChromapPredictor
    from nnunet_cfcl.chromap.nnunet.session import ChromapRequest
    from nnunet_cfcl.chromap.nnunet.writer import FOLDER

    checkpoint = place.folder / FINAL
    if not checkpoint.is_file():
        raise UserError(f"there is no {FINAL}, which is written at the end of the training")
    pictures = {case: out / FOLDER / f"{case}.png" for case in cases}
    for picture in pictures.values():
        if picture.is_file() and picture.stat().st_mtime < checkpoint.stat().st_mtime:
            picture.unlink()
    if all(picture.is_file() for picture in pictures.values()):
        return pictures
    # the plugin's own trainers, without the variable set by hand
    os.environ.setdefault("nnUNet_extTrainer", str(trainers_path()))
    predictor = ChromapPredictor(device=torch.device(device), allow_tqdm=False)
    predictor.chromap_request = ChromapRequest(strict=True)
    with redirect_stdout(StringIO()):
        predictor.initialize_from_trained_model_folder(str(place.folder.parent), [place.fold], FINAL)
        files = _files_of(place, cases, predictor.dataset_json)
        predictor.make_chromaps(files, str(out), overwrite=False)
    return {case: picture for case, picture in pictures.items() if picture.is_file()}


def _files_of(place: FoldPlace, cases: Sequence[str], description: dict[str, object]) -> list[list[str]]:
    """The files of every channel."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    raw = raw_folder(place.dataset)
    if raw is None:
        raise UserError(f"the raw dataset {place.dataset} is not where nnUNet_raw says")
    known = get_filenames_of_train_images_and_targets(str(raw), description)
    if missing := [case for case in cases if case not in known]:
        raise UserError(f"the raw dataset has no images of {missing[0]}")
    return [list(known[case]["images"]) for case in cases]
