"""CHRO-maps: the representation of every voxel as a colour.

A `ColorSpace`, fitted once per model, takes features to the unit disc and the disc to colours, so that all maps of a
model can be compared. Pictures, montages and NIfTI files show them; `nnunet` computes them during nnU-Net's own
prediction.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
