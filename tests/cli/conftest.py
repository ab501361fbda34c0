"""Folders of masks, for the command that measures them."""

from tests.evaluation.conftest import box, write_mask  # noqa: F401 - fixtures
