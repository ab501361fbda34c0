"""Features of Gaussian classes."""

import numpy as np


def gaussians(means, counts, sd=1.0, seed=0):
    """Draw features around the class means (K, F) and their labels 0, 1, ..., with ``counts`` voxels per class."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(means)), counts)
    return np.asarray(means, float)[labels] + sd * random.normal(size=(len(labels), len(means[0]))), labels
