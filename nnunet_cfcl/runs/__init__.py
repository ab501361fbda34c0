"""Infrastructure of long runs: the epoch loop with its log and checkpoints, schedules, random seeds, ranks, locks.

Nothing here depends on a method or on nnU-Net: the pretraining and the training of the generator are both an
`EpochLoop`.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
