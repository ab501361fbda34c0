"""The pool: unlabelled images (imagesUn) and silver labels (labelsSilver), preprocessed for a configuration.

`preprocess_pool` does the work of ``nnunet_cfcl pool``; trainings read the result through `read_manifest` and
`SilverLabels`, after `check_pool_is_current`.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
