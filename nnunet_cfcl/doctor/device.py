"""Checks of the device and of memory, by rough estimates of the memory required."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunet_cfcl.errors import CheckResult

GIB = 2**30


def check_device(device: str) -> CheckResult:
    """Check that PyTorch can use ``device`` (``cuda``, ``cpu`` or ``mps``)."""
    import torch

    if device == "cpu":
        return CheckResult("ok", f"device cpu, {os.cpu_count()} cores")
    is_available = torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()
    if not is_available:
        default = ", nnU-Net's default" if device == "cuda" else ""
        return CheckResult("FAIL", f"PyTorch finds no {device} device{default}",
                           "-device cpu (slow), or install the driver and a PyTorch built for it")
    return CheckResult("ok", f"device {torch.cuda.get_device_name(0)}" if device == "cuda" else f"device {device}")


def check_memory(device: str, training_need: float | None) -> Iterator[CheckResult]:
    """Compare free memory of the machine and of the GPU with a rough estimate of the memory required.

    Args:
        device: ``cuda``, ``cpu`` or ``mps``.
        training_need: GiB for network, gradients and activations of one nnU-Net step (see `training_gib`); None
            without a plan.
    """
    import torch

    # measured: nnU-Net's main process takes about 1.5 GiB beside the network, each of its workers 0.65
    need = 2.0 + 0.65 * worker_processes()
    if device == "cpu":
        need += 2 * (training_need or 0.0)  # single precision on a CPU, half precision on a GPU
    yield _compared("memory", free_memory_gib(), need, "export nnUNet_n_proc_DA=2 nnUNet_def_n_proc=2")
    if device == "cuda" and torch.cuda.is_available() and training_need is not None:
        yield _compared("GPU memory", torch.cuda.mem_get_info(0)[0] / GIB, training_need,
                        "stop other processes on the GPU, or plan with a smaller -gpu_memory_target")


def _compared(what: str, free: float | None, need: float, fix: str) -> CheckResult:
    if free is None:
        return CheckResult("warn", f"free {what} unknown, about {need:.1f} GiB required")
    text = f"{what}: {free:.1f} GiB free, about {need:.1f} GiB required"
    return CheckResult("ok", text) if free >= need else CheckResult("warn", text, fix)


def worker_processes() -> int:
    """Maximum number of nnU-Net's simultaneous worker processes: data loading in training, export afterwards."""
    from nnunetv2.configuration import default_num_processes
    from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

    return max(int(get_allowed_n_proc_DA()), int(default_num_processes))


def free_memory_gib() -> float | None:
    """GiB that this process may still allocate, limited by the machine and its control group; None if unknown."""
    free = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # not Linux, no control group, or one without a limit ("max")
    return min(free) / GIB if free else None


def training_gib(block: dict[str, Any], input_channels: int, output_channels: int) -> float:
    """Estimate the GiB of one training step as nnU-Net's planner does.

    The planner (``ExperimentPlanner``) counts feature map elements and equates 560 million for a batch of 2 volumes, or
    85 million for a batch of 12 images, with 8 GB.

    Args:
        block: configuration block of the plan.
        input_channels, output_channels: number of image channels and of segmentation heads.
    """
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    # the planner's own function fails if nnUNet_n_proc_DA is 0
    architecture = block["architecture"]
    network: Any = get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"],
        input_channels, output_channels, allow_init=False)
    elements = float(network.compute_conv_feature_map_size(tuple(block["patch_size"])))
    reference, batch = (85e6, 12) if len(block["patch_size"]) == 2 else (560e6, 2)
    return 8 * (elements / reference) * (block["batch_size"] / batch)
