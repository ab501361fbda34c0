"""Scan of every preprocessed case for unreadable files and unusable intensities."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_cfcl.errors import CheckResult, isolated
from nnunet_cfcl.nnunet.lookup import preprocessed_cases


def scan_cases(folder: Path, preprocess: str) -> Iterator[CheckResult]:
    """Read all preprocessed cases of ``folder``, one channel at a time, with a progress bar on stderr.

    Args:
        folder: folder of the preprocessed cases of one configuration.
        preprocess: command that preprocesses them again, for the fix.

    Yields:
        One result per faulty case, and a summary.

    Raises:
        UserError: there are no preprocessed cases.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
    from tqdm import tqdm

    names = sorted(preprocessed_cases(folder, preprocess))
    dataset = infer_dataset_class(str(folder))(str(folder), names)
    failed = 0
    for name in tqdm(names, desc="scanning cases", unit="case", leave=False, disable=None):
        for result in _scan_case(dataset, name, preprocess):
            failed += result.status == "FAIL"
            yield result
    yield CheckResult("FAIL" if failed else "ok", f"{len(names)} cases scanned, {failed} failed")


def _scan_case(dataset: Any, name: str, preprocess: str) -> Iterator[CheckResult]:
    fix = f"correct its image in nnUNet_raw and run {preprocess}, or remove the case from splits_final.json"
    with isolated() as errors:
        image = dataset.load_case(name)[0]
        faults = [channel_fault(np.asarray(image[channel])) for channel in range(image.shape[0])]
    if errors:
        yield CheckResult("FAIL", f"case {name} cannot be read ({type(errors[0]).__name__}: {errors[0]})", fix)
    elif any(fault and "not finite" in fault for fault in faults):
        yield CheckResult("FAIL", f"case {name}: {_by_channel(faults)}", fix)
    elif all(faults):
        yield CheckResult("FAIL", f"case {name} has no contrast: {_by_channel(faults)}", fix)
    elif any(faults):
        yield CheckResult("warn", f"case {name}: {_by_channel(faults)}", "check its image in nnUNet_raw")


def channel_fault(channel: np.ndarray) -> str | None:
    """Describe the fault of one channel (any shape) of a preprocessed image; None if there is none."""
    if not channel.size:
        return "has no voxels"
    low, high = channel.min(), channel.max()
    # minimum and maximum are NaN as soon as one voxel is: valid channels are read only twice
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"has {np.count_nonzero(~np.isfinite(channel))} voxels that are not finite (NaN or infinite)"
    return f"is constant at {low:g}" if low == high else None


def _by_channel(faults: list[str | None]) -> str:
    return ", ".join(f"channel {channel} {fault}" for channel, fault in enumerate(faults) if fault)
