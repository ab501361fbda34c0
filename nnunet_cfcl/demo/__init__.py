"""Demonstration from images to a plot of the results, with the commands that a user types: ``nnunet_cfcl demo``.

`run_demo` plans, trains and predicts in a folder of its own, on synthetic patients or a given dataset.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
