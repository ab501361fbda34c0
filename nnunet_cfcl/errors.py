"""Errors that are meant for users: one readable line, no traceback needed."""

from collections.abc import Iterable


class UserError(ValueError):
    """Something the user can mend; the message says what was found, what was expected and what mends it."""


def listed(names: Iterable[object], count: int = 10) -> str:
    """The first ``count`` of some names and how many more there are, for messages."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:count]) + (f" and {len(texts) - count} more" if len(texts) > count else "")
