"""Fixtures that write masks for `nnunet_cfcl evaluate`."""

from tests.evaluation.conftest import box, write_mask  # noqa: F401 - fixtures
