"""Generate the counterfactuals of all cases into a store."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
#: File beside the manifest: {case: {intervention: {"before": {attribute: value}, "after": {attribute: value}}}};
#: attributes of unknown value are left out.
RECORD = "attributes.json"

#: Case -> chunks and blocks of its own file, for counterfactuals that are read as fast.
Layout = Callable[[str], tuple[Sequence[int] | None, Sequence[int] | None]]
Values = Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class Generation:
    """Everything that determines the counterfactuals in a store, apart from the images and attributes of each case.

    Attributes:
        generator: digest of the generator's identity.
        interventions: interventions on every case.
        seed: seed of the new values and of the posterior's samples.
        abduction: see `config.CounterfactualSettings`.
        preprocessing: hash of the preprocessing of the cases.
    """

    generator: str
    interventions: tuple[Intervention, ...]
    seed: int = 0
    abduction: Literal["mean", "sample"] = "mean"
    preprocessing: str = ""

    @property
    def source(self) -> str:
        """Entry ``source`` of the store's manifest."""
        return f"{GENERATED}{self.generator}, abduction: {self.abduction}, seed {self.seed}"

    def folder(self, preprocessed_folder: str | os.PathLike[str]) -> Path:
        """Folder of the store, which need not exist; independent of the order of the interventions."""
        changed = sorted((one.name, [asdict(attribute) for attribute in one.attributes], one.targets)
                         for one in self.interventions)
        content = [FORMAT, self.generator, changed, self.seed, self.abduction, self.preprocessing]
        return default_store_root(preprocessed_folder) / digest(content)

    def values(self, case: str, cells: Cells, coding: AttributeCoding) -> dict[str, Values]:
        """Map every intervention to the known attributes of a case "before" and "after" it.

        New values depend on the seed, the names of case and intervention, and the changed attributes' own values.
        """
        before = {one.name: cell for one in coding.attributes if not is_missing(cell := cells.get(one.name, ""))}
        drawn = {one.name: one.draw(generator_for(self.seed, _number(case), _number(one.name)), before)
                 for one in self.interventions}
        return {name: {"before": before, "after": {**before, **new}} for name, new in drawn.items()}

    def noise_seed(self, case: str) -> int | None:
        """Seed of the posterior's sample, from seed and name of the case only; None for the posterior's mean."""
        return generator_for(self.seed, _number(case)).initial_seed() if self.abduction == "sample" else None


def generate_counterfactuals(
    counterfactuals: SlidingWindowCounterfactuals,
    cells: Mapping[str, Cells],
    wanted: Generation,
    preprocessed_folder: str | os.PathLike[str],
    log: Callable[[str], None],
    layout: Layout = lambda case: (None, None),
) -> CounterfactualStore:
    """Generate every intervention on every case of the reader into a store; existing counterfactuals are kept.

    A stopped run is resumed, and new cases are added. A file is generated again if the shape or the attributes of its
    case changed. Of two concurrent runs one waits for the other and finds its files.

    Args:
        counterfactuals: computes the counterfactuals of the cases in sliding windows.
        cells: case -> attribute -> value; a missing case has no attributes and may get any new value.
        wanted: interventions, generator and seed.
        preprocessed_folder: nnUNet_preprocessed/DATASET/<data_identifier>; the store lies beside it.
        log: logger of a concurrent run that holds the store.
        layout: chunks and blocks of a case's own file; None lets blosc2 choose.

    Raises:
        UserError: an attribute value is unknown to the generator, a case or counterfactual is not finite, or the folder
            holds another store.
    """
    coding, cases = counterfactuals.generator.coding, counterfactuals.reader.cases
    values = {case: wanted.values(case, cells.get(case, {}), coding) for case in cases}
    changes = {case: _case_change(case, values[case], wanted, coding) for case in cases}
    folder, names = wanted.folder(preprocessed_folder), [one.name for one in wanted.interventions]
    with exclusive(folder, log), watched("generating counterfactuals", log):
        store = CounterfactualStore.create(
            folder, names, wanted.source, Path(preprocessed_folder).name, wanted.preprocessing)
        _record(store, values)
        _generate(counterfactuals, store, changes, names, layout)
    return store


def _case_change(case: str, values: Mapping[str, Values], wanted: Generation, coding: AttributeCoding) -> CaseChange:
    drawn = [values[one.name] for one in wanted.interventions]
    others = torch.stack([coding.encode(each["after"]) for each in drawn])
    return CaseChange(case, coding.encode(drawn[0]["before"]), others, wanted.noise_seed(case))


def _generate(
    counterfactuals: SlidingWindowCounterfactuals, store: CounterfactualStore, changes: Mapping[str, CaseChange],
    names: Sequence[str], layout: Layout,
) -> None:
    """Generate the missing counterfactuals; cases that lack the same interventions are processed together."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for case in changes:
        beat()
        shape = counterfactuals.reader.shape(case)
        lacking = tuple(k for k, name in enumerate(names) if not _is_current(store, case, name, shape))
        if lacking:
            groups.setdefault(lacking, []).append(case)
    total = sum(map(len, groups.values()))
    with tqdm(total=total, desc="generating counterfactuals", unit="case", disable=None) as bar:
        for lacking, cases in groups.items():
            jobs = (replace(changes[case], others=changes[case].others[list(lacking)]) for case in cases)
            for case, slabs in groupby(_with_heartbeat(counterfactuals.slabs(jobs)), attrgetter("case")):
                images = (slab.images.numpy() for slab in slabs)
                store.write_slabs(
                    case, [names[k] for k in lacking], counterfactuals.reader.shape(case), images, *layout(case))
                bar.update()


def _with_heartbeat(slabs: Iterable[Slab]) -> Iterator[Slab]:
    # not case by case: on a CPU a large case may exceed the watchdog's limit
    for slab in slabs:
        beat()
        yield slab


def _is_current(store: CounterfactualStore, case: str, name: str, shape: Sequence[int]) -> bool:
    try:
        return store.path(case, name).exists() and store.shape(case, name) == tuple(shape)
    except UserError:
        return False


def _record(store: CounterfactualStore, values: Mapping[str, Mapping[str, Values]]) -> None:
    """Record the attributes of every counterfactual and delete files generated with other attributes."""
    file = store.folder / RECORD
    found = _read_record(file)
    for case, interventions in values.items():
        for name, each in interventions.items():
            if found.get(case, {}).get(name) != each:
                store.path(case, name).unlink(missing_ok=True)
    # the record may list files that do not exist yet, but never describes an existing file wrongly
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
        raise UserError(f"{file} is not valid JSON ({error})",
                        "delete it; the counterfactuals beside it are then generated again") from error


def _number(text: str) -> int:
    return int(digest(text), 16)
