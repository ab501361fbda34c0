"""What nnU-Net can do, and what becomes of it with the plugin's trainers: one list for the tests and for the page."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Feature:
    """A feature of nnU-Net.

    Attributes:
        name: as users know it, in Markdown.
        result: what happens, in Markdown.
        tests: ``FILE::NAME`` of the tests that show it, FILE below ``tests/``.
    """

    name: str
    result: str
    tests: tuple[str, ...]


_FEATURES = "end_to_end/test_nnunet_features.py"
_VARIANTS = "end_to_end/test_trainer_variants.py"

FEATURES = (
    Feature("several channels", "works, in both phases",
            (f"{_FEATURES}::test_two_channels_regions_and_an_ignore_label_are_pretrained_and_trained",)),
    Feature("region-based labels (`regions_class_order`)", "works, for the supervised methods too",
            (f"{_FEATURES}::test_two_channels_regions_and_an_ignore_label_are_pretrained_and_trained",
             "nnunet/test_segmentation_loss.py::test_loss_and_gradient_are_those_of_nnunets_own_training")),
    Feature("ignore label", "works; no point of a view lies on it, no mask holds it",
            (f"{_FEATURES}::test_npz_keeps_a_probability_for_every_region_and_no_mask_holds_the_ignore_label",
             "pretraining/test_data.py::test_the_ignore_label_is_no_foreground_that_a_crop_is_drawn_for")),
    Feature("splits of one's own (`splits_final.json`)", "works; they decide about the pretraining's cases",
            (f"{_FEATURES}::"
             "test_splits_of_ones_own_decide_which_cases_are_pretrained_on_and_which_are_predicted",)),
    Feature("fold `all`", "works",
            (f"{_FEATURES}::test_fold_all_is_pretrained_and_trained_on_every_case",
             "end_to_end/test_other_dataset.py::"
             "test_all_cases_of_the_source_are_pretrained_on_and_its_plan_is_the_targets")),
    Feature("`--npz`", "works",
            (f"{_FEATURES}::test_npz_keeps_a_probability_for_every_region_and_no_mask_holds_the_ignore_label",)),
    Feature("`--val`, `--val_best`", "works; nothing is pretrained again",
            (f"{_FEATURES}::test_val_best_validates_the_best_checkpoint_and_leaves_the_final_one_alone",)),
    Feature("`--c`", "works, in whichever phase a run was killed",
            ("end_to_end/test_train_3d.py::test_a_run_killed_in_phase_1_goes_on_there",)),
    Feature("`-pretrained_weights`", "works; phase 1 is left out",
            ("end_to_end/test_other_dataset.py::test_phase_2_on_the_target_starts_from_the_weights_of_the_source",)),
    Feature("`nnUNetv2_export_model_to_zip`, `nnUNetv2_install_pretrained_model_from_zip`",
            "works; the plugin is needed there; the colour space of CHRO-maps is not in the zip",
            (f"{_FEATURES}::test_a_model_exported_to_a_zip_predicts_the_same_masks_in_another_installation",)),
    Feature("residual encoder plans (`nnUNetPlannerResEncM`)", "works",
            (f"{_FEATURES}::test_a_plan_of_nnunets_planner_of_residual_encoders_is_pretrained_and_trained",
             f"{_VARIANTS}::test_a_residual_encoder_plan_trains")),
    Feature("`3d_lowres`", "works", (f"{_VARIANTS}::test_3d_lowres_trains",)),
    Feature("`3d_cascade_fullres`",
            "is rejected at the start of phase 1 with the advice to set `pretrain.enabled` to false for this stage; "
            "with that the first stage is pretrained, the second trained, both predict",
            (f"{_FEATURES}::"
             "test_a_cascades_first_stage_is_pretrained_and_its_second_trained_once_pretraining_is_switched_off",
             "doctor/test_pretraining.py::test_a_cascades_second_stage_is_refused_and_the_first_named")),
    Feature("torch.compile, on and off (`nnUNet_compile`)", "works; same losses",
            (f"{_VARIANTS}::test_a_compiled_network_is_trained_in_both_phases_as_one_that_is_not",)),
    Feature("batch norm", "is rejected before training if a step needs several micro-batches; the error gives the fix",
            (f"{_VARIANTS}::test_plans_that_cannot_be_pretrained_are_refused_before_training",)),
    Feature("other trainers (`nnUNetTrainerDA5`, no deep supervision)", "are pretrained by the mixin",
            (f"{_VARIANTS}::test_other_peoples_trainers_are_pretrained_by_the_mixin",)),
)
