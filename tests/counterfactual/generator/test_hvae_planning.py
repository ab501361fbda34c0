"""Sizes of the generator from nnU-Net's plan and the memory target."""

import math

import pytest
import torch

from nnunet_cfcl.config import resolve_settings
from nnunet_cfcl.counterfactual.generator import hvae_planning
from nnunet_cfcl.counterfactual.generator.hvae import HVAE
from nnunet_cfcl.counterfactual.generator.hvae_planning import MODELS, activation_bytes, plan_sizes, resolutions_of
from nnunet_cfcl.counterfactual.generator.hvae_sizes import HVAESizes, Resolution
from nnunet_cfcl.errors import UserError

#: Strides of every stage, as nnU-Net plans them.
FLAT_512 = [(1, 1), *[(2, 2)] * 7]
HIPPOCAMPUS = [(1, 1, 1), *[(2, 2, 2)] * 3]
PROSTATE = [(1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2)]
SMALL = [(1, 1), (2, 2), (2, 2)]


def settings(**changed):
    return resolve_settings({f"generator.{name}": value for name, value in changed.items()}).generator


def shapes_of(sizes: HVAESizes) -> list[tuple[int, ...]]:
    return [one.shape for one in sizes.resolutions]


@pytest.mark.parametrize(("patch", "strides", "expected"), [
    pytest.param((512, 512), FLAT_512, [(512 >> n,) * 2 for n in range(8)] + [(1, 1)], id="2d"),
    pytest.param((40, 56, 40), HIPPOCAMPUS, [(40, 56, 40), (20, 28, 20), (10, 14, 10), (5, 7, 5), (1, 1, 1)], id="3d"),
    pytest.param((16, 320, 320), PROSTATE, [(16, 320, 320), (16, 160, 160), (16, 80, 80), (8, 40, 40), (4, 20, 20),
                                            (4, 10, 10), (4, 5, 5), (1, 1, 1)], id="anisotropic pooling"),
    pytest.param((4, 4), SMALL, [(4, 4), (2, 2), (1, 1)], id="the plan itself ends at one voxel"),
    pytest.param((8, 8), [(1, 1), (1, 1), (2, 2)], [(8, 8), (4, 4), (1, 1)], id="a stage that does not pool")])
def test_the_resolutions_are_the_plans_and_end_at_one_voxel(patch, strides, expected):
    shapes = resolutions_of(patch, strides)
    assert shapes == expected
    # each one a multiple of the next: what the model asks for
    HVAESizes(tuple(Resolution(shape, 8, 1, 1, 1) for shape in shapes))


def test_a_patch_that_the_plan_cannot_pool_raises_with_the_required_divisors():
    with pytest.raises(UserError, match=r"divisible by \[4, 64, 64\].*found \[16, 320, 300\].*generator.patch_size"):
        resolutions_of((16, 320, 300), PROSTATE)
    with pytest.raises(UserError, match=r"must have 3 numbers, found \[320, 320\]"):
        resolutions_of((320, 320), PROSTATE)


def test_the_patch_of_the_settings_goes_before_the_plans():
    sizes, _ = plan_sizes((512, 512), FLAT_512, 1, 4, settings(patch_size=[128, 256], width=4, blocks=1))
    assert shapes_of(sizes)[0] == (128, 256) and shapes_of(sizes)[-2:] == [(1, 2), (1, 1)]


def saved_bytes(sizes: HVAESizes, images: int) -> int:
    """Memory that autograd keeps of a forward pass, storage by storage, without the parameters."""
    model = HVAE(sizes)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    noise = model.draw_noise(torch.Generator(), images)
    shape = (images, sizes.channels, *sizes.resolutions[0].shape)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        evidence = model(torch.zeros(shape), torch.zeros(images, sizes.parents), noise)
    assert evidence.nll.requires_grad
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in parameters)


@pytest.mark.parametrize(("patch", "strides", "channels", "changed"), [
    ((32, 24), [(1, 1), (2, 2), (2, 2), (2, 2)], 1, {}),
    ((32, 24), [(1, 1), (2, 2), (2, 2), (2, 2)], 3, {"scale": 0.1, "dropout": 0.2}),
    ((32, 24), [(1, 1), (2, 2), (2, 2), (2, 2)], 1, {"likelihood": "discretised", "prior": "conditional"}),
    ((8, 16, 16), [(1, 1, 1), (1, 2, 2), (2, 2, 2)], 2, {"finest_codes": 1})])
def test_the_estimated_memory_is_that_kept_by_autograd(patch, strides, channels, changed):
    sizes, _ = plan_sizes(patch, strides, channels, 5, settings(width=8, blocks=1, **changed))
    for images in (1, 3):
        assert activation_bytes(sizes, images) == pytest.approx(saved_bytes(sizes, images), rel=0.01)


def test_the_memory_grows_with_the_images_and_with_every_larger_model():
    sizes = [plan_sizes((64, 64), FLAT_512[:4], 1, 4, settings(width=width, blocks=blocks))[0]
             for width, blocks in MODELS]
    memory = [activation_bytes(one, 2) for one in sizes]
    assert memory == sorted(memory) and len(set(memory)) == len(MODELS)
    assert activation_bytes(sizes[0], 6) == pytest.approx(3 * memory[0], rel=0.02)


def gigabytes(patch, strides, model, images):
    sizes, _ = plan_sizes(patch, strides, 1, 4, settings(width=model[0], blocks=model[1], memory_gb=1e6))
    return images * activation_bytes(sizes, 2) / 2 / 2**30


@pytest.mark.parametrize("number", [0, 1, 4, 6])
def test_the_largest_model_of_which_four_images_fit_is_taken(number):
    patch, strides = (64, 64), FLAT_512[:5]
    just_enough = gigabytes(patch, strides, MODELS[number], 4) * 1.0001
    sizes, images = plan_sizes(patch, strides, 1, 4, settings(memory_gb=just_enough, images_per_step=5))
    assert (sizes.resolutions[0].width, sizes.resolutions[1].encoder_blocks) == MODELS[number]
    assert images == 4


def test_where_no_model_fits_four_times_the_smallest_takes_as_many_as_fit():
    patch, strides = (128, 128), FLAT_512[:6]
    for fitting in (1, 2, 3):
        memory = gigabytes(patch, strides, MODELS[0], fitting) * 1.01
        sizes, images = plan_sizes(patch, strides, 1, 4, settings(memory_gb=memory))
        assert sizes.resolutions[0].width == MODELS[0][0] and images == fitting


def test_with_fewer_images_per_step_a_larger_model_fits_and_a_pass_has_no_more_than_a_step():
    patch, strides = (64, 64), FLAT_512[:5]
    memory = gigabytes(patch, strides, MODELS[3], 2) * 1.01
    sizes, images = plan_sizes(patch, strides, 1, 4, settings(memory_gb=memory, images_per_step=2))
    assert sizes.resolutions[0].width == MODELS[3][0] and images == 2


def test_too_little_memory_raises_with_the_required_memory():
    needed = gigabytes((512, 512), FLAT_512, MODELS[0], 1)
    with pytest.raises(UserError) as error:
        plan_sizes((512, 512), FLAT_512, 1, 4, settings(memory_gb=0.01))
    message = str(error.value)
    assert f"the smallest generator needs {needed:.2g} GB for a patch of [512, 512] voxels" in message
    assert "generator.memory_gb is 0.01" in message and "generator.patch_size" in message
    with pytest.raises(UserError, match="a generator of width 64 and 2 blocks needs"):
        plan_sizes((512, 512), FLAT_512, 1, 4, settings(memory_gb=0.01, width=64, blocks=2))


def test_width_and_blocks_of_the_settings_override_the_memory_target():
    sizes, images = plan_sizes((32, 32), SMALL, 1, 4, settings(width=10, blocks=4))
    assert sizes.resolutions[0].width == 10 and images == 16
    assert [(one.encoder_blocks, one.decoder_blocks) for one in sizes.resolutions] == [(0, 1), (4, 5), (4, 5), (1, 1)]
    only_width = plan_sizes((32, 32), SMALL, 1, 4, settings(width=10))[0]
    assert only_width.resolutions[1].encoder_blocks == MODELS[1][1]
    only_blocks = plan_sizes((32, 32), SMALL, 1, 4, settings(blocks=3))[0]
    assert only_blocks.resolutions[0].width == MODELS[1][0] and only_blocks.resolutions[1].encoder_blocks == 3


@pytest.mark.parametrize(("finest", "coded"), [
    (1, [1, 1, 1, 1, 1, 1]), (2, [0, 1, 1, 1, 1, 1]), (4, [0, 0, 1, 1, 1, 1]), (5, [0, 0, 0, 1, 1, 1]),
    (320, [0, 0, 0, 0, 0, 1])])
def test_codes_are_drawn_where_voxels_are_coarse_enough_and_are_wider_the_coarser(finest, coded):
    sizes, _ = plan_sizes((16, 320, 320), PROSTATE[:5], 1, 4, settings(finest_codes=finest, width=4, blocks=1))
    assert [int(one.stochastic) for one in sizes.resolutions] == coded
    latent = [one.latent for one in sizes.resolutions if one.stochastic]
    assert latent == [min(16, 2 * 2**n) for n in range(len(latent))]


def test_finest_codes_beyond_all_resolutions_raises():
    with pytest.raises(UserError, match=r"finest_codes must be at most 32 for a patch of \[16, 32\].*found 33"):
        plan_sizes((16, 32), SMALL, 1, 4, settings(finest_codes=33))


def test_the_settings_reach_the_model():
    sizes, _ = plan_sizes((16, 16), SMALL, 2, 7, settings(
        scale=0.05, prior="conditional", dropout=0.3, likelihood="discretised", width=4, blocks=1))
    assert (sizes.channels, sizes.parents, sizes.prior, sizes.dropout) == (2, 7, "conditional", 0.3)
    assert sizes.log_scale == pytest.approx(math.log(0.05))
    # 256 grey levels, the first and the last at the ends
    assert sizes.low + 255 * sizes.bin_width == pytest.approx(sizes.high)
    assert plan_sizes((16, 16), SMALL, 1, 4, settings(width=4, blocks=1))[0].log_scale is None


def test_nothing_is_computed_to_find_the_sizes(monkeypatch):
    """A model for a large patch can be planned on a machine with too little memory for it."""
    made = []
    monkeypatch.setattr(hvae_planning, "HVAE", lambda sizes: made.append(HVAE(sizes)) or made[-1])
    plan_sizes((16, 320, 320), PROSTATE, 1, 4, settings())
    assert made and all(parameter.is_meta for model in made for parameter in model.parameters())
