"""FoldContext: everything a phase, the doctor, the probe or a command needs to know about one fold of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager, determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_cfcl.config import Settings, resolve_settings
from nnunet_cfcl.errors import NotSupported, UserError
from nnunet_cfcl.nnunet import compatibility
from nnunet_cfcl.nnunet.experiment_loggers import Track, pretraining_tracker, track_nothing
from nnunet_cfcl.nnunet.lookup import check_folders, find_dataset, load_configuration, load_plan
from nnunet_cfcl.nnunet.plan import settings_block, view_geometry
from nnunet_cfcl.nnunet.segmentation_loss import NnUNetLoss, segmentation_loss
from nnunet_cfcl.runs.seeds import seed_everything
from nnunet_cfcl.views import ViewGeometry

#: nnU-Net's own number of training iterations per epoch.
ITERATIONS_PER_EPOCH = 250
#: Training and validation cases.
Split = tuple[Sequence[str], Sequence[str]]


@dataclass(frozen=True)
class FoldContext:
    """One fold of a training, as a live trainer has it (`of`) or as its names say (`find`).

    Attributes:
        trainer_class: builds the network, names the model's folder.
        plans, configuration, labels, dataset_json: as nnU-Net reads them.
        configuration_name: e.g. "3d_fullres".
        fold: its number, or "all".
        preprocessed: folder of the preprocessed cases of this configuration.
        folder: results folder of the fold (``fold_F``).
        device: of this process.
        settings: resolved for this configuration and trainer.
        log: writes a line for the user, as nnU-Net's ``print_to_log_file``.
        split: returns training and validation cases as the trainer splits them; nnU-Net's own writes
            ``splits_final.json`` where there is none.
        loss: builds the trainer's segmentation loss.
        saves: False: nothing is written (nnU-Net's ``disable_checkpointing``).
        compiles: returns whether the trainer compiles its network.
        deep_supervision: whether the trainer trains with it.
        iterations_per_epoch: of the fine-tuning.
        track: logs the metrics of one pretraining epoch in nnU-Net's experiment loggers.
    """

    trainer_class: type[nnUNetTrainer]
    plans: PlansManager
    configuration: ConfigurationManager
    configuration_name: str
    fold: int | str
    dataset_json: Mapping[str, Any]
    labels: LabelManager
    preprocessed: Path
    folder: Path
    device: torch.device
    settings: Settings
    log: Callable[..., None]
    split: Callable[[], Split]
    loss: Callable[[], NnUNetLoss]
    saves: bool = True
    compiles: Callable[[], bool] = field(default=lambda: False)
    deep_supervision: bool = True
    iterations_per_epoch: int = ITERATIONS_PER_EPOCH
    track: Track = field(default=track_nothing)

    @classmethod
    def of(cls, trainer: nnUNetTrainer) -> FoldContext:
        """The fold of a live trainer of the plugin, which has ``settings``."""
        return cls(
            trainer_class=type(trainer), plans=trainer.plans_manager, configuration=trainer.configuration_manager,
            configuration_name=trainer.configuration_name, fold=trainer.fold, dataset_json=trainer.dataset_json,
            labels=trainer.label_manager,
            preprocessed=Path(trainer.preprocessed_dataset_folder), folder=Path(trainer.output_folder),
            device=trainer.device, settings=trainer.settings, log=trainer.print_to_log_file, split=trainer.do_split,
            loss=partial(segmentation_loss, trainer), saves=not trainer.disable_checkpointing,
            compiles=trainer._do_i_compile, deep_supervision=trainer.enable_deep_supervision,
            iterations_per_epoch=trainer.num_iterations_per_epoch, track=pretraining_tracker(trainer))

    @classmethod
    def find(
        cls, trainer_class: type[nnUNetTrainer], dataset: str, configuration: str, fold: str, plans: str,
        device: torch.device, log: Callable[..., None],
    ) -> FoldContext:
        """The fold that a training with these names has.

        Args:
            trainer_class: any trainer of nnU-Net's; with ``prepared_settings`` (the plugin's own) it resolves them.
            dataset: number or name.
            configuration: one of the plan's configurations.
            fold: number or "all".
            plans: identifier of the plan.
            device: of this process.
            log: writes a line for the user, as nnU-Net's ``print_to_log_file``.

        Raises:
            UserError: nnU-Net's folders, the dataset, its plan or the configuration are missing; there is no such fold;
                invalid settings.
        """
        for result in check_folders():
            result.raise_on_failure()
        name = find_dataset(dataset)
        plan = load_plan(name, plans, configuration)
        load_configuration(plan, plans, configuration)
        manager = PlansManager(plan)
        chosen, number = manager.get_configuration(configuration), _fold(fold)
        base = Path(str(nnUNet_preprocessed)) / manager.dataset_name
        model = f"{trainer_class.__name__}__{manager.plans_name}__{configuration}"
        prepared = getattr(trainer_class, "prepared_settings", lambda block: resolve_settings(settings_block(block)))
        settings: Settings = prepared(chosen)
        description = load_json(str(Path(str(nnUNet_preprocessed)) / name / "dataset.json"))
        found = cls(
            trainer_class=trainer_class, plans=manager, configuration=chosen, configuration_name=configuration,
            fold=number, dataset_json=description, labels=manager.get_label_manager(description),
            preprocessed=base / chosen.data_identifier,
            folder=Path(str(nnUNet_results)) / manager.dataset_name / model / f"fold_{number}", device=device,
            settings=settings, log=log, split=lambda: _without_constructor(found).do_split(),
            loss=lambda: segmentation_loss(_without_constructor(found)),
            compiles=lambda: _without_constructor(found)._do_i_compile(),
            iterations_per_epoch=settings.finetune.iterations_per_epoch or ITERATIONS_PER_EPOCH)
        return found

    @property
    def dataset(self) -> str:
        """Full name of the dataset, ``DatasetXXX_NAME``."""
        return str(self.plans.dataset_name)

    @property
    def geometry(self) -> ViewGeometry:
        """Patch size in voxels and spacing in millimetres."""
        return view_geometry(self.configuration)

    @property
    def schemes(self) -> Sequence[str]:
        """The intensity normalisation of every channel."""
        schemes: Sequence[str] = self.configuration.normalization_schemes
        return schemes

    def compiled(self, network: torch.nn.Module) -> torch.nn.Module:
        """The network, compiled where the trainer compiles its own."""
        return cast(torch.nn.Module, torch.compile(network)) if self.compiles() else network

    def build_network(self) -> torch.nn.Module:
        """The trainer's network on the fold's device, with the weights that its own ``initialize`` begins with; where
        the class does not seed, with those of the settings' seed."""
        if hasattr(self.trainer_class, "prepared_settings"):
            seed_everything(self.settings.seed)
        else:
            torch.manual_seed(self.settings.seed)
        channels = determine_num_input_channels(self.plans, self.configuration, self.dataset_json)
        network: torch.nn.Module = compatibility.build_network(
            _without_constructor(self), self.plans, self.configuration, channels, self.labels.num_segmentation_heads,
            self.deep_supervision)
        return network.to(self.device)


def check_device_type(device: torch.device) -> None:
    """Reject devices that the plugin's own trainings do not run on.

    Raises:
        NotSupported: the device is neither cpu nor cuda.
    """
    if device.type not in ("cpu", "cuda"):
        raise NotSupported(f"the plugin's own phases run with -device cuda or cpu, found {device.type}")


def _fold(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise UserError(f"the fold must be a number from 0 or 'all', found '{text}'")
    return text if text == "all" else int(text)


def _without_constructor(fold: FoldContext) -> nnUNetTrainer:
    """Create an object for the methods that a subclass may override and nnU-Net offers nowhere else: ``do_split``,
    ``_build_loss``, ``_do_i_compile`` and ``build_network_architecture``.

    nnU-Net's constructor creates folders and log files, takes the global rank for the local one, and CUDA for granted
    wherever torch.distributed runs, which does not hold on several machines or on CPUs.
    """
    trainer = object.__new__(fold.trainer_class)
    trainer.plans_manager, trainer.configuration_manager = fold.plans, fold.configuration
    trainer.configuration_name, trainer.fold, trainer.device = fold.configuration_name, fold.fold, fold.device
    trainer.dataset_json, trainer.label_manager = fold.dataset_json, fold.labels
    trainer.preprocessed_dataset_folder = str(fold.preprocessed)
    trainer.preprocessed_dataset_folder_base = str(fold.preprocessed.parent)
    trainer.output_folder, trainer.output_folder_base = str(fold.folder), str(fold.folder.parent)
    trainer.dataset_class = trainer.folder_with_segs_from_previous_stage = None
    trainer.is_ddp, trainer.local_rank, trainer.disable_checkpointing = False, 0, not fold.saves
    trainer.enable_deep_supervision, trainer.num_iterations_per_epoch = fold.deep_supervision, fold.iterations_per_epoch
    trainer.settings, trainer.print_to_log_file = fold.settings, fold.log
    return trainer
