"""Seeds of random numbers."""

import torch

from nnunet_cfcl.runs.seeds import generator_for


def test_keys_give_independent_reproducible_generators():
    first = torch.rand(3, generator=generator_for(0, 1, 2))
    assert torch.equal(first, torch.rand(3, generator=generator_for(0, 1, 2)))
    assert not torch.equal(first, torch.rand(3, generator=generator_for(0, 2, 1)))
