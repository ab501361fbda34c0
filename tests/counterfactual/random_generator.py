"""A generator with random weights, for several tests."""

from __future__ import annotations

import math

import torch

from nnunet_cfcl.counterfactual.generator.generator import CounterfactualGenerator, IntensityScale
from nnunet_cfcl.counterfactual.generator.hvae import HVAE
from nnunet_cfcl.counterfactual.generator.hvae_sizes import HVAESizes, Resolution
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.data.attributes import Attribute, AttributeCoding

SCANNER = Attribute("scanner", "categorical", ("A", "B", "C"))
DISEASE = Attribute("disease", "binary", ("no", "yes"))
CODING = AttributeCoding((SCANNER, DISEASE, Attribute("age", "continuous", (), 60.0, 10.0)))
INTERVENTIONS = (Intervention((SCANNER,)), Intervention((DISEASE,)), Intervention((SCANNER, DISEASE)))

SHAPES = {2: ((16, 12), (8, 6), (1, 1)), 3: ((6, 8, 8), (3, 4, 4), (1, 1, 1))}


def random_generator(
    dim: int = 2, channels: int = 1, learned_scale: bool = True, unit: float = 1.0, zero: float = 0.0, seed: int = 0
) -> CounterfactualGenerator:
    """A generator of patches of 16 x 12 or 6 x 8 x 8 voxels.

    ``unit`` and ``zero`` are the standard deviation and the mean of its intensities.
    """
    fine, middle, coarse = SHAPES[dim]
    sizes = HVAESizes((Resolution(fine, 8, 1, 1, 2, stochastic=False), Resolution(middle, 12, 1, 2, 3),
                       Resolution(coarse, 16, 1, 1, 4)), channels=channels, parents=CODING.width, dropout=0.0,
                      log_scale=None if learned_scale else -math.log(10))
    torch.manual_seed(seed)
    model = HVAE(sizes)
    with torch.no_grad():
        # in place of the zeros it starts from, so that interventions have an effect
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    ones = torch.ones(channels)
    scale = IntensityScale(zero * ones, unit * ones, (zero - 4 * unit) * ones, (zero + 4 * unit) * ones)
    return CounterfactualGenerator(model, CODING, scale, {"seed": seed})


def encoded(*cells: dict[str, str]) -> torch.Tensor:
    return torch.stack([CODING.encode(one) for one in cells])
