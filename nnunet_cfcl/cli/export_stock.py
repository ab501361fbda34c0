"""``nnunet_cfcl export-stock``: a model folder that predicts anywhere, with stock nnU-Net and without this package.

nnU-Net's predictor reads four entries of a checkpoint (``nnUNetPredictor.initialize_from_trained_model_folder``); only
these are kept, and the trainer is named ``nnUNetTrainer``. Optimiser, scaler and logs stay behind: the export is about
half as large as the original, cannot be trained on with ``--c``, and can be given to ``-pretrained_weights``.
"""

from __future__ import annotations

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_cfcl.errors import UserError, first_line
from nnunet_cfcl.files.atomic import replace_atomically
from nnunet_cfcl.files.json_files import read_json
from nnunet_cfcl.nnunet.lookup import look_up_trainer

STOCK_TRAINER = "nnUNetTrainer"
FINAL, BEST = "checkpoint_final.pth", "checkpoint_best.pth"
MODEL_FILES = ("dataset.json", "plans.json")
KINDS = {"network_weights": dict, "init_args": dict, "trainer_name": str}


def export_stock(fold_folder: Path, out: Path) -> list[Path]:
    """Writes one trained fold as a stock nnU-Net model; further folds may follow into the same ``out``.

    Args:
        fold_folder: ``nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_X`` of a finished training.
        out: the model folder to write: ``dataset.json``, ``plans.json``, ``fold_X/checkpoint_final.pth``.

    Returns:
        The checkpoints written.

    Raises:
        UserError: no such fold, training unfinished, another network than the plan's, ``out`` belongs to another model
            or is the source.
    """
    fold_folder, out = Path(fold_folder).resolve(), Path(out).resolve()
    source = fold_folder.parent
    _check_source(fold_folder, out)
    _check_target(source, out, fold_folder.name)
    exports = {file.name: _export(file, source) for file in (fold_folder / FINAL, fold_folder / BEST) if file.is_file()}
    _check_configuration(_configuration(exports[FINAL]), out)
    try:
        _write_model_files(source, out)
        return [_save(checkpoint, out / fold_folder.name / name) for name, checkpoint in exports.items()]
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror})") from error


def _export(file: Path, source: Path) -> dict[str, Any]:
    checkpoint = _load(file)
    exported = stock_checkpoint(checkpoint)
    _check_trainer(str(checkpoint["trainer_name"]))
    _check_network(exported, source, file)
    return exported


def stock_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The entries of a trainer's checkpoint that prediction needs, on the CPU, in the name of nnU-Net's own trainer.

    Raises:
        UserError: it is not a checkpoint of an nnU-Net trainer.
    """
    if missing := [key for key, kind in KINDS.items() if not isinstance(checkpoint.get(key), kind)]:
        raise UserError(f"not a checkpoint of an nnU-Net training: it has no {', '.join(missing)}")
    return {
        "network_weights": _compact(checkpoint["network_weights"]),
        # nnU-Net's trainers also note their device, which says nothing to whoever predicts
        "init_args": {key: value for key, value in checkpoint["init_args"].items() if key != "device"},
        "trainer_name": STOCK_TRAINER,
        "inference_allowed_mirroring_axes": checkpoint.get("inference_allowed_mirroring_axes"),
    }


def _compact(weights: dict[str, Any]) -> dict[str, Any]:
    """Clones, since a tensor is saved with all of its storage; what shares memory goes on sharing it.

    nnU-Net's decoder holds the encoder too, and its blocks every layer twice: each weight has up to four names.
    """
    clones: dict[Any, Any] = {}
    for weight in weights.values():
        if _memory(weight) not in clones:
            clones[_memory(weight)] = weight.detach().cpu().clone()
    return {name: clones[_memory(weight)] for name, weight in weights.items()}


def _memory(tensor: Any) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _load(file: Path) -> dict[str, Any]:
    # imports PyTorch, for which --help should not wait
    from nnunet_cfcl.runs.checkpoint import read_plain

    return read_plain(file, "checkpoint of an nnU-Net training", "name another, or train the fold anew")


def _check_source(fold_folder: Path, out: Path) -> None:
    missing = [name for name in MODEL_FILES if not (fold_folder.parent / name).is_file()]
    if missing or not fold_folder.name.startswith("fold_") or not fold_folder.is_dir():
        raise UserError(f"{fold_folder} is not the folder of a trained fold (nnUNet_results/DATASET/TRAINER__PLANS__"
                        f"CONFIGURATION/fold_X{', missing beside it: ' + ', '.join(missing) if missing else ''})")
    if out == fold_folder.parent or out == fold_folder:
        raise UserError(f"{out} is the model itself", "choose another folder to export to")
    if not (fold_folder / FINAL).is_file():
        raise UserError(f"{fold_folder} has no {FINAL}: the training is not finished",
                        "nnUNetv2_train with --c goes on")


def _check_target(source: Path, out: Path, fold: str) -> None:
    for name in MODEL_FILES:
        if (out / name).is_file() and _json(out / name) != _json(source / name):
            raise UserError(f"{out} already holds another model: its {name} differs from {source / name}")
    existing = out / fold / FINAL
    if existing.is_file() and "optimizer_state" in _load(existing):
        raise UserError(f"{existing} comes from a training, not from an export", "choose another folder to export to")


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)})", "copy it from the training's folder") from error


def _configuration(checkpoint: dict[str, Any]) -> str:
    arguments = checkpoint.get("init_args")
    if not isinstance(arguments, dict) or not isinstance(found := arguments.get("configuration"), str):
        raise UserError("not a checkpoint of an nnU-Net training: it does not say of which configuration")
    return found


def _check_configuration(configuration: str, out: Path) -> None:
    # nnU-Net takes the configuration from the first fold and would load the others' weights into its network
    for file in sorted(out.glob(f"fold_*/{FINAL}")):
        found = _configuration(_load(file))
        if found != configuration:
            raise UserError(f"{out} already holds folds of configuration {found}, this one is {configuration}")


def _check_trainer(name: str) -> None:
    """The trainer must build the stock network: another activation, say, would not show in the weights."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    import nnunet_cfcl.trainers

    trainer: Any = getattr(nnunet_cfcl.trainers, name, None) or look_up_trainer(name)
    if trainer is None:
        raise UserError(f"nnU-Net does not find the trainer {name} of this checkpoint, so that its network cannot be "
                        "compared with the stock one", "add its folder to nnUNet_extTrainer")
    if trainer.build_network_architecture is not nnUNetTrainer.build_network_architecture:
        raise UserError(f"{name} builds its own network: nnUNetTrainer cannot predict with its weights")


def _check_network(checkpoint: dict[str, Any], source: Path, file: Path) -> None:
    """The weights must fit the network that the stock trainer builds from the plan."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunet_cfcl.nnunet.versions import build_network

    manager, description = PlansManager(_json(source / "plans.json")), _json(source / "dataset.json")
    configuration = manager.get_configuration(_configuration(checkpoint))
    network = build_network(
        nnUNetTrainer, manager, configuration, determine_num_input_channels(manager, configuration, description),
        manager.get_label_manager(description).num_segmentation_heads, deep_supervision=False)
    try:
        network.load_state_dict(checkpoint["network_weights"])
    except RuntimeError as error:
        raise UserError(f"{file} holds another network than nnUNetTrainer builds from {source / 'plans.json'}: it "
                        "cannot be exported") from error


def _write_model_files(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in (*MODEL_FILES, "dataset_fingerprint.json"):
        if (source / name).is_file():
            replace_atomically(out / name, partial(shutil.copyfile, source / name))


def _save(checkpoint: dict[str, Any], file: Path) -> Path:
    import torch

    file.parent.mkdir(exist_ok=True)
    replace_atomically(file, lambda temporary: torch.save(checkpoint, temporary))
    return file


def add_export_stock_parser(subparsers: Any) -> None:
    """Adds ``export-stock``."""
    parser = subparsers.add_parser(
        "export-stock", help="write a trained fold as a stock nnU-Net model",
        description="Writes a model folder whose checkpoint names nnUNetTrainer, so that prediction anywhere needs no "
                    "plugin. Only what prediction needs is kept: it cannot be trained on with --c. Repeat it with the "
                    "other folds and the same OUT for an ensemble.")
    parser.add_argument("fold_folder", type=Path, metavar="FOLD_FOLDER",
                        help="nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_X")
    parser.add_argument("out", type=Path, metavar="OUT", help="model folder to write")
    parser.set_defaults(run=_run_export_stock)


def _run_export_stock(arguments: argparse.Namespace) -> int:
    for file in export_stock(arguments.fold_folder, arguments.out):
        print(f"written: {file} ({file.stat().st_size / 2**20:.1f} MiB)")
    print(f"predict with: nnUNetv2_predict_from_modelfolder -i IN -o OUT -m {arguments.out} "
          f"-f {arguments.fold_folder.resolve().name.removeprefix('fold_')}")
    return 0
