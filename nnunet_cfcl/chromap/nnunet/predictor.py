"""nnU-Net's predictor that also writes CHRO-maps, from the same forward passes as the masks."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nnunetv2.inference.predict_from_raw_data as nnunet_prediction
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from torch import Tensor

from nnunet_cfcl.chromap.nnunet.session import ChromapRequest, ChromapSession, Input
from nnunet_cfcl.chromap.nnunet.writer import FOLDER
from nnunet_cfcl.runs.checkpoint import check_checkpoint

if TYPE_CHECKING:
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor as Predictor
else:
    # a mixin: nnU-Net's predictor, or a class derived from it, comes after it in the list of base classes
    Predictor = object


class WithChromaps(Predictor):
    """Mixin: writes CHRO-maps of every case, from features of the first fold, to ``OUT/chromap/``.

    Masks, files and exit status are the same as without maps.

    Attributes:
        chromap_request: the maps to write; to be set before predicting.
    """

    chromap_request: ChromapRequest = ChromapRequest()
    _session: ChromapSession | None = None
    #: Whether nnU-Net predicts with the first fold's weights, and a map is wanted.
    _catches: bool = False
    # nnU-Net's
    list_of_parameters: Any
    use_mirroring: bool

    def initialize_from_trained_model_folder(
        self, model_training_output_dir: str, use_folds: Any, checkpoint_name: str = "checkpoint_final.pth"
    ) -> None:
        """Initialise as nnU-Net does, after a check of the checkpoints; the first fold has the colour space.

        Raises:
            UserError: a checkpoint is damaged.
        """
        for folder in _fold_folders(model_training_output_dir, use_folds, checkpoint_name):
            check_checkpoint(folder / checkpoint_name, "copy it again, or train the fold again")
        super().initialize_from_trained_model_folder(model_training_output_dir, use_folds, checkpoint_name)
        self.remember_fold(model_training_output_dir, use_folds, checkpoint_name)

    def remember_fold(self, model_folder: str, use_folds: Any, checkpoint_name: str) -> None:
        """Keep the folder of the first fold, as nnU-Net finds it."""
        first = _fold_folders(model_folder, use_folds, checkpoint_name)[0]
        self.chromap_request = replace(self.chromap_request, fold_folder=first)

    @functools.wraps(nnUNetPredictor.predict_from_files)
    def predict_from_files(self, *arguments: Any, **named: Any) -> Any:
        """nnU-Net's, and maps."""
        with self._maps():
            return super().predict_from_files(*arguments, **named)

    @functools.wraps(nnUNetPredictor.predict_from_files_sequential)
    def predict_from_files_sequential(self, *arguments: Any, **named: Any) -> Any:
        """nnU-Net's, and maps."""
        with self._maps(), self._announced_at_export():
            return super().predict_from_files_sequential(*arguments, **named)

    @functools.wraps(nnUNetPredictor.predict_from_data_iterator)
    def predict_from_data_iterator(self, data_iterator: Any, *arguments: Any, **named: Any) -> Any:
        """nnU-Net's, and maps of the cases that it knows the files of."""
        return super().predict_from_data_iterator(self._announced(data_iterator), *arguments, **named)

    def make_chromaps(
        self, source: str | Sequence[Sequence[str]], output_folder: str, overwrite: bool = True
    ) -> None:
        """Write maps without masks.

        Args:
            source: folder of images named as nnU-Net expects, or for every case the files of its channels.
            output_folder: folder whose subfolder ``chromap`` gets the maps.
            overwrite: False: only cases without a map.

        Raises:
            UserError: a map could not be written, and the request is strict.
        """
        ending = self.dataset_json["file_ending"]
        files = create_lists_from_splitted_dataset_folder(source, ending) if isinstance(source, str) else source
        inputs = {Path(one[0]).name[: -len(ending) - 5]: Input(tuple(one), None, None) for one in files}
        with self._maps():
            session = self._session = ChromapSession(self, self.chromap_request, Path(output_folder) / FOLDER, inputs)
            self._map([name for name in inputs if overwrite or not session.has_map(name)])

    # -- nnU-Net's own steps, observed -----------------------------------------------------------------------------

    def _manage_input_and_output_lists(
        self, source: Any, output: Any, folder_with_segs_from_prev_stage: Any = None, overwrite: bool = True,
        part_id: int = 0, num_parts: int = 1, save_probabilities: bool = False,
    ) -> Any:
        def listed(overwriting: bool) -> Any:
            return super(WithChromaps, self)._manage_input_and_output_lists(
                source, output, folder_with_segs_from_prev_stage, overwriting, part_id, num_parts, save_probabilities)

        found = listed(overwrite)
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            files, outputs, earlier = found if overwrite else listed(True)
        names = {Path(out).name for out in outputs or ()}
        if outputs and len(names) < len(outputs):
            print("no CHRO-maps: two of the outputs have the same name, in different folders")
        elif outputs:
            ending = self.dataset_json["file_ending"]
            inputs = {Path(out).name: Input(tuple(one), before, Path(out + ending))
                      for one, out, before in zip(files, outputs, earlier)}
            self._session = ChromapSession(
                self, self.chromap_request, Path(outputs[0]).parent / FOLDER, inputs,
                f"_part_{part_id}" if num_parts > 1 else "")
        return found

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """nnU-Net's, keeping the first fold's features."""
        session = self._session
        if session is not None:
            session.begin_image()
        self._catches = session is not None and session.prepare()
        logits = super().predict_logits_from_preprocessed_data(data)
        if session is not None:
            session.submit()
        return logits

    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Any:
        """nnU-Net's, observed for the first of a case's folds only."""
        logits = super().predict_sliding_window_return_logits(input_image)
        if self._session is not None and self._catches:
            self._session.end_image(input_image.shape[1:])
        self._catches = False
        return logits

    def _internal_predict_sliding_window_return_logits(
        self, data: Tensor, slicers: Any, do_on_device: bool = True
    ) -> Tensor:
        predict = super()._internal_predict_sliding_window_return_logits
        if self._session is None or not self._catches:
            return predict(data, slicers, do_on_device)
        with self._session.catching(data.shape[1:], slicers, do_on_device):
            return predict(data, slicers, do_on_device)

    def _internal_maybe_mirror_and_predict(self, x: Tensor) -> Tensor:
        logits = super()._internal_maybe_mirror_and_predict(x)
        if self._session is not None and self._catches:
            self._session.end_window()
        return logits

    # -- around them -----------------------------------------------------------------------------------------------

    @contextmanager
    def _maps(self) -> Iterator[None]:
        """Context of a prediction with maps; at its end the maps that an interrupted run left out are written."""
        self._session = None
        try:
            yield
            session: ChromapSession | None = self._session
            if session is not None:
                self._map(session.missing())
                session.finish()
        finally:
            self._session, self._catches = None, False

    def _map(self, names: Sequence[str]) -> None:
        """Write maps alone, with the first fold's weights."""
        session = self._session
        if session is None or not names or not session.prepare():
            return
        weights, mirroring = self.list_of_parameters, self.use_mirroring
        self.list_of_parameters = weights[:1]
        self.use_mirroring = mirroring and session.mirrors
        try:
            for number, name in enumerate(names):
                print(f"CHRO-map {number + 1} of {len(names)}: {name}")
                session.attempt(name, functools.partial(self._map_one, name))
        finally:
            self.list_of_parameters, self.use_mirroring = weights, mirroring

    def _map_one(self, name: str) -> None:
        assert self._session is not None
        data, properties = self._session.preprocess(name)
        self._session.describe(name, properties)
        self.predict_logits_from_preprocessed_data(torch.from_numpy(data))

    def _announced(self, items: Iterable[Any]) -> Iterator[Any]:
        """Pass nnU-Net's preprocessed cases on, announcing each to the session."""
        for item in items:
            if self._session is not None and item["ofile"] is not None:
                self._session.describe(Path(item["ofile"]).name, item["data_properties"])
            yield item

    @contextmanager
    def _announced_at_export(self) -> Iterator[None]:
        """Context in which the session gets a case's properties at its export, the only place without processes."""
        export = nnunet_prediction.export_prediction_from_logits

        @functools.wraps(export)
        def export_and_announce(logits: Any, properties: Any, *others: Any) -> Any:
            export(logits, properties, *others)
            if self._session is not None:
                self._session.describe(Path(others[3]).name, properties)
                self._session.submit()

        nnunet_prediction.export_prediction_from_logits = export_and_announce
        try:
            yield
        finally:
            nnunet_prediction.export_prediction_from_logits = export


class ChromapPredictor(WithChromaps, nnUNetPredictor):
    """`nnUNetPredictor` with CHRO-maps, a drop-in replacement."""


def _fold_folders(model_folder: str, use_folds: Any, checkpoint_name: str) -> list[Path]:
    """Folders of the folds that nnU-Net uses: one fold, several, or None for all that have the checkpoint."""
    if use_folds is None:
        use_folds = nnUNetPredictor.auto_detect_available_folds(model_folder, checkpoint_name)
    folds = [use_folds] if isinstance(use_folds, (str, int)) else use_folds
    return [Path(model_folder) / f"fold_{fold}" for fold in folds]
