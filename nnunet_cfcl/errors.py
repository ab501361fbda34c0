"""Errors that are meant for users: one readable line, no traceback needed."""

import reprlib
from collections.abc import Iterable

#: Longer messages are cut in the middle: their end says what mends the matter.
LONGEST_MESSAGE = 4000

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 200, 200, 40
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12


class UserError(ValueError):
    """Something the user can mend; the message says what was found, what was expected and what mends it.

    What files and folders are called, and what is written in them, may be anything: line breaks and control characters,
    which a terminal would obey, are shown as Python writes them.

    Args:
        message: one line.
        details: further lines, where there is a list to go through.
    """

    def __init__(self, message: str, details: Iterable[str] = ()) -> None:
        super().__init__("\n  ".join(map(printable, (message, *details))))


class NotSupported(UserError, NotImplementedError):
    """A feature of nnU-Net that does not go with a pretraining; the message says what to do instead."""


def printable(text: str) -> str:
    """A text in one line of at most `LONGEST_MESSAGE` characters, without control characters."""
    if len(text) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return text if text.isprintable() else "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)


def shown(value: object) -> str:
    """A value as Python writes it, cut short where it is large or deep."""
    return _SHORT.repr(value)


def listed(names: Iterable[object], count: int = 10) -> str:
    """The first ``count`` of some names and how many more there are, for messages."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:count]) + (f" and {len(texts) - count} more" if len(texts) > count else "")


def first_line(error: BaseException) -> str:
    """Type and first line of an error's message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def reason(error: BaseException) -> str:
    """An error in one line: what it says to the user, or else type and first line."""
    return str(error) if isinstance(error, UserError) else first_line(error)
