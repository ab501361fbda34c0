"""Start phase 1 alone."""

import sys

from nnunet_cfcl.cli.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
