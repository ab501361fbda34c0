"""Learning from the pool with a moving-average teacher: pseudo-labels, counterfactual strong views, mixing, the loop.

The teacher labels an weak view of an unlabelled image, the student reproduces the labels on a counterfactual of it
(`TeacherTraining`). The room depends neither on nnU-Net nor on the adapter.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
