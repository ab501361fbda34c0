"""Errors that are meant for users: one readable line, no traceback needed."""

from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend; the message says what was found, what was expected and what mends it."""


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
