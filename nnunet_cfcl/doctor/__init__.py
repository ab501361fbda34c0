"""Checks of an installation, dataset, plan, data and device before a training: ``nnunet_cfcl doctor``.

`examine` yields one `CheckResult` per check. Names are imported on first use: the doctor runs even where torch or
nnU-Net cannot be imported.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
