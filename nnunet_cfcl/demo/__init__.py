"""Demonstration from images to a picture of the results, with the commands that a user types: ``nnunet_cfcl demo``.

`run_demo` trains nnU-Net alone and with the plugin in a folder of its own, on synthetic patients or a given dataset,
and tests both on every scanner.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
