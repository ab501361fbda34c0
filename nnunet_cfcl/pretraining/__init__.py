"""Phase 1: the contrastive pretraining of a segmentation network, and the baselines it is compared with.

`Pretraining` trains a network with one `Objective`; the objectives of this package are in `pretraining.objectives`, and
`pretraining.methods` names them. No class of nnU-Net is used.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
