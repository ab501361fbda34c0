"""Counterfactuals generated on the fly: parameters drawn in workers, and their application."""

import json
import pickle
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from nnunet_cfcl.counterfactual.generator.source import DrawnInterventions, GeneratorSource
from nnunet_cfcl.counterfactual.generator.whole_cases import CaseChange, SlidingWindowCounterfactuals
from nnunet_cfcl.nnunet.sliding_windows import SlidingWindows
from nnunet_cfcl.views import CropBox, draw_crop_box
from tests.conftest import CasesInMemory
from tests.counterfactual.random_generator import CODING, INTERVENTIONS, random_generator

CELLS = {"case": {"scanner": "A", "disease": "no", "age": "55"}, "other": {"scanner": "B", "disease": "yes"}}
SIZES = {2: [(16, 12), (23, 30), (9, 20)], 3: [(6, 8, 8), (9, 13, 8), (4, 12, 5)]}
CROPS = pytest.mark.parametrize(
    "size", [size for dim in (2, 3) for size in SIZES[dim]],
    ids=[f"{dim}d, {what}" for dim in (2, 3) for what in ("the patch", "larger", "smaller")])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def source_of(dim=2, channels=1, abduction="mean", zero_is_outside=False, per_pass=5, **more) -> GeneratorSource:
    generator = random_generator(dim, channels, **more)
    return GeneratorSource(
        generator, CELLS, INTERVENTIONS, SlidingWindows(generator.patch_size), per_pass, abduction, zero_is_outside)


def whole(size) -> CropBox:
    """A crop that is the whole image."""
    size3 = (1,) * (3 - len(size)) + tuple(size)
    return CropBox((0, 0, 0), size3, size3, len(size))


def rows_of(source, size, images=2, count=3, box=None, seed=0) -> DrawnInterventions:
    """Parameters of ``images`` images in order, as `render_views` takes them from a batch."""
    names = sorted(CELLS)
    batch = default_collate([source.draw(rng(seed + n), names[n % 2], box or whole(size), count)
                             for n in range(images)])
    return DrawnInterventions(*(field.flatten(0, 1) for field in batch))


def crops(size, images=2, count=3, channels=1, seed=0) -> torch.Tensor:
    """Crops (images x count, C, *size), equal in all rows of an image."""
    return torch.randn(images, channels, *size, generator=rng(seed)).repeat_interleave(count, 0)


def take(drawn, rows) -> DrawnInterventions:
    return DrawnInterventions(*(field[rows] for field in drawn))


# ---------------------------------------------------------------- draw


def test_drawn_are_encoded_attributes_before_and_after_an_intervention():
    drawn = source_of().draw(rng(), "case", whole((16, 12)), 3)
    assert sorted(drawn.intervention.tolist()) == [0, 1, 2]
    for number, before, after in zip(drawn.intervention, drawn.parents, drawn.others):
        torch.testing.assert_close(before, CODING.encode(CELLS["case"]))
        changed = {"scanner": (before[:4] != after[:4]).any(), "disease": (before[4:6] != after[4:6]).any()}
        assert {name for name, differs in changed.items() if differs} == set(INTERVENTIONS[number].name.split("+"))
        torch.testing.assert_close(before[6:], after[6:])


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_interventions_repeat_only_where_there_are_fewer(count):
    for seed in range(10):
        chosen = source_of().draw(rng(seed), "case", whole((16, 12)), count).intervention.tolist()
        occurrences = [chosen.count(number) for number in range(3)]
        assert len(chosen) == count and max(occurrences) - min(occurrences) <= 1


def test_a_case_without_attributes_is_unknown_before_and_may_become_any_value():
    source = source_of()
    drawn = [source.draw(rng(seed), "nobody", whole((16, 12)), 3) for seed in range(20)]
    assert all((one.parents == CODING.encode({})).all() for one in drawn)
    scanners = {tuple(row[:4].tolist()) for one in drawn for row in one.others}
    assert scanners == {(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)}


def test_workers_draw_the_same_without_carrying_the_model():
    source = source_of()
    content = pickle.dumps(source)
    assert len(content) < 2000 + 100 * len(CELLS)
    copy = pickle.loads(content)
    for seed in range(5):
        for mine, its in zip(*(s.draw(rng(seed), "other", whole((16, 12)), 4) for s in (source, copy)), strict=True):
            assert torch.equal(mine, its)
    assert copy.identity() == source.identity()
    with pytest.raises(RuntimeError, match="this copy of the source has no generator"):
        copy.apply(torch.zeros(4, 1, 16, 12), copy.draw(rng(), "case", whole((16, 12)), 4), (1.0, 1.0))


def test_drawn_parameters_are_collated_image_by_image():
    drawn = rows_of(source_of(), (16, 12), images=3)
    assert drawn.parents.shape == drawn.others.shape == (9, CODING.width) and drawn.valid.shape == (9, 2, 2)
    assert len(set(drawn.noise_seed.tolist())) == 3


def test_the_identity_differs_between_generators_interventions_and_abductions():
    generator = random_generator()
    windows = SlidingWindows(generator.patch_size)
    sources = [source_of(), source_of(seed=1), source_of(abduction="sample"),
               GeneratorSource(generator, CELLS, INTERVENTIONS[:2], windows, 5, "mean", False)]
    assert len({json.dumps(source.identity(), sort_keys=True) for source in sources}) == 4
    assert source_of(per_pass=1).identity() == source_of().identity()


# ---------------------------------------------------------------- apply


def test_a_crop_of_the_generators_size_is_its_own_counterfactual():
    for dim in (2, 3):
        size = SIZES[dim][0]
        source, generator = source_of(dim, channels=2), random_generator(dim, channels=2)
        drawn, images = rows_of(source, size), crops(size, channels=2)
        expected = generator.counterfactuals(images, drawn.parents, drawn.others)
        torch.testing.assert_close(source.apply(images, drawn, (1.0,) * dim), expected, rtol=0, atol=1e-4)


@CROPS
@pytest.mark.parametrize("learned_scale", [True, False])
def test_other_crops_are_blended_as_whole_cases_are(size, learned_scale):
    dim = len(size)
    source = source_of(dim, learned_scale=learned_scale)
    drawn, images = rows_of(source, size), crops(size)
    found = source.apply(images, drawn, (1.0,) * dim)
    shape = whole(size).shape
    arrays = {str(n): images[n].view(1, *shape).numpy() for n in range(len(images))}
    blend = SlidingWindowCounterfactuals(random_generator(dim, learned_scale=learned_scale), CasesInMemory(arrays),
                          SlidingWindows(SIZES[dim][0]), 5, False)
    asked = (CaseChange(str(n), drawn.parents[n], drawn.others[n][None]) for n in range(len(images)))
    parts: dict[str, list] = {}
    for slab in blend.slabs(asked):
        parts.setdefault(slab.case, []).append(slab.images)
    for n, row in enumerate(found):
        expected = torch.cat(parts[str(n)], 2)[0].view(1, *size)
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-2)
    assert found.dtype == torch.float32 and (found - images).abs().mean() > 0.05


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("abduction", ["mean", "sample"])
def test_rows_are_the_same_in_any_grouping_and_exactly_so_in_the_same_one(dim, abduction):
    size = SIZES[dim][1]
    source = source_of(dim, abduction=abduction)
    drawn, images = rows_of(source, size, images=3), crops(size, images=3)
    together = source.apply(images, drawn, (1.0,) * dim)
    assert torch.equal(source.apply(images, drawn, (1.0,) * dim), together)
    for rows in ([4], [0, 1, 3], [8, 2, 5, 7, 1], [1, 1]):
        torch.testing.assert_close(source.apply(images[rows], take(drawn, rows), (1.0,) * dim), together[rows],
                                   rtol=0, atol=1e-4)


def test_the_interventions_on_one_image_share_encoder_and_abduction():
    source = source_of(per_pass=100)
    model = source._generator.model
    with (mock.patch.object(model.encoder, "forward", wraps=model.encoder.forward) as encoder,
          mock.patch.object(model.decoder, "forward", wraps=model.decoder.forward) as decoder):
        source.apply(crops((16, 24)), rows_of(source, (16, 24)), (1.0, 1.0))
    assert encoder.call_count == 1 and decoder.call_count == 1 + 3
    assert len(encoder.call_args.args[0]) == 2 * 3  # two images, three windows


def test_samples_of_the_posterior_differ_with_the_seed_and_means_do_not():
    size, images = (20, 20), crops((20, 20))
    for abduction, differ in (("sample", True), ("mean", False)):
        source = source_of(abduction=abduction)
        drawn = rows_of(source, size)
        other = drawn._replace(noise_seed=drawn.noise_seed + 1)
        one, two = (source.apply(images, parameters, (1.0, 1.0)) for parameters in (drawn, other))
        assert ((one - two).abs().max() > 0.05) == differ


@pytest.mark.parametrize("dim", [2, 3])
def test_padding_stays_and_the_generator_sees_the_border_repeated_in_its_place(dim):
    """As in its training and for whole cases."""
    image = np.random.default_rng(0).normal(size=(1, 1 if dim == 2 else 7, 20, 9)).astype(np.float32)
    size = (24, 20) if dim == 2 else (9, 24, 12)
    box = draw_crop_box(rng(), image.shape[1:], size)
    part = image[(slice(None), *box.inside)]
    padded, extended = (pad(part)[None].repeat(3, 1, *[1] * dim) for pad in (box.pad, box.extend))
    source = source_of(dim)
    found = source.apply(padded, rows_of(source, size, images=1, box=box), (1.0,) * dim)
    expected = source.apply(extended, rows_of(source, size, images=1), (1.0,) * dim)
    low, high = box.valid_range
    real = torch.zeros(size, dtype=torch.bool)
    real[tuple(map(slice, low, high))] = True
    assert 0 < real.float().mean() < 1 and (found[..., ~real] == 0).all()
    torch.testing.assert_close(found[..., real], expected[..., real], rtol=0, atol=1e-4)


def test_voxels_outside_of_the_mask_stay_zero():
    images = crops((20, 20), channels=2)
    images[:, :, :5], images[:, 0, 12:] = 0, 0
    for outside in (True, False):
        source = source_of(channels=2, zero_is_outside=outside)
        found = source.apply(images, rows_of(source, (20, 20)), (1.0, 1.0))
        assert (found[:, :, :5] == 0).all() == outside
        assert (found[:, :, 5:] != images[:, :, 5:]).float().mean() > 0.9


def test_crops_keep_their_type():
    source = source_of()
    drawn = rows_of(source, (20, 20))
    for dtype in (torch.float64, torch.float16):
        found = source.apply(crops((20, 20)).to(dtype), drawn, (1.0, 1.0))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), source.apply(crops((20, 20)), drawn, (1.0, 1.0)), rtol=0, atol=1e-2)
