"""Metrics of predicted masks against the truth, per case, label and group: ``nnunet_cfcl evaluate``.

`evaluate` runs the whole evaluation of folders of masks and writes its results; `case_metrics` computes Dice, HD95,
ASSD and NSD of two arrays.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
