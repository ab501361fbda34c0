"""Patients of the cases, from ``attributes.csv`` of the raw dataset.

``nnunet_cfcl pool`` stores a copy, ``cfcl_patients.json``, beside the preprocessed data, for trainings on machines
without the raw dataset.
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
    """Assignment of cases to patients.

    Attributes:
        names: case -> patient, for the cases whose patient is known.
        table: description of the source, for messages; "" without a table of patients.
        outdated: whether the stored copy differs from the raw dataset.
    """

    names: Mapping[str, str]
    table: str
    outdated: bool = False

    def of(self, case: str) -> str:
        """The patient of a case; where it is unknown, the case counts as a patient of its own."""
        return self.names.get(case, case)


def known_patients(raw_folder: Path | None, preprocessed: Path) -> Patients:
    """Read the patients from the raw dataset's table if it names any, else from the copy of ``nnunet_cfcl pool``.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX``, existing or not; None if nnUNet_raw is not set.
        preprocessed: ``nnUNet_preprocessed/DatasetXXX``.

    Raises:
        UserError: the table or the copy cannot be read.
    """
    raw = read_patients(raw_folder) if raw_folder else None
    is_stored, stored = _read_stored(preprocessed / STORED)
    if raw is not None:
        table = f"the column '{PATIENT}' of nnUNet_raw/{preprocessed.name}/{ATTRIBUTES}"
        return Patients(raw, table, outdated=is_stored and raw != stored)
    if stored is not None:
        return Patients(stored, f"the table of patients stored by nnunet_cfcl pool ({preprocessed / STORED})")
    return Patients({}, "")


def store_patients(preprocessed: Path, patients: Mapping[str, str] | None) -> None:
    """Store the result of `read_patients` atomically, for trainings without the raw dataset.

    Args:
        preprocessed: ``nnUNet_preprocessed/DatasetXXX``.
        patients: case -> patient of all cases in the table; None without a table of patients.
    """
    write_text_atomically(preprocessed / STORED, checksummed_text({"format": FORMAT, "patients": patients}))


def _read_stored(file: Path) -> tuple[bool, dict[str, str] | None]:
    """Whether there is a stored copy, and its patients."""
    if not file.is_file():
        return False, None
    try:
        content = read_checksummed(file)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        patients = content["patients"]
        return True, None if patients is None else {case: str(patient) for case, patient in patients.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a readable list of patients ({type(error).__name__}: {error})",
                        "delete it and run nnunet_cfcl pool again") from error


def read_patients(raw_folder: Path) -> dict[str, str] | None:
    """Read the columns ``case`` and ``patient`` of ``attributes.csv``.

    Args:
        raw_folder: ``nnUNet_raw/DatasetXXX``.

    Returns:
        Case -> patient, for the cases whose patient is known; None without the file or its column ``patient``.

    Raises:
        UserError: see `read_attribute_table`.
    """
    table = read_attribute_table(raw_folder)
    if table is None or PATIENT not in table.columns:
        return None
    pairs = zip(table.cases, table.columns[PATIENT])
    return {case: patient for case, patient in pairs if not is_missing(patient)}
