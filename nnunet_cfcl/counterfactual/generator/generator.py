"""A trained generator of counterfactuals: the model, the attributes it knows, and the intensities it was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nnunet_cfcl.counterfactual.generator.hvae import HVAE, HVAESizes, Resolution
from nnunet_cfcl.data.attributes import AttributeCoding
from nnunet_cfcl.errors import UserError, first_line, foreign_errors_as
from nnunet_cfcl.runs.checkpoint import read_plain

FORMAT = 1
#: About a file that is no generator.
FIX = "delete it and run `nnunet_cfcl generator train` again"


@dataclass(frozen=True)
class IntensityScale:
    """How the intensities that nnU-Net leaves are brought to those the model works on, channel by channel.

    Attributes:
        centre, spread: (C,) float32; the model sees (x - centre) / spread.
        low, high: (C,) float32, robust ends of the observed range; the model sees nothing beyond, and a counterfactual
            goes beyond only where its original does.
    """

    centre: Tensor
    spread: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of_quantiles(cls, tables: Sequence[Tensor]) -> IntensityScale:
        """From the quantile tables (C, Q) of many cases (`quantiles.intensity_quantiles`), all counted alike.

        The ends are the outermost quantiles of all cases but the most extreme percent on either side, so that no single
        voxel, and no single odd case, sets them.
        """
        joined = torch.stack(list(tables)).double()
        spread = joined.transpose(0, 1).flatten(1).std(1).clamp_min(1e-6)
        low, high = joined[:, :, 0].quantile(0.01, 0), joined[:, :, -1].quantile(0.99, 0)
        # the table ends at 0.8 and 99.2 percent of a case's voxels; what lies beyond is mostly a little farther out
        margin = 0.1 * (high - low).clamp_min(1e-6)
        centre = joined.transpose(0, 1).flatten(1).mean(1)
        return cls(*(values.float() for values in (centre, spread, low - margin, high + margin)))

    def to(self, device: torch.device) -> IntensityScale:
        """On another device."""
        return IntensityScale(*(getattr(self, name).to(device) for name in ("centre", "spread", "low", "high")))

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, *S) as the model sees them, float32."""
        low, high, centre, spread = (per_channel(t, images) for t in (self.low, self.high, self.centre, self.spread))
        return (images.float().clamp(low, high) - centre) / spread

    def backward(self, images: Tensor) -> Tensor:
        """The opposite of `forward`, but for what was clipped."""
        return images * per_channel(self.spread, images) + per_channel(self.centre, images)

    def clip(self, counterfactuals: Tensor, images: Tensor) -> Tensor:
        """Counterfactuals (N, C, *S) within the observed range; where ``images`` were beyond, up to there."""
        low, high = per_channel(self.low, images), per_channel(self.high, images)
        return counterfactuals.clamp(torch.minimum(low, images), torch.maximum(high, images))


def per_channel(values: Tensor, images: Tensor) -> Tensor:
    """(C,) as (C, 1, ...), on the device of images (N, C, *S)."""
    return values.to(images.device).view(-1, *[1] * (images.ndim - 2))


class Change(NamedTuple):
    """What an intervention does to images x, in their own intensities: the counterfactual is offset + gain x.

    Both are (N, C, *S) float32. With a fixed scale the gain is 1 and the offset m* - m; with a learned one they are
    m* - gain m and sigma*/sigma (method, section 1). Being linear in x, they may be blended between windows.
    """

    offset: Tensor
    gain: Tensor

    def apply(self, images: Tensor) -> Tensor:
        """The counterfactuals, not clipped."""
        return self.offset + self.gain * images


class CounterfactualGenerator:
    """A trained HVAE with all that is needed to use it, on one device.

    Args:
        model: with the averaged weights.
        coding: of the attributes.
        scale: of the intensities.
        identity: what it was made from, JSON-ready.
        device: where it works.
        zero_is_outside: voxels with zeros in all channels are outside of the mask in which the image was normalised,
            and stay zero in `counterfactuals`.
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
        """Size (D,) of the images it takes, in voxels."""
        return self.model.sizes.resolutions[0].shape

    @property
    def learned_scale(self) -> bool:
        """Whether the gain differs from 1."""
        return self.model.sizes.log_scale is None

    @torch.no_grad()
    def changes(
        self, images: Tensor, parents: Tensor, others: Sequence[Tensor], noise: Sequence[Tensor] | None = None
    ) -> list[Change]:
        """The interventions ``parents -> others[k]`` on images of the patch size: one encoder pass, one decoder pass
        and one more for every intervention.

        Args:
            images: (N, C, *patch_size), nnU-Net's preprocessed intensities, on any device.
            parents: (N, coding.width), of the images.
            others: each (N, coding.width).
            noise: of `HVAE.draw_noise` for a sample of the posterior; None: its mean.

        Returns:
            One for each of ``others``, on the generator's device.
        """
        seen = self.scale.forward(images.to(self.device, non_blocking=True))
        with self._autocast():
            found = self.model.counterfactual_changes(
                seen, parents.to(self.device), [one.to(self.device) for one in others], noise)
        spread, centre = (per_channel(t, seen) for t in (self.scale.spread, self.scale.centre))
        # what the model says about (x - centre) / spread, said about x
        return [Change(offset * spread + centre * (1 - gain), gain) for offset, gain in found]

    @torch.no_grad()
    def reconstruct(self, images: Tensor, parents: Tensor) -> Tensor:
        """The decoder's means (N, C, *patch_size) of images, in their own intensities."""
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
        # on CPUs, figures and files should not depend on the kind of processor
        fast = self.device.type == "cuda" and computes_in_bfloat16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=fast)

    def state(self) -> dict[str, Any]:
        """For `from_state`: plain data and tensors on the CPU."""
        scale = {name: getattr(self.scale, name).cpu() for name in ("centre", "spread", "low", "high")}
        weights = {key: value.cpu() for key, value in self.model.state_dict().items()}
        return {"format": FORMAT, "sizes": asdict(self.model.sizes), "weights": weights, "scale": scale,
                "coding": self.coding.to_json(), "identity": self.identity}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device | str = "cpu") -> CounterfactualGenerator:
        """The opposite of `state`.

        Raises:
            ValueError: a state of another version.
        """
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']}, expected {FORMAT}")
        model = HVAE(sizes_from_json(state["sizes"]))
        model.load_state_dict(state["weights"])
        scale = IntensityScale(**{name: value.float() for name, value in state["scale"].items()})
        return cls(model, AttributeCoding.from_json(state["coding"]), scale, state["identity"], device)

    @classmethod
    def load(cls, file: Path, device: torch.device | str = "cpu") -> CounterfactualGenerator:
        """From a file with `state` under the key "generator".

        Raises:
            UserError: the file cannot be read as one.
        """
        if not file.exists():
            raise UserError(f"there is no generator {file}", "`nnunet_cfcl generator train` makes one")
        content = read_plain(file, "generator", FIX)
        with foreign_errors_as(lambda error: UserError(
                f"{file} cannot be read as a generator of this version ({first_line(error)})", FIX)):
            return cls.from_state(content["generator"], device)


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 faster than in float32."""
    if device.type == "cuda":
        # torch.cuda.is_bf16_supported also counts older cards, which only imitate it
        return torch.cuda.get_device_capability(device) >= (8, 0)
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device.type == "cpu" and supported is not None and bool(supported())


def sizes_from_json(content: Mapping[str, Any]) -> HVAESizes:
    """The opposite of `dataclasses.asdict`, also after JSON made lists of tuples."""
    resolutions = tuple(Resolution(**{**one, "shape": tuple(one["shape"])}) for one in content["resolutions"])
    return HVAESizes(**{**content, "resolutions": resolutions})
