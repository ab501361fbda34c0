"""The phases that a trainer runs before nnU-Net's training, and what they need of a fold.

Phase 0 trains and judges the counterfactual generator (`GeneratorPhase`), phase 1 pretrains the network
(`PretrainingPhase`); `with_replacements` shows counterfactuals in phase 2, nnU-Net's own training. All of them work on
a `nnunet_cfcl.nnunet.fold.FoldContext`.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
