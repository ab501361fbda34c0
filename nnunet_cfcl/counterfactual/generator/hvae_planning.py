"""Self-configuration of the HVAE: resolutions from the plan's pooling, width and depth from the memory target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nnunet_cfcl.config import GeneratorSettings
from nnunet_cfcl.counterfactual.generator.hvae import HVAE
from nnunet_cfcl.counterfactual.generator.hvae_sizes import HVAESizes, Resolution
from nnunet_cfcl.errors import UserError

#: (width of the finest resolution, blocks of an intermediate resolution), from the smallest model to the largest.
MODELS = ((8, 1), (12, 1), (12, 2), (16, 2), (24, 2), (32, 2), (32, 3))
#: Images that should fit into memory at once, or all images of a step where these are fewer.
IMAGES_PER_PASS = 4
#: Channels of a code at the finest resolution with codes; doubled at every coarser resolution up to the maximum.
FEWEST_CODE_CHANNELS, MOST_CODE_CHANNELS = 2, 16
#: Bias maps encode the position in the image; finer maps would draw an average image.
BIAS_MAPS_UP_TO = 64


def plan_sizes(
    patch_size: Sequence[int], strides: Sequence[Sequence[int]], channels: int, parents: int,
    settings: GeneratorSettings,
) -> tuple[HVAESizes, int]:
    """Choose the largest model of `MODELS` that fits `IMAGES_PER_PASS` images into ``settings.memory_gb``.

    The smallest model needs to fit one image only.

    Args:
        patch_size: (D,) patch size of nnU-Net's plan, in voxels; overridden by ``settings.patch_size``.
        strides: strides (D,) of every stage of the plan's network; 1 in the first stage.
        channels: number of image channels.
        parents: length of the encoded attributes.
        settings: settings of the generator.

    Returns:
        The sizes and the number of images that fit into memory at once.

    Raises:
        UserError: the patch is not divisible by the strides, no model fits into memory, or no resolution has codes.
    """
    shapes = resolutions_of(settings.patch_size or patch_size, strides)
    memory, wanted = settings.memory_gb * 2**30, min(IMAGES_PER_PASS, settings.images_per_step)
    chosen, fitting = None, 0
    models = [model for model in MODELS if settings.width is None and settings.blocks is None]
    for width, blocks in models or [(settings.width or MODELS[1][0], settings.blocks or MODELS[1][1])]:
        candidate = _sizes(shapes, width, blocks, channels, parents, settings)
        per_image = activation_bytes(candidate, 2) / 2
        if (images := int(memory / per_image)) < (wanted if chosen else 1):
            break
        chosen, fitting = candidate, min(images, settings.images_per_step)
    if chosen is None:
        which = "the smallest generator" if models else f"a generator of width {width} and {blocks} blocks"
        raise UserError(f"{which} needs {per_image / 2**30:.2g} GB for a patch of {list(shapes[0])} voxels, but "
                        f"generator.memory_gb is {settings.memory_gb:g}",
                        "raise generator.memory_gb or set a smaller generator.patch_size")
    return chosen, fitting


def resolutions_of(patch_size: Sequence[int], strides: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """Spatial shapes from the patch down to one voxel: the plan's, then one step to a single voxel.

    Raises:
        UserError: the patch has the wrong number of axes or is not divisible by the strides.
    """
    shapes = [tuple(int(n) for n in patch_size)]
    if len(shapes[0]) != len(strides[0]):
        raise UserError(f"generator.patch_size must have {len(strides[0])} numbers, found {list(shapes[0])}")
    for stride in strides:
        if any(n % s for n, s in zip(shapes[-1], stride)):
            total = [math.prod(stage[axis] for stage in strides) for axis in range(len(stride))]
            raise UserError(f"the generator's patch must be divisible by {total}, the plan's pooling, found "
                            f"{list(shapes[0])}", "set generator.patch_size to a multiple")
        if any(s > 1 for s in stride):
            shapes.append(tuple(n // s for n, s in zip(shapes[-1], stride)))
    return shapes if all(n == 1 for n in shapes[-1]) else [*shapes, (1,) * len(shapes[0])]


def _sizes(
    shapes: Sequence[tuple[int, ...]], width: int, blocks: int, channels: int, parents: int, settings: GeneratorSettings
) -> HVAESizes:
    coded = [max(n // m for n, m in zip(shapes[0], shape)) >= settings.finest_codes for shape in shapes]
    if not any(coded):
        raise UserError(f"generator.finest_codes must be at most {max(shapes[0])} for a patch of {list(shapes[0])} "
                        f"voxels, or the generator has no codes, found {settings.finest_codes}", "lower it")
    finest_coded, last = coded.index(True), len(shapes) - 1
    resolutions = tuple(
        Resolution(
            shape=shape,
            width=width * max(1, 2 * level),
            # at the image's own resolution a block costs as much as all coarser blocks together
            encoder_blocks=blocks if 0 < level < last else int(level == last),
            decoder_blocks=(blocks + 1) if 0 < level < last else 1,
            latent=min(MOST_CODE_CHANNELS, FEWEST_CODE_CHANNELS * 2 ** max(0, level - finest_coded)),
            stochastic=coded[level],
        )
        for level, shape in enumerate(shapes))
    log_scale = None if settings.scale is None else math.log(settings.scale)
    sizes = HVAESizes(
        resolutions, channels, parents, bottleneck=2, dropout=settings.dropout, bias_maps_up_to=BIAS_MAPS_UP_TO,
        likelihood=settings.likelihood, log_scale=log_scale, prior=settings.prior)
    if settings.likelihood == "discretised":
        # the grid of 8-bit images over +- 4 standard deviations
        return replace(sizes, low=-4.0, high=4.0, bin_width=8 / 255)
    return sizes


def activation_bytes(sizes: HVAESizes, images: int) -> int:
    """Bytes of float32 activations that autograd keeps for the evidence of ``images`` images; nothing is computed.

    The counterfactuals decoded for the image adversary need half as much again; bfloat16 saves about the same amount.
    """
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(id(tensor), tensor)
        return tensor

    with torch.device("meta"):
        model = HVAE(sizes)
        parameters = {id(parameter) for parameter in model.parameters()}
        noise = [torch.empty((images, *shape)) for shape in model.decoder.code_shapes()]
        inputs = torch.empty((images, sizes.channels, *sizes.resolutions[0].shape))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            evidence = model(inputs, torch.empty((images, sizes.parents)), noise)
    del evidence
    return sum(tensor.numel() * tensor.element_size() for key, tensor in kept.items() if key not in parameters)
