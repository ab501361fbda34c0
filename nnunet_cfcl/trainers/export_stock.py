"""Export of a trained fold as a stock nnU-Net model, which predicts without this package.

nnU-Net's predictor reads four entries of a checkpoint (``nnUNetPredictor.initialize_from_trained_model_folder``). The
export contains only these, with ``nnUNetTrainer`` as the trainer. Without optimiser, scaler and logs it is about half
as large as the original. It is valid for ``-pretrained_weights``, but ``--c`` cannot continue a training from it.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_cfcl.errors import UserError, first_line
from nnunet_cfcl.files.atomic import replace_atomically
from nnunet_cfcl.files.json_files import read_json
from nnunet_cfcl.nnunet.compatibility import build_network
from nnunet_cfcl.nnunet.lookup import look_up_trainer
from nnunet_cfcl.runs.checkpoint import read_plain
from nnunet_cfcl.trainers import variants

STOCK_TRAINER = "nnUNetTrainer"
FINAL, BEST = "checkpoint_final.pth", "checkpoint_best.pth"
MODEL_FILES = ("dataset.json", "plans.json")
KINDS = {"network_weights": dict, "init_args": dict, "trainer_name": str}


def export_stock(fold_folder: Path, out: Path) -> list[Path]:
    """Write a trained fold as a stock nnU-Net model; further folds can be added to the same ``out``.

    Args:
        fold_folder: ``nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_X`` of a finished training.
        out: model folder to write: ``dataset.json``, ``plans.json``, ``fold_X/checkpoint_final.pth``.

    Returns:
        The written checkpoints.

    Raises:
        UserError: the fold does not exist, its training is not finished, its network is not that of the plan, or
            ``out`` belongs to another model or is the source.
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
        raise UserError(f"cannot write {out} ({error.strerror})", "name another OUT") from error


def _export(file: Path, source: Path) -> dict[str, Any]:
    checkpoint = _load(file)
    exported = stock_checkpoint(checkpoint)
    _check_trainer(str(checkpoint["trainer_name"]))
    _check_network(exported, source, file)
    return exported


def stock_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Reduce a checkpoint to the entries that prediction needs, on the CPU, with nnU-Net's own trainer.

    Raises:
        UserError: the checkpoint is not that of an nnU-Net trainer.
    """
    if missing := [key for key, kind in KINDS.items() if not isinstance(checkpoint.get(key), kind)]:
        raise UserError(f"not a checkpoint of an nnU-Net training: it has no {', '.join(missing)}")
    return {
        "network_weights": _compact(checkpoint["network_weights"]),
        # nnU-Net's trainers also record the device of the training, which does not matter for prediction
        "init_args": {key: value for key, value in checkpoint["init_args"].items() if key != "device"},
        "trainer_name": STOCK_TRAINER,
        "inference_allowed_mirroring_axes": checkpoint.get("inference_allowed_mirroring_axes"),
    }


def _compact(weights: dict[str, Any]) -> dict[str, Any]:
    """Clone weights, since a tensor is saved with its whole storage; shared weights stay shared.

    nnU-Net's decoder holds the encoder too, and its blocks hold every layer twice: a weight has up to four names.
    """
    clones: dict[Any, Any] = {}
    for weight in weights.values():
        if _memory(weight) not in clones:
            clones[_memory(weight)] = weight.detach().cpu().clone()
    return {name: clones[_memory(weight)] for name, weight in weights.items()}


def _memory(tensor: Any) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _load(file: Path) -> dict[str, Any]:
    return read_plain(file, "checkpoint of an nnU-Net training", "name another fold, or train this one again")


def _check_source(fold_folder: Path, out: Path) -> None:
    missing = [name for name in MODEL_FILES if not (fold_folder.parent / name).is_file()]
    if missing or not fold_folder.name.startswith("fold_") or not fold_folder.is_dir():
        found = f" (there is no {' and no '.join(missing)} beside it)" if missing else ""
        raise UserError(f"{fold_folder} is not the folder of a trained fold{found}",
                        "name nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION/fold_X")
    if out == fold_folder.parent or out == fold_folder:
        raise UserError(f"{out} is the model itself, expected a separate folder", "name another OUT")
    if not (fold_folder / FINAL).is_file():
        raise UserError(f"{fold_folder} has no {FINAL}: the training is not finished",
                        "continue it with nnUNetv2_train ... --c")


def _check_target(source: Path, out: Path, fold: str) -> None:
    for name in MODEL_FILES:
        if (out / name).is_file() and _json(out / name) != _json(source / name):
            raise UserError(f"{out} already contains another model: its {name} differs from {source / name}",
                            "name another OUT")
    existing = out / fold / FINAL
    if existing.is_file() and "optimizer_state" in _load(existing):
        raise UserError(f"{existing} comes from a training, not from an export", "name another OUT")


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({first_line(error)})", "copy it from the training's folder") from error


def _configuration(checkpoint: dict[str, Any]) -> str:
    arguments = checkpoint.get("init_args")
    if not isinstance(arguments, dict) or not isinstance(found := arguments.get("configuration"), str):
        raise UserError("not a checkpoint of an nnU-Net training: its init_args have no configuration")
    return found


def _check_configuration(configuration: str, out: Path) -> None:
    # nnU-Net builds the network of the first fold's configuration and loads the weights of all folds into it
    for file in sorted(out.glob(f"fold_*/{FINAL}")):
        found = _configuration(_load(file))
        if found != configuration:
            raise UserError(f"{out} already contains folds of configuration {found}, this one is {configuration}",
                            "name another OUT")


def _check_trainer(name: str) -> None:
    """Check that the trainer builds the stock network; another activation, for example, is not visible in weights."""
    trainer: type[nnUNetTrainer] | None = getattr(variants, name, None) or look_up_trainer(name)
    if trainer is None:
        raise UserError(f"nnU-Net does not find the trainer {name} of this checkpoint, whose network must be compared "
                        "with the stock network", "add its folder to nnUNet_extTrainer")
    if trainer.build_network_architecture is not nnUNetTrainer.build_network_architecture:
        raise UserError(f"{name} builds its own network: nnUNetTrainer cannot predict with its weights")


def _check_network(checkpoint: dict[str, Any], source: Path, file: Path) -> None:
    """Check that the weights fit the network that the stock trainer builds from the plan."""
    manager, description = PlansManager(_json(source / "plans.json")), _json(source / "dataset.json")
    configuration = manager.get_configuration(_configuration(checkpoint))
    network = build_network(
        nnUNetTrainer, manager, configuration, determine_num_input_channels(manager, configuration, description),
        manager.get_label_manager(description).num_segmentation_heads, deep_supervision=False)
    try:
        network.load_state_dict(checkpoint["network_weights"])
    except RuntimeError as error:
        raise UserError(f"{file} does not fit the network that nnUNetTrainer builds from {source / 'plans.json'}, and "
                        "cannot be exported") from error


def _write_model_files(source: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in (*MODEL_FILES, "dataset_fingerprint.json"):
        if (source / name).is_file():
            replace_atomically(out / name, partial(shutil.copyfile, source / name))


def _save(checkpoint: dict[str, Any], file: Path) -> Path:
    file.parent.mkdir(exist_ok=True)
    replace_atomically(file, lambda temporary: torch.save(checkpoint, temporary))
    return file
