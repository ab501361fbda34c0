"""Pixel-to-propagation consistency: PixPro (Xie et al. 2021, arXiv 2011.10043), a baseline without negatives."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch._dynamo import OptimizedModule

from nnunet_cfcl.config import PretrainSettings
from nnunet_cfcl.losses.embeddings import unit_embeddings
from nnunet_cfcl.pretraining.objective import ImageViews, PretrainingModel, Tap
from nnunet_cfcl.pretraining.pixel_encoder import projection_head, read_points
from nnunet_cfcl.pretraining.render import Row
from nnunet_cfcl.pretraining.statistics import uniformity
from nnunet_cfcl.views import draw_view_points, to_view


class PropagatingEncoder(PretrainingModel):
    """Two branches: a trained one, whose embeddings are propagated, and its teacher, a moving average.

    Args:
        network: returns a feature map (N, F, *patch); may be compiled.
        width: F.
        settings: widths of the head.
        momentum: momentum of the teacher at the start; it rises to 1 by a cosine.
        sharpness: exponent gamma, see `propagate`.
    """

    def __init__(
        self, network: nn.Module, width: int, settings: PretrainSettings, momentum: float, sharpness: float
    ) -> None:
        super().__init__(network)
        self.head = projection_head(width, settings)
        self.transform = nn.Linear(settings.projection_dim, settings.projection_dim)
        self.teacher_network = _copy_of(network)
        self.teacher_head = copy.deepcopy(self.head)
        self._momentum, self._sharpness = momentum, sharpness
        for parameter in self._teacher_parameters():
            parameter.requires_grad_(False)

    def forward(self, images: Tensor, points: tuple[Sequence[Tensor], Tensor]) -> Tensor:
        """Compute embeddings of points, not normalised.

        Args:
            images: (N, C, *patch).
            points: N tensors (P, D) of normalised view coordinates, and the mask (N, P) of the valid points.

        Returns:
            (N P, 2 d), image by image: propagated embeddings of the trained branch beside those of the teacher, which
            carry no gradient.
        """
        coordinates, valid = points
        embeddings = self.head(read_points(self.network(images), coordinates)).unflatten(0, valid.shape)
        with torch.autocast(images.device.type, enabled=False):  # sums over P points leave half precision's range
            full = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            propagated = propagate(full, self.transform(full), valid, self._sharpness)
        with torch.no_grad():
            taught = self.teacher_head(read_points(self.teacher_network(images), coordinates))
        return torch.cat([propagated.flatten(0, 1), taught.to(propagated.dtype)], dim=-1)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Update the teacher: teacher = m teacher + (1 - m) trained, with
        m = 1 - (1 - momentum) (1 + cos(pi progress)) / 2."""
        share = (1 - self._momentum) * (1 + math.cos(math.pi * progress)) / 2
        trained = [*self.network.parameters(), *self.head.parameters()]
        for teacher, student in zip(self._teacher_parameters(), trained, strict=True):
            teacher.lerp_(student, share)

    def _teacher_parameters(self) -> list[nn.Parameter]:
        return [*self.teacher_network.parameters(), *self.teacher_head.parameters()]


def _copy_of(network: nn.Module) -> nn.Module:
    """Copy a network; the copy of a compiled network is compiled too, with the keys of the uncompiled one."""
    if isinstance(network, OptimizedModule):
        copied: nn.Module = copy.deepcopy(network._orig_mod)
        copied.compile()
        return copied
    return copy.deepcopy(network)


def propagate(embeddings: Tensor, transformed: Tensor, valid: Tensor, sharpness: float) -> Tensor:
    """Propagate embeddings (equations 3, 4): y_i = sum_j max(cos(x_i, x_j), 0)^gamma g(x_j), over the valid points j.

    Args:
        embeddings: x, (N, P, d).
        transformed: g(x), (N, P, d).
        valid: (N, P) bool.
        sharpness: gamma, 0 or more.

    Returns:
        (N, P, d). Time and memory grow with N P^2.
    """
    unit = unit_embeddings(embeddings)
    cosine = unit @ unit.mT
    alike = (cosine > 0) & valid[:, None]
    # inner where: the gradient of a power below 1 is infinite at 0
    similarity = torch.where(alike, torch.where(alike, cosine, 1.0).pow(sharpness), 0.0)
    return similarity @ transformed


@dataclass(frozen=True)
class PixProObjective:
    """Agreement of every propagated embedding with the teacher's at nearby points of the image's other views.

    L = -cos(y_i, x'_j) - cos(y_j, x'_i) (equation 5), averaged over the positive pairs (i, j) of two views, then over
    all pairs of views that have any. Positives are points of one image nearer than ``radius``.

    Differences from the paper, whose features form a 7 x 7 map of two views: here the map has the patch's resolution,
    so propagation runs over the P points drawn in a view, not over all pixels; all pairs of V views are used; the head
    has no batch norm, which would mix images. The paper's radius, 0.7 of the diagonal of a map's bin, is 0.14 of a
    view's side, or about 0.1 of the side of the crop that the views are cut from; bins of a full resolution map would
    pair almost no points.

    Args:
        points: P, points per view.
        radius: radius of the positives as a share of the crop's longest side.
        momentum: momentum of the teacher at the start (paper: 0.99).
        sharpness: exponent gamma (paper: 2).
    """

    points: int
    radius: float
    momentum: float
    sharpness: float

    tap: ClassVar[Tap] = "decoder"
    separable: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    labelled_only: ClassVar[bool] = False

    def draw(self, generator: Generator, image: ImageViews) -> dict[str, Tensor]:
        """Draw ``points`` (V, P, D) in canonical millimetres and ``valid`` (V, P); ``reach`` () is the radius in
        millimetres."""
        points, valid = draw_view_points(generator, image.matrices, image.geometry, image.tissue, self.points)
        longest = max(n * h for n, h in zip(image.crop_size, image.geometry.spacing, strict=True))
        return {"points": points, "valid": valid, "reach": torch.tensor(self.radius * longest)}

    def inputs(
        self, batch: Mapping[str, Any], rows: Sequence[Row], device: torch.device
    ) -> tuple[list[Tensor], Tensor]:
        """Compute the places to read, (P, D) per view, and the mask (len(rows), P) of the valid points."""
        drawn, matrices = batch["drawn"], batch["matrices"]
        coordinates = [to_view(drawn["points"][i, view], matrices[i, view]).to(device) for i, view in rows]
        images, views = torch.tensor(rows).unbind(1)
        return coordinates, drawn["valid"][images, views].to(device)

    def build_model(self, network: nn.Module, width: int, settings: PretrainSettings) -> PropagatingEncoder:
        """Build both branches."""
        return PropagatingEncoder(network, width, settings, self.momentum, self.sharpness)

    def loss(
        self, model: PretrainingModel, outputs: Tensor, drawn: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute L in [-2, 2], zero without positives; ``uniformity`` is that of the teacher, to detect collapse."""
        points, valid, reach = drawn["points"], drawn["valid"], drawn["reach"]
        trained, taught = outputs.unflatten(0, valid.shape).chunk(2, dim=-1)
        y, x = unit_embeddings(trained), unit_embeddings(taught.detach())
        losses, used, found = [], [], torch.zeros_like(valid)
        for i, j in itertools.combinations(range(valid.shape[1]), 2):
            near = _pairs_within(reach, points[:, i], points[:, j], valid[:, i], valid[:, j])
            count, positive = near.sum((1, 2)), near.to(x.dtype)
            agreement = (y[:, i] * (positive @ x[:, j])).sum((1, 2)) + (y[:, j] * (positive.mT @ x[:, i])).sum((1, 2))
            losses.append(-agreement / count.clamp(min=1))
            used.append(count > 0)
            found[:, i] |= near.any(2)
            found[:, j] |= near.any(1)
        pairs = torch.stack(used).sum()
        value = torch.stack(losses).sum() / pairs.clamp(min=1)
        return value, {
            "alignment": 2 + float(value.detach()) if pairs else 0.0,  # |a - b|^2 = 2 - 2 cos
            "uniformity": uniformity(x[valid]),
            "positives": float(found.sum() / valid.sum().clamp(min=1)),
        }


def _pairs_within(reach: Tensor, a: Tensor, b: Tensor, valid_a: Tensor, valid_b: Tensor) -> Tensor:
    """Mask (B, P, P) the pairs of valid points (B, P, D) nearer to each other than ``reach`` (B,)."""
    # the default mode loses digits by cancellation
    distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance < reach[:, None, None]) & valid_a[:, :, None] & valid_b[:, None]
