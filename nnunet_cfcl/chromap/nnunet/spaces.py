"""Colour space of a model: fitted when it was trained, or on the images to predict."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_cfcl.chromap.color_space import ColorSpace
from nnunet_cfcl.chromap.nnunet.sampling import PreprocessedCase, sample_features
from nnunet_cfcl.config import ChromapSettings
from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.decoder_tap import decoder_width, plain_network
from nnunet_cfcl.nnunet.fold import FoldContext

FILE = "chromap_space.npz"


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """First 12 hexadecimal digits of the SHA-256 of a network's parameters: a colour space belongs to its weights."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.view(-1).view(torch.uint8).numpy().data if values.numel() else b"")
    return digest.hexdigest()[:12]


def fit(features: Tensor, settings: ChromapSettings, seed: int, identity: str) -> ColorSpace:
    """Fit the colour space of features (N, F) with the settings."""
    return ColorSpace.fit(
        features, seed, reducer=settings.reducer, components=settings.components, landmarks=settings.landmarks,
        coverage=settings.coverage, palette=settings.palette, identity=identity)


def load_named(file: Path, network: nn.Module, identity: str) -> ColorSpace:
    """Load the colour space that the user names.

    Raises:
        UserError: the file is missing, or belongs to another model.
    """
    if not file.is_file():
        raise UserError(f"there is no colour space {file}", f"--space fold_F/cfcl/{FILE}, which the training writes")
    space = ColorSpace.load(file)
    width = decoder_width(network)
    if space.features != width or space.identity != identity:
        raise UserError(
            f"{file} is the colour space of another model: it was fitted on {space.features} features of weights "
            f"{space.identity or 'unknown'}, these are {width} features of weights {identity}", "leave --space out to "
            "use the model's own")
    return space


def load_own(file: Path, identity: str) -> ColorSpace | None:
    """Load the colour space of a model or of earlier maps; None where there is none of these weights. A damaged file is
    reported and counts as missing."""
    if not file.is_file():
        return None
    try:
        space = ColorSpace.load(file)
    except UserError as error:
        print(f"{error}; until then it counts as missing")
        return None
    return space if space.identity == identity else None


def fit_after_training(fold: FoldContext, network: nn.Module) -> Path:
    """Fit the colour space of a trained fold on its training cases and write it to ``fold_F/cfcl/``.

    Args:
        fold: the fold that was trained.
        network: the trained network, as nnU-Net has it (it may be wrapped or compiled).

    Returns:
        The file written.
    """
    settings, seed = fold.settings.chromap, fold.settings.seed
    training, _ = fold.split()
    reader = PreprocessedCases(str(fold.preprocessed), list(training))
    cases = evenly(reader.cases, settings.cases)
    plain = plain_network(network)
    features = sample_features(
        plain, (PreprocessedCase(reader, name, fold.labels.ignore_label) for name in cases), len(cases),
        fold.configuration.patch_size, settings.samples, seed, fold.device,
        show_progress=False)
    file = fold.folder / "cfcl" / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    fit(features, settings, seed, weights_digest(plain.state_dict())).save(file)
    return file


def evenly(names: Sequence[Any], count: int) -> list[Any]:
    """Choose at most ``count`` of the names, at equal distances."""
    return [names[int(place)] for place in np.linspace(0, len(names) - 1, min(count, len(names)))] if names else []
