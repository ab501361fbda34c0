"""Every objective beside its definition as a double loop over anchors and candidates, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nnunet_cfcl import losses

Place = tuple[int, int, int]


def double_loop(
    anchors: Mapping[Place, Tensor],
    candidates: Mapping[Place, Tensor],
    positive: Callable[[Place, Place], bool],
    counts: Callable[[Place, Place], bool],
    temperature: float | Tensor,
    anchor_weight: Callable[[Place], float],
    positive_weight: Callable[[Place], float],
    beta: float = 0.0,
) -> Tensor:
    """The "outside" form as a double loop: one anchor, one candidate, one cosine at a time."""
    total, anchors_weigh = torch.zeros((), dtype=torch.float64, requires_grad=True), 0.0
    for here, u in anchors.items():
        attraction, mass = 0.0, 0.0
        positives, negatives = [], []
        for there, v in candidates.items():
            if not counts(here, there):
                continue
            cosine = u.dot(v) / (u.dot(u) * v.dot(v)).sqrt()
            (positives if positive(here, there) else negatives).append(cosine)
            if positive(here, there):
                attraction = attraction + positive_weight(there) * cosine / temperature
                mass += positive_weight(there)
        if mass == 0 or anchor_weight(here) == 0:
            continue
        denominator = sum(torch.exp(c / temperature) for c in positives)
        if negatives:
            importance = [torch.exp(beta * c) for c in negatives]
            weighted = sum(w * torch.exp(c / temperature) for w, c in zip(importance, negatives))
            denominator = denominator + len(negatives) * weighted / sum(importance)
        total = total + anchor_weight(here) * (torch.log(denominator) - attraction / mass)
        anchors_weigh += anchor_weight(here)
    return total / anchors_weigh if anchors_weigh else total


@dataclass(frozen=True)
class Problem:
    """Inputs of all objectives: B images, V views, P points; labels -1 are unknown, 0 is background."""

    z: Tensor
    labels: Tensor
    positions: Tensor
    valid: Tensor | None = None
    weights: Tensor | None = None

    @classmethod
    def draw(
        cls, seed: int = 0, batch: int = 3, views: int = 2, points: int = 4, d: int = 4, masked: bool = True,
        weighted: bool = True,
    ) -> Problem:
        g = torch.Generator().manual_seed(seed)
        shape = (batch, views, points)
        z = torch.randn(*shape, d, generator=g, dtype=torch.float64).requires_grad_()
        labels = torch.randint(-1, 3, shape, generator=g)
        positions = torch.rand(*shape, 2, generator=g, dtype=torch.float64)
        valid = torch.rand(shape, generator=g) < 0.8 if masked else None
        weights = torch.randint(0, 4, shape, generator=g).double() / 3 if weighted else None
        return cls(z, labels, positions, valid, weights)

    def places(self, view: int | None, labelled: bool = False) -> list[Place]:
        """Valid places (image, view, point); of pairs of views, the mask of view 0 is that of both."""
        shape = self.z.shape[:3]
        every = [(i, v, p) for i in range(shape[0]) for v in range(shape[1]) for p in range(shape[2])]
        return [
            place for place in every
            if (view is None or place[1] == view)
            and (self.valid is None or self.valid[self.masked_by(place, view)])
            and not (labelled and self.labels[place] < 0)
        ]

    @staticmethod
    def masked_by(place: Place, view: int | None) -> Place:
        return place if view is None else (place[0], 0, place[2])

    def weight(self, view: int | None) -> Callable[[Place], float]:
        return lambda place: 1.0 if self.weights is None else float(self.weights[self.masked_by(place, view)])


def _dvd(p: Problem, temperature: Any = 0.7, hard_negatives: float = 0.0, ignore_radius: float = 0.0) -> Tensor:
    def counts(here: Place, there: Place) -> bool:
        distance = (p.positions[here[0], 0, here[2]] - p.positions[there[0], 0, there[2]]).norm()
        other_point = here[0] == there[0] and here[2] != there[2]
        return not (other_point and distance < ignore_radius)

    def one(a: int, b: int) -> Tensor:
        return double_loop(
            {i: p.z[i] for i in p.places(a)}, {i: p.z[i] for i in p.places(b)},
            lambda here, there: here[0] == there[0] and here[2] == there[2], counts, temperature,
            p.weight(0), p.weight(0), hard_negatives)

    return one(0, 1) + one(1, 0)


def _mvd(p: Problem, temperature: Any = 0.7, hard_negatives: float = 0.0, radius: float = 0.4) -> Tensor:
    z = {i: p.z[i] for i in p.places(None)}
    return double_loop(
        z, z,
        lambda here, there: here[0] == there[0] and bool((p.positions[here] - p.positions[there]).norm() < radius),
        lambda here, there: here != there, temperature, p.weight(None), p.weight(None), hard_negatives)


def _s_dvd(p: Problem, temperature: Any = 0.7, hard_negatives: float = 0.0, background: int = 0) -> Tensor:
    def one(a: int, b: int) -> Tensor:
        return double_loop(
            {i: p.z[i] for i in p.places(a, True) if p.labels[i] != background},
            {i: p.z[i] for i in p.places(b, True)},
            lambda here, there: bool(p.labels[here] == p.labels[there]), lambda here, there: True, temperature,
            p.weight(0), p.weight(0), hard_negatives)

    return one(0, 1) + one(1, 0)


def _s_mvd(p: Problem, temperature: Any = 0.7, hard_negatives: float = 0.0, background: int = 0) -> Tensor:
    z = {i: p.z[i] for i in p.places(None, True)}
    return double_loop(
        {i: v for i, v in z.items() if p.labels[i] != background}, z,
        lambda here, there: bool(p.labels[here] == p.labels[there]), lambda here, there: here != there, temperature,
        p.weight(None), p.weight(None), hard_negatives)


def _nt_xent(p: Problem, temperature: Any = 0.7) -> Tensor:
    z = {(i, v, n): p.z[i, v, n] for i, v, n in p.places(None) if n == 0}
    return double_loop(
        z, z, lambda here, there: here[0] == there[0], lambda here, there: here != there, temperature,
        lambda here: 1.0, lambda there: 1.0)


def _first_view(p: Problem) -> dict[str, Tensor | None]:
    return {name: None if t is None else t[:, 0] for name, t in (("valid", p.valid), ("weights", p.weights))}


@dataclass(frozen=True)
class Objective:
    """One objective on a problem: the loss (or, counted, with its count) and the definition."""

    name: str
    compute: Callable[..., losses.CountedLoss]
    oracle: Callable[..., Tensor]

    def loss(self, problem: Problem, **options: Any) -> Tensor:
        return self.compute(problem, **options).loss


OBJECTIVES = {
    "dvd": Objective(
        "dvd",
        lambda p, **o: losses.dvd_cl_loss(
            p.z[:, 0], p.z[:, 1], **_first_view(p), positions=p.positions[:, 0], **o),
        _dvd,
    ),
    "mvd": Objective(
        "mvd",
        lambda p, radius=0.4, **o: losses.mvd_cl_loss(
            p.z, p.positions, radius=radius, valid=p.valid, weights=p.weights, **o),
        _mvd,
    ),
    "s_dvd": Objective(
        "s_dvd",
        lambda p, **o: losses.s_dvd_cl_loss(
            p.z[:, 0], p.z[:, 1], p.labels[:, 0], p.labels[:, 1], **_first_view(p), **o),
        _s_dvd,
    ),
    "s_mvd": Objective(
        "s_mvd",
        lambda p, **o: losses.s_mvd_cl_loss(p.z, p.labels, valid=p.valid, weights=p.weights, **o),
        _s_mvd,
    ),
    "nt_xent": Objective(
        "nt_xent",
        lambda p, temperature=0.7: losses.nt_xent_loss(
            p.z[:, :, 0], temperature, None if p.valid is None else p.valid[:, :, 0]),
        _nt_xent,
    ),
}


@pytest.fixture(params=OBJECTIVES.values(), ids=list(OBJECTIVES))
def objective(request) -> Objective:
    """Each objective in turn."""
    return request.param


@pytest.fixture(params=[name for name in OBJECTIVES if name != "nt_xent"])
def point_objective(request) -> Objective:
    """Each objective on points in turn."""
    return OBJECTIVES[request.param]


@pytest.fixture
def objectives() -> dict[str, Objective]:
    """All by name."""
    return OBJECTIVES


@pytest.fixture
def draw_problem() -> Callable[..., Problem]:
    """Factory of random problems."""
    return Problem.draw


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """Check values and gradients with respect to inputs; unused inputs have the gradient zero."""

    def check(ours: Tensor, oracle: Tensor, *inputs: Tensor, atol: float = 1e-9) -> None:
        torch.testing.assert_close(ours, oracle, rtol=0, atol=atol)
        got, wanted = (torch.autograd.grad(value, inputs, materialize_grads=True) for value in (ours, oracle))
        torch.testing.assert_close(got, wanted, rtol=0, atol=atol)

    return check
