"""Counterfactual images: interventions on acquisition and attributes of a patient's image.

A `CounterfactualSource` gives counterfactuals of crops: drawn analytically (`acquisition`), read from a store of
precomputed images, or computed by a trained generator (`generator`), whose interventions the `gate` evaluates first.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
