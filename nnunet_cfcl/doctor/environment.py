"""Checks of the installed packages: nnU-Net's version, torch and torchvision."""

from __future__ import annotations

import importlib.metadata
import platform

from nnunet_cfcl.errors import CheckResult, first_line, isolated
from nnunet_cfcl.nnunet.compatibility import NNUNET_VERSIONS, version_numbers

REINSTALL_TORCH = "pip install --force-reinstall torch torchvision (in one command, so that both builds match)"


def check_nnunet() -> CheckResult:
    """Check that the installed nnU-Net has a supported version."""
    low, high = (".".join(map(str, version)) for version in NNUNET_VERSIONS)
    fix = f"pip install 'nnunetv2>={low},<{high}'"
    try:
        version = importlib.metadata.version("nnunetv2")
    except importlib.metadata.PackageNotFoundError:
        return CheckResult("FAIL", "nnU-Net is not installed in this Python environment", fix)
    if not NNUNET_VERSIONS[0] <= version_numbers(version) < NNUNET_VERSIONS[1]:
        return CheckResult("FAIL", f"nnU-Net {version} is not supported, expected >={low},<{high}", fix)
    return CheckResult("ok", f"nnU-Net {version}, Python {platform.python_version()}")


def check_torch() -> CheckResult:
    """Check that torch and torchvision work together; nnU-Net's look-up of trainers imports both."""
    # a mismatched pair fails in many ways: ImportError, OSError from the loader, RuntimeError from an unknown operator
    with isolated() as errors:
        import torch
        import torchvision
        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    if errors:
        versions = " and ".join(f"{name} {_version_of(name)}" for name in ("torchvision", "torch"))
        return CheckResult("FAIL", f"{versions} do not work together ({first_line(errors[0])})", REINSTALL_TORCH)
    installed = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    builds = {version.partition("+")[2] for version in (str(torch.__version__), str(torchvision.__version__))}
    if len(builds) > 1:
        return CheckResult("warn", f"{installed} are different builds", REINSTALL_TORCH)
    return CheckResult("ok", installed)


def _version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
