"""Analytic interventions on the acquisition: bias field, point spread, transfer curve and noise.

Parameters are drawn by `draw_acquisition` and applied by `apply_acquisition`, without any known attribute.
`find_acquisition_groups` proposes groups of cases where the scanner is not recorded.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
