"""Metrics of frozen features, without further training of the network: ``nnunet_cfcl probe``.

`run_probe` measures models on the images of a fold and writes the results. A `LinearProbe`, k-means clusters and
distances between classes, counterfactuals and groups describe the last decoder map.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
