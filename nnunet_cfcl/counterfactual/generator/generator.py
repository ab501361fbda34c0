"""A trained generator of counterfactuals: the model, its attributes and its intensity scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnunet_cfcl.counterfactual.generator.hvae import HVAE
from nnunet_cfcl.counterfactual.generator.hvae_sizes import sizes_from_json
from nnunet_cfcl.data.attributes import AttributeCoding
from nnunet_cfcl.errors import UserError, first_line, foreign_errors_as
from nnunet_cfcl.runs.checkpoint import read_plain

FORMAT = 1
#: The fix for a file that cannot be read as a generator.
FIX = "delete it and run `nnunet_cfcl generator train` again"
#: Key of the file -> field of `IntensityScale`.
SCALE_KEYS = {"centre": "mean", "spread": "std", "low": "low", "high": "high"}


@dataclass(frozen=True)
class IntensityScale:
    """Standardisation, channel by channel, of nnU-Net's preprocessed intensities for the model.

    Attributes:
        mean, std: (C,) float32; the input of the model is (x - mean) / std.
        low, high: (C,) float32, robust ends of the observed range; the model's input is clipped to it, and a
            counterfactual exceeds it only where its original does.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of_quantiles(cls, tables: Sequence[Tensor]) -> IntensityScale:
        """Estimate the scale from quantile tables (C, Q) of many cases, see `quantiles.intensity_quantiles`.

        All cases have equal weight. The ends of the range are the outermost quantiles of all cases but the most extreme
        percent on either side, so that no single voxel and no outlying case determines them.
        """
        joined = torch.stack(list(tables)).double()
        std = joined.transpose(0, 1).flatten(1).std(1).clamp_min(1e-6)
        low, high = joined[:, :, 0].quantile(0.01, 0), joined[:, :, -1].quantile(0.99, 0)
        # the table ends at 0.8 and 99.2 percent of a case's voxels; most of the others lie a little beyond
        margin = 0.1 * (high - low).clamp_min(1e-6)
        mean = joined.transpose(0, 1).flatten(1).mean(1)
        return cls(*(values.float() for values in (mean, std, low - margin, high + margin)))

    def to(self, device: torch.device) -> IntensityScale:
        """The same scale on another device."""
        return IntensityScale(*(values.to(device) for values in (self.mean, self.std, self.low, self.high)))

    def forward(self, images: Tensor) -> Tensor:
        """Clip and standardise images (N, C, *S), float32."""
        low, high, mean, std = (per_channel(t, images) for t in (self.low, self.high, self.mean, self.std))
        return (images.float().clamp(low, high) - mean) / std

    def backward(self, images: Tensor) -> Tensor:
        """Inverse of `forward` within the observed range."""
        return images * per_channel(self.std, images) + per_channel(self.mean, images)

    def clip(self, counterfactuals: Tensor, images: Tensor) -> Tensor:
        """Clip counterfactuals (N, C, *S) to the observed range, widened to the original intensity of the voxel."""
        low, high = per_channel(self.low, images), per_channel(self.high, images)
        return counterfactuals.clamp(torch.minimum(low, images), torch.maximum(high, images))


def per_channel(values: Tensor, images: Tensor) -> Tensor:
    """Reshape (C,) to (C, 1, ...) for broadcasting over images (N, C, *S), on their device."""
    return values.to(images.device).view(-1, *[1] * (images.ndim - 2))


class Change(NamedTuple):
    """Effect of an intervention on images x, in their own intensities: the counterfactual is offset + gain x.

    Both fields are (N, C, *S) float32. With a fixed scale the gain is 1 and the offset m* - m; with a learned scale the
    gain is sigma*/sigma and the offset m* - gain m (method, section 1). Being linear in x, the fields may be blended
    between windows.
    """

    offset: Tensor
    gain: Tensor

    def apply(self, images: Tensor) -> Tensor:
        """Counterfactuals of images (N, C, *S), not clipped."""
        return self.offset + self.gain * images


class CounterfactualGenerator:
    """A trained HVAE with everything needed to compute counterfactuals, on one device.

    Args:
        model: HVAE with the averaged weights.
        coding: encoding of the attributes.
        scale: intensity scale of the model.
        identity: JSON-ready description of the training that determines the weights.
        device: device of the model.
        zero_is_outside: whether voxels with zeros in all channels lie outside of the normalisation mask and stay zero
            in `counterfactuals`.
    """

    def __init__(
        self, model: HVAE, coding: AttributeCoding, scale: IntensityScale, identity: Mapping[str, Any],
        device: torch.device | str = "cpu", zero_is_outside: bool = False,
    ) -> None:
        self.zero_is_outside = zero_is_outside
        self.device = torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.coding, self.identity = coding, dict(identity)
        self.scale = scale.to(self.device)

    @property
    def patch_size(self) -> tuple[int, ...]:
        """Spatial shape (D,) of the model's images, in voxels."""
        return self.model.sizes.resolutions[0].shape

    @property
    def learned_scale(self) -> bool:
        """Whether the likelihood's scale is learned; otherwise the gain is 1."""
        return self.model.sizes.log_scale is None

    @torch.no_grad()
    def changes(
        self, images: Tensor, parents: Tensor, others: Sequence[Tensor], noise: Sequence[Tensor] | None = None
    ) -> list[Change]:
        """Compute the interventions ``parents -> others[k]`` on images of the patch size.

        This takes one encoder pass, one decoder pass, and one decoder pass more per intervention.

        Args:
            images: (N, C, *patch_size), nnU-Net's preprocessed intensities, on any device.
            parents: (N, coding.width), the images' own.
            others: (N, coding.width) for each intervention.
            noise: noise of `HVAE.draw_noise` for a sample of the posterior; None: its mean.

        Returns:
            The change of every intervention, on the generator's device.
        """
        seen = self.scale.forward(images.to(self.device, non_blocking=True))
        with self._autocast():
            found = self.model.counterfactual_changes(
                seen, parents.to(self.device), [one.to(self.device) for one in others], noise)
        std, mean = (per_channel(t, seen) for t in (self.scale.std, self.scale.mean))
        # the model's change applies to (x - mean) / std, the returned one to x
        return [Change(offset * std + mean * (1 - gain), gain) for offset, gain in found]

    @torch.no_grad()
    def reconstruct(self, images: Tensor, parents: Tensor) -> Tensor:
        """Reconstruct images: the decoder's means (N, C, *patch_size), in the images' own intensities."""
        with self._autocast():
            seen = self.scale.forward(images.to(self.device))
            mean = self.model(seen, parents.to(self.device)).likelihood.mean
        return self.scale.backward(mean)

    def counterfactuals(
        self, images: Tensor, parents: Tensor, others: Tensor, noise: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Counterfactuals (N, C, *patch_size) of images of the patch size, clipped, on the generator's device."""
        own = images.to(self.device).float()
        changed = self.scale.clip(self.changes(images, parents, [others], noise)[0].apply(own), own)
        return torch.where((own != 0).any(1, keepdim=True), changed, own) if self.zero_is_outside else changed

    def _autocast(self) -> torch.autocast:
        # on CPUs, results must not depend on the processor model
        fast = self.device.type == "cuda" and computes_in_bfloat16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast)

    def state(self) -> dict[str, Any]:
        """State for `from_state`: plain data and tensors on the CPU."""
        scale = {key: getattr(self.scale, name).cpu() for key, name in SCALE_KEYS.items()}
        weights = {key: value.cpu() for key, value in self.model.state_dict().items()}
        return {"format": FORMAT, "sizes": asdict(self.model.sizes), "weights": weights, "scale": scale,
                "coding": self.coding.to_json(), "identity": self.identity}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> CounterfactualGenerator:
        """Inverse of `state`.

        Raises:
            ValueError: the state has another format.
        """
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}, expected {FORMAT}")
        model = HVAE(sizes_from_json(state["sizes"]))
        model.load_state_dict(state["weights"])
        scale = IntensityScale(**{SCALE_KEYS[key]: value.float() for key, value in state["scale"].items()})
        return cls(model, AttributeCoding.from_json(state["coding"]), scale, state["identity"], device)

    @classmethod
    def load(cls, file: Path, device: torch.device | str = "cpu") -> CounterfactualGenerator:
        """Load a generator from a file that holds its `state` under the key "generator".

        Raises:
            UserError: the file is missing or cannot be read as a generator.
        """
        if not file.exists():
            raise UserError(f"there is no generator {file}", "run `nnunet_cfcl generator train`")
        content = read_plain(file, "generator", FIX)
        with foreign_errors_as(lambda error: UserError(
                f"{file} cannot be read as a generator of this version ({first_line(error)})", FIX)):
            return cls.from_state(content["generator"], device)


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 faster than in float32."""
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported is True for older cards too, which only emulate bfloat16
        return torch.cuda.get_device_capability(device) >= (8, 0)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and supported is not None and bool(supported())
