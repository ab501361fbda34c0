"""Kinds and encodings of case attributes, the parents of the image in the structural causal model.

The last element of an attribute's encoding is 1 where its value is unknown (all others are 0 then), so that a network
can learn from cases with missing values.
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
#: Kinds that may be declared; "ignore" excludes a column.
DECLARABLE = (*get_args(Kind), "ignore")

#: Cells without a value, in any letter case; "none" is a value, of a disease for instance.
MISSING = ("", "na", "n/a", "nan", "null", "unknown", "?")
#: Whole numbers are inferred to be categories if there are at most this many of them ...
MOST_NUMBERED_GROUPS = 10
#: ... with at least this many cases per category on average.
CASES_PER_GROUP = 5


@dataclass(frozen=True)
class Attribute:
    """Kind, values and statistics of one attribute.

    Attributes:
        name: column name.
        kind: binary, categorical or continuous.
        values: sorted values of a binary or categorical attribute as written in the table; empty if continuous.
        mean, std: mean and population standard deviation of a continuous attribute; 0 and 1 otherwise.
    """

    name: str
    kind: Kind
    values: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @property
    def width(self) -> int:
        """Length of the encoding: one element (binary 0 or 1, continuous standardised) or one per value, plus one for
        "unknown"."""
        return 1 + (len(self.values) if self.kind == "categorical" else 1)

    def encode(self, cell: str) -> Tensor:
        """Encode a cell as (width,) float32.

        Raises:
            UserError: a categorical attribute has no such value, or a continuous one no number.
        """
        encoded = torch.zeros(self.width)
        if is_missing(cell):
            encoded[-1] = 1
        elif self.kind == "continuous":
            if (number := _number(cell)) is None:
                raise UserError(f"attribute '{self.name}' is continuous, found '{cell}'",
                                f'write a number, or declare "{self.name}": "categorical" in attributes.json')
            encoded[0] = (number - self.mean) / self.std
        elif cell not in self.values:
            raise UserError(f"attribute '{self.name}' has the values {listed(self.values)}, found '{cell}'",
                            "correct attributes.csv, or train a new generator on cases with this value")
        elif self.kind == "binary":
            encoded[0] = self.values.index(cell)
        else:
            encoded[self.values.index(cell)] = 1
        return encoded


@dataclass(frozen=True)
class AttributeCoding:
    """Encoding of a case: the encodings of a generator's attributes, concatenated in a fixed order."""

    attributes: tuple[Attribute, ...]

    @property
    def width(self) -> int:
        """Length of the encoding of a case."""
        return sum(attribute.width for attribute in self.attributes)

    def encode(self, cells: Mapping[str, str]) -> Tensor:
        """Encode one case as (width,) float32.

        Args:
            cells: attribute -> cell; a missing attribute is unknown.

        Raises:
            UserError: see `Attribute.encode`.
        """
        return torch.cat([attribute.encode(cells.get(attribute.name, "")) for attribute in self.attributes])

    def to_json(self) -> list[dict[str, Any]]:
        """JSON-compatible form, read by `from_json`."""
        return [{**asdict(attribute), "values": list(attribute.values)} for attribute in self.attributes]

    @classmethod
    def from_json(cls, content: Sequence[Mapping[str, Any]]) -> AttributeCoding:
        """Inverse of `to_json`."""
        return cls(tuple(Attribute(**{**entry, "values": tuple(entry["values"])}) for entry in content))


def is_missing(cell: str) -> bool:
    """Whether a cell of the table has no value."""
    return cell.strip().lower() in MISSING


def infer_attributes(
    columns: Mapping[str, Mapping[str, str]], cases: Sequence[str], declared: Mapping[str, str] | None = None
) -> tuple[AttributeCoding, list[str]]:
    """Infer the attributes of a table from their cells, unless their kind is declared.

    A column with two values is binary. With more, it is continuous if all are numbers, except that up to
    `MOST_NUMBERED_GROUPS` different whole numbers with `CASES_PER_GROUP` cases each on average are categories; other
    texts are categorical. A column with a single value, or with mostly unique texts (dates, names, remarks), is not an
    attribute.

    Args:
        columns: attribute -> case -> cell.
        cases: training cases; values and statistics are computed on these alone.
        declared: attribute -> one of `DECLARABLE`, from ``attributes.json``.

    Returns:
        The attributes in the order of the columns, and a log line for each column that is not an attribute.

    Raises:
        UserError: a declaration names an unknown column or kind, or does not match the values; the error lists all.
    """
    declared = declared or {}
    errors = [f"'{name}' is not a column of attributes.csv (found {listed(columns) or 'none'})"
              for name in declared if name not in columns]
    errors += [f"'{name}' cannot be '{kind}', expected one of {', '.join(DECLARABLE)}"
               for name, kind in declared.items() if kind not in DECLARABLE]
    found, notes = [], []
    for name, cells in columns.items():
        present = [cell for case in cases if not is_missing(cell := cells.get(case, ""))]
        try:
            found.append(_attribute(name, present, declared.get(name)))
        except _NoAttribute as reason:
            notes.append(f"column '{name}' is not used: {reason}")
        except _NotAllowed as reason:
            errors.append(f"'{name}' cannot be {declared[name]}: {reason}")
    if errors:
        raise UserError(f"attributes.json has {len(errors)} errors: {listed(errors)}", "correct it")
    return AttributeCoding(tuple(found)), notes


class _NoAttribute(Exception):
    """Reason why a column is not an attribute."""


class _NotAllowed(Exception):
    """Reason why a column cannot have its declared kind."""


def _attribute(name: str, present: Sequence[str], declared: str | None) -> Attribute:
    """Infer one attribute from the cells that have a value."""
    if declared == "ignore":
        raise _NoAttribute("declared 'ignore' in attributes.json")
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
            raise _NotAllowed(f"it has cells that are not numbers ({listed(texts, 3)})")
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
            raise _NoAttribute(f"{len(counts)} of {cases} values are different texts; declare its kind in "
                               "attributes.json to use it")
        return "categorical"
    whole = all(number == round(number) for number in known)
    named = whole and len(counts) <= MOST_NUMBERED_GROUPS and cases >= CASES_PER_GROUP * len(counts)
    return "categorical" if named else "continuous"


def _continuous(name: str, numbers: Sequence[float]) -> Attribute:
    values = torch.tensor(numbers, dtype=torch.float64)
    std = float(values.std(correction=0))
    if std == 0:
        raise _NotAllowed("all its numbers are equal")
    return Attribute(name, "continuous", (), float(values.mean()), std)


def _number(cell: str) -> float | None:
    """The cell as a finite number, else None."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
