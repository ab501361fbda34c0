"""The quality gate of a generator: metrics, verdict and report per intervention.

`train_judges` trains an attribute predictor and a segmenter; `evaluate` computes the metrics of every intervention on
held-out patients and decides whether its counterfactuals may be used; `write_report` writes the results.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
