"""Build the task of phase 3 from a fold and its live training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import Tensor

from nnunet_cfcl.config import Settings
from nnunet_cfcl.counterfactual.choice import choose_source
from nnunet_cfcl.counterfactual.mixed import MixedSource
from nnunet_cfcl.counterfactual.source import AcquisitionSource, CounterfactualSource, PrecomputedSource
from nnunet_cfcl.counterfactual.targeted import TargetedCounterfactuals
from nnunet_cfcl.data.attributes import is_missing
from nnunet_cfcl.data.pretraining_cases import pretraining_cases
from nnunet_cfcl.data.pretraining_reader import PretrainingCases
from nnunet_cfcl.nnunet.fold import FoldContext
from nnunet_cfcl.nnunet.live_training import LiveTraining
from nnunet_cfcl.nnunet.plan import check_single_stage, fingerprint
from nnunet_cfcl.nnunet.segmentation_loss import labels_of
from nnunet_cfcl.phases.attributes_of_cases import known_attributes
from nnunet_cfcl.phases.generator_phase import lazy_generator_source
from nnunet_cfcl.phases.lazy_source import LazySource
from nnunet_cfcl.runs.ranks import Ranks
from nnunet_cfcl.runs.seeds import generator_for
from nnunet_cfcl.teacher.data import STREAM, teacher_views
from nnunet_cfcl.teacher.pseudo_labels import shares
from nnunet_cfcl.teacher.task import TeacherTask
from nnunet_cfcl.views import check_patch, draw_crop_box

#: Crops of labelled cases in which the classes' shares are counted.
COUNTED_CROPS = 256
#: Cost of a pass without gradients, in passes with gradients.
FORWARD_COST = 1 / 3
#: Name of the group of cases whose attribute is unknown, and of all cases without the attribute.
UNKNOWN, ALL = "unknown", "pool"


def pool_cases(fold: FoldContext) -> PretrainingCases:
    """Select the fold's training cases with their labels, and the pool without the validation patients.

    Raises:
        UserError: see `pretraining_cases`; the configuration is a cascade's second stage; the patch is too small.
    """
    check_single_stage(fold.configuration_name, fold.configuration)
    check_patch(fold.geometry, teacher_views(fold.settings))
    silent = replace(fold, log=lambda *line, **how: None)
    reader = pretraining_cases(silent, _with_pool(fold.settings), needs_labels=True)
    if fold.settings.pretrain.data == "pool":
        # counterfactuals were made for these cases alone: without the patients of all labelled ones
        kept = set(pretraining_cases(silent, fold.settings, needs_labels=False).cases)
        reader.pool = tuple(case for case in reader.pool if case in kept)
    return reader


def planned_source(fold: FoldContext, ranks: Ranks, reader: PretrainingCases) -> CounterfactualSource:
    """The counterfactuals of the pool, not generated yet where a generator makes them; called by every rank.

    Raises:
        UserError: see `lazy_generator_source` and `choose_source`.
    """
    settings, dim = fold.settings, len(fold.geometry.patch_size)
    if settings.teacher.strong_view != "counterfactual" or not settings.teacher.weight:
        return AcquisitionSource(reader, settings.acquisition, fold.schemes, dim)
    lazy = lazy_generator_source(replace(fold, settings=_with_pool(settings, "pool")), ranks)
    return lazy or ranks.main_first(lambda: choose_source(
        settings, _OnlyPool(reader), fold.preprocessed, fold.schemes, dim))


def student_source(
    fold: FoldContext, reader: PretrainingCases, planned: CounterfactualSource, labelled_value: str | None
) -> tuple[CounterfactualSource, TargetedCounterfactuals | None]:
    """The counterfactuals that the student sees, and those on the labelled scanner that the teacher sees too.

    Half of the former are acquisition effects, all where no intervention of a generator passed its gate.

    Args:
        fold: the fold that is trained.
        reader: from `pool_cases`.
        planned: from `planned_source`, materialised.
        labelled_value: scanner of the labelled cases, from `pool_groups`.
    """
    settings = fold.settings
    acquisition = AcquisitionSource(reader, settings.acquisition, fold.schemes, len(fold.geometry.patch_size))
    made = planned.source() if isinstance(planned, LazySource) else planned
    made = made.generated if isinstance(made, MixedSource) else made
    if isinstance(made, AcquisitionSource):
        return acquisition, None
    weak = None
    if isinstance(made, PrecomputedSource) and labelled_value is not None and settings.teacher.balance:
        weak = TargetedCounterfactuals(made.store, settings.teacher.balance, labelled_value)
    return MixedSource(made, acquisition, 1, 1), weak if weak else None


def teacher_identity(
    fold: FoldContext, training: LiveTraining, reader: PretrainingCases, planned: CounterfactualSource, start: str
) -> dict[str, Any]:
    """Everything that determines the result of phase 3, known before any counterfactual is generated.

    Args:
        fold: the fold that is trained.
        training: the trainer's network, batches and loss.
        reader: from `pool_cases`.
        planned: from `planned_source`.
        start: digest of the weights of phase 2.
    """
    every = fold.settings.to_dict()
    without = ("enabled", "start_from", "patches_per_pass")
    own = {key: value for key, value in every["teacher"].items() if key not in without}
    return {
        "seed": fold.settings.seed, "teacher": own,
        **{section: every[section] for section in ("views", "acquisition", "finetune")},
        "start": start, "epochs": training.epochs, "iterations": training.iterations,
        "batch_size": training.batch_size, "plan": fingerprint(fold.configuration),
        "pool": list(reader.pool), "images": reader.image_content(), "counterfactuals": planned.identity(),
    }


def build_teacher_task(
    fold: FoldContext, ranks: Ranks, training: LiveTraining, reader: PretrainingCases, planned: CounterfactualSource,
    identity: Mapping[str, Any],
) -> TeacherTask:
    """Build the task of phase 3: cases, counterfactuals, length.

    Args:
        fold: the fold that is trained.
        ranks: the processes that share every step.
        training: the trainer's network, batches and loss.
        reader: from `pool_cases`.
        planned: from `planned_source`, materialised.
        identity: from `teacher_identity`.
    """
    settings, labels = fold.settings, fold.labels
    groups, labelled_value = pool_groups(fold, reader)
    source, weak = student_source(fold, reader, planned, labelled_value)
    heads = head_names(fold)
    offset = training.epochs_before + training.epochs
    return TeacherTask(
        # nnU-Net's own data loading processes go on beside these
        settings=settings, device=fold.device, workers=get_allowed_n_proc_DA() // 2,
        folder=fold.folder / "cfcl" / "teacher",
        identity=identity, log=fold.log, ranks=ranks, checkpoints=fold.saves, reader=reader, groups=groups,
        source=source, geometry=fold.geometry, labelled=training.batches, segmentation_loss=training.loss,
        output_weights=training.output_weights, heads=heads, regions=labels.has_regions,
        expected_shares=manual_shares(fold, reader, len(heads)),
        epochs=settings.teacher.epochs or epochs_by_budget(settings, training.epochs, 1 if weak is None else 2),
        iterations=training.iterations, images_per_step=training.batch_size, weak=weak,
        ignore_label=labels.ignore_label, compile=fold.compiled, validate=training.pseudo_dice,
        track=lambda line: fold.track({f"teacher_{key}" if key != "epoch" else key: value + offset * (key == "epoch")
                                       for key, value in line.items()}))


def epochs_by_budget(settings: Settings, epochs: int, weak_views: int) -> int:
    """Number of epochs whose cost is ``teacher.budget`` times that of phase 2; at least 1.

    A step passes a batch of labelled images and one of the pool with gradients, and the pool's through the teacher.

    Args:
        settings: the resolved settings.
        epochs: length of phase 2.
        weak_views: number of versions of an image that the teacher sees.
    """
    step = 2 + FORWARD_COST * weak_views if settings.teacher.weight else 1
    return max(1, round(settings.teacher.budget * epochs / step))


def pool_groups(fold: FoldContext, reader: PretrainingCases) -> tuple[dict[str, tuple[str, ...]], str | None]:
    """Divide the pool by the attribute ``teacher.balance``.

    Returns:
        Value -> cases of the pool, those without a value among the most frequent one's, and the most frequent value of
        the labelled cases; one group, and None, where the dataset has no such attribute.
    """
    known = known_attributes(fold.preprocessed.parent)
    column = known.columns.get(fold.settings.teacher.balance or "", {}) if known else {}
    values = {case: UNKNOWN if is_missing(column.get(case, "")) else column[case] for case in reader.cases}
    counts = Counter(values[case] for case in reader.pool if values[case] != UNKNOWN)
    if not counts:
        return {ALL: reader.pool}, None
    # a group of its own would be drawn as often as a scanner
    pool, most_common = set(reader.pool), counts.most_common(1)[0][0]
    values = {case: most_common if value == UNKNOWN and case in pool else value for case, value in values.items()}
    labelled = [values[case] for case in reader.cases if case not in pool and values[case] != UNKNOWN]
    most = max(sorted(set(labelled)), key=labelled.count) if labelled else None
    return {name: tuple(case for case in reader.pool if values[case] == name) for name in sorted(counts)}, most


def head_names(fold: FoldContext) -> list[str]:
    """Names of the network's classes, background first, or of its regions."""
    named = {labels_of(value): name for name, value in fold.dataset_json["labels"].items()}
    heads: Sequence[Any] = fold.labels.foreground_regions if fold.labels.has_regions else fold.labels.all_labels
    return [named.get(labels_of(head), str(head)) for head in heads]


def manual_shares(fold: FoldContext, reader: PretrainingCases, heads: int) -> Tensor:
    """(heads,) shares of the classes or regions in random patches of the labelled training cases."""
    cases = sorted(set(reader.labelled) - set(reader.pool))
    counted = []
    for number in range(COUNTED_CROPS if cases else 0):
        case, generator = cases[number % len(cases)], generator_for(fold.settings.seed, STREAM, number)
        box = draw_crop_box(generator, reader.shape(case)[1:], fold.geometry.patch_size)
        found = reader.labels(case, box.inside)
        assert found is not None
        # padding and voxels outside of nnU-Net's mask are background, as they are to the network
        labels = box.pad(found[0][None]).long().clamp_min(0)[None]
        known = torch.ones_like(labels, dtype=torch.bool)
        if fold.labels.ignore_label is not None:
            known &= labels != fold.labels.ignore_label
        if fold.labels.has_regions:
            regions = [torch.isin(labels[:, 0], torch.tensor(labels_of(one))) for one in fold.labels.foreground_regions]
            labels = torch.stack(regions, 1)
            known = known.expand_as(labels)
        counted.append(shares(labels, known, heads, fold.labels.has_regions))
    return torch.stack(counted).mean(0) if counted else torch.zeros(heads)


def _with_pool(settings: Settings, *kept: str) -> Settings:
    """The settings with the training cases and the pool as cases of phase 1; choices in ``kept`` stay."""
    if settings.pretrain.data in ("training_and_pool", *kept):
        return settings
    return replace(settings, pretrain=replace(settings.pretrain, data="training_and_pool"))


class _OnlyPool:
    """A reader of the pool alone: counterfactuals of other cases are not needed."""

    def __init__(self, reader: PretrainingCases) -> None:
        self.cases, self.labelled, self.known = reader.pool, (), reader.known
        self.shape, self.read, self.labels = reader.shape, reader.read, reader.labels
