"""A source that is made when it is needed, and known before."""

import pickle

import pytest
import torch

from nnunet_cfcl.counterfactual.source import OriginalSource
from nnunet_cfcl.phases.lazy_source import LazySource

IDENTITY = {"source": "generator or acquisition", "generator": "abc"}


class Counting:
    """Makes a source, and counts how often."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return OriginalSource()


def test_it_is_known_before_it_is_made_and_stays_what_was_promised():
    make = Counting()
    source = LazySource(IDENTITY, make)
    assert source.identity() == IDENTITY and source.name == "generator or acquisition" and make.count == 0
    source.materialise()
    source.materialise()
    assert source.identity() == IDENTITY and source.name == "none" and make.count == 1


def test_it_draws_and_applies_as_what_was_made():
    source = LazySource(IDENTITY, Counting())
    source.materialise()
    images = torch.zeros(2, 1, 4, 4)
    drawn = source.draw(torch.Generator(), "case", None, 2)
    assert drawn == () and source.apply(images, drawn, (1.0, 1.0)) is images


def test_nothing_can_be_drawn_before_it_is_made():
    source = LazySource(IDENTITY, Counting())
    with pytest.raises(RuntimeError, match="do not exist yet: call `materialise` first"):
        source.draw(torch.Generator(), "case", None, 1)


def test_once_made_it_goes_to_workers_without_what_made_it():
    source = LazySource(IDENTITY, lambda: OriginalSource())
    source.materialise()
    assert pickle.loads(pickle.dumps(source)).identity() == IDENTITY
