"""Which cases are of the same patient, from ``attributes.csv`` of the raw dataset.

A training may run where the raw dataset is not: ``nnunet_cfcl pool`` leaves a copy, ``cfcl_patients.json``, beside the
preprocessed data.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_cfcl.atomic import write_text_atomically
from nnunet_cfcl.csv_table import read_csv_table
from nnunet_cfcl.errors import UserError, listed

ATTRIBUTES = "attributes.csv"
CASE, PATIENT = "case", "patient"
STORED = "cfcl_patients.json"
FORMAT = 1


@dataclass(frozen=True)
class Patients:
    """Which cases are of the same patient.

    Attributes:
        names: case -> patient, for the cases that have one.
        table: where that is from, in words; "" where there is no table with patients.
        outdated: the stored copy says something else than the raw dataset.
    """

    names: Mapping[str, str]
    table: str
    outdated: bool = False

    def of(self, case: str) -> str:
        """The patient of a case; one that the table does not name is a patient of the case's own name."""
        return self.names.get(case, case)


def known_patients(raw_folder: Path | None, preprocessed: Path) -> Patients:
    """The raw dataset's table where there is one with patients, else the copy that ``nnunet_cfcl pool`` has stored.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX``, there or not; None where nnUNet_raw is not set.
        preprocessed: ``nnUNet_preprocessed/DatasetXXX``.

    Raises:
        UserError: one of the two cannot be read.
    """
    raw = read_patients(raw_folder) if raw_folder else None
    is_stored, stored = _read_stored(preprocessed / STORED)
    if raw is not None:
        table = f"the column '{PATIENT}' of nnUNet_raw/{preprocessed.name}/{ATTRIBUTES}"
        return Patients(raw, table, outdated=is_stored and raw != stored)
    if stored is not None:
        return Patients(stored, f"the table of patients that nnunet_cfcl pool has stored ({preprocessed / STORED})")
    return Patients({}, "")


def check_case_names(named: Collection[str], known: Collection[str], ending: str, table: str) -> None:
    """Refuse a table that speaks of the cases by other names, which would silently say nothing of them.

    Rows of other cases are no fault: a dataset's test cases may have some.

    Args:
        named: cases of the table.
        known: cases that it should speak of.
        ending: file ending of the dataset's images.
        table: where the names are from, in words.

    Raises:
        UserError: it has names of known cases' files, or of no known case at all.
    """
    unknown = sorted(set(named) - set(known))
    files = [name for name in unknown if re.sub(r"_\d{4}$", "", name.removesuffix(ending)) in known]
    if files:
        raise UserError(f"{table} has {len(files)} names of files where names of cases are expected: {listed(files)}; "
                        f"write them without _0000 and without {ending}")
    if known and unknown and len(unknown) == len(set(named)):
        raise UserError(f"{table} names none of the {len(known)} known cases, such as {sorted(known)[0]}, but "
                        f"{len(unknown)} others: {listed(unknown)}; write the names of the cases")


def store_patients(preprocessed: Path, patients: Mapping[str, str] | None) -> None:
    """Keep what `read_patients` found for trainings without the raw dataset, atomically.

    Args:
        preprocessed: ``nnUNet_preprocessed/DatasetXXX``.
        patients: case -> patient of all cases in the table; None: there is no table with patients.
    """
    write_text_atomically(preprocessed / STORED, json.dumps({"format": FORMAT, "patients": patients}, indent=1))


def _read_stored(file: Path) -> tuple[bool, dict[str, str] | None]:
    """Whether a run of the command stored what it knew, and what that was."""
    if not file.is_file():
        return False, None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        patients = content["patients"]
        return True, None if patients is None else {case: str(patient) for case, patient in patients.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a readable list of patients ({type(error).__name__}: {error}); delete it and "
                        "run nnunet_cfcl pool again") from error


def read_patients(raw_folder: Path) -> dict[str, str] | None:
    """Patients of the cases in the columns ``case`` and ``patient``; other columns are not looked at.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX``.

    Returns:
        Case -> patient, for the cases that have one; None without the file or its column ``patient``.

    Raises:
        UserError: the table cannot be read, has no column ``case``, one of the two twice, rows of another length than
            its header, rows without a case, or a case in two rows; all of them are named.
    """
    file = raw_folder / ATTRIBUTES
    if not file.exists():
        return None
    header, rows = read_csv_table(file)
    for name in (CASE, PATIENT):
        if header.count(name) > 1 or (name == CASE and name not in header):
            raise UserError(f"{file} must have one column '{name}', found the columns {', '.join(header) or 'none'}; "
                            "the first row names them, separated by commas")
    columns = {name: header.index(name) for name in (CASE, PATIENT) if name in header}
    _check_rows(file, header, rows, columns[CASE])
    if PATIENT not in columns:
        return None
    pairs = ((row[columns[CASE]], row[columns[PATIENT]]) for row in rows.values())
    return {case: patient for case, patient in pairs if patient}


def _check_rows(file: Path, header: Sequence[str], rows: Mapping[int, Sequence[str]], column: int) -> None:
    faults = [f"line {line} has {len(row)} cells, expected {len(header)}" for line, row in rows.items()
              if len(row) != len(header)]
    whole = {line: row[column] for line, row in rows.items() if len(row) == len(header)}
    faults += [f"line {line} names no case" for line, case in whole.items() if not case]
    twice = [case for case, count in Counter(whole.values()).items() if case and count > 1]
    faults += [f"case {case} is there more than once" for case in twice]
    if faults:
        raise UserError(f"{file} has {len(faults)} faults: {listed(faults)}; mend these rows")
