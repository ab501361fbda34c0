"""Weights to probe: of a trained fold, of any checkpoint with ``network_weights``, or untrained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nnunet_cfcl.chromap.nnunet.spaces import weights_digest
from nnunet_cfcl.errors import UserError, listed
from nnunet_cfcl.runs.checkpoint import load_body, read_plain
from nnunet_cfcl.trainers.lookup import check_trainer, known_trainer

UNTRAINED, WEIGHTS = "untrained", "network_weights"
#: Trainer whose network is built by default.
TRAINER = "nnUNetTrainerDVDCL"


@dataclass(frozen=True)
class ProbedModel:
    """Model to probe.

    Attributes:
        name: name in tables.
        file: checkpoint; None: the initial weights of a training.
    """

    name: str
    file: Path | None


def find_any_trainer(name: str | None) -> Any:
    """Look up the class of any trainer that nnU-Net finds; `TRAINER` where no name is given.

    Raises:
        UserError: there is no such trainer; the message suggests the nearest name.
    """
    found = known_trainer(name or TRAINER)
    if found is None:
        check_trainer(name or TRAINER).raise_on_failure()
        raise UserError(f"the trainer {name} cannot be used", "run nnunet_cfcl doctor, which finds the reason")
    return found


def fold_checkpoint(fold_folder: Path, checkpoint: str) -> Path:
    """Locate a checkpoint of a trained fold.

    Raises:
        UserError: it does not exist; the message lists the checkpoints of the fold, or the command that trains it.
    """
    file = fold_folder / checkpoint
    if not file.is_file():
        found = sorted(one.name for one in fold_folder.glob("*.pth"))
        trainer, plans, configuration = fold_folder.parent.name.split("__")
        fix = f"name one of {listed(found)} with -chk" if found else (
            f"run nnUNetv2_train {fold_folder.parent.parent.name} {configuration} "
            f"{fold_folder.name.removeprefix('fold_')} -tr {trainer} -p {plans}")
        raise UserError(f"there is no {checkpoint} in {fold_folder}, expected the checkpoint of a training", fix)
    return file


def named_files(texts: Sequence[str]) -> list[ProbedModel]:
    """Parse the arguments of ``--weights``: ``NAME=FILE``, or ``FILE``, named by the shortest unique end of its path.

    Raises:
        UserError: a file does not exist.
    """
    models = []
    paths = [Path(text) for text in texts]
    for text, path in zip(texts, paths):
        before, equals, after = text.partition("=")
        # a path may contain an equals sign itself
        is_named = bool(before and equals and after) and not path.exists()
        file = Path(after) if is_named else path
        if not file.is_file():
            raise UserError(f"there is no file {file}, expected a checkpoint with {WEIGHTS} (.pth)",
                            "correct the path after --weights")
        models.append(ProbedModel(before if is_named else _short_name(file, paths), file))
    return models


def _short_name(file: Path, others: Sequence[Path]) -> str:
    """Shorten a path without its suffix to the fewest last parts that no other file shares."""
    parts = file.resolve().with_suffix("").parts
    ends = [one.resolve().with_suffix("").parts for one in others]
    for count in range(1, len(parts)):
        if sum(end[-count:] == parts[-count:] for end in ends) < 2:
            return "/".join(parts[-count:])
    return "/".join(parts)


def check_names(models: Sequence[ProbedModel]) -> None:
    """Check that the names of the models are unique.

    Raises:
        UserError: two models have the same name.
    """
    names = [model.name for model in models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two models are named {twice[0]}, expected unique names", "write --weights NAME=FILE")


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read the network's weights from a checkpoint, onto the CPU.

    Raises:
        UserError: the file cannot be read, has no ``network_weights``, or contains objects that could run code (see
            `read_plain`).
    """
    content = read_plain(file, "checkpoint of nnU-Net or of a pretraining",
                         f"name another file or, if you trust this one, save {{'{WEIGHTS}': ...}} alone with "
                         "torch.save")
    weights = content.get(WEIGHTS)
    if not isinstance(weights, Mapping) or not all(isinstance(one, Tensor) for one in weights.values()):
        raise UserError(f"{file} has no {WEIGHTS} (found: {listed(content, 5)}), expected a checkpoint of nnU-Net or "
                        "of a pretraining", "name another file")
    return dict(weights)


def check_fit(network: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Check that weights fit a network; segmentation layers, which a probe does not use, may differ.

    Args:
        network: network to load the weights into.
        weights: weights by key.
        what: origin of the weights, for messages.

    Raises:
        UserError: keys or shapes differ; the message lists them.
    """
    own, others = body(network.state_dict()), body(weights)
    faults = [f"{len(keys)} keys {words}: {listed(sorted(keys), 3)}" for keys, words in (
        (own.keys() - others.keys(), "are missing"), (others.keys() - own.keys(), "are not the network's")) if keys]
    faults += [f"{key} has shape {list(others[key].shape)}, expected {list(own[key].shape)}"
               for key in own if key in others and own[key].shape != others[key].shape][:3]
    if faults:
        raise UserError(f"{what} does not fit the network of the plan: {', '.join(faults)}",
                        "name the plan and the configuration of its training with -p and -c")


def use_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Load all weights except the segmentation layers.

    Args:
        network: network whose weights are replaced.
        weights: weights that passed `check_fit`.

    Returns:
        Digest of the loaded weights.
    """
    load_body(network, dict(weights))
    return weights_digest(body(network.state_dict()))


def body(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop the segmentation layers."""
    return {key: value for key, value in weights.items() if ".seg_layers." not in key}
