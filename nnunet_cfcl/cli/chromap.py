"""``nnunet_cfcl predict``: nnU-Net's prediction with CHRO-maps for any model; ``nnunet_cfcl chromap``: maps alone."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, get_args

from nnunet_cfcl.errors import UserError, listed
from nnunet_cfcl.files.atomic import writable_folder
from nnunet_cfcl.nnunet.installation import trainers_path


def add_predict_parser(subparsers: Any) -> None:
    """Add the verb ``predict``."""
    parser = subparsers.add_parser(
        "predict", help="nnU-Net's prediction, with CHRO-maps beside the masks", allow_abbrev=False,
        description="Takes all flags of nnUNetv2_predict (with -m those of nnUNetv2_predict_from_modelfolder) and the "
                    "ones below, for every nnU-Net model. CHRO-maps go to OUT/chromap/.")
    parser.add_argument("--chromap", action="store_true", help="write CHRO-maps too; the flags below imply it")
    _add_drawing(parser)
    parser.set_defaults(run=_run_predict, passes_on=True)


def add_chromap_parser(subparsers: Any) -> None:
    """Add the verb ``chromap``."""
    parser = subparsers.add_parser(
        "chromap", help="write CHRO-maps of images, without masks",
        description="Writes OUT/chromap/CASE.png, for volumes also CASE.nii.gz, for any trained nnU-Net model.")
    parser.add_argument("-i", type=Path, required=True, help="folder of images, named as for nnUNetv2_predict")
    parser.add_argument("-o", type=Path, required=True, help="output folder; maps go to its folder chromap")
    parser.add_argument("-m", type=Path, required=True,
                        help="model folder, nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION")
    parser.add_argument("-f", default=None, help="fold whose features are drawn; default: the first there is")
    parser.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint in the fold's folder")
    parser.add_argument("-step_size", type=_step_size, default=0.5, help="distance of windows relative to the patch")
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"))
    parser.add_argument("--continue_prediction", action="store_true", help="leave cases alone that have a map")
    parser.add_argument("--disable_tta", action="store_true", help="no mirroring, whatever chromap.mirroring says")
    _add_drawing(parser)
    parser.set_defaults(run=_run_chromap)


def _add_drawing(parser: argparse.ArgumentParser) -> None:
    from nnunet_cfcl.chromap.palettes import Palette

    parser.add_argument("--embedding", action="store_true",
                        help="also CASE_embedding.nii.gz, the two plane coordinates")
    parser.add_argument("--palette", choices=get_args(Palette), help="default: the setting chromap.palette")
    parser.add_argument("--space", type=Path, metavar="FILE",
                        help="colour space to use (chromap_space.npz); default: the model's own")


def _step_size(text: str) -> float:
    step = float(text)
    if not 0 < step <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, found {text}")
    return step


def _request(arguments: argparse.Namespace) -> Any:
    from nnunet_cfcl.chromap.nnunet.session import ChromapRequest

    return ChromapRequest(space=arguments.space, embedding=arguments.embedding or None, palette=arguments.palette,
                          strict=True)


def _run_predict(arguments: argparse.Namespace) -> int:
    let_trainers_be_found()
    if "-o" in arguments.others[:-1]:
        writable_folder(arguments.others[arguments.others.index("-o") + 1], "choose another output folder")
    import nnunetv2.inference.predict_from_raw_data as nnunet_prediction

    entry = (nnunet_prediction.predict_entry_point_modelfolder if "-m" in arguments.others
             else nnunet_prediction.predict_entry_point)
    plain, typed = nnunet_prediction.nnUNetPredictor, sys.argv
    sys.argv = ["nnunet_cfcl predict", *arguments.others]
    if arguments.chromap or arguments.embedding or arguments.palette or arguments.space:
        from nnunet_cfcl.chromap.nnunet.predictor import ChromapPredictor

        nnunet_prediction.nnUNetPredictor = type(
            "ChromapPredictor", (ChromapPredictor,), {"chromap_request": _request(arguments)})
    try:
        entry()
    finally:
        nnunet_prediction.nnUNetPredictor, sys.argv = plain, typed
    return 0


def _run_chromap(arguments: argparse.Namespace) -> int:
    let_trainers_be_found()
    fold = _check_model(arguments.m, arguments.f, arguments.chk)
    writable_folder(arguments.o / "chromap", "choose another output folder")
    import torch

    from nnunet_cfcl.chromap.nnunet.predictor import ChromapPredictor
    from nnunet_cfcl.doctor.device import check_device

    check_device(arguments.device).raise_on_failure()
    predictor = ChromapPredictor(
        tile_step_size=arguments.step_size, use_mirroring=not arguments.disable_tta,
        device=torch.device(arguments.device), allow_tqdm=sys.stderr.isatty())
    predictor.chromap_request = _request(arguments)
    predictor.initialize_from_trained_model_folder(str(arguments.m), [fold], arguments.chk)
    if predictor.configuration_manager.previous_stage_name is not None:
        raise UserError("this model is the second stage of a cascade and needs the masks of the first stage",
                        "`nnunet_cfcl predict ... -prev_stage_predictions FOLDER --chromap`")
    ending = predictor.dataset_json["file_ending"]
    if not arguments.i.is_dir() or not list(arguments.i.glob(f"*_0000{ending}")):
        raise UserError(f"{arguments.i} holds no images named CASE_0000{ending}, as this model expects")
    predictor.make_chromaps(str(arguments.i), str(arguments.o), not arguments.continue_prediction)
    return 0


def _check_model(folder: Path, fold: str | None, checkpoint: str) -> str:
    """Check the model folder and return the fold to use."""
    missing = [name for name in ("dataset.json", "plans.json") if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} is no model folder (missing: {listed(missing)}); expected "
                        "nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION")
    trained = sorted(file.parent.name.removeprefix("fold_") for file in folder.glob(f"fold_*/{checkpoint}"))
    if fold is None and trained:
        return trained[0]
    if fold not in trained:
        raise UserError(f"{folder} has no trained fold {fold or ''} with {checkpoint}; found: "
                        f"{listed(trained) or 'none'}")
    return str(fold)


def let_trainers_be_found() -> None:
    """Set nnU-Net's variable for external trainers to the plugin's, unless it is set."""
    os.environ.setdefault("nnUNet_extTrainer", str(trainers_path()))
