"""Errors that are meant for users: one readable line, no traceback needed."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

#: Longer messages are cut in the middle: their end says what mends the matter.
LONGEST_MESSAGE = 4000

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 200, 200, 40
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12


class UserError(ValueError):
    """An error that the user can fix, shown as one line without a traceback.

    Names of files and folders, and what is written in them, may be anything: line breaks and control characters, which
    a terminal would obey, are shown as Python writes them.

    Args:
        message: what was found and what was expected, one line.
        fix: the command or the edit that mends it; "" where ``message`` leaves no doubt.
        details: further lines, where there is a list to go through.
    """

    def __init__(self, message: str, fix: str = "", details: Iterable[str] = ()) -> None:
        self.message, self.fix = printable(message), printable(fix)
        self.details = tuple(map(printable, details))
        # all of it, so that the error can be pickled
        super().__init__(self.message, self.fix, self.details)

    def __str__(self) -> str:
        return "\n  ".join((with_fix(self.message, self.fix), *self.details))


class NotSupported(UserError, NotImplementedError):
    """A feature of nnU-Net that does not go with a pretraining; the message says what to do instead."""


@dataclass(frozen=True)
class CheckResult:
    """What a check found: one line of ``nnunet_cfcl doctor``.

    Attributes:
        status: ``FAIL``: the training would not start or would be worthless; ``warn``: it may go wrong.
        message: what was found.
        fix: the command or the edit that mends it.
    """

    status: Literal["ok", "warn", "FAIL"]
    message: str
    fix: str = ""

    @classmethod
    def of(cls, error: UserError) -> CheckResult:
        """The failure that an error describes."""
        return cls("FAIL", error.message, error.fix)

    def line(self) -> str:
        """The result as one line of text."""
        return " ".join(f"{self.status:<4}  {with_fix(self.message, self.fix)}".split("\n"))

    def raise_on_failure(self) -> None:
        """Turn a failure into an error.

        Raises:
            UserError: the status is ``FAIL``.
        """
        if self.status == "FAIL":
            raise UserError(self.message, self.fix)


def with_fix(message: str, fix: str) -> str:
    """Message and fix in one text."""
    return f"{message}; fix: {fix}" if fix else message


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


@contextmanager
def isolated() -> Iterator[list[Exception]]:
    """Context in which one case, section or check may fail without ending the others.

    Yields:
        A list that holds the error, whatever it is, after the block; empty where there was none.
    """
    errors: list[Exception] = []
    try:
        yield errors
    except Exception as error:
        errors.append(error)


@contextmanager
def foreign_errors_as(translate: Callable[[Exception], Exception]) -> Iterator[None]:
    """Context for files and libraries of others, which may raise any exception where a file is damaged.

    Args:
        translate: error -> the error to raise in its place, or the same error; a `UserError` is raised as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        translated = translate(error)
        if translated is error:
            raise
        raise translated from error
