"""What a check of ``nnunet_cfcl doctor`` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nnunet_cfcl.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report.

    ``FAIL``: the training would not start or would be worthless; ``warn``: it may go wrong; ``mend`` is the command or
    the change that mends it.
    """

    status: Literal["ok", "warn", "FAIL"]
    what: str
    mend: str = ""

    def line(self) -> str:
        """The finding as one line of text."""
        text = f"{self.status:<4}  {self.what}" + (f"; mend: {self.mend}" if self.mend else "")
        return " ".join(text.split("\n"))


class CheckFailed(Exception):
    """A check whose result the following checks need has failed; carries the finding."""

    def __init__(self, what: str, mend: str) -> None:
        super().__init__(what)
        self.finding = Finding("FAIL", what, mend)


def refuse(finding: Finding) -> None:
    """Turn what the doctor calls a failure into an error.

    Raises:
        UserError: the finding is a failure.
    """
    if finding.status == "FAIL":
        raise UserError(f"{finding.what}; mend: {finding.mend}")
