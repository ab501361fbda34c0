"""MVD-CL: closed forms, its own options, its cost in memory."""

from __future__ import annotations

import doctest
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_cfcl.losses import mvd_cl, mvd_cl_loss


def test_equal_embeddings_give_log_of_all_others():
    z = torch.ones(2, 3, 5, 7, dtype=torch.float64)
    positions = torch.zeros(2, 3, 5, 2, dtype=torch.float64)
    assert mvd_cl_loss(z, positions).loss.item() == pytest.approx(math.log(29), abs=1e-12)


@pytest.mark.parametrize("temperature", [0.05, 0.7])
def test_orthonormal_points_seen_in_every_view_give_the_closed_form(temperature):
    z = torch.eye(6, dtype=torch.float64).reshape(2, 1, 3, 6).repeat(1, 4, 1, 1)
    positions = torch.arange(3.0)[:, None].expand(2, 4, 3, 1)
    # 3 others at the same place, 20 elsewhere
    expected = math.log(3 * math.exp(1 / temperature) + 20) - 1 / temperature
    assert mvd_cl_loss(z, positions, temperature).loss.item() == pytest.approx(expected, abs=1e-12)


def test_a_neighbour_in_the_own_view_is_a_positive_and_one_in_another_image_is_not(objectives, draw_problem):
    z = torch.eye(4, dtype=torch.float64).reshape(2, 1, 2, 4)
    positions = torch.tensor([[[0.0, 0.05]], [[0.0, 0.9]]])[..., None]
    found = mvd_cl_loss(z, positions, temperature=1.0)
    assert (int(found.anchors), int(found.with_positive)) == (4, 2)
    assert found.loss.item() == pytest.approx(math.log(3), abs=1e-12)


def test_the_default_radius_is_a_tenth():
    z, positions = torch.eye(3)[None, None], torch.tensor([0.0, 0.09, 0.2]).reshape(1, 1, 3, 1)
    assert int(mvd_cl_loss(z, positions).with_positive) == 2


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), angle=st.floats(0, 6), factor=st.floats(0.1, 10))
def test_only_distances_between_positions_matter(seed, angle, factor):
    g = torch.Generator().manual_seed(seed)
    z, positions = torch.randn(2, 2, 6, 4, generator=g, dtype=torch.float64), torch.rand(2, 2, 6, 2, generator=g)
    positions = positions.double()
    rotation = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]).double()
    moved = factor * positions @ rotation + torch.randn(2, 1, 1, 2, generator=g)
    distances = torch.cdist(positions.flatten(1, 2), positions.flatten(1, 2))
    radius = 0.3 if (distances - 0.3).abs().min() > 1e-6 else 0.31
    torch.testing.assert_close(
        mvd_cl_loss(z, moved, radius=factor * radius).loss, mvd_cl_loss(z, positions, radius=radius).loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_positions_of_any_floating_type_are_taken(dtype):
    z = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([0.0, 0.0625, 1.0]).expand(2, 2, 3)[..., None]
    torch.testing.assert_close(mvd_cl_loss(z, positions.to(dtype)).loss, mvd_cl_loss(z, positions).loss)


_PEAK = """
import torch
from nnunet_cfcl.losses import blockwise, mvd_cl_loss, pair_rules

def megabytes(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) / 1024

def step(points, d):
    z = torch.randn(2, 3, points, d, requires_grad=True)
    mvd_cl_loss(z, torch.rand(2, 3, points, 2)).loss.backward()

torch.set_num_threads(1)
blockwise._BLOCK_SIDE, pair_rules._STRIP_PAIRS = 500, 2**18
step(400, 8)
before = megabytes("VmHWM")
step(1500, 8)
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_stays_far_below_one_matrix_of_all_pairs():
    added = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True).stdout
    assert float(added) < 0.1 * 9000**2 * 4 / 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.ones(2, 3, 4)}, r"z must be \(B, V, P, d\), got \(2, 3, 4\)"),
        ({"positions": torch.ones(2, 3, 4)}, r"positions must be floating \(2, 3, 5, D\), got torch.float32 \(2, 3, 4"),
        ({"positions": torch.ones(2, 3, 5, 0)}, r"positions must be floating \(2, 3, 5, D\)"),
        ({"positions": torch.ones(2, 3, 5, 2).long()}, r"positions must be floating \(2, 3, 5, D\), got torch.int64"),
        ({"radius": 0.0}, "radius must be finite and above 0, got 0"),
        ({"radius": math.nan}, "radius must be finite and above 0, got nan"),
        ({"radius": math.inf}, "radius must be finite and above 0, got inf"),
    ],
)
def test_unfit_input_is_a_readable_error(change, message):
    with pytest.raises(ValueError, match=message):
        mvd_cl_loss(**{"z": torch.ones(2, 3, 5, 4), "positions": torch.ones(2, 3, 5, 2), **change})


def test_the_documented_example_runs():
    result = doctest.testmod(mvd_cl)
    assert result.attempted > 0 and result.failed == 0
