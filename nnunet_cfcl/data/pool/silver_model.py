"""Record of the model that made the silver labels of labelsSilver: ``silver_model.json`` of ``nnunet_cfcl silver``.

It tells labels of the command, which may be replaced, from all others, and names the cases that the model was trained
on, which its labels hold knowledge of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nnunet_cfcl
from nnunet_cfcl.data.pool.find_cases import QUALITIES
from nnunet_cfcl.errors import UserError, first_line
from nnunet_cfcl.files.atomic import write_text_atomically
from nnunet_cfcl.files.checksummed_json import checksummed_text, read_checksummed
from nnunet_cfcl.files.hashing import file_digest
from nnunet_cfcl.files.names import is_safe_filename

RECORD = "silver_model.json"
FORMAT = 1
PROBABILITIES = ".npz"


@dataclass(frozen=True)
class SilverModel:
    """A trained model that makes silver labels.

    Attributes:
        trainer, plans, configuration, fold: names in the path of its folder.
        checkpoint: SHA-256 of its checkpoint.
        training: cases that it was trained on, sorted.
    """

    trainer: str
    plans: str
    configuration: str
    fold: str
    checkpoint: str
    training: tuple[str, ...]

    @property
    def name(self) -> str:
        """The end of the path of its folder."""
        return f"{self.trainer}__{self.plans}__{self.configuration}/fold_{self.fold}"

    def command(self, dataset: str, fold: str | None = None) -> str:
        """The command that labels the pool of ``DatasetXXX_NAME`` with this trainer's model of ``fold``, by default its
        own."""
        plans = "" if self.plans == "nnUNetPlans" else f" -p {self.plans}"
        return (f"nnunet_cfcl silver -d {int(dataset[7:10])} -c {self.configuration} -f {fold or self.fold} "
                f"-tr {self.trainer}{plans}")

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return {**dataclasses.asdict(self), "training": list(self.training)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SilverModel:
        """The model of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: entries are missing, unknown or of another type.
        """
        names = {key: value for key, value in content.items() if key != "training"}
        if not all(isinstance(one, str) for one in (*names.values(), *content.get("training", ()))):
            raise ValueError("an entry of the model is no text")
        return cls(**names, training=tuple(content["training"]))


@dataclass(frozen=True)
class LabelState:
    """What a label was made from, and what it was when it was made.

    Attributes:
        images: `RawCase.signature` of the image files.
        label: SHA-256 of the label file; "" while it is not finished.
    """

    images: str
    label: str = ""


@dataclass(frozen=True)
class SilverRecord:
    """Content of ``silver_model.json``.

    Attributes:
        model: model that made the labels.
        labels: case -> state of its label.
    """

    model: SilverModel
    labels: Mapping[str, LabelState]

    def own_labels(self, folder: Path, ending: str) -> tuple[str, ...]:
        """Cases whose label in ``folder`` is still the one that the model made, sorted."""
        return tuple(case for case, state in sorted(self.labels.items())
                     if state.label and file_digest(folder / f"{case}{ending}") == state.label)


def read_record(folder: Path) -> SilverRecord | None:
    """Read the record of a folder of silver labels; None where there is none.

    Raises:
        UserError: the file is not a record of this format, or was changed since it was written.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        content = read_checksummed(file)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        labels = {case: LabelState(**state) for case, state in content["labels"].items()}
        if outside := [case for case in labels if not is_safe_filename(case)]:
            raise ValueError(f"invalid case names: {outside[:3]}")
        return SilverRecord(SilverModel.from_json(content["model"]), labels)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is not a readable record of the model that made these labels ({first_line(error)})",
                        "delete it to keep the labels as your own, or delete the whole folder and run nnunet_cfcl "
                        "silver again") from error


def write_record(folder: Path, record: SilverRecord) -> None:
    """Write the record into a folder of silver labels, atomically."""
    content = {"format": FORMAT, "version": nnunet_cfcl.__version__, "model": record.model.to_json(),
               "labels": {case: dataclasses.asdict(state) for case, state in sorted(record.labels.items())}}
    write_text_atomically(folder / RECORD, checksummed_text(content))


def label_files(folder: Path, case: str, ending: str) -> tuple[Path, ...]:
    """Files of a silver label, existing or not: label map, probabilities, and the spacing beside a 3D TIFF."""
    return folder / f"{case}{ending}", folder / f"{case}{PROBABILITIES}", folder / f"{case}.json"


def foreign_files(folder: Path, record: SilverRecord | None, ending: str) -> Iterator[Path]:
    """Files of a folder of silver labels that the record does not contain, or that were changed since.

    Hidden files, which operating systems leave behind, are ignored.
    """
    if not folder.is_dir():
        return
    known = {RECORD, QUALITIES} if record else set()
    for case, state in record.labels.items() if record else ():
        label, *others = label_files(folder, case, ending)
        known |= {file.name for file in others}
        if file_digest(label) == state.label:
            known.add(label.name)
    yield from sorted(path for path in folder.iterdir() if path.name not in known and not path.name.startswith("."))
