"""The doctor's checks that need no dataset: versions, torchvision, nnU-Net's folders, the trainer."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path

from nnunet_cfcl.errors import CheckResult, first_line, isolated

# from the oldest on, all that were tried do everything (docs/reference/compatibility.md); newer major versions may move
# what this package relies on
NNUNET_VERSIONS = ((2, 6), (3,))
TORCH_MENDED = "pip install --force-reinstall torch torchvision (one command, so that both come from the same place)"


def version_numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``"2.15.0+cu132"`` -> ``(2, 15, 0)``, ``"3.0rc1"`` -> ``(3, 0)``."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[:next((i for i, letter in enumerate(part) if not letter.isdigit()), len(part))]
        if digits:
            numbers.append(int(digits))
        if digits != part:
            break
    return tuple(numbers)


def check_nnunet() -> CheckResult:
    """The installed nnU-Net is of a supported version."""
    low, high = (".".join(map(str, version)) for version in NNUNET_VERSIONS)
    fix = f"pip install 'nnunetv2>={low},<{high}'"
    try:
        version = importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        return CheckResult("FAIL", "nnU-Net is not installed for this Python", fix)
    if not NNUNET_VERSIONS[0] <= version_numbers(version) < NNUNET_VERSIONS[1]:
        return CheckResult("FAIL", f"nnU-Net {version}, supported are {low} up to, not including, {high}", fix)
    return CheckResult("ok", f"nnU-Net {version}, Python {platform.python_version()}")


def check_torch() -> CheckResult:
    """torch and torchvision work together; nnU-Net's look-up of trainers imports both."""
    # a broken pair fails in many ways: ImportError, OSError from the loader, RuntimeError from an unknown operator
    with isolated() as errors:
        import torch
        import torchvision
        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    if errors:
        versions = " with ".join(f"{name} {_version_of(name)}" for name in ("torchvision", "torch"))
        return CheckResult("FAIL", f"{versions} does not work ({first_line(errors[0])})", TORCH_MENDED)
    what = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    builds = {version.partition("+")[2] for version in (str(torch.__version__), str(torchvision.__version__))}
    if len(builds) > 1:
        return CheckResult("warn", f"{what} are of different builds", TORCH_MENDED)
    return CheckResult("ok", what)


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def check_folders() -> Iterator[CheckResult]:
    """nnU-Net's three folders are named by environment variables, exist and are writable."""
    yield _check_folder("nnUNet_raw", "planning and preprocessing", is_needed=False, is_made_by_nnunet=False)
    yield _check_folder("nnUNet_preprocessed", "training", is_needed=True, is_made_by_nnunet=False)
    yield _check_folder("nnUNet_results", "training and prediction", is_needed=True, is_made_by_nnunet=True)


def _check_folder(variable: str, purpose: str, is_needed: bool, is_made_by_nnunet: bool) -> CheckResult:
    value = os.environ.get(variable)
    if not value:
        return CheckResult("FAIL" if is_needed else "warn", f"{variable} is not set, {purpose} needs it",
                       f"export {variable}=/path/to/{variable}")
    folder = Path(value)
    if not folder.is_dir():
        is_fatal = folder.exists() or (is_needed and not is_made_by_nnunet)
        return CheckResult("FAIL" if is_fatal else "warn", f"{variable}={value} is not an existing folder",
                       f"mkdir -p {value}, or export {variable}=/path/to/{variable}")
    if not os.access(folder, os.W_OK | os.X_OK):
        return CheckResult("FAIL" if is_needed else "warn", f"{variable}={value} is not writable", f"chmod u+w {value}")
    return CheckResult("ok", f"{variable}={value}")


def look_up_trainer(name: str) -> type | None:
    """nnU-Net's own look-up, silent; None if it finds nothing.

    Raises:
        AssertionError: the class found is no trainer.
    """
    from nnunet_cfcl.nnunet.versions import look_up

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return look_up(name)
