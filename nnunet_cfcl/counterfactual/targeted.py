"""Counterfactuals of a generated store that change one attribute to a given value."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from nnunet_cfcl.counterfactual.generator.generation import RECORD
from nnunet_cfcl.counterfactual.store import CounterfactualStore
from nnunet_cfcl.data.reader import require_finite
from nnunet_cfcl.files.lenient_json import read_json_object
from nnunet_cfcl.views.crop_box import CropBox, read_crop


class TargetedCounterfactuals:
    """The counterfactuals of a store after which ``attribute`` is ``value`` and all other attributes are unchanged.

    Args:
        store: a store with a record of the changed attributes, as the generator writes it.
        attribute: name of the attribute.
        value: its value after the intervention.
    """

    def __init__(self, store: CounterfactualStore, attribute: str, value: str) -> None:
        self._store, self._attribute, self._value = store, attribute, value
        self._interventions = {case: name for case, each in read_json_object(store.folder / RECORD, []).items()
                               for name in store.interventions if self._fits(each.get(name))}

    def __len__(self) -> int:
        """Number of cases that have one."""
        return len(self._interventions)

    def identity(self) -> dict[str, Any]:
        """Attribute and value; the store is part of the source's identity."""
        return {"attribute": self._attribute, "value": self._value}

    def read(self, case: str, box: CropBox) -> Tensor | None:
        """(C, *crop) of the case's counterfactual; None without one.

        Raises:
            UserError: its file is missing, damaged or not finite.
        """
        name = self._interventions.get(case)
        return None if name is None else read_crop(box, partial(self._read, case, name))

    def _read(self, case: str, name: str, box: tuple[slice, ...]) -> Any:
        part = self._store.read(case, name, box)
        require_finite(part, f"counterfactual '{name}' of case '{case}'", box)
        return part

    def _fits(self, record: Mapping[str, Mapping[str, str]] | None) -> bool:
        if record is None:
            return False
        before, after = record["before"], record["after"]
        changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        return changed == {self._attribute} and after.get(self._attribute) == self._value
