"""Attributes of cases, the parents of the image in the structural causal model: their kinds and their encoding.

The encoding of an attribute ends with one number that is 1 where its value is not known (and all others 0 there), so
that a network learns what "unknown" means.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from nnunet_cfcl.errors import UserError, listed

Kind = Literal["binary", "categorical", "continuous"]
#: What may be declared: one more kind takes a column out.
DECLARABLE = (*get_args(Kind), "ignore")

#: Cells that hold no value, whatever their case; "none" is one, of a disease for instance.
MISSING = ("", "na", "n/a", "nan", "null", "unknown", "?")
#: Whole numbers are taken for the names of groups if there are at most so many of them ...
MOST_NUMBERED_GROUPS = 10
#: ... and every group has on average at least so many cases.
CASES_PER_GROUP = 5


@dataclass(frozen=True)
class Attribute:
    """One attribute.

    Attributes:
        name: of its column.
        kind: binary, categorical or continuous.
        values: of a binary or categorical attribute, as written in the table, sorted; empty for a continuous one.
        mean, std: of a continuous attribute in its own units; 0 and 1 for the others.
    """

    name: str
    kind: Kind
    values: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @property
    def width(self) -> int:
        """Length of its encoding: one number (binary 0 or 1, continuous standardised) or one per value, and one for
        "unknown"."""
        return 1 + (len(self.values) if self.kind == "categorical" else 1)

    def encode(self, cell: str) -> Tensor:
        """The encoding (width,) float32 of a cell.

        Raises:
            UserError: a value that the attribute has not, or no number where it is continuous.
        """
        encoded = torch.zeros(self.width)
        if is_missing(cell):
            encoded[-1] = 1
        elif self.kind == "continuous":
            if (number := _number(cell)) is None:
                raise UserError(f"attribute '{self.name}' is continuous, found '{cell}'", "write a number, or declare "
                                f'"{self.name}": "categorical" in attributes.json')
            encoded[0] = (number - self.mean) / self.std
        elif cell not in self.values:
            raise UserError(f"attribute '{self.name}' has the values {listed(self.values)}, found '{cell}'", "mend "
                            "attributes.csv, or train a new generator that knows this value")
        elif self.kind == "binary":
            encoded[0] = self.values.index(cell)
        else:
            encoded[self.values.index(cell)] = 1
        return encoded


@dataclass(frozen=True)
class AttributeCoding:
    """All attributes of a generator, in a fixed order, and the encoding of a case: theirs, one after the other."""

    attributes: tuple[Attribute, ...]

    @property
    def width(self) -> int:
        """Length of the encoding."""
        return sum(attribute.width for attribute in self.attributes)

    def encode(self, cells: Mapping[str, str]) -> Tensor:
        """The encoding (width,) float32 of one case.

        Args:
            cells: attribute -> cell; one that is not there is unknown.

        Raises:
            UserError: see `Attribute.encode`.
        """
        return torch.cat([attribute.encode(cells.get(attribute.name, "")) for attribute in self.attributes])

    def to_json(self) -> list[dict[str, Any]]:
        """For `from_json`."""
        return [{**asdict(attribute), "values": list(attribute.values)} for attribute in self.attributes]

    @classmethod
    def from_json(cls, content: Sequence[Mapping[str, Any]]) -> AttributeCoding:
        """The opposite of `to_json`."""
        return cls(tuple(Attribute(**{**entry, "values": tuple(entry["values"])}) for entry in content))


def is_missing(cell: str) -> bool:
    """Whether a cell of the table holds no value."""
    return cell.strip().lower() in MISSING


def infer_attributes(
    columns: Mapping[str, Mapping[str, str]], cases: Sequence[str], declared: Mapping[str, str] | None = None
) -> tuple[AttributeCoding, list[str]]:
    """The attributes of a table, by what their cells look like unless their kind is declared.

    Two values are binary. More are continuous if all are numbers, but for up to `MOST_NUMBERED_GROUPS` different whole
    numbers with `CASES_PER_GROUP` cases each on average, which count as names; other texts are categorical. A column
    whose value never changes, or whose texts are nearly all different (dates, names, remarks), is no attribute.

    Args:
        columns: attribute -> case -> cell.
        cases: the cases to learn from; statistics and values come from them alone.
        declared: attribute -> one of `DECLARABLE`, as `attributes.json` has it.

    Returns:
        The attributes in the order of the columns, and a line for the user about each column that is none.

    Raises:
        UserError: a declaration of no column, of no kind, or one that the values do not allow; all of them are named.
    """
    declared = declared or {}
    faults = [f"'{name}' is no column of attributes.csv (found {listed(columns) or 'none'})"
              for name in declared if name not in columns]
    faults += [f"'{name}' cannot be '{kind}', only {', '.join(DECLARABLE)}"
               for name, kind in declared.items() if kind not in DECLARABLE]
    found, notes = [], []
    for name, cells in columns.items():
        present = [cell for case in cases if not is_missing(cell := cells.get(case, ""))]
        try:
            found.append(_attribute(name, present, declared.get(name)))
        except _NoAttribute as reason:
            notes.append(f"column '{name}' is not used: {reason}")
        except _NotAllowed as reason:
            faults.append(f"'{name}' cannot be {declared[name]}: {reason}")
    if faults:
        raise UserError(f"attributes.json has {len(faults)} faults: {listed(faults)}", "mend it")
    return AttributeCoding(tuple(found)), notes


class _NoAttribute(Exception):
    """Why a column is none."""


class _NotAllowed(Exception):
    """Why a column cannot be what it is declared to be."""


def _attribute(name: str, present: Sequence[str], declared: str | None) -> Attribute:
    """From the cells that hold a value."""
    if declared == "ignore":
        raise _NoAttribute("declared so in attributes.json")
    counts = Counter(present)
    if len(counts) < 2:
        raise (_NotAllowed if declared in DECLARABLE else _NoAttribute)(
            f"its only value is '{present[0]}'" if present else "it has no values")
    numbers = [_number(cell) for cell in present]
    numeric = [number for number in numbers if number is not None]
    kind = declared or _inferred_kind(counts, numbers)
    if kind == "continuous":
        if len(numeric) < len(present):
            texts = sorted({cell for cell, number in zip(present, numbers) if number is None})
            raise _NotAllowed(f"it has cells that are no numbers ({listed(texts, 3)})")
        return _continuous(name, numeric)
    if kind == "binary" and len(counts) != 2:
        raise _NotAllowed(f"it has {len(counts)} values ({listed(sorted(counts), 3)})")
    values = tuple(sorted(counts, key=lambda cell: (_number(cell) is None, _number(cell) or 0.0, cell)))
    return Attribute(name, "binary" if kind == "binary" else "categorical", values)


def _inferred_kind(counts: Mapping[str, int], numbers: Sequence[float | None]) -> Kind:
    if len(counts) == 2:
        return "binary"
    cases, known = len(numbers), [number for number in numbers if number is not None]
    if len(known) < cases:
        if len(counts) > cases / 2:
            raise _NoAttribute(f"{len(counts)} of {cases} values are different texts; declare it in attributes.json if "
                               "it is one")
        return "categorical"
    whole = all(number == round(number) for number in known)
    named = whole and len(counts) <= MOST_NUMBERED_GROUPS and cases >= CASES_PER_GROUP * len(counts)
    return "categorical" if named else "continuous"


def _continuous(name: str, numbers: Sequence[float]) -> Attribute:
    values = torch.tensor(numbers, dtype=torch.float64)
    std = float(values.std(correction=0))
    if std == 0:
        raise _NotAllowed("all its numbers are the same")
    return Attribute(name, "continuous", (), float(values.mean()), std)


def _number(cell: str) -> float | None:
    """The cell as a finite number, else None."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
