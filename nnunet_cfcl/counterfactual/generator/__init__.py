"""The counterfactual generator: a conditional hierarchical VAE, its training and its use.

`plan_sizes` configures the model from nnU-Net's plan, `GeneratorTraining` trains it. Trained, it computes the
counterfactuals of whole cases (`SlidingWindowCounterfactuals`) or of crops during a training (`GeneratorSource`).
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
