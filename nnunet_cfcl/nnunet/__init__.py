"""The adapter to nnU-Net: every module that depends on nnU-Net's internals, and nothing else.

`FoldContext` describes one fold of a training; the other names look up datasets, plans and trainers, tap a network,
build nnU-Net's loss, and read the files that nnU-Net writes. Support for a new version of nnU-Net begins in
`compatibility`.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
