"""Launch configurations of the Triton kernels: tile sizes, warps, pipeline stages, rounding of products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

Precision: TypeAlias = Literal["tf32", "tf32x3"]


@dataclass(frozen=True)
class Launch:
    """Launch configuration of a kernel.

    Args:
        rows: rows of a tile.
        columns: columns of a tile.
        warps: warps that compute a tile.
        stages: stages of the software pipeline.
        precision: TF32 products, or three of them for one product of float32 accuracy.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    precision: Precision


def candidate_tiles(device: torch.device, precision: Precision) -> Sequence[tuple[int, int, int, int]]:
    """List rows, columns, warps and stages to try on a GPU, best first.

    The larger a tile, the fewer times columns are read. At a width of 128 the compiler keeps all of these in registers;
    launching fails where shared memory is too small.
    """
    major, _ = torch.cuda.get_device_capability(device)
    if precision == "tf32x3":
        return [(128, 32, 8, 3)] if major == 9 else []
    large = [(128, 64, 8, 3)] if major in (9, 10) else []
    return [*large, (64, 64, 4, 2), (64, 32, 4, 1)] if major >= 8 else []
