"""Interventions: which attributes of a case are changed, and to what."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator

from nnunet_cfcl.data.attributes import Attribute, AttributeCoding, is_missing
from nnunet_cfcl.errors import UserError, listed

#: An attribute is changed by default if at least two of its values have so many cases.
ENOUGH_CASES = 10
#: Parts of names that speak of the acquisition, which comes first.
ACQUISITION = ("scanner", "site", "vendor", "manufacturer", "field", "protocol", "device", "hospital", "centre",
               "center", "kernel")


@dataclass(frozen=True)
class Intervention:
    """Attributes that are changed together.

    Attributes:
        attributes: binary or categorical ones.
        targets: for each of them the values that it may be given; (): any.
    """

    attributes: tuple[Attribute, ...]
    targets: tuple[tuple[str, ...], ...] = ()

    @property
    def name(self) -> str:
        """As users write it: ``scanner``, or ``scanner+disease``."""
        return "+".join(attribute.name for attribute in self.attributes)

    def draw(self, generator: Generator, cells: Mapping[str, str]) -> dict[str, str]:
        """New values of the changed attributes: for each one of its targets that the case has not, all equally likely.

        Args:
            generator: on the CPU.
            cells: attribute -> value of the case; one that is missing may become any value.
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
    """Every binary or categorical attribute with `ENOUGH_CASES` cases of at least two values, those of the acquisition
    first: each alone, and all together (paper, section 3: scanner, disease, both).

    Args:
        coding: the attributes.
        columns: attribute -> case -> cell.
        cases: those that are learned from.
    """
    chosen = [attribute for attribute in coding.attributes
              if attribute.kind != "continuous" and _has_enough(columns[attribute.name], cases)]
    chosen.sort(key=lambda attribute: not any(word in attribute.name.lower() for word in ACQUISITION))
    alone = [Intervention((attribute,)) for attribute in chosen]
    return tuple(alone + ([Intervention(tuple(chosen))] if len(chosen) > 1 else []))


def frequent_targets(
    intervention: Intervention, columns: Mapping[str, Mapping[str, str]], cases: Sequence[str]
) -> Intervention:
    """The intervention with values that `ENOUGH_CASES` cases have as its targets; any where there are not two of them.

    Nobody can learn, or judge, what a group of a few cases looks like.
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
    """What users ask for: names of attributes, ``scanner+disease`` for a change of both.

    Raises:
        UserError: no such attribute, a continuous one, one twice, an intervention twice; all of them are named.
    """
    known = {attribute.name: attribute for attribute in coding.attributes}
    faults, found = [], []
    for name in names:
        parts = [part.strip() for part in name.split("+")]
        wrong = [fault for part in parts if (fault := _fault(part, known))]
        wrong += [f"'{part}' is in '{name}' more than once" for part, count in Counter(parts).items() if count > 1]
        faults += wrong
        if not wrong:
            found.append(Intervention(tuple(known[part] for part in parts)))
    repeated = Counter(frozenset(one.attributes) for one in found)
    faults += [f"'{one.name}' is asked for more than once" for one in found if repeated[frozenset(one.attributes)] > 1]
    if faults:
        raise UserError(f"{len(faults)} interventions cannot be made: {listed(faults)}", "change "
                        "counterfactual.interventions in the settings, or attributes.csv")
    return tuple(found)


def _fault(name: str, known: Mapping[str, Attribute]) -> str | None:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        return f"'{name}' is no attribute with at least two values" + (f" (the nearest is '{near[0]}')" if near else "")
    if known[name].kind == "continuous":
        return f"'{name}' is continuous and has no other value to be flipped to"
    return None
