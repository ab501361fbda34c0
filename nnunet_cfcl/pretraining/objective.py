"""What a pretraining method is to the loop: what is drawn per image, what the network computes, the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Generator, Tensor, nn

from nnunet_cfcl.config import PretrainSettings
from nnunet_cfcl.pretraining.render import Row
from nnunet_cfcl.views import ViewGeometry

#: The part of the network a method trains: up to the last decoder map, the encoder alone, or the whole network.
Tap = Literal["decoder", "encoder", "segmentation"]


@dataclass(frozen=True)
class ImageViews:
    """What is known of one image when an objective draws.

    Args:
        matrices: (V, D, D+1) views, normalised view coordinates to canonical millimetres.
        geometry: patch size and spacing.
        crop_size: (D,) voxels of the crop that the views are cut from.
        tissue: (2, D) canonical box of real image, see `views.tissue_box`.
        labels: (*crop) label map, below 0 where nothing is known; None where the image has no labels.
        confidence: (*crop) percent, how far ``labels`` are trusted; None with them.
    """

    matrices: Tensor
    geometry: ViewGeometry
    crop_size: tuple[int, ...]
    tissue: Tensor
    labels: Tensor | None = None
    confidence: Tensor | None = None


class PretrainingModel(nn.Module):
    """The network under training and what the method adds to it; called with views (N, C, *patch) and the objective's
    inputs. State beside the network's own is saved under ``model`` in the checkpoint."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters used by the loss of the whole batch and not per view; every rank has their whole gradient."""
        return ()

    def after_step(self, progress: float) -> None:
        """Called after every optimiser step; ``progress`` in (0, 1] is the share of the run that is done."""

    def additions(self) -> dict[str, Tensor]:
        """The state without the network's."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("network.")}

    def load_additions(self, state: Mapping[str, Tensor]) -> None:
        """The opposite of `additions`.

        Raises:
            RuntimeError: a key or a shape does not fit.
        """
        network = {key: value for key, value in self.state_dict().items() if key.startswith("network.")}
        self.load_state_dict({**network, **state})


class Objective(Protocol):
    """A pretraining method; picklable, because it goes to the data loading processes."""

    @property
    def tap(self) -> Tap:
        """What part of the network `build_model` is given."""

    @property
    def separable(self) -> bool:
        """Whether the loss of a batch is the mean over its views, so that no embeddings need to be gathered."""

    @property
    def needs_labels(self) -> bool:
        """Whether the labels of the images are read."""

    @property
    def labelled_only(self) -> bool:
        """Whether an image without labels teaches nothing and is left out."""

    def draw(self, generator: Generator, image: ImageViews) -> dict[str, Tensor]:
        """Random choices for one image, with the same shapes for all images; they are collated."""

    def inputs(self, batch: Mapping[str, Any], rows: Sequence[Row], device: torch.device) -> Any:
        """What the model is given beside the views of ``rows``, (image, view) pairs."""

    def build_model(self, network: nn.Module, width: int, settings: PretrainSettings) -> PretrainingModel:
        """The model around the tapped network, whose output has ``width`` channels."""

    def loss(
        self, model: PretrainingModel, outputs: Tensor, drawn: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and statistics from the model's outputs for all images and views, in this order, and the collated
        draws of all images. A separable objective is given the outputs of a few views and no draws."""
