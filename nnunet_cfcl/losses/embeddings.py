"""Preparation shared by the contrastive losses: unit embeddings, valid points, checks of shapes and ranges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_cfcl.losses.blockwise import FLOAT64_BOUND

#: Smallest temperature whose exponentials can be represented.
MIN_TEMPERATURE = 1 / FLOAT64_BOUND


@dataclass(frozen=True)
class Samples:
    """The valid points of a batch, flattened.

    Args:
        unit: (N, d) unit embeddings.
        weights: (N,) weights of the points as anchors and as positives, in [0, 1].
        anchors: (N,) bool mask of the points that may be anchors.
    """

    unit: Tensor
    weights: Tensor
    anchors: Tensor

    def __len__(self) -> int:
        return len(self.unit)


def take_samples(z: Tensor, valid: Tensor | None, weights: Tensor | None, anchors: Tensor | None = None) -> Samples:
    """Select the valid points of embeddings and scale them to unit length.

    Args:
        z: (..., d) embeddings of any length.
        valid: (...) bool; None: all are valid.
        weights: (...) in [0, 1]; None: all 1.
        anchors: (...) bool mask of the points that may be anchors; None: all.

    Raises:
        ValueError: a weight of a valid point lies outside [0, 1].
    """
    axes = z.ndim - 1
    unit = unit_embeddings(take(z, axes, valid))
    weight = unit.new_ones(len(unit)) if weights is None else take(weights, axes, valid).detach().to(unit)
    if weights is not None and not bool(((weight >= 0) & (weight <= 1)).all()):
        raise ValueError(f"weights must lie in [0, 1], got {float(weight.min()):g} to {float(weight.max()):g}")
    anchor = torch.ones_like(weight) if anchors is None else take(anchors, axes, valid).to(unit.device)
    return Samples(unit, weight, anchor.bool())


def take(values: Tensor, axes: int, valid: Tensor | None) -> Tensor:
    """Select the valid points of ``values``, whose first ``axes`` axes index the points, and flatten these axes."""
    return values.flatten(0, axes - 1) if valid is None else values[valid.to(values.device)]


def points_per_image(z: Tensor, valid: Tensor | None) -> list[int]:
    """Count the valid points of each image of embeddings (B, ..., d)."""
    if valid is None:
        return [z[0, ..., 0].numel()] * len(z) if len(z) else []
    counts: list[int] = valid.flatten(1).sum(dim=1).tolist()
    return counts


def unit_embeddings(z: Tensor) -> Tensor:
    """Scale embeddings (..., d) to unit length in float32 (float64 stays); a zero embedding stays zero.

    The norm is computed in float32 because squares overflow in half precision from a length of 256.
    """
    return functional.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=-1)


def labelled(labels: Tensor, valid: Tensor | None) -> Tensor:
    """Mask the valid points whose label is known, that is 0 or above."""
    return labels >= 0 if valid is None else (labels >= 0) & valid.to(labels.device)


def as_number(value: float | Tensor) -> float:
    """Convert a number or a scalar tensor to a float, without its graph."""
    return float(value.detach()) if isinstance(value, Tensor) else value


def check_temperature(temperature: float | Tensor, hard_negatives: float = 0.0) -> None:
    """Raise ValueError unless the temperature, a number or a scalar tensor, lies in [``MIN_TEMPERATURE``, infinity) and
    the largest logit 1 / temperature + hard_negatives can be represented."""
    if isinstance(temperature, Tensor) and temperature.ndim:
        raise ValueError(f"temperature must be a number or a scalar tensor, got shape {tuple(temperature.shape)}")
    value = as_number(temperature)
    if not MIN_TEMPERATURE <= value < float("inf"):
        raise ValueError(f"temperature must be finite and at least {MIN_TEMPERATURE:g}, got {value:g}")
    if not 0 <= hard_negatives <= FLOAT64_BOUND - 1 / value:
        raise ValueError(
            f"hard_negatives must lie in [0, {FLOAT64_BOUND - 1 / value:g}] at temperature {value:g}, "
            f"got {hard_negatives:g}"
        )


def check_embeddings(embeddings: dict[str, Tensor], layout: str) -> None:
    """Raise ValueError unless the embeddings, by name, share a shape of the layout, e.g. "B, P, d", a floating type and
    a device."""
    names, tensors = " and ".join(embeddings), list(embeddings.values())
    first, verb = tensors[0], "must" if len(tensors) == 1 else "must both"
    if first.ndim != layout.count(",") + 1 or any(z.shape != first.shape for z in tensors):
        raise ValueError(f"{names} {verb} be ({layout}), got {_shapes(tensors)}")
    if not first.is_floating_point() or any(z.dtype != first.dtype or z.device != first.device for z in tensors):
        kinds = " and ".join(f"{z.dtype} on {z.device}" for z in tensors)
        raise ValueError(f"{names} must share a floating type and a device, got {kinds}")


def check_per_point(
    shape: Sequence[int], valid: Tensor | None = None, weights: Tensor | None = None, **labels: Tensor
) -> None:
    """Raise ValueError unless valid (bool), weights (floating) and labels (integer) have the shape of the points."""
    expected = tuple(shape)
    if valid is not None and (valid.shape != expected or valid.dtype != torch.bool):
        raise ValueError(f"valid must be bool {expected}, got {valid.dtype} {tuple(valid.shape)}")
    if weights is not None and (weights.shape != expected or not weights.is_floating_point()):
        raise ValueError(f"weights must be floating {expected}, got {weights.dtype} {tuple(weights.shape)}")
    for name, label in labels.items():
        if label.shape != expected or label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
            raise ValueError(f"{name} must be integers {expected}, got {label.dtype} {tuple(label.shape)}")


def check_positions(positions: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless positions are floating with the shape of the points and one more axis of D."""
    if positions.shape[:-1] != tuple(shape) or not positions.is_floating_point() or not positions.shape[-1]:
        expected = ", ".join(str(length) for length in shape)
        raise ValueError(f"positions must be floating ({expected}, D), got {positions.dtype} {tuple(positions.shape)}")


def _shapes(tensors: Sequence[Tensor]) -> str:
    return " and ".join(str(tuple(z.shape)) for z in tensors)
