"""Frozen features of the last decoder map at drawn voxels, and label maps of a linear probe for whole images."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_cfcl.chromap.nnunet.sampling import features_at
from nnunet_cfcl.counterfactual.source import CounterfactualSource
from nnunet_cfcl.data.cases import PreprocessedCases
from nnunet_cfcl.evaluation.probe.set import ProbePatch
from nnunet_cfcl.nnunet.decoder_tap import last_decoder_map
from nnunet_cfcl.runs.seeds import generator_for

#: Lower bound of log-probabilities, so that their weighted sums fit in nnU-Net's half precision.
LOWEST = -100.0
#: Part of the seed: counterfactuals.
COUNTERFACTUALS = 3


@dataclass(frozen=True)
class Counterfactuals:
    """One counterfactual per patch, independent of the order of the calls.

    Attributes:
        source: source of the counterfactuals.
        spacing: (D,) spacing of the plan in mm.
        seed: seed of the interventions.
    """

    source: CounterfactualSource
    spacing: tuple[float, ...]
    seed: int

    def __call__(self, patch: ProbePatch, image: Tensor) -> Tensor:
        """Generate the counterfactual of a patch (C, *patch)."""
        random = generator_for(self.seed, COUNTERFACTUALS, patch.number)
        drawn = self.source.draw(random, patch.case, patch.box, 1)
        return self.source.apply(image[None], drawn, self.spacing)[0]


@dataclass(frozen=True)
class SampledFeatures:
    """Features at drawn voxels.

    Attributes:
        features: (N, F) float64.
        moved: (N, F) features of the same voxels in the counterfactual; empty without counterfactuals.
        labels: (N,).
        cases: (N,) names of the cases.
    """

    features: NDArray[np.float64]
    moved: NDArray[np.float64]
    labels: NDArray[np.int16]
    cases: NDArray[np.str_]


def read_features(
    network: nn.Module, reader: PreprocessedCases, patches: Sequence[ProbePatch], device: torch.device,
    change: Callable[[ProbePatch, Tensor], Tensor] | None = None, what: str = "features",
) -> SampledFeatures:
    """Compute the features at the voxels of patches, one patch at a time.

    Args:
        network: network of nnU-Net on ``device``; its state is restored afterwards.
        reader: reader of the cases.
        patches: patches with their drawn voxels.
        device: cpu, cuda or mps.
        change: generates the counterfactual of a patch, whose features are computed too.
        what: title of the progress bar.

    Raises:
        UserError: the network has no decoder that can be tapped.
    """
    found = []
    with _evaluation_mode(network), last_decoder_map(network) as features, torch.inference_mode():
        for patch in tqdm(patches, desc=what, unit="patch", disable=None):
            image = patch.box.pad(reader.read(patch.case, patch.box.inside))
            images = torch.stack([image] if change is None else [image, change(patch, image)])
            found.append(features_at(features, images, patch.inside, patch.voxels, device))
    joined = torch.cat(found, 1).double().numpy()
    counts = [len(patch.voxels) for patch in patches]
    return SampledFeatures(
        joined[0], joined[1] if change is not None else joined[0, :0],
        np.concatenate([patch.labels for patch in patches]), np.repeat([patch.case for patch in patches], counts))


class ProbeLayer(nn.Module):
    """Linear probe as a segmentation layer: (N, F, *patch) -> log-probabilities (N, K, *patch) in single precision.

    Normalisation shifts all classes of a voxel by the same value, so that blending windows of log-probabilities gives
    the same class as blending features.

    Args:
        weight: (K, F).
        bias: (K,).
        dim: number of image axes, 2 or 3.
    """

    def __init__(self, weight: NDArray[np.float64], bias: NDArray[np.float64], dim: int) -> None:
        super().__init__()
        classes, width = weight.shape
        self.layer = (nn.Conv2d if dim == 2 else nn.Conv3d)(width, classes, 1)
        self.layer.load_state_dict({"weight": torch.from_numpy(weight).view_as(self.layer.weight),
                                    "bias": torch.from_numpy(bias)})

    def forward(self, features: Tensor) -> Tensor:
        """Compute log-probabilities (N, K, *patch)."""
        # a channel of low variance has weights beyond half precision
        with torch.autocast("cuda", enabled=False):
            scores: Tensor = self.layer(features.float())
        return scores.log_softmax(1).clamp_min(LOWEST)


@contextmanager
def dense_probe(
    network: nn.Module, weight: NDArray[np.float64], bias: NDArray[np.float64], configuration: Any,
    device: torch.device, step: float = 0.5,
) -> Iterator[Callable[[NDArray[np.float32]], NDArray[np.integer]]]:
    """Put a linear probe in the place of the segmentation layer and predict with nnU-Net's sliding window.

    Memory and time are those of a prediction of nnU-Net without mirroring.

    Args:
        network: network of nnU-Net; its state is restored afterwards.
        weight: (K, F) weights of the probe.
        bias: (K,) biases of the probe.
        configuration: configuration of the plan.
        device: cpu, cuda or mps.
        step: step of the sliding window relative to the patch.

    Yields:
        A function from a preprocessed image (C, Z, Y, X) to the index of the predicted class (Z, Y, X).
    """
    with redirect_stdout(io.StringIO()):  # on a CPU the predictor prints an explanation
        predictor = nnUNetPredictor(tile_step_size=step, use_mirroring=False, device=device, allow_tqdm=False,
                                    perform_everything_on_device=device.type == "cuda")
    predictor.configuration_manager = configuration
    # the only attribute that the sliding window reads
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=len(bias))
    layer = ProbeLayer(weight, bias, len(configuration.patch_size)).to(device)
    with _evaluation_mode(network), last_decoder_map(network, layer) as predictor.network:

        def predict(image: NDArray[np.float32]) -> NDArray[np.integer]:
            scores = predictor.predict_sliding_window_return_logits(torch.from_numpy(image))
            return np.asarray(scores.argmax(0).cpu().numpy())

        yield predict


@contextmanager
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode and restore the previous mode."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
