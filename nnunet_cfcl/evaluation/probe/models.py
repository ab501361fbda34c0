"""Weights that are probed: of a trained fold, of any checkpoint with ``network_weights``, or of no training at all."""

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
#: Whose network is built where no trainer is named.
TRAINER = "nnUNetTrainerDVDCL"


@dataclass(frozen=True)
class ProbedModel:
    """What is probed.

    Attributes:
        name: in tables.
        file: checkpoint; None: the weights that a training begins with.
    """

    name: str
    file: Path | None


def find_any_trainer(name: str | None) -> Any:
    """The class of any trainer that nnU-Net finds; `TRAINER`'s where none is named.

    Raises:
        UserError: there is none; the nearest name is given.
    """
    found = known_trainer(name or TRAINER)
    if found is None:
        check_trainer(name or TRAINER).raise_on_failure()
        raise UserError(f"{name} cannot be used", "`nnunet_cfcl doctor` looks for the reason")
    return found


def fold_checkpoint(fold_folder: Path, checkpoint: str) -> Path:
    """The checkpoint of a trained fold.

    Raises:
        UserError: it is not there; what is there, and how to train.
    """
    file = fold_folder / checkpoint
    if not file.is_file():
        there = sorted(one.name for one in fold_folder.glob("*.pth"))
        trainer, plans, configuration = fold_folder.parent.name.split("__")
        fix = f"name one of them with -chk ({listed(there)})" if there else (
            f"train it: nnUNetv2_train {fold_folder.parent.parent.name} {configuration} "
            f"{fold_folder.name.removeprefix('fold_')} -tr {trainer} -p {plans}")
        raise UserError(f"there is no {checkpoint} in {fold_folder}, which is written at the end of a training",
                        f"{fix}")
    return file


def named_files(texts: Sequence[str]) -> list[ProbedModel]:
    """Checkpoints as they are typed: ``NAME=FILE``, or ``FILE``, called by as much of the end of its path as tells it
    from the others.

    Raises:
        UserError: a file is not there.
    """
    models = []
    paths = [Path(text) for text in texts]
    for text, path in zip(texts, paths):
        before, equals, after = text.partition("=")
        # a path of its own may have an equals sign
        is_named = bool(before and equals and after) and not path.exists()
        file = Path(after) if is_named else path
        if not file.is_file():
            raise UserError(f"there is no file {file}, expected a checkpoint with {WEIGHTS} (.pth)", "fix --weights")
        models.append(ProbedModel(before if is_named else _short_name(file, paths), file))
    return models


def _short_name(file: Path, others: Sequence[Path]) -> str:
    """The end of a path, without its ending, as long as another file's is the same."""
    parts = file.resolve().with_suffix("").parts
    ends = [one.resolve().with_suffix("").parts for one in others]
    for count in range(1, len(parts)):
        if sum(end[-count:] == parts[-count:] for end in ends) < 2:
            return "/".join(parts[-count:])
    return "/".join(parts)


def check_names(models: Sequence[ProbedModel]) -> None:
    """Refuse two models of one name.

    Raises:
        UserError: says which.
    """
    names = [model.name for model in models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two models are called {twice[0]}, expected a name for each: write --weights NAME=FILE")


def read_weights(file: Path) -> dict[str, Tensor]:
    """The network's weights in a checkpoint, on the CPU.

    Raises:
        UserError: it cannot be read, has no ``network_weights``, or holds what could run code (see `read_plain`).
    """
    content = read_plain(file, "checkpoint of nnU-Net or of a pretraining",
                         "name another, or, if you trust it, save its "
                         f"{{'{WEIGHTS}': ...}} alone with torch.save")
    weights = content.get(WEIGHTS)
    if not isinstance(weights, Mapping) or not all(isinstance(one, Tensor) for one in weights.values()):
        raise UserError(f"{file} has no {WEIGHTS} (found: {listed(content, 5)}), expected a checkpoint of nnU-Net or "
                        "of a pretraining", "name another")
    return dict(weights)


def check_fit(network: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Refuse weights of another architecture; segmentation layers, at which a probe does not look, may be any.

    Args:
        network: that is to have them.
        weights: by key.
        what: where they are from, for messages.

    Raises:
        UserError: which keys and shapes differ.
    """
    own, others = body(network.state_dict()), body(weights)
    faults = [f"{len(keys)} keys {words}: {listed(sorted(keys), 3)}" for keys, words in (
        (own.keys() - others.keys(), "are missing"), (others.keys() - own.keys(), "are not the network's")) if keys]
    faults += [f"{key} has shape {list(others[key].shape)}, expected {list(own[key].shape)}"
               for key in own if key in others and own[key].shape != others[key].shape][:3]
    if faults:
        raise UserError(f"{what} holds weights of another network than the plan's: {'; '.join(faults)}. Name the plan "
                        "and the configuration they were trained with (-p, -c)")


def use_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Load all that a probe looks at: everything but the segmentation layers.

    Args:
        network: whose weights are replaced.
        weights: that passed `check_fit`.

    Returns:
        Digest of what was loaded.
    """
    load_body(network, dict(weights))
    return weights_digest(body(network.state_dict()))


def body(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the segmentation layers."""
    return {key: value for key, value in weights.items() if ".seg_layers." not in key}
