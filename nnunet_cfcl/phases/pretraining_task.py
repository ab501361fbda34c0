"""Build the objective and the task of the pretraining loop from a fold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_cfcl.config import Reader, Settings, identity_settings
from nnunet_cfcl.counterfactual.choice import choose_source
from nnunet_cfcl.counterfactual.source import AcquisitionSource, CounterfactualSource, OriginalSource
from nnunet_cfcl.data.pretraining_cases import PretrainingCases, pretraining_cases
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.nnunet.plan import check_single_stage, fingerprint
from nnunet_cfcl.pretraining.loop import PretrainingTask
from nnunet_cfcl.pretraining.methods import Method, MethodContext
from nnunet_cfcl.pretraining.objective import Objective
from nnunet_cfcl.runs.ranks import Ranks


def build_objective(fold: FoldContext, method: Method) -> Objective:
    """Build the method's objective for the configuration and labels of a fold.

    Raises:
        ValueError: method and objective disagree about the tap, separability or labels.
    """
    objective = method.build(
        MethodContext(fold.settings, fold.geometry, len(fold.schemes), fold.labels.ignore_label, fold.loss))
    for name in ("tap", "separable", "needs_labels"):
        if getattr(method, name) != getattr(objective, name):
            raise ValueError(f"method {method.name} says {name} {getattr(method, name)!r}, its objective "
                             f"{getattr(objective, name)!r}: both must agree")
    return objective


def build_task(
    fold: FoldContext, method: Method, objective: Objective, ranks: Ranks, generated: CounterfactualSource | None = None
) -> PretrainingTask:
    """Build the pretraining task of a fold: cases, patch, device, compilation.

    Args:
        fold: the fold that is trained.
        method: the pretraining method.
        objective: the method's objective, from `build_objective`.
        ranks: the processes that share every step.
        generated: counterfactuals of a generator; None chooses another source by the settings.

    Raises:
        UserError: the configuration is a cascade's second stage, there are no suitable cases, or the counterfactuals do
            not match them.
    """
    settings, geometry = fold.settings, fold.geometry
    check_single_stage(fold.configuration_name, fold.configuration)
    reader = pretraining_cases(fold, settings, objective.needs_labels)
    source = OriginalSource() if not method.counterfactuals else generated or choose_source(
        settings, reader, fold.preprocessed, fold.schemes, len(geometry.patch_size))
    identity = _identity(fold, method, objective, reader, source.identity())
    return PretrainingTask(
        reader=reader,
        source=source,
        objective=objective,
        geometry=geometry,
        settings=settings,
        patches_per_pass=settings.pretrain.patches_per_pass or fold.configuration.batch_size,
        device=fold.device,
        workers=get_allowed_n_proc_DA(),
        folder=_folder(fold, identity),
        identity=identity,
        log=fold.log,
        checkpoints=fold.saves,
        compile=fold.compiled,
        ranks=ranks,
        ignore_label=fold.labels.ignore_label,
        track=fold.track,
    )


def _folder(fold: FoldContext, identity: dict[str, Any]) -> Path:
    """The folder of the pretraining: inside the fold, or beside the folds where all of them share one."""
    if fold.settings.pretrain.data == "pool":
        return fold.folder.parent / f"cfcl_pool_{digest(identity)}"
    return fold.folder / "cfcl" / "pretraining"


def _identity(
    fold: FoldContext, method: Method, objective: Objective, reader: PretrainingCases, source: dict[str, Any]
) -> dict[str, Any]:
    """Everything that determines the pretrained weights; a finished pretraining of equal digest is reused."""
    content: dict[str, Any] = {
        "objective": method.name,
        "settings": _identity_settings(fold.settings, method, source["source"]),
        "plan": fingerprint(fold.configuration),
        "cases": list(reader.cases),
        "images": reader.content(),
        "counterfactuals": source,
    }
    if objective.needs_labels:
        content["labels"] = {key: fold.dataset_json.get(key) for key in ("labels", "regions_class_order")}
    if objective.tap == "segmentation":
        content["deep_supervision"] = bool(fold.deep_supervision)
    return content


def _identity_settings(settings: Settings, method: Method, source: str) -> dict[str, Any]:
    """Select the settings that decide the pretrained weights; counterfactuals of a generator or a store describe
    themselves."""
    acquisition: tuple[Reader, ...] = ("acquisition",) if AcquisitionSource.name in source else ()
    return identity_settings(settings, *method.reads, *acquisition)
