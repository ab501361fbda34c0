r"""From a pair rule to a loss: the "outside" form of supervised contrastive learning over blockwise denominators.

Khosla et al. 2020, "Supervised Contrastive Learning", arXiv 2004.11362, equation 2, with weights. With unit embeddings,
:math:`s_{ac} = \hat z_a \cdot \hat z_c / \tau`, P(a) the positives and C(a) all candidates of the anchor a,

.. math:: \ell_a = \log \sum_{c \in C(a)} e^{s_{ac}}
                   - \frac{\sum_{p \in P(a)} w_p s_{ap}}{\sum_{p \in P(a)} w_p}, \qquad
          L = \frac{\sum_a w_a \ell_a}{\sum_a w_a}

over the anchors whose positives have a total weight above 0. The numerator is the anchor times the mean of its
positives, which a rule computes without a matrix of all pairs.

Hard negatives: Robinson et al. 2021, "Contrastive Learning with Hard Negative Samples", arXiv 2010.04592, without its
correction for false negatives. With :math:`\kappa_{an} = \hat z_a \cdot \hat z_n`, each of the negatives N(a) is
weighted by :math:`e^{\beta \kappa_{an}}`, scaled to a mean weight of one:

.. math:: \log \Big( \sum_{p \in P(a)} e^{s_{ap}}
          + |N(a)| \, \frac{\sum_n e^{s_{an} + \beta \kappa_{an}}}{\sum_n e^{\beta \kappa_{an}}} \Big)

replaces the log denominator; the two are equal at beta 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from nnunet_cfcl.losses.blockwise import Exclude, pool_log_sum_exp, two_way_log_sum_exp
from nnunet_cfcl.losses.embeddings import Samples, as_number
from nnunet_cfcl.losses.pair_rules import PairRule

# Replaces log 0 where an infinity would make a later gradient NaN; its exp is 0.
_LOG_NOTHING = -1e4

#: Log-sums of logits that are ``scale`` times the cosine, per direction, without excluded pairs.
_Kernel: TypeAlias = Callable[["float | Tensor", "Exclude | None"], tuple[Tensor, ...]]


class CountedLoss(NamedTuple):
    """A loss with the statistics of its anchors; a loss of two directions adds those of both.

    Args:
        loss: scalar to minimise, with a graph; the mean over the anchors that have a positive.
        anchors: integer scalar, the number of possible anchors: valid, of the foreground, of weight above 0.
        with_positive: integer scalar, the number of anchors that have a positive of weight above 0.
        distances: scalar without a graph, the sum over these anchors of the mean squared distance, in [0, 4], between
            the unit embeddings of the anchor and of its positives.
    """

    loss: Tensor
    anchors: Tensor
    with_positive: Tensor
    distances: Tensor

    def plus(self, other: CountedLoss) -> CountedLoss:
        """Add losses, counts and distances."""
        return CountedLoss(*(one + another for one, another in zip(self, other, strict=True)))


class _Positives(NamedTuple):
    """Positives of each anchor: weighted mean embedding (N, d), sum of weights (N,) and number (N,)."""

    mean: Tensor
    mass: Tensor
    number: Tensor


def contrast_views(
    a: Samples, b: Samples, rules: tuple[PairRule, PairRule], temperature: float | Tensor, hard_negatives: float = 0.0,
    ignored: PairRule | None = None,
) -> CountedLoss:
    """Contrast the points of two views: anchors a with candidates b plus anchors b with candidates a.

    Args:
        a, b: points of the two views.
        rules: pair rules for the positives of a among b, and of b among a, each the transpose of the other.
        temperature: tau; a scalar tensor receives a gradient.
        hard_negatives: beta.
        ignored: pairs left out of both denominators; symmetric.
    """

    def kernel(scale: float | Tensor, exclude: Exclude | None) -> tuple[Tensor, ...]:
        return two_way_log_sum_exp(a.unit * scale, b.unit, as_number(scale), exclude=exclude)

    positives = (_positives(rules[0], b), _positives(rules[1], a))
    negatives = (_negatives(b, positives[0], ignored), _negatives(a, positives[1], ignored)) if hard_negatives else ()
    logs = _log_denominators(kernel, rules[0], negatives, temperature, hard_negatives, ignored)
    forward, backward = (
        _anchor_mean(anchors, found, log_sum, temperature)
        for anchors, found, log_sum in zip((a, b), positives, logs, strict=True)
    )
    return forward.plus(backward)


def contrast_pool(
    z: Samples, rule: PairRule, temperature: float | Tensor, hard_negatives: float = 0.0
) -> CountedLoss:
    """Contrast every point of a pool with all others.

    Args:
        z: points of the pool.
        rule: pair rule for the positives; symmetric.
        temperature: tau; a scalar tensor receives a gradient.
        hard_negatives: beta.
    """

    def kernel(scale: float | Tensor, exclude: Exclude | None) -> tuple[Tensor, ...]:
        return (pool_log_sum_exp(z.unit * scale**0.5, as_number(scale), exclude=exclude),)

    positives = _positives(rule, z)
    negatives = (_negatives(z, positives, None) - 1,) if hard_negatives else ()
    (log_sum,) = _log_denominators(kernel, rule, negatives, temperature, hard_negatives, None)
    return _anchor_mean(z, positives, log_sum, temperature)


def _positives(rule: PairRule, candidates: Samples) -> _Positives:
    weights = candidates.weights[:, None]
    sums = rule.sum_over_positives(torch.cat([candidates.unit * weights, weights, torch.ones_like(weights)], dim=1))
    mass, number = sums[:, -2].detach(), sums[:, -1].detach()
    return _Positives(sums[:, :-2] / torch.where(mass > 0, mass, 1)[:, None], mass, number)


def _negatives(candidates: Samples, positives: _Positives, ignored: PairRule | None) -> Tensor:
    """Count the negatives of each anchor, (N,); in a pool, the anchor itself is among them."""
    others = len(candidates) - positives.number
    if ignored is None:
        return others
    return others - ignored.sum_over_positives(torch.ones_like(others)[:, None])[:, 0]


def _log_denominators(
    kernel: _Kernel, rule: PairRule, negatives: tuple[Tensor, ...], temperature: float | Tensor, hard_negatives: float,
    ignored: PairRule | None,
) -> tuple[Tensor, ...]:
    """Compute the log denominators (N,) of each direction, see the module's docstring."""
    scale = 1 / temperature
    if not hard_negatives:
        return kernel(scale, ignored.block if ignored else None)
    no_negatives = _either(rule, ignored)
    own = kernel(scale, _all_but(rule, negatives[0].device))
    hard = kernel(scale + hard_negatives, no_negatives)
    easy = kernel(hard_negatives, no_negatives)
    return tuple(
        torch.logaddexp(
            o.masked_fill(o.isneginf(), _LOG_NOTHING), torch.where(n > 0, n.clamp(min=1).log() + h - e, _LOG_NOTHING)
        )
        for o, n, h, e in zip(own, negatives, hard, easy, strict=True)
    )


def _anchor_mean(anchors: Samples, positives: _Positives, log_sum: Tensor, temperature: float | Tensor) -> CountedLoss:
    """Mask the losses anchor by anchor, then average; zero with a graph if there is no anchor."""
    possible = anchors.anchors & (anchors.weights > 0)
    counted = possible & (positives.mass > 0)
    cosine = (anchors.unit * positives.mean).sum(dim=-1)
    losses = log_sum - cosine / temperature
    weights = torch.where(counted, anchors.weights, 0)
    total = weights.sum()
    mean = (torch.where(counted, losses, 0) * weights).sum() / torch.where(total > 0, total, 1)
    return CountedLoss(mean, possible.sum(), counted.sum(), (2 - 2 * cosine.detach())[counted].sum())


def _either(rule: PairRule, ignored: PairRule | None) -> Exclude:
    """Exclude the pairs that are positive or ignored."""

    def exclude(rows: slice, columns: slice) -> Tensor | None:
        positive = rule.block(rows, columns)
        left_out = ignored.block(rows, columns) if ignored else None
        if positive is None or left_out is None:
            return left_out if positive is None else positive
        return positive | left_out

    return exclude


def _all_but(rule: PairRule, device: torch.device) -> Exclude:
    """Exclude the pairs that are not positive."""

    def exclude(rows: slice, columns: slice) -> Tensor:
        positive = rule.block(rows, columns)
        if positive is None:
            return torch.ones(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bool, device=device)
        return ~positive

    return exclude
