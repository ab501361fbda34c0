"""``python -m nnunet_cfcl VERB`` is the same as ``nnunet_cfcl VERB``."""

import sys

from nnunet_cfcl.cli import main

sys.exit(main())
