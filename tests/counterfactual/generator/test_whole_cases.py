"""Sliding-window counterfactuals of whole cases against a slow oracle in double precision."""

from itertools import product
from unittest import mock

import numpy as np
import pytest
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

from nnunet_cfcl.counterfactual.generator import whole_cases as blended_change
from nnunet_cfcl.counterfactual.generator.whole_cases import CaseChange, SlidingWindowCounterfactuals
from nnunet_cfcl.errors import UserError
from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows
from tests.conftest import CasesInMemory
from tests.counterfactual.random_generator import encoded, random_generator

CELLS = {"scanner": "A", "disease": "no", "age": "55"}
OTHERS = encoded({**CELLS, "scanner": "B"}, {**CELLS, "disease": "yes"}, {**CELLS, "scanner": "C", "disease": "yes"})

LARGE, SMALL, MIXED = {2: (3, 40, 31), 3: (15, 19, 22)}, {2: (2, 9, 7), 3: (4, 5, 6)}, {2: (1, 45, 8), 3: (5, 21, 8)}
SHAPES = pytest.mark.parametrize(
    ("dim", "shape"), [(dim, shapes[dim]) for dim in (2, 3) for shapes in (LARGE, SMALL, MIXED)],
    ids=[f"{dim}d, {what}" for dim in (2, 3) for what in ("larger", "smaller", "larger and smaller")])


def images(shape, unit=1.0, zero=0.0, seed=0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = noise.cumsum(-1).cumsum(-2) / 8
    return (zero + unit * (0.5 * noise + smooth)).astype(np.float32)


def asked(case="case", others=OTHERS, noise_seed=None) -> CaseChange:
    return CaseChange(case, encoded(CELLS)[0], others, noise_seed)


def blender(generator, arrays, per_pass=4, zero_is_outside=False) -> SlidingWindowCounterfactuals:
    return SlidingWindowCounterfactuals(
        generator, CasesInMemory(arrays), SlidingWindows(generator.patch_size), per_pass, zero_is_outside)


def joined(blend: SlidingWindowCounterfactuals, cases) -> dict[str, torch.Tensor]:
    """Case -> (K, C, Z, Y, X)."""
    found: dict[str, list] = {}
    for slab in blend.slabs(cases):
        found.setdefault(slab.case, []).append(slab.images)
    return {case: torch.cat(slabs, 2) for case, slabs in found.items()}


def oracle(generator, image: np.ndarray) -> torch.Tensor:
    """Blend windows one by one over the whole, padded image with a full map of weights, in float64."""
    size = (1,) * (3 - len(generator.patch_size)) + generator.patch_size
    gaussian = compute_gaussian(generator.patch_size, dtype=torch.float64, device=torch.device("cpu")).view(size)
    before = [max(0, n - have + 1) // 2 for n, have in zip(size, image.shape[1:])]
    after = [max(0, n - have) - b for n, have, b in zip(size, image.shape[1:], before)]
    whole = torch.from_numpy(np.pad(image, [(0, 0), *zip(before, after)], mode="edge"))
    axes = SlidingWindows(generator.patch_size)(whole.shape[1:])
    sums = torch.zeros(3, len(OTHERS), *whole.shape, dtype=torch.float64)
    for starts in product(*(axis.starts for axis in axes)):
        place = (..., *(slice(start, start + n) for start, n in zip(starts, size)))
        patch = whole[place].reshape(1, len(whole), *generator.patch_size)
        for k, other in enumerate(OTHERS):
            (change,) = generator.changes(patch, encoded(CELLS), [other[None]])
            for row, value in enumerate((change.offset, change.gain, torch.ones_like(change.gain))):
                sums[(row, k, *place)] += value.double().view(len(whole), *size) * gaussian
    offset, gain = sums[0] / sums[2], sums[1] / sums[2]
    inner = (..., *(slice(b, b + n) for b, n in zip(before, image.shape[1:])))
    own = torch.from_numpy(image).double()
    return generator.scale.clip((offset[inner] + gain[inner] * own).float(), own.float()[None])


@SHAPES
@pytest.mark.parametrize("learned_scale", [True, False], ids=["learned scale", "fixed scale"])
def test_the_blend_equals_the_oracle_within_a_hundredth_of_the_standard_deviation(dim, shape, learned_scale):
    generator = random_generator(dim, channels=2, learned_scale=learned_scale)
    image = images((2, *shape))
    found = joined(blender(generator, {"case": image}), [asked()])["case"]
    expected = oracle(generator, image)
    assert found.shape == (3, 2, *shape) and found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-2
    assert (expected - torch.from_numpy(image)).abs().mean() > 0.1  # there is something to blend


@pytest.mark.parametrize(("unit", "zero"), [(4e3, 1e5), (1e-3, 0.0), (1e-2, 5.0)])
def test_half_precision_holds_fields_whatever_the_unit_of_the_intensities(unit, zero):
    """Intensities that nnU-Net does not normalise may be beyond the largest number, 65504, or near the smallest."""
    generator = random_generator(3, unit=unit, zero=zero)
    image = images((1, 9, 11, 13), unit, zero)
    found = joined(blender(generator, {"case": image}), [asked()])["case"]
    assert (found - oracle(generator, image)).abs().max() < 1e-2 * unit


def test_a_field_beyond_half_precision_is_bounded_and_not_infinite():
    generator = random_generator(2)
    with torch.no_grad():
        generator.model.decoder.mean.weight.mul_(1e6)
    found = joined(blender(generator, {"case": images((1, 2, 20, 20))}), [asked()])["case"]
    assert found.isfinite().all() and found.abs().max() == generator.scale.high.max()


@pytest.mark.parametrize("dim", [2, 3])
def test_where_nothing_is_changed_the_image_stays_as_it_is(dim):
    image = images((1, *LARGE[dim]))
    found = joined(blender(random_generator(dim), {"case": image}), [asked(others=encoded(CELLS, CELLS))])["case"]
    torch.testing.assert_close(found, torch.from_numpy(image).expand(2, -1, -1, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("per_pass", [1, 5, 40])
def test_cases_of_different_shapes_share_passes_and_come_one_after_the_other(dim, per_pass):
    generator = random_generator(dim)
    # 18 or 19 windows in all: several passes of 5, less than one of 40
    large = {2: (2, 24, 20), 3: (9, 11, 14)}
    arrays = {f"case_{n}": images((1, *shapes[dim]), seed=n) for n, shapes in enumerate((large, SMALL, MIXED))}
    blend = blender(generator, arrays, per_pass)
    order = [slab.case for slab in blend.slabs(map(asked, arrays))]
    assert order == sorted(order)
    together = joined(blend, map(asked, arrays))
    for case, image in arrays.items():
        other_passes = joined(blender(generator, {case: image}, 3), [asked(case)])[case]
        torch.testing.assert_close(together[case], other_passes, rtol=0, atol=2e-3)
        # a run that goes on after a kill makes the cases that are left: the same as a run that was never stopped
        alone = joined(blender(generator, {case: image}, per_pass), [asked(case)])[case]
        assert torch.equal(together[case], alone)


@pytest.mark.parametrize("dim", [2, 3])
def test_voxels_outside_of_the_mask_stay_zero_and_all_others_are_changed_as_ever(dim):
    generator, image = random_generator(dim, channels=2), images((2, *LARGE[dim]))
    image[:, :, :18], image[0, :, 25:], image[:, :2] = 0, 0, 0
    image[:, -1] = 0
    found = joined(blender(generator, {"case": image}, zero_is_outside=True), [asked()])["case"]
    everywhere = joined(blender(generator, {"case": image}), [asked()])["case"]
    outside = torch.from_numpy(image == 0).all(0).expand_as(found)
    assert (found[outside] == 0).all() and (everywhere[outside] != 0).float().mean() > 0.9
    torch.testing.assert_close(found[~outside], everywhere[~outside], rtol=0, atol=2e-3)


def test_windows_outside_of_the_mask_are_not_worked_on_and_an_empty_case_stays_empty():
    generator, passes = random_generator(3), []
    arrays = {"empty": np.zeros((1, 15, 16, 16), np.float32), "half": images((1, 15, 16, 16))}
    arrays["half"][:, :10] = 0
    blend = blender(generator, arrays, per_pass=1, zero_is_outside=True)
    changes = generator.changes
    with mock.patch.object(generator, "changes", side_effect=lambda *a: passes.append(1) or changes(*a)):
        found = joined(blend, map(asked, arrays))
    # 4 x 3 x 3 windows a case; of the empty one the last is left, of the other those that begin at planes 6 and 9
    assert len(passes) == 1 + 2 * 9
    assert found["empty"].shape == found["half"].shape == (3, 1, 15, 16, 16)
    assert (found["empty"] == 0).all() and (found["half"][:, :, 10:] != 0).all()


def test_all_interventions_share_one_encoder_pass_and_one_abduction():
    generator = random_generator(2)
    model = generator.model
    with (mock.patch.object(model.encoder, "forward", wraps=model.encoder.forward) as encoder,
          mock.patch.object(model.decoder, "forward", wraps=model.decoder.forward) as decoder):
        joined(blender(generator, {"case": images((1, 1, 16, 36))}, per_pass=8), [asked()])
    assert encoder.call_count == 1 and decoder.call_count == 1 + 3


def test_a_sample_of_the_posterior_depends_on_its_seed_alone():
    generator, arrays = random_generator(2), {"a": images((1, 2, 20, 20)), "b": images((1, 1, 30, 10), seed=1)}
    blend = blender(generator, arrays)
    of = lambda seed, case="a": joined(blend, [asked(case, noise_seed=seed)])[case]  # noqa: E731
    together = joined(blend, [asked("a", noise_seed=1), asked("b", noise_seed=2)])
    assert torch.equal(together["a"], of(1)) and torch.equal(together["b"], of(2, "b"))
    means = joined(blend, [asked("a")])["a"]
    assert (of(1) - of(2)).abs().max() > 0.05 and (of(1) - means).abs().max() > 0.05


def test_neither_reads_nor_memory_grow_with_the_case():
    """One window, or a few planes, at a time."""
    generator, boxes, held = random_generator(3), [], []
    reader = CasesInMemory({"case": images((1, 100, 9, 10))})
    original = reader.read
    reader.read = lambda case, box: boxes.append(box) or original(case, box)
    blend = SlidingWindowCounterfactuals(generator, reader, SlidingWindows(generator.patch_size), 4, False)
    zeros = torch.zeros
    with (mock.patch.object(blended_change, "PLANES", 2),
          mock.patch.object(torch, "zeros", side_effect=lambda *a, **k: held.append(a[0]) or zeros(*a, **k))):
        depths = [slab.images.shape[2] for slab in blend.slabs([asked()])]
    assert max(part.stop - part.start for part, *_ in boxes) == 6 and max(depths) == 2 and sum(depths) == 100
    assert [size for size in held if isinstance(size, tuple)] == [(3, 2, 1, 6, 9, 10)]


def test_a_case_that_is_not_finite_is_named():
    image = images((1, 1, 20, 20))
    image[0, 0, 19, 19] = np.nan
    with pytest.raises(UserError, match=r"case 'case' holds values that are not finite"):
        joined(blender(random_generator(2), {"case": image}), [asked()])


def test_non_finite_counterfactuals_of_a_diverged_generator_are_rejected():
    generator = random_generator(2)
    with torch.no_grad():
        generator.model.decoder.mean.bias.fill_(torch.nan)
    with pytest.raises(UserError, match=r"counterfactuals of case 'case' are not finite; fix: train it again"):
        joined(blender(generator, {"case": images((1, 1, 20, 20))}), [asked()])
