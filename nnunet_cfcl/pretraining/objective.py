"""Interface between a pretraining method and the loop: draws per image, model around the network, loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor, nn

from nnunet_cfcl.config import PretrainSettings
from nnunet_cfcl.pretraining.render import Row
from nnunet_cfcl.views import ViewGeometry

#: Part of the network that a method trains: up to the last decoder map, the encoder alone, or the whole network.
Tap = Literal["decoder", "encoder", "segmentation"]


@dataclass(frozen=True)
class ImageViews:
    """The views of one image, from which an objective draws.

    Args:
        matrices: (V, D, D+1) matrices of the views, normalised view coordinates to canonical millimetres.
        geometry: patch size and spacing.
        crop_size: (D,) size in voxels of the crop that the views are cut from.
        tissue: (2, D) canonical box of real image, see `views.tissue_box`.
        labels: (*crop) label map, below 0 where the label is unknown; None for an image without labels.
        confidence: (*crop) confidence in ``labels`` in percent; None for an image without labels.
    """

    matrices: Tensor
    geometry: ViewGeometry
    crop_size: tuple[int, ...]
    tissue: Tensor
    labels: Tensor | None = None
    confidence: Tensor | None = None


class PretrainingModel(nn.Module):
    """The network with the modules that a method adds, called with views (N, C, *patch) and the objective's inputs.

    The state of the added modules is saved under ``model`` in the checkpoint.

    Args:
        network: the network under training.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss_parameters(self) -> Sequence[nn.Parameter]:
        """Return the parameters of the loss of the whole batch, such as a learned temperature; every rank computes
        their full gradient."""
        return ()

    def after_step(self, progress: float) -> None:
        """Update state after an optimiser step; ``progress`` in (0, 1] is the completed share of the run."""

    def additions(self) -> dict[str, Tensor]:
        """Return the state of the added modules."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("network.")}

    def load_additions(self, state: Mapping[str, Tensor]) -> None:
        """Load the state that `additions` returned.

        Raises:
            RuntimeError: a key or a shape does not match.
        """
        network = {key: value for key, value in self.state_dict().items() if key.startswith("network.")}
        self.load_state_dict({**network, **state})


class Objective(Protocol):
    """A pretraining objective; picklable for the data loading processes."""

    @property
    def tap(self) -> Tap:
        """The part of the network that `build_model` receives."""

    @property
    def separable(self) -> bool:
        """Whether the loss of a batch is a mean over its views, which needs no gathering of embeddings."""

    @property
    def needs_labels(self) -> bool:
        """Whether the labels of the images are read."""

    @property
    def labelled_only(self) -> bool:
        """Whether images without labels are left out."""

    def draw(self, generator: Generator, image: ImageViews) -> dict[str, Tensor]:
        """Make the random choices for one image, of equal shapes for all images, which are collated."""

    def inputs(self, batch: Mapping[str, Any], rows: Sequence[Row], device: torch.device) -> Any:
        """Prepare the model's inputs beside the views of ``rows``, (image, view) pairs."""

    def build_model(self, network: nn.Module, width: int, settings: PretrainSettings) -> PretrainingModel:
        """Build the model around the tapped network, whose output has ``width`` channels."""

    def loss(
        self, model: PretrainingModel, outputs: Tensor, drawn: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Compute loss and statistics from the model's outputs for all images and views, in this order, and the
        collated draws of all images. A separable objective receives the outputs of a few views and no draws."""
