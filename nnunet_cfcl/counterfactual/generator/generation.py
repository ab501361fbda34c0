"""Fills a store with the counterfactuals that a generator makes of every case."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from nnunet_cfcl.counterfactual.generator.data import Cells
from nnunet_cfcl.counterfactual.generator.interventions import Intervention
from nnunet_cfcl.counterfactual.generator.whole_cases import CaseChange, Slab, SlidingWindowCounterfactuals
from nnunet_cfcl.counterfactual.store import GENERATED, CounterfactualStore, default_store_root
from nnunet_cfcl.data.attributes import AttributeCoding, is_missing
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.files.atomic import write_text_atomically
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.files.json_files import read_json
from nnunet_cfcl.runs.lock import exclusive
from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.runs.watchdog import beat, watched

FORMAT = 1
#: Beside the manifest: {case: {intervention: {"before": {attribute: value}, "after": {attribute: value}}}}; an
#: attribute whose value is not known is not there.
RECORD = "attributes.json"

#: Chunks and blocks of a case's own file, for files that are read as fast.
Layout = Callable[[str], tuple[Sequence[int] | None, Sequence[int] | None]]
Values = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Generation:
    """All that decides about the counterfactuals in a store, beside the images and attributes of each case.

    Attributes:
        generator: digest of its identity.
        interventions: what is changed.
        seed: of the new values, and of the posterior's samples.
        abduction: see `config.CounterfactualSettings`.
        preprocessing: hash of the preprocessing that the cases went through.
    """

    generator: str
    interventions: tuple[Intervention, ...]
    seed: int = 0
    abduction: Literal["mean", "sample"] = "mean"
    preprocessing: str = ""

    @property
    def source(self) -> str:
        """For the store's manifest."""
        return f"{GENERATED}{self.generator}, abduction: {self.abduction}, seed {self.seed}"

    def folder(self, preprocessed_folder: str | os.PathLike[str]) -> Path:
        """The folder of the store, there or not: the order of the interventions does not matter."""
        changed = sorted((one.name, [asdict(attribute) for attribute in one.attributes], one.targets)
                         for one in self.interventions)
        content = [FORMAT, self.generator, changed, self.seed, self.abduction, self.preprocessing]
        return default_store_root(preprocessed_folder) / digest(content)

    def values(self, case: str, cells: Cells, coding: AttributeCoding) -> dict[str, Values]:
        """intervention -> the known attributes of a case "before" and "after" it; new values depend on the seed, the
        names of case and intervention, and the case's own values of what is changed."""
        before = {one.name: cell for one in coding.attributes if not is_missing(cell := cells.get(one.name, ""))}
        drawn = {one.name: one.draw(generator_for(self.seed, _number(case), _number(one.name)), before)
                 for one in self.interventions}
        return {name: {"before": before, "after": {**before, **new}} for name, new in drawn.items()}

    def noise_seed(self, case: str) -> int | None:
        """Depends on the seed and the name of the case alone; None where nothing is sampled."""
        return generator_for(self.seed, _number(case)).initial_seed() if self.abduction == "sample" else None


def generate_counterfactuals(
    blender: SlidingWindowCounterfactuals,
    cells: Mapping[str, Cells],
    wanted: Generation,
    preprocessed_folder: str | os.PathLike[str],
    log: Callable[[str], None],
    layout: Layout = lambda case: (None, None),
) -> CounterfactualStore:
    """The store with every intervention on every case of the blender's reader; what is there already is kept.

    A run that was stopped goes on where it stopped, cases that are new since then are added. A file is made again if
    its case has another shape, or other attributes. Two runs at once: one waits, and finds everything there.

    Args:
        blender: makes them.
        cells: case -> attribute -> value; a case that is not there has none, and may be given any new value.
        wanted: what to make.
        preprocessed_folder: nnUNet_preprocessed/DATASET/<data_identifier>; the store lies beside it.
        log: told about another run that fills the store.
        layout: case -> chunks and blocks of its own file; None lets blosc2 choose.

    Raises:
        UserError: a value that the generator does not know, a case or a counterfactual that is not finite, a store of
            something else in the folder.
    """
    coding, cases = blender.generator.coding, blender.reader.cases
    values = {case: wanted.values(case, cells.get(case, {}), coding) for case in cases}
    asked = {case: _case_change(case, values[case], wanted, coding) for case in cases}
    folder, names = wanted.folder(preprocessed_folder), [one.name for one in wanted.interventions]
    with exclusive(folder, log), watched("generating counterfactuals", log):
        store = CounterfactualStore.create(
            folder, names, wanted.source, Path(preprocessed_folder).name, wanted.preprocessing)
        _record(store, values)
        _generate(blender, store, asked, names, layout)
    return store


def _case_change(case: str, values: Mapping[str, Values], wanted: Generation, coding: AttributeCoding) -> CaseChange:
    drawn = [values[one.name] for one in wanted.interventions]
    others = torch.stack([coding.encode(each["after"]) for each in drawn])
    return CaseChange(case, coding.encode(drawn[0]["before"]), others, wanted.noise_seed(case))


def _generate(
    blender: SlidingWindowCounterfactuals, store: CounterfactualStore, asked: Mapping[str, CaseChange],
    names: Sequence[str],
    layout: Layout,
) -> None:
    """Cases that lack the same interventions are made together."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for case in asked:
        beat()
        shape = blender.reader.shape(case)
        lacking = tuple(k for k, name in enumerate(names) if not _is_current(store, case, name, shape))
        if lacking:
            groups.setdefault(lacking, []).append(case)
    total = sum(map(len, groups.values()))
    with tqdm(total=total, desc="generating counterfactuals", unit="case", disable=None) as bar:
        for lacking, cases in groups.items():
            jobs = (CaseChange(case, asked[case].parents, asked[case].others[list(lacking)], asked[case].noise_seed)
                    for case in cases)
            for case, slabs in groupby(_heard(blender.slabs(jobs)), attrgetter("case")):
                images = (slab.images.numpy() for slab in slabs)
                store.write_slabs(
                    case, [names[k] for k in lacking], blender.reader.shape(case), images, *layout(case))
                bar.update()


def _heard(slabs: Iterable[Slab]) -> Iterator[Slab]:
    # not case by case: on a CPU a large one may take longer than the watchdog waits
    for slab in slabs:
        beat()
        yield slab


def _is_current(store: CounterfactualStore, case: str, name: str, shape: Sequence[int]) -> bool:
    try:
        return store.path(case, name).exists() and store.shape(case, name) == tuple(shape)
    except UserError:
        return False


def _record(store: CounterfactualStore, values: Mapping[str, Mapping[str, Values]]) -> None:
    """Writes down the attributes of every counterfactual, and deletes those that were made with others."""
    file = store.folder / RECORD
    found = _read_record(file)
    for case, interventions in values.items():
        for name, each in interventions.items():
            if found.get(case, {}).get(name) != each:
                store.path(case, name).unlink(missing_ok=True)
    # the record may name files that are still to be made, but never describes one wrongly
    merged = {**found, **values}
    if merged != found:
        lines = ",\n".join(f"{json.dumps(case)}: {json.dumps(merged[case])}" for case in sorted(merged))
        write_text_atomically(file, f"{{\n{lines}\n}}\n")


def _read_record(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        content = read_json(file)
        if not isinstance(content, dict) or not all(isinstance(entry, dict) for entry in content.values()):
            raise ValueError("expected an object of objects")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not valid JSON ({error})", "delete it, and the counterfactuals beside it are made "
                        "again") from error


def _number(text: str) -> int:
    return int(digest(text), 16)
