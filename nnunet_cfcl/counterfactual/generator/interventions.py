"""Interventions: which attributes of a case are changed, and to which values."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator

from nnunet_cfcl.data.attributes import Attribute, AttributeCoding, is_missing
from nnunet_cfcl.errors import UserError, listed

#: Cases that at least two values of an attribute need for an intervention on it by default.
ENOUGH_CASES = 10
#: Parts of names of attributes of the acquisition, which come first.
ACQUISITION = ("scanner", "site", "vendor", "manufacturer", "field", "protocol", "device", "hospital", "centre",
               "center", "kernel")


@dataclass(frozen=True)
class Intervention:
    """Attributes that are changed together.

    Attributes:
        attributes: binary or categorical attributes.
        targets: possible new values of each attribute; (): all values of all attributes.
    """

    attributes: tuple[Attribute, ...]
    targets: tuple[tuple[str, ...], ...] = ()

    @property
    def name(self) -> str:
        """Name in settings and files: ``scanner``, or ``scanner+disease`` for a joint change."""
        return "+".join(attribute.name for attribute in self.attributes)

    def draw(self, generator: Generator, cells: Mapping[str, str]) -> dict[str, str]:
        """Draw new values of the changed attributes, uniformly from the targets other than the current value.

        Args:
            generator: random generator on the CPU.
            cells: attribute -> value of the case; a missing attribute may get any target.
        """
        targets = self.targets or tuple(attribute.values for attribute in self.attributes)
        return {attribute.name: _another(generator, values, cells.get(attribute.name, ""))
                for attribute, values in zip(self.attributes, targets)}


def _another(generator: Generator, values: Sequence[str], cell: str) -> str:
    others = [value for value in values if value != cell]
    return others[int(torch.randint(len(others), (), generator=generator))]


def default_interventions(
    coding: AttributeCoding, columns: Mapping[str, Mapping[str, str]], cases: Sequence[str]
) -> tuple[Intervention, ...]:
    """Interventions on every attribute with enough cases, each alone and all together, acquisition first.

    An attribute qualifies if it is binary or categorical and `ENOUGH_CASES` cases have each of at least two of its
    values (paper, section 3: scanner, disease, both).

    Args:
        coding: encoding of the attributes.
        columns: attribute -> case -> cell.
        cases: training cases of the generator.
    """
    chosen = [attribute for attribute in coding.attributes
              if attribute.kind != "continuous" and _has_enough(columns[attribute.name], cases)]
    chosen.sort(key=lambda attribute: not any(word in attribute.name.lower() for word in ACQUISITION))
    alone = [Intervention((attribute,)) for attribute in chosen]
    return tuple(alone + ([Intervention(tuple(chosen))] if len(chosen) > 1 else []))


def frequent_targets(
    intervention: Intervention, columns: Mapping[str, Mapping[str, str]], cases: Sequence[str]
) -> Intervention:
    """Restrict an intervention's targets to values with `ENOUGH_CASES` cases, unless fewer than two values have them.

    The appearance of a group of a few cases can be neither learned nor judged.
    """
    targets = []
    for attribute in intervention.attributes:
        counts = Counter(columns[attribute.name].get(case, "") for case in cases)
        frequent = tuple(value for value in attribute.values if counts[value] >= ENOUGH_CASES)
        targets.append(frequent if len(frequent) > 1 else attribute.values)
    return replace(intervention, targets=tuple(targets))


def _has_enough(cells: Mapping[str, str], cases: Sequence[str]) -> bool:
    counts = Counter(cell for case in cases if not is_missing(cell := cells.get(case, "")))
    return sum(count >= ENOUGH_CASES for count in counts.values()) >= 2


def named_interventions(names: Sequence[str], coding: AttributeCoding) -> tuple[Intervention, ...]:
    """Parse names of interventions: names of attributes, ``scanner+disease`` for a change of both.

    Raises:
        UserError: an attribute is unknown, continuous or repeated, or an intervention is; lists all faults.
    """
    known = {attribute.name: attribute for attribute in coding.attributes}
    faults, found = [], []
    for name in names:
        parts = [part.strip() for part in name.split("+")]
        wrong = [fault for part in parts if (fault := _fault(part, known))]
        wrong += [f"'{part}' is repeated in '{name}'" for part, count in Counter(parts).items() if count > 1]
        faults += wrong
        if not wrong:
            found.append(Intervention(tuple(known[part] for part in parts)))
    repeated = Counter(frozenset(one.attributes) for one in found)
    faults += [f"'{one.name}' is listed more than once" for one in found if repeated[frozenset(one.attributes)] > 1]
    if faults:
        raise UserError(f"{len(faults)} invalid interventions: {listed(faults)}",
                        "change counterfactual.interventions in the settings, or attributes.csv")
    return tuple(found)


def _fault(name: str, known: Mapping[str, Attribute]) -> str | None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        return f"'{name}' is not an attribute with at least two values{hint}"
    if known[name].kind == "continuous":
        return f"'{name}' is continuous; only binary and categorical attributes can be changed"
    return None
