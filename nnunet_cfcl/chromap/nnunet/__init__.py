"""CHRO-maps from nnU-Net's prediction: a predictor that keeps the last decoder map, and the colour space of a model."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
