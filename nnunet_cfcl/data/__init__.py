"""Cases of a dataset: preprocessed images and labels, attributes, patients, and the selection for the pretraining.

`CaseReader` is the protocol that the method reads cases through, `PreprocessedCases` and `PretrainingCases` implement
it. Names are imported on first use: the protocol and the attributes need no nnU-Net, the readers do.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
