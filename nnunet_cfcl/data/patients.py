"""Which cases are of the same patient, from ``attributes.csv`` of the raw dataset.

A training may run where the raw dataset is not: ``nnunet_cfcl pool`` leaves a copy, ``cfcl_patients.json``, beside the
preprocessed data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunet_cfcl.data.attribute_table import ATTRIBUTES, PATIENT, read_attribute_table
from nnunet_cfcl.data.attributes import is_missing
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.atomic import write_text_atomically
from nnunet_cfcl.files.checksummed_json import checksummed_text, read_checksummed

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


def store_patients(preprocessed: Path, patients: Mapping[str, str] | None) -> None:
    """Keep what `read_patients` found for trainings without the raw dataset, atomically.

    Args:
        preprocessed: ``nnUNet_preprocessed/DatasetXXX``.
        patients: case -> patient of all cases in the table; None: there is no table with patients.
    """
    write_text_atomically(preprocessed / STORED, checksummed_text({"format": FORMAT, "patients": patients}))


def _read_stored(file: Path) -> tuple[bool, dict[str, str] | None]:
    """Whether a run of the command stored what it knew, and what that was."""
    if not file.is_file():
        return False, None
    try:
        content = read_checksummed(file)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        patients = content["patients"]
        return True, None if patients is None else {case: str(patient) for case, patient in patients.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a readable list of patients ({type(error).__name__}: {error})", "delete it and "
                        "run nnunet_cfcl pool again") from error


def read_patients(raw_folder: Path) -> dict[str, str] | None:
    """Patients of the cases in the columns ``case`` and ``patient``; other columns are not looked at.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX``.

    Returns:
        Case -> patient, for the cases that have one; None without the file or its column ``patient``.

    Raises:
        UserError: see `read_attribute_table`.
    """
    table = read_attribute_table(raw_folder)
    if table is None or PATIENT not in table.columns:
        return None
    pairs = zip(table.cases, table.columns[PATIENT])
    return {case: patient for case, patient in pairs if not is_missing(patient)}
