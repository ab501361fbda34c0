"""Frozen features of a network's last decoder map at drawn voxels, and a linear probe's label map of a whole image."""

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

#: Log-probabilities are cut off below, so that their weighted sums fit in nnU-Net's half precision.
LOWEST = -100.0
#: Part of the seed: counterfactuals.
COUNTERFACTUALS = 3


@dataclass(frozen=True)
class Counterfactuals:
    """One counterfactual of every patch, the same whatever was asked before.

    Attributes:
        source: what makes them.
        spacing: (D,) of the plan in mm.
        seed: of what is drawn.
    """

    source: CounterfactualSource
    spacing: tuple[float, ...]
    seed: int

    def __call__(self, patch: ProbePatch, image: Tensor) -> Tensor:
        """The counterfactual of a patch (C, *patch)."""
        random = generator_for(self.seed, COUNTERFACTUALS, patch.number)
        drawn = self.source.draw(random, patch.case, patch.box, 1)
        return self.source.apply(image[None], drawn, self.spacing)[0]


@dataclass(frozen=True)
class SampledFeatures:
    """Features at drawn voxels.

    Attributes:
        features: (N, F) float64.
        moved: (N, F) of the same voxels in the counterfactual; empty where none was asked for.
        labels: (N,).
        cases: (N,) names.
    """

    features: NDArray[np.float64]
    moved: NDArray[np.float64]
    labels: NDArray[np.int16]
    cases: NDArray[np.str_]


def read_features(
    network: nn.Module, reader: PreprocessedCases, patches: Sequence[ProbePatch], device: torch.device,
    change: Callable[[ProbePatch, Tensor], Tensor] | None = None, what: str = "features",
) -> SampledFeatures:
    """Features at the voxels of patches, read one patch at a time.

    Args:
        network: nnU-Net's, on ``device``; it is left as it was.
        reader: of the cases.
        patches: with their voxels.
        device: cpu, cuda or mps.
        change: gives a patch's counterfactual, whose features are read too.
        what: title of the bar.

    Raises:
        UserError: the network has no decoder of nnU-Net's kind.
    """
    found = []
    with _at_rest(network), last_decoder_map(network) as features, torch.inference_mode():
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
    """A linear probe as a segmentation layer: (N, F, *patch) -> log-probabilities (N, K, *patch), in single precision.

    Args:
        weight: (K, F).
        bias: (K,).
        dim: 2 or 3.

    The normalisation is the same for all classes of a voxel, so that blended windows have the same largest class as
    blended features would have.
    """

    def __init__(self, weight: NDArray[np.float64], bias: NDArray[np.float64], dim: int) -> None:
        super().__init__()
        classes, width = weight.shape
        self.layer = (nn.Conv2d if dim == 2 else nn.Conv3d)(width, classes, 1)
        self.layer.load_state_dict({"weight": torch.from_numpy(weight).view_as(self.layer.weight),
                                    "bias": torch.from_numpy(bias)})

    def forward(self, features: Tensor) -> Tensor:
        """(N, K, *patch)."""
        # a quiet channel has a weight beyond half precision
        with torch.autocast("cuda", enabled=False):
            scores: Tensor = self.layer(features.float())
        return scores.log_softmax(1).clamp_min(LOWEST)


@contextmanager
def dense_probe(
    network: nn.Module, weight: NDArray[np.float64], bias: NDArray[np.float64], configuration: Any,
    device: torch.device, step: float = 0.5,
) -> Iterator[Callable[[NDArray[np.float32]], NDArray[np.integer]]]:
    """Within the block: a function from a preprocessed image (C, Z, Y, X) to the number of the class (Z, Y, X) that a
    linear probe finds in every voxel, by nnU-Net's own sliding window without mirroring.

    Memory and time are those of one of nnU-Net's predictions without mirroring.

    Args:
        network: nnU-Net's; it is left as it was.
        weight, bias: (K, F) and (K,) of the probe.
        configuration: of the plan.
        device: cpu, cuda or mps.
        step: distance of windows relative to the patch.
    """
    with redirect_stdout(io.StringIO()):  # it explains itself on a CPU
        predictor = nnUNetPredictor(tile_step_size=step, use_mirroring=False, device=device, allow_tqdm=False,
                                    perform_everything_on_device=device.type == "cuda")
    predictor.configuration_manager = configuration
    # all that the sliding window asks of it
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=len(bias))
    layer = ProbeLayer(weight, bias, len(configuration.patch_size)).to(device)
    with _at_rest(network), last_decoder_map(network, layer) as predictor.network:

        def predict(image: NDArray[np.float32]) -> NDArray[np.integer]:
            scores = predictor.predict_sliding_window_return_logits(torch.from_numpy(image))
            return np.asarray(scores.argmax(0).cpu().numpy())

        yield predict


@contextmanager
def _at_rest(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode, afterwards as before."""
    was_training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
