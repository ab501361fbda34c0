"""The attributes of a dataset's cases, checked against the cases, and the interventions that follow from them.

The table is copied to ``cfcl_attributes.json`` beside the preprocessed data, for trainings on machines without the raw
dataset.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_cfcl.counterfactual.generator.interventions import (
    ENOUGH_CASES,
    Intervention,
    default_interventions,
    frequent_targets,
    named_interventions,
)
from nnunet_cfcl.counterfactual.store import check_intervention_name
from nnunet_cfcl.data.attribute_table import ATTRIBUTES, DECLARATIONS, read_attribute_table, read_declared_kinds
from nnunet_cfcl.data.attributes import AttributeCoding, infer_attributes, is_missing
from nnunet_cfcl.data.patients import read_patients, store_patients
from nnunet_cfcl.errors import UserError, listed
from nnunet_cfcl.files.atomic import WriteError, write_text_atomically
from nnunet_cfcl.files.checksummed_json import checksummed_text, read_checksummed
from nnunet_cfcl.files.csv_table import check_case_names

STORED = "cfcl_attributes.json"
FORMAT = 1
#: Minimum share of cases for which an attribute must be known to be intervened on.
FEWEST_KNOWN = 0.5

Columns = Mapping[str, Mapping[str, str]]


class NothingToChange(UserError):
    """The table is valid, but no attribute in it can be intervened on."""


@dataclass(frozen=True)
class KnownAttributes:
    """The attribute table of a dataset.

    Attributes:
        columns: attribute -> case -> cell, as written.
        declared: attribute -> kind, as in ``attributes.json``.
        table: where the table was read, for messages.
    """

    columns: Columns
    declared: Mapping[str, str]
    table: str

    def cells(self, cases: Sequence[str]) -> dict[str, dict[str, str]]:
        """Case -> attribute -> cell."""
        return {case: {name: column[case] for name, column in self.columns.items() if case in column}
                for case in cases}


def known_attributes(preprocessed: Path) -> KnownAttributes | None:
    """Read the raw dataset's table and update its copy; without the raw dataset, read the copy; None without either.

    Args:
        preprocessed: ``nnUNet_preprocessed/DatasetXXX``.

    Raises:
        UserError: the table or the copy cannot be read.
    """
    raw_folder = Path(os.environ["nnUNet_raw"]) / preprocessed.name if os.environ.get("nnUNet_raw") else None
    table = read_attribute_table(raw_folder) if raw_folder else None
    stored = preprocessed / STORED
    if table is not None and raw_folder is not None:
        declared = read_declared_kinds(raw_folder)
        _keep_copy(stored, {"format": FORMAT, "columns": table.attributes, "declared": declared})
        with suppress(OSError, WriteError):
            store_patients(preprocessed, read_patients(raw_folder))
        return KnownAttributes(table.attributes, declared, str(raw_folder / ATTRIBUTES))
    if raw_folder is not None and raw_folder.is_dir():
        return None  # the table was deleted, so that its copy is outdated
    return _read_stored(stored) if stored.is_file() else None


def _keep_copy(file: Path, content: Mapping[str, Any]) -> None:
    """Write the file if it differs. A read-only folder is no error: the raw dataset is at hand."""
    text = checksummed_text(content)
    with suppress(OSError, WriteError):
        if file.parent.is_dir() and not (file.is_file() and file.read_bytes() == text.encode()):
            write_text_atomically(file, text)


def _read_stored(file: Path) -> KnownAttributes:
    try:
        content = read_checksummed(file)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        columns, declared = content["columns"], content["declared"]
        cells = [cell for column in columns.values() for cell in column.values()]
        if not all(isinstance(text, str) for text in (*cells, *declared.values())):
            raise TypeError("cells that are not strings")
        return KnownAttributes(columns, declared, f"{file}, the copy of {ATTRIBUTES}")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a readable copy of {ATTRIBUTES} ({type(error).__name__}: {error})", "delete it "
                        "and run `nnunet_cfcl generator train` on a machine with the raw dataset") from error


def coding_and_interventions(
    known: KnownAttributes, cases: Sequence[str], all_cases: Sequence[str], ending: str,
    wanted: Sequence[str] | None, log: Callable[[str], object],
) -> tuple[AttributeCoding, tuple[Intervention, ...]]:
    """Derive the generator's parents and its interventions from the table.

    Args:
        known: the table.
        cases: the cases to train on.
        all_cases: all cases of the dataset and its pool; rows of other cases are counted in the log.
        ending: file ending of the dataset's images.
        wanted: the setting ``counterfactual.interventions``.
        log: reports unused columns and cases without a value.

    Raises:
        UserError: the table names no known case, or names files; an impossible declaration or intervention; an
            attribute to intervene on is missing for most cases.
        NothingToChange: no attribute can be intervened on.
    """
    named = {case for column in known.columns.values() for case in column}
    check_case_names(named, all_cases, ending, known.table)
    if foreign := sorted(named - set(all_cases)):
        log(f"{known.table} has rows of {len(foreign)} cases that are neither in the dataset nor in its pool, such as "
            f"test cases (not used): {listed(foreign, 5)}")
    coding, notes = infer_attributes(known.columns, cases, known.declared)
    for note in notes:
        log(f"{known.table}: {note}")
    interventions = named_interventions(wanted, coding) if wanted else default_interventions(
        coding, known.columns, cases)
    if not interventions:
        raise NothingToChange(
            f"no attribute of {known.table} can be intervened on: an intervention needs a binary or categorical "
            f"attribute, two of whose values have {ENOUGH_CASES} cases each "
            f"({_described(coding, known.columns, cases)})",
            f"add cases or attributes, declare a kind in {DECLARATIONS}, name counterfactual.interventions, or set "
            "counterfactual.source to acquisition")
    _check_known(known, cases, interventions, log)
    for one in interventions:
        check_intervention_name(one.name)
    aimed = tuple(frequent_targets(one, known.columns, cases) for one in interventions)
    for attribute, targets in dict(pair for one in aimed for pair in zip(one.attributes, one.targets)).items():
        if rare := [value for value in attribute.values if value not in targets]:
            log(f"{known.table}: no case is changed to {attribute.name} {listed(rare)}, which fewer than "
                f"{ENOUGH_CASES} cases have")
    return coding, aimed


def _check_known(
    known: KnownAttributes, cases: Sequence[str], interventions: Sequence[Intervention], log: Callable[[str], object]
) -> None:
    """Check that most cases have a value of every attribute to intervene on."""
    for attribute in dict.fromkeys(attribute for one in interventions for attribute in one.attributes):
        column = known.columns[attribute.name]
        unknown = sorted(case for case in cases if is_missing(column.get(case, "")))
        if len(unknown) > (1 - FEWEST_KNOWN) * len(cases):
            raise UserError(
                f"{known.table} has no value of '{attribute.name}' for {len(unknown)} of {len(cases)} cases: "
                f"{listed(unknown, 5)}", "fill in these rows (at least half of the cases need a value), leave the "
                "attribute out of counterfactual.interventions, or set counterfactual.source to acquisition")
        if unknown:
            log(f"{known.table} has no value of '{attribute.name}' for {len(unknown)} of {len(cases)} cases, which "
                f"count as unknown: {listed(unknown, 5)}")


def _described(coding: AttributeCoding, columns: Columns, cases: Sequence[str]) -> str:
    parts = []
    for attribute in coding.attributes:
        cells = [columns[attribute.name].get(case, "") for case in cases]
        counts = ", ".join(f"{value}: {cells.count(value)}" for value in attribute.values)
        parts.append(f"{attribute.name} is {attribute.kind}" + (f" with {counts}" if counts else ""))
    return "; ".join(parts) or "it has no attribute with two values"
