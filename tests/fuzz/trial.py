"""One input given to one reader, and what came of it."""

from __future__ import annotations

import resource
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

from nnunet_cfcl.errors import UserError
from tests.fuzz.readers import Reader

ACCEPTED, REFUSED, FAILED = "accepted", "refused", "failed"
#: No file of ours takes so much time of the processor, nor so much memory.
MOST_SECONDS, MOST_MIB = 30.0, 512.0
#: Readers name the file, or a line for every file that is read.
LONGEST_LINE = 5000


@dataclass(frozen=True)
class Outcome:
    """What came of an input.

    Attributes:
        kind: one of `ACCEPTED`, `REFUSED` and `FAILED`.
        words: the error's.
    """

    kind: str
    words: str = ""


class Bench:
    """A folder with valid files for a reader, one of which is replaced by one input after the other.

    Args:
        reader: that is tried.
        folder: empty.

    Attributes:
        valid: bytes of the valid file.
    """

    def __init__(self, reader: Reader, folder: Path) -> None:
        self.reader, self._folder = reader, folder
        reader.make(folder)
        self._file = folder / reader.file
        self.valid = self._file.read_bytes()

    def give(self, content: bytes) -> Outcome:
        """Whether the reader takes the input, refuses it as documented, or fails."""
        self._file.write_bytes(content)
        # of the processor, not of the clock: other programs may be at work
        begun, before = time.process_time(), _peak_mib()
        outcome = self._outcome()
        seconds, grown = time.process_time() - begun, _peak_mib() - before
        if seconds > MOST_SECONDS:
            return Outcome(FAILED, f"took {seconds:.0f} s")
        if grown > MOST_MIB:
            return Outcome(FAILED, f"took {grown:.0f} MiB")
        return outcome

    def _outcome(self) -> Outcome:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.reader.read(self._folder)
        except UserError as error:
            return self._judged(str(error))
        except Exception as error:
            is_meant = self.reader.refusal is not None and isinstance(error, self.reader.refusal)
            return Outcome(REFUSED if is_meant else FAILED, f"{type(error).__name__}: {error}")
        return Outcome(ACCEPTED)

    def _judged(self, words: str) -> Outcome:
        """A documented error is one line that can be printed and names the file, or the folder it is of."""
        names = (self._file.name, self._folder.name, *self.reader.called)
        is_good = words.isprintable() and len(words) < LONGEST_LINE and any(name in words for name in names)
        return Outcome(REFUSED, words) if is_good else Outcome(FAILED, f"not one line that names the file: {words}")


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
