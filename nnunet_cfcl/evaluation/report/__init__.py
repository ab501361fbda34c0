"""Self-contained HTML report on one trained fold, or a comparison of several: ``nnunet_cfcl report``.

`write_report` reads the folders of the folds, evaluates their validation masks, computes missing CHRO-maps and writes
the page. `read_fold` gives the content of a fold's folder as plain data.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
