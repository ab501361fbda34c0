"""What another phase needs of a live trainer: its network, optimiser, batches, loss and validation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from nnunet_cfcl.nnunet.decoder_tap import plain_network


@dataclass(frozen=True)
class LiveTraining:
    """A trainer between nnU-Net's last epoch and its end, when its data loaders still run.

    Attributes:
        network: without DistributedDataParallel, compiled where the trainer compiles.
        plain: the same network without wrappers.
        batches: nnU-Net's augmented training batches of this rank, without end.
        loss: nnU-Net's loss of outputs and target, both lists under deep supervision.
        output_weights: weights of the outputs under deep supervision, from full to lowest resolution; (1,) without.
        optimizer: builds a new optimiser of the trainer's kind, with its initial learning rates.
        pseudo_dice: mean Dice of a network on nnU-Net's validation batches of this rank.
        epochs_before: epochs before nnU-Net's training, those of a pretraining.
        epochs, iterations: length of nnU-Net's training.
        batch_size: labelled images in a step, over all ranks.
    """

    network: nn.Module
    plain: nn.Module
    batches: Iterator[Mapping[str, Any]]
    loss: Callable[[Any, Any], Tensor]
    output_weights: Sequence[float]
    optimizer: Callable[[], Optimizer]
    pseudo_dice: Callable[[nn.Module], float]
    epochs_before: int
    epochs: int
    iterations: int
    batch_size: int

    @classmethod
    def of(cls, trainer: nnUNetTrainer) -> LiveTraining:
        """The training of a trainer whose data loaders exist."""
        network = trainer.network
        weights = getattr(trainer.loss, "weight_factors", None) if trainer.enable_deep_supervision else None
        return cls(
            network=network.module if isinstance(network, DistributedDataParallel) else network,
            plain=plain_network(network), batches=iter(partial(next, trainer.dataloader_train), None),
            loss=trainer.loss, output_weights=(1.0,) if weights is None else tuple(float(one) for one in weights),
            optimizer=partial(_new_optimizer, trainer), pseudo_dice=partial(_pseudo_dice, trainer),
            epochs_before=trainer.epochs_before, epochs=trainer.num_epochs, iterations=trainer.num_iterations_per_epoch,
            batch_size=trainer.configuration_manager.batch_size)


def _new_optimizer(trainer: nnUNetTrainer) -> Optimizer:
    """Build an optimiser of the trainer's kind with the trainer's initial rate and without momentum of its training."""
    # nnU-Net's trainers with warm-up return the present optimiser, in the stage that they are in
    trainer.training_stage = None
    optimizer: Optimizer = trainer.configure_optimizers()[0]
    for group in optimizer.param_groups:
        group["lr"] = trainer.initial_lr
    return optimizer


@torch.no_grad()
def _pseudo_dice(trainer: nnUNetTrainer, network: nn.Module) -> float:
    """Mean over the classes of the Dice of all validation batches together, as in nnU-Net's own log."""
    own = trainer.network, trainer.loss
    # the loss is not needed, and communicates between ranks
    trainer.network, trainer.loss = network.eval(), lambda *_: torch.zeros(())
    try:
        outputs = [trainer.validation_step(next(trainer.dataloader_val))
                   for _ in range(trainer.num_val_iterations_per_epoch)]
    finally:
        trainer.network, trainer.loss = own
    hits, false, missed = (np.sum([one[key] for one in outputs], axis=0) for key in ("tp_hard", "fp_hard", "fn_hard"))
    present = 2 * hits + false + missed > 0
    return float(np.mean(2 * hits[present] / (2 * hits + false + missed)[present])) if present.any() else float("nan")
