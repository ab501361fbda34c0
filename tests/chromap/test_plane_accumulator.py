"""Windows blended slab by slab against the whole map at once."""

import pytest
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window

from nnunet_cfcl.chromap.plane_accumulator import PlaneAccumulator
from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows

CPU = torch.device("cpu")


def first_two(reduced):
    """Plane coordinates of reduced features: something that is not linear."""
    return torch.tanh(reduced[:2] * reduced[2:3])


def windows_of(shape, patch):
    steps = compute_steps_for_sliding_window(shape, patch, 0.5)
    for z in steps[0]:
        for y in steps[1]:
            for x in steps[2]:
                yield tuple(slice(start, start + size) for start, size in zip((z, y, x), patch))


def accumulated(shape, patch, features):
    """The accumulator's answer, and that of one map with all channels in double precision."""
    profile = compute_gaussian(patch, device=CPU, dtype=torch.float64)
    accumulator = PlaneAccumulator(SlidingWindows(patch)(shape), shape, first_two, CPU)
    total = torch.zeros((3, *shape), dtype=torch.float64)
    weight = torch.zeros(shape, dtype=torch.float64)
    for number, box in enumerate(windows_of(shape, patch)):
        window = features(number, box).half()
        accumulator.add(box, window)
        total[(slice(None), *box)] += window.double() * profile
        weight[box] += profile
    return accumulator.coordinates(), first_two(total / weight)


@pytest.mark.parametrize(("shape", "patch"), [
    ((17, 20, 24), (8, 10, 12)), ((8, 9, 10), (8, 9, 10)), ((30, 8, 9), (4, 8, 8))])
def test_slab_by_slab_is_the_whole_map_at_once(shape, patch):
    found, expected = accumulated(
        shape, patch, lambda n, box: torch.randn((3, *patch), generator=torch.Generator().manual_seed(n)))
    assert found.shape == (2, *shape) and found.dtype == torch.float16
    assert (found.double() - expected).abs().max() < 0.02
    assert (found.double() - expected).abs().mean() < 0.002


def test_windows_that_agree_leave_no_seam():
    field = torch.linspace(-2, 2, 17 * 20 * 24).view(1, 17, 20, 24).expand(3, -1, -1, -1)
    found, _ = accumulated((17, 20, 24), (8, 10, 12), lambda n, box: field[(slice(None), *box)])
    assert (found.float() - first_two(field)).abs().max() < 0.01


def test_slices_are_windows_of_depth_one():
    image = torch.randn((3, 5, 12, 14), generator=torch.Generator().manual_seed(0))
    accumulator = PlaneAccumulator(SlidingWindows((12, 14))((5, 12, 14)), (5, 12, 14), first_two, CPU)
    for z in range(5):
        accumulator.add((z, slice(0, 12), slice(0, 14)), image[:, z].half())
    assert (accumulator.coordinates().float() - first_two(image)).abs().max() < 0.01


def test_a_window_that_comes_too_late_is_refused():
    accumulator = PlaneAccumulator(SlidingWindows((4, 4))((6, 4, 4)), (6, 4, 4), first_two, CPU)
    accumulator.add((3, slice(0, 4), slice(0, 4)), torch.zeros(3, 4, 4).half())
    with pytest.raises(ValueError, match="2 after 3"):
        accumulator.add((2, slice(0, 4), slice(0, 4)), torch.zeros(3, 4, 4).half())


def test_only_a_slab_is_kept_with_all_channels():
    accumulator = PlaneAccumulator(SlidingWindows((8, 16, 16))((400, 16, 16)), (400, 16, 16), first_two, CPU)
    accumulator.add((slice(0, 8), slice(0, 16), slice(0, 16)), torch.zeros(8, 8, 16, 16).half())
    assert accumulator._sum.numel() == 8 * 8 * 16 * 16


def test_a_window_that_nnunet_repeats_counts_once():
    image = torch.randn((3, 1, 12, 14), generator=torch.Generator().manual_seed(0))
    accumulator = PlaneAccumulator(SlidingWindows((12, 14))((1, 12, 14)), (1, 12, 14), first_two, CPU)
    for _ in range(2):
        accumulator.add((0, slice(0, 12), slice(0, 14)), image[:, 0].half())
    assert (accumulator.coordinates().float() - first_two(image)).abs().max() < 0.01
