"""The doctor's scan of every preprocessed case for intensities that spoil a training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_cfcl.errors import CheckResult
from nnunet_cfcl.nnunet.lookup import preprocessed_cases


def scan_cases(folder: Path, preprocess: str) -> Iterator[CheckResult]:
    """Reads all preprocessed cases of ``folder``, one channel at a time, with a progress bar on stderr.

    Args:
        folder: preprocessed cases of one configuration.
        preprocess: the command that preprocesses them again.

    Yields:
        One finding per bad case, at last one that counts them.

    Raises:
        UserError: there are no preprocessed cases.
    """
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
    from tqdm import tqdm

    names = sorted(preprocessed_cases(folder, preprocess))
    dataset = infer_dataset_class(str(folder))(str(folder), names)
    bad = 0
    for name in tqdm(names, desc="scanning cases", unit="case", leave=False, disable=None):
        for finding in _scan_case(dataset, name, preprocess):
            bad += finding.status == "FAIL"
            yield finding
    yield CheckResult("FAIL" if bad else "ok", f"{len(names)} cases scanned, {bad} bad")


def _scan_case(dataset: Any, name: str, preprocess: str) -> Iterator[CheckResult]:
    fix = f"fix its image in nnUNet_raw and run {preprocess}, or take it out of splits_final.json"
    try:
        image = dataset.load_case(name)[0]
        faults = [channel_fault(np.asarray(image[channel])) for channel in range(image.shape[0])]
    # whatever a damaged file raises, the scan goes on and names it
    except Exception as error:
        yield CheckResult("FAIL", f"case {name} cannot be read ({type(error).__name__}: {error})", fix)
        return
    if any(fault and "not finite" in fault for fault in faults):
        yield CheckResult("FAIL", f"case {name}: {_by_channel(faults)}", fix)
    elif all(faults):
        yield CheckResult("FAIL", f"case {name} is constant: {_by_channel(faults)}", fix)
    elif any(faults):
        yield CheckResult("warn", f"case {name}: {_by_channel(faults)}", "look at its image in nnUNet_raw")


def channel_fault(channel: np.ndarray) -> str | None:
    """What is wrong with one channel (any shape) of a preprocessed image; None if nothing is."""
    if not channel.size:
        return "no voxels"
    low, high = channel.min(), channel.max()
    # minimum and maximum are NaN as soon as one voxel is, so that good channels are read twice only
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"{np.count_nonzero(~np.isfinite(channel))} voxels not finite (NaN or infinite)"
    return f"constant at {low:g}" if low == high else None


def _by_channel(faults: list[str | None]) -> str:
    return ", ".join(f"channel {channel} {fault}" for channel, fault in enumerate(faults) if fault)
