"""Declarations of all settings: default, meaning, range.

Settings are resolved in three layers, later ones win: the defaults below, the ``"cfcl"`` block of the plan's
configuration, the JSON file named by the environment variable ``nnUNet_cfcl_config``. Keys are nested
(``{"pretrain": {"epochs": 100}}``) or dotted (``{"pretrain.epochs": 100}``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, Literal

from nnunet_cfcl.config.checks import section, setting


@dataclass(frozen=True)
class PretrainSettings:
    """Phase 1 (method sections 3 and 4)."""

    enabled: bool = setting(True, "false: no pretraining, only fine-tuning", identity=False)
    epochs: int = setting(200, "length of the pretraining in epochs", 1)
    iterations_per_epoch: int = setting(250, "optimiser steps per epoch", 1)
    images_per_step: int = setting(8, "images B per step, contrasted with each other", 1)
    points_per_image: int = setting(
        1000, "points P sampled per image and pair of views", 1, read_by=("dual_view", "multi_view", "pixpro"))
    patches_per_pass: int | None = setting(
        None, "patches in one forward pass; null: the plan's batch size. A step of more patches (B times views) is "
        "processed in several passes with cached gradients", 1, identity=False)
    data: Literal["training_and_pool", "training", "pool"] = setting(
        "training_and_pool", "images of phase 1: the fold's training cases and the pool (imagesUn) where there is one, "
        "the training cases alone, or the pool alone, which is pretrained once for all folds")
    temperature: float = setting(
        0.1, "temperature of the contrastive losses between points; the paper's is 0.7", 0.002, 100,
        read_by=("dual_view", "multi_view"))
    image_temperature: float = setting(
        0.5, "temperature of the contrastive loss between whole images", 0.002, 100, read_by=("image_contrast",))
    learn_temperature: bool = setting(
        False, "contrastive losses: true learns the temperature, beginning at pretrain.temperature (SimCLR: "
        "image_temperature)", read_by=("dual_view", "multi_view", "image_contrast"))
    radius: float = setting(
        0.1, "MVD-CL, PixPro: points of an image nearer than this share of the crop's longest side are positives", 0, 2,
        read_by=("multi_view", "pixpro"))
    ignore_radius: float = setting(
        0.0, "DVD-CL (S-DVD-CL: in images without labels): other points of the image within this many millimetres of "
        "the anchor are not negatives", 0, read_by=("dual_view",))
    hard_negatives: float = setting(
        0.0, "losses between points: negatives are weighted by exp(this x cosine similarity); 0: equal weights",
        0, 20, read_by=("dual_view", "multi_view"))
    projection_hidden: int = setting(
        256, "hidden width of the projection head", 1, read_by=("dual_view", "multi_view", "image_contrast", "pixpro"))
    projection_dim: int = setting(
        128, "width d of the embeddings", 2, read_by=("dual_view", "multi_view", "image_contrast", "pixpro"))
    initial_lr: float = setting(3e-3, "AdamW learning rate after the warm-up", 0)
    final_lr: float = setting(1e-6, "learning rate at the end of the cosine", 0)
    weight_decay: float = setting(1e-2, "AdamW weight decay", 0)
    warmup_fraction: float = setting(0.25, "share of the run with a linearly rising rate, at least one step", 0, 1)
    clip_norm: float = setting(1.0, "maximal gradient norm", 1e-12)


@dataclass(frozen=True)
class ViewSettings:
    """Random views of an image (method section 2)."""

    rotation_deg: float = setting(15.0, "rotation is uniform within +- this many degrees, in millimetres", 0, 180)
    crop_fraction: tuple[float, float] = setting(
        (0.08, 1.0), "range of the view's area (2D) or volume (3D) relative to the patch", 1e-4, 1)
    aspect_ratio: tuple[float, float] = setting((0.75, 4 / 3), "range of the aspect ratio of the view", 0.1, 10)
    min_overlap: float = setting(
        0.1, "smallest share of the smaller of two views that lies in the other; views are redrawn below it", 0, 0.9)
    jitter_probability: float = setting(0.8, "probability of brightness and contrast changes", 0, 1)
    brightness: float = setting(0.4, "brightness factor is uniform in 1 +- this", 0, 1)
    contrast: float = setting(0.4, "contrast factor is uniform in 1 +- this", 0, 1)
    blur_probability: float = setting(0.5, "probability of a Gaussian blur", 0, 1)
    blur_sigma: tuple[float, float] = setting((0.1, 2.0), "range of the blur's sigma in pixels of the view", 0, 20)
    solarise_probability: float = setting(0.2, "probability of solarising a counterfactual view", 0, 1)
    solarise_threshold: float = setting(0.5, "intensities above this share of the range are inverted", 0, 1)


@dataclass(frozen=True)
class CounterfactualSettings:
    """Source of the counterfactuals."""

    source: Literal["auto", "generator", "precomputed", "acquisition"] = setting(
        "auto", "auto: an imported store; without one, a generator trained on attributes.csv; without that, "
        "acquisition effects", identity=False)
    store: bool | str | None = setting(
        None, "folder of a counterfactual store; null: the dataset's own; false: the generator works on every crop "
        "during the pretraining, and stores nothing", identity=False)
    count: int = setting(3, "counterfactuals per image; the number of views is one more", 1, 31)
    interventions: tuple[str, ...] | None = setting(
        None, "interventions of the generator, e.g. [\"scanner\", \"scanner+disease\"]; null: every binary or "
        "categorical attribute with enough cases, separately and all together", identity=False)
    abduction: Literal["mean", "sample"] = setting(
        "mean", "codes of an image: the mean of their posterior, or a sample of it", identity=False)


@dataclass(frozen=True)
class GeneratorSettings:
    """Phase 0: the generator of counterfactuals, a hierarchical VAE of images given their attributes (method 1)."""

    epochs: int = setting(100, "length of the generator's training in epochs", 1)
    iterations_per_epoch: int = setting(250, "optimiser steps per epoch", 1)
    images_per_step: int = setting(16, "images per step, processed in as many passes as the memory requires", 1)
    patch_size: tuple[int, ...] | None = setting(
        None, "size of the generator's images in voxels, divisible as the plan's patch is; null: the plan's patch", 1)
    memory_gb: float = setting(
        8.0, "memory limit of the activations of a pass in GiB; widths, blocks and images per pass are chosen to fit",
        0.01, identity=False)  # its effect on the model is in the sizes
    width: int | None = setting(
        None, "channels of the generator's finest resolution; null: by the memory, with generator.blocks", 4)
    blocks: int | None = setting(None, "its blocks per resolution; null: by the memory, with generator.width", 1)
    finest_codes: int = setting(
        2, "codes are drawn at resolutions whose voxels are at least this many times the image's; finer codes would "
        "copy the image and make the attributes redundant", 1)
    prior: Literal["exogenous", "conditional"] = setting(
        "exogenous", "exogenous: the prior of the codes is independent of the attributes, so that codes cannot carry "
        "them; conditional: the prior depends on the attributes, as in the paper")
    likelihood: Literal["continuous", "discretised"] = setting(
        "continuous", "discretised: intensities lie on a grid of 256 values over four standard deviations to either "
        "side, as 8-bit ones do")
    scale: float | None = setting(
        None, "scale of the likelihood in standard deviations of the images; null: learned for every voxel", 1e-4, 10)
    beta: float = setting(1.0, "weight of the codes' divergence", 0)
    invariance: float = setting(
        1.0, "weight of the adversary that predicts the attributes from the codes; 0: none, as in the paper", 0)
    realism: float = setting(
        0.1, "weight of the adversary between decoded counterfactuals and decoded images; 0: none, as in the paper", 0)
    adversary_lr: float = setting(1e-3, "AdamW learning rate of the adversaries", 0)
    beta_warmup_fraction: float = setting(0.1, "share of the training in which beta rises linearly to its value", 0, 1)
    free_bits: float = setting(
        0.0, "the divergence of a resolution is not penalised below this many nats per voxel of the image", 0)
    initial_lr: float = setting(1e-3, "AdamW learning rate after the warm-up", 0)
    weight_decay: float = setting(1e-3, "AdamW weight decay", 0)
    warmup_steps: int = setting(100, "steps with a linearly rising rate", 0)
    clip_norm: float = setting(50.0, "maximal gradient norm", 1e-12)
    skip_norm: float = setting(1e4, "a step whose gradient norm is larger, or not finite, is skipped", 0)
    ema: float = setting(0.999, "decay of the moving average of the weights; the averaged weights are used", 0, 1)
    dropout: float = setting(0.0, "dropout in the blocks", 0, 0.9)
    shift: float = setting(0.05, "crops are shifted beyond the image by up to this share of the patch", 0, 0.5)
    mirror_axes: tuple[int, ...] = setting((), "axes mirrored at random in training, in array order", 0, 2)
    parents_dropped: float = setting(
        0.05, "probability that an attribute is hidden in training, so that unknown values are learned", 0, 0.9)
    validation_share: float = setting(
        0.2, "share of the patients held out, for the generator's validation and for the gate", 0.01, 0.5)
    finetune_epochs: int = setting(
        20, "length of the counterfactual fine-tuning in epochs, run only if the gate finds an intervention "
        "ineffective; 0: never", 0, identity=False)
    finetune_lr: float = setting(1e-4, "learning rate of the counterfactual fine-tuning", 0, identity=False)
    finetune_slack: float = setting(
        0.02, "largest loss of evidence in the counterfactual fine-tuning, in nats per voxel", 0, identity=False)
    samples_every: int = setting(
        5, "epochs between two pictures of counterfactuals", 1, identity=False)


@dataclass(frozen=True)
class GateSettings:
    """Requirements on an intervention of the generator, measured on held-out patients."""

    enabled: bool = setting(True, "false: every intervention is used, whatever its results")
    effectiveness: float = setting(
        0.8, "least share of counterfactuals whose attribute predictor returns the intended value (for the other "
        "attributes, the original one), relative to its accuracy on real images", 0, 1)
    predictability: float = setting(
        0.4, "least accuracy of the predictor on real images, from 0 (chance) to 1 (no errors); below it the "
        "intervention cannot be judged and is not used", 0, 1)
    composition: float = setting(
        0.05, "largest mean change by the null intervention, in standard deviations of the images", 0)
    reversibility: float = setting(
        0.5, "largest mean difference after intervention and reversal, relative to that after the intervention", 0)
    anatomy: float = setting(
        0.9, "with labels: least Dice of a small segmentation network on counterfactuals, relative to that on their "
        "originals", 0, 1)
    structure: float = setting(
        0.6, "without labels: least correlation between the edges of an image and those of its counterfactual",
        -1, 1)
    distance: float = setting(
        1.0, "largest distance of the counterfactuals' intensities to those of the target group, relative to that of "
        "the originals; the difference between two samples of one group is tolerated in addition", 0)
    cases: int = setting(64, "largest number of images to evaluate, from as many cases and groups as possible", 1)
    predictor_steps: int = setting(600, "training steps of the attribute predictor", 1)
    segmenter_steps: int = setting(200, "training steps of the segmentation network", 1)


@dataclass(frozen=True)
class AcquisitionSettings:
    """Analytic interventions on the acquisition (no attributes needed)."""

    probability: float = setting(0.75, "probability of each of the four effects", 0, 1)
    matching: tuple[float, float] = setting(
        (0.0, 1.0), "range of the shift of the transfer curve towards another case's intensity distribution", 0, 1)
    gamma: tuple[float, float] = setting((0.5, 2.0), "range of the transfer curve's exponent (log-uniform)", 0.05, 20)
    point_spread: tuple[float, float] = setting((0.0, 1.0), "range of the point spread's sigma, in-plane voxels", 0, 20)
    noise_level: tuple[float, float] = setting(
        (0.0, 0.05), "range of the noise's standard deviation as a share of the intensity range", 0, 1)
    noise_correlation: tuple[float, float] = setting(
        (0.0, 1.0), "range of the sigma of the noise's point spread (its texture) in in-plane voxels", 0, 20)
    bias_field: tuple[float, float] = setting((0.0, 0.4), "range of the amplitude of the log bias field", 0, 3)


@dataclass(frozen=True)
class SilverSettings:
    """Labels of the supervised objectives: manual, or predicted by a model (``labelsSilver``)."""

    min_quality: float = setting(0.7, "silver labels of lower quality (silver.csv) are not used", 0, 1)
    confidence: bool = setting(
        True, "losses between points: points are weighted by the confidence of their silver label; false: equally")
    training_cases: Literal["manual", "silver"] = setting(
        "manual", "labels of the fold's training cases: manual, or silver where available")
    balanced_share: float = setting(
        0.5, "share of the crops that contain foreground, if a few attempts find it, and of the points drawn in "
        "equal numbers from every foreground class of the crop", 0, 1)


@dataclass(frozen=True)
class BaselineSettings:
    """Settings of the baselines."""

    mask_ratio: float = setting(
        0.75, "MAE: masked share of the blocks", 0.01, 0.99, read_by=("masked_autoencoder",))
    mask_block: int = setting(
        8, "MAE: side of a masked block in voxels, smaller on shorter axes", 1, read_by=("masked_autoencoder",))
    pixpro_momentum: float = setting(
        0.99, "PixPro: momentum of the second branch at the start; it rises to 1", 0, 1, read_by=("pixpro",))
    pixpro_sharpness: float = setting(
        2.0, "PixPro: exponent of the similarity in the propagation", 0, 10, read_by=("pixpro",))


@dataclass(frozen=True)
class FinetuneSettings:
    """Phase 2: nnU-Net's training. ``null`` keeps the value of the nnU-Net trainer."""

    epochs: int | None = setting(None, "epochs", 1)
    iterations_per_epoch: int | None = setting(None, "training iterations per epoch", 1)
    val_iterations_per_epoch: int | None = setting(None, "validation iterations per epoch", 1)
    initial_lr: float | None = setting(None, "learning rate after the warm-up; null: that of the nnU-Net trainer", 0)
    warmup_fraction: float = setting(0.05, "share of the epochs with a linearly rising rate", 0, 1)
    frozen_fraction: float = setting(
        0.0, "share of the epochs, rounded, in which pretrained weights are frozen and only the segmentation layers "
        "are trained; without effect if these were pretrained too (SilverSeg), or without pretraining", 0, 1)
    mirror_axes: tuple[int, ...] | None = setting(
        None, "axes mirrored in training and prediction, in array order (0 is z in 3D, y in 2D); [] for none, required "
        "by labels that distinguish left and right", 0, 2)
    rotation_deg: float | None = setting(None, "rotation augmentation is uniform within +- this many degrees", 0, 180)
    counterfactual_probability: float = setting(
        0.0, "probability that a training image is replaced by one of its counterfactuals, from the same source as in "
        "the pretraining; the mask is kept", 0, 1)
    acquisition_probability: float = setting(
        0.0, "probability that a training image which is not replaced by a counterfactual gets the effects of the "
        "section acquisition", 0, 1)


@dataclass(frozen=True)
class TeacherSettings:
    """Phase 3: a moving-average teacher labels the pool, the student learns from its counterfactuals (method 8)."""

    enabled: bool | None = setting(
        None, "null: as the trainer's class has it; true: phase 3 follows whatever the trainer, an error without a "
        "pool; false: no phase 3")
    epochs: int | None = setting(None, "length in epochs of as many iterations as phase 2's; null: by the budget", 1)
    budget: float = setting(
        0.25, "cost of phase 3 relative to that of phase 2, in passes of a patch; a pass without gradients counts a "
        "third", 0, 10)
    start_from: str | None = setting(
        None, "checkpoint of a finished training with the same plan, in place of phases 0 to 2")
    lr_factor: float = setting(
        0.5, "learning rate at the start, relative to the initial one of phase 2; it falls as nnU-Net's does", 0, 10)
    decay: float | None = setting(
        None, "largest decay of the teacher's moving average; null: 0.99, in phases of 5000 steps or more 0.999", 0, 1)
    rising_decay: bool = setting(
        True, "true: the decay after t steps is at most 1 - 1 / (t + 1), so that the average begins with the phase's "
        "first steps; false: it is constant, so that the average begins with the weights of phase 2")
    confidence: float = setting(
        0.9, "voxels are labelled whose class (region: inside or outside) has at least this probability", 0.5, 1)
    weight: float = setting(
        1.0, "weight of the loss on the pool; 0: the phase goes on with the labelled images alone, for comparison", 0)
    ramp_fraction: float = setting(0.05, "share of the phase in which the weight rises to its value", 0, 1)
    strong_view: Literal["counterfactual", "intensity", "noise"] = setting(
        "counterfactual", "what the student sees of the pool: counterfactuals with the intensity effects of the "
        "section views; for comparison, these effects alone, or weak noise")
    intensity_probability: float = setting(
        0.5, "probability that the student's view gets the intensity effects of the section views too (brightness, "
        "contrast, blur, solarisation)", 0, 1)
    noise: float = setting(0.1, "standard deviation of the noise, relative to that of the images", 0)
    crop_fraction: tuple[float, float] = setting(
        (0.5, 1.0), "range of the area (2D) or volume (3D) of the views of the pool, relative to the patch", 1e-4, 1)
    mix_probability: float = setting(
        0.5, "probability that a box of a pool image is replaced by that of another image of the step (CutMix)", 0, 1)
    mix_size: tuple[float, float] = setting((0.1, 0.4), "range of the box's size relative to the patch", 0.001, 1)
    paste_labelled: bool = setting(True, "boxes also come from the labelled images, with their manual labels")
    balance: str | None = setting(
        "scanner", "attribute (attributes.csv) whose values are drawn equally often; null, or a dataset without it: "
        "all images of the pool alike")
    result: Literal["teacher", "student"] = setting(
        "teacher", "whose weights are the result: the teacher's average, or the student's last ones")
    patches_per_pass: int | None = setting(
        None, "images of the pool in one forward pass, over which the Dice is computed; null: all of the step, as many "
        "as the plan's batch", 1)


@dataclass(frozen=True)
class ChromapSettings:
    """CHRO-maps: colours of the network's features in each voxel (method section 5)."""

    fit: bool = setting(
        True, "fit the model's colour space at the end of training, so that colours are comparable between its maps")
    reducer: Literal["umap", "pca"] = setting(
        "umap", "projection of features to a plane; pca is faster, and linear")
    palette: Literal["hsv", "oklch"] = setting(
        "hsv", "hsv: that of the paper; oklch: constant lightness, better with colour blindness")
    components: int = setting(8, "principal components that features are reduced to before windows are blended", 2, 64)
    landmarks: int = setting(2000, "voxels that UMAP embeds; all others follow the nearest of them", 16, 20000)
    samples: int = setting(50000, "voxels on which the colour space is fitted", 100)
    cases: int = setting(64, "largest number of training cases from which they are drawn", 1)
    coverage: float = setting(
        0.99, "share of the plane's points inside the ellipse mapped to the colour wheel; the others get its rim",
        0.5, 1)
    mirroring: bool = setting(False, "average the features over nnU-Net's mirrored predictions too")
    alpha: float = setting(0.5, "opacity of the colours over the grey image; 1: colours alone", 0, 1)
    grey_background: bool = setting(False, "darken colours where the image is dark")
    embedding: bool = setting(False, "also write the two coordinates in the plane (CASE_embedding.nii.gz)")


@dataclass(frozen=True)
class Settings:
    """All settings. ``seed`` determines every random draw of both phases."""

    seed: int = setting(0, "seed of the initialisation, the pretraining's draws and the fine-tuning", 0)
    preset: Literal["none", "paper"] = setting(
        "none", "paper: every trainer uses the views of the paper instead of the section views",
        identity=False)  # its effect is in the views
    pretrain: PretrainSettings = section(PretrainSettings)
    views: ViewSettings = section(ViewSettings)
    counterfactual: CounterfactualSettings = section(CounterfactualSettings)
    generator: GeneratorSettings = section(GeneratorSettings, read_by=("generator",))
    gate: GateSettings = section(GateSettings, identity=False)
    acquisition: AcquisitionSettings = section(AcquisitionSettings, read_by=("acquisition",))
    silver: SilverSettings = section(SilverSettings, read_by=("labels",))
    baseline: BaselineSettings = section(BaselineSettings)
    finetune: FinetuneSettings = section(FinetuneSettings, identity=False)
    teacher: TeacherSettings = section(TeacherSettings, identity=False)
    chromap: ChromapSettings = section(ChromapSettings)

    def to_dict(self) -> dict[str, Any]:
        """Nested, JSON-ready dictionary of all settings."""
        text = json.dumps(self, default=lambda node: {f.name: getattr(node, f.name) for f in fields(node)})
        nested = json.loads(text)
        assert isinstance(nested, dict)
        return nested
