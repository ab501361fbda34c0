"""Evaluation: masks against the truth, frozen features, and reports on trained folds.

`nnunet_cfcl.evaluation.masks` measures predicted masks, `nnunet_cfcl.evaluation.probe` probes the features of a
network, `nnunet_cfcl.evaluation.report` writes an HTML page. They share the statistics exported here: bootstrap
intervals and sign-flip tests over patients.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
