"""Acquisitions of any finite image: finite, within bounds, the identity with every effect off."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_cfcl.config import AcquisitionSettings
from nnunet_cfcl.counterfactual import apply_acquisition, draw_acquisition, intensity_quantiles

some = settings(max_examples=25, deadline=None)
ALWAYS = AcquisitionSettings(probability=1.0)
EXTREME = replace(
    ALWAYS, gamma=(0.05, 20.0), point_spread=(0.0, 20.0), noise_level=(0.0, 1.0), noise_correlation=(0.0, 20.0),
    bias_field=(0.0, 3.0))
SCHEMES = ("ZScoreNormalization", "CTNormalization", "RescaleTo01Normalization", "RGBTo01Normalization",
           "NoNormalization")
SPACINGS = {2: (1.0, 10.0), 3: (10.0, 1.0, 1.0)}
shapes = st.sampled_from([(1, 1), (2, 9), (12, 7), (5, 1, 6), (3, 8, 10), (1, 1, 1)])


@st.composite
def images(draw) -> torch.Tensor:
    """(C, *S): noise of any size, constant channels, single outliers, few different values, zeros outside."""
    shape, channels = draw(shapes), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    noise = torch.randn(channels, *shape, generator=generator)
    image = 10 ** draw(st.floats(-20, 25)) * noise + draw(st.floats(-1e4, 1e4))
    kind = draw(st.sampled_from(["noise", "constant", "outlier", "levels", "background"]))
    if kind == "constant":
        image[-1] = draw(st.floats(-1e20, 1e20))
    if kind == "outlier":
        image.view(-1)[0] = draw(st.floats(-1e30, 1e30))
    if kind == "levels":
        image = image.sign()
    return image * (noise > 0) if kind == "background" else image


def acquire(image: torch.Tensor, chosen: AcquisitionSettings, scheme: str, seed: int, target=None) -> torch.Tensor:
    table = intensity_quantiles(image)
    targets = (table if target is None else intensity_quantiles(target)).expand(3, -1, -1)
    parameters = draw_acquisition(
        torch.Generator().manual_seed(seed), chosen, table, targets, image.ndim - 1, [scheme] * len(image), 3)
    return apply_acquisition(image.expand(3, *image.shape), parameters, SPACINGS[image.ndim - 1])


@some
@given(image=images(), scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 10**6), extreme=st.booleans())
def test_any_finite_image_gives_finite_counterfactuals(image, scheme, seed, extreme):
    found = acquire(image, EXTREME if extreme else ALWAYS, scheme, seed, image.flip(-1) * 3 - 1)
    assert found.shape == (3, *image.shape) and bool(found.isfinite().all())


@some
@given(image=images(), scheme=st.sampled_from(SCHEMES), seed=st.integers(0, 10**6))
def test_with_every_effect_off_any_image_is_returned_exactly(image, scheme, seed):
    found = acquire(image, replace(ALWAYS, probability=0.0), scheme, seed)
    assert torch.equal(found, image.expand_as(found))


@some
@given(image=images(), seed=st.integers(0, 10**6))
def test_intensities_leave_the_bounds_of_their_normalisation_only_where_they_did_before(image, seed):
    table = intensity_quantiles(image)
    ends = {"CTNormalization": (table[:, 0], table[:, -1]),
            "RescaleTo01Normalization": (torch.zeros(len(image)), torch.ones(len(image)))}
    shape = (-1, *[1] * (image.ndim - 1))
    for scheme, (low, high) in ends.items():
        found = acquire(image, EXTREME, scheme, seed)
        assert bool((found >= torch.minimum(low.view(shape), image)).all())
        assert bool((found <= torch.maximum(high.view(shape), image)).all())


@some
@given(seed=st.integers(0, 10**6), exponent=st.integers(-10, 20), dim=st.integers(2, 3))
def test_effects_do_not_depend_on_the_unit_of_an_image_that_is_not_normalised(seed, exponent, dim):
    """Powers of two, by which numbers are multiplied without rounding."""
    shape = (1, 14, 17) if dim == 2 else (1, 6, 9, 8)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cumsum(-1)
    found = acquire(image * 2.0**exponent, ALWAYS, "NoNormalization", seed, image.flip(-1) * 2.0 ** (exponent + 1))
    expected = acquire(image, ALWAYS, "NoNormalization", seed, image.flip(-1) * 2) * 2.0**exponent
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * 2.0**exponent)
