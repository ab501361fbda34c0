"""CHRO-maps from nnU-Net's own commands: ``nnUNet_cfcl_chromap=1 nnUNetv2_predict ...``.

nnU-Net's prediction has no hook for plugins, but while it prepares a predictor it looks the model's trainer up, and so
imports the plugin. That predictor is given the class that also writes maps; nnU-Net itself is not changed.
"""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

from nnunet_cfcl.errors import isolated, reason

VARIABLE = "nnUNet_cfcl_chromap"


def offer_chromaps() -> None:
    """Give the predictor that is being prepared, if any, the class that also writes maps, if the variable is set.

    Called whenever nnU-Net looks the plugin's trainers up. Never raises: the masks do not depend on it.
    """
    if os.environ.get(VARIABLE, "").lower() not in ("1", "true", "t", "yes"):
        return
    with isolated() as errors:
        frame = _preparing_predictor()
        if frame is not None:
            _give_maps(frame.f_locals)
    for error in errors:
        print(f"{VARIABLE}: no CHRO-maps ({reason(error)})", file=sys.stderr)


def _preparing_predictor() -> FrameType | None:
    """Frame of nnU-Net's predictor that looks a trainer up; None: another caller does."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    wanted = nnUNetPredictor.initialize_from_trained_model_folder.__code__
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not wanted:
        frame = frame.f_back
    return frame


def _give_maps(known: dict[str, Any]) -> None:
    """Change the class of the predictor.

    Args:
        known: local variables of its ``initialize_from_trained_model_folder``.
    """
    from nnunet_cfcl.chromap.nnunet.predictor import ChromapPredictor, WithChromaps

    predictor = known["self"]
    if isinstance(predictor, WithChromaps) or not getattr(predictor, "offers_chromaps", True):
        return
    plain = type(predictor)
    predictor.__class__ = (ChromapPredictor if plain is ChromapPredictor.__bases__[-1]
                           else type(f"{plain.__name__}WithChromaps", (WithChromaps, plain), {}))
    predictor.remember_fold(known["model_training_output_dir"], known["use_folds"], known["checkpoint_name"])
