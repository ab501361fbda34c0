"""Extension of a colour space to new points against UMAP's own `transform`: time and trustworthiness.

    python benchmarks/chromap_extension.py --out RESULTS

A colour space is fitted on features of six tissues, each a curved manifold of two or three dimensions in 32 channels,
with mixtures of two tissues and noise. The same number of new points is placed both by the colour space (`reduce` and
`place`) and by `umap.UMAP.transform` of a UMAP of the same landmarks, which gives the same plane. ``--full`` adds a
UMAP of all samples, as in the paper, which takes many minutes. numba compiles everything before the timing. Times are
CPU times of the process over all threads; that of the colour space is the least of several runs.

Trustworthiness (Venna and Kaski 2001) measures whether the nearest neighbours in the plane are near in the standardised
features, on the same subsample of points for all methods.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pretraining_setup import write_result

from nnunet_cfcl.chromap.color_space import ColorSpace
from nnunet_cfcl.chromap.fitting import UMAP_MIN_DISTANCE, UMAP_NEIGHBOURS

CHANNELS, TISSUES, FREQUENCIES = 32, 6, 12
MIXED, NOISE = 0.15, 0.15
SUBSAMPLE, TRUSTED = 4000, 15
LEAST_RATIO, LARGEST_LOSS = 20.0, 0.02

Array = NDArray[Any]


def tissue_features(count: int, seed: int) -> Array:
    """Draw features (count, 32) float32; the manifolds are the same for every seed."""
    shape, draw = np.random.default_rng(0), np.random.default_rng(seed)
    tissue, features = draw.integers(TISSUES, size=count), np.zeros((count, CHANNELS))
    for number in range(TISSUES):
        dimensions = 2 + number % 2
        centre = 2.5 * shape.normal(size=CHANNELS)
        waves = 1.5 * shape.normal(size=(dimensions, FREQUENCIES))
        loadings = 1.5 * shape.normal(size=(2 * FREQUENCIES, CHANNELS)) / np.sqrt(2 * FREQUENCIES)
        own = tissue == number
        phases = draw.uniform(-1, 1, (own.sum(), dimensions)) @ waves
        features[own] = centre + np.concatenate([np.sin(phases), np.cos(phases)], 1) @ loadings
    # voxels at borders are a mixture of two tissues
    share = np.where(draw.random(count) < MIXED, draw.random(count), 1)[:, None]
    features = share * features + (1 - share) * features[draw.permutation(count)]
    return (features + NOISE * draw.normal(size=features.shape)).astype(np.float32)


def seconds(work: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Measure the least CPU time of several runs, and return the result."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        result = work()
        taken.append(time.process_time() - start)
    return min(taken), result


def fitted_umap(samples: Array) -> Any:
    """Fit UMAP with the settings of `ColorSpace.fit`, on reduced features (N, k)."""
    from umap import UMAP

    start = samples[:, :2]
    model = UMAP(n_neighbors=UMAP_NEIGHBOURS, min_dist=UMAP_MIN_DISTANCE, init=start, random_state=0, n_jobs=1)
    return model.fit(samples)


def reference(samples: Array, reduced: Array, trust: Callable[[Array], float], own: dict[str, float]) -> dict[str, Any]:
    """Place ``reduced`` with a UMAP of ``samples``, and compare with the results of the colour space."""
    fit_seconds, model = seconds(lambda: fitted_umap(samples))
    taken, plane = seconds(lambda: model.transform(reduced))
    trusted = trust(plane)
    ratio, loss = taken / own["seconds"], trusted - own["trustworthiness"]
    return {"samples": len(samples), "fit_seconds": fit_seconds, "seconds": taken, "trustworthiness": trusted,
            "times_slower": ratio, "trust_lost_by_extension": loss,
            "passed": bool(ratio >= LEAST_RATIO and loss <= LARGEST_LOSS)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole result."""
    from sklearn.manifold import trustworthiness

    train, test = (tissue_features(arguments.points, seed) for seed in (1, 2))
    warm = np.random.default_rng(0).normal(size=(300, arguments.components)).astype(np.float32)
    fitted_umap(warm).transform(warm[::2] + 0.1)
    chosen = np.random.default_rng(0).choice(len(test), min(SUBSAMPLE, len(test)), replace=False)
    standard = ((test - train.mean(0)) / train.std(0))[chosen]

    def trust(plane: Array) -> float:
        return float(trustworthiness(standard, plane[chosen], n_neighbors=TRUSTED))

    fit_seconds, space = seconds(lambda: ColorSpace.fit(
        train, components=arguments.components, landmarks=arguments.landmarks))
    channels = torch.from_numpy(test).T.contiguous()
    taken, places = seconds(lambda: space.place(space.reduce(channels)).T.numpy(), repeats=7)
    own = {"seconds": taken, "microseconds_per_point": 1e6 * taken / len(test), "fit_seconds": fit_seconds,
           "trustworthiness": trust(places)}
    result: dict[str, Any] = {
        "points": len(test), "landmarks": len(space.landmarks), "components": space.components,
        "neighbours": space.neighbours, "torch": torch.__version__, "threads": arguments.threads, "extension": own}
    fitted_on = {"umap_of_landmarks": space.landmarks}
    if arguments.full:
        fitted_on["umap_of_all"] = space.reduce(torch.from_numpy(train).T).T.contiguous()
    reduced = space.reduce(channels).T.contiguous().numpy()
    for name, samples in fitted_on.items():
        result[name] = reference(samples.numpy(), reduced, trust, own)
        # written before the long part of the run
        write_result(arguments.out, "chromap_extension", result)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"), help="folder of the result")
    parser.add_argument("--points", type=int, default=100_000, help="fitted on, and as many others placed")
    parser.add_argument("--landmarks", type=int, default=2000)
    parser.add_argument("--components", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    parser.add_argument("--full", action="store_true", help="also a UMAP of all samples")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", module="umap")
    result = measure(arguments)
    failed = [name for name, part in result.items() if isinstance(part, dict) and not part.get("passed", True)]
    if failed:
        raise SystemExit(f"speed ratio below {LEAST_RATIO:g} or trustworthiness lower by over {LARGEST_LOSS}: {failed}")


if __name__ == "__main__":
    main()
