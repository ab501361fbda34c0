"""The settings in the identity of a run keep their digests: finished pretrainings and generators stay reusable.

The digests were recorded when the selection was still a list of keys. A new default, or a new setting that belongs to
the identity, changes them: every finished run on a user's disk is then trained again.
"""

import pytest

from nnunet_cfcl.config import Settings, identity_settings, resolve_settings, settings_keys
from nnunet_cfcl.files.hashing import digest
from nnunet_cfcl.phases.pretraining_task import _identity_settings
from nnunet_cfcl.pretraining import methods
from nnunet_cfcl.pretraining.methods import Method

METHODS = {method.name: method for method in vars(methods).values() if isinstance(method, Method)}
#: Digests of the default settings: counterfactuals by acquisition effects, and by a generator, a store or none.
PRETRAINING = {
    "DVD-CL": ("f4d69d555285", "ce49a3732001"),
    "MVD-CL": ("b5393987dd62", "32e6af74b583"),
    "S-DVD-CL": ("072336221e2b", "2b75045404d6"),
    "S-MVD-CL": ("d363f7c53e4c", "8e5249b52d6e"),
    "VADeR": ("f4d69d555285", "ce49a3732001"),
    "SSDCL": ("d363f7c53e4c", "8e5249b52d6e"),
    "SimCLR": ("2979acf997b4", "d0f29ee0b5bc"),
    "CF-SimCLR": ("2979acf997b4", "d0f29ee0b5bc"),
    "supervised": ("9459bd708849", "da76e46686cc"),
    "PixPro": ("e5e816858454", "1fd8eb62d4d2"),
    "MAE": ("0ca008e96ebf", "39f93d1a31d9"),
}
GENERATOR = "10ba25ce9d70"
#: Settings outside the identity of every pretraining, whatever the method and the counterfactuals.
WITHOUT_EFFECT = (
    "preset", "pretrain.enabled", "pretrain.patches_per_pass", "counterfactual.source", "counterfactual.store",
    "counterfactual.interventions", "counterfactual.abduction", "generator.", "gate.", "finetune.",
)


def keys(nested: dict) -> set[str]:
    """Dotted keys."""
    return {f"{key}.{name}" if name else key for key, part in nested.items()
            for name in (part if isinstance(part, dict) else [""])}


@pytest.mark.parametrize("name", METHODS)
def test_the_default_settings_of_every_method_keep_their_digests(name):
    acquisition, others = PRETRAINING[name]
    for source, expected in (("acquisition", acquisition), ("generator and acquisition", acquisition),
                             ("generator", others), ("precomputed", others), ("none", others)):
        assert digest(_identity_settings(Settings(), METHODS[name], source)) == expected, source


def test_the_generators_default_settings_keep_their_digest():
    assert digest(identity_settings(Settings(), "generator")["generator"]) == GENERATOR


def test_changed_settings_are_in_the_identity_with_their_values():
    settings = resolve_settings({
        "seed": 5, "pretrain.epochs": 3, "counterfactual.count": 2, "silver.confidence": False, "gate.cases": 3,
        "generator.epochs": 2, "generator.memory_gb": 2, "acquisition.probability": 0.2, "finetune.epochs": 9})
    found = _identity_settings(settings, methods.S_MVD_CL, "acquisition")
    assert (found["seed"], found["pretrain"]["epochs"], found["silver"]["confidence"]) == (5, 3, False)
    assert (found["counterfactual"], found["acquisition"]["probability"]) == ({"count": 2}, 0.2)
    generator = identity_settings(settings, "generator")["generator"]
    assert generator["epochs"] == 2 and "memory_gb" not in generator


@pytest.mark.parametrize("name", METHODS)
def test_a_pretraining_depends_on_the_settings_of_its_method_alone(name):
    found = keys(_identity_settings(Settings(), METHODS[name], "none"))
    assert not [key for key in found if key.startswith(WITHOUT_EFFECT)]
    assert not [key for key in found if key.startswith("acquisition.")]
    assert {key for key, _, _ in settings_keys() if key.startswith(("views.", "chromap."))} <= found
    assert ("silver.min_quality" in found) == METHODS[name].needs_labels
