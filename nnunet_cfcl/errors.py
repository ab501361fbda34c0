"""Errors that are meant for users: one readable line, no traceback needed."""


class UserError(ValueError):
    """Something the user can mend; the message says what was found, what was expected and what mends it."""
