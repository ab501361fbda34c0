"""Time and accuracy of the minimum area ellipse around 200,000 points, with scipy's convex hull as the reference.

    OMP_NUM_THREADS=1 python benchmarks/chromap_ellipse.py --out RESULTS

A run writes ``chromap_ellipse.json`` into RESULTS. Every round times ellipse and hull one after the other, so that a
busy machine slows both; the result is the median CPU time of the rounds. The area is compared with that of a run at a
tolerance of 1e-12.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import ConvexHull

from nnunet_cfcl.chromap.ellipse import minimum_volume_enclosing_ellipse

sys.path.insert(0, str(Path(__file__).resolve().parent))
from pretraining_setup import write_result

Array = NDArray[np.float64]


def clouds(count: int) -> dict[str, Array]:
    """Draw point sets (count, 2); every point of the exact ring is a corner of its hull."""
    random = np.random.default_rng(0)
    angles, gaussian = random.uniform(0, 2 * np.pi, count), random.normal(size=(count, 2))
    ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    clusters = 8 * random.normal(size=(30, 2))[random.integers(30, size=count)] + gaussian
    return {"gaussian": gaussian, "ring": ring * (1 + 0.02 * gaussian[:, :1]), "exact_ring": ring,
            "clusters": clusters, "disc": ring * np.sqrt(random.uniform(size=(count, 1)))}


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def area(points: Array, **settings: float) -> float:
    """In units of pi."""
    return float(np.linalg.det(minimum_volume_enclosing_ellipse(points, **settings)[1]) ** -0.5)


def measure(points: Array, coverage: float, rounds: int) -> dict[str, float]:
    """One row of the result."""
    rows = [(_seconds(lambda: minimum_volume_enclosing_ellipse(points)), _seconds(lambda: ConvexHull(points)),
             _seconds(lambda: minimum_volume_enclosing_ellipse(points, coverage))) for _ in range(rounds)]
    full, hull, trimmed = (statistics.median(column) for column in zip(*rows, strict=True))
    return {"seconds": full, "hull_seconds": hull, "hulls": statistics.median(row[0] / row[1] for row in rows),
            "trimmed_seconds": trimmed, "area_above_the_least": area(points) / area(points, tolerance=1e-12) - 1,
            "area_trimmed": area(points, coverage=coverage) / area(points)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"), help="folder of the results")
    parser.add_argument("--points", type=int, default=200_000)
    parser.add_argument("--coverage", type=float, default=0.99, help="of the trimmed ellipse")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"points": arguments.points, "coverage": arguments.coverage, "rounds": arguments.rounds}
    for name, points in clouds(arguments.points).items():
        result[name] = measure(points, arguments.coverage, arguments.rounds)
    write_result(arguments.out, "chromap_ellipse", result)


if __name__ == "__main__":
    main()
