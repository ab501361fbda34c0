"""Errors for users: one readable line with the fix, instead of a traceback; and the results of checks."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

#: Longer messages are cut in the middle.
LONGEST_MESSAGE = 4000

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 3, 200, 200, 40
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12


class UserError(ValueError):
    """An error that the user can fix, printed as one line without a traceback.

    File names and file contents may hold anything: line breaks and control characters, which a terminal would obey, are
    escaped.

    Args:
        message: what was found and what was expected, one line.
        fix: the command or the edit that fixes it; "" where ``message`` leaves no doubt.
        details: further lines, for a list of problems.
    """

    def __init__(self, message: str, fix: str = "", details: Iterable[str] = ()) -> None:
        self.message, self.fix = printable(message), printable(fix)
        self.details = tuple(map(printable, details))
        # all arguments, so that the error survives pickling
        super().__init__(self.message, self.fix, self.details)

    def __str__(self) -> str:
        return "\n  ".join((with_fix(self.message, self.fix), *self.details))


class NotSupported(UserError, NotImplementedError):
    """A feature of nnU-Net that cannot be combined with pretraining."""


@dataclass(frozen=True)
class CheckResult:
    """The result of a check: one line of ``nnunet_cfcl doctor``.

    Attributes:
        status: ``FAIL``: the training would not start or would be worthless; ``warn``: it may go wrong.
        message: what was found.
        fix: the command or the edit that fixes it.
    """

    status: Literal["ok", "warn", "FAIL"]
    message: str
    fix: str = ""

    @classmethod
    def of(cls, error: UserError) -> CheckResult:
        """Convert an error to a failed check."""
        return cls("FAIL", error.message, error.fix)

    def line(self) -> str:
        """Format the result as one line."""
        return " ".join(f"{self.status:<4}  {with_fix(self.message, self.fix)}".split("\n"))

    def raise_on_failure(self) -> None:
        """Raise an error if the check failed.

        Raises:
            UserError: the status is ``FAIL``.
        """
        if self.status == "FAIL":
            raise UserError(self.message, self.fix)


def with_fix(message: str, fix: str) -> str:
    """Join message and fix."""
    return f"{message}; fix: {fix}" if fix else message


def printable(text: str) -> str:
    """Escape a text to one line without control characters, of at most `LONGEST_MESSAGE` characters."""
    if len(text) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return text if text.isprintable() else "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text)


def shown(value: object) -> str:
    """``repr`` of a value, shortened where it is large or deep."""
    return _SHORT.repr(value)


def listed(names: Iterable[object], count: int = 10) -> str:
    """List the first ``count`` names and the number of the others, for messages."""
    texts = [str(name) for name in names]
    return ", ".join(texts[:count]) + (f" and {len(texts) - count} more" if len(texts) > count else "")


def first_line(error: BaseException) -> str:
    """Type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def reason(error: BaseException) -> str:
    """Format an error in one line: a `UserError` in full, else type and first line."""
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
def best_effort(file: Path, log: Callable[[str], object], what: str = "picture") -> Iterator[None]:
    """Context in which a file is written that a run does not depend on; a failure is logged and nothing is raised.

    Args:
        file: the file, for the message.
        log: reports the failure.
        what: kind of the file, for the message.
    """
    with isolated() as errors:
        yield
    for error in errors:
        log(f"No {what} {file} ({reason(error)}); the run continues")


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
