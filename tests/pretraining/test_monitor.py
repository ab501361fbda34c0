"""Warnings about a pretraining whose embeddings carry no information."""

import math

from nnunet_cfcl.pretraining.monitor import collapse_warning

HEALTHY = {"loss": 10.0, "uniformity": -2.0, "uninformed": 2 * math.log(1000), "learning_rate": 1e-3, "alignment": 0.3,
           "positives": 1.0, "gradient_norm": 1.0}


def test_collapsed_and_uninformed_embeddings_are_warned_of():
    assert collapse_warning(HEALTHY) is None
    assert "collapsed" in collapse_warning({**HEALTHY, "uniformity": -0.01})
    assert collapse_warning({"loss": 3.0}) is None
    assert "guessing" in collapse_warning({**HEALTHY, "loss": 2 * math.log(1000)})
