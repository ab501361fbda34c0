"""The doctor's check of phase 3: is there a pool for the teacher to label?"""

from __future__ import annotations

from nnunet_cfcl.config import Settings
from nnunet_cfcl.data.pool.find_cases import POOL_IMAGES
from nnunet_cfcl.data.pool.manifest import pool_command, pool_folder, read_manifest
from nnunet_cfcl.errors import CheckResult
from nnunet_cfcl.nnunet import lookup
from nnunet_cfcl.phases.attributes_of_cases import known_attributes


def check_pool(settings: Settings, dataset: str, plans: str, configuration: str, block: dict[str, object]
               ) -> CheckResult:
    """Check the pool of a training with phase 3.

    Args:
        settings: the resolved settings.
        dataset: full name of the dataset.
        plans: identifier of the plan.
        configuration: name of the configuration.
        block: the configuration's block of the plan.
    """
    folder = lookup.preprocessed_folder(dataset, block)
    pool = read_manifest(pool_folder(folder))
    if pool is None or not pool.cases:
        fix = (f"put unlabelled images into nnUNet_raw/{dataset}/{POOL_IMAGES} and run "
               f"{pool_command(dataset, configuration, plans)}")
        if settings.teacher.enabled:
            return CheckResult("FAIL", "teacher.enabled is true, but there is no preprocessed pool to learn from", fix)
        return CheckResult("warn", "phase 3 will be skipped: there is no preprocessed pool to learn from", fix)
    known, name = known_attributes(folder.parent), settings.teacher.balance
    column = known.columns.get(name or "", {}) if known else {}
    values = sorted({column[case] for case in pool.cases if column.get(case)})
    drawn = f"drawn evenly over {name} ({', '.join(values)})" if values else "drawn alike"
    return CheckResult("ok", f"phase 3 learns from {len(pool.cases)} images of the pool, {drawn}")
